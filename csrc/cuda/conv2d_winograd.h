// Winograd's F(M x M, 3 x 3) in f32 for 3x3 filters with stride and dilation 1, fprop and dgrad; M = 4 or 2.
//
//   y[tile, k] = bias[k] + A' [ sum_c (G w[k,c] G') . (B' x[tile, c] B) ] A        (conv2d_winograd_transform.h)
//
// A tile is M x M outputs of one image and the P x P inputs, P = M + 2, that they need. Its transformed inputs are
// multiplied with the transformed weights element by element and summed over c: P*P independent matrix products of
// tiles x C by C x K, 36 for 16 outputs (M = 4) or 16 for 4 (M = 2) where the direct sum takes 9 an output: 4 times and
// 2.25 times fewer multiplications. dgrad is fprop of the gradient with turned taps and C, K exchanged.
//
// A small kernel first writes the transformed weights into the workspace, in the order in which blocks read them:
//
//   U [column tile][stage of c][P*P][c][k]          zero beyond the last c and k
//
// Mapping: a block computes 32 tiles x 32 (M = 2: 64) output channels, all P*P products, over c in steps of 8; blocks
// that share inputs follow each other. A warp owns some of the products, a lane 8 x 4 (8 x 8) results of each: 128 sums
// in registers. A thread reads the inputs of one tile and channel into registers while the step before is multiplied,
// transforms them there, and leaves them in shared memory as V [P*P][c][tile]; U comes by cp.async through two stages.
// At the end the products go through shared memory, half of the tiles at a time, to threads that take one tile and
// output channel each: output transform, bias, epilogue (conv_bn_act), store. F(4x4)'s output transform has entries up
// to 8, which the rounding errors of its sums are multiplied with: it ends a chain of sums after 32 channels, and adds
// up what the chains give in y itself.
//
// Where a result isn't finite (Inf or NaN among the operands spreads over the whole tile, large values may overflow in
// between) the pixels of that tile are summed directly: infinities and NaNs come out where the direct kernel's do, and
// nowhere else.
//
// Layout NHWC with any pixel strides, weights with any strides; parts of tiles outside of the image are masked.
// Accumulator f32. Memory offsets are 64-bit, pixels of the batch are numbered in 32 bits.
//
// After Lavin and Gray (2016), whose 32 x 32 F(4x4) block this is, and Yan, Wang and Chu, Optimizing Batched Winograd
// Convolution on GPUs (2020).
#pragma once
#include "../common/kernel_table.h"
#include "conv2d_axes.h"
#include "conv2d_winograd_tiles.h"
#include "conv2d_winograd_transform.h"
#include "epilogue.h"
#include "primitives/async_copy.h"
#include "primitives/launch.h"

namespace cnnfast::cuda::winograd {

constexpr int kTiles = 32;  // of a block
constexpr int kPitch = 36;  // of V: eight channels of four tiles, which a warp writes at once, in different banks
constexpr int kTransformThreads = 256;

template <int M>
struct Block {
  static constexpr int kOutputs = M, kPoints = M + 2, kProducts = kPoints * kPoints;
  static constexpr int kChannels = 8;  // transformed at a time
  static constexpr int kColumns = M == 4 ? 32 : 64;
  static constexpr int kOwn = M == 4 ? 3 : 2;    // products of a warp
  static constexpr int kDepth = M == 4 ? 4 : 8;  // channels of a stage of weights
  static constexpr int kThreads = kProducts / kOwn * 32;
  static constexpr int kChain = M == 4 ? 32 : 1 << 30;  // channels whose products are added up in a row
  static constexpr int kStages = kChannels / kDepth;    // of weights, for the channels that are transformed at a time
  static constexpr int kInputs = kProducts * kChannels * kPitch, kWeights = kProducts * kDepth * kColumns;  // floats
  static constexpr size_t kSharedBytes = (kInputs + 2 * kWeights) * sizeof(float);
  static_assert(kThreads >= kTiles * kChannels, "a thread for each tile and channel");
  static_assert(kProducts * (kTiles / 2) * kColumns <= kInputs + 2 * kWeights, "half of the products fit");
};

// fprop, or dgrad as fprop: `in` is what is summed over.
struct View {
  int N, H, W, C, P, Q, K;
  int pad_h, pad_w;
  int64_t in_n, in_h, in_w, out_n, out_h, out_w, r_n, r_h, r_w;
  int64_t w_first, w_k, w_c, w_r, w_s;

