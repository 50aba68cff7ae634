// The search for the maxima of windows, and the directions that need nothing else: what max_pool2d and
// adaptive_max_pool2d share.
//
//   fprop    y[n,c,p,q] = max of x[n, h, w, c] over the elements h, w of window p, q
//   indices  the same, and i[n,c,p,q] = h*W + w of the maximum
//   jvp      y[n,c,p,q] = t[n, h, w, c] at the maximum
//
// The first of equal elements is the maximum; with NaNs the last NaN is. A window without elements gives -inf, its
// first tap that isn't above or left of the image as index, and 0 in jvp.
//
// Mapping: neighbouring threads take neighbouring channels; a thread takes as many as 16 bytes hold and one output.
// Layout: NHWC, any pixel strides; where sizes, strides or addresses don't allow packs a thread takes one channel.
// Elements are copied bit by bit. Memory offsets are 64-bit, coordinates within an image 32-bit.
#pragma once
#include <cmath>
#include <type_traits>

#include "../common/kernel_table.h"
#include "packs.h"
#include "pool_windows.h"
#include "primitives/cuda.h"
#include "primitives/launch.h"
#include "primitives/numeric.h"

namespace cnnfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kTapsAtOnce = 3;  // loads under way at a time

enum class Direction { fprop, indices, jvp, labels };  // labels: only h*W + w of the maxima, as int, dense
template <Direction direction>
using Index = std::conditional_t<direction == Direction::labels, int, int64_t>;

// The parameters of an operation and its windows along both axes.
template <class Params, class Axis>
struct Pooling : Params {
  Axis rows, columns;
};

// The maxima of the window rows x columns in neighbouring channels: as they are, and the labels of their places.
template <class T, int width>
struct Maximum {
  Pack<T, width> value;
  int label[width];

  // x points to the image's pixel 0, 0; label_of(h, w) labels a pixel.
  template <class Params, class Axis, class LabelOf>
  __device__ __forceinline__ void search(const Pooling<Params, Axis>& p, const T* __restrict__ x, const Span& rows,
                                         const Span& columns, LabelOf label_of) {
    using Acc = Accumulator<T>;
    Acc best[width];
    const int first = label_of(rows.begin, columns.begin);
#pragma unroll
    for (int e = 0; e < width; ++e) {
      best[e] = -static_cast<Acc>(INFINITY);
      value.v[e] = Numeric<T>::narrow(best[e]);
      label[e] = first;
    }
    const unsigned dilation_h = p.rows.step, dilation_w = p.columns.step;
    const int64_t step = dilation_w * p.x_w;
    for (unsigned h = rows.begin; h < rows.end; h += dilation_h) {
      const T* from = x + h * p.x_h + columns.begin * p.x_w;
      for (unsigned w = columns.begin; w < columns.end; w += kTapsAtOnce * dilation_w, from += kTapsAtOnce * step) {
        Pack<T, width> taps[kTapsAtOnce];
#pragma unroll
        for (unsigned i = 0; i < kTapsAtOnce; ++i)
          if (w + i * dilation_w < columns.end) taps[i] = load<T, width>(from + i * step);
#pragma unroll
        for (unsigned i = 0; i < kTapsAtOnce; ++i) {
          if (w + i * dilation_w >= columns.end) break;
          const int here = label_of(h, w + i * dilation_w);
#pragma unroll
          for (int e = 0; e < width; ++e) {
            const Acc v = Numeric<T>::widen(taps[i].v[e]);
            if (v > best[e] || v != v) {
              best[e] = v;
              value.v[e] = taps[i].v[e];
              label[e] = here;
            }
          }
        }
      }
    }
  }
};

