// What finds a tensor's statistics (batch_norm_stats.cu) and a convolution's result's (bn_act_conv_implicit_gemm.cu):
// means and sums of squared distances from them, taken from neighbouring pixels, joined by Chan's formula, and
// finished. Source: Chan, Golub, LeVeque, Algorithms for Computing the Sample Variance (1983).
#pragma once
#include "batch_norm.h"

namespace cnnfast::cuda::batch_norm {

// Of sets of `count` numbers, one a channel; m2: the sum of their squared distances from the mean.
template <int width, class Real = double>
struct Moments {
  Real count = 0, mean[width] = {}, m2[width] = {};

  // Takes in another set; weight: its share of all.
  __device__ __forceinline__ void join(int e, Real other_mean, Real other_m2, Real weight) {
    const Real distance = other_mean - mean[e];
    // an infinity stays one, of either sign; together they are NaN
    mean[e] = distance - distance == 0 ? mean[e] + distance * weight : mean[e] + other_mean;
    m2[e] += other_m2 + distance * distance * (count * weight);
  }
};

// Whether numbers are finite whose squares were not.
__device__ __forceinline__ bool overflown(const Moments<1>& all) {
  return all.m2[0] - all.m2[0] != 0 && all.mean[0] - all.mean[0] == 0;
}

// What a channel's means are told from in doubles: for f64, which has nothing wider to hold a mean far from zero, its
// first value.
template <class T>
__device__ __forceinline__ double base_of(const T* first) {
  if constexpr (sizeof(T) == sizeof(double))
    return *first - *first == 0 ? *first : 0;  // neither NaN nor infinite
  else
    return 0;
}

// Takes in `count` pixels, `step` elements apart. Distances are from the first of them: what cancels is three bits at
// most, and nothing where all are equal.
template <int count, class T, int width, class Real>
__device__ __forceinline__ void join_pixels(Moments<width, Real>& moments, const Pack<T, width> (&values)[count],
                                            const Real (&bases)[width]) {
  using Acc = Accumulator<T>;
  const Real total = moments.count + count, weight = count / total;
#pragma unroll
  for (int e = 0; e < width; ++e) {
    const Acc first = Numeric<T>::widen(values[0].v[e]);
    const Acc origin = first - first == 0 ? first : Acc(0);  // neither NaN nor infinite
    Acc sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const Acc distance = Numeric<T>::widen(values[i].v[e]) - origin;
      sum += distance;
      squares += distance * distance;
    }
    const Acc mean = sum / count;
    moments.join(e, static_cast<Real>(origin) - bases[e] + static_cast<Real>(mean), squares - sum * mean, weight);
  }
  moments.count = total;
}

// Joins the chunks of 8 channels, `length` pixels each but for the last, a thread every 32nd chunk of one channel.
// partial: [chunk][mean, m2][C].
template <class T, class Acc>
static __global__ void __launch_bounds__(kThreads, 3)
    finish(const int64_t C, const Pixels pixels, const Strides strides, const int64_t chunks, const int64_t length,
           const double eps, const T* __restrict__ x, const double* __restrict__ partial, Acc* __restrict__ mean,
           Acc* __restrict__ invstd, Acc* __restrict__ unbiased) {
  constexpr int slices = kThreads / kFinishChannels;
  CNNFAST_SHARED(Moments<1>, shared, [kThreads]);
  CNNFAST_SHARED(double, squares, [kThreads]);
  const int self = threadIdx.x, slice = self / kFinishChannels;
  for (int64_t tile = blockIdx.x; tile * kFinishChannels < C; tile += gridDim.x) {
    const int64_t c = tile * kFinishChannels + self % kFinishChannels;
    Moments<1> moments;
    const auto join = [&](double count, double mean, double m2) {
      if (count == 0) return;
      const double total = moments.count + count;
      moments.join(0, mean, m2, count / total);
      moments.count = total;
    };
    if (c < C) {
#pragma unroll 2
      for (int64_t chunk = slice; chunk < chunks; chunk += slices) {
        const int64_t left = pixels.count - chunk * length;
        const double* from = partial + chunk * 2 * C + c;
        join(static_cast<double>(left < length ? left : length), from[0], from[C]);
      }
    }
    shared[self] = moments;
    join_rows(slices, kFinishChannels, slice, [&](int other) {
      join(shared[other].count, shared[other].mean[0], shared[other].m2[0]);
      shared[self] = moments;
    });

    bool any = false;
    for (int i = 0; i < kFinishChannels; ++i) any = any || overflown(shared[i]);
    if (any) {  // the same for all threads
      const Moments<1>& all = shared[self % kFinishChannels];
      double sum = 0;
      if (c < C && overflown(all))
        for (int pixel = slice; pixel < pixels.count; pixel += slices) {
          const double value = Numeric<T>::widen(x[pixels.offset(strides, pixel) + c]);
          const double distance = value - base_of(x + c) - all.mean[0];
          sum += distance * distance;
        }
      squares[self] = sum;
      join_rows(slices, kFinishChannels, slice, [&](int other) { squares[self] = sum += squares[other]; });
      if (overflown(moments)) moments.m2[0] = sum;
    }

    if (slice == 0 && c < C) {
      const double m2 = moments.m2[0], var = moments.count > 0 ? m2 / moments.count : 0;
      mean[c] = static_cast<Acc>(moments.count > 0 ? base_of(x + c) + moments.mean[0] : 0);
      invstd[c] = static_cast<Acc>(1 / std::sqrt(var + eps));
      unbiased[c] = static_cast<Acc>(m2 / (moments.count > 1 ? moments.count - 1 : 1));
    }
    __syncthreads();  // the next tile overwrites what is shared
  }
}

}  // namespace cnnfast::cuda::batch_norm
