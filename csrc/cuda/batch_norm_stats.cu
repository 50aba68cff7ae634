// Batch norm's statistics, in f32, f64, bf16 and f16, in one pass over memory:
//
//   stats   m[c] = mean of x, v[c] = 1 / sqrt(mean of (x - m)^2 + eps), s[c] = sum of (x - m)^2 / (count - 1)
//
// A thread takes 5 pixels at a time: their mean and the sum of their squared distances from it, which it joins with
// what it has by Chan's formula. Threads, then chunks of pixels are joined likewise, in an order that only the sizes
// decide. Distances are taken from one of the 5 values, so that a constant channel has exactly its value as mean and no
// variance, and a mean far from zero costs no accuracy. Where squares are beyond float's range the second kernel, which
// knows the mean, sums them again in double.
//
// Mapping: a block is 32 packs of channels at most by the pixels that 256 threads have room for, over a chunk of pixels
// (pixels.h); a second kernel joins the chunks. Layout: NHWC, any pixel strides; where sizes, strides or addresses
// don't allow packs (of 16 bytes, of 8 for 16-bit types)
// a thread takes one channel. Accumulator: f32 for 5 pixels (f64 for f64), f64 beyond.
// Source: Chan, Golub, LeVeque, Algorithms for Computing the Sample Variance (1983).
#include "batch_norm_stats.h"

namespace cnnfast::cuda::batch_norm {
namespace {

constexpr int kRowsAtOnce = 5;  // more need more registers than three blocks at once leave

template <int n>
struct Count {
  static constexpr int value = n;
};

template <class T, int width>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 3)
    sum_up(const Pixels pixels, const Strides strides, const Shares shares, const int64_t packs,
           const T* __restrict__ x, double* __restrict__ partial) {
  CNNFAST_SHARED(double, counts, [kThreads]);
  CNNFAST_SHARED(double, means, [width][kThreads]);
  CNNFAST_SHARED(double, squares, [width][kThreads]);
  const int self = threadIdx.x;
  for (int64_t i = blockIdx.x; i < shares.count(); i += gridDim.x) {
    const Share share(shares, i, self, packs, pixels.count);
    Moments<width> moments;
    if (share.present) {
      double bases[width];
#pragma unroll
      for (int e = 0; e < width; ++e) bases[e] = base_of(x + share.pack * width + e);
      int pixel = share.first;
      const auto take = [&](auto count) {
        constexpr int pixels_at_once = decltype(count)::value;
        Pack<T, width> values[pixels_at_once];
#pragma unroll
        for (int j = 0; j < pixels_at_once; ++j, pixel += shares.rows)
          values[j] = load<T, width>(x + pixels.offset(strides, pixel) + share.pack * width);
        join_pixels(moments, values, bases);
      };
      while (pixel + (kRowsAtOnce - 1) * shares.rows < share.end) take(Count<kRowsAtOnce>{});
      if (pixel + 3 * shares.rows < share.end) take(Count<4>{});
      if (pixel + shares.rows < share.end) take(Count<2>{});
      if (pixel < share.end) take(Count<1>{});
    }

    counts[self] = moments.count;
#pragma unroll
    for (int e = 0; e < width; ++e) means[e][self] = moments.mean[e], squares[e][self] = moments.m2[e];
    join_rows(shares.rows, shares.lanes, share.row, [&](int other) {
      const double count = counts[other], total = moments.count + count;
      if (count == 0) return;
#pragma unroll
      for (int e = 0; e < width; ++e) {
        moments.join(e, means[e][other], squares[e][other], count / total);
        means[e][self] = moments.mean[e], squares[e][self] = moments.m2[e];
      }
      counts[self] = moments.count = total;
    });
    if (share.present && share.row == 0) {
      double* to = partial + share.chunk * 2 * packs * width + share.pack * width;
#pragma unroll
      for (int e = 0; e < width; ++e) to[e] = moments.mean[e], to[packs * width + e] = moments.m2[e];
    }
  }
}

template <class T, int width>
const char* launch_of(const BatchNormParams& p, const Call<T>& call, const Launch& run) {
  using Acc = Accumulator<T>;
  const int64_t packs = p.C / width;
  const Shares shares = sum_shares(call.pixels.count, packs, kRowsAtOnce);
  double* partial = static_cast<double*>(run.workspace);
  const char* error = nullptr;
  if (shares.count() > 0)
    error = launch<sum_up<T, width>>(grid_for(shares.count()), dim3(kThreads, 1, 1), 0, run.stream, call.pixels,
                                     call.sx, shares, packs, call.x, partial);
  if (error) return error;
  return launch<finish<T, Acc>>(grid_for(ceil_div(p.C, kFinishChannels)), dim3(kThreads, 1, 1), 0, run.stream, p.C,
                                call.pixels, call.sx, shares.chunks, shares.length, eps_of(p), call.x, partial,
                                static_cast<Acc*>(run.operands[kM]), static_cast<Acc*>(run.operands[kV]),
                                static_cast<Acc*>(run.operands[kS]));
}

template <class T>
const char* launch_stats(const void* params, const Launch& run) {
  const auto& p = *static_cast<const BatchNormParams*>(params);
  const Call<T> call(p, run);
  return call.packed(kSumWidth<T>) ? launch_of<T, kSumWidth<T>>(p, call, run) : launch_of<T, 1>(p, call, run);
}

template <class T>
int64_t workspace(const void* params) {
  return sums_workspace<T>(*static_cast<const BatchNormParams*>(params), kRowsAtOnce);
}

}  // namespace

CNNFAST_KERNEL("batch_norm.stats.f32", BatchNormParams, launch_stats<float>, workspace<float>)
CNNFAST_KERNEL("batch_norm.stats.f64", BatchNormParams, launch_stats<double>, workspace<double>)
CNNFAST_KERNEL("batch_norm.stats.bf16", BatchNormParams, launch_stats<__nv_bfloat16>, workspace<__nv_bfloat16>)
CNNFAST_KERNEL("batch_norm.stats.f16", BatchNormParams, launch_stats<__half>, workspace<__half>)

}  // namespace cnnfast::cuda::batch_norm
