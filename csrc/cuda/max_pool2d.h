// The maxima of windows, and the gradient: what max_pool2d and adaptive_max_pool2d share.
//
//   fprop    y[n,c,p,q] = max of x[n, h, w, c] over the elements h, w of window p, q
//   indices  the same, and i[n,c,p,q] = h*W + w of the maximum
//   jvp      y[n,c,p,q] = t[n, h, w, c] at the maximum
//   dgrad    t[n,c,h,w] = sum of y[n,p,q,c] over the windows that have their maximum at h, w
//
// The first of equal elements is the maximum; with NaNs the last NaN is. A window without elements gives -inf, its
// first tap that isn't above or left of the image as index, 0 in jvp, and nothing to dgrad.
//
// Mapping: neighbouring threads take neighbouring channels; a thread takes as many as 16 bytes hold and one output.
// Layout: NHWC, any pixel strides; where sizes, strides or addresses don't allow packs a thread takes one channel.
// dgrad finds the maxima first, whose places in their windows, a byte each where that is enough, go to the workspace;
// then a thread takes one pixel of t and adds up, in their order, the gradients of the windows that cover it and have
// their maximum there: each window is searched once, no sum has two owners, and there are no atomics. Accumulator f32
// (f64 for f64), one rounding at the end; the other directions copy elements bit by bit. Memory offsets are 64-bit,
// coordinates within an image 32-bit.
#pragma once
#include <cmath>

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

constexpr unsigned kWindowsAtOnce = 2;

