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
#include "batch_norm.h"

namespace cnnfast::cuda::batch_norm {
namespace {

constexpr int kRowsAtOnce = 5;  // more need more registers than three blocks at once leave

template <int n>
struct Count {
  static constexpr int value = n;
};

// Of sets of `count` numbers, one a channel; m2: the sum of their squared distances from the mean.
template <int width>
struct Moments {
  double count = 0, mean[width] = {}, m2[width] = {};

  // Takes in another set; weight: its share of all.
  __device__ __forceinline__ void join(int e, double other_mean, double other_m2, double weight) {
    const double distance = other_mean - mean[e];
    // an infinity stays one, of either sign; together they are NaN
    mean[e] = distance - distance == 0 ? mean[e] + distance * weight : mean[e] + other_mean;
    m2[e] += other_m2 + distance * distance * (count * weight);
  }
};

// Whether numbers are finite whose squares were not.
__device__ __forceinline__ bool overflown(const Moments<1>& all) {
  return all.m2[0] - all.m2[0] != 0 && all.mean[0] - all.mean[0] == 0;
}

// What a channel's means are told from: for f64, which has nothing wider to hold a mean far from zero, its first value.
template <class T>
__device__ __forceinline__ double base_of(const T* first) {
  if constexpr (sizeof(T) == sizeof(double))
    return *first - *first == 0 ? *first : 0;  // neither NaN nor infinite
  else
    return 0;
}

// Takes in `count` pixels, `step` elements apart. Distances are from the first of them: what cancels is three bits at
// most, and nothing where all are equal.
template <int count, class T, int width>
__device__ __forceinline__ void join_pixels(Moments<width>& moments, const Pack<T, width> (&values)[count],
                                            const double (&bases)[width]) {
  using Acc = Accumulator<T>;
  const double total = moments.count + count, weight = count / total;
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
    moments.join(e, static_cast<double>(origin) - bases[e] + static_cast<double>(mean), squares - sum * mean, weight);
  }
  moments.count = total;
}

// partial: [chunk][mean, m2][C].
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

// Joins the chunks of 8 channels, a thread every 32nd chunk of one channel.
template <class T, class Acc>
__global__ void __launch_bounds__(kThreads, 3)
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
