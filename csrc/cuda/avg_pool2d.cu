// 2-D average pooling: every kernel size, stride, padding and divisor, in f32, f64, bf16 and f16.
//
//   fprop   y[n,p,q,c] = sum_{r,s} x[n,h,w,c] / divisor      h = p*stride_h - pad_h + r, w alike, inside the image
//   dgrad   x[n,h,w,c] = sum of y[n,p,q,c] / divisor over the windows p, q that cover h, w
//
// The divisor is the user's, or counts the window's taps inside the image, or also those in the padding, but never
// those beyond it, which windows of ceil_mode have. Mapping, layout and accumulator: avg_pool2d.h.
#include "avg_pool2d.h"

namespace cnnfast::cuda {
namespace {

template <class T, bool gradient>
const char* launch_average(const void* params, const Launch& run) {
  const auto& p = *static_cast<const AvgPool2dParams*>(params);
  const bool padding = p.count_include_pad != 0;
  const int64_t once = p.divisor_override != 0;
  const FixedAxis rows(p.H, p.P, p.R, p.stride_h, p.pad_h, p.divisor_override, padding);
  const FixedAxis columns(p.W, p.Q, p.S, p.stride_w, p.pad_w, once, padding);
  return average<T, gradient>(p, run, rows, columns);
}

}  // namespace

CNNFAST_KERNEL("avg_pool2d.fprop.f32", AvgPool2dParams, (launch_average<float, false>), nullptr)
CNNFAST_KERNEL("avg_pool2d.fprop.f64", AvgPool2dParams, (launch_average<double, false>), nullptr)
CNNFAST_KERNEL("avg_pool2d.fprop.bf16", AvgPool2dParams, (launch_average<__nv_bfloat16, false>), nullptr)
CNNFAST_KERNEL("avg_pool2d.fprop.f16", AvgPool2dParams, (launch_average<__half, false>), nullptr)
CNNFAST_KERNEL("avg_pool2d.dgrad.f32", AvgPool2dParams, (launch_average<float, true>), nullptr)
CNNFAST_KERNEL("avg_pool2d.dgrad.f64", AvgPool2dParams, (launch_average<double, true>), nullptr)
CNNFAST_KERNEL("avg_pool2d.dgrad.bf16", AvgPool2dParams, (launch_average<__nv_bfloat16, true>), nullptr)
CNNFAST_KERNEL("avg_pool2d.dgrad.f16", AvgPool2dParams, (launch_average<__half, true>), nullptr)

}  // namespace cnnfast::cuda
