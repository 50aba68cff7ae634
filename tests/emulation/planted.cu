// Small kernels, modelled on the real ones, with a bug to plant: bug 0 is none. tests/test_emulation_planted.py runs
// each bug in every scheduling mode and in the check variant, and expects it to be found. (Those about convolutions and
// products; the others are in planted_maps.cu.)
#include "../../csrc/cuda/primitives/async_copy.h"
#include "../../csrc/cuda/primitives/launch.h"
#include "../../csrc/cuda/primitives/matrix.h"
#include "../../csrc/cuda/primitives/numeric.h"
#include "planted.h"

namespace cnnfast::test {

// ---- y[h,w,k] = sum x[h+r-1, w+s-1, c] w[k,r,s,c]: 3x3, padding 1, NHWC f32; a block computes 8x8 pixels of one
// filter.
constexpr int kTile = 8, kHalo = kTile + 2, kChannels = 4;

__global__ void direct(const int bug, const float* x, const float* w, float* y, int H, int W, int C, int K) {
  CNNFAST_SHARED(float, xs, [kHalo][kHalo][kChannels]);
  CNNFAST_SHARED(float, ws, [9][kChannels]);
  const int t = threadIdx.x, k = blockIdx.y;
  const int tiles_w = (W + kTile - 1) / kTile;
  const int h0 = blockIdx.x / tiles_w * kTile, w0 = blockIdx.x % tiles_w * kTile;
  float sum = 0;
  for (int c0 = 0; c0 < C; c0 += kChannels) {
    for (int i = t; i < kHalo * kHalo * kChannels; i += kTile * kTile) {
      const int c = i % kChannels, s = i / kChannels % kHalo, r = i / kChannels / kHalo;
      const int ih = h0 + r - 1, iw = w0 + s - 1;
      if (bug == kHaloNotStaged && (ih < 0 || iw < 0)) continue;
      const bool below = bug == kHaloOffByOne ? ih <= H : ih < H;
      const bool right = bug == kColumnMaskOfRows ? iw < H : iw < W;
      const bool channel = bug == kChannelTailRead || c0 + c < C;
      xs[r][s][c] = ih >= 0 && below && iw >= 0 && right && channel ? x[(ih * W + iw) * C + c0 + c] : 0.0f;
    }
    for (int i = t; i < 9 * kChannels; i += kTile * kTile)
      ws[i / kChannels][i % kChannels] =
          c0 + i % kChannels < C ? w[(k * 9 + i / kChannels) * C + c0 + i % kChannels] : 0.0f;
    if (bug == kSurplusBarrier && t < kTile) __syncthreads();
    if (bug != kNoBarrierBeforeUse) __syncthreads();
    const int wide = bug == kTapTooFar ? kTile + 1 : kTile;
    for (int tap = 0; tap < 9; ++tap)
      for (int c = 0; c < kChannels; ++c) sum += xs[t / kTile + tap / 3][t % wide + tap % 3][c] * ws[tap][c];
    if (bug != kNoBarrierBeforeRestaging) __syncthreads();
  }
  int oh = h0 + t / kTile;
  const int ow = w0 + t % kTile;
  if (bug == kTwoOwners && oh >= H) oh = H - 1;
  if (bug == kNoTailMask ? ow < W : oh < H && ow < W) y[(oh * W + ow) * K + k] = sum;
}

// ---- d[m,n] = sum_j a[m,j] b[n,j]: bf16, 64x64 a block of 4 warps, steps of 32, three stages.
constexpr int kGemmTile = 64, kGemmThreads = 128, kStages = 3, kRowVectors = 4;

struct Vector {
  uint4 bits;
};

__device__ __forceinline__ int swizzled(int row, int vector) {
  return row * kRowVectors + (vector ^ (row / 2 % kRowVectors));
}

__global__ void gemm(const int bug, const __nv_bfloat16* a, const __nv_bfloat16* b, float* d, int M, int N, int depth) {
  using namespace cuda;
  CNNFAST_SHARED(Vector, tile_a, [kStages][kGemmTile * kRowVectors]);
  CNNFAST_SHARED(Vector, tile_b, [kStages][kGemmTile * kRowVectors]);
  const int t = threadIdx.x, lane = t % 32, warp_m = t / 32 * 16;
  const int m0 = blockIdx.x * kGemmTile, n0 = blockIdx.y * kGemmTile, steps = depth / 32;
  auto load = [&](int step) {
    const int stage = step % (bug == kTwoStages ? kStages - 1 : kStages), vector = t % kRowVectors;
    if (step >= steps) step = 0;
    for (int row = t / kRowVectors; row < kGemmTile; row += kGemmThreads / kRowVectors) {
      const bool valid_a = bug == kRowTailRead || m0 + row < M, valid_b = n0 + row < N;
      const __nv_bfloat16* from = valid_a ? a + (m0 + row) * depth + step * 32 + vector * 8 : a;
      copy_async_16(&tile_a[stage][swizzled(row, vector)], bug == kMisalignedCopy ? from + 1 : from, valid_a);
      copy_async_16(&tile_b[stage][swizzled(row, vector)],
                    valid_b ? b + (n0 + row) * depth + step * 32 + vector * 8 : b, valid_b);
    }
  };
  float sum[8][4] = {};
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load(step);
    if (bug != kNeverCommitted) copy_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    const int ahead = step + kStages - 1;
    if (bug == kRefillBeforeBarrier && ahead < steps) load(ahead);
    if (bug == kWaitTooLittle)
      copy_async_wait<kStages - 1>();
    else if (bug != kNeverWaited)
      copy_async_wait<kStages - 2>();
    if (bug != kNoBarrierAfterWait) __syncthreads();
    if (bug != kRefillBeforeBarrier && (ahead < steps || bug == kCopiesLeft)) load(ahead);
    if (bug != kNeverCommitted && (bug != kCommitForgottenAtEnd || ahead < steps)) copy_async_commit();
    const int stage = (bug == kStaleStage && step ? step - 1 : step) % (bug == kTwoStages ? kStages - 1 : kStages);
    for (int k = 0; k < 2; ++k) {
      uint32_t fa[4], fb[4];
      const int row = warp_m + (bug == kWrongRow ? lane / 2 : lane % 16), vector = k * 2 + lane / 16;
      const Vector* from =
          &tile_a[stage][bug == kSwizzleForgotten ? row * kRowVectors + vector : swizzled(row, vector)];
      if (bug == kTransposed)
        ldmatrix_x4_transposed(fa, from);
      else
        ldmatrix_x4(fa, from);
      if (bug == kRegistersSwapped) {
        const uint32_t second = fa[1];
        fa[1] = fa[2], fa[2] = second;
      }
      for (int j = 0; j < 8; j += 2) {
        if (bug == kPartialMma && m0 + warp_m + lane / 4 >= M) continue;
        ldmatrix_x4(fb, &tile_b[stage][swizzled(j * 8 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2)]);
        const uint32_t first[2] = {fb[0], fb[1]}, second[2] = {fb[2], fb[3]}, crossed[2] = {fb[1], fb[0]};
        mma_m16n8k16_bf16(sum[j], fa, bug == kFragmentsSwapped ? second : bug == kDepthSwapped ? crossed : first);
        mma_m16n8k16_bf16(sum[j + 1], fa, bug == kFragmentsSwapped ? first : second);
      }
    }
  }
  for (int j = 0; j < 8; ++j)
    for (int e = 0; e < 4; ++e) {
      const int m = m0 + warp_m + (bug == kResultRow ? lane / 4 * 2 + e / 2 : lane / 4 + e / 2 * 8);
      const int n = n0 + j * 8 + lane % 4 * 2 + e % 2;
      if (m < M && (n < N || bug == kColumnTailWritten)) d[m * N + n] = sum[j][e];
    }
}

