// 2-D adaptive max pooling: any size to any size, in f32, f64, bf16 and f16.
//
//   fprop    y[n,p,q,c] = max x[n,h,w,c] over floor(p*H / P) <= h < ceil((p+1)*H / P), and w alike
//   indices  the same, and i[n,p,q,c] = h*W + w of the maximum
//   jvp      y[n,p,q,c] = t[n,h,w,c] at the maximum
//   dgrad    t[n,h,w,c] = sum of y[n,p,q,c] over the windows that have their maximum at h, w
//   taps     as fprop, and k[n,p,q,c] = r*S + s of the maximum's tap; S: the most columns that a window has
//   scatter  the same as dgrad, from k in place of x
//
// The first of equal elements is the maximum; with NaNs the last NaN is. Mapping, layout and the sums of dgrad:
// max_pool2d.h.
#include "max_pool2d.h"

namespace cnnfast {
namespace CNNFAST_ISA {
namespace {

template <class S, Direction direction>
const char* launch(const void* params, const Launch& l) {
  const auto& p = *static_cast<const AdaptiveMaxPool2dParams*>(params);
  return launch_pooling<S, direction>(
      Pooling<AdaptiveMaxPool2dParams, AdaptiveAxis>{p, AdaptiveAxis{p.H, p.P}, AdaptiveAxis{p.W, p.Q}}, l);
}

}  // namespace

CNNFAST_KERNEL("adaptive_max_pool2d.fprop.f32", AdaptiveMaxPool2dParams, (launch<float, Direction::fprop>), nullptr)
CNNFAST_KERNEL("adaptive_max_pool2d.fprop.f64", AdaptiveMaxPool2dParams, (launch<double, Direction::fprop>), nullptr)
CNNFAST_KERNEL("adaptive_max_pool2d.fprop.bf16", AdaptiveMaxPool2dParams, (launch<BFloat16, Direction::fprop>), nullptr)
CNNFAST_KERNEL("adaptive_max_pool2d.fprop.f16", AdaptiveMaxPool2dParams, (launch<Float16, Direction::fprop>), nullptr)
CNNFAST_KERNEL("adaptive_max_pool2d.indices.f32", AdaptiveMaxPool2dParams, (launch<float, Direction::indices>), nullptr)
CNNFAST_KERNEL("adaptive_max_pool2d.indices.f64", AdaptiveMaxPool2dParams, (launch<double, Direction::indices>),
               nullptr)
CNNFAST_KERNEL("adaptive_max_pool2d.indices.bf16", AdaptiveMaxPool2dParams, (launch<BFloat16, Direction::indices>),
               nullptr)
CNNFAST_KERNEL("adaptive_max_pool2d.indices.f16", AdaptiveMaxPool2dParams, (launch<Float16, Direction::indices>),
               nullptr)
CNNFAST_KERNEL("adaptive_max_pool2d.dgrad.f32", AdaptiveMaxPool2dParams, (launch<float, Direction::dgrad>), nullptr)
CNNFAST_KERNEL("adaptive_max_pool2d.dgrad.f64", AdaptiveMaxPool2dParams, (launch<double, Direction::dgrad>), nullptr)
CNNFAST_KERNEL("adaptive_max_pool2d.dgrad.bf16", AdaptiveMaxPool2dParams, (launch<BFloat16, Direction::dgrad>), nullptr)
CNNFAST_KERNEL("adaptive_max_pool2d.dgrad.f16", AdaptiveMaxPool2dParams, (launch<Float16, Direction::dgrad>), nullptr)
CNNFAST_KERNEL("adaptive_max_pool2d.jvp.f32", AdaptiveMaxPool2dParams, (launch<float, Direction::jvp>), nullptr)
CNNFAST_KERNEL("adaptive_max_pool2d.jvp.f64", AdaptiveMaxPool2dParams, (launch<double, Direction::jvp>), nullptr)
CNNFAST_KERNEL("adaptive_max_pool2d.jvp.bf16", AdaptiveMaxPool2dParams, (launch<BFloat16, Direction::jvp>), nullptr)
CNNFAST_KERNEL("adaptive_max_pool2d.jvp.f16", AdaptiveMaxPool2dParams, (launch<Float16, Direction::jvp>), nullptr)
CNNFAST_KERNEL("adaptive_max_pool2d.taps.f32", AdaptiveMaxPool2dParams, (launch<float, Direction::taps>), nullptr)
CNNFAST_KERNEL("adaptive_max_pool2d.taps.f64", AdaptiveMaxPool2dParams, (launch<double, Direction::taps>), nullptr)
CNNFAST_KERNEL("adaptive_max_pool2d.taps.bf16", AdaptiveMaxPool2dParams, (launch<BFloat16, Direction::taps>), nullptr)
CNNFAST_KERNEL("adaptive_max_pool2d.taps.f16", AdaptiveMaxPool2dParams, (launch<Float16, Direction::taps>), nullptr)
CNNFAST_KERNEL("adaptive_max_pool2d.scatter.f32", AdaptiveMaxPool2dParams, (launch<float, Direction::scatter>), nullptr)
CNNFAST_KERNEL("adaptive_max_pool2d.scatter.f64", AdaptiveMaxPool2dParams, (launch<double, Direction::scatter>),
               nullptr)
CNNFAST_KERNEL("adaptive_max_pool2d.scatter.bf16", AdaptiveMaxPool2dParams, (launch<BFloat16, Direction::scatter>),
               nullptr)
CNNFAST_KERNEL("adaptive_max_pool2d.scatter.f16", AdaptiveMaxPool2dParams, (launch<Float16, Direction::scatter>),
               nullptr)

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