  View(const Conv2dParams& p, Direction direction) {
    const bool forward = direction == Direction::fprop;
    const auto to_int = [](int64_t n) { return static_cast<int>(n); };
    N = to_int(p.N), C = to_int(forward ? p.C : p.K), K = to_int(forward ? p.K : p.C);
    H = to_int(forward ? p.H : p.P), W = to_int(forward ? p.W : p.Q);
    P = to_int(forward ? p.P : p.H), Q = to_int(forward ? p.Q : p.W);
    pad_h = to_int(forward ? p.pad_h : kTapsAcross - 1 - p.pad_h);
    pad_w = to_int(forward ? p.pad_w : kTapsAcross - 1 - p.pad_w);
    in_n = forward ? p.x_n : p.y_n, in_h = forward ? p.x_h : p.y_h, in_w = forward ? p.x_w : p.y_w;
    out_n = forward ? p.y_n : p.x_n, out_h = forward ? p.y_h : p.x_h, out_w = forward ? p.y_w : p.x_w;
    r_n = p.r_n, r_h = p.r_h, r_w = p.r_w;
    w_k = forward ? p.w_k : p.w_c, w_c = forward ? p.w_c : p.w_k;
    w_r = forward ? p.w_r : -p.w_r, w_s = forward ? p.w_s : -p.w_s;
    w_first = forward ? 0 : (kTapsAcross - 1) * (p.w_r + p.w_s);
  }
};

// How the output is cut into blocks: (tiles, columns), the last fastest.
template <class Block>
struct Tiling {
  int tiles_h, tiles_w, tiles;  // of an image; of the batch
  int steps, column_tiles;      // of kChannels input channels

  explicit Tiling(const View& v)
      : tiles_h(static_cast<int>(ceil_div(v.P, Block::kOutputs))),
        tiles_w(static_cast<int>(ceil_div(v.Q, Block::kOutputs))),
        tiles(v.N * tiles_h * tiles_w),
        steps(static_cast<int>(ceil_div(v.C, Block::kChannels))),
        column_tiles(static_cast<int>(ceil_div(v.K, Block::kColumns))) {}
  int64_t blocks() const { return ceil_div(tiles, kTiles) * column_tiles; }
  int64_t weights() const {  // floats of U
    return int64_t{column_tiles} * steps * Block::kStages * Block::kWeights;
  }
};

// U, a thread an input and an output channel at a time.
template <int M>
__global__ void __launch_bounds__(kTransformThreads)
    transform_filters(const View v, const Tiling<Block<M>> tiling, const float* __restrict__ weight,
                      float* __restrict__ u) {
  using B = Block<M>;
  constexpr int P = B::kPoints, R = kTapsAcross;
  const int64_t channels = int64_t{tiling.steps} * B::kChannels, count = tiling.column_tiles * channels * B::kColumns;
  for (int64_t i = int64_t{blockIdx.x} * kTransformThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kTransformThreads) {
    const int column = static_cast<int>(i % B::kColumns);
    const int64_t row = i / B::kColumns;
    const int c = static_cast<int>(row % channels), tile = static_cast<int>(row / channels);
    const int k = tile * B::kColumns + column;
    const bool present = c < v.C && k < v.K;
    const float* from = weight + v.w_first + k * v.w_k + c * v.w_c;
    float columns[R][P];
#pragma unroll
    for (int s = 0; s < R; ++s) {
      float g[R];
#pragma unroll
      for (int r = 0; r < R; ++r) g[r] = present ? from[r * v.w_r + s * v.w_s] : 0.0f;
      transform_weights<M>(g, columns[s]);
    }
    float* to =
        u +
        ((int64_t{tile} * tiling.steps * B::kStages + c / B::kDepth) * B::kProducts * B::kDepth + c % B::kDepth) *
            B::kColumns +
        column;
#pragma unroll
    for (int a = 0; a < P; ++a) {
      const float g[R] = {columns[0][a], columns[1][a], columns[2][a]};
      float t[P];
      transform_weights<M>(g, t);
#pragma unroll
      for (int b = 0; b < P; ++b) to[(a * P + b) * B::kDepth * B::kColumns] = t[b];
    }
  }
}

// Where a tile's inputs lie: the offset of the first pixel, perhaps outside of the image; which of their rows and
// columns are inside, a bit each.
struct Source {
  int64_t at;
  unsigned rows, columns;
};

template <int P>
__device__ __forceinline__ Source source_of(const View& v, const Place& at) {
  const int h = at.p - v.pad_h, w = at.q - v.pad_w;
  return {at.n * v.in_n + h * v.in_h + w * v.in_w, at.present ? inside<P>(h, v.H) : 0, inside<P>(w, v.W)};
}

// The inputs of one tile and channel.
template <int M>
struct Inputs {
  static constexpr int P = M + 2, kChannels = Block<M>::kChannels;
  float d[P][P];

