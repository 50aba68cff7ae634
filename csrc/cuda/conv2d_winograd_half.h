// Winograd's F(2 x 2, 3 x 3) in bf16 and f16 with products of tensor cores (sm_80 mma.sync), fprop and dgrad: the block
// of conv2d_winograd.h, whose formula, end and treatment of what isn't finite it shares.
//
// Mapping: 32 tiles x 64 output channels a block, all 16 products, over c in steps of 16, a depth of mma.m16n8k16. A
// warp owns two products, 32 x 64 sums of each in registers. A thread reads two neighbouring channels of a tile's
// inputs, transforms them in f32 and rounds them once into V, which lies [product][tile][c], swizzled so that the eight
// rows of an ldmatrix fall into different banks; U comes from the workspace in the order in which the lanes take it
//
//   U [column tile][step][product][8 columns][lane][2 registers]
//
// by cp.async through two stages. Layout NHWC with even pixel strides, an even number of channels. Accumulator f32.
#pragma once
#include "conv2d_winograd.h"
#include "primitives/matrix.h"

namespace cnnfast::cuda::winograd {

struct HalfBlock {
  static constexpr int kOutputs = 2, kPoints = 4, kProducts = 16;
  static constexpr int kColumns = 64, kOwn = 2, kChannels = 16, kStages = 1;
  static constexpr int kThreads = kProducts / kOwn * 32;
  static constexpr int kProductWords = kTiles * kChannels / 2;           // of V, 32 bits each
  static constexpr int kWeights = kProducts * kColumns * kChannels / 2;  // words of U, a step
  static constexpr int kInputs = kProducts * kProductWords;
  static constexpr size_t kSharedBytes = (kInputs + 2 * kWeights) * sizeof(uint32_t);
  static_assert(kThreads == kTiles * kChannels / 2, "a thread for each tile and pair of channels");
  static_assert(kProducts * (kTiles / 2) * kColumns <= kInputs + 2 * kWeights, "half of the products fit");
};

template <class T>
struct alignas(4) Two {
  T v[2];
};

// The word of V of a tile's pair of channels, in its product.
__device__ __forceinline__ int place(int tile, int pair) {
  return (tile * 2 + (pair / 4 ^ tile / 4 % 2)) * 4 + pair % 4;
}

// U, a thread two input channels of an output channel at a time.
template <class T>
__global__ void __launch_bounds__(kTransformThreads)
    transform_filters_half(const View v, const Tiling<HalfBlock> tiling, const T* __restrict__ weight,
                           uint32_t* __restrict__ u) {
  using B = HalfBlock;
  constexpr int P = B::kPoints, R = kTapsAcross, kWords = B::kWeights / B::kProducts;
  const int64_t count = int64_t{tiling.column_tiles} * tiling.steps * kWords;
  for (int64_t i = int64_t{blockIdx.x} * kTransformThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kTransformThreads) {
    const int word = static_cast<int>(i % kWords), lane = word / 2 % 32;
    const int64_t unit = i / kWords;  // (column tile, step)
    const int k = static_cast<int>(unit / tiling.steps) * B::kColumns + word / 64 * 8 + lane / 4;
    const int c = static_cast<int>(unit % tiling.steps) * B::kChannels + word % 2 * 8 + lane % 4 * 2;
    float results[2][P][P];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const bool present = c + e < v.C && k < v.K;
      const T* from = weight + v.w_first + k * v.w_k + (c + e) * v.w_c;
      float columns[R][P];
#pragma unroll
      for (int s = 0; s < R; ++s) {
        float g[R];
#pragma unroll
        for (int r = 0; r < R; ++r) g[r] = present ? Numeric<T>::widen(from[r * v.w_r + s * v.w_s]) : 0.0f;
        transform_weights<2>(g, columns[s]);
      }
#pragma unroll
      for (int a = 0; a < P; ++a) {
        const float g[R] = {columns[0][a], columns[1][a], columns[2][a]};
        transform_weights<2>(g, results[e][a]);
      }
    }
    uint32_t* to = u + unit * B::kWeights + word;
#pragma unroll
    for (int a = 0; a < P; ++a)
#pragma unroll
      for (int b = 0; b < P; ++b)
        store_pair(reinterpret_cast<T*>(to + (a * P + b) * kWords), results[0][a][b], results[1][a][b]);
  }
}

