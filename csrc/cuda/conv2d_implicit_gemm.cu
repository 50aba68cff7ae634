// 2-D convolution as an implicit GEMM on tensor cores (sm_80 mma.sync), bf16 and f16, forward.
//
//   y[m, k] = b[k] + sum_j A[m, j] B[j, k]    m = (n, p, q) over pixels, j = (r, s, c) over taps and channels
//
// A is gathered from x on the way into shared memory (nothing is materialised), 16 bytes, 8 channels of one tap, at a
// time: hence C % 8 == 0. One group, weights KRSC, everything 16-byte aligned.
//
// Mapping: a block of 8 warps computes 128 pixels x 64 filters, a warp 32 x 32, over j in steps of 32 through three
// stages of shared memory filled by cp.async; one barrier a step. A row of a stage is 64 bytes, 4 vectors, stored at
// vector ^ (row / 2 % 4): the eight rows of an ldmatrix then lie in different banks. Accumulator f32, bias added to it,
// one rounding at the end. Memory offsets are 64-bit, coordinates within an image 32-bit.
#include "../common/kernel_table.h"
#include "primitives/async_copy.h"
#include "primitives/cuda.h"
#include "primitives/launch.h"
#include "primitives/matrix.h"
#include "primitives/numeric.h"

namespace cnnfast::cuda {
namespace {

constexpr int kTileM = 128;
constexpr int kTileN = 64;
constexpr int kDepth = 32;
constexpr int kStages = 3;
constexpr int kThreads = 256;
constexpr int kWarpM = 32;  // 4 x 2 warps
constexpr int kWarpN = 32;

constexpr int kVector = 8;                     // elements in 16 bytes
constexpr int kRowVectors = kDepth / kVector;  // of a row of a stage
constexpr int kRowsAtOnce = kThreads / kRowVectors;
constexpr int kRowsA = kTileM / kRowsAtOnce;  // rows that one thread stages
constexpr int kRowsB = kTileN / kRowsAtOnce;
constexpr int kResultVectors = kTileN / kVector;  // of a row of results
constexpr int kMmaM = kWarpM / 16, kMmaN = kWarpN / 8, kMmaK = kDepth / 16;
static_assert(kTileM * kResultVectors <= kStages * kTileM * kRowVectors && kResultVectors == 8,
              "the results fit tile_a");
static_assert((kTileM / kWarpM) * (kTileN / kWarpN) * 32 == kThreads, "a warp for each 32 x 32");

// Where a vector of 8 elements lies in a stage, in vectors.
__device__ __forceinline__ int swizzled(int row, int vector) {
  return row * kRowVectors + (vector ^ (row / 2 % kRowVectors));
}

struct Vector {
  uint4 bits;
};

// Pixel m of all the outputs. One 64-bit division a block finds the image and the place in it of the block's first
// pixel; the rest is 32-bit.
struct Pixels {
  int64_t image0;
  int first, P, Q;
  __device__ __forceinline__ Pixels(const Conv2dParams& p, int64_t m0)
      : image0(m0 / (p.P * p.Q)),
        first(static_cast<int>(m0 % (p.P * p.Q))),
        P(static_cast<int>(p.P)),
        Q(static_cast<int>(p.Q)) {}
  // (image, p, q) of pixel m0 + i.
  __device__ __forceinline__ void at(int i, int64_t& n, int& row, int& column) const {
    const int line = (first + i) / Q;
    column = first + i - line * Q;
    row = line % P;
    n = image0 + line / P;
  }
};

// The filter tap and channel vector that a thread stages next; the channel is fastest.
struct Position {
  int c = 0, s = 0, r = 0;  // c in vectors
  __device__ __forceinline__ void advance(int by, int channels, int taps_s) {
    c += by;
    if (c < channels) return;
    const int carry = c / channels;
    c -= carry * channels;
    s += carry;
    if (s < taps_s) return;
    const int rows = s / taps_s;
    s -= rows * taps_s;
    r += rows;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    implicit_gemm(const Conv2dParams p, const int column_tiles, const T* __restrict__ x, const T* __restrict__ w,
                  const T* __restrict__ bias, T* __restrict__ y) {
  CNNFAST_SHARED(Vector, tile_a, [kStages][kTileM * kRowVectors]);
  CNNFAST_SHARED(Vector, tile_b, [kStages][kTileN * kRowVectors]);

  const int t = threadIdx.x, lane = t % 32, warp = t / 32;
  const int64_t m0 = static_cast<int64_t>(blockIdx.x / column_tiles) * kTileM;
  const int n0 = static_cast<int>(blockIdx.x % column_tiles) * kTileN;
  const int64_t pixels = p.N * p.P * p.Q;
  const int H = static_cast<int>(p.H), W = static_cast<int>(p.W), K = static_cast<int>(p.K);
  const int channel_vectors = static_cast<int>(p.C / kVector), taps_r = static_cast<int>(p.R),
            taps_s = static_cast<int>(p.S);

  // ---- staging: this thread's vector of each step, for kRowsA pixels and kRowsB filters
  const int vector = t % kRowVectors, first = t / kRowVectors;
  const Pixels pixel(p, m0);
  int64_t pixel_x[kRowsA];
  int pixel_h[kRowsA], pixel_w[kRowsA];
#pragma unroll
  for (int i = 0; i < kRowsA; ++i) {
    int64_t n;
    int row, column;
    pixel.at(first + i * kRowsAtOnce, n, row, column);
    // A pixel past the end gets a row outside of every input.
    pixel_h[i] = m0 + first + i * kRowsAtOnce < pixels ? static_cast<int>(row * p.stride_h - p.pad_h) : -(1 << 30);
    pixel_w[i] = static_cast<int>(column * p.stride_w - p.pad_w);
    pixel_x[i] = n * p.x_n + pixel_h[i] * p.x_h + pixel_w[i] * p.x_w;
  }
  Position at;
  at.advance(vector, channel_vectors, taps_s);

  auto stage_next = [&](int stage) {
    const bool inside = at.r < taps_r;
    const int dh = at.r * static_cast<int>(p.dilation_h), dw = at.s * static_cast<int>(p.dilation_w);
    const int64_t offset = dh * p.x_h + dw * p.x_w + at.c * kVector;
#pragma unroll
    for (int i = 0; i < kRowsA; ++i) {
      const bool valid = inside && static_cast<unsigned>(pixel_h[i] + dh) < static_cast<unsigned>(H) &&
                         static_cast<unsigned>(pixel_w[i] + dw) < static_cast<unsigned>(W);
      copy_async_16(&tile_a[stage][swizzled(first + i * kRowsAtOnce, vector)], x + (valid ? pixel_x[i] + offset : 0),
                    valid);
    }
    const int64_t w_offset = at.r * p.w_r + at.s * p.w_s + at.c * kVector;
#pragma unroll
    for (int i = 0; i < kRowsB; ++i) {
      const int k = n0 + first + i * kRowsAtOnce;
      const bool valid = inside && k < K;
      copy_async_16(&tile_b[stage][swizzled(first + i * kRowsAtOnce, vector)], w + (valid ? k * p.w_k + w_offset : 0),
                    valid);
    }
    at.advance(kRowVectors, channel_vectors, taps_s);
  };

  // ---- products
  const int warp_m = warp % (kTileM / kWarpM) * kWarpM, warp_n = warp / (kTileM / kWarpM) * kWarpN;
  float sum[kMmaM][kMmaN][4];
#pragma unroll
  for (int i = 0; i < kMmaM; ++i)
#pragma unroll
    for (int j = 0; j < kMmaN; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[i][j][e] = 0.0f;

  auto multiply = [&](int stage) {
#pragma unroll
    for (int k = 0; k < kMmaK; ++k) {
      uint32_t a[kMmaM][4], b[kMmaN][2];
#pragma unroll
      for (int i = 0; i < kMmaM; ++i)  // matrices: rows 0-7 and 8-15 of the first 8 columns, then of the next
        ldmatrix_x4(a[i], &tile_a[stage][swizzled(warp_m + i * 16 + lane % 16, k * 2 + lane / 16)]);
#pragma unroll
      for (int j = 0; j < kMmaN; j += 2) {  // matrices: the two depths of filters 0-7, then of filters 8-15
        uint32_t pair[4];
        ldmatrix_x4(pair, &tile_b[stage][swizzled(warp_n + j * 8 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2)]);
        b[j][0] = pair[0];
        b[j][1] = pair[1];
        b[j + 1][0] = pair[2];
        b[j + 1][1] = pair[3];
      }
#pragma unroll
      for (int i = 0; i < kMmaM; ++i)
#pragma unroll
        for (int j = 0; j < kMmaN; ++j) mma_m16n8k16<T>(sum[i][j], a[i], b[j]);
    }
  };

  const int64_t steps = (p.R * p.S * channel_vectors + kRowVectors - 1) / kRowVectors;
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) stage_next(stage);
    copy_async_commit();
  }
  int stage = 0, free_stage = kStages - 1;
  for (int64_t step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // this step's stage is complete, and everybody is done with the one before it
    if (step + kStages - 1 < steps) stage_next(free_stage);
    copy_async_commit();  // perhaps an empty group: the count of groups stays that of the steps
    multiply(stage);
    free_stage = stage;
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }

  // ---- results: rounded into shared memory, then written 16 bytes at a time. A row is 8 vectors, at vector ^ row % 8.
  float bias_of[kMmaN][2];
#pragma unroll
  for (int j = 0; j < kMmaN; ++j) {
    const int k = n0 + warp_n + j * 8 + lane % 4 * 2;
    const bool present = bias && k < K;
    bias_of[j][0] = present ? Numeric<T>::widen(bias[k]) : 0.0f;
    bias_of[j][1] = present ? Numeric<T>::widen(bias[k + 1]) : 0.0f;
  }
  __syncthreads();  // everybody is done with the stages
  T* results = reinterpret_cast<T*>(&tile_a[0][0]);
#pragma unroll
  for (int i = 0; i < kMmaM; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < kMmaN; ++j) {
        const int row = warp_m + i * 16 + half * 8 + lane / 4, result_vector = (warp_n / 8 + j) ^ row % kResultVectors;
        store_pair(results + (row * kResultVectors + result_vector) * kVector + lane % 4 * 2,
                   sum[i][j][half * 2] + bias_of[j][0], sum[i][j][half * 2 + 1] + bias_of[j][1]);
      }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kTileM * kResultVectors / kThreads; ++i) {
    const int row = t / kResultVectors + i * (kThreads / kResultVectors), from = t % kResultVectors;
    const int k = n0 + from * kVector;
    if (m0 + row >= pixels || k >= K) continue;
    int64_t n;
    int out_row, out_column;
    pixel.at(row, n, out_row, out_column);
    *reinterpret_cast<Vector*>(y + n * p.y_n + out_row * p.y_h + out_column * p.y_w + k) =
        reinterpret_cast<const Vector*>(results)[row * kResultVectors + (from ^ row % kResultVectors)];
  }
}

template <class T>
const char* launch_implicit_gemm(const void* params, const Launch& run) {
  const auto& p = *static_cast<const Conv2dParams*>(params);
  const int64_t row_tiles = (p.N * p.P * p.Q + kTileM - 1) / kTileM, column_tiles = (p.K + kTileN - 1) / kTileN;
  if (row_tiles * column_tiles == 0) return nullptr;
  return launch<implicit_gemm<T>>(dim3(static_cast<unsigned>(row_tiles * column_tiles), 1, 1), dim3(kThreads, 1, 1), 0,
                                  run.stream, p, static_cast<int>(column_tiles), static_cast<const T*>(run.operands[0]),
                                  static_cast<const T*>(run.operands[1]), static_cast<const T*>(run.operands[2]),
                                  static_cast<T*>(run.operands[3]));
}

}  // namespace

CNNFAST_KERNEL("conv2d_implicit_gemm.fprop.bf16", Conv2dParams, launch_implicit_gemm<__nv_bfloat16>, nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.fprop.f16", Conv2dParams, launch_implicit_gemm<__half>, nullptr)

}  // namespace cnnfast::cuda
