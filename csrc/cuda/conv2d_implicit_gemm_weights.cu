// 2-D convolution's weight gradient as an implicit GEMM on tensor cores (sm_80 mma.sync), bf16, f16, and f32 in tf32 or
// as three products of tf32 (tf32x3).
//
//   dw[k, j] = sum_m dy[m, k] A[m, j]     m = (n, p, q) over pixels, j = (r, s, c) over taps and channels
//
// A is gathered from x as in conv2d_implicit_gemm.cu, 8 (f32: 4) channels of one tap at a time, where the channels
// of a group are multiples of that; else element by element (the variants "elements"). Both operands lie across the
// depth, which is the pixels. Layout KRSC for dw, everything dense and 16-byte aligned.
//
// Deterministic, without atomics: where dw alone gives too few blocks, the pixels are cut into slices, each with its
// own sums in the workspace, and a second kernel adds them in order. The number of slices depends on sizes only.
//
// Mapping: a block computes a tile of filters x (r, s, c) of one group and slice, over pixels in steps of 64 bytes
// through four stages of shared memory (conv2d_implicit_gemm.h). A thread stages the same (r, s, c) in every step, for
// some pixels. Accumulator f32, one rounding at the end. Memory offsets are 64-bit, pixels are numbered in 32 bits.
#include "../common/kernel_table.h"
#include "conv2d_axes.h"
#include "conv2d_implicit_gemm.h"
#include "conv2d_implicit_gemm_plan.h"
#include "primitives/launch.h"

namespace cnnfast::cuda {
namespace {

using namespace implicit_gemm;

constexpr int kAddThreads = 256;
using ElementTile = Tile<128, 64, 32, 32, 1>;  // one block: registers for 24 elements on their way

int64_t elements_of(const Conv2dParams& p) { return p.K * p.R * p.S * (p.C / p.G); }

// The output and its slices: (slice, row tile, group, column tile), the last fastest.
struct Tiling {
  int column_tiles, groups, row_tiles, slices, slice_pixels;
  int64_t slice_elements;  // of the workspace, whole vectors