void run_products(const std::string& kernel, int bug, const Arguments& arguments) {
  const auto [in0, in1, out, s] = arguments;
  const auto f0 = static_cast<const float*>(in0), f1 = static_cast<const float*>(in1);
  const auto h0 = static_cast<const __nv_bfloat16*>(in0), h1 = static_cast<const __nv_bfloat16*>(in1);
  const auto y = static_cast<float*>(out);
  const auto tiles = [](int size, int tile) { return static_cast<unsigned>((size + tile - 1) / tile); };
  if (kernel == "direct")  // H, W, C, K
    cuda::launch<direct>(dim3(tiles(s[0], kTile) * tiles(s[1], kTile), s[3], 1), dim3(kTile * kTile, 1, 1), 0, nullptr,
                         bug, f0, f1, y, s[0], s[1], s[2], s[3]);
  else  // M, N, depth
    cuda::launch<gemm>(dim3(tiles(s[0], kGemmTile), tiles(s[1], kGemmTile), 1), dim3(kGemmThreads, 1, 1), 0, nullptr,
                       bug, h0, h1, y, s[0], s[1], s[2]);
}

}  // namespace cnnfast::test

#define CNNFAST_NAME(constant, name, kernel) name " " kernel "\n"

// A line for each bug, by number: its name and the kernel that it is planted in.
CNNFAST_TEST_API const char* bug_names() { return "none -\n" CNNFAST_BUGS(CNNFAST_NAME); }

CNNFAST_TEST_API const char* run_planted(const char* kernel, int bug, const void* in0, const void* in1, void* out,
                                         int s0, int s1, int s2, int s3) {
  using namespace cnnfast::test;
  return message_of([&] {
    const Arguments arguments{in0, in1, out, {s0, s1, s2, s3}};
    const std::string name = kernel;
    name == "direct" || name == "gemm" ? run_products(name, bug, arguments) : run_maps(name, bug, arguments);
  });
}
