// Planted bugs in reductions, maps and what moves memory (see planted.cu).
#include "../../csrc/cuda/primitives/launch.h"
#include "planted.h"

namespace cnnfast::test {

// ---- y[row] = sum_i x[row, i], then doubled by exchanging with the neighbour lane through shared memory.
constexpr int kReduceThreads = 128, kReduceWarps = kReduceThreads / 32;

__global__ void reduce(const int bug, const float* x, float* y, int length) {
  CNNFAST_SHARED(float, partial, [kReduceThreads]);
  CNNFAST_SHARED(float, exchange_of_its_own, [32]);
  float* exchange = bug == kBufferReused ? partial : exchange_of_its_own;
  const int t = threadIdx.x;
  if (bug == kEarlyReturn && t >= length) return;
  float sum = 0;
  for (int i = t; i < length; i += kReduceThreads) sum += x[blockIdx.x * length + i];
  const unsigned mask = bug == kShuffleMask ? 0xffffu : ~0u;
  if (bug != kPartialShuffle || t < length)
    for (int lanes = bug == kHalfWarpReduced ? 8 : 16; lanes; lanes /= 2)
      sum += __shfl_xor_sync(mask, sum, lanes, bug == kShuffleWidth ? 16 : 32);
  if (t % 32 == 0) partial[bug == kOnePartial ? 0 : t / 32] = sum;
  if (bug != kNoBarrierBeforeReduction) __syncthreads();
  if (t >= 32) return;
  float total = 0;
  for (int i = 0; i < kReduceWarps + (bug == kOnePartialMore); ++i) total += partial[i];
  exchange[t] = total;
  if (bug != kNoSyncwarp) __syncwarp();
  total += exchange[t ^ 1];
  if (t == 0) y[blockIdx.x] = total;
}

// ---- y[block, v] = how often v in 0 ... 15 occurs in the block's part of x: threads own the values.
constexpr int kBins = 16, kPart = 100, kHistogramThreads = 32;

__global__ void histogram(const int bug, const int* x, float* y, int length) {
  CNNFAST_SHARED(float, bins, [kBins]);
  const int t = threadIdx.x, begin = blockIdx.x * kPart, end = begin + kPart < length ? begin + kPart : length;
  if (bug != kBinsNotCleared && t < kBins) bins[t] = 0;
  __syncthreads();
  if (bug == kAccumulatesInShared) {
    for (int i = begin + t; i < end; i += kHistogramThreads) bins[x[i]] += 1;
  } else if (t < kBins) {
    for (int i = begin; i < end; ++i) bins[t] += x[i] == t ? 1.0f : 0.0f;
  }
  __syncthreads();
  if (t >= kBins) return;
  if (bug == kAccumulatesInGlobal) {
    if (blockIdx.x == 0) y[blockIdx.y * kBins + t] = 0;
    y[t] += bins[t];
  }
  y[blockIdx.x * kBins + t] = bins[t];
}

// ---- y[i] = x[i-1] + x[i] + x[i+1], zeros beyond the ends, four at a time; length a multiple of four.
constexpr int kBlurThreads = 32;

struct alignas(16) Four {
  float v[4];
};

__global__ void blur(const int bug, const float* x, float* y, int length) {
  const int threads = bug == kGridStride ? kBlurThreads : gridDim.x * kBlurThreads;
  for (int i = (blockIdx.x * kBlurThreads + threadIdx.x) * 4; i < length; i += threads * 4) {
    const Four here = *reinterpret_cast<const Four*>(x + i + (bug == kMisalignedVector && i + 4 < length));
    const float before = i > 0 ? x[i - 1] : 0.0f;
    float after = i + 4 < length || bug == kVectorTail ? x[i + 4] : 0.0f;
    if (bug == kReadsItsResult && i > 0) after += y[i - 1] * 0.0f;
    Four out;
    for (int e = 0; e < 4; ++e) out.v[e] = (e ? here.v[e - 1] : before) + here.v[e] + (e < 3 ? here.v[e + 1] : after);
    *reinterpret_cast<Four*>(y + i) = out;
    if (bug == kGridTooSmall) break;
  }
}

// ---- y[i, j] = x[first + i, j]: some rows of a matrix too large for 32 bits; x points to the row `first`.
__global__ void rows(const int bug, const float* x, float* y, int first, int width, int count) {
  const int j = blockIdx.x * blockDim.x + threadIdx.x;
  if (j >= width) return;
  for (int i = 0; i < count; ++i) {
    const int64_t row = static_cast<int64_t>(first + i) * width - static_cast<int64_t>(first) * width;
    const int64_t wrapped = bug == kOffsetOverflow ? (first + i) * width - first * width : row;
    const int64_t mask = bug == kShiftTooFar ? (1 << (31 + i)) - 1 : -1;
    y[i * width + j] = x[(wrapped & mask) + j];
  }
}

// ---- y[j, i] = x[i, j]: tiles of 32x32 in dynamic shared memory, two one after the other.
constexpr int kTile = 32, kPitch = kTile + 1, kTileRows = 4;

__global__ void transpose(const int bug, const float* x, float* y, int height, int width) {
  CNNFAST_DYNAMIC_SHARED(float, tile);
  CNNFAST_SHARED(float, beside, [4]);
  if (bug == kTooMuchShared) {
    CNNFAST_SHARED(float, much, [58 * 1024]);
    much[threadIdx.x] = 0;
  }
  const int column = threadIdx.x % kTile, first = threadIdx.x / kTile;
  const int pitch = bug == kWrongPitch ? kTile - 1 : kPitch;
  if (threadIdx.x < 4) beside[threadIdx.x] = 0;
  for (int half = 0; half < 2; ++half) {
    const int i0 = blockIdx.x * kTile, j0 = (blockIdx.y * 2 + half) * kTile;
    for (int r = first; r < kTile; r += kTileRows)
      if (i0 + r < height && j0 + column < width) tile[r * pitch + column] = x[(i0 + r) * width + j0 + column];
    if (bug == kDivergentBarrier && first < 2)
      __syncthreads();
    else
      __syncthreads();
    for (int r = first; r < kTile; r += kTileRows)
      if (j0 + r < width && i0 + column < height) y[(j0 + r) * height + i0 + column] = tile[column * pitch + r];
    if (bug != kNoBarrierBetweenTiles) __syncthreads();
  }
  if (threadIdx.x == 0 && beside[0] != 0) y[0] = beside[0];
}

// ---- y[block, :]: the positive ones of 32 values, in order, then zeros.
__global__ void compact(const int bug, const float* x, float* y, int length) {
  const int lane = threadIdx.x, i = blockIdx.x * 32 + lane;
  const bool present = i < length;
  const float value = present ? x[i] : bug == kVoteOfTail ? 1.0f : 0.0f;
  const bool wanted = value > 0;
  unsigned votes = 0;
  if (bug != kVoteUnderCondition || present) votes = __ballot_sync(~0u, wanted);
  const unsigned before = votes & ((1u << lane) - 1), through = votes & ((2u << lane) - 1);
  const int place = __builtin_popcount(bug == kVoteIncludesSelf ? through : before);
  const int count = __builtin_popcount(votes);
  if (wanted) y[blockIdx.x * 32 + place] = value;
  if (lane >= count) y[blockIdx.x * 32 + lane] = 0.0f;
}

void run_maps(const std::string& kernel, int bug, const Arguments& arguments) {
  const auto [in0, in1, out, s] = arguments;
  const auto x = static_cast<const float*>(in0);
  const auto y = static_cast<float*>(out);
  const auto tiles = [](int size, int tile) { return static_cast<unsigned>((size + tile - 1) / tile); };
  const dim3 one_warp(32, 1, 1);
  if (kernel == "reduce") {  // rows, length
    cuda::launch<reduce>(dim3(s[0], 1, 1), dim3(kReduceThreads, 1, 1), 0, nullptr, bug, x, y, s[1]);
  } else if (kernel == "histogram") {  // length
    cuda::launch<histogram>(dim3(tiles(s[0], kPart), 1, 1), one_warp, 0, nullptr, bug, static_cast<const int*>(in0), y,
                            s[0]);
  } else if (kernel == "blur") {  // length
    const unsigned blocks = tiles(s[0], kBlurThreads * 4);
    cuda::launch<blur>(dim3(blocks - (bug == kGridTooSmall), 1, 1), one_warp, 0, nullptr, bug,
                       bug == kAliasedOutput ? y : x, y, s[0]);
  } else if (kernel == "rows") {  // first, width, count
    cuda::launch<rows>(dim3(tiles(s[1], 128), 1, 1), dim3(128, 1, 1), 0, nullptr, bug, x, y, s[0], s[1], s[2]);
  } else if (kernel == "transpose") {  // height, width
    const int pitch = bug == kDynamicTooSmall ? kTile : kPitch;
    cuda::launch<transpose>(dim3(tiles(s[0], kTile), tiles(s[1], 2 * kTile), 1), dim3(kTile * kTileRows, 1, 1),
                            kTile * pitch * sizeof(float), nullptr, bug, x, y, s[0], s[1]);
  } else if (kernel == "compact") {  // length
    cuda::launch<compact>(dim3(tiles(s[0], 32), 1, 1), one_warp, 0, nullptr, bug, x, y, s[0]);
  } else {
    throw std::runtime_error("no kernel " + kernel);
  }
}

}  // namespace cnnfast::test
