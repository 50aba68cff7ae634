// The windows of a pooling along one axis, both ways round: which elements a window covers, and which windows cover an
// element. Both are contiguous runs, and both grow with their index.
#pragma once
#include "primitives/vec.h"

namespace cnnfast {
namespace CNNFAST_ISA {
namespace {

struct Span {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
  int64_t size() const { return end - begin; }
};

// Windows of one width, `stride` apart, the first one `pad` before the axis begins.
struct FixedAxis {
  int64_t size, outputs;  // of the axis, and how many windows there are
  int64_t filter, stride, pad;
  bool count_padding;  // whether padding counts in divisor()
  int64_t fixed;       // the divisor where it isn't counted; 0: it is

  static constexpr bool kRegular = true;
  Span elements(int64_t window) const {
    const int64_t start = window * stride - pad;
    return {max(start, 0), min(start + filter, size)};
  }
  Span windows(int64_t element) const {
    const int64_t reach = element + pad - filter + 1;
    return {reach > 0 ? ceil_div(reach, stride) : 0, min((element + pad) / stride + 1, outputs)};
  }
  int64_t divisor(int64_t window) const {
    const int64_t start = window * stride - pad;
    return fixed ? fixed : count_padding ? min(start + filter, size + pad) - start : elements(window).size();
  }
  int64_t most_elements() const { return min(filter, size); }
  int64_t most_windows() const { return min(ceil_div(filter, stride), outputs); }
};

// As many windows as asked for, which cover the axis; neighbours share an element where it can't be divided.
struct AdaptiveAxis {
  int64_t size, outputs;

  static constexpr int64_t step = 1;
  static constexpr bool kRegular = false;
  Span elements(int64_t window) const { return {window * size / outputs, ceil_div((window + 1) * size, outputs)}; }
  Span extent(int64_t window) const { return elements(window); }
  Span windows(int64_t element) const { return {element * outputs / size, ceil_div((element + 1) * outputs, size)}; }
  int64_t divisor(int64_t window) const { return elements(window).size(); }
  int64_t most_elements() const { return min(ceil_div(size, outputs) + (size % outputs != 0), size); }
  int64_t most_taps() const { return most_elements(); }
  int64_t most_extent() const { return most_elements(); }
  int64_t most_windows() const { return min(ceil_div(outputs, size) + (outputs % size != 0), outputs); }
};

}  // namespace
}  // namespace CNNFAST_ISA
}  // namespace cnnfast
