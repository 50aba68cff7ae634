// 2-D max pooling: every kernel size, stride, padding and dilation, in f32, f64, bf16 and f16.
//
//   fprop    y[n,c,p,q] = max_{r,s} x[n, h, w, c]      h = p*stride - pad + r*dilation, w likewise, inside the image
//   indices  the same, and i[n,c,p,q] = h*W + w of the maximum
//   jvp      y[n,c,p,q] = t[n, h, w, c] at the maximum
//   dgrad    t[n,c,h,w] = sum of y[n,p,q,c] over the windows that have their maximum at h, w
//
// The first of equal elements is the maximum; with NaNs the last NaN is. A window without elements gives -inf (and, as
// in torch, its first tap that isn't above or left of the image as index), 0 in jvp, and nothing to dgrad.
//
// Mapping, layout and the sums of dgrad: max_pool2d.h.
#include "max_pool2d.h"

namespace cnnfast::cuda {
namespace {

Pooling<MaxPool2dParams, DilatedAxis> pooling(const void* params) {
  const auto& p = *static_cast<const MaxPool2dParams*>(params);
  return {p, DilatedAxis(p.H, p.P, p.R, p.stride_h, p.pad_h, p.dilation_h),
          DilatedAxis(p.W, p.Q, p.S, p.stride_w, p.pad_w, p.dilation_w)};
}

template <class T, Direction direction>
const char* launch_direct(const void* params, const Launch& run) {
  return launch_pool<T, direction>(pooling(params), run);
}

template <class T>
const char* launch_dgrad(const void* params, const Launch& run) {
  return launch_gradient<T>(pooling(params), run);
}

int64_t workspace(const void* params) { return labels_workspace(pooling(params)); }

}  // namespace

CNNFAST_KERNEL("max_pool2d.fprop.f32", MaxPool2dParams, (launch_direct<float, Direction::fprop>), nullptr)
CNNFAST_KERNEL("max_pool2d.fprop.f64", MaxPool2dParams, (launch_direct<double, Direction::fprop>), nullptr)
CNNFAST_KERNEL("max_pool2d.fprop.bf16", MaxPool2dParams, (launch_direct<__nv_bfloat16, Direction::fprop>), nullptr)
CNNFAST_KERNEL("max_pool2d.fprop.f16", MaxPool2dParams, (launch_direct<__half, Direction::fprop>), nullptr)
CNNFAST_KERNEL("max_pool2d.indices.f32", MaxPool2dParams, (launch_direct<float, Direction::indices>), nullptr)
CNNFAST_KERNEL("max_pool2d.indices.f64", MaxPool2dParams, (launch_direct<double, Direction::indices>), nullptr)
CNNFAST_KERNEL("max_pool2d.indices.bf16", MaxPool2dParams, (launch_direct<__nv_bfloat16, Direction::indices>), nullptr)
CNNFAST_KERNEL("max_pool2d.indices.f16", MaxPool2dParams, (launch_direct<__half, Direction::indices>), nullptr)
CNNFAST_KERNEL("max_pool2d.dgrad.f32", MaxPool2dParams, launch_dgrad<float>, workspace)
CNNFAST_KERNEL("max_pool2d.dgrad.f64", MaxPool2dParams, launch_dgrad<double>, workspace)
CNNFAST_KERNEL("max_pool2d.dgrad.bf16", MaxPool2dParams, launch_dgrad<__nv_bfloat16>, workspace)
CNNFAST_KERNEL("max_pool2d.dgrad.f16", MaxPool2dParams, launch_dgrad<__half>, workspace)
CNNFAST_KERNEL("max_pool2d.jvp.f32", MaxPool2dParams, (launch_direct<float, Direction::jvp>), nullptr)
CNNFAST_KERNEL("max_pool2d.jvp.f64", MaxPool2dParams, (launch_direct<double, Direction::jvp>), nullptr)
CNNFAST_KERNEL("max_pool2d.jvp.bf16", MaxPool2dParams, (launch_direct<__nv_bfloat16, Direction::jvp>), nullptr)
CNNFAST_KERNEL("max_pool2d.jvp.f16", MaxPool2dParams, (launch_direct<__half, Direction::jvp>), nullptr)

}  // namespace cnnfast::cuda
