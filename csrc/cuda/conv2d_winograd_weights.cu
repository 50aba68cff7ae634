// Winograd's F(3 x 3, M x M) in f32, wgrad of 3x3 filters with stride and dilation 1; M = 4 or 2.
//
//   dw[k,c] = G' [ sum_tiles (A dy[tile,k] A') . (B' x[tile,c] B) ] G        (conv2d_winograd_transform.h)
//
// This is fprop's formula (conv2d_winograd.h) differentiated by w. A tile is M x M pixels of dy and the P x P pixels of
// x, P = M + 2, that they met; both are transformed and multiplied element by element, summed over the tiles of the
// batch: P*P independent products of C x tiles by tiles x K, 36 for 9 taps of 16 pixels (M = 4) or 16 for 9 taps of 4
// (M = 2): 4 times and 2.25 times fewer multiplications than the direct sum.
//
// Mapping: a block computes 32 input x 32 output channels, all P*P products, over a slice of the tiles in steps of 8. A
// warp owns some of the products, a lane 8 x 4 results of each in registers. A warp reads tiles, a lane one channel of
// each, into registers while the step before is multiplied, transforms them there, and leaves them in shared memory as
//
//   V, Z [P*P][tile][channel]
//
// A chain of sums ends after 128 tiles, or, as F(4 x 4)'s transforms amplify its rounding errors, after 32: it goes
// through shared memory, half of the input channels at a time, to threads that take a pair of channels each and add its
// taps to the slice's (conv2d_winograd_weights.h, which adds up the slices, too).
//
// Layout NHWC with any pixel strides, weights with any strides; parts of tiles outside of the images are zeros.
// Accumulator f32. Memory offsets are 64-bit, pixels of the batch are numbered in 32 bits.
//
// After Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2016).
#include "conv2d_winograd_weights.h"

namespace cnnfast::cuda {
namespace winograd {
namespace {

constexpr int kChannels = 32;  // of either operand, of a block
constexpr int kStep = 8;       // tiles that are transformed at a time

template <int M>
struct WeightsBlock {
  static constexpr int kOutputs = M, kPoints = M + 2, kProducts = kPoints * kPoints;
  static constexpr int kRows = kChannels, kColumns = kChannels, kStep = winograd::kStep;
  static constexpr int kOwn = M == 4 ? 3 : 2;  // products of a warp
  static constexpr int kThreads = kProducts / kOwn * 32, kAtOnce = M == 4 ? 1 : 2;
  static constexpr int kChain = M == 4 ? 32 : 128;                // tiles whose products are added up in a row
  static constexpr int kOperand = kProducts * kStep * kChannels;  // floats of V, of Z
  static constexpr size_t kSharedBytes = 2 * kOperand * sizeof(float);
  // Eight warps read x, a tile each. M = 2: they read as many tiles of dy; M = 4: four more read two each.
  static constexpr int kGradients = M == 4 ? 2 : 1, kFirst = M == 4 ? kStep : 0;
  static constexpr int kGradientsAt = M == 4 ? 0 : kProducts;  // among the registers of what is read ahead
  static constexpr int kHeld = M == 4 ? kProducts : kProducts + M * M;
  static_assert(kThreads / 32 - kFirst == kStep / kGradients, "all tiles of dy are read");
  static_assert(kProducts * (kChannels / 2) * kChannels <= 2 * kOperand, "half of the products fit");

