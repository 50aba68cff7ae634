// 2-D max pooling: every kernel size, stride, padding and dilation, in f32, f64, bf16 and f16.
//
//   fprop    y[n,c,p,q] = max_{r,s} x[n, h, w, c]      h = p*stride - pad + r*dilation, w likewise, inside the image
//   indices  the same, and i[n,c,p,q] = h*W + w of the maximum
//   jvp      y[n,c,p,q] = t[n, h, w, c] at the maximum
//   dgrad    t[n,c,h,w] = sum of y[n,p,q,c] over the windows that have their maximum at h, w
//
// The first of equal elements is the maximum; with NaNs the last NaN is. A window without elements gives -inf (and, as
// in torch, its first tap that isn't above or left of the image as index), 0 in jvp, and nothing to dgrad.
//
// Mapping: neighbouring threads take neighbouring channels; a thread takes as many as 16 bytes hold and one output.
// In dgrad a thread takes one or two channels and a tile of up to 32 pixels of t. It finds the maximum of each window
// that reaches into its tile and adds the gradient to the pixel's sum in shared memory: every sum has one owner, who
// adds in the order of p, q, so that there are no atomics and no barriers, and the result doesn't depend on the tiling.
// Layout: NHWC, any pixel strides; where sizes, strides or addresses don't allow vectors a thread takes one channel.
// Accumulator of dgrad f32 (f64 for f64), one rounding at the end; the other directions copy elements bit by bit.
// Memory offsets are 64-bit, coordinates within an image 32-bit.
#include <cmath>

#include "../common/kernel_table.h"
#include "primitives/cuda.h"
#include "primitives/launch.h"
#include "primitives/numeric.h"

namespace cnnfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;
constexpr unsigned kTapsAtOnce = 3;  // loads under way at a time

constexpr int kTileThreads = 128;  // of dgrad; its sums take 256 bytes of shared memory a thread, 32 KB a block
constexpr int kTileRows = 4;
constexpr int kTileColumns = 8;
constexpr int kTilePixels = kTileRows * kTileColumns;
constexpr int64_t kItemsWanted = 1 << 16;  // with fewer tiles are made smaller

template <class T>
constexpr int kTileChannels = sizeof(T) == 8 ? 1 : 2;

enum class Direction { fprop, indices, jvp };

__host__ __device__ __forceinline__ int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Neighbouring channels, moved by one instruction.
template <class T, int width>
struct alignas(width * sizeof(T) < 16 ? width * sizeof(T) : 16) Pack {
  T v[width];
};

template <class T, int width>
__device__ __forceinline__ Pack<T, width> load(const T* from) {
  return *reinterpret_cast<const Pack<T, width>*>(from);
}

// The i-th pack of a pixel. (With an index in elements, i * width, the compiler would write them one by one.)
template <class T, int width>
__device__ __forceinline__ Pack<T, width>& pack_of(T* pixel, int64_t i) {
  return reinterpret_cast<Pack<T, width>*>(pixel)[i];
}

// A window along one axis: its taps inside the image are first, first + dilation, ... below end. Unsigned, so that a
// step past the end can't overflow.
struct Taps {
  unsigned first, end;

  __device__ __forceinline__ Taps(int64_t out, int64_t size, int64_t filter, int64_t stride, int64_t pad,
                                  int64_t dilation_) {
    const int dilation = static_cast<int>(dilation_);
    const int start = static_cast<int>(out) * static_cast<int>(stride) - static_cast<int>(pad);
    const int past = start + (static_cast<int>(filter) - 1) * dilation + 1;
    first = static_cast<unsigned>(start);
    if (start < 0) first += (static_cast<unsigned>(-start) + dilation - 1) / dilation * dilation;
    end = past < 0 ? 0 : past < size ? static_cast<unsigned>(past) : static_cast<unsigned>(size);
  }
  __device__ __forceinline__ bool empty() const { return first >= end; }
};

// The maxima of the window rows x columns in neighbouring channels: as they are, and the labels of their places.
template <class T, int width>
struct Maximum {
  Pack<T, width> value;
  int label[width];