enum class Direction { fprop, indices, jvp };

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
// indices.
template <class T, int width, Direction direction, class Params, class Axis>
__global__ void __launch_bounds__(kThreads, 3)
    pool(const Pooling<Params, Axis> p, const int64_t items, const T* __restrict__ x, const T* __restrict__ t,
         T* __restrict__ y, int64_t* __restrict__ index) {
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

// ---- dgrad ----------------------------------------------------------------------------------------------------------

// The label of a maximum: where in its window it is, counted through, or, in an int, where in the image. kNowhere: the
// window has no elements.
template <class Label>
constexpr Label kNowhere = static_cast<Label>(-1);

template <class Label, class Params, class Axis>
struct Labels {
  unsigned top, left, width;

  __device__ __forceinline__ Labels(const Pooling<Params, Axis>& p, int row, int q) {
    constexpr bool within = sizeof(Label) < sizeof(int);
    top = within ? static_cast<unsigned>(p.rows.start(row)) : 0;
    left = within ? static_cast<unsigned>(p.columns.start(q)) : 0;
    width = static_cast<unsigned>(within ? p.columns.most_taps() : p.columns.size);
  }
  __device__ __forceinline__ int operator()(unsigned h, unsigned w) const {
    return static_cast<int>((h - top) * width + (w - left));
  }
};

// labels: [N][P][Q][C]. An item as in pool.
template <class T, int width, class Label, class Params, class Axis>
__global__ void __launch_bounds__(kThreads, 3) find_maxima(const Pooling<Params, Axis> p, const int64_t items,
                                                           const T* __restrict__ x, Label* __restrict__ labels) {
  for (int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x; item < items;
       item += int64_t{gridDim.x} * kThreads) {
    const Quotient pixel(item, p.C / width), line(pixel.quotient, p.Q), image(line.quotient, p.P);
    const int row = static_cast<int>(image.rest), q = static_cast<int>(line.rest);
    const Span rows = p.rows.elements(row), columns = p.columns.elements(q);
    Maximum<T, width> maximum;
    maximum.search(p, x + image.quotient * p.x_n + pixel.rest * width, rows, columns,
                   Labels<Label, Params, Axis>(p, row, q));
    const bool empty = rows.empty() || columns.empty();
    Pack<Label, width> result;
#pragma unroll
    for (int e = 0; e < width; ++e) result.v[e] = empty ? kNowhere<Label> : static_cast<Label>(maximum.label[e]);
    pack_of<Label, width>(labels + pixel.quotient * p.C, pixel.rest) = result;
  }
}

// An item is one pixel of t and `width` channels, the channels fastest.
template <class T, int width, class Label, class Params, class Axis>
__global__ void __launch_bounds__(kThreads, 3)
    gather(const Pooling<Params, Axis> p, const int64_t items, const T* __restrict__ y,
           const Label* __restrict__ labels, T* __restrict__ t) {
  using Acc = Accumulator<T>;
  for (int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x; item < items;
       item += int64_t{gridDim.x} * kThreads) {
    const Quotient pixel(item, p.C / width), line(pixel.quotient, p.W), image(line.quotient, p.H);
    const int64_t pack = pixel.rest, n = image.quotient;
    const int h = static_cast<int>(image.rest), w = static_cast<int>(line.rest);
    const Span rows = p.rows.windows(h, h + 1), columns = p.columns.windows(w, w + 1);
    Acc sum[width] = {};
    for (unsigned row = rows.begin; row < rows.end; ++row) {
      const Label* label_row = labels + ((n * p.P + row) * p.Q) * p.C;
      const T* gradient_row = y + n * p.y_n + row * p.y_h;
      for (unsigned first = columns.begin; first < columns.end; first += kWindowsAtOnce) {
        Pack<Label, width> label[kWindowsAtOnce];
        Pack<T, width> gradient[kWindowsAtOnce];
#pragma unroll
        for (unsigned i = 0; i < kWindowsAtOnce; ++i)
          if (first + i < columns.end) {
            label[i] = load<Label, width>(label_row + (first + i) * p.C + pack * width);
            gradient[i] = load<T, width>(gradient_row + (first + i) * p.y_w + pack * width);
          }
#pragma unroll
        for (unsigned i = 0; i < kWindowsAtOnce; ++i) {
          if (first + i >= columns.end) break;
          const Labels<Label, Params, Axis> label_of(p, static_cast<int>(row), static_cast<int>(first + i));
          const Label here = static_cast<Label>(label_of(h, w));
#pragma unroll
          for (int e = 0; e < width; ++e)
            if (label[i].v[e] == here) sum[e] += Numeric<T>::widen(gradient[i].v[e]);
        }
      }
    }
    Pack<T, width> result;
#pragma unroll
    for (int e = 0; e < width; ++e) result.v[e] = Numeric<T>::narrow(sum[e]);
    pack_of<T, width>(t + n * p.t_n + h * p.t_h + w * p.t_w, pack) = result;
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

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
const char* launch_pool_of(const Pooling<Params, Axis>& p, const Launch& run) {
  const int64_t items = p.N * p.P * p.Q * (p.C / width);
  if (items == 0) return nullptr;
  return launch<pool<T, width, direction, Params, Axis>>(
      grid_for(ceil_div(items, kThreads)), dim3(kThreads, 1, 1), 0, run.stream, p, items,
      static_cast<const T*>(run.operands[0]), static_cast<const T*>(run.operands[3]), static_cast<T*>(run.operands[1]),
      static_cast<int64_t*>(run.operands[2]));
}

template <class T, Direction direction, class Params, class Axis>
const char* launch_pool(const Pooling<Params, Axis>& p, const Launch& run) {
  constexpr int width = kPackWidth<T>;
  return all_take_packs<T>(p, run, width) ? launch_pool_of<T, width, direction>(p, run)
                                          : launch_pool_of<T, 1, direction>(p, run);
}

// Whether a byte holds a place in a window: of windows without gaps, so that every place in one is an element of it.
template <class Params, class Axis>
bool takes_bytes(const Pooling<Params, Axis>& p) {
  return p.rows.step == 1 && p.columns.step == 1 && int64_t{p.rows.most_taps()} * p.columns.most_taps() < 256;
}

template <class Params, class Axis>
int64_t labels_workspace(const Pooling<Params, Axis>& p) {
  return p.N * p.P * p.Q * p.C * static_cast<int64_t>(takes_bytes(p) ? 1 : sizeof(int));
}

template <class T, int width, class Label, class Params, class Axis>
const char* launch_dgrad_of(const Pooling<Params, Axis>& p, const Launch& run) {
  const int64_t windows = p.N * p.P * p.Q * (p.C / width), items = p.N * p.H * p.W * (p.C / width);
  const dim3 block(kThreads, 1, 1);
  const auto labels = static_cast<Label*>(run.workspace);
  const char* error = nullptr;
  if (windows > 0)
    error =
        launch<find_maxima<T, width, Label, Params, Axis>>(grid_for(ceil_div(windows, kThreads)), block, 0, run.stream,
                                                           p, windows, static_cast<const T*>(run.operands[0]), labels);
  if (error || items == 0) return error;
  return launch<gather<T, width, Label, Params, Axis>>(
      grid_for(ceil_div(items, kThreads)), block, 0, run.stream, p, items, static_cast<const T*>(run.operands[1]),
      static_cast<const Label*>(labels), static_cast<T*>(run.operands[3]));
}

template <class T, class Label, class Params, class Axis>
const char* launch_labelled(const Pooling<Params, Axis>& p, const Launch& run) {
  constexpr int width = kPackWidth<T>;
  return all_take_packs<T>(p, run, width) ? launch_dgrad_of<T, width, Label>(p, run)
                                          : launch_dgrad_of<T, 1, Label>(p, run);
}

template <class T, class Params, class Axis>
const char* launch_gradient(const Pooling<Params, Axis>& p, const Launch& run) {
  return takes_bytes(p) ? launch_labelled<T, uint8_t>(p, run) : launch_labelled<T, int>(p, run);
}

}  // namespace
}  // namespace cnnfast::cuda
