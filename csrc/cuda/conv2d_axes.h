// The spatial axes of a correlation, for the kernels that compute fprop and dgrad alike.
//
// Both are sums over taps at regular distances. For dgrad the positions of dx fall into stride_h * stride_w parity
// classes; within a class the same taps contribute, so that each class is a dense correlation without the zeros of an
// upsampled dy.
#pragma once
#include "../common/params.h"
#include "packs.h"
#include "primitives/cuda.h"

namespace cnnfast::cuda {

enum class Direction { fprop, dgrad };

// One spatial axis of a correlation. Position i of the output lies at out_first + i * out_step; tap t of it reads the
// input at in_first + i * in_step + t * in_tap, and the weight at tap_first + t * tap_step.
struct Axis {
  int positions, out_first, out_step;
  int in_size, in_first, in_step, in_tap;
  int taps, tap_first, tap_step;
};

__host__ __device__ __forceinline__ Axis fprop_axis(int64_t out, int64_t in, int64_t filter, int64_t stride,
                                                    int64_t pad, int64_t dilation) {
  Axis axis;
  axis.positions = static_cast<int>(out);
  axis.out_first = 0;
  axis.out_step = 1;
  axis.in_size = static_cast<int>(in);
  axis.in_first = static_cast<int>(-pad);
  axis.in_step = static_cast<int>(stride);
  axis.in_tap = static_cast<int>(dilation);
  axis.taps = static_cast<int>(filter);
  axis.tap_first = 0;
  axis.tap_step = 1;
  return axis;
}

// The class of the positions h = parity, parity + stride, ... of dx. Tap r meets them where h + pad - r * dilation is a
// multiple of the stride: for every step-th r, step = stride / gcd(stride, dilation), from the first, if any, that
// does.
__host__ __device__ __forceinline__ Axis dgrad_axis(int parity, int64_t in, int64_t out, int64_t filter_,
                                                    int64_t stride_, int64_t pad_, int64_t dilation_) {
  const int stride = static_cast<int>(stride_), pad = static_cast<int>(pad_), dilation = static_cast<int>(dilation_);
  const int filter = static_cast<int>(filter_);
  int step = 1;
  while (step * dilation % stride != 0) ++step;
  int first = 0;
  while (first < filter && first < step && (parity + pad - first * dilation) % stride != 0) ++first;
  const bool any = first < filter && first < step;
  Axis axis;
  axis.positions = parity < in ? (static_cast<int>(in) - parity + stride - 1) / stride : 0;
  axis.out_first = parity;
  axis.out_step = stride;
  axis.in_size = static_cast<int>(out);
  axis.in_first = any ? (parity + pad - first * dilation) / stride : 0;
  axis.in_step = 1;
  axis.in_tap = -(step * dilation / stride);
  axis.taps = any ? (filter - first + step - 1) / step : 0;
  axis.tap_first = any ? first : 0;
  axis.tap_step = step;
  return axis;
}

// How many classes of positions each axis has, and the positions in the largest of them, both axes together.
struct Classes {
  int h, w;
  int64_t positions;

  Classes(const Conv2dParams& p, Direction direction) {
    const bool forward = direction == Direction::fprop;
    h = forward ? 1 : static_cast<int>(p.stride_h < p.H ? p.stride_h : p.H);
    w = forward ? 1 : static_cast<int>(p.stride_w < p.W ? p.stride_w : p.W);
    positions = forward ? p.P * p.Q : ceil_div(p.H, p.stride_h) * ceil_div(p.W, p.stride_w);
  }
};

// Counts through (channel, tap s, tap r), the channel fastest.
struct Odometer {
  int c = 0, s = 0, r = 0;
  __device__ __forceinline__ void advance(int by, int channels, int taps_s) {
    c += by;
    if (c < channels) return;
    const int carry = c / channels;
    c -= carry * channels;
    s += carry;
    if (s < taps_s) return;
    const int rows = s / taps_s;
    s -= rows * taps_s;
    r += rows;
  }
};

}  // namespace cnnfast::cuda
