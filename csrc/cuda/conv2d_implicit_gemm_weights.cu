// 2-D convolution's weight gradient as an implicit GEMM on tensor cores (sm_80 mma.sync), bf16, f16, and f32 in tf32 or
// as three products of tf32 (tf32x3).
//
//   dw[k, j] = sum_m dy[m, k] A[m, j]     m = (n, p, q) over pixels, j = (r, s, c) over taps and channels
//
// A is gathered from x as in conv2d_implicit_gemm.cu, 8 (f32: 4) channels of one tap at a time: hence channels of
// a group in multiples of that. Both operands lie across the depth, which is the pixels. Layout KRSC for dw, everything
// dense and 16-byte aligned.
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

// The output and its slices: (slice, row tile, group, column tile), the last fastest.
struct Tiling {
  int column_tiles, groups, row_tiles, slices, slice_pixels;

  Tiling(const Conv2dParams& p, const Split& split)
      : column_tiles(static_cast<int>(ceil_div(p.R * p.S * (p.C / p.G), int64_t{kShapes[split.tile].columns}))),
        groups(static_cast<int>(p.G)),
        row_tiles(static_cast<int>(ceil_div(p.K / p.G, int64_t{kShapes[split.tile].rows}))),
        slices(static_cast<int>(split.slices)),
        slice_pixels(static_cast<int>(split.depth)) {}
  int64_t blocks() const { return int64_t{slices} * row_tiles * groups * column_tiles; }
};

Split split_of(const Conv2dParams& p) { return choose_split(p.K / p.G, p.R * p.S * (p.C / p.G), p.N * p.P * p.Q, p.G); }

int64_t elements_of(const Conv2dParams& p) { return p.K * p.R * p.S * (p.C / p.G); }

// The pixel that a thread stages next; a step on is so many images, rows and columns on.
struct Pixel {
  int n, row, column;
  __device__ __forceinline__ void advance(int images, int rows, int columns, int height, int width) {
    column += columns;
    if (column >= width) {
      column -= width;
      ++row;
    }
    row += rows;
    if (row >= height) {
      row -= height;
      ++n;
    }
    n += images;
  }
};

template <class Math, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    wgrad(const Conv2dParams p, const Tiling tiling, const typename Math::Element* __restrict__ x,
          const typename Math::Element* __restrict__ y, typename Math::Element* __restrict__ w,
          float* __restrict__ partial) {
  using T = typename Math::Element;
  constexpr int kVector = Math::kVector;
  CNNFAST_DYNAMIC_SHARED(Vector, shared);

  const int t = threadIdx.x;
  unsigned rest = blockIdx.x;
  const int column0 = static_cast<int>(rest % tiling.column_tiles) * Tile::kColumns;
  rest /= tiling.column_tiles;
  const int group = static_cast<int>(rest % tiling.groups);
  rest /= tiling.groups;
  const int row0 = static_cast<int>(rest % tiling.row_tiles) * Tile::kRows;
  const int slice = static_cast<int>(rest / tiling.row_tiles);

  const int C = static_cast<int>(p.C), K = static_cast<int>(p.K), H = static_cast<int>(p.H), W = static_cast<int>(p.W);
  const int P = static_cast<int>(p.P), Q = static_cast<int>(p.Q), S = static_cast<int>(p.S);
  const int channels = C / tiling.groups, filters = K / tiling.groups;
  const int columns = static_cast<int>(p.R) * S * channels;
  const int pixels = static_cast<int>(p.N) * P * Q, begin = slice * tiling.slice_pixels;
  const int end = pixels - begin < tiling.slice_pixels ? pixels : begin + tiling.slice_pixels;

  // ---- staging dy: a vector of filters of some pixels
  constexpr int kWidthA = Tile::kRows / kVector, kPixelsA = Tile::kThreads / kWidthA;
  const int vector_a = t % kWidthA, first_a = t / kWidthA;
  const bool filter_inside = row0 + vector_a * kVector < filters;
  int pixel_a = begin + first_a;
  const T* filter_at = y + int64_t{pixel_a} * K + group * filters + row0 + vector_a * kVector;

  // ---- staging x: a vector of channels of one tap, for some pixels
  constexpr int kWidthB = Tile::kColumns / kVector, kPixelsB = Tile::kThreads / kWidthB;
  constexpr int kRowsB = Math::kDepth / kPixelsB;
  const int vector_b = t % kWidthB, first_b = t / kWidthB;
  const int column = column0 + vector_b * kVector, tap = column / channels;
  const int tap_h = tap / S * static_cast<int>(p.dilation_h) - static_cast<int>(p.pad_h);
  const int tap_w = tap % S * static_cast<int>(p.dilation_w) - static_cast<int>(p.pad_w);
  const int stride_h = static_cast<int>(p.stride_h), stride_w = static_cast<int>(p.stride_w);
  const T* channel_at = x + group * channels + column % channels;
  int pixel_b = column < columns ? begin + first_b : end;  // at the end there is nothing to copy
  Pixel pixel[kRowsB];
#pragma unroll
  for (int i = 0; i < kRowsB; ++i) {
    const int m = begin + first_b + i * kPixelsB, line = m / Q;
    pixel[i] = {line / P, line % P, m % Q};
  }
  const int step_columns = Math::kDepth % Q, step_rows = Math::kDepth / Q % P, step_images = Math::kDepth / Q / P;

  static_assert(kPixelsA % kVector == 0 && kPixelsB % kVector == 0, "rows staged together share a swizzle");

  auto stage_next = [&](Vector* tile_a, Vector* tile_b) {
    Vector *to_a = tile_a + Math::template across<kWidthA>(first_a, vector_a),
           *to_b = tile_b + Math::template across<kWidthB>(first_b, vector_b);
#pragma unroll
    for (int i = 0; i < Math::kDepth / kPixelsA; ++i)
      copy_async_16(to_a + Math::template across<kWidthA>(i * kPixelsA, 0), filter_at + int64_t{i * kPixelsA} * K,
                    filter_inside && pixel_a + i * kPixelsA < end);
    pixel_a += Math::kDepth;
    filter_at += int64_t{Math::kDepth} * K;
#pragma unroll
    for (int i = 0; i < kRowsB; ++i) {
      const int h = pixel[i].row * stride_h + tap_h, w_ = pixel[i].column * stride_w + tap_w;
      const bool valid = pixel_b + i * kPixelsB < end && static_cast<unsigned>(h) < static_cast<unsigned>(H) &&
                         static_cast<unsigned>(w_) < static_cast<unsigned>(W);
      copy_async_16(to_b + Math::template across<kWidthB>(i * kPixelsB, 0),
                    channel_at + int64_t{(pixel[i].n * H + h) * W + w_} * C, valid);
      pixel[i].advance(step_images, step_rows, step_columns, P, Q);
    }
    pixel_b += Math::kDepth;
  };

  Sums<Tile> sums;
  sums.clear();
  const int steps = (end - begin + Math::kDepth - 1) / Math::kDepth;
  accumulate<Math, Tile, true, true>(sums, shared, steps, stage_next);

  const int out_column = column0 + first_column<Tile>();
  results<Tile>(sums, shared, [&](int row, const Four& values) {
    if (row0 + row >= filters || out_column >= columns) return;
    const int64_t k = group * filters + row0 + row;
    if (partial)
      store_four(partial + (int64_t{slice} * K + k) * columns + out_column, values);
    else
      store_four(w + k * columns + out_column, values);
  });
}

