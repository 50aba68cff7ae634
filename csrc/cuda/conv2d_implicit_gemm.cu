// 2-D convolution as an implicit GEMM on tensor cores (sm_80 mma.sync), bf16, f16, and f32 in tf32 or as three products
// of tf32 (tf32x3); forward and the input's gradient.
// (The weight's gradient is in conv2d_implicit_gemm_weights.cu.)
//
//   fprop  y[m, k]  = b[k] + sum_j A[m, j] w[k, j]     m = (n, p, q) over pixels, j = (r, s, c) over taps and channels
//   dgrad  dx[m, c] =        sum_j A[m, j] w[k, c, j]  m = (n, h, w) of a parity class, j = (r, s, k) over its taps
//
// Both directions are one kernel, a correlation (conv2d_axes.h). A is gathered from x or dy on the way into shared
// memory (nothing is materialised), 16 bytes, 8 (f32: 4) channels of one tap, at a time: hence channels of a group in
// multiples of that. Weights KRSC, everything dense and 16-byte aligned.
//
// Mapping: a block computes a tile of pixels x channels of one group (and class) over j in steps of 64 bytes, through
// four stages of shared memory (conv2d_implicit_gemm.h); blocks that share pixels follow each other. For fprop the
// weights lie along the depth, for dgrad across it. Which tile: conv2d_implicit_gemm_plan.h; every tile adds in the
// same order and gives the same bits. Accumulator f32, bias and epilogue (conv_bn_act) applied to it,
// one rounding at the end. Memory offsets are
// 64-bit, coordinates within an image 32-bit.
#include "../common/kernel_table.h"
#include "conv2d_axes.h"
#include "conv2d_implicit_gemm.h"
#include "conv2d_implicit_gemm_plan.h"
#include "epilogue.h"
#include "primitives/launch.h"

namespace cnnfast::cuda {
namespace {

using namespace implicit_gemm;

// How the output is cut into tiles: (row tile, class, group, column tile), the last fastest.
struct Tiling {
  int column_tiles, groups, classes, classes_w;
  int64_t row_tiles;  // of the largest class