// An item is one output pixel and `width` channels, the channels fastest. `t` is read by jvp, `index` written by
// indices and labels.
template <class T, int width, Direction direction, class Params, class Axis>
__global__ void __launch_bounds__(kThreads, 3)
    pool(const Pooling<Params, Axis> p, const int64_t items, const T* __restrict__ x, const T* __restrict__ t,
         T* __restrict__ y, Index<direction>* __restrict__ index) {
  for (int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x; item < items;
       item += int64_t{gridDim.x} * kThreads) {
    const Quotient pixel(item, p.C / width), line(pixel.quotient, p.Q), image(line.quotient, p.P);
    const int64_t pack = pixel.rest, c = pack * width, n = image.quotient;
    const int row = static_cast<int>(image.rest), q = static_cast<int>(line.rest);
    const Span rows = p.rows.elements(row), columns = p.columns.elements(q);
    const unsigned W = static_cast<unsigned>(p.W);

    Maximum<T, width> maximum;
    maximum.search(p, x + n * p.x_n + c, rows, columns,
                   [W](unsigned h, unsigned w) { return static_cast<int>(h * W + w); });
    if constexpr (direction == Direction::labels) {
      Pack<int, width> labels;
#pragma unroll
      for (int e = 0; e < width; ++e) labels.v[e] = maximum.label[e];
      pack_of<int, width>(index + pixel.quotient * p.C, pack) = labels;
      continue;
    }
    Pack<T, width> result = maximum.value;
    if constexpr (direction == Direction::indices) {
      const bool empty = rows.empty() || columns.empty();
      Pack<int64_t, width> places;
#pragma unroll
      for (int e = 0; e < width; ++e) places.v[e] = empty ? rows.begin * p.W + columns.begin : maximum.label[e];
      pack_of<int64_t, width>(index + n * p.i_n + row * p.i_h + q * p.i_w, pack) = places;
    }
    if constexpr (direction == Direction::jvp) {
      const bool empty = rows.empty() || columns.empty();
#pragma unroll
      for (int e = 0; e < width; ++e) {
        const unsigned place = static_cast<unsigned>(maximum.label[e]), h = place / W, w = place - h * W;
        result.v[e] = empty ? Numeric<T>::narrow(0) : t[n * p.t_n + h * p.t_h + w * p.t_w + c + e];
      }
    }
    pack_of<T, width>(y + n * p.y_n + row * p.y_h + q * p.y_w, pack) = result;
  }
}

// Whether every operand can be read and written `width` channels at a time.
template <class T, class Params>
bool all_take_packs(const Params& p, const Launch& run, int width) {
  const int64_t strides[] = {p.x_n | p.x_h | p.x_w, p.y_n | p.y_h | p.y_w, p.i_n | p.i_h | p.i_w,
                             p.t_n | p.t_h | p.t_w};
  bool fits = p.C % width == 0;
  for (int i = 0; i < 4; ++i) fits = fits && takes_packs(run.operands[i], strides[i], width, sizeof(T));
  return fits;
}

template <class T, int width, Direction direction, class Params, class Axis>
const char* launch_pool_of(const Pooling<Params, Axis>& p, const Launch& run, Index<direction>* index) {
  const int64_t items = p.N * p.P * p.Q * (p.C / width);
  if (items == 0) return nullptr;
  return launch<pool<T, width, direction, Params, Axis>>(grid_for(ceil_div(items, kThreads)), dim3(kThreads, 1, 1), 0,
                                                         run.stream, p, items, static_cast<const T*>(run.operands[0]),
                                                         static_cast<const T*>(run.operands[3]),
                                                         static_cast<T*>(run.operands[1]), index);
}

template <class T, Direction direction, class Params, class Axis>
const char* launch_pool(const Pooling<Params, Axis>& p, const Launch& run, void* places = nullptr) {
  constexpr int width = kPackWidth<T>;
  const auto index = static_cast<Index<direction>*>(direction == Direction::labels ? places : run.operands[2]);
  return all_take_packs<T>(p, run, width) ? launch_pool_of<T, width, direction>(p, run, index)
                                          : launch_pool_of<T, 1, direction>(p, run, index);
}

}  // namespace
}  // namespace cnnfast::cuda