// w = the sum over slices, in order; four elements a thread.
template <class T>
__global__ void __launch_bounds__(kAddThreads)
    add_slices(const float* __restrict__ partial, T* __restrict__ w, const int64_t slices, const int64_t elements) {
  for (int64_t i = (int64_t{blockIdx.x} * kAddThreads + threadIdx.x) * 4; i < elements;
       i += int64_t{gridDim.x} * kAddThreads * 4) {
    Four sum{};
    for (int64_t slice = 0; slice < slices; ++slice) {
      const Four term = load_four(partial + slice * elements + i);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum.v[e] += term.v[e];
    }
    store_four(w + i, sum);
  }
}

int64_t wgrad_workspace(const void* params) {
  const auto& p = *static_cast<const Conv2dParams*>(params);
  const Split split = split_of(p);
  return split.slices == 1 ? 0 : split.slices * elements_of(p) * static_cast<int64_t>(sizeof(float));
}

template <class Math, class Tile>
const char* launch_tile(const Conv2dParams& p, const Tiling& tiling, const Launch& run) {
  using T = typename Math::Element;
  return launch<wgrad<Math, Tile>>(
      dim3(static_cast<unsigned>(tiling.blocks()), 1, 1), dim3(Tile::kThreads, 1, 1), kSharedBytes<Math, Tile>,
      run.stream, p, tiling, static_cast<const T*>(run.operands[0]), static_cast<const T*>(run.operands[3]),
      static_cast<T*>(run.operands[1]), static_cast<float*>(tiling.slices == 1 ? nullptr : run.workspace));
}

template <class Math>
const char* launch_wgrad(const void* params, const Launch& run) {
  using T = typename Math::Element;
  const auto& p = *static_cast<const Conv2dParams*>(params);
  const Split split = split_of(p);
  const Tiling tiling(p, split);
  if (tiling.blocks() == 0) return nullptr;
  const char* error = nullptr;
  switch (split.tile) {
    case k128x128:
      error = launch_tile<Math, typename Math::Large>(p, tiling, run);
      break;
    case k128x64:
      error = launch_tile<Math, typename Math::Middle>(p, tiling, run);
      break;
    default:
      error = launch_tile<Math, typename Math::Small>(p, tiling, run);
      break;
  }
  if (error || split.slices == 1) return error;
  return launch<add_slices<T>>(grid_for(ceil_div(elements_of(p), int64_t{kAddThreads} * 4)), dim3(kAddThreads, 1, 1), 0,
                               run.stream, static_cast<const float*>(run.workspace), static_cast<T*>(run.operands[1]),
                               split.slices, elements_of(p));
}

}  // namespace

CNNFAST_KERNEL("conv2d_implicit_gemm.wgrad.bf16", Conv2dParams, launch_wgrad<Half<__nv_bfloat16>>, wgrad_workspace)
CNNFAST_KERNEL("conv2d_implicit_gemm.wgrad.f16", Conv2dParams, launch_wgrad<Half<__half>>, wgrad_workspace)
CNNFAST_KERNEL("conv2d_implicit_gemm.wgrad.f32.tf32", Conv2dParams, launch_wgrad<Tf32>, wgrad_workspace)
CNNFAST_KERNEL("conv2d_implicit_gemm.wgrad.f32.tf32x3", Conv2dParams, launch_wgrad<Tf32x3>, wgrad_workspace)

}  // namespace cnnfast::cuda