// The inputs of one tile and, step by step, two channels.
template <class T>
struct HalfInputs {
  static constexpr int P = HalfBlock::kPoints;
  const T* from;           // the first pixel of the first channel, perhaps outside of the image
  unsigned rows, columns;  // which of them are inside, a bit each
  int channels;
  Two<T> d[P][P];

  __device__ __forceinline__ HalfInputs(const View& v, const Source& source, int channel, const T* in)
      : from(in + source.at + channel), rows(source.rows), columns(source.columns), channels(v.C - channel) {}
  __device__ __forceinline__ void load(const View& v) {
    const unsigned inside = channels > 0 ? rows : 0;
    const T zero = Numeric<T>::narrow(0.0f);
#pragma unroll
    for (int a = 0; a < P; ++a)
#pragma unroll
      for (int b = 0; b < P; ++b) {
        const Two<T>* at = reinterpret_cast<const Two<T>*>(from + a * v.in_h + b * v.in_w);
        d[a][b] = (inside >> a & columns >> b & 1) ? *at : Two<T>{{zero, zero}};
      }
    from += HalfBlock::kChannels;
    channels -= HalfBlock::kChannels;
  }
  // V = B' d B, of both channels.
  __device__ __forceinline__ void store(uint32_t* to) const {
    float half[2][P][P];
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int b = 0; b < P; ++b) {
        float column[P], t[P];
#pragma unroll
        for (int a = 0; a < P; ++a) column[a] = Numeric<T>::widen(d[a][b].v[e]);
        transform_input<2>(column, t);
#pragma unroll
        for (int a = 0; a < P; ++a) half[e][a][b] = t[a];
      }
#pragma unroll
    for (int a = 0; a < P; ++a) {
      float low[P], high[P];
      transform_input<2>(half[0][a], low);
      transform_input<2>(half[1][a], high);
#pragma unroll
      for (int b = 0; b < P; ++b)
        store_pair(reinterpret_cast<T*>(to + (a * P + b) * HalfBlock::kProductWords), low[b], high[b]);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(HalfBlock::kThreads, 1)
    correlate_half(const View v, const Tiling<HalfBlock> tiling, const T* __restrict__ in,
                   const uint32_t* __restrict__ u, const T* __restrict__ weight, const T* __restrict__ bias,
                   T* __restrict__ out, const Epilogue<T> epilogue) {
  using B = HalfBlock;
  struct alignas(8) Fragment {
    uint32_t b[2];
  };
  CNNFAST_DYNAMIC_SHARED(uint32_t, shared);
  CNNFAST_SHARED(Place, places, [kTiles]);
  uint32_t *inputs = shared, *weights = shared + B::kInputs;

  const int t = threadIdx.x, lane = t % 32, warp = t / 32;
  const int column_tile = static_cast<int>(blockIdx.x % tiling.column_tiles);
  const int tile0 = static_cast<int>(blockIdx.x / tiling.column_tiles) * kTiles;
  if (t < kTiles) {
    places[t] = place_of<2>(tiling.tiles_h, tiling.tiles_w, tile0 + t, tiling.tiles);
  }
  __syncthreads();

  constexpr int kPairs = B::kChannels / 2;
  const int pair = t % kPairs, own_tile = t / kPairs;  // neighbouring threads read neighbouring channels
  HalfInputs<T> input(v, source_of<B::kPoints>(v, places[own_tile]), pair * 2, in);
  input.load(v);
  const uint32_t* next = u + int64_t{column_tile} * tiling.steps * B::kWeights + t * 4;
  const auto stage_weights = [&](int step) {
    uint32_t* to = weights + step % 2 * B::kWeights + t * 4;
#pragma unroll
    for (int i = 0; i < B::kWeights / (B::kThreads * 4); ++i)
      copy_async_16(to + i * B::kThreads * 4, next + i * B::kThreads * 4, true);
    next += B::kWeights;
  };
  stage_weights(0);
  copy_async_commit();

  constexpr int kMmaRows = kTiles / 16, kMmaColumns = B::kColumns / 8;
  float sums[B::kOwn][kMmaRows][kMmaColumns][4] = {};
  for (int step = 0; step < tiling.steps; ++step) {
    input.store(inputs + place(own_tile, pair));
    if (step + 1 < tiling.steps) input.load(v);
    copy_async_wait<0>();
    __syncthreads();  // this step is complete, and everybody has read the last one's weights
    if (step + 1 < tiling.steps) stage_weights(step + 1);
    copy_async_commit();
    const Fragment* fragments = reinterpret_cast<const Fragment*>(weights + step % 2 * B::kWeights) + lane;
#pragma unroll
    for (int f = 0; f < B::kOwn; ++f) {
      const int product = warp * B::kOwn + f;
      uint32_t a[kMmaRows][4];
#pragma unroll
      for (int i = 0; i < kMmaRows; ++i)
        ldmatrix_x4(a[i], inputs + product * B::kProductWords + place(i * 16 + lane % 16, lane / 16 * 4));
#pragma unroll
      for (int j = 0; j < kMmaColumns; ++j) {
        const Fragment fragment = fragments[(product * kMmaColumns + j) * 32];
#pragma unroll
        for (int i = 0; i < kMmaRows; ++i) mma_m16n8k16<T>(sums[f][i][j], a[i], fragment.b);
      }
    }
    __syncthreads();  // everybody has read the inputs
  }

  const Activate<float> act(epilogue.act);
  float* products = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int half = 0; half < kMmaRows; ++half) {
    HalfOfProducts<B>::store(sums, half, products);
    __syncthreads();
#pragma unroll 1
    for (int item = t; item < HalfOfProducts<B>::kProduct; item += B::kThreads) {
      const int row = item / B::kColumns, column = item % B::kColumns, k = column_tile * B::kColumns + column;
      const Place at = places[half * HalfOfProducts<B>::kRows + row];
      if (!at.present || k >= v.K) continue;
      finish<2>(v, at, k, HalfOfProducts<B>::at(products, row, column), HalfOfProducts<B>::kProduct, true, true, in,
                weight, bias, out, epilogue, act);
    }
    __syncthreads();  // the other half overwrites the products
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <Direction direction>
int64_t workspace_half(const void* params) {
  return Tiling<HalfBlock>(View(*static_cast<const Conv2dParams*>(params), direction)).weights() *
         static_cast<int64_t>(sizeof(uint32_t));
}

template <class T, Direction direction>
const char* launch_half(const void* params, const Launch& run) {
  const auto& p = *static_cast<const Conv2dParams*>(params);
  constexpr bool forward = direction == Direction::fprop;
  const View v(p, direction);
  const Tiling<HalfBlock> tiling(v);
  if (tiling.blocks() == 0) return nullptr;
  const T *x = static_cast<const T*>(run.operands[0]), *w = static_cast<const T*>(run.operands[1]),
          *b = static_cast<const T*>(run.operands[2]), *y = static_cast<const T*>(run.operands[3]);
  uint32_t* u = static_cast<uint32_t*>(run.workspace);
  const char* error =
      launch<transform_filters_half<T>>(grid_for(ceil_div(tiling.weights() / HalfBlock::kProducts, kTransformThreads)),
                                        dim3(kTransformThreads, 1, 1), 0, run.stream, v, tiling, w, u);
  if (error) return error;
  return launch<correlate_half<T>>(dim3(static_cast<unsigned>(tiling.blocks()), 1, 1), dim3(HalfBlock::kThreads, 1, 1),
                                   HalfBlock::kSharedBytes, run.stream, v, tiling, forward ? x : y,
                                   static_cast<const uint32_t*>(u), w, forward ? b : nullptr,
                                   const_cast<T*>(forward ? y : x), Epilogue<T>(p, run));
}

}  // namespace cnnfast::cuda::winograd
