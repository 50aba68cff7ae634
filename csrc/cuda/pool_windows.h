// The windows of a pooling along one axis, both ways round: which elements a window covers, and which windows cover an
// element. Both are runs that grow with their index.
#pragma once
#include <cstdint>

#include "primitives/cuda.h"

namespace cnnfast::cuda {

// begin, begin + step, ... below end, the step being the axis'. Unsigned, so that a step past the end can't overflow.
struct Span {
  unsigned begin, end;

  __device__ __forceinline__ bool empty() const { return begin >= end; }
  __device__ __forceinline__ int size() const { return static_cast<int>(end - begin); }
};

// a / b and the rest; by instructions for 32 bits where that is enough.
struct Quotient {
  int64_t quotient, rest;

  __device__ __forceinline__ Quotient(int64_t a, int64_t b) {
    if (((a | b) >> 32) == 0) {
      const unsigned low = static_cast<unsigned>(a) / static_cast<unsigned>(b);
      quotient = low;
      rest = static_cast<unsigned>(a) - low * static_cast<unsigned>(b);
    } else {
      quotient = a / b;
      rest = a - quotient * b;
    }
  }
};

// Windows of `filter` taps, `step` apart, one every `stride`, the first one `pad` before the axis begins.
struct DilatedAxis {
  int size, outputs;  // of the axis, and how many windows there are
  int filter, stride, pad, step;

  DilatedAxis(int64_t size_, int64_t outputs_, int64_t filter_, int64_t stride_, int64_t pad_, int64_t step_)
      : size(static_cast<int>(size_)),
        outputs(static_cast<int>(outputs_)),
        filter(static_cast<int>(filter_)),
        stride(static_cast<int>(stride_)),
        pad(static_cast<int>(pad_)),
        step(static_cast<int>(step_)) {}

  __host__ __device__ __forceinline__ int most_taps() const { return filter; }
  __device__ __forceinline__ int start(int window) const { return window * stride - pad; }
  // A window's taps inside the image.
  __device__ __forceinline__ Span elements(int window) const {
    const int start = window * stride - pad, past = start + (filter - 1) * step + 1;
    unsigned first = static_cast<unsigned>(start);
    if (start < 0) first += (static_cast<unsigned>(-start) + step - 1) / step * step;
    return {first, past < 0 ? 0u : static_cast<unsigned>(past < size ? past : size)};
  }
  // The windows that reach into the elements begin .. end - 1.
  __device__ __forceinline__ Span windows(int begin, int end) const {
    const int reach = begin + pad - (filter - 1) * step, past = (end - 1 + pad) / stride + 1;
    return {static_cast<unsigned>(reach > 0 ? (reach + stride - 1) / stride : 0),
            static_cast<unsigned>(past < outputs ? past : outputs)};
  }
};

// The same without dilation, for averages: a window also has a divisor.
struct FixedAxis : DilatedAxis {
  int divisor_of_all;  // 0: counted
  bool count_padding;

  FixedAxis(int64_t size, int64_t outputs, int64_t filter, int64_t stride, int64_t pad, int64_t divisor, bool padding)
      : DilatedAxis(size, outputs, filter, stride, pad, 1),
        divisor_of_all(static_cast<int>(divisor)),
        count_padding(padding) {}

  __device__ __forceinline__ int divisor(int window) const {
    if (divisor_of_all) return divisor_of_all;
    if (!count_padding) return elements(window).size();
    const int start = window * stride - pad, past = start + filter;
    return (past < size + pad ? past : size + pad) - start;  // not what lies beyond the padding
  }
  int most_elements() const { return filter < size ? filter : size; }
};

// As many windows as asked for, which cover the axis; neighbours share an element where it can't be divided.
struct AdaptiveAxis {
  int size, outputs;
  static constexpr int step = 1;

  AdaptiveAxis(int64_t size_, int64_t outputs_) : size(static_cast<int>(size_)), outputs(static_cast<int>(outputs_)) {}

  __device__ __forceinline__ Span elements(int window) const {
    return {floor_of(window, size, outputs), ceil_of(window + 1, size, outputs)};
  }
  __device__ __forceinline__ Span windows(int begin, int end) const {
    return {floor_of(begin, outputs, size), ceil_of(end, outputs, size)};
  }
  __device__ __forceinline__ int start(int window) const { return static_cast<int>(elements(window).begin); }
  __device__ __forceinline__ int divisor(int window) const { return elements(window).size(); }
  __host__ __device__ __forceinline__ int most_elements() const {
    return (size + outputs - 1) / outputs + (size % outputs != 0);
  }
  __host__ __device__ __forceinline__ int most_taps() const { return outputs ? most_elements() : 0; }

 private:
  // i * a / b
  static __device__ __forceinline__ unsigned floor_of(int i, int a, int b) {
    return static_cast<unsigned>(Quotient(int64_t{i} * a, b).quotient);
  }
  static __device__ __forceinline__ unsigned ceil_of(int i, int a, int b) {
    return static_cast<unsigned>(Quotient(int64_t{i} * a + b - 1, b).quotient);
  }
};

}  // namespace cnnfast::cuda
