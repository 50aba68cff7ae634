// Averages over the windows of an image, and their gradient: what avg_pool2d and adaptive_avg_pool2d share.
//
//   fprop   y[n,p,q,c] = sum of x[n,h,w,c] over the elements h, w of window p, q, over its divisor
//   dgrad   x[n,h,w,c] = sum of y[n,p,q,c] over the windows p, q that cover h, w, each over its divisor
//
// Both gather: an element of the result has one owner, who adds its addends in their order. No atomics.
//
// Mapping: neighbouring threads take neighbouring channels, 16 bytes of them, a thread all addends of one pixel of the
// result (pixels.h). Where large windows leave too few pixels for that (the mean of an image) a block takes one pixel
// and 32 packs of channels at most; its threads share the window's elements, and their sums are added in order.
//
// Layout: NHWC, any pixel strides; where sizes, strides or addresses don't allow packs a thread takes one channel.
// Accumulator: f32 (f64 for f64), one rounding at the end. fprop divides once; dgrad multiplies each addend by its
// divisor's reciprocal, so that no sum is larger than in torch, which divides first. Memory offsets are 64-bit.
#pragma once
#include "../common/kernel_table.h"
#include "pixels.h"
#include "pool_windows.h"
#include "primitives/cuda.h"
#include "primitives/launch.h"
#include "primitives/numeric.h"

namespace cnnfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kAddendsAtOnce = 4;  // loads under way at a time
constexpr int64_t kBlocks = 4096;
constexpr int64_t kFewThreads = 1 << 16;  // with fewer, and windows of so many elements, blocks share windows
constexpr int64_t kLargeWindow = 32;

// One call, seen as a gather from `in` to `out`, whose pixels are `pixels`.
template <class T, class Axis>
struct Gather {
  Axis rows, columns;
  Pixels pixels;
  const T* in;
  T* out;
  Strides in_strides, out_strides;
};

template <bool gradient, class Axis>
__device__ __forceinline__ Span addends_of(const Axis& axis, int i) {
  if constexpr (gradient)
    return axis.windows(i, i + 1);
  else
    return axis.elements(i);
}

// A pixel of the result: its image, row and column, and what is added up for it.
template <bool gradient>
struct Place {
  int n, i, j;
  Span rows, columns;

  template <class T, class Axis>
  __device__ __forceinline__ Place(const Gather<T, Axis>& g, int pixel) {
    const int line = pixel / g.pixels.W;
    j = pixel - line * g.pixels.W;
    n = line / g.pixels.H;
    i = line - n * g.pixels.H;
    rows = addends_of<gradient>(g.rows, i);
    columns = addends_of<gradient>(g.columns, j);
  }
  template <class T, class Axis>
  __device__ __forceinline__ T* to(const Gather<T, Axis>& g) const {
    return g.out + n * g.out_strides.n + i * g.out_strides.h + j * g.out_strides.w;
  }
};

template <class T, int width, bool gradient, class Axis>
__global__ void __launch_bounds__(kThreads, 2)
    gather(const Gather<T, Axis> g, const Shares shares, const int64_t packs) {
  using Acc = Accumulator<T>;
  for (int64_t item = blockIdx.x; item < shares.count(); item += gridDim.x) {
    const Share share(shares, item, threadIdx.x, packs, g.pixels.count);
    if (!share.present) continue;
    for (int pixel = share.first; pixel < share.end; pixel += shares.rows) {
      const Place<gradient> place(g, pixel);
      const T* image = g.in + place.n * g.in_strides.n + share.pack * width;
      Acc sum[width] = {};
      for (unsigned h = place.rows.begin; h < place.rows.end; ++h) {
        const T* from = image + h * g.in_strides.h;
        for (unsigned w = place.columns.begin; w < place.columns.end; w += kAddendsAtOnce) {
          Pack<T, width> addends[kAddendsAtOnce];
#pragma unroll
          for (unsigned a = 0; a < kAddendsAtOnce; ++a)
            if (w + a < place.columns.end) addends[a] = load<T, width>(from + (w + a) * g.in_strides.w);
#pragma unroll
          for (unsigned a = 0; a < kAddendsAtOnce; ++a) {
            if (w + a >= place.columns.end) break;
            Acc weight = 1;
            if constexpr (gradient) weight /= static_cast<Acc>(int64_t{g.rows.divisor(h)} * g.columns.divisor(w + a));
#pragma unroll
            for (int e = 0; e < width; ++e) {
              const Acc addend = Numeric<T>::widen(addends[a].v[e]);
              sum[e] += gradient ? addend * weight : addend;
            }
          }
        }
      }
      Acc divisor = 1;
      if constexpr (!gradient)
        divisor = static_cast<Acc>(int64_t{g.rows.divisor(place.i)} * g.columns.divisor(place.j));
      Pack<T, width> result;
#pragma unroll
      for (int e = 0; e < width; ++e) result.v[e] = Numeric<T>::narrow(gradient ? sum[e] : sum[e] / divisor);
      pack_of<T, width>(place.to(g), share.pack) = result;
    }
  }
}

