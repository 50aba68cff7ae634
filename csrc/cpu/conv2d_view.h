// One convolution as the kernels see it: fprop's own, or one of the stride-1 convolutions that dgrad is made of.
//
//   y[n,g,k,p,q] = sum_{c,r,s} x[n,g,c,h,w] * w[g,k,c,r,s]     h = p*stride_h - pad_h + r*dilation_h, w alike
//
// dgrad: dx[h] collects g[p] where h = p*stride - pad + r*dilation. The rows h = a + i*stride of one residue a use the
// taps r with (a + pad - r*dilation) divisible by the stride, every (stride / gcd(stride, dilation))-th one, and for
// these p = i + const - t*d: a stride-1 convolution of g with flipped taps (negative weight strides), C and K
// exchanged, written to every stride-th row. No zeros are inserted anywhere. A residue without taps writes zeros.
#pragma once
#include "../common/params.h"
#include "primitives/parallel.h"
#include "primitives/vec.h"

namespace cnnfast {
namespace CNNFAST_ISA {

// What denormals are in a convolution of this storage type. Those of fp16 are normal floats, and some processors
// convert them by way of denormal floats.
template <class S>
constexpr Denormals kDenormals = kSame<S, Float16> ? Denormals::kKeep : Denormals::kFlush;

struct Conv2dView {
  int64_t N, C, H, W, K, R, S, P, Q, G;                                     // C and K of one group
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;         // the pads may be negative
  int64_t x_n, x_c, x_h, x_w, w_g, w_k, w_c, w_r, w_s, y_n, y_c, y_h, y_w;  // the weights' may be negative
  int64_t result;  // elements of all that the call writes: dgrad's, not one class's
};

inline Conv2dView fprop_view(const Conv2dParams& p) {
  return {p.N,          p.C / p.G,  p.H,
          p.W,          p.K / p.G,  p.R,
          p.S,          p.P,        p.Q,
          p.G,          p.stride_h, p.stride_w,
          p.pad_h,      p.pad_w,    p.dilation_h,
          p.dilation_w, p.x_n,      p.x_c,
          p.x_h,        p.x_w,      p.K / p.G * p.w_k,
          p.w_k,        p.w_c,      p.w_r,
          p.w_s,        p.y_n,      p.y_c,
          p.y_h,        p.y_w,      p.N * p.K * p.P * p.Q};
}

inline int64_t gcd(int64_t a, int64_t b) {
  while (b) {
    const int64_t t = a % b;
    a = b;
    b = t;
  }
  return a;
}

// One residue class along one axis.
struct DgradAxis {
  int64_t out;   // rows of dx in this class
  int64_t taps;  // taps they use: first, first + step, ...
  int64_t first, step;
  int64_t pad, dilation;
};

inline DgradAxis dgrad_axis(int64_t residue, int64_t size, int64_t taps, int64_t stride, int64_t pad,
                            int64_t dilation) {
  DgradAxis axis{residue < size ? ceil_div(size - residue, stride) : 0, 0, 0, 1, 0, 1};
  axis.step = stride / gcd(stride, dilation);
  for (int64_t r = 0; r < min(taps, axis.step); ++r) {
    if ((residue + pad - r * dilation) % stride) continue;
    axis.first = r;
    axis.taps = (taps - 1 - r) / axis.step + 1;
    break;
  }
  if (axis.taps) {
    axis.dilation = axis.step * dilation / stride;
    axis.pad = (axis.taps - 1) * axis.dilation - (residue + pad - axis.first * dilation) / stride;
  }
  return axis;
}

// Calls fn(view, offset into w, offset into dx) for every residue class.
template <class F>
CNNFAST_INLINE void for_each_dgrad_view(const Conv2dParams& p, const F& fn) {
  for (int64_t a = 0; a < min(p.stride_h, p.H); ++a) {
    const DgradAxis h = dgrad_axis(a, p.H, p.R, p.stride_h, p.pad_h, p.dilation_h);
    for (int64_t b = 0; b < min(p.stride_w, p.W); ++b) {
      const DgradAxis w = dgrad_axis(b, p.W, p.S, p.stride_w, p.pad_w, p.dilation_w);
      Conv2dView v;
      v.N = p.N, v.G = p.G, v.C = p.K / p.G, v.K = p.C / p.G;
      v.H = p.P, v.W = p.Q, v.P = h.out, v.Q = w.out;
      v.R = w.taps ? h.taps : 0, v.S = h.taps ? w.taps : 0;
      v.stride_h = v.stride_w = 1;
      v.pad_h = h.pad, v.pad_w = w.pad, v.dilation_h = h.dilation, v.dilation_w = w.dilation;
      v.x_n = p.y_n, v.x_c = p.y_c, v.x_h = p.y_h, v.x_w = p.y_w;
      v.w_g = p.K / p.G * p.w_k, v.w_k = p.w_c, v.w_c = p.w_k;
      v.w_r = -h.step * p.w_r, v.w_s = -w.step * p.w_s;
      v.y_n = p.x_n, v.y_c = p.x_c, v.y_h = p.stride_h * p.x_h, v.y_w = p.stride_w * p.x_w;
      v.result = p.N * p.C * p.H * p.W;
      const int64_t w_offset =
          v.R && v.S ? (h.first + h.step * (h.taps - 1)) * p.w_r + (w.first + w.step * (w.taps - 1)) * p.w_s : 0;
      fn(v, w_offset, a * p.x_h + b * p.x_w);
    }
  }
}

// The distance of the input pixels that are needed along one axis.
inline int64_t needed_step(int64_t outputs, int64_t taps, int64_t stride, int64_t dilation) {
  if (taps == 1) return stride;
  if (outputs == 1) return dilation;
  return gcd(stride, dilation);
}

constexpr int64_t kLineBytes = 64;  // of a cache
constexpr bool kLineVectors = kVecBytes == kLineBytes;
constexpr int64_t kLargeResult = 3 << 20;  // bytes, more than L2s hold

// Whether the result, large, goes past the caches: nothing of it is read first, and what reads it next is no slower.
// `whole`: all vectors of a pixel's channels are full ones. (Who writes a line in halves, a while apart, must not ask:
// that is slower, by a tenth in AVX2's Winograd.)
template <class S>
bool streams_result(const Conv2dView& v, const S* y, bool whole) {
  if (!kSame<S, Compute<S>> || !whole) return false;
  const auto vectors = [](int64_t stride) { return stride % kLanes<S> == 0; };
  return v.result * static_cast<int64_t>(sizeof(S)) >= kLargeResult && vectors(v.y_w) && vectors(v.y_h) &&
         vectors(v.y_n) && reinterpret_cast<uintptr_t>(y) % kVecBytes == 0;
}

// Whether some tap of some output lies outside the input.
inline bool reaches_padding(const Conv2dView& v) {
  return v.pad_h > 0 || v.pad_w > 0 || (v.P - 1) * v.stride_h - v.pad_h + (v.R - 1) * v.dilation_h >= v.H ||
         (v.Q - 1) * v.stride_w - v.pad_w + (v.S - 1) * v.dilation_w >= v.W;
}

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
