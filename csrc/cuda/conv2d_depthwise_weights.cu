// Depthwise 2-D convolution, the gradient of its weights; every configuration, in f32, f64, bf16 and f16.
//
//   wgrad  dw[c,r,s] = sum_{n,p,q} dy[n,p,q,c] x[n, h, w, c]     h = p*stride - pad + r*dilation, w likewise
//
// Mapping: a thread takes up to four neighbouring channels and a window of 3 x 3 taps, whose sums it keeps while it
// walks over pixels of dy; a block is 32 such packs at most by the pixels that 256 threads have room for, over a chunk
// of pixels (pixels.h). Larger filters are several windows, which neighbouring blocks take, so that they find their
// operands in the cache. The threads' sums are added in shared memory, the chunks' by a second kernel, in an order that
// the sizes decide; no atomics. Layout: activations NHWC, any pixel strides; where sizes, strides or addresses don't
// allow packs a thread takes one channel. Accumulator: f32 (f64 for f64) for a thread and a block, f64 for the chunks,
// one rounding at the end. Memory offsets are 64-bit.
#include "../common/kernel_table.h"
#include "pixels.h"
#include "primitives/cuda.h"
#include "primitives/launch.h"
#include "primitives/numeric.h"

namespace cnnfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWindow = 3;           // taps of a thread, each way
constexpr int kFinishChannels = 8;   // of a block that adds the chunks up; its other threads share the chunks
constexpr int64_t kBlocks = 1024;    // about so many where there is enough to do
constexpr int64_t kLeastPixels = 4;  // of a thread

template <class T>
constexpr int kWidth = sizeof(T) == 8 ? 1 : 4;

// Windows of taps, and shares of pixels for each.
struct Tiling {
  int across, windows;
  Shares shares;

  Tiling(const Conv2dParams& p, int width)
      : across(static_cast<int>(ceil_div(p.S, kWindow))),
        windows(static_cast<int>(ceil_div(p.R, kWindow)) * across),
        shares(p.N * p.P * p.Q, p.C / width, kThreads, kLeastPixels, INT64_MAX / kThreads,
               std::max<int64_t>(kBlocks / windows, 64)) {}
};

// partial: [chunk][tap][C].
template <class T, int width>
__global__ void __launch_bounds__(kThreads, 2)
    sum_up(const Conv2dParams p, const Tiling tiling, const int64_t packs, const int count, const T* __restrict__ x,
           const T* __restrict__ y, Accumulator<T>* __restrict__ partial) {
  using Acc = Accumulator<T>;
  CNNFAST_SHARED(Acc, shared, [kWindow * kWindow][width][kThreads]);
  const int self = threadIdx.x, P = static_cast<int>(p.P), Q = static_cast<int>(p.Q);
  const int H = static_cast<int>(p.H), W = static_cast<int>(p.W);
  const int dilation_h = static_cast<int>(p.dilation_h), dilation_w = static_cast<int>(p.dilation_w);
  const Shares& shares = tiling.shares;
  for (int64_t item = blockIdx.x; item < shares.count() * tiling.windows; item += gridDim.x) {
    const int window = static_cast<int>(item % tiling.windows);
    const int r0 = window / tiling.across * kWindow, s0 = window % tiling.across * kWindow;
    const Share share(shares, item / tiling.windows, self, packs, count);
    Acc sums[kWindow][kWindow][width] = {};
    for (int pixel = share.first; share.present && pixel < share.end; pixel += shares.rows) {
      const int line = pixel / Q, q = pixel - line * Q, n = line / P, row = line - n * P;
      const auto gradient = load<T, width>(y + n * p.y_n + row * p.y_h + q * p.y_w + share.pack * width);
      const T* image = x + n * p.x_n + share.pack * width;
      const int h0 = row * static_cast<int>(p.stride_h) - static_cast<int>(p.pad_h) + r0 * dilation_h;
      const int w0 = q * static_cast<int>(p.stride_w) - static_cast<int>(p.pad_w) + s0 * dilation_w;
#pragma unroll
      for (int r = 0; r < kWindow; ++r) {
        const int h = h0 + r * dilation_h;
        if (r0 + r >= p.R || static_cast<unsigned>(h) >= static_cast<unsigned>(H)) continue;
        const T* from = image + h * p.x_h;
#pragma unroll
        for (int s = 0; s < kWindow; ++s) {
          const int w = w0 + s * dilation_w;
          if (s0 + s >= p.S || static_cast<unsigned>(w) >= static_cast<unsigned>(W)) continue;
          const auto value = load<T, width>(from + w * p.x_w);
#pragma unroll
          for (int e = 0; e < width; ++e)
            sums[r][s][e] += Numeric<T>::widen(gradient.v[e]) * Numeric<T>::widen(value.v[e]);
        }
      }
    }

#pragma unroll
    for (int tap = 0; tap < kWindow * kWindow; ++tap)
#pragma unroll
      for (int e = 0; e < width; ++e) shared[tap][e][self] = sums[tap / kWindow][tap % kWindow][e];
    join_rows(shares.rows, shares.lanes, share.row, [&](int other) {
      for (int tap = 0; tap < kWindow * kWindow; ++tap)
#pragma unroll
        for (int e = 0; e < width; ++e) shared[tap][e][self] += shared[tap][e][other];
    });
    if (share.present && share.row == 0)
      for (int tap = 0; tap < kWindow * kWindow; ++tap) {
        const int r = r0 + tap / kWindow, s = s0 + tap % kWindow;
        if (r >= p.R || s >= p.S) continue;
        Acc* to = partial + ((share.chunk * p.R + r) * p.S + s) * p.C + share.pack * width;
#pragma unroll
        for (int e = 0; e < width; ++e) to[e] = shared[tap][e][self];
      }
  }
}

