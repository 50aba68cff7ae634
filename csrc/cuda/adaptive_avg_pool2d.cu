// 2-D adaptive average pooling: any size to any size, in f32, f64, bf16 and f16.
//
//   fprop   y[n,p,q,c] = the mean of x[n,h,w,c] over floor(p*H / P) <= h < ceil((p+1)*H / P), and w alike
//   dgrad   x[n,h,w,c] = sum of y[n,p,q,c] / (the window's size) over the windows p, q that cover h, w
//
// Mapping, layout and accumulator: avg_pool2d.h.
#include "avg_pool2d.h"

namespace cnnfast::cuda {
namespace {

template <class T, bool gradient>
const char* launch_average(const void* params, const Launch& run) {
  const auto& p = *static_cast<const AdaptiveAvgPool2dParams*>(params);
  if (p.P * p.Q == 0 && !gradient) return nullptr;
  return average<T, gradient>(p, run, AdaptiveAxis(p.H, p.P), AdaptiveAxis(p.W, p.Q));
}

}  // namespace

CNNFAST_KERNEL("adaptive_avg_pool2d.fprop.f32", AdaptiveAvgPool2dParams, (launch_average<float, false>), nullptr)
CNNFAST_KERNEL("adaptive_avg_pool2d.fprop.f64", AdaptiveAvgPool2dParams, (launch_average<double, false>), nullptr)
CNNFAST_KERNEL("adaptive_avg_pool2d.fprop.bf16", AdaptiveAvgPool2dParams, (launch_average<__nv_bfloat16, false>),
               nullptr)
CNNFAST_KERNEL("adaptive_avg_pool2d.fprop.f16", AdaptiveAvgPool2dParams, (launch_average<__half, false>), nullptr)
CNNFAST_KERNEL("adaptive_avg_pool2d.dgrad.f32", AdaptiveAvgPool2dParams, (launch_average<float, true>), nullptr)
CNNFAST_KERNEL("adaptive_avg_pool2d.dgrad.f64", AdaptiveAvgPool2dParams, (launch_average<double, true>), nullptr)
CNNFAST_KERNEL("adaptive_avg_pool2d.dgrad.bf16", AdaptiveAvgPool2dParams, (launch_average<__nv_bfloat16, true>),
               nullptr)
CNNFAST_KERNEL("adaptive_avg_pool2d.dgrad.f16", AdaptiveAvgPool2dParams, (launch_average<__half, true>), nullptr)

}  // namespace cnnfast::cuda
