// Convolution whose result comes with its batch statistics, as an implicit GEMM on tensor cores (sm_80 mma.sync), bf16,
// f16, and f32 in tf32 or as three products of tf32 (tf32x3); forward, of an x that is read as it is.
//
//   fprop  y[m, k] = b[k] + sum_j A[m, j] w[k, j]   as conv2d_implicit_gemm.cu has it;
//          ym[k] = mean of y, yv[k] = 1 / sqrt(mean of (y - ym)^2 + eps), ys[k] = sum of (y - ym)^2 / (count - 1)
//
// Mapping: a block computes a tile of pixels x channels of one group, as there. On its way out of shared memory a
// thread has four channels of some pixels: it rounds and stores them, and takes the statistics of what it stored, four
// pixels at a time. For every 64 pixels the block's threads join theirs, and leave each channel's mean and sum of
// squared distances from it in the workspace; a second kernel joins those of many pixels, where there are many, and
// batch norm's last one ends with these (batch_norm_stats.h). Everything is joined in an order that only the sizes
// decide: any tile, any card gives the same bits. No pass over y is needed, unless squares are beyond float's range.
// Layout: everything dense, NHWC and KRSC, 16-byte aligned, channels of a group in multiples of 16 bytes. Accumulator:
// f32 for the products and for 64 pixels, whose means are told from the first of them, so that one far from zero costs
// no accuracy; f64 beyond. A constant channel has exactly its value as mean, and no variance.
// Source: Chan, Golub, LeVeque, Algorithms for Computing the Sample Variance (1983).
#include "../common/kernel_table.h"
#include "batch_norm_stats.h"
#include "conv2d_implicit_gemm_correlation.h"
#include "primitives/launch.h"

namespace cnnfast::cuda {
namespace {

using namespace implicit_gemm;

constexpr int kMergeThreads = 128;
constexpr int kUnit = 64;  // pixels whose statistics are joined in a block, those 8 apart first
constexpr int kLanes = 8, kPixelsAtOnce = 4;

enum Operand { kX = 0, kW = 1, kB = 2, kY = 3, kYm = 8, kYv = 9, kYs = 10 };

// How the statistics of so many units are joined: by batch norm's kernel alone, or in chunks of them first.
struct Chunks {
  int64_t together, count;

