// 2-D adaptive max pooling: any size to any size, in f32, f64, bf16 and f16.
//
//   fprop    y[n,p,q,c] = max x[n,h,w,c] over floor(p*H / P) <= h < ceil((p+1)*H / P), and w alike
//   indices  the same, and i[n,p,q,c] = h*W + w of the maximum
//   jvp      y[n,p,q,c] = t[n,h,w,c] at the maximum
//   dgrad    t[n,h,w,c] = sum of y[n,p,q,c] over the windows that have their maximum at h, w
//
// The first of equal elements is the maximum; with NaNs the last NaN is. Mapping and layout: max_pool2d.h.
//
// dgrad finds the maxima first, whose places go to the workspace; then a thread takes 16 bytes of channels of one pixel
// of t and adds up, in their order, the gradients of the windows that cover it and have their maximum there. Windows
// may be as large as the image: each is searched once. Accumulator f32 (f64 for f64), one rounding at the end.
#include "max_pool2d.h"

namespace cnnfast::cuda {
namespace {

using AdaptivePooling = Pooling<AdaptiveMaxPool2dParams, AdaptiveAxis>;

// An item is one pixel of t and `width` channels, the channels fastest.
template <class T, int width>
__global__ void __launch_bounds__(kThreads, 3)
    gather(const AdaptivePooling p, const int64_t items, const T* __restrict__ y, const int* __restrict__ labels,
           T* __restrict__ t) {
  using Acc = Accumulator<T>;
  for (int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x; item < items;
       item += int64_t{gridDim.x} * kThreads) {
    const Quotient pixel(item, p.C / width), line(pixel.quotient, p.W), image(line.quotient, p.H);
    const int64_t pack = pixel.rest, n = image.quotient;
    const int h = static_cast<int>(image.rest), w = static_cast<int>(line.rest), here = h * static_cast<int>(p.W) + w;
    const Span rows = p.rows.windows(h, h + 1), columns = p.columns.windows(w, w + 1);
    Acc sum[width] = {};
    for (unsigned row = rows.begin; row < rows.end; ++row)
      for (unsigned q = columns.begin; q < columns.end; ++q) {
        const auto label = load<int, width>(labels + ((n * p.P + row) * p.Q + q) * p.C + pack * width);
        const auto gradient = load<T, width>(y + n * p.y_n + row * p.y_h + q * p.y_w + pack * width);
#pragma unroll
        for (int e = 0; e < width; ++e)
          if (label.v[e] == here) sum[e] += Numeric<T>::widen(gradient.v[e]);
      }
    Pack<T, width> result;
#pragma unroll
    for (int e = 0; e < width; ++e) result.v[e] = Numeric<T>::narrow(sum[e]);
    pack_of<T, width>(t + n * p.t_n + h * p.t_h + w * p.t_w, pack) = result;
  }
}

AdaptivePooling pooling(const void* params) {
  const auto& p = *static_cast<const AdaptiveMaxPool2dParams*>(params);
  return {p, AdaptiveAxis(p.H, p.P), AdaptiveAxis(p.W, p.Q)};
}

template <class T, Direction direction>
const char* launch_direct(const void* params, const Launch& run) {
  return launch_pool<T, direction>(pooling(params), run);
}

template <class T, int width>
const char* launch_gather(const AdaptivePooling& p, const Launch& run) {
  const int64_t items = p.N * p.H * p.W * (p.C / width);
  if (items == 0) return nullptr;
  return launch<gather<T, width>>(grid_for(ceil_div(items, kThreads)), dim3(kThreads, 1, 1), 0, run.stream, p, items,
                                  static_cast<const T*>(run.operands[1]), static_cast<const int*>(run.workspace),
                                  static_cast<T*>(run.operands[3]));
}

template <class T>
const char* launch_dgrad(const void* params, const Launch& run) {
  const auto p = pooling(params);
  const char* error = launch_pool<T, Direction::labels>(p, run, run.workspace);
  if (error) return error;
  constexpr int width = kPackWidth<T>;
  return all_take_packs<T>(p, run, width) ? launch_gather<T, width>(p, run) : launch_gather<T, 1>(p, run);
}

int64_t labels_workspace(const void* params) {
  const auto& p = *static_cast<const AdaptiveMaxPool2dParams*>(params);
  return p.N * p.P * p.Q * p.C * static_cast<int64_t>(sizeof(int));
}

}  // namespace

#define CNNFAST_ADAPTIVE_MAX_POOL2D(dtype, T)                                                                       \
  CNNFAST_KERNEL("adaptive_max_pool2d.fprop." dtype, AdaptiveMaxPool2dParams, (launch_direct<T, Direction::fprop>), \
                 nullptr)                                                                                           \
  CNNFAST_KERNEL("adaptive_max_pool2d.indices." dtype, AdaptiveMaxPool2dParams,                                     \
                 (launch_direct<T, Direction::indices>), nullptr)                                                   \
  CNNFAST_KERNEL("adaptive_max_pool2d.dgrad." dtype, AdaptiveMaxPool2dParams, launch_dgrad<T>, labels_workspace)    \
  CNNFAST_KERNEL("adaptive_max_pool2d.jvp." dtype, AdaptiveMaxPool2dParams, (launch_direct<T, Direction::jvp>), nullptr)
CNNFAST_ADAPTIVE_MAX_POOL2D("f32", float)
CNNFAST_ADAPTIVE_MAX_POOL2D("f64", double)
CNNFAST_ADAPTIVE_MAX_POOL2D("bf16", __nv_bfloat16)
CNNFAST_ADAPTIVE_MAX_POOL2D("f16", __half)
#undef CNNFAST_ADAPTIVE_MAX_POOL2D

}  // namespace cnnfast::cuda