  Tiling(const Conv2dParams& p, const Split& split)
      : column_tiles(static_cast<int>(ceil_div(p.R * p.S * (p.C / p.G), int64_t{kShapes[split.tile].columns}))),
        groups(static_cast<int>(p.G)),
        row_tiles(static_cast<int>(ceil_div(p.K / p.G, int64_t{kShapes[split.tile].rows}))),
        slices(static_cast<int>(split.slices)),
        slice_pixels(static_cast<int>(split.depth)),
        slice_elements(ceil_div(elements_of(p), 4) * 4) {}
  int64_t blocks() const { return int64_t{slices} * row_tiles * groups * column_tiles; }
};

Split split_of(const Conv2dParams& p, bool by_element) {
  return choose_split(p.K / p.G, p.R * p.S * (p.C / p.G), p.N * p.P * p.Q, p.G, by_element ? k128x64 : kTiles);
}

// The place of a pixel, or how many images, rows and columns a number of pixels is.
struct Pixel {
  int n, row, column;
  Pixel() = default;
  __device__ __forceinline__ Pixel(int m, int height, int width)
      : n(m / width / height), row(m / width % height), column(m % width) {}
  __device__ __forceinline__ void advance(const Pixel& by, int height, int width) {
    column += by.column;
    if (column >= width) {
      column -= width;
      ++row;
    }
    row += by.row;
    if (row >= height) {
      row -= height;
      ++n;
    }
    n += by.n;
  }
};

// What a block works on. Tensors are dense: strides are sizes.
struct Block {
  int C, H, W, K, P, Q, S;
  int tap_pad_h, tap_pad_w, dilation_h, dilation_w, stride_h, stride_w;
  int group, channels, filters, columns;  // of a group
  int row0, column0, begin, end;          // the tile; the slice's pixels
};

// A column of the product: a tap and channel.
struct Column {
  int h, w, c;  // the tap's distance from a pixel times the stride; the channel of all
  __device__ __forceinline__ Column(const Block& b, int column) {
    const int tap = column / b.channels;
    h = tap / b.S * b.dilation_h - b.tap_pad_h;
    w = tap % b.S * b.dilation_w - b.tap_pad_w;
    c = b.group * b.channels + column % b.channels;
  }
};

// sums += A B, staged 16 bytes at a time: a vector of filters, and of channels of one tap, of some pixels.
template <class Math, class Tile>
__device__ __forceinline__ void accumulate_vectors(const Block& b, const typename Math::Element* __restrict__ x,
                                                   const typename Math::Element* __restrict__ y, Vector* shared,
                                                   Sums<Tile>& sums) {
  using T = typename Math::Element;
  constexpr int kVector = Math::kVector;
  const int t = threadIdx.x;

  // ---- dy
  constexpr int kWidthA = Tile::kRows / kVector, kPixelsA = Tile::kThreads / kWidthA;
  const int vector_a = t % kWidthA, first_a = t / kWidthA;
  const bool filter_inside = b.row0 + vector_a * kVector < b.filters;
  int pixel_a = b.begin + first_a;
  const T* filter_at = y + int64_t{pixel_a} * b.K + b.group * b.filters + b.row0 + vector_a * kVector;

  // ---- x
  constexpr int kWidthB = Tile::kColumns / kVector, kPixelsB = Tile::kThreads / kWidthB;
  constexpr int kRowsB = Math::kDepth / kPixelsB;
  static_assert(kPixelsA % kVector == 0 && kPixelsB % kVector == 0, "rows staged together share a swizzle");
  const int vector_b = t % kWidthB, first_b = t / kWidthB, column = b.column0 + vector_b * kVector;
  const Column tap(b, column);
  const T* channel_at = x + tap.c;
  int pixel_b = column < b.columns ? b.begin + first_b : b.end;  // at the end there is nothing to copy
  Pixel pixel[kRowsB];
#pragma unroll
  for (int i = 0; i < kRowsB; ++i) pixel[i] = Pixel(b.begin + first_b + i * kPixelsB, b.P, b.Q);
  const Pixel step(Math::kDepth, b.P, b.Q);

  auto stage_next = [&](Vector* tile_a, Vector* tile_b) {
    Vector *to_a = tile_a + Math::template across<kWidthA>(first_a, vector_a),
           *to_b = tile_b + Math::template across<kWidthB>(first_b, vector_b);
#pragma unroll
    for (int i = 0; i < Math::kDepth / kPixelsA; ++i)
      copy_async_16(to_a + Math::template across<kWidthA>(i * kPixelsA, 0), filter_at + int64_t{i * kPixelsA} * b.K,
                    filter_inside && pixel_a + i * kPixelsA < b.end);
    pixel_a += Math::kDepth;
    filter_at += int64_t{Math::kDepth} * b.K;
#pragma unroll
    for (int i = 0; i < kRowsB; ++i) {
      const int h = pixel[i].row * b.stride_h + tap.h, w = pixel[i].column * b.stride_w + tap.w;
      const bool valid = pixel_b + i * kPixelsB < b.end && static_cast<unsigned>(h) < static_cast<unsigned>(b.H) &&
                         static_cast<unsigned>(w) < static_cast<unsigned>(b.W);
      copy_async_16(to_b + Math::template across<kWidthB>(i * kPixelsB, 0),
                    channel_at + int64_t{(pixel[i].n * b.H + h) * b.W + w} * b.C, valid);
      pixel[i].advance(step, b.P, b.Q);
    }
    pixel_b += Math::kDepth;
  };
  accumulate<Math, Tile, true, true>(sums, shared, (b.end - b.begin + Math::kDepth - 1) / Math::kDepth, stage_next);
}

// The same element by element, for any number of channels: a thread stages one filter, and one column, of some pixels.
template <class Math, class Tile>
__device__ __forceinline__ void accumulate_elements(const Block& b, const typename Math::Element* __restrict__ x,
                                                    const typename Math::Element* __restrict__ y, Vector* shared,
                                                    Sums<Tile>& sums) {
  using T = typename Math::Element;
  constexpr int kVector = Math::kVector;
  const int t = threadIdx.x;

  // ---- dy
  constexpr int kWidthA = Tile::kRows / kVector, kPixelsA = Tile::kThreads / Tile::kRows;
  constexpr int kRowsA = Math::kDepth / kPixelsA;
  const int row = t % Tile::kRows, first_a = t / Tile::kRows;
  const bool filter_inside = b.row0 + row < b.filters;
  int pixel_a = b.begin + first_a;
  const T* filter_at = y + int64_t{pixel_a} * b.K + b.group * b.filters + b.row0 + row;

  // ---- x
  constexpr int kWidthB = Tile::kColumns / kVector, kPixelsB = Tile::kThreads / Tile::kColumns;
  constexpr int kRowsB = Math::kDepth / kPixelsB;
  const int column = t % Tile::kColumns, first_b = t / Tile::kColumns;
  const bool column_inside = b.column0 + column < b.columns;
  const Column tap(b, b.column0 + column);
  const T* channel_at = x + tap.c;
  int pixel_b = b.begin + first_b;
  Pixel pixel(pixel_b, b.P, b.Q);
  const Pixel step(kPixelsB, b.P, b.Q);

  auto stage_next = [&](Vector* tile_a, Vector* tile_b) {
    const T zero = Numeric<T>::narrow(0.0f);
    T value_a[kRowsA], value_b[kRowsB];
#pragma unroll
    for (int i = 0; i < kRowsA; ++i) {
      value_a[i] = filter_inside && pixel_a < b.end ? *filter_at : zero;
      pixel_a += kPixelsA;
      filter_at += int64_t{kPixelsA} * b.K;
    }
#pragma unroll
    for (int i = 0; i < kRowsB; ++i) {
      const int h = pixel.row * b.stride_h + tap.h, w = pixel.column * b.stride_w + tap.w;
      const bool valid = column_inside && pixel_b < b.end && static_cast<unsigned>(h) < static_cast<unsigned>(b.H) &&
                         static_cast<unsigned>(w) < static_cast<unsigned>(b.W);
      value_b[i] = valid ? channel_at[int64_t{(pixel.n * b.H + h) * b.W + w} * b.C] : zero;
      pixel_b += kPixelsB;
      pixel.advance(step, b.P, b.Q);
    }
    T *to_a = reinterpret_cast<T*>(tile_a), *to_b = reinterpret_cast<T*>(tile_b);
#pragma unroll
    for (int i = 0; i < kRowsA; ++i)
      to_a[Math::template across<kWidthA>(first_a + i * kPixelsA, row / kVector) * kVector + row % kVector] =
          value_a[i];
#pragma unroll
    for (int i = 0; i < kRowsB; ++i)
      to_b[Math::template across<kWidthB>(first_b + i * kPixelsB, column / kVector) * kVector + column % kVector] =
          value_b[i];
  };
  accumulate<Math, Tile, true, true>(sums, shared, (b.end - b.begin + Math::kDepth - 1) / Math::kDepth, stage_next);
}

template <class Math, class Tile, bool kByElement>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    wgrad(const Conv2dParams p, const Tiling tiling, const typename Math::Element* __restrict__ x,
          const typename Math::Element* __restrict__ y, typename Math::Element* __restrict__ w,
          float* __restrict__ partial) {
  CNNFAST_DYNAMIC_SHARED(Vector, shared);

  unsigned rest = blockIdx.x;
  const int column0 = static_cast<int>(rest % tiling.column_tiles) * Tile::kColumns;
  rest /= tiling.column_tiles;
  const int group = static_cast<int>(rest % tiling.groups);
  rest /= tiling.groups;
  const int row0 = static_cast<int>(rest % tiling.row_tiles) * Tile::kRows;
  const int slice = static_cast<int>(rest / tiling.row_tiles);

  Block b;
  b.C = static_cast<int>(p.C);
  b.H = static_cast<int>(p.H);
  b.W = static_cast<int>(p.W);
  b.K = static_cast<int>(p.K);
  b.P = static_cast<int>(p.P);
  b.Q = static_cast<int>(p.Q);
  b.S = static_cast<int>(p.S);
  b.tap_pad_h = static_cast<int>(p.pad_h);
  b.tap_pad_w = static_cast<int>(p.pad_w);
  b.dilation_h = static_cast<int>(p.dilation_h);
  b.dilation_w = static_cast<int>(p.dilation_w);
  b.stride_h = static_cast<int>(p.stride_h);
  b.stride_w = static_cast<int>(p.stride_w);
  b.group = group;
  b.channels = b.C / tiling.groups;
  b.filters = b.K / tiling.groups;
  b.columns = static_cast<int>(p.R) * b.S * b.channels;
  b.row0 = row0;
  b.column0 = column0;
  b.begin = slice * tiling.slice_pixels;
  const int pixels = static_cast<int>(p.N) * b.P * b.Q;
  b.end = pixels - b.begin < tiling.slice_pixels ? pixels : b.begin + tiling.slice_pixels;

  Sums<Tile> sums;
  sums.clear();
  if constexpr (kByElement)
    accumulate_elements<Math, Tile>(b, x, y, shared, sums);
  else
    accumulate_vectors<Math, Tile>(b, x, y, shared, sums);

  const int column = column0 + first_column<Tile>(), present = b.columns - column;
  auto store = [&](auto* to, const Four& values) {
    if constexpr (kByElement)
      store_some(to, values, present);
    else
      store_four(to, values);
  };
  results<Tile>(sums, shared, [&](int row, const Four values) {
    if (row0 + row >= b.filters || present <= 0) return;
    const int64_t at = static_cast<int64_t>(group * b.filters + row0 + row) * b.columns + column;
    if (partial)
      store(partial + slice * tiling.slice_elements + at, values);
    else
      store(w + at, values);
  });
}

// w = the sum over slices, in order; four elements a thread.
template <class T>
__global__ void __launch_bounds__(kAddThreads)
    add_slices(const float* __restrict__ partial, T* __restrict__ w, const int64_t slices, const int64_t slice_elements,
               const int64_t elements) {
  for (int64_t i = (int64_t{blockIdx.x} * kAddThreads + threadIdx.x) * 4; i < elements;
       i += int64_t{gridDim.x} * kAddThreads * 4) {
    const int present = static_cast<int>(elements - i < 4 ? elements - i : 4);
    Four sum{};
    for (int64_t slice = 0; slice < slices; ++slice) {
      const float* from = partial + slice * slice_elements + i;
      const Four term = present == 4 ? load_four(from) : load_some(from, present);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum.v[e] += term.v[e];
    }
    if (present == 4)
      store_four(w + i, sum);
    else
      store_some(w + i, sum, present);
  }
}

template <bool kByElement>
int64_t wgrad_workspace(const void* params) {
  const auto& p = *static_cast<const Conv2dParams*>(params);
  const Tiling tiling(p, split_of(p, kByElement));
  return tiling.slices == 1 ? 0 : tiling.slices * tiling.slice_elements * static_cast<int64_t>(sizeof(float));
}

template <class Math, class Tile, bool kByElement>
const char* launch_tile(const Conv2dParams& p, const Tiling& tiling, const Launch& run) {
  using T = typename Math::Element;
  return launch<wgrad<Math, Tile, kByElement>>(
      dim3(static_cast<unsigned>(tiling.blocks()), 1, 1), dim3(Tile::kThreads, 1, 1), kSharedBytes<Math, Tile>,
      run.stream, p, tiling, static_cast<const T*>(run.operands[0]), static_cast<const T*>(run.operands[3]),
      static_cast<T*>(run.operands[1]), static_cast<float*>(tiling.slices == 1 ? nullptr : run.workspace));
}

template <class Math, bool kByElement>
const char* launch_wgrad(const void* params, const Launch& run) {
  using T = typename Math::Element;
  const auto& p = *static_cast<const Conv2dParams*>(params);
  const Split split = split_of(p, kByElement);
  const Tiling tiling(p, split);
  if (tiling.blocks() == 0) return nullptr;
  const char* error = nullptr;
  if constexpr (kByElement) {
    error = launch_tile<Math, ElementTile, true>(p, tiling, run);
  } else {
    switch (split.tile) {
      case k128x128:
        error = launch_tile<Math, typename Math::Large, false>(p, tiling, run);
        break;
      case k128x64:
        error = launch_tile<Math, typename Math::Middle, false>(p, tiling, run);
        break;
      default:
        error = launch_tile<Math, typename Math::Small, false>(p, tiling, run);
        break;
    }
  }
  if (error || tiling.slices == 1) return error;
  const int64_t elements = elements_of(p);
  return launch<add_slices<T>>(grid_for(ceil_div(elements, int64_t{kAddThreads} * 4)), dim3(kAddThreads, 1, 1), 0,
                               run.stream, static_cast<const float*>(run.workspace), static_cast<T*>(run.operands[1]),
                               int64_t{tiling.slices}, tiling.slice_elements, elements);
}

}  // namespace

CNNFAST_KERNEL("conv2d_implicit_gemm.wgrad.bf16", Conv2dParams, (launch_wgrad<Half<__nv_bfloat16>, false>),
               wgrad_workspace<false>)
CNNFAST_KERNEL("conv2d_implicit_gemm.wgrad.f16", Conv2dParams, (launch_wgrad<Half<__half>, false>),
               wgrad_workspace<false>)
CNNFAST_KERNEL("conv2d_implicit_gemm.wgrad.f32.tf32", Conv2dParams, (launch_wgrad<Tf32, false>), wgrad_workspace<false>)
CNNFAST_KERNEL("conv2d_implicit_gemm.wgrad.f32.tf32x3", Conv2dParams, (launch_wgrad<Tf32x3, false>),
               wgrad_workspace<false>)
CNNFAST_KERNEL("conv2d_implicit_gemm.wgrad.bf16.elements", Conv2dParams, (launch_wgrad<Half<__nv_bfloat16>, true>),
               wgrad_workspace<true>)
CNNFAST_KERNEL("conv2d_implicit_gemm.wgrad.f16.elements", Conv2dParams, (launch_wgrad<Half<__half>, true>),
               wgrad_workspace<true>)
CNNFAST_KERNEL("conv2d_implicit_gemm.wgrad.f32.elements_tf32", Conv2dParams, (launch_wgrad<Tf32, true>),
               wgrad_workspace<true>)
CNNFAST_KERNEL("conv2d_implicit_gemm.wgrad.f32.elements_tf32x3", Conv2dParams, (launch_wgrad<Tf32x3, true>),
               wgrad_workspace<true>)

}  // namespace cnnfast::cuda
