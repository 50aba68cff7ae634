// 2-D max pooling: every kernel size, stride, padding and dilation, in f32, f64, bf16 and f16.
//
//   fprop    y[n,p,q,c] = max_{r,s} x[n,h,w,c]      h = p*stride_h - pad_h + r*dilation_h, w alike, inside the image
//   indices  the same, and i[n,p,q,c] = h*W + w of the maximum
//   jvp      y[n,p,q,c] = t[n,h,w,c] at the maximum
//   dgrad    t[n,h,w,c] = sum of y[n,p,q,c] over the windows that have their maximum at h, w
//   taps     as fprop, and k[n,p,q,c] = r*S + s of the maximum's tap; S: the most columns that a window has
//   scatter  the same as dgrad, from k in place of x
//
// The first of equal elements is the maximum; with NaNs the last NaN is. A window without elements gives -inf (and, as
// in torch, its first tap that isn't above or left of the image as index), 0 in jvp, and nothing to dgrad.
//
// Mapping, layout and the sums of dgrad: max_pool2d.h.
#include "max_pool2d.h"

namespace cnnfast {
namespace CNNFAST_ISA {
namespace {

// Windows of `filter` taps, `step` apart.
struct DilatedAxis {
  int64_t size, outputs;  // of the axis, and how many windows there are
  int64_t filter, stride, pad, step;

  static constexpr bool kRegular = true;
  int64_t most_taps() const { return filter; }
  int64_t most_extent() const { return (filter - 1) * step + 1; }
  Span extent(int64_t window) const {
    const int64_t start = window * stride - pad;
    return {start, start + most_extent()};
  }
  Span elements(int64_t window) const {
    const Span all = extent(window);
    return {all.begin < 0 ? all.begin + ceil_div(-all.begin, step) * step : all.begin, min(all.end, size)};
  }
  Span windows(int64_t element) const {
    const int64_t reach = element + pad - most_extent() + 1;
    return {reach > 0 ? ceil_div(reach, stride) : 0, min((element + pad) / stride + 1, outputs)};
  }
};

template <class S, Direction direction>
const char* launch(const void* params, const Launch& l) {
  const auto& p = *static_cast<const MaxPool2dParams*>(params);
  return launch_pooling<S, direction>(
      Pooling<MaxPool2dParams, DilatedAxis>{
          p, {p.H, p.P, p.R, p.stride_h, p.pad_h, p.dilation_h}, {p.W, p.Q, p.S, p.stride_w, p.pad_w, p.dilation_w}},
      l);
}

}  // namespace

CNNFAST_KERNEL("max_pool2d.fprop.f32", MaxPool2dParams, (launch<float, Direction::fprop>), nullptr)
CNNFAST_KERNEL("max_pool2d.fprop.f64", MaxPool2dParams, (launch<double, Direction::fprop>), nullptr)
CNNFAST_KERNEL("max_pool2d.fprop.bf16", MaxPool2dParams, (launch<BFloat16, Direction::fprop>), nullptr)
CNNFAST_KERNEL("max_pool2d.fprop.f16", MaxPool2dParams, (launch<Float16, Direction::fprop>), nullptr)
CNNFAST_KERNEL("max_pool2d.indices.f32", MaxPool2dParams, (launch<float, Direction::indices>), nullptr)
CNNFAST_KERNEL("max_pool2d.indices.f64", MaxPool2dParams, (launch<double, Direction::indices>), nullptr)
CNNFAST_KERNEL("max_pool2d.indices.bf16", MaxPool2dParams, (launch<BFloat16, Direction::indices>), nullptr)
CNNFAST_KERNEL("max_pool2d.indices.f16", MaxPool2dParams, (launch<Float16, Direction::indices>), nullptr)
CNNFAST_KERNEL("max_pool2d.dgrad.f32", MaxPool2dParams, (launch<float, Direction::dgrad>), nullptr)
CNNFAST_KERNEL("max_pool2d.dgrad.f64", MaxPool2dParams, (launch<double, Direction::dgrad>), nullptr)
CNNFAST_KERNEL("max_pool2d.dgrad.bf16", MaxPool2dParams, (launch<BFloat16, Direction::dgrad>), nullptr)
CNNFAST_KERNEL("max_pool2d.dgrad.f16", MaxPool2dParams, (launch<Float16, Direction::dgrad>), nullptr)
CNNFAST_KERNEL("max_pool2d.jvp.f32", MaxPool2dParams, (launch<float, Direction::jvp>), nullptr)
CNNFAST_KERNEL("max_pool2d.jvp.f64", MaxPool2dParams, (launch<double, Direction::jvp>), nullptr)
CNNFAST_KERNEL("max_pool2d.jvp.bf16", MaxPool2dParams, (launch<BFloat16, Direction::jvp>), nullptr)
CNNFAST_KERNEL("max_pool2d.jvp.f16", MaxPool2dParams, (launch<Float16, Direction::jvp>), nullptr)
CNNFAST_KERNEL("max_pool2d.taps.f32", MaxPool2dParams, (launch<float, Direction::taps>), nullptr)
CNNFAST_KERNEL("max_pool2d.taps.f64", MaxPool2dParams, (launch<double, Direction::taps>), nullptr)
CNNFAST_KERNEL("max_pool2d.taps.bf16", MaxPool2dParams, (launch<BFloat16, Direction::taps>), nullptr)
CNNFAST_KERNEL("max_pool2d.taps.f16", MaxPool2dParams, (launch<Float16, Direction::taps>), nullptr)
CNNFAST_KERNEL("max_pool2d.scatter.f32", MaxPool2dParams, (launch<float, Direction::scatter>), nullptr)
CNNFAST_KERNEL("max_pool2d.scatter.f64", MaxPool2dParams, (launch<double, Direction::scatter>), nullptr)
CNNFAST_KERNEL("max_pool2d.scatter.bf16", MaxPool2dParams, (launch<BFloat16, Direction::scatter>), nullptr)
CNNFAST_KERNEL("max_pool2d.scatter.f16", MaxPool2dParams, (launch<Float16, Direction::scatter>), nullptr)

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