  // x points to the image's pixel 0, 0; label_of(h, w) labels a pixel.
  template <class LabelOf>
  __device__ __forceinline__ void search(const MaxPool2dParams& p, const T* __restrict__ x, const Taps& rows,
                                         const Taps& columns, LabelOf label_of) {
    using Acc = Accumulator<T>;
    Acc best[width];
    const int first = label_of(rows.first, columns.first);
#pragma unroll
    for (int e = 0; e < width; ++e) {
      best[e] = -static_cast<Acc>(INFINITY);
      value.v[e] = Numeric<T>::narrow(best[e]);
      label[e] = first;
    }
    const unsigned dilation_h = static_cast<unsigned>(p.dilation_h), dilation_w = static_cast<unsigned>(p.dilation_w);
    const int64_t step = dilation_w * p.x_w;
    for (unsigned h = rows.first; h < rows.end; h += dilation_h) {
      const T* from = x + h * p.x_h + columns.first * p.x_w;
      for (unsigned w = columns.first; w < columns.end; w += kTapsAtOnce * dilation_w, from += kTapsAtOnce * step) {
        Pack<T, width> taps[kTapsAtOnce];
#pragma unroll
        for (unsigned i = 0; i < kTapsAtOnce; ++i)
          if (w + i * dilation_w < columns.end) taps[i] = load<T, width>(from + i * step);
#pragma unroll
        for (unsigned i = 0; i < kTapsAtOnce; ++i) {
          if (w + i * dilation_w >= columns.end) break;
          const int here = label_of(h, w + i * dilation_w);
#pragma unroll
          for (int e = 0; e < width; ++e) {
            const Acc v = Numeric<T>::widen(taps[i].v[e]);
            if (v > best[e] || v != v) {
              best[e] = v;
              value.v[e] = taps[i].v[e];
              label[e] = here;
            }
          }
        }
      }
    }
  }
};

// An item is one output pixel and `width` channels, the channels fastest. `t` is read by jvp, `i` written by indices.
template <class T, int width, Direction direction>
__global__ void __launch_bounds__(kThreads, 3)
    pool(const MaxPool2dParams p, const int64_t items, const T* __restrict__ x, const T* __restrict__ t,
         T* __restrict__ y, int64_t* __restrict__ index) {
  for (int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x; item < items;
       item += int64_t{gridDim.x} * kThreads) {
    const int64_t packs = p.C / width, pixel = item / packs, pack = item % packs, c = pack * width;
    const int64_t line = pixel / p.Q, q = pixel % p.Q, n = line / p.P, row = line % p.P;
    const Taps rows(row, p.H, p.R, p.stride_h, p.pad_h, p.dilation_h);
    const Taps columns(q, p.W, p.S, p.stride_w, p.pad_w, p.dilation_w);
    const unsigned W = static_cast<unsigned>(p.W);

    Maximum<T, width> maximum;
    maximum.search(p, x + n * p.x_n + c, rows, columns,
                   [W](unsigned h, unsigned w) { return static_cast<int>(h * W + w); });
    Pack<T, width> result = maximum.value;
    if constexpr (direction == Direction::indices) {
      const bool empty = rows.empty() || columns.empty();
      Pack<int64_t, width> places;
#pragma unroll
      for (int e = 0; e < width; ++e) places.v[e] = empty ? rows.first * p.W + columns.first : maximum.label[e];
      pack_of<int64_t, width>(index + n * p.i_n + row * p.i_h + q * p.i_w, pack) = places;
    }
    if constexpr (direction == Direction::jvp) {
      const bool empty = rows.empty() || columns.empty();
#pragma unroll
      for (int e = 0; e < width; ++e) {
        const unsigned place = static_cast<unsigned>(maximum.label[e]), h = place / W, w = place - h * W;
        result.v[e] = empty ? Numeric<T>::narrow(0) : t[n * p.t_n + h * p.t_h + w * p.t_w + c + e];
      }
    }
    pack_of<T, width>(y + n * p.y_n + row * p.y_h + q * p.y_w, pack) = result;
  }
}

// How dgrad cuts t into tiles: where the stride allows at a multiple of it, which windows then straddle least.
struct Tiling {
  int height, width;
  int64_t rows, columns;  // of tiles

  Tiling(const MaxPool2dParams& p, int64_t images_and_packs) {
    height = fit(kTileRows, p.stride_h);
    width = fit(kTileColumns, p.stride_w);
    count(p);
    while (rows * columns * images_and_packs < kItemsWanted && height * width > 4) {
      if (height >= width)
        height = fit(height / 2, p.stride_h);
      else
        width = fit(width / 2, p.stride_w);
      count(p);
    }
  }

 private:
  static int fit(int size, int64_t stride) { return static_cast<int>(stride < size ? size / stride * stride : size); }
  void count(const MaxPool2dParams& p) {
    rows = ceil_div(p.H, height);
    columns = ceil_div(p.W, width);
  }
};

// The windows along one axis that reach into begin .. end - 1.
struct Windows {
  int first, last;

