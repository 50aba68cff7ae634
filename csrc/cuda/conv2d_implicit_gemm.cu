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
#include "conv2d_implicit_gemm_correlation.h"
#include "epilogue.h"
#include "primitives/launch.h"

namespace cnnfast::cuda {
namespace {

using namespace implicit_gemm;

constexpr int kAddThreads = 256;

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

// The offset of each row's results, of the group's first channel; -1: no such row. For others to read after a barrier.
template <class Tile>
__device__ __forceinline__ void find_targets(const Block& b, int64_t (&targets)[Tile::kRows]) {
  for (int row = threadIdx.x; row < Tile::kRows; row += Tile::kThreads) {
    int n, i, j;
    b.pixel.at(row, n, i, j);
    const int line = n * b.out_height + b.ah.out_first + i * b.ah.out_step;
    targets[row] =
        b.row0 + row < b.pixels
            ? int64_t{line * b.out_width + b.aw.out_first + j * b.aw.out_step} * b.out_channels + b.group * b.columns
            : -1;
  }
}

template <class Math, class Tile, Direction direction, bool kByElement>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    correlate(const Conv2dParams p, const Tiling tiling, const typename Math::Element* __restrict__ input,
              const typename Math::Element* __restrict__ weight, const typename Math::Element* __restrict__ bias,
              typename Math::Element* __restrict__ output, const Epilogue<typename Math::Element> epilogue,
              float* __restrict__ partial) {
  constexpr bool forward = direction == Direction::fprop;
  CNNFAST_DYNAMIC_SHARED(Vector, shared);
  CNNFAST_SHARED(int64_t, targets, [Tile::kRows]);
  const Block block = block_of<Tile, direction>(p, tiling);
  if (block.row0 >= block.pixels) return;  // a smaller class; the whole block goes
  find_targets<Tile>(block, targets);
  Sums<Tile> sums;
  sums.clear();
  if constexpr (kByElement)
    accumulate_elements<Math, Tile, forward>(block, input, weight, shared, sums);
  else
    accumulate_vectors<Math, Tile, forward>(block, input, weight, shared, sums);

  const int column = block.column0 + first_column<Tile>(), channel = block.group * block.columns + column;
  const int present = block.columns - column;
  auto load = [&](const auto* from) { return kByElement ? load_some(from, present) : load_four(from); };
  Four bias_of{}, scale{{1, 1, 1, 1}}, shift{};
  if constexpr (forward) {
    if (present > 0) {
      if (bias) bias_of = load(bias + channel);
      if (epilogue.scale) scale = load(epilogue.scale + channel);
      if (epilogue.shift) shift = load(epilogue.shift + channel);
    }
  }
  const auto store = [&](int64_t at, const Four& values) {
    if constexpr (kByElement)
      store_some(output + at, values, present);
    else
      store_four(output + at, values);
  };
  const auto each = [&](auto finish) {
    results<Tile>(sums, shared, [&](int row, Four values) {
      if (targets[row] >= 0 && present > 0) finish(targets[row] + column, values);
    });
  };
  if constexpr (!forward) {
    each(store);
  } else if (!kByElement && partial) {
    float* slice = partial + tiling.slice(blockIdx.x) * tiling.elements;
    each([&](int64_t at, const Four& values) { store_four(slice + at, values); });
  } else if (epilogue.identity()) {
    each([&](int64_t at, Four values) {
#pragma unroll
      for (int e = 0; e < 4; ++e) values.v[e] += bias_of.v[e];
      store(at, values);
    });
  } else {
    const Activate<float> act(epilogue.act);
    each([&](int64_t at, Four values) {
      Four residual{};
      if (epilogue.residual) residual = load(epilogue.residual + at);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        values.v[e] = act(scale.v[e] * (values.v[e] + bias_of.v[e]) + shift.v[e] + residual.v[e]);
      store(at, values);
    });
  }
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