  Tiling(const Conv2dParams& p, const Classes& c, Direction direction, const TileShape& tile)
      : column_tiles(
            static_cast<int>(ceil_div((direction == Direction::fprop ? p.K : p.C) / p.G, int64_t{tile.columns}))),
        groups(static_cast<int>(p.G)),
        classes(c.h * c.w),
        classes_w(c.w),
        row_tiles(ceil_div(p.N * c.positions, int64_t{tile.rows})) {}
  int64_t blocks() const { return row_tiles * classes * groups * column_tiles; }
};

// Pixel m of all the positions of a class.
struct Pixels {
  int image0, first, height, width;
  __device__ __forceinline__ Pixels(int height_, int width_, int m0)
      : image0(m0 / (height_ * width_)), first(m0 % (height_ * width_)), height(height_), width(width_) {}
  // (image, row, column) of pixel m0 + i.
  __device__ __forceinline__ void at(int i, int& n, int& row, int& column) const {
    const int line = (first + i) / width;
    column = first + i - line * width;
    row = line % height;
    n = image0 + line / height;
  }
};

// Counts through (vector of channels, tap s, tap r), the channels fastest.
struct Position {
  int c = 0, s = 0, r = 0;
  __device__ __forceinline__ void advance(int by, int channels, int taps_s) {
    c += by;
    while (c >= channels) {
      c -= channels;
      if (++s == taps_s) {
        s = 0;
        ++r;
      }
    }
  }
};

template <class Math, class Tile, Direction direction>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    correlate(const Conv2dParams p, const Tiling tiling, const typename Math::Element* __restrict__ input,
              const typename Math::Element* __restrict__ weight, const typename Math::Element* __restrict__ bias,
              typename Math::Element* __restrict__ output, const Epilogue<typename Math::Element> epilogue) {
  using T = typename Math::Element;
  constexpr bool forward = direction == Direction::fprop;
  constexpr int kVector = Math::kVector;
  CNNFAST_DYNAMIC_SHARED(Vector, shared);
  CNNFAST_SHARED(int64_t, targets, [Tile::kRows]);  // offset of each row's results; -1: no such row

  const int t = threadIdx.x;
  unsigned rest = blockIdx.x;
  const int column0 = static_cast<int>(rest % tiling.column_tiles) * Tile::kColumns;
  rest /= tiling.column_tiles;
  const int group = static_cast<int>(rest % tiling.groups);
  rest /= tiling.groups;
  const int klass = static_cast<int>(rest % tiling.classes);
  const int row0 = static_cast<int>(rest / tiling.classes) * Tile::kRows;

  const Axis ah = forward ? fprop_axis(p.P, p.H, p.R, p.stride_h, p.pad_h, p.dilation_h)
                          : dgrad_axis(klass / tiling.classes_w, p.H, p.P, p.R, p.stride_h, p.pad_h, p.dilation_h);
  const Axis aw = forward ? fprop_axis(p.Q, p.W, p.S, p.stride_w, p.pad_w, p.dilation_w)
                          : dgrad_axis(klass % tiling.classes_w, p.W, p.Q, p.S, p.stride_w, p.pad_w, p.dilation_w);
  const int pixels = static_cast<int>(p.N) * ah.positions * aw.positions;
  if (row0 >= pixels) return;  // a smaller class; the whole block goes
  const int in_channels = static_cast<int>(forward ? p.C : p.K), out_channels = static_cast<int>(forward ? p.K : p.C);
  const int channels = in_channels / tiling.groups, columns = out_channels / tiling.groups;
  const int channel_vectors = channels / kVector;
  const int filter = static_cast<int>(p.R * p.S * (p.C / p.G));  // elements of one
  const Pixels pixel(ah.positions, aw.positions, row0);
  // Dense tensors: strides are sizes.
  const int in_width = static_cast<int>(forward ? p.W : p.Q), in_height = static_cast<int>(forward ? p.H : p.P);
  const int out_width = static_cast<int>(forward ? p.Q : p.W), out_height = static_cast<int>(forward ? p.P : p.H);

  for (int row = t; row < Tile::kRows; row += Tile::kThreads) {
    int n, i, j;
    pixel.at(row, n, i, j);
    const int line = n * out_height + ah.out_first + i * ah.out_step;
    targets[row] = row0 + row < pixels
                       ? int64_t{line * out_width + aw.out_first + j * aw.out_step} * out_channels + group * columns
                       : -1;
  }

  // ---- staging A: this thread's vector of each step, for some pixels
  constexpr int kRowsAtOnce = Tile::kThreads / kRowVectors, kRowsA = Tile::kRows / kRowsAtOnce;
  const int vector = t % kRowVectors, first = t / kRowVectors;
  int pixel_at[kRowsA], pixel_h[kRowsA], pixel_w[kRowsA];  // under tap (0, 0): perhaps outside of the image
#pragma unroll
  for (int i = 0; i < kRowsA; ++i) {
    int n, row, column;
    pixel.at(first + i * kRowsAtOnce, n, row, column);
    pixel_h[i] = ah.in_first + row * ah.in_step;
    pixel_w[i] = aw.in_first + column * aw.in_step;
    pixel_at[i] = (n * in_height + pixel_h[i]) * in_width + pixel_w[i];
    // A pixel past the end gets a row outside of every input.
    if (row0 + first + i * kRowsAtOnce >= pixels) pixel_h[i] = -(1 << 30);
  }
  const T* channel_at = input + group * channels;
  Position at_a;
  at_a.advance(vector, channel_vectors, aw.taps);

  // ---- staging B: along the depth a vector of some filters, across it a vector of channels of some filters
  constexpr int kWidthB = Tile::kColumns / kVector, kDepthsAtOnce = Tile::kThreads / kWidthB;
  constexpr int kRowsB = forward ? Tile::kColumns / kRowsAtOnce : Math::kDepth / kDepthsAtOnce;
  static_assert(kRowsAtOnce % 8 == 0 && kDepthsAtOnce % kVector == 0, "rows staged together share a swizzle");
  const int vector_b = forward ? vector : t % kWidthB, first_b = forward ? first : t / kWidthB;
  const int column_b = column0 + (forward ? first_b : vector_b * kVector);
  int filter_at = forward ? (group * columns + column_b) * filter + vector * kVector
                          : (group * channels + first_b % kVector) * filter + column_b +
                                (ah.tap_first * static_cast<int>(p.S) + aw.tap_first) * columns;
  const int tap_r = ah.tap_step * static_cast<int>(p.S) * columns, tap_s = aw.tap_step * columns;
  int depth_b = vector * kVector;  // of this thread's vector, fprop
  Position at_b;                   // of this thread's first filter, dgrad
  const int taps_b = column_b < columns ? ah.taps : 0;
  if (!forward) at_b.advance(first_b / kVector, channel_vectors, aw.taps);
  const int place_b = forward ? along(first_b, vector) : Math::template across<kWidthB>(first_b, vector_b);

  auto stage_next = [&](Vector* tile_a, Vector* tile_b) {
    Vector *to_a = tile_a + along(first, vector), *to_b = tile_b + place_b;
    const bool inside = at_a.r < ah.taps;
    const int dh = at_a.r * ah.in_tap, dw = at_a.s * aw.in_tap;
    const T* from = channel_at + at_a.c * kVector;
    const int shift = dh * in_width + dw;
#pragma unroll
    for (int i = 0; i < kRowsA; ++i) {
      const bool valid = inside && static_cast<unsigned>(pixel_h[i] + dh) < static_cast<unsigned>(ah.in_size) &&
                         static_cast<unsigned>(pixel_w[i] + dw) < static_cast<unsigned>(aw.in_size);
      copy_async_16(to_a + i * kRowsAtOnce * kRowVectors, from + int64_t{pixel_at[i] + shift} * in_channels, valid);
    }
    at_a.advance(kRowVectors, channel_vectors, aw.taps);
    if constexpr (forward) {
#pragma unroll
      for (int i = 0; i < kRowsB; ++i)
        copy_async_16(to_b + i * kRowsAtOnce * kRowVectors, weight + (filter_at + i * kRowsAtOnce * filter),
                      depth_b < filter && column_b + i * kRowsAtOnce < columns);
      filter_at += Math::kDepth;
      depth_b += Math::kDepth;
    } else {
#pragma unroll
      for (int i = 0; i < kRowsB; ++i) {
        copy_async_16(to_b + Math::template across<kWidthB>(i * kDepthsAtOnce, 0),
                      weight + (filter_at + at_b.c * kVector * filter + at_b.r * tap_r + at_b.s * tap_s),
                      at_b.r < taps_b);
        at_b.advance(kDepthsAtOnce / kVector, channel_vectors, aw.taps);
      }
    }
  };

  Sums<Tile> sums;
  sums.clear();
  const int depth_vectors = ah.taps * aw.taps * channel_vectors;
  accumulate<Math, Tile, false, !forward>(sums, shared, (depth_vectors + kRowVectors - 1) / kRowVectors, stage_next);

  const int column = column0 + first_column<Tile>(), channel = group * columns + column;
  Four bias_of{}, scale{{1, 1, 1, 1}}, shift{};
  if constexpr (forward) {
    if (column < columns) {
      if (bias) bias_of = load_four(bias + channel);
      if (epilogue.scale) scale = load_four(epilogue.scale + channel);
      if (epilogue.shift) shift = load_four(epilogue.shift + channel);
    }
  }
  const Activate<float> act(epilogue.act);
  results<Tile>(sums, shared, [&](int row, Four values) {
    const int64_t target = targets[row];
    if (target < 0 || column >= columns) return;
    if constexpr (forward) {
      Four residual{};
      if (epilogue.residual) residual = load_four(epilogue.residual + target + column);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        values.v[e] = act(scale.v[e] * (values.v[e] + bias_of.v[e]) + shift.v[e] + residual.v[e]);
    }
    store_four(output + target + column, values);
  });
}

template <class Math, class Tile, Direction direction>
const char* launch_tile(const Conv2dParams& p, const Tiling& tiling, const Launch& run) {
  using T = typename Math::Element;
  constexpr bool forward = direction == Direction::fprop;
  const T* x = static_cast<const T*>(run.operands[0]);
  const T* y = static_cast<const T*>(run.operands[3]);
  return launch<correlate<Math, Tile, direction>>(
      dim3(static_cast<unsigned>(tiling.blocks()), 1, 1), dim3(Tile::kThreads, 1, 1), kSharedBytes<Math, Tile>,
      run.stream, p, tiling, forward ? x : y, static_cast<const T*>(run.operands[1]),
      forward ? static_cast<const T*>(run.operands[2]) : nullptr, const_cast<T*>(forward ? y : x), Epilogue<T>(p, run));
}

template <class Math, Direction direction>
const char* launch_correlate(const void* params, const Launch& run) {
  const auto& p = *static_cast<const Conv2dParams*>(params);
  constexpr bool forward = direction == Direction::fprop;
  const Classes classes(p, direction);
  const int64_t taps = ceil_div(p.R * p.S, int64_t{classes.h} * classes.w);
  const auto tile = choose_tile(p.N * classes.positions, (forward ? p.K : p.C) / p.G,
                                taps * (forward ? p.C : p.K) / p.G, p.G * classes.h * classes.w, processors());
  const Tiling tiling(p, classes, direction, kShapes[tile]);
  if (tiling.blocks() == 0) return nullptr;
  switch (tile) {
    case k128x128:
      return launch_tile<Math, typename Math::Large, direction>(p, tiling, run);
    case k128x64:
      return launch_tile<Math, typename Math::Middle, direction>(p, tiling, run);
    default:
      return launch_tile<Math, typename Math::Small, direction>(p, tiling, run);
  }
}

}  // namespace

CNNFAST_KERNEL("conv2d_implicit_gemm.fprop.bf16", Conv2dParams,
               (launch_correlate<Half<__nv_bfloat16>, Direction::fprop>), nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.fprop.f16", Conv2dParams, (launch_correlate<Half<__half>, Direction::fprop>),
               nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.fprop.f32.tf32", Conv2dParams, (launch_correlate<Tf32, Direction::fprop>), nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.fprop.f32.tf32x3", Conv2dParams, (launch_correlate<Tf32x3, Direction::fprop>),
               nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.dgrad.bf16", Conv2dParams,
               (launch_correlate<Half<__nv_bfloat16>, Direction::dgrad>), nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.dgrad.f16", Conv2dParams, (launch_correlate<Half<__half>, Direction::dgrad>),
               nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.dgrad.f32.tf32", Conv2dParams, (launch_correlate<Tf32, Direction::dgrad>), nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.dgrad.f32.tf32x3", Conv2dParams, (launch_correlate<Tf32x3, Direction::dgrad>),
               nullptr)

}  // namespace cnnfast::cuda