  __device__ __forceinline__ Windows(int64_t begin, int64_t end, int64_t out, int64_t filter, int64_t stride,
                                     int64_t pad, int64_t dilation) {
    const int64_t from = begin + pad - (filter - 1) * dilation, to = (end - 1 + pad) / stride;
    first = static_cast<int>(from > 0 ? ceil_div(from, stride) : 0);
    last = static_cast<int>(to < out ? to : out - 1);
  }
};

// An item is a tile of one image and `width` channels, the channels fastest.
template <class T, int width>
__global__ void __launch_bounds__(kTileThreads, 6)
    dgrad(const MaxPool2dParams p, const Tiling tiling, const int64_t items, const T* __restrict__ x,
          const T* __restrict__ y, T* __restrict__ t) {
  using Acc = Accumulator<T>;
  CNNFAST_SHARED(Acc, sums, [kTilePixels][width][kTileThreads]);
  const int self = threadIdx.x;

  for (int64_t item = int64_t{blockIdx.x} * kTileThreads + self; item < items;
       item += int64_t{gridDim.x} * kTileThreads) {
    const int64_t packs = p.C / width, tile = item / packs, pack = item % packs, c = pack * width;
    const int64_t line = tile / tiling.columns, n = line / tiling.rows;
    const int h0 = static_cast<int>(line % tiling.rows) * tiling.height;
    const int w0 = static_cast<int>(tile % tiling.columns) * tiling.width;
    const int height = p.H - h0 < tiling.height ? static_cast<int>(p.H) - h0 : tiling.height;
    const int columns_inside = p.W - w0 < tiling.width ? static_cast<int>(p.W) - w0 : tiling.width;

    for (int pixel = 0; pixel < height * columns_inside; ++pixel)
#pragma unroll
      for (int e = 0; e < width; ++e) sums[pixel][e][self] = 0;

    // The pixel's place among the sums, or -1.
    auto label_of = [=](unsigned h, unsigned w) {
      const unsigned i = h - h0, j = w - w0;  // huge above and left of the tile
      const bool inside = i < static_cast<unsigned>(height) && j < static_cast<unsigned>(columns_inside);
      return inside ? static_cast<int>(i) * columns_inside + static_cast<int>(j) : -1;
    };
    const Windows down(h0, h0 + height, p.P, p.R, p.stride_h, p.pad_h, p.dilation_h);
    const Windows across(w0, w0 + columns_inside, p.Q, p.S, p.stride_w, p.pad_w, p.dilation_w);
    for (int row = down.first; row <= down.last; ++row) {
      const Taps rows(row, p.H, p.R, p.stride_h, p.pad_h, p.dilation_h);
      for (int q = across.first; q <= across.last; ++q) {
        const Taps columns(q, p.W, p.S, p.stride_w, p.pad_w, p.dilation_w);
        if (rows.empty() || columns.empty()) continue;
        const auto gradient = load<T, width>(y + n * p.y_n + row * p.y_h + q * p.y_w + c);
        Maximum<T, width> maximum;
        maximum.search(p, x + n * p.x_n + c, rows, columns, label_of);
#pragma unroll
        for (int e = 0; e < width; ++e)
          if (maximum.label[e] >= 0) sums[maximum.label[e]][e][self] += Numeric<T>::widen(gradient.v[e]);
      }
    }

    T* to = t + n * p.t_n + h0 * p.t_h + w0 * p.t_w;
    for (int i = 0, pixel = 0; i < height; ++i)
      for (int j = 0; j < columns_inside; ++j, ++pixel) {
        Pack<T, width> result;
#pragma unroll
        for (int e = 0; e < width; ++e) result.v[e] = Numeric<T>::narrow(sums[pixel][e][self]);
        pack_of<T, width>(to + i * p.t_h + j * p.t_w, pack) = result;
      }
  }
}

// Whether every operand can be read and written `width` channels at a time.
template <class T>
bool takes_packs(const MaxPool2dParams& p, const Launch& run, int width) {
  const int64_t strides[] = {p.x_n | p.x_h | p.x_w, p.y_n | p.y_h | p.y_w, p.i_n | p.i_h | p.i_w,
                             p.t_n | p.t_h | p.t_w};
  const int64_t bytes = width * static_cast<int64_t>(sizeof(T));
  bool fits = p.C % width == 0;
  for (int i = 0; i < 4; ++i)
    if (run.operands[i])
      fits = fits && strides[i] % width == 0 && reinterpret_cast<uintptr_t>(run.operands[i]) % bytes == 0;
  return fits;
}

