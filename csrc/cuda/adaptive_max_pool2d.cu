// 2-D adaptive max pooling: any size to any size, in f32, f64, bf16 and f16.
//
//   fprop    y[n,p,q,c] = max x[n,h,w,c] over floor(p*H / P) <= h < ceil((p+1)*H / P), and w alike
//   indices  the same, and i[n,p,q,c] = h*W + w of the maximum
//   jvp      y[n,p,q,c] = t[n,h,w,c] at the maximum
//   dgrad    t[n,h,w,c] = sum of y[n,p,q,c] over the windows that have their maximum at h, w
//
// The first of equal elements is the maximum; with NaNs the last NaN is. Mapping, layout and the sums of dgrad:
// max_pool2d.h.
#include "max_pool2d.h"

namespace cnnfast::cuda {
namespace {

using AdaptivePooling = Pooling<AdaptiveMaxPool2dParams, AdaptiveAxis>;

AdaptivePooling pooling(const void* params) {
  const auto& p = *static_cast<const AdaptiveMaxPool2dParams*>(params);
  return {p, AdaptiveAxis(p.H, p.P), AdaptiveAxis(p.W, p.Q)};
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

#define CNNFAST_ADAPTIVE_MAX_POOL2D(dtype, T)                                                                       \
  CNNFAST_KERNEL("adaptive_max_pool2d.fprop." dtype, AdaptiveMaxPool2dParams, (launch_direct<T, Direction::fprop>), \
                 nullptr)                                                                                           \
  CNNFAST_KERNEL("adaptive_max_pool2d.indices." dtype, AdaptiveMaxPool2dParams,                                     \
                 (launch_direct<T, Direction::indices>), nullptr)                                                   \
  CNNFAST_KERNEL("adaptive_max_pool2d.dgrad." dtype, AdaptiveMaxPool2dParams, launch_dgrad<T>, workspace)           \
  CNNFAST_KERNEL("adaptive_max_pool2d.jvp." dtype, AdaptiveMaxPool2dParams, (launch_direct<T, Direction::jvp>), nullptr)
CNNFAST_ADAPTIVE_MAX_POOL2D("f32", float)
CNNFAST_ADAPTIVE_MAX_POOL2D("f64", double)
CNNFAST_ADAPTIVE_MAX_POOL2D("bf16", __nv_bfloat16)
CNNFAST_ADAPTIVE_MAX_POOL2D("f16", __half)
#undef CNNFAST_ADAPTIVE_MAX_POOL2D

}  // namespace cnnfast::cuda
