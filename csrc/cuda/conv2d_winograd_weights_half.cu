// Winograd's F(3 x 3, 2 x 2) in bf16 and f16 with products of tensor cores (sm_80 mma.sync), wgrad of 3x3 filters with
// stride and dilation 1: the formula of conv2d_winograd_weights.cu, the slices and the end of
// conv2d_winograd_weights.h.
//
//   dw[k,c] = G' [ sum_tiles (A dy[tile,k] A') . (B' x[tile,c] B) ] G        (conv2d_winograd_transform.h)
//
// 16 independent products of C x tiles by tiles x K, for 9 taps of 4 pixels: 2.25 times fewer multiplications than the
// direct sum. A and B have the entries 0, 1, -1 alone, so that the transforms in f32 are all but exact, and what they
// give is rounded once, to T; the fractions of G meet the sums, in f32. Where a transformed value overflows in f16 the
// sums that it enters aren't finite: those taps are summed directly.
//
// Mapping: a block computes 32 input x 64 output channels, all 16 products, over a slice of the tiles in steps of 16, a
// depth of mma.m16n8k16. A warp owns two products, 32 x 64 sums of each in registers. A thread takes one tile of a
// step: two neighbouring channels of x (4 x 4 pixels) and twice two of dy (2 x 2). It reads them into registers two
// steps ahead and transforms them one step ahead, into the stage of shared memory that the last step has left, while
// other warps still multiply: one barrier a step. Each of the two stages holds
//
//   V [product][tile][32 channels], Z [product][tile][64 channels]
//
// swizzled by 16 bytes, so that neither the pairs of a warp nor the eight tiles of an ldmatrix meet in a bank; as the
// tiles are summed over, but are rows here, ldmatrix transposes both. Where the tiles of the next steps lie is worked
// out by a warp every other step. A chain of sums ends after 1024 tiles: a tensor core cuts off what a sum can't hold,
// 2^-23 of it at most in each of 64 steps, 64 times less than a rounding to f16. It goes through shared memory, half of
// the input channels at a time, to threads that take a pair of channels each.
//
// Layout NHWC with even pixel strides, even numbers of channels; weights with any strides; parts of tiles outside of
// the images are zeros. Accumulator f32. Memory offsets are 64-bit, pixels of the batch are numbered in 32 bits.
//
// After Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2016).
#include "conv2d_winograd_weights.h"
#include "primitives/matrix.h"