template <class T, int width, Direction direction>
const char* launch_pool_of(const MaxPool2dParams& p, const Launch& run) {
  const int64_t items = p.N * p.P * p.Q * (p.C / width);
  if (items == 0) return nullptr;
  return launch<pool<T, width, direction>>(grid_for(ceil_div(items, kThreads)), dim3(kThreads, 1, 1), 0, run.stream, p,
                                           items, static_cast<const T*>(run.operands[0]),
                                           static_cast<const T*>(run.operands[3]), static_cast<T*>(run.operands[1]),
                                           static_cast<int64_t*>(run.operands[2]));
}

template <class T, Direction direction>
const char* launch_pool(const void* params, const Launch& run) {
  const auto& p = *static_cast<const MaxPool2dParams*>(params);
  constexpr int width = kVectorBytes / sizeof(T);
  return takes_packs<T>(p, run, width) ? launch_pool_of<T, width, direction>(p, run)
                                       : launch_pool_of<T, 1, direction>(p, run);
}

template <class T, int width>
const char* launch_dgrad_of(const MaxPool2dParams& p, const Launch& run) {
  const int64_t packs = p.C / width;
  if (p.N * p.H * p.W * packs == 0) return nullptr;
  const Tiling tiling(p, p.N * packs);
  const int64_t items = p.N * tiling.rows * tiling.columns * packs;
  return launch<dgrad<T, width>>(grid_for(ceil_div(items, kTileThreads)), dim3(kTileThreads, 1, 1), 0, run.stream, p,
                                 tiling, items, static_cast<const T*>(run.operands[0]),
                                 static_cast<const T*>(run.operands[1]), static_cast<T*>(run.operands[3]));
}

template <class T>
const char* launch_dgrad(const void* params, const Launch& run) {
  const auto& p = *static_cast<const MaxPool2dParams*>(params);
  constexpr int width = kTileChannels<T>;
  return takes_packs<T>(p, run, width) ? launch_dgrad_of<T, width>(p, run) : launch_dgrad_of<T, 1>(p, run);
}

}  // namespace

CNNFAST_KERNEL("max_pool2d.fprop.f32", MaxPool2dParams, (launch_pool<float, Direction::fprop>), nullptr)
CNNFAST_KERNEL("max_pool2d.fprop.f64", MaxPool2dParams, (launch_pool<double, Direction::fprop>), nullptr)
CNNFAST_KERNEL("max_pool2d.fprop.bf16", MaxPool2dParams, (launch_pool<__nv_bfloat16, Direction::fprop>), nullptr)
CNNFAST_KERNEL("max_pool2d.fprop.f16", MaxPool2dParams, (launch_pool<__half, Direction::fprop>), nullptr)
CNNFAST_KERNEL("max_pool2d.indices.f32", MaxPool2dParams, (launch_pool<float, Direction::indices>), nullptr)
CNNFAST_KERNEL("max_pool2d.indices.f64", MaxPool2dParams, (launch_pool<double, Direction::indices>), nullptr)
CNNFAST_KERNEL("max_pool2d.indices.bf16", MaxPool2dParams, (launch_pool<__nv_bfloat16, Direction::indices>), nullptr)
CNNFAST_KERNEL("max_pool2d.indices.f16", MaxPool2dParams, (launch_pool<__half, Direction::indices>), nullptr)
CNNFAST_KERNEL("max_pool2d.dgrad.f32", MaxPool2dParams, launch_dgrad<float>, nullptr)
CNNFAST_KERNEL("max_pool2d.dgrad.f64", MaxPool2dParams, launch_dgrad<double>, nullptr)
CNNFAST_KERNEL("max_pool2d.dgrad.bf16", MaxPool2dParams, launch_dgrad<__nv_bfloat16>, nullptr)
CNNFAST_KERNEL("max_pool2d.dgrad.f16", MaxPool2dParams, launch_dgrad<__half>, nullptr)
CNNFAST_KERNEL("max_pool2d.jvp.f32", MaxPool2dParams, (launch_pool<float, Direction::jvp>), nullptr)
CNNFAST_KERNEL("max_pool2d.jvp.f64", MaxPool2dParams, (launch_pool<double, Direction::jvp>), nullptr)
CNNFAST_KERNEL("max_pool2d.jvp.bf16", MaxPool2dParams, (launch_pool<__nv_bfloat16, Direction::jvp>), nullptr)
CNNFAST_KERNEL("max_pool2d.jvp.f16", MaxPool2dParams, (launch_pool<__half, Direction::jvp>), nullptr)

}  // namespace cnnfast::cuda
