// 2-D adaptive average pooling: any size to any size, in f32, f64, bf16 and f16.
//
//   fprop   y[n,p,q,c] = the mean of x[n,h,w,c] over floor(p*H / P) <= h < ceil((p+1)*H / P), and w alike
//   dgrad   x[n,h,w,c] = sum of y[n,p,q,c] / (the window's size) over the windows p, q that cover h, w
//
// Mapping, layout and accumulator: avg_pool2d.h.
#include "avg_pool2d.h"

namespace cnnfast {
namespace CNNFAST_ISA {
namespace {

template <class S, bool gradient>
const char* launch(const void* params, const Launch& l) {
  const auto& p = *static_cast<const AdaptiveAvgPool2dParams*>(params);
  return average<S, gradient>(p, l, AdaptiveAxis{p.H, p.P}, AdaptiveAxis{p.W, p.Q});
}

}  // namespace

CNNFAST_KERNEL("adaptive_avg_pool2d.fprop.f32", AdaptiveAvgPool2dParams, (launch<float, false>), nullptr)
CNNFAST_KERNEL("adaptive_avg_pool2d.fprop.f64", AdaptiveAvgPool2dParams, (launch<double, false>), nullptr)
CNNFAST_KERNEL("adaptive_avg_pool2d.fprop.bf16", AdaptiveAvgPool2dParams, (launch<BFloat16, false>), nullptr)
CNNFAST_KERNEL("adaptive_avg_pool2d.fprop.f16", AdaptiveAvgPool2dParams, (launch<Float16, false>), nullptr)
CNNFAST_KERNEL("adaptive_avg_pool2d.dgrad.f32", AdaptiveAvgPool2dParams, (launch<float, true>), nullptr)
CNNFAST_KERNEL("adaptive_avg_pool2d.dgrad.f64", AdaptiveAvgPool2dParams, (launch<double, true>), nullptr)
CNNFAST_KERNEL("adaptive_avg_pool2d.dgrad.bf16", AdaptiveAvgPool2dParams, (launch<BFloat16, true>), nullptr)
CNNFAST_KERNEL("adaptive_avg_pool2d.dgrad.f16", AdaptiveAvgPool2dParams, (launch<Float16, true>), nullptr)

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
