// 2-D convolution as an implicit GEMM on tensor cores (sm_80 mma.sync), bf16, f16, and f32 in tf32 or as three products
// of tf32 (tf32x3); forward and the input's gradient.
// (The weight's gradient is in conv2d_implicit_gemm_weights.cu.)
//
//   fprop  y[m, k]  = b[k] + sum_j A[m, j] w[k, j]     m = (n, p, q) over pixels, j = (r, s, c) over taps and channels
//   dgrad  dx[m, c] =        sum_j A[m, j] w[k, c, j]  m = (n, h, w) of a parity class, j = (r, s, k) over its taps
//
// Both directions are one kernel, a correlation (conv2d_axes.h). A is gathered from x or dy on the way into shared
// memory (nothing is materialised), 16 bytes, 8 (f32: 4) channels of one tap, at a time, where the channels of a group
// are multiples of that; else element by element (the variants "elements"), which any number of channels allows.
// Weights KRSC, everything dense and 16-byte aligned.
//
// Mapping: a block computes a tile of pixels x channels of one group (and class) over j in steps of 64 bytes, through
// four stages of shared memory (conv2d_implicit_gemm.h); blocks that share pixels follow each other. For fprop the
// weights lie along the depth, for dgrad across it. Which tile: conv2d_implicit_gemm_plan.h; every tile adds in the
// same order and gives the same bits. Where a small map gives too few blocks fprop's depth is cut into slices, by sizes
// alone, whose sums lie in the workspace; a second kernel adds them in order and applies bias and epilogue. Accumulator
// f32, bias and epilogue (conv_bn_act) applied to it, one rounding at the end. Memory offsets are 64-bit; pixels of the
// batch and weights are numbered in 32 bits.
#include "../common/kernel_table.h"
#include "conv2d_axes.h"
#include "conv2d_implicit_gemm.h"
#include "conv2d_implicit_gemm_plan.h"
#include "epilogue.h"
#include "primitives/launch.h"

namespace cnnfast::cuda {
namespace {

using namespace implicit_gemm;

constexpr int kAddThreads = 256;

// How the output is cut into tiles: (slice, row tile, class, group, column tile), the last fastest.
struct Tiling {
  int column_tiles, groups, classes, classes_w;
  int row_tiles;            // of the largest class
  int slices, slice_depth;  // of the depth; elements of it, whole steps
  int64_t elements;         // of the result