  __device__ __forceinline__ void load(const View& v, const Source& source, const float* in, unsigned channel) {
    const unsigned rows = channel < static_cast<unsigned>(v.C) ? source.rows : 0, columns = source.columns;
    const float* row = in + source.at + channel;
#pragma unroll
    for (int a = 0; a < P; ++a, row += v.in_h) {
      const float* at = row;
#pragma unroll
      for (int b = 0; b < P; ++b, at += v.in_w) d[a][b] = (rows >> a & columns >> b & 1) ? *at : 0.0f;
    }
  }
  // V = B' d B; products kChannels * kPitch apart.
  __device__ __forceinline__ void store(float* to) const {
    float half[P][P];
#pragma unroll
    for (int b = 0; b < P; ++b) {
      float column[P], t[P];
#pragma unroll
      for (int a = 0; a < P; ++a) column[a] = d[a][b];
      transform_input<M>(column, t);
#pragma unroll
      for (int a = 0; a < P; ++a) half[a][b] = t[a];
    }
#pragma unroll
    for (int a = 0; a < P; ++a) {
      float t[P];
      transform_input<M>(half[a], t);
#pragma unroll
      for (int b = 0; b < P; ++b) to[(a * P + b) * kChannels * kPitch] = t[b];
    }
  }
};

struct alignas(16) Four {
  float v[4];
};

// One pixel and output channel as a direct sum.
template <class T>
__device__ __forceinline__ float direct(const View& v, const T* __restrict__ in, const T* __restrict__ weight, int n,
                                        int p, int q, int k) {
  float total = 0.0f;
#pragma unroll 1
  for (int r = 0; r < kTapsAcross; ++r) {
    const int h = p - v.pad_h + r;
    if (h < 0 || h >= v.H) continue;
#pragma unroll 1
    for (int s = 0; s < kTapsAcross; ++s) {
      const int w = q - v.pad_w + s;
      if (w < 0 || w >= v.W) continue;
      const T* x = in + n * v.in_n + h * v.in_h + w * v.in_w;
      const T* taps = weight + v.w_first + k * v.w_k + r * v.w_r + s * v.w_s;
      float sum = 0.0f;
#pragma unroll 1
      for (int c = 0; c < v.C; ++c) sum += Numeric<T>::widen(x[c]) * Numeric<T>::widen(taps[c * v.w_c]);
      total += sum;
    }
  }
  return total;
}

// The end of a tile's output channel, or of a chain of its sums: output transform, bias, epilogue, store. The products
// are `pitch` apart; unless this is the first chain y holds what came before.
template <int M, class T>
__device__ __forceinline__ void finish(const View& v, const Place& at, int k, const float* products, int pitch,
                                       bool first, bool last, const T* __restrict__ in, const T* __restrict__ weight,
                                       const T* __restrict__ bias, T* __restrict__ out, const Epilogue<T>& epilogue,
                                       const Activate<float>& act) {
  constexpr int P = kPoints<M>;
  float rows[M][P];
#pragma unroll
  for (int b = 0; b < P; ++b) {
    float column[P], transformed[M];
#pragma unroll
    for (int a = 0; a < P; ++a) column[a] = products[(a * P + b) * pitch];
    transform_output<M>(column, transformed);
#pragma unroll
    for (int i = 0; i < M; ++i) rows[i][b] = transformed[i];
  }
  T* to = out + at.n * v.out_n + at.p * v.out_h + at.q * v.out_w + k;
  const T* residual = epilogue.residual ? epilogue.residual + at.n * v.r_n + at.p * v.r_h + at.q * v.r_w + k : nullptr;
  const auto complete = [&](float sum, int i, int j) {
    const float added = residual ? Numeric<T>::widen(residual[i * v.r_h + j * v.r_w]) : 0.0f;
    const float bias_of = bias ? Numeric<T>::widen(bias[k]) : 0.0f, scale = epilogue.scale ? epilogue.scale[k] : 1.0f,
                shift = epilogue.shift ? epilogue.shift[k] : 0.0f;
    return act(scale * (sum + bias_of) + shift + added);
  };
  bool finite = true;
#pragma unroll
  for (int i = 0; i < M; ++i) {
    float y[M];
    transform_output<M>(rows[i], y);
#pragma unroll
    for (int j = 0; j < M; ++j) {
      if (at.p + i >= v.P || at.q + j >= v.Q) continue;
      T& stored = to[i * v.out_h + j * v.out_w];
      if (!first) y[j] += Numeric<T>::widen(stored);
      finite = finite && is_finite(y[j]);
      stored = Numeric<T>::narrow(last ? complete(y[j], i, j) : y[j]);
    }
  }
  if (finite || !last) return;
#pragma unroll 1
  for (int i = 0; i < M && at.p + i < v.P; ++i)
#pragma unroll 1
    for (int j = 0; j < M && at.q + j < v.Q; ++j)
      to[i * v.out_h + j * v.out_w] =
          Numeric<T>::narrow(complete(direct(v, in, weight, at.n, at.p + i, at.q + j, k), i, j));
}

template <int M>
__global__ void __launch_bounds__(Block<M>::kThreads, 1)
    correlate(const View v, const Tiling<Block<M>> tiling, const float* __restrict__ in, const float* __restrict__ u,
              const float* __restrict__ weight, const float* __restrict__ bias, float* __restrict__ out,
              const Epilogue<float> epilogue) {
  using B = Block<M>;
  constexpr int kVectors = B::kColumns / 32;
  CNNFAST_DYNAMIC_SHARED(float, shared);
  CNNFAST_SHARED(Place, places, [kTiles]);
  CNNFAST_SHARED(Source, sources, [kTiles]);
  float *inputs = shared, *weights = shared + B::kInputs;

  const int t = threadIdx.x, lane = t % 32, warp = t / 32;
  const int column_tile = static_cast<int>(blockIdx.x % tiling.column_tiles);
  const int tile0 = static_cast<int>(blockIdx.x / tiling.column_tiles) * kTiles;
  if (t < kTiles) {
    places[t] = place_of<M>(tiling.tiles_h, tiling.tiles_w, tile0 + t, tiling.tiles);
    sources[t] = source_of<B::kPoints>(v, places[t]);
  }
  __syncthreads();

  // Neighbouring threads read neighbouring channels. Where there are more threads than inputs, a whole warp has none.
  const unsigned channel = threadIdx.x % B::kChannels, own_tile = threadIdx.x / B::kChannels;
  const bool reads = own_tile < kTiles;
  Inputs<M> input;
  const int stages = tiling.steps * B::kStages;
  const float* next = u + int64_t{column_tile} * stages * B::kWeights + t * 4;
  const auto stage_weights = [&](int stage) {
    float* to = weights + stage % 2 * B::kWeights + t * 4;
    static_assert(B::kWeights % (B::kThreads * 4) == 0, "each thread copies as much");
#pragma unroll
    for (int i = 0; i < B::kWeights / (B::kThreads * 4); ++i)
      copy_async_16(to + i * B::kThreads * 4, next + i * B::kThreads * 4, true);
    next += B::kWeights;
  };
  // Half of the products at a time go through shared memory to threads that take a tile and an output channel.
  float sums[B::kOwn][8][kVectors * 4] = {};
  const int lane_row = lane / 8 * 4, lane_column = lane % 8 * 4;
  const Activate<float> act(epilogue.act);
  const auto finish_chain = [&](bool first, bool last) {
    constexpr int kHalf = kTiles / 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int f = 0; f < B::kOwn; ++f)
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < kVectors; ++j) {
            const float* sum = &sums[f][half * 4 + i][j * 4];
            float* to = shared + ((warp * B::kOwn + f) * kHalf + lane_row + i) * B::kColumns + j * 32 + lane_column;
            *reinterpret_cast<Four*>(to) = Four{{sum[0], sum[1], sum[2], sum[3]}};
          }
      __syncthreads();
#pragma unroll 1
      for (int item = t; item < kHalf * B::kColumns; item += B::kThreads) {
        const Place at = places[half * kHalf + item / B::kColumns];
        const int k = column_tile * B::kColumns + item % B::kColumns;
        if (!at.present || k >= v.K) continue;
        finish<M>(v, at, k, shared + item, kHalf * B::kColumns, first, last, in, weight, bias, out, epilogue, act);
      }
      __syncthreads();  // what comes next overwrites the products
    }
  };

  constexpr int kChainStages = B::kChain / B::kDepth;
  for (int stage = 0; stage < stages; ++stage) {
    const int in_chain = stage % kChainStages;
    if (in_chain == 0) {  // the registers and shared memory of what is read ahead were needed for the last chain's end
      stage_weights(stage);
      copy_async_commit();
      if (reads) input.load(v, sources[own_tile], in, stage / B::kStages * B::kChannels + channel);
    }
    if (stage % B::kStages == 0 && reads) {
      input.store(inputs + channel * kPitch + own_tile);
      if (in_chain + B::kStages < kChainStages && stage + B::kStages < stages)
        input.load(v, sources[own_tile], in, (stage / B::kStages + 1) * B::kChannels + channel);
    }
    copy_async_wait<0>();
    __syncthreads();  // this stage is complete, and everybody has read the last one's weights
    const bool ends = in_chain + 1 == kChainStages || stage + 1 == stages;
    if (!ends) stage_weights(stage + 1);
    copy_async_commit();
    const float* from_v = inputs + (warp * B::kOwn * B::kChannels + stage % B::kStages * B::kDepth) * kPitch + lane_row;
    const float* from_u = weights + stage % 2 * B::kWeights + warp * B::kOwn * B::kDepth * B::kColumns + lane_column;
#pragma unroll(M == 4 ? 1 : 4)
    for (int c = 0; c < B::kDepth; ++c)
#pragma unroll
      for (int f = 0; f < B::kOwn; ++f) {
        const float *row = from_v + (f * B::kChannels + c) * kPitch,
                    *column = from_u + (f * B::kDepth + c) * B::kColumns;
        const Four rows[2] = {*reinterpret_cast<const Four*>(row), *reinterpret_cast<const Four*>(row + 16)};
        Four columns[kVectors];
#pragma unroll
        for (int j = 0; j < kVectors; ++j) columns[j] = *reinterpret_cast<const Four*>(column + j * 32);
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
          for (int j = 0; j < kVectors * 4; ++j) sums[f][i][j] += rows[i / 4].v[i % 4] * columns[j / 4].v[j % 4];
      }
    if ((stage + 1) % B::kStages == 0) __syncthreads();  // everybody has read the inputs
    if (ends) {
      finish_chain(stage < kChainStages, stage + 1 == stages);
#pragma unroll
      for (int f = 0; f < B::kOwn; ++f)
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
          for (int j = 0; j < kVectors * 4; ++j) sums[f][i][j] = 0.0f;
    }
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <int M, Direction direction>
int64_t workspace(const void* params) {
  const View v(*static_cast<const Conv2dParams*>(params), direction);
  return Tiling<Block<M>>(v).weights() * static_cast<int64_t>(sizeof(float));
}

template <int M, Direction direction>
const char* launch_correlate(const void* params, const Launch& run) {
  const auto& p = *static_cast<const Conv2dParams*>(params);
  constexpr bool forward = direction == Direction::fprop;
  const View v(p, direction);
  const Tiling<Block<M>> tiling(v);
  if (tiling.blocks() == 0) return nullptr;
  const float *x = static_cast<const float*>(run.operands[0]), *w = static_cast<const float*>(run.operands[1]),
              *b = static_cast<const float*>(run.operands[2]), *y = static_cast<const float*>(run.operands[3]);
  float* u = static_cast<float*>(run.workspace);
  const int64_t pairs = tiling.weights() / Block<M>::kProducts;
  const char* error = launch<transform_filters<M>>(grid_for(ceil_div(pairs, kTransformThreads)),
                                                   dim3(kTransformThreads, 1, 1), 0, run.stream, v, tiling, w, u);
  if (error) return error;
  return launch<correlate<M>>(dim3(static_cast<unsigned>(tiling.blocks()), 1, 1), dim3(Block<M>::kThreads, 1, 1),
                              Block<M>::kSharedBytes, run.stream, v, tiling, forward ? x : y,
                              static_cast<const float*>(u), w, forward ? b : nullptr,
                              const_cast<float*>(forward ? y : x), Epilogue<float>(p, run));
}

}  // namespace cnnfast::cuda::winograd