namespace cnnfast::cuda {
namespace winograd {
namespace {

struct WeightsHalfBlock {
  static constexpr int kOutputs = 2, kPoints = 4, kProducts = 16;
  static constexpr int kRows = 32, kColumns = 64, kStep = 16;  // input channels, output channels, tiles
  static constexpr int kOwn = 2, kThreads = kProducts / kOwn * 32;
  static constexpr int kChain = 1024;                                  // tiles whose products are added up in a row
  static constexpr int kPlaces = 4 * kStep;                            // tiles whose places are kept
  static constexpr int kInputWords = kStep * kRows / 2;                // of a product of V, 32 bits each
  static constexpr int kGradientWords = kStep * kColumns / 2;          // of Z
  static constexpr int kInputs = kProducts * kInputWords;              // words of V
  static constexpr int kStage = kInputs + kProducts * kGradientWords;  // of V and Z
  static constexpr size_t kSharedBytes = 2 * kStage * sizeof(uint32_t);
  static_assert(kThreads == kStep * kRows / 2, "a thread for each tile and pair of input channels");
  static_assert(kColumns == 2 * kRows, "which takes two pairs of output channels");
  static_assert(kProducts * (kRows / 2) * kColumns <= 2 * kStage, "half of the products fit");
};

// The word of V of a tile's pair of channels, in its product.
__device__ __forceinline__ int place_of_input(int tile, int pair) {
  return (tile * 4 + (pair / 4 ^ tile / 2 % 4)) * 4 + pair % 4;
}
// The same of Z.
__device__ __forceinline__ int place_of_gradient(int tile, int pair) {
  return (tile * 8 + (pair / 4 ^ (tile / 2 % 4 + tile % 2 * 4))) * 4 + pair % 4;
}

// Two channels of a tile's Size x Size pixels, as they lie in memory; zeros where there is none.
template <int Size, class T>
__device__ __forceinline__ void load(const T* __restrict__ from, int64_t row, int64_t column, unsigned rows,
                                     unsigned columns, uint32_t (&held)[Size][Size]) {
#pragma unroll
  for (int a = 0; a < Size; ++a, from += row) {
    const T* at = from;
#pragma unroll
    for (int b = 0; b < Size; ++b, at += column)
      held[a][b] = (rows >> a & columns >> b & 1) ? *reinterpret_cast<const uint32_t*>(at) : 0;
  }
}

// Transforms both channels along both axes to 4 x 4 pairs, `pitch` words apart.
template <class T, int Size, class Transform>
__device__ __forceinline__ void store(const uint32_t (&held)[Size][Size], const Transform& transform, uint32_t* to,
                                      int pitch) {
  constexpr int P = WeightsHalfBlock::kPoints;
  float half[2][P][Size];
#pragma unroll
  for (int e = 0; e < 2; ++e)
#pragma unroll
    for (int b = 0; b < Size; ++b) {
      float column[Size], t[P];
#pragma unroll
      for (int a = 0; a < Size; ++a) column[a] = Numeric<T>::widen(reinterpret_cast<const T*>(&held[a][b])[e]);
      transform(column, t);
#pragma unroll
      for (int a = 0; a < P; ++a) half[e][a][b] = t[a];
    }
#pragma unroll
  for (int a = 0; a < P; ++a) {
    float low[P], high[P];
    transform(half[0][a], low);
    transform(half[1][a], high);
#pragma unroll
    for (int b = 0; b < P; ++b) store_pair(reinterpret_cast<T*>(to + (a * P + b) * pitch), low[b], high[b]);
  }
}

template <class T>
__global__ void __launch_bounds__(WeightsHalfBlock::kThreads, 1)
    wgrad_half(const Conv2dParams p, const Cut cut, const T* __restrict__ x, const T* __restrict__ y,
               float* __restrict__ partial) {
  using B = WeightsHalfBlock;
  CNNFAST_DYNAMIC_SHARED(uint32_t, shared);
  CNNFAST_SHARED(TilePlace, places, [B::kPlaces]);

  const int t = threadIdx.x, lane = t % 32, warp = t / 32;
  const int c0 = static_cast<int>(blockIdx.x) * B::kRows, k0 = static_cast<int>(blockIdx.y) * B::kColumns;
  const int slice = static_cast<int>(blockIdx.z), begin = slice * cut.slice;
  const int end = begin + cut.slice < cut.tiles ? begin + cut.slice : cut.tiles;

  constexpr int kPairs = B::kRows / 2;
  const int pair = t % kPairs, own_tile = t / kPairs;  // neighbouring threads read neighbouring channels
  const int own_c = c0 + pair * 2, own_k = k0 + pair * 2;
  uint32_t input[4][4], gradient[2][2][2];

  constexpr int kMmaRows = B::kRows / 16, kMmaColumns = B::kColumns / 8;
  float sums[B::kOwn][kMmaRows][kMmaColumns][4];

  for (int chain = begin; chain < end; chain += B::kChain) {
    const int length = end - chain < B::kChain ? end - chain : B::kChain, steps = (length + B::kStep - 1) / B::kStep;
    const auto find = [&](int first) {
      places[(first + t) % B::kPlaces] = place_of<2>(p, cut, chain + first + t, end);
    };
    const auto read = [&](int step) {
      const TilePlace& at = places[(step * B::kStep + own_tile) % B::kPlaces];
      load(x + at.x + own_c, p.x_h, p.x_w, own_c < p.C ? at.x_rows : 0, at.x_columns, input);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int k = own_k + i * B::kRows;
        load(y + at.y + k, p.y_h, p.y_w, k < p.K ? at.y_rows : 0, at.y_columns, gradient[i]);
      }
    };
    const auto transform = [&](int step) {
      uint32_t *inputs = shared + step % 2 * B::kStage, *gradients = inputs + B::kInputs;
      store<T>(
          input, [](const auto& d, auto& v) { transform_input<2>(d, v); }, inputs + place_of_input(own_tile, pair),
          B::kInputWords);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        store<T>(
            gradient[i], [](const auto& d, auto& v) { transform_gradient<2>(d, v); },
            gradients + place_of_gradient(own_tile, pair + i * kPairs), B::kGradientWords);
    };

    __syncthreads();  // everybody has read the last chain's products
    if (t < B::kPlaces) find(0);
    __syncthreads();
    read(0);
    transform(0);
    read(1);
#pragma unroll
    for (int f = 0; f < B::kOwn; ++f)
#pragma unroll
      for (int i = 0; i < kMmaRows; ++i)
#pragma unroll
        for (int j = 0; j < kMmaColumns; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[f][i][j][e] = 0.0f;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      __syncthreads();  // this step is complete, and everybody has read the last one
      if (step % 2 == 1 && t < 2 * B::kStep) find((step + 3) * B::kStep);  // of which the next step reads the first
      const uint32_t *inputs = shared + step % 2 * B::kStage, *gradients = inputs + B::kInputs;
#pragma unroll
      for (int f = 0; f < B::kOwn; ++f) {
        const int product = warp * B::kOwn + f;
        uint32_t a[kMmaRows][4];
#pragma unroll
        for (int i = 0; i < kMmaRows; ++i)
          ldmatrix_x4_transposed(a[i], inputs + product * B::kInputWords +
                                           place_of_input(lane / 16 * 8 + lane % 8, i * 8 + lane / 8 % 2 * 4));
#pragma unroll
        for (int j = 0; j < kMmaColumns; j += 2) {
          uint32_t both[4];
          ldmatrix_x4_transposed(
              both, gradients + product * B::kGradientWords + place_of_gradient(lane % 16, (j + lane / 16) * 4));
          const uint32_t b[2][2] = {{both[0], both[1]}, {both[2], both[3]}};
#pragma unroll
          for (int i = 0; i < kMmaRows; ++i) {
            mma_m16n8k16<T>(sums[f][i][j], a[i], b[0]);
            mma_m16n8k16<T>(sums[f][i][j + 1], a[i], b[1]);
          }
        }
      }
      if (step + 1 < steps) transform(step + 1);
      if (step + 2 < steps) read(step + 2);
    }
    __syncthreads();  // everybody has read the last step

    float* products = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int half = 0; half < kMmaRows; ++half) {
      HalfOfProducts<B>::store(sums, half, products);
      __syncthreads();
#pragma unroll 1
      for (int item = t; item < HalfOfProducts<B>::kProduct; item += B::kThreads) {
        const int row = item / B::kColumns, column = item % B::kColumns;
        const int c = c0 + half * HalfOfProducts<B>::kRows + row, k = k0 + column;
        if (c < p.C && k < p.K)
          finish<2, HalfOfProducts<B>::kProduct>(HalfOfProducts<B>::at(products, row, column),
                                                 partial + (slice * kTaps * p.C + c) * p.K + k, p.C * p.K,
                                                 chain == begin);
      }
      if (half == 0) __syncthreads();  // the other half overwrites the products
    }
  }
}

}  // namespace
}  // namespace winograd

CNNFAST_KERNEL("conv2d_winograd_f2x2.wgrad.bf16.mma", Conv2dParams,
               (winograd::launch_wgrad<__nv_bfloat16, winograd::WeightsHalfBlock, winograd::wgrad_half<__nv_bfloat16>>),
               winograd::wgrad_workspace<winograd::WeightsHalfBlock>)
CNNFAST_KERNEL("conv2d_winograd_f2x2.wgrad.f16.mma", Conv2dParams,
               (winograd::launch_wgrad<__half, winograd::WeightsHalfBlock, winograd::wgrad_half<__half>>),
               winograd::wgrad_workspace<winograd::WeightsHalfBlock>)

}  // namespace cnnfast::cuda