// fprop, a block for a pixel of the result and a tile of channels. Of `shares` only lanes, rows and tiles count.
template <class T, int width, class Axis>
__global__ void __launch_bounds__(kThreads, 2)
    share_windows(const Gather<T, Axis> g, const Shares shares, const int64_t packs) {
  using Acc = Accumulator<T>;
  CNNFAST_SHARED(Acc, sums, [width][kThreads]);
  const int self = threadIdx.x, row = self / shares.lanes, lane = self - row * shares.lanes;
  for (int64_t item = blockIdx.x; item < g.pixels.count * shares.tiles; item += gridDim.x) {
    const int pixel = static_cast<int>(item / shares.tiles);
    const int64_t pack = (item - pixel * shares.tiles) * shares.lanes + lane;
    const bool present = row < shares.rows && pack < packs;
    const Place<false> place(g, pixel);
    Acc sum[width] = {};
    if (present) {
      const int across = place.columns.size(), count = place.rows.size() * across;
      const T* image = g.in + place.n * g.in_strides.n + place.rows.begin * g.in_strides.h +
                       place.columns.begin * g.in_strides.w + pack * width;
      for (int first = row; first < count; first += 2 * kAddendsAtOnce * shares.rows) {
        Pack<T, width> addends[2 * kAddendsAtOnce];
#pragma unroll
        for (int a = 0; a < static_cast<int>(2 * kAddendsAtOnce); ++a) {
          const int at = first + a * shares.rows, h = at / across;
          if (at < count) addends[a] = load<T, width>(image + h * g.in_strides.h + (at - h * across) * g.in_strides.w);
        }
#pragma unroll
        for (int a = 0; a < static_cast<int>(2 * kAddendsAtOnce); ++a)
          if (first + a * shares.rows < count)
#pragma unroll
            for (int e = 0; e < width; ++e) sum[e] += Numeric<T>::widen(addends[a].v[e]);
      }
    }
#pragma unroll
    for (int e = 0; e < width; ++e) sums[e][self] = sum[e];
    join_rows(shares.rows, shares.lanes, row, [&](int other) {
#pragma unroll
      for (int e = 0; e < width; ++e) sums[e][self] = sum[e] += sums[e][other];
    });
    if (present && row == 0) {
      const auto divisor = static_cast<Acc>(int64_t{g.rows.divisor(place.i)} * g.columns.divisor(place.j));
      Pack<T, width> result;
#pragma unroll
      for (int e = 0; e < width; ++e) result.v[e] = Numeric<T>::narrow(sum[e] / divisor);
      pack_of<T, width>(place.to(g), pack) = result;
    }
  }
}

template <class T, int width, bool gradient, class Axis>
const char* launch_gather(const Gather<T, Axis>& g, int64_t channels, const Launch& run) {
  const int64_t packs = channels / width;
  const Shares shares(g.pixels.count, packs, kThreads, 1, 4, kBlocks);
  if (shares.count() == 0) return nullptr;
  if constexpr (!gradient) {
    const bool large = int64_t{g.rows.most_elements()} * g.columns.most_elements() >= kLargeWindow;
    if (large && g.pixels.count * packs < kFewThreads)
      return launch<share_windows<T, width, Axis>>(grid_for(g.pixels.count * shares.tiles), dim3(kThreads, 1, 1), 0,
                                                   run.stream, g, shares, packs);
  }
  return launch<gather<T, width, gradient, Axis>>(grid_for(shares.count()), dim3(kThreads, 1, 1), 0, run.stream, g,
                                                  shares, packs);
}

// The direction of an average pooling with parameters p over the given axes.
template <class T, bool gradient, class Params, class Axis>
const char* average(const Params& p, const Launch& run, const Axis& rows, const Axis& columns) {
  const Strides x{p.x_n, p.x_h, p.x_w}, y{p.y_n, p.y_h, p.y_w};
  const auto in = static_cast<const T*>(run.operands[gradient ? 1 : 0]);
  const auto out = static_cast<T*>(run.operands[gradient ? 0 : 1]);
  const Gather<T, Axis> g{rows,
                          columns,
                          Pixels(p.N, gradient ? p.H : p.P, gradient ? p.W : p.Q),
                          in,
                          out,
                          gradient ? y : x,
                          gradient ? x : y};
  constexpr int width = kPackWidth<T>;
  const bool packed = p.C % width == 0 && takes_packs(in, g.in_strides.all(), width, sizeof(T)) &&
                      takes_packs(out, g.out_strides.all(), width, sizeof(T));
  return packed ? launch_gather<T, width, gradient>(g, p.C, run) : launch_gather<T, 1, gradient>(g, p.C, run);
}

}  // namespace
}  // namespace cnnfast::cuda
