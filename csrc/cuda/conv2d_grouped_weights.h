// What the weight gradients over patches share: the positions of dy beside the patch of x, and the sum over the parts
// that blocks have computed.
#pragma once
#include "conv2d_grouped.h"
#include "primitives/launch.h"

namespace cnnfast::cuda::grouped {

constexpr int kAddThreads = 256;
constexpr int64_t kTilesAPart = 8;  // at least
constexpr int64_t kBlocksWanted = 528;

inline int64_t elements_of(const Conv2dParams& p) { return p.K * p.R * p.S * (p.C / p.G); }

// How many parts, of so many chunks each, the tiles are cut into.
inline int parts_of(const Tiling& t) {
  if (t.tiles() == 0 || t.chunks == 0) return 0;
  return static_cast<int>(
      std::max<int64_t>(1, std::min(ceil_div(t.tiles(), kTilesAPart), ceil_div(kBlocksWanted, t.chunks))));
}

// Stages the tile's positions of dy; zeros where there is none.
template <class T>
__device__ __forceinline__ void stage_positions(Vector* to, const T* __restrict__ y, const TilePlace& at,
                                                const int* positions, int P, int Q, int channel0, int channels) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T)), kAtOnce = kThreads / kSlices;
  const int slice = static_cast<int>(threadIdx.x) % kSlices, channel = channel0 + slice * kVector;
#pragma unroll
  for (int i = 0; i < kRows / kAtOnce; ++i) {
    const int m = static_cast<int>(threadIdx.x) / kSlices + i * kAtOnce, position = positions[m];
    const int row = at.row + position / 256, column = at.column + position % 256;
    const bool valid = position >= 0 && row < P && column < Q && channel < channels;
    copy_async_16(to + place(m, slice), y + ((int64_t{at.n} * P + row) * Q + column) * channels + channel, valid);
  }
}

// dw = the sum over parts, in order.
template <class T>
__global__ void __launch_bounds__(kAddThreads) add_parts(const Conv2dParams p, const float* __restrict__ partial,
                                                         T* __restrict__ w, const int parts, const int64_t elements) {
  const int channels = static_cast<int>(p.C / p.G), S = static_cast<int>(p.S), taps = static_cast<int>(p.R) * S;
  for (int64_t i = int64_t{blockIdx.x} * kAddThreads + threadIdx.x; i < elements;
       i += int64_t{gridDim.x} * kAddThreads) {
    float sum = 0.0f;
    for (int part = 0; part < parts; ++part) sum += partial[part * elements + i];
    const int64_t row = i / channels;
    const int c = static_cast<int>(i - row * channels), tap = static_cast<int>(row % taps);
    w[row / taps * p.w_k + c * p.w_c + tap / S * p.w_r + tap % S * p.w_s] = Numeric<T>::narrow(sum);
  }
}

}  // namespace cnnfast::cuda::grouped
