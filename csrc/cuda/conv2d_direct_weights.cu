// Direct 2-D convolution, the gradients that sum over pixels; every configuration, in f32, f64, bf16 and f16.
//
//   wgrad  dw[k,c,r,s] = sum_{n,p,q} dy[n,p,q,k] x[n, h, w, c]     h = p*stride - pad + r*dilation, w likewise
//   bgrad  db[k]       = sum_{n,p,q} dy[n,p,q,k]
//
// Deterministic, without atomics: where dw alone gives too few blocks, the pixels are cut into slices, each with its
// own partial sums in the workspace, and a second kernel adds them in order. The number of slices depends on sizes
// only.
//
// Mapping of wgrad: a block computes 64 filters x 32 of (r, s, c) of one group and slice, 4 x 4 a thread, over pixels
// in steps of 16 through shared memory. Sums of 128 pixels are added to the total as one term, which keeps the rounding
// error of long sums down. Accumulator f32 (f64 for f64), one rounding at the end. Offsets are 64-bit.
#include "../common/kernel_table.h"
#include "conv2d_axes.h"
#include "conv2d_tile.h"
#include "primitives/cuda.h"
#include "primitives/launch.h"
#include "primitives/numeric.h"

namespace cnnfast::cuda {
namespace {

using tile::kColumns;
using tile::kDepth;
using tile::kRows;
using tile::kThreads;

constexpr int kTable = 128;            // pixels whose addresses are worked out at once
constexpr int64_t kSlicePixels = 256;  // at least so many in a slice
constexpr int64_t kBlocksWanted = 512;
constexpr int64_t kMaxSlices = 64;
static_assert(kTable == kThreads && kTable % kDepth == 0, "a thread for each pixel of the table");

constexpr int kBiasChannels = 32;  // bgrad's block: 32 channels x 8 pixels
constexpr int kBiasPixels = 8;

// Elements of dw, and their tiles.
struct Tiling {
  int64_t filters, columns, row_tiles, column_tiles, owners;