  explicit Chunks(int64_t units) : together(units > 64 ? std::max<int64_t>(32, ceil_div(units, 1024)) : 1) {
    count = ceil_div(units, together);
  }
};

// partial: [unit][mean, m2][K].
template <class Math, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    correlate(const Conv2dParams p, const Tiling tiling, const typename Math::Element* __restrict__ input,
              const typename Math::Element* __restrict__ weight, const typename Math::Element* __restrict__ bias,
              typename Math::Element* __restrict__ output, double* __restrict__ partial) {
  using T = typename Math::Element;
  using Staged = Staged<Tile>;
  constexpr int kColumns = 4, kRowsAtOnce = Staged::kRowsAtOnce;
  static_assert(kLanes % kRowsAtOnce == 0 && Tile::kRows % kUnit == 0, "threads have whole lanes of whole units");
  static_assert((1 + 2 * kColumns) * Tile::kThreads <= kUnit * Tile::kColumns, "statistics fit where the sums were");
  using Moments = batch_norm::Moments<kColumns, float>;
  CNNFAST_DYNAMIC_SHARED(Vector, shared);
  const Block block = block_of<Tile, Direction::fprop>(p, tiling);
  Sums<Tile> sums;
  sums.clear();
  accumulate_vectors<Math, Tile, true>(block, input, weight, shared, sums);
  const Staged staged{reinterpret_cast<Four*>(shared)};
  staged.put(sums);
  __syncthreads();

  const int self = threadIdx.x, first = self / static_cast<int>(Staged::kWidth);
  const int column = block.column0 + first_column<Tile>(), channel = block.group * block.columns + column;
  const int rows = block.pixels - block.row0;  // of the tile, or more
  const bool present = column < block.columns;
  Four bias_of{};
  if (bias && present) bias_of = load_four(bias + channel);
  T* to = output + int64_t{block.row0} * block.out_channels + channel;
  const auto rounded = [&](int row) {
    const Four values = staged.get(row);
    Pack<T, kColumns> result;
#pragma unroll
    for (int e = 0; e < kColumns; ++e) result.v[e] = Numeric<T>::narrow(values.v[e] + bias_of.v[e]);
    return result;
  };

#pragma unroll 1
  for (int begin = 0; begin < Tile::kRows && begin < rows; begin += kUnit) {
    const int end = rows - begin < kUnit ? rows : begin + kUnit;
    float bases[kColumns];
    const Pack<T, kColumns> origin = rounded(begin);
#pragma unroll
    for (int e = 0; e < kColumns; ++e) {
      const float value = Numeric<T>::widen(origin.v[e]);
      bases[e] = is_finite(value) ? value : 0;
    }
    Moments all;
    const auto join = [&](float count, const auto& mean, const auto& m2) {
      if (count == 0) return;
      const float total = all.count + count;
#pragma unroll
      for (int e = 0; e < kColumns; ++e) all.join(e, mean(e), m2(e), count / total);
      all.count = total;
    };
    for (int lane = first; lane < kLanes; lane += kRowsAtOnce) {
      Moments moments;
      const auto take = [&](int row, auto& values) {
        constexpr int count = sizeof(values) / sizeof(values[0]);
#pragma unroll
        for (int i = 0; i < count; ++i) {
          values[i] = rounded(row + i * kLanes);
          *reinterpret_cast<Pack<T, kColumns>*>(to + int64_t{row + i * kLanes} * block.out_channels) = values[i];
        }
        batch_norm::join_pixels(moments, values, bases);
      };
      int row = present ? begin + lane : end;
      for (; row + (kPixelsAtOnce - 1) * kLanes < end; row += kPixelsAtOnce * kLanes) {
        Pack<T, kColumns> values[kPixelsAtOnce];
        take(row, values);
      }
      for (; row < end; row += kLanes) {
        Pack<T, kColumns> value[1];
        take(row, value);
      }
      if (lane == first)
        all = moments;
      else
        join(moments.count, [&](int e) { return moments.mean[e]; }, [&](int e) { return moments.m2[e]; });
    }

    __syncthreads();  // everybody has read this unit's sums, which make room for what is joined
    auto* left = reinterpret_cast<float (*)[Tile::kThreads]>(staged.vectors + begin * Staged::kWidth);
    const auto leave = [&] {
      left[0][self] = all.count;
#pragma unroll
      for (int e = 0; e < kColumns; ++e) left[1 + e][self] = all.mean[e], left[1 + kColumns + e][self] = all.m2[e];
    };
    leave();
    join_rows(kRowsAtOnce, Staged::kWidth, first, [&](int other) {
      join(
          left[0][other], [&](int e) { return left[1 + e][other]; },
          [&](int e) { return left[1 + kColumns + e][other]; });
      leave();
    });
    if (present && first == 0) {
      double* at = partial + int64_t{(block.row0 + begin) / kUnit} * 2 * block.out_channels + channel;
#pragma unroll
      for (int e = 0; e < kColumns; ++e) {
        at[e] = static_cast<double>(bases[e]) + static_cast<double>(all.mean[e]);
        at[block.out_channels + e] = all.m2[e];
      }
    }
  }
}

// Joins chunks of units, a thread those of one channel. A chunk is 2048 results a channel at least: chunks and channels
// are counted in 32 bits.
__global__ void __launch_bounds__(kMergeThreads)
    merge_units(const int K, const int64_t pixels, const int64_t units, const Chunks chunks,
                const double* __restrict__ partial, double* __restrict__ merged) {
  const int work = static_cast<int>(chunks.count) * K, step = static_cast<int>(gridDim.x) * kMergeThreads;
  for (int i = static_cast<int>(blockIdx.x) * kMergeThreads + static_cast<int>(threadIdx.x); i < work; i += step) {
    const int chunk = i / K, k = i - chunk * K;
    const int64_t first = chunk * chunks.together;
    const int64_t end = first + chunks.together < units ? first + chunks.together : units;
    const double* from = partial + first * 2 * K + k;
    batch_norm::Moments<1> moments;
#pragma unroll 4
    for (int64_t unit = first; unit < end; ++unit, from += 2 * K) {
      const int64_t left = pixels - unit * kUnit;
      const double count = left < kUnit ? static_cast<double>(left) : kUnit, total = moments.count + count;
      moments.join(0, from[0], from[K], count / total);
      moments.count = total;
    }
    double* to = merged + int64_t{chunk} * 2 * K + k;
    to[0] = moments.mean[0], to[K] = moments.m2[0];
  }
}

Conv2dParams conv2d_of(const BnActConvParams& p) {
  static_assert(offsetof(BnActConvParams, eps_bits) == sizeof(Conv2dParams), "conv2d's fields come first");
  Conv2dParams conv;
  std::memcpy(&conv, &p, sizeof conv);
  return conv;
}

int64_t workspace(const void* params) {
  const auto& p = *static_cast<const BnActConvParams*>(params);
  const int64_t units = ceil_div(p.N * p.P * p.Q, kUnit);
  return (units + Chunks(units).count) * 2 * p.K * static_cast<int64_t>(sizeof(double));
}

template <class Math, class Tile>
const char* launch_tile(const BnActConvParams& p, const Tiling& tiling, const Launch& run) {
  using T = typename Math::Element;
  T* y = static_cast<T*>(run.operands[kY]);
  double* partial = static_cast<double*>(run.workspace);
  const int64_t pixels = p.N * p.P * p.Q, units = ceil_div(pixels, kUnit);
  const char* error = launch<correlate<Math, Tile>>(
      dim3(static_cast<unsigned>(tiling.blocks()), 1, 1), dim3(Tile::kThreads, 1, 1), kSharedBytes<Math, Tile>,
      run.stream, conv2d_of(p), tiling, static_cast<const T*>(run.operands[kX]),
      static_cast<const T*>(run.operands[kW]), static_cast<const T*>(run.operands[kB]), y, partial);
  const Chunks chunks(units);
  if (!error && chunks.together > 1) {
    double* merged = partial + units * 2 * p.K;
    error = launch<merge_units>(grid_for(ceil_div(chunks.count * p.K, int64_t{kMergeThreads})),
                                dim3(kMergeThreads, 1, 1), 0, run.stream, static_cast<int>(p.K), pixels, units, chunks,
                                static_cast<const double*>(partial), merged);
    partial = merged;
  }
  if (error) return error;
  const Strides strides{p.y_n, p.y_h, p.y_w};
  return launch<batch_norm::finish<T, float>>(
      grid_for(ceil_div(p.K, int64_t{batch_norm::kFinishChannels})), dim3(batch_norm::kThreads, 1, 1), 0, run.stream,
      p.K, cuda::Pixels(p.N, p.P, p.Q, strides), strides, chunks.count, chunks.together * kUnit, batch_norm::eps_of(p),
      static_cast<const T*>(y), static_cast<const double*>(partial), static_cast<float*>(run.operands[kYm]),
      static_cast<float*>(run.operands[kYv]), static_cast<float*>(run.operands[kYs]));
}

template <class Math>
const char* launch_fprop(const void* params, const Launch& run) {
  const auto& p = *static_cast<const BnActConvParams*>(params);
  const Conv2dParams conv = conv2d_of(p);
  const int64_t depth = p.R * p.S * (p.C / p.G);
  const TileChoice tile =
      choose_tile(p.N * p.P * p.Q, p.K / p.G, depth, p.G, processors(), shared_bytes_of_a_processor());
  const Split whole{tile, 1, ceil_div(depth, kStepDepth) * kStepDepth};
  const Tiling tiling(conv, Classes(conv, Direction::fprop), Direction::fprop, kShapes[tile], whole);
  if (tiling.blocks() == 0) return nullptr;
  switch (tile) {
    case k128x128:
      return launch_tile<Math, typename Math::Large>(p, tiling, run);
    case k128x64:
      return launch_tile<Math, typename Math::Middle>(p, tiling, run);
    default:
      return launch_tile<Math, typename Math::Small>(p, tiling, run);
  }
}

}  // namespace

CNNFAST_KERNEL("bn_act_conv_implicit_gemm.fprop.bf16", BnActConvParams, launch_fprop<Half<__nv_bfloat16>>, workspace)
CNNFAST_KERNEL("bn_act_conv_implicit_gemm.fprop.f16", BnActConvParams, launch_fprop<Half<__half>>, workspace)
CNNFAST_KERNEL("bn_act_conv_implicit_gemm.fprop.f32.tf32", BnActConvParams, launch_fprop<Tf32>, workspace)
CNNFAST_KERNEL("bn_act_conv_implicit_gemm.fprop.f32.tf32x3", BnActConvParams, launch_fprop<Tf32x3>, workspace)

}  // namespace cnnfast::cuda