  Tiling(const Conv2dParams& p, const Classes& c, Direction direction, const TileShape& tile, const Split& split)
      : column_tiles(
            static_cast<int>(ceil_div((direction == Direction::fprop ? p.K : p.C) / p.G, int64_t{tile.columns}))),
        groups(static_cast<int>(p.G)),
        classes(c.h * c.w),
        classes_w(c.w),
        row_tiles(static_cast<int>(ceil_div(p.N * c.positions, int64_t{tile.rows}))),
        slices(static_cast<int>(split.slices)),
        slice_depth(static_cast<int>(split.depth)),
        elements(direction == Direction::fprop ? p.N * p.P * p.Q * p.K : p.N * p.H * p.W * p.C) {}
  int64_t blocks() const { return int64_t{slices} * row_tiles * classes * groups * column_tiles; }
  __device__ __forceinline__ int slice(unsigned block) const {
    return static_cast<int>(block / (static_cast<unsigned>(row_tiles) * classes * groups * column_tiles));
  }
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

// What a block works on. Tensors are dense: strides are sizes.
struct Block {
  Axis ah, aw;
  Pixels pixel;
  int row0, pixels;                       // the tile's first position, and all of the class
  int column0, columns, group, channels;  // computed and summed over, of a group
  int in_height, in_width, in_channels;
  int S, filter;           // elements of a filter
  int slice, slice_depth;  // the block's part of the depth
};

// sums += A B, staged 16 bytes at a time: for fprop both along the depth, for dgrad the weights across it.
template <class Math, class Tile, bool kForward>
__device__ __forceinline__ void accumulate_vectors(const Block& b, const typename Math::Element* __restrict__ input,
                                                   const typename Math::Element* __restrict__ weight, Vector* shared,
                                                   Sums<Tile>& sums) {
  using T = typename Math::Element;
  constexpr int kVector = Math::kVector;
  const int t = threadIdx.x, channel_vectors = b.channels / kVector;
  const int begin = kForward ? b.slice * (b.slice_depth / kVector) : 0;  // of the depth, in vectors

  // ---- A: this thread's vector of each step, for some pixels
  constexpr int kRowsAtOnce = Tile::kThreads / kRowVectors, kRowsA = Tile::kRows / kRowsAtOnce;
  const int vector = t % kRowVectors, first = t / kRowVectors;
  int pixel_at[kRowsA], pixel_h[kRowsA], pixel_w[kRowsA];  // under tap (0, 0): perhaps outside of the image
#pragma unroll
  for (int i = 0; i < kRowsA; ++i) {
    int n, row, column;
    b.pixel.at(first + i * kRowsAtOnce, n, row, column);
    pixel_h[i] = b.ah.in_first + row * b.ah.in_step;
    pixel_w[i] = b.aw.in_first + column * b.aw.in_step;
    pixel_at[i] = (n * b.in_height + pixel_h[i]) * b.in_width + pixel_w[i];
    // A pixel past the end gets a row outside of every input.
    if (b.row0 + first + i * kRowsAtOnce >= b.pixels) pixel_h[i] = -(1 << 30);
  }
  const T* channel_at = input + b.group * b.channels;
  Position at_a;
  at_a.advance(begin + vector, channel_vectors, b.aw.taps);

  // ---- B: along the depth a vector of some filters, across it a vector of channels of some filters
  constexpr int kWidthB = Tile::kColumns / kVector, kDepthsAtOnce = Tile::kThreads / kWidthB;
  constexpr int kRowsB = kForward ? Tile::kColumns / kRowsAtOnce : Math::kDepth / kDepthsAtOnce;
  static_assert(kRowsAtOnce % 8 == 0 && kDepthsAtOnce % kVector == 0, "rows staged together share a swizzle");
  const int vector_b = kForward ? vector : t % kWidthB, first_b = kForward ? first : t / kWidthB;
  const int column_b = b.column0 + (kForward ? first_b : vector_b * kVector);
  int filter_at = kForward ? (b.group * b.columns + column_b) * b.filter + (begin + vector) * kVector
                           : (b.group * b.channels + first_b % kVector) * b.filter + column_b +
                                 (b.ah.tap_first * b.S + b.aw.tap_first) * b.columns;
  const int tap_r = b.ah.tap_step * b.S * b.columns, tap_s = b.aw.tap_step * b.columns;
  int depth_b = (begin + vector) * kVector;  // of this thread's vector, fprop
  Position at_b;                             // of this thread's first filter, dgrad
  const int taps_b = column_b < b.columns ? b.ah.taps : 0;
  if (!kForward) at_b.advance(first_b / kVector, channel_vectors, b.aw.taps);
  const int place_b = kForward ? along(first_b, vector) : Math::template across<kWidthB>(first_b, vector_b);

  auto stage_next = [&](Vector* tile_a, Vector* tile_b) {
    Vector *to_a = tile_a + along(first, vector), *to_b = tile_b + place_b;
    const bool inside = at_a.r < b.ah.taps;
    const int dh = at_a.r * b.ah.in_tap, dw = at_a.s * b.aw.in_tap;
    const T* from = channel_at + at_a.c * kVector;
    const int shift = dh * b.in_width + dw;
#pragma unroll
    for (int i = 0; i < kRowsA; ++i) {
      const bool valid = inside && static_cast<unsigned>(pixel_h[i] + dh) < static_cast<unsigned>(b.ah.in_size) &&
                         static_cast<unsigned>(pixel_w[i] + dw) < static_cast<unsigned>(b.aw.in_size);
      copy_async_16(to_a + i * kRowsAtOnce * kRowVectors, from + int64_t{pixel_at[i] + shift} * b.in_channels, valid);
    }
    at_a.advance(kRowVectors, channel_vectors, b.aw.taps);
    if constexpr (kForward) {
#pragma unroll
      for (int i = 0; i < kRowsB; ++i)
        copy_async_16(to_b + i * kRowsAtOnce * kRowVectors, weight + (filter_at + i * kRowsAtOnce * b.filter),
                      depth_b < b.filter && column_b + i * kRowsAtOnce < b.columns);
      filter_at += Math::kDepth;
      depth_b += Math::kDepth;
    } else {
#pragma unroll
      for (int i = 0; i < kRowsB; ++i) {
        copy_async_16(to_b + Math::template across<kWidthB>(i * kDepthsAtOnce, 0),
                      weight + (filter_at + at_b.c * kVector * b.filter + at_b.r * tap_r + at_b.s * tap_s),
                      at_b.r < taps_b);
        at_b.advance(kDepthsAtOnce / kVector, channel_vectors, b.aw.taps);
      }
    }
  };
  int depth_vectors = b.ah.taps * b.aw.taps * channel_vectors - begin;
  if (kForward && depth_vectors > b.slice_depth / kVector) depth_vectors = b.slice_depth / kVector;
  accumulate<Math, Tile, false, !kForward>(sums, shared, (depth_vectors + kRowVectors - 1) / kRowVectors, stage_next);
}

// The same element by element, for any number of channels: a thread stages one depth (tap and channel) of each step,
// for some pixels and columns. Both operands lie along the depth.
template <class Math, class Tile, bool kForward>
__device__ __forceinline__ void accumulate_elements(const Block& b, const typename Math::Element* __restrict__ input,
                                                    const typename Math::Element* __restrict__ weight, Vector* shared,
                                                    Sums<Tile>& sums) {
  using T = typename Math::Element;
  struct alignas(16) Row {
    int at, h, w;  // under tap (0, 0): perhaps outside of the image
  };
  CNNFAST_SHARED(Row, rows, [Tile::kRows]);
  const int t = threadIdx.x;
  for (int i = t; i < Tile::kRows; i += Tile::kThreads) {
    int n, row, column;
    b.pixel.at(i, n, row, column);
    const int h = b.ah.in_first + row * b.ah.in_step, w = b.aw.in_first + column * b.aw.in_step;
    // A pixel past the end gets a row outside of every input.
    rows[i] = {(n * b.in_height + h) * b.in_width + w, b.row0 + i < b.pixels ? h : -(1 << 30), w};
  }
  __syncthreads();

  constexpr int kAtOnce = Tile::kThreads / Math::kDepth, kRowsA = Tile::kRows / kAtOnce,
                kRowsB = Tile::kColumns / kAtOnce;
  static_assert(kAtOnce % 8 == 0, "rows staged together share a swizzle");
  const int depth = t % Math::kDepth, first = t / Math::kDepth;
  const int place = along(first, depth / Math::kVector) * Math::kVector + depth % Math::kVector;
  constexpr int kPitch = kAtOnce * kRowVectors * Math::kVector;
  const int column_step = kForward ? b.filter : 1, group_channels = kForward ? b.channels : b.columns;
  const T* column_at = weight + (kForward ? (b.group * b.columns + b.column0 + first) * b.filter
                                          : b.group * b.channels * b.filter + b.column0 + first);
  Odometer at;
  at.advance(depth, b.channels, b.aw.taps > 0 ? b.aw.taps : 1);

  auto stage_next = [&](Vector* tile_a, Vector* tile_b) {
    const bool inside = at.r < b.ah.taps;
    const int dh = at.r * b.ah.in_tap, dw = at.s * b.aw.in_tap, shift = dh * b.in_width + dw;
    const T zero = Numeric<T>::narrow(0.0f), *from = input + b.group * b.channels + at.c;
    T value_a[kRowsA], value_b[kRowsB];
#pragma unroll
    for (int i = 0; i < kRowsA; ++i) {
      const Row row = rows[first + i * kAtOnce];
      const bool valid = inside && static_cast<unsigned>(row.h + dh) < static_cast<unsigned>(b.ah.in_size) &&
                         static_cast<unsigned>(row.w + dw) < static_cast<unsigned>(b.aw.in_size);
      value_a[i] = valid ? from[int64_t{row.at + shift} * b.in_channels] : zero;
    }
    const int tap = (b.ah.tap_first + at.r * b.ah.tap_step) * b.S + b.aw.tap_first + at.s * b.aw.tap_step;
    const T* tap_at = column_at + (tap * group_channels + at.c * (kForward ? 1 : b.filter));
#pragma unroll
    for (int i = 0; i < kRowsB; ++i) {
      const bool valid = inside && b.column0 + first + i * kAtOnce < b.columns;
      value_b[i] = valid ? tap_at[i * kAtOnce * column_step] : zero;
    }
    T *to_a = reinterpret_cast<T*>(tile_a) + place, *to_b = reinterpret_cast<T*>(tile_b) + place;
#pragma unroll
    for (int i = 0; i < kRowsA; ++i) to_a[i * kPitch] = value_a[i];
#pragma unroll
    for (int i = 0; i < kRowsB; ++i) to_b[i * kPitch] = value_b[i];
    at.advance(Math::kDepth, b.channels, b.aw.taps);
  };
  const int depths = b.ah.taps * b.aw.taps * b.channels;
  accumulate<Math, Tile, false, false>(sums, shared, (depths + Math::kDepth - 1) / Math::kDepth, stage_next);
}

template <class Math, class Tile, Direction direction, bool kByElement>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    correlate(const Conv2dParams p, const Tiling tiling, const typename Math::Element* __restrict__ input,
              const typename Math::Element* __restrict__ weight, const typename Math::Element* __restrict__ bias,
              typename Math::Element* __restrict__ output, const Epilogue<typename Math::Element> epilogue,
              float* __restrict__ partial) {
  constexpr bool forward = direction == Direction::fprop;
  CNNFAST_DYNAMIC_SHARED(Vector, shared);
  CNNFAST_SHARED(int64_t, targets, [Tile::kRows]);  // offset of each row's results; -1: no such row

  unsigned rest = blockIdx.x;
  const int column0 = static_cast<int>(rest % tiling.column_tiles) * Tile::kColumns;
  rest /= tiling.column_tiles;
  const int group = static_cast<int>(rest % tiling.groups);
  rest /= tiling.groups;
  const int klass = static_cast<int>(rest % tiling.classes);
  rest /= tiling.classes;
  const int row0 = static_cast<int>(rest % tiling.row_tiles) * Tile::kRows;

  const Axis ah = forward ? fprop_axis(p.P, p.H, p.R, p.stride_h, p.pad_h, p.dilation_h)
                          : dgrad_axis(klass / tiling.classes_w, p.H, p.P, p.R, p.stride_h, p.pad_h, p.dilation_h);
  const Axis aw = forward ? fprop_axis(p.Q, p.W, p.S, p.stride_w, p.pad_w, p.dilation_w)
                          : dgrad_axis(klass % tiling.classes_w, p.W, p.Q, p.S, p.stride_w, p.pad_w, p.dilation_w);
  const int pixels = static_cast<int>(p.N) * ah.positions * aw.positions;
  if (row0 >= pixels) return;  // a smaller class; the whole block goes
  const int in_channels = static_cast<int>(forward ? p.C : p.K), out_channels = static_cast<int>(forward ? p.K : p.C);
  const int channels = in_channels / tiling.groups, columns = out_channels / tiling.groups;
  const Pixels pixel(ah.positions, aw.positions, row0);
  const int out_width = static_cast<int>(forward ? p.Q : p.W), out_height = static_cast<int>(forward ? p.P : p.H);
  for (int row = threadIdx.x; row < Tile::kRows; row += Tile::kThreads) {
    int n, i, j;
    pixel.at(row, n, i, j);
    const int line = n * out_height + ah.out_first + i * ah.out_step;
    targets[row] = row0 + row < pixels
                       ? int64_t{line * out_width + aw.out_first + j * aw.out_step} * out_channels + group * columns
                       : -1;
  }

  const Block block{ah,
                    aw,
                    pixel,
                    row0,
                    pixels,
                    column0,
                    columns,
                    group,
                    channels,
                    static_cast<int>(forward ? p.H : p.P),
                    static_cast<int>(forward ? p.W : p.Q),
                    in_channels,
                    static_cast<int>(p.S),
                    static_cast<int>(p.R * p.S * (p.C / p.G)),
                    tiling.slice(blockIdx.x),
                    tiling.slice_depth};
  Sums<Tile> sums;
  sums.clear();
  if constexpr (kByElement)
    accumulate_elements<Math, Tile, forward>(block, input, weight, shared, sums);
  else
    accumulate_vectors<Math, Tile, forward>(block, input, weight, shared, sums);

  const int column = column0 + first_column<Tile>(), channel = group * columns + column, present = columns - column;
  auto load = [&](const auto* from) { return kByElement ? load_some(from, present) : load_four(from); };
  Four bias_of{}, scale{{1, 1, 1, 1}}, shift{};
  if constexpr (forward) {
    if (present > 0) {
      if (bias) bias_of = load(bias + channel);
      if (epilogue.scale) scale = load(epilogue.scale + channel);
      if (epilogue.shift) shift = load(epilogue.shift + channel);
    }
  }
  const Activate<float> act(epilogue.act);
  results<Tile>(sums, shared, [&](int row, Four values) {
    const int64_t target = targets[row];
    if (target < 0 || present <= 0) return;
    if constexpr (forward && !kByElement) {
      if (partial) return store_four(partial + tiling.slice(blockIdx.x) * tiling.elements + target + column, values);
    }
    if constexpr (forward) {
      Four residual{};
      if (epilogue.residual) residual = load(epilogue.residual + target + column);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        values.v[e] = act(scale.v[e] * (values.v[e] + bias_of.v[e]) + shift.v[e] + residual.v[e]);
    }
    if constexpr (kByElement)
      store_some(output + target + column, values, present);
    else
      store_four(output + target + column, values);
  });
}

// y = the sum over slices, in order, and what becomes of it; four channels a thread.
template <class T>
__global__ void __launch_bounds__(kAddThreads, 4)
    add_slices(const float* __restrict__ partial, const T* __restrict__ bias, T* __restrict__ output,
               const int64_t elements, const int slices, const int channels, const Epilogue<T> epilogue) {
  const Activate<float> act(epilogue.act);
  for (int64_t i = (int64_t{blockIdx.x} * kAddThreads + threadIdx.x) * 4; i < elements;
       i += int64_t{gridDim.x} * kAddThreads * 4) {
    Four sum = load_four(partial + i);
    for (int slice = 1; slice < slices; ++slice) {
      const Four term = load_four(partial + slice * elements + i);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum.v[e] += term.v[e];
    }
    const int channel = static_cast<int>(i % channels);
    Four bias_of{}, scale{{1, 1, 1, 1}}, shift{}, residual{};
    if (bias) bias_of = load_four(bias + channel);
    if (epilogue.scale) scale = load_four(epilogue.scale + channel);
    if (epilogue.shift) shift = load_four(epilogue.shift + channel);
    if (epilogue.residual) residual = load_four(epilogue.residual + i);
#pragma unroll
    for (int e = 0; e < 4; ++e) sum.v[e] = act(scale.v[e] * (sum.v[e] + bias_of.v[e]) + shift.v[e] + residual.v[e]);
    store_four(output + i, sum);
  }
}

// How the depth of fprop is cut, decided from the sizes alone; dgrad's isn't.
template <Direction direction, bool kByElement>
Split split_of(const Conv2dParams& p) {
  if (direction == Direction::dgrad || kByElement) return {k64x64, 1, 1};
  const Split split = choose_small_split(p.N * p.P * p.Q, p.K / p.G, p.R * p.S * (p.C / p.G), p.G);
  return {split.tile, split.slices, ceil_div(split.depth, kStepDepth) * kStepDepth};
}

int64_t fprop_workspace(const void* params) {
  const auto& p = *static_cast<const Conv2dParams*>(params);
  const Split split = split_of<Direction::fprop, false>(p);
  return split.slices == 1 ? 0 : split.slices * p.N * p.P * p.Q * p.K * static_cast<int64_t>(sizeof(float));
}

template <class Math, class Tile, Direction direction, bool kByElement>
const char* launch_tile(const Conv2dParams& p, const Tiling& tiling, const Launch& run) {
  using T = typename Math::Element;
  constexpr bool forward = direction == Direction::fprop;
  const T* x = static_cast<const T*>(run.operands[0]);
  const T* y = static_cast<const T*>(run.operands[3]);
  T* out = const_cast<T*>(forward ? y : x);
  const T* bias = forward ? static_cast<const T*>(run.operands[2]) : nullptr;
  float* partial = static_cast<float*>(tiling.slices == 1 ? nullptr : run.workspace);
  const Epilogue<T> epilogue(p, run);
  const char* error = launch<correlate<Math, Tile, direction, kByElement>>(
      dim3(static_cast<unsigned>(tiling.blocks()), 1, 1), dim3(Tile::kThreads, 1, 1), kSharedBytes<Math, Tile>,
      run.stream, p, tiling, forward ? x : y, static_cast<const T*>(run.operands[1]), bias, out, epilogue, partial);
  if constexpr (forward && !kByElement) {
    if (!error && partial)
      error = launch<add_slices<T>>(grid_for(ceil_div(tiling.elements, int64_t{kAddThreads} * 4)),
                                    dim3(kAddThreads, 1, 1), 0, run.stream, static_cast<const float*>(partial), bias,
                                    out, tiling.elements, tiling.slices, static_cast<int>(p.K), epilogue);
  }
  return error;
}

static_assert(kStagedBytes == kStages * kRowVectors * sizeof(Vector), "what the plan takes a block's memory for");

template <class Math, Direction direction, bool kByElement>
const char* launch_correlate(const void* params, const Launch& run) {
  const auto& p = *static_cast<const Conv2dParams*>(params);
  constexpr bool forward = direction == Direction::fprop;
  const Classes classes(p, direction);
  const int64_t taps = ceil_div(p.R * p.S, int64_t{classes.h} * classes.w);
  const Split split = split_of<direction, kByElement>(p);
  const auto tile = kByElement         ? k128x64
                    : split.slices > 1 ? split.tile
                                       : choose_tile(p.N * classes.positions, (forward ? p.K : p.C) / p.G,
                                                     taps * (forward ? p.C : p.K) / p.G, p.G * classes.h * classes.w,
                                                     processors(), shared_bytes_of_a_processor());
  const Tiling tiling(p, classes, direction, kShapes[tile], split);
  if (tiling.blocks() == 0) return nullptr;
  if constexpr (kByElement) return launch_tile<Math, typename Math::ByElement, direction, true>(p, tiling, run);
  switch (tile) {
    case k128x128:
      return launch_tile<Math, typename Math::Large, direction, false>(p, tiling, run);
    case k128x64:
      return launch_tile<Math, typename Math::Middle, direction, false>(p, tiling, run);
    default:
      return launch_tile<Math, typename Math::Small, direction, false>(p, tiling, run);
  }
}

}  // namespace

CNNFAST_KERNEL("conv2d_implicit_gemm.fprop.bf16", Conv2dParams,
               (launch_correlate<Half<__nv_bfloat16>, Direction::fprop, false>), fprop_workspace)
CNNFAST_KERNEL("conv2d_implicit_gemm.fprop.f16", Conv2dParams,
               (launch_correlate<Half<__half>, Direction::fprop, false>), fprop_workspace)
CNNFAST_KERNEL("conv2d_implicit_gemm.fprop.f32.tf32", Conv2dParams, (launch_correlate<Tf32, Direction::fprop, false>),
               fprop_workspace)
CNNFAST_KERNEL("conv2d_implicit_gemm.fprop.f32.tf32x3", Conv2dParams,
               (launch_correlate<Tf32x3, Direction::fprop, false>), fprop_workspace)
CNNFAST_KERNEL("conv2d_implicit_gemm.dgrad.bf16", Conv2dParams,
               (launch_correlate<Half<__nv_bfloat16>, Direction::dgrad, false>), nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.dgrad.f16", Conv2dParams,
               (launch_correlate<Half<__half>, Direction::dgrad, false>), nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.dgrad.f32.tf32", Conv2dParams, (launch_correlate<Tf32, Direction::dgrad, false>),
               nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.dgrad.f32.tf32x3", Conv2dParams,
               (launch_correlate<Tf32x3, Direction::dgrad, false>), nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.fprop.bf16.elements", Conv2dParams,
               (launch_correlate<Half<__nv_bfloat16>, Direction::fprop, true>), nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.fprop.f16.elements", Conv2dParams,
               (launch_correlate<Half<__half>, Direction::fprop, true>), nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.fprop.f32.elements_tf32", Conv2dParams,
               (launch_correlate<Tf32, Direction::fprop, true>), nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.fprop.f32.elements_tf32x3", Conv2dParams,
               (launch_correlate<Tf32x3, Direction::fprop, true>), nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.dgrad.bf16.elements", Conv2dParams,
               (launch_correlate<Half<__nv_bfloat16>, Direction::dgrad, true>), nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.dgrad.f16.elements", Conv2dParams,
               (launch_correlate<Half<__half>, Direction::dgrad, true>), nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.dgrad.f32.elements_tf32", Conv2dParams,
               (launch_correlate<Tf32, Direction::dgrad, true>), nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.dgrad.f32.elements_tf32x3", Conv2dParams,
               (launch_correlate<Tf32x3, Direction::dgrad, true>), nullptr)

}  // namespace cnnfast::cuda