  __host__ __device__ explicit Tiling(const Conv2dParams& p) {
    filters = p.K / p.G;
    columns = p.R * p.S * (p.C / p.G);
    row_tiles = ceil_div(filters, kRows);
    column_tiles = ceil_div(columns, kColumns);
    owners = row_tiles * column_tiles * p.G;
  }
};

int64_t slices_for(int64_t pixels, int64_t owners) {
  if (owners == 0) return 1;
  const int64_t wanted = std::min(ceil_div(kBlocksWanted, owners), kMaxSlices);
  return std::max<int64_t>(1, std::min(wanted, pixels / kSlicePixels));
}

struct Pixel {
  int64_t x, y;  // offsets: of the input under tap (0, 0) without padding, of the output
  int h, w;      // of the input under tap (0, 0)
  bool present;
};

struct Column {
  int64_t x;  // offset of the tap and channel
  int h, w;   // of the tap
  bool present;
};

// Offset in dw of element (k, column), and its place among the partial sums.
__device__ __forceinline__ int64_t weight_offset(const Conv2dParams& p, int64_t k, int64_t column) {
  const int64_t channels = p.C / p.G;
  const int64_t c = column % channels, tap = column / channels;
  return k * p.w_k + c * p.w_c + tap / p.S * p.w_r + tap % p.S * p.w_s;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    wgrad(const Conv2dParams p, const Tiling tiling, const T* __restrict__ x, const T* __restrict__ y,
          T* __restrict__ w, Accumulator<T>* __restrict__ partial, const int64_t slices) {
  using Acc = Accumulator<T>;
  CNNFAST_SHARED(tile::SharedA<Acc>, a, );
  CNNFAST_SHARED(tile::SharedB<Acc>, b, );
  CNNFAST_SHARED(Pixel, pixel_table, [kTable]);
  CNNFAST_SHARED(Column, column_table, [kColumns]);

  const int t = threadIdx.x;
  const int64_t pixels = p.N * p.P * p.Q, slice_pixels = ceil_div(pixels, slices);
  const int64_t channels = p.C / p.G;

  for (int64_t tile_index = blockIdx.x; tile_index < tiling.owners * slices; tile_index += gridDim.x) {
    int64_t rest = tile_index;
    const int64_t row0 = rest % tiling.row_tiles * kRows;
    rest /= tiling.row_tiles;
    const int64_t column0 = rest % tiling.column_tiles * kColumns;
    rest /= tiling.column_tiles;
    const int64_t group = rest % p.G, slice = rest / p.G;
    const int64_t begin = slice * slice_pixels, end = begin + slice_pixels < pixels ? begin + slice_pixels : pixels;

    if (t < kColumns) {
      const int64_t column = column0 + t, tap = column / channels;
      const int h = static_cast<int>(tap / p.S * p.dilation_h), w_ = static_cast<int>(tap % p.S * p.dilation_w);
      column_table[t] = {h * p.x_h + w_ * p.x_w + group * channels + column % channels, h, w_, column < tiling.columns};
    }

    tile::Results<Acc> total;
    total.clear();
    for (int64_t table0 = begin; table0 < end; table0 += kTable) {
      {
        const int64_t pixel = table0 + t;
        Pixel entry{0, 0, 0, 0, pixel < end};
        if (entry.present) {
          const int64_t q = pixel % p.Q, line = pixel / p.Q, row = line % p.P, n = line / p.P;
          entry.h = static_cast<int>(row * p.stride_h - p.pad_h);
          entry.w = static_cast<int>(q * p.stride_w - p.pad_w);
          entry.x = n * p.x_n + entry.h * p.x_h + entry.w * p.x_w;
          entry.y = n * p.y_n + row * p.y_h + q * p.y_w + group * tiling.filters;
        }
        pixel_table[t] = entry;
      }
      __syncthreads();

      tile::Results<Acc> sum;
      sum.clear();
      for (int depth0 = 0; depth0 < kTable && table0 + depth0 < end; depth0 += kDepth) {
        // Neighbouring threads read neighbouring channels of both operands.
#pragma unroll
        for (int i = 0; i < kRows * kDepth / kThreads; ++i) {
          const int row = t % kRows, depth = t / kRows + i * (kThreads / kRows);
          const Pixel& from = pixel_table[depth0 + depth];
          const bool valid = from.present && row0 + row < tiling.filters;
          a[depth][row] = valid ? Numeric<T>::widen(y[from.y + row0 + row]) : Acc(0);
        }
        const Column& tap = column_table[t % kColumns];
#pragma unroll
        for (int i = 0; i < kColumns * kDepth / kThreads; ++i) {
          const int depth = t / kColumns + i * (kThreads / kColumns);
          const Pixel& from = pixel_table[depth0 + depth];
          const bool valid = tap.present && from.present &&
                             static_cast<uint64_t>(from.h + tap.h) < static_cast<uint64_t>(p.H) &&
                             static_cast<uint64_t>(from.w + tap.w) < static_cast<uint64_t>(p.W);
          b[depth][t % kColumns] = valid ? Numeric<T>::widen(x[from.x + tap.x]) : Acc(0);
        }
        __syncthreads();
        sum.multiply(a, b, tile::first_row(t), tile::first_column(t));
        __syncthreads();
      }
      total.add(sum);
    }

#pragma unroll
    for (int i = 0; i < tile::kPerThread; ++i)
#pragma unroll
      for (int j = 0; j < tile::kPerThread; ++j) {
        const int64_t row = row0 + tile::first_row(t) + i, column = column0 + tile::first_column(t) + j;
        if (row >= tiling.filters || column >= tiling.columns) continue;
        const int64_t k = group * tiling.filters + row;
        if (slices == 1)
          w[weight_offset(p, k, column)] = Numeric<T>::narrow(total.v[i][j]);
        else
          partial[(slice * p.K + k) * tiling.columns + column] = total.v[i][j];
      }
    __syncthreads();  // the next tile overwrites the tables
  }
}

// w = the sum over slices, in order; a thread for each element.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    add_slices(const Conv2dParams p, const Accumulator<T>* __restrict__ partial, T* __restrict__ w,
               const int64_t slices) {
  const int64_t columns = Tiling(p).columns, elements = p.K * columns;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < elements; i += int64_t{gridDim.x} * kThreads) {
    Accumulator<T> sum = 0;
    for (int64_t slice = 0; slice < slices; ++slice) sum += partial[slice * elements + i];
    w[weight_offset(p, i / columns, i % columns)] = Numeric<T>::narrow(sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kBiasChannels* kBiasPixels)
    bgrad(const Conv2dParams p, const T* __restrict__ y, T* __restrict__ b, Accumulator<T>* __restrict__ partial,
          const int64_t slices) {
  using Acc = Accumulator<T>;
  CNNFAST_SHARED(Acc, sums, [kBiasPixels][kBiasChannels]);
  const int channel = threadIdx.x % kBiasChannels, lane = threadIdx.x / kBiasChannels;
  const int64_t tiles = ceil_div(p.K, kBiasChannels);
  const int64_t pixels = p.N * p.P * p.Q, slice_pixels = ceil_div(pixels, slices);

  for (int64_t tile_index = blockIdx.x; tile_index < tiles * slices; tile_index += gridDim.x) {
    const int64_t k = tile_index % tiles * kBiasChannels + channel, slice = tile_index / tiles;
    const int64_t begin = slice * slice_pixels, end = begin + slice_pixels < pixels ? begin + slice_pixels : pixels;
    Acc sum = 0;
    if (k < p.K)
      for (int64_t pixel = begin + lane; pixel < end; pixel += kBiasPixels) {
        const int64_t q = pixel % p.Q, line = pixel / p.Q;
        sum += Numeric<T>::widen(y[line / p.P * p.y_n + line % p.P * p.y_h + q * p.y_w + k]);
      }
    sums[lane][channel] = sum;
    __syncthreads();
    if (lane == 0 && k < p.K) {
      for (int i = 1; i < kBiasPixels; ++i) sum += sums[i][channel];
      if (slices == 1)
        b[k] = Numeric<T>::narrow(sum);
      else
        partial[slice * p.K + k] = sum;
    }
    __syncthreads();  // the next tile overwrites sums
  }
}

// bgrad's result as add_slices sees it: K contiguous elements.
Conv2dParams bias_as_weight(Conv2dParams p) {
  p.C = p.G;
  p.R = p.S = p.w_k = 1;
  p.w_c = p.w_r = p.w_s = 0;
  return p;
}

template <class T>
const char* launch_add_slices(const Conv2dParams& p, T* w, int64_t slices, const Launch& run) {
  const int64_t blocks = ceil_div(p.K * Tiling(p).columns, kThreads);
  return launch<add_slices<T>>(grid_for(blocks), dim3(kThreads, 1, 1), 0, run.stream, p,
                               static_cast<const Accumulator<T>*>(run.workspace), w, slices);
}

int64_t wgrad_slices(const Conv2dParams& p) { return slices_for(p.N * p.P * p.Q, Tiling(p).owners); }
int64_t bgrad_slices(const Conv2dParams& p) { return slices_for(p.N * p.P * p.Q, ceil_div(p.K, kBiasChannels)); }

template <class T>
int64_t wgrad_workspace(const void* params) {
  const auto& p = *static_cast<const Conv2dParams*>(params);
  const int64_t slices = wgrad_slices(p);
  return slices == 1 ? 0 : slices * p.K * Tiling(p).columns * static_cast<int64_t>(sizeof(Accumulator<T>));
}

template <class T>
int64_t bgrad_workspace(const void* params) {
  const auto& p = *static_cast<const Conv2dParams*>(params);
  const int64_t slices = bgrad_slices(p);
  return slices == 1 ? 0 : slices * p.K * static_cast<int64_t>(sizeof(Accumulator<T>));
}

template <class T>
const char* launch_wgrad(const void* params, const Launch& run) {
  const auto& p = *static_cast<const Conv2dParams*>(params);
  const Tiling tiling(p);
  const int64_t slices = wgrad_slices(p), tiles = tiling.owners * slices;
  if (tiles == 0) return nullptr;
  T* w = static_cast<T*>(run.operands[1]);
  const char* error = launch<wgrad<T>>(grid_for(tiles), dim3(kThreads, 1, 1), 0, run.stream, p, tiling,
                                       static_cast<const T*>(run.operands[0]), static_cast<const T*>(run.operands[3]),
                                       w, static_cast<Accumulator<T>*>(run.workspace), slices);
  return error || slices == 1 ? error : launch_add_slices(p, w, slices, run);
}

template <class T>
const char* launch_bgrad(const void* params, const Launch& run) {
  const auto& p = *static_cast<const Conv2dParams*>(params);
  const int64_t slices = bgrad_slices(p), tiles = ceil_div(p.K, kBiasChannels) * slices;
  if (tiles == 0) return nullptr;
  T* b = static_cast<T*>(run.operands[2]);
  const char* error =
      launch<bgrad<T>>(grid_for(tiles), dim3(kBiasChannels * kBiasPixels, 1, 1), 0, run.stream, p,
                       static_cast<const T*>(run.operands[3]), b, static_cast<Accumulator<T>*>(run.workspace), slices);
  return error || slices == 1 ? error : launch_add_slices(bias_as_weight(p), b, slices, run);
}

}  // namespace

CNNFAST_KERNEL("conv2d_direct.wgrad.f32", Conv2dParams, launch_wgrad<float>, wgrad_workspace<float>)
CNNFAST_KERNEL("conv2d_direct.wgrad.f64", Conv2dParams, launch_wgrad<double>, wgrad_workspace<double>)
CNNFAST_KERNEL("conv2d_direct.wgrad.bf16", Conv2dParams, launch_wgrad<__nv_bfloat16>, wgrad_workspace<__nv_bfloat16>)
CNNFAST_KERNEL("conv2d_direct.wgrad.f16", Conv2dParams, launch_wgrad<__half>, wgrad_workspace<__half>)
CNNFAST_KERNEL("conv2d_direct.bgrad.f32", Conv2dParams, launch_bgrad<float>, bgrad_workspace<float>)
CNNFAST_KERNEL("conv2d_direct.bgrad.f64", Conv2dParams, launch_bgrad<double>, bgrad_workspace<double>)
CNNFAST_KERNEL("conv2d_direct.bgrad.bf16", Conv2dParams, launch_bgrad<__nv_bfloat16>, bgrad_workspace<__nv_bfloat16>)
CNNFAST_KERNEL("conv2d_direct.bgrad.f16", Conv2dParams, launch_bgrad<__half>, bgrad_workspace<__half>)

}  // namespace cnnfast::cuda