  // The tile of a step that is a warp's i-th of dy.
  static __device__ __forceinline__ int gradient(int warp, int i) { return warp - kFirst + i * (kStep / kGradients); }
  // Does a warp's part of a step: its tile of x, its tiles of dy.
  template <class Input, class Gradient>
  static __device__ __forceinline__ void share(int warp, const Input& of_x, const Gradient& of_y) {
    if (M == 2 || warp < kStep) {
      of_x();
      if (M == 4) return;
    }
#pragma unroll
    for (int i = 0; i < kGradients; ++i) of_y(i);
  }
};

// A tile's Size x Size pixels of one channel; zeros where there is none.
template <int Size>
__device__ __forceinline__ void load(const float* __restrict__ from, int64_t row, int64_t column, unsigned rows,
                                     unsigned columns, float* held) {
#pragma unroll
  for (int a = 0; a < Size; ++a, from += row) {
    const float* at = from;
#pragma unroll
    for (int b = 0; b < Size; ++b, at += column) held[a * Size + b] = (rows >> a & columns >> b & 1) ? *at : 0.0f;
  }
}

// Transforms In x In values along both axes to P x P, kStep * kChannels apart.
template <int In, int P, class Transform>
__device__ __forceinline__ void store(const float* held, const Transform& transform, float* to) {
  float half[P][In];
#pragma unroll
  for (int b = 0; b < In; ++b) {
    float column[In], t[P];
#pragma unroll
    for (int a = 0; a < In; ++a) column[a] = held[a * In + b];
    transform(column, t);
#pragma unroll
    for (int a = 0; a < P; ++a) half[a][b] = t[a];
  }
#pragma unroll
  for (int a = 0; a < P; ++a) {
    float t[P];
    transform(half[a], t);
#pragma unroll
    for (int b = 0; b < P; ++b) to[(a * P + b) * kStep * kChannels] = t[b];
  }
}

struct alignas(16) Four {
  float v[4];
};

template <int M>
__global__ void __launch_bounds__(WeightsBlock<M>::kThreads, WeightsBlock<M>::kAtOnce)
    wgrad(const Conv2dParams p, const Cut cut, const float* __restrict__ x, const float* __restrict__ y,
          float* __restrict__ partial) {
  using B = WeightsBlock<M>;
  CNNFAST_DYNAMIC_SHARED(float, shared);
  CNNFAST_SHARED(TilePlace, places, [B::kChain]);
  float *inputs = shared, *gradients = shared + B::kOperand;

  const int t = threadIdx.x, lane = t % 32, warp = t / 32;
  const int c0 = static_cast<int>(blockIdx.x) * kChannels, k0 = static_cast<int>(blockIdx.y) * kChannels;
  const unsigned own_c = blockIdx.x * kChannels + lane, own_k = blockIdx.y * kChannels + lane;
  const int slice = static_cast<int>(blockIdx.z), begin = slice * cut.slice;
  const int end = begin + cut.slice < cut.tiles ? begin + cut.slice : cut.tiles;

  float held[B::kHeld], sums[B::kOwn][8][4];
  const int lane_row = lane / 8 * 4, lane_column = lane % 8 * 4;
  const float* rows_at = inputs + warp * B::kOwn * kStep * kChannels + lane_row;
  const float* columns_at = gradients + warp * B::kOwn * kStep * kChannels + lane_column;

  for (int chain = begin; chain < end; chain += B::kChain) {
    for (int i = t; i < B::kChain; i += B::kThreads) places[i] = place_of<M>(p, cut, chain + i, end);
    __syncthreads();  // and everybody has read the last chain's products

    const auto read = [&](int first) {  // tiles from `first` of the chain on
      B::share(
          warp,
          [&] {
            const TilePlace& at = places[first + warp];
            load<B::kPoints>(x + at.x + own_c, p.x_h, p.x_w, own_c < p.C ? at.x_rows : 0, at.x_columns, held);
          },
          [&](int i) {
            const TilePlace& at = places[first + B::gradient(warp, i)];
            load<M>(y + at.y + own_k, p.y_h, p.y_w, own_k < p.K ? at.y_rows : 0, at.y_columns,
                    held + B::kGradientsAt + i * M * M);
          });
    };
    read(0);
#pragma unroll
    for (int f = 0; f < B::kOwn; ++f)
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[f][i][j] = 0.0f;
    const int length = end - chain < B::kChain ? end - chain : B::kChain;
    for (int first = 0; first < length; first += kStep) {
      B::share(
          warp,
          [&] {
            store<B::kPoints, B::kPoints>(held, [](const auto& d, auto& v) { transform_input<M>(d, v); }, inputs + t);
          },
          [&](int i) {
            store<M, B::kPoints>(
                held + B::kGradientsAt + i * M * M, [](const auto& d, auto& v) { transform_gradient<M>(d, v); },
                gradients + B::gradient(warp, i) * kChannels + lane);
          });
      __syncthreads();  // this step is complete
      if (first + kStep < length) read(first + kStep);
#pragma unroll 1
      for (int tile = 0; tile < kStep; ++tile)
#pragma unroll
        for (int f = 0; f < B::kOwn; ++f) {
          const float *row = rows_at + (f * kStep + tile) * kChannels,
                      *column = columns_at + (f * kStep + tile) * kChannels;
          const Four rows[2] = {*reinterpret_cast<const Four*>(row), *reinterpret_cast<const Four*>(row + 16)};
          const Four columns = *reinterpret_cast<const Four*>(column);
#pragma unroll
          for (int i = 0; i < 8; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[f][i][j] += rows[i / 4].v[i % 4] * columns.v[j];
        }
      __syncthreads();  // everybody has read the step
    }

    constexpr int kHalf = kChannels / 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int f = 0; f < B::kOwn; ++f)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float (&sum)[4] = sums[f][half * 4 + i];
          float* to = shared + ((warp * B::kOwn + f) * kHalf + lane_row + i) * kChannels + lane_column;
          *reinterpret_cast<Four*>(to) = Four{{sum[0], sum[1], sum[2], sum[3]}};
        }
      __syncthreads();
#pragma unroll 1
      for (int item = t; item < kHalf * kChannels; item += B::kThreads) {
        const int c = c0 + half * kHalf + item / kChannels, k = k0 + item % kChannels;
        if (c < p.C && k < p.K)
          finish<M, kHalf * kChannels>(shared + item, partial + (slice * kTaps * p.C + c) * p.K + k, p.C * p.K,
                                       chain == begin);
      }
      if (half == 0) __syncthreads();  // the other half overwrites the products
    }
  }
}

}  // namespace
}  // namespace winograd

CNNFAST_KERNEL("conv2d_winograd_f2x2.wgrad.f32", Conv2dParams,
               (winograd::launch_wgrad<float, winograd::WeightsBlock<2>, winograd::wgrad<2>>),
               winograd::wgrad_workspace<winograd::WeightsBlock<2>>)
CNNFAST_KERNEL("conv2d_winograd_f4x4.wgrad.f32", Conv2dParams,
               (winograd::launch_wgrad<float, winograd::WeightsBlock<4>, winograd::wgrad<4>>),
               winograd::wgrad_workspace<winograd::WeightsBlock<4>>)

}  // namespace cnnfast::cuda