// Adds the chunks of 8 channels of a tap up, a thread every 32nd chunk of one channel.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    finish(const Conv2dParams p, const int64_t chunks, const Accumulator<T>* __restrict__ partial, T* __restrict__ w) {
  constexpr int slices = kThreads / kFinishChannels;
  CNNFAST_SHARED(double, sums, [kThreads]);
  const int self = threadIdx.x, slice = self / kFinishChannels;
  const int64_t tiles = ceil_div(p.C, kFinishChannels), taps = p.R * p.S;
  for (int64_t item = blockIdx.x; item < taps * tiles; item += gridDim.x) {
    const int64_t tap = item / tiles, c = item % tiles * kFinishChannels + self % kFinishChannels;
    double sum = 0;
    if (c < p.C) {
#pragma unroll 4
      for (int64_t chunk = slice; chunk < chunks; chunk += slices) sum += partial[(chunk * taps + tap) * p.C + c];
    }
    sums[self] = sum;
    join_rows(slices, kFinishChannels, slice, [&](int other) { sums[self] = sum += sums[other]; });
    if (slice == 0 && c < p.C)
      w[c * p.w_k + tap / p.S * p.w_r + tap % p.S * p.w_s] = Numeric<T>::narrow(static_cast<Accumulator<T>>(sum));
  }
}

template <class T, int width>
const char* launch_of(const Conv2dParams& p, const Launch& run) {
  const Tiling tiling(p, width);
  const int64_t blocks = tiling.shares.count() * tiling.windows;
  const auto partial = static_cast<Accumulator<T>*>(run.workspace);
  const char* error = nullptr;
  if (blocks > 0)
    error = launch<sum_up<T, width>>(grid_for(blocks), dim3(kThreads, 1, 1), 0, run.stream, p, tiling, p.C / width,
                                     static_cast<int>(p.N * p.P * p.Q), static_cast<const T*>(run.operands[0]),
                                     static_cast<const T*>(run.operands[3]), partial);
  if (error) return error;
  return launch<finish<T>>(grid_for(p.R * p.S * ceil_div(p.C, kFinishChannels)), dim3(kThreads, 1, 1), 0, run.stream, p,
                           tiling.shares.chunks, partial, static_cast<T*>(run.operands[1]));
}

template <class T>
const char* launch_wgrad(const void* params, const Launch& run) {
  const auto& p = *static_cast<const Conv2dParams*>(params);
  constexpr int width = kWidth<T>;
  const bool packed = p.C % width == 0 && takes_packs(run.operands[0], p.x_n | p.x_h | p.x_w, width, sizeof(T)) &&
                      takes_packs(run.operands[3], p.y_n | p.y_h | p.y_w, width, sizeof(T));
  return packed ? launch_of<T, width>(p, run) : launch_of<T, 1>(p, run);
}

// Whichever width it will be.
template <class T>
int64_t workspace(const void* params) {
  const auto& p = *static_cast<const Conv2dParams*>(params);
  const int64_t packed = p.C % kWidth<T> ? 0 : Tiling(p, kWidth<T>).shares.chunks;
  const int64_t chunks = std::max(packed, Tiling(p, 1).shares.chunks);
  return chunks * p.R * p.S * p.C * static_cast<int64_t>(sizeof(Accumulator<T>));
}

}  // namespace

CNNFAST_KERNEL("conv2d_depthwise.wgrad.f32", Conv2dParams, launch_wgrad<float>, workspace<float>)
CNNFAST_KERNEL("conv2d_depthwise.wgrad.f64", Conv2dParams, launch_wgrad<double>, workspace<double>)
CNNFAST_KERNEL("conv2d_depthwise.wgrad.bf16", Conv2dParams, launch_wgrad<__nv_bfloat16>, workspace<__nv_bfloat16>)
CNNFAST_KERNEL("conv2d_depthwise.wgrad.f16", Conv2dParams, launch_wgrad<__half>, workspace<__half>)

}  // namespace cnnfast::cuda
