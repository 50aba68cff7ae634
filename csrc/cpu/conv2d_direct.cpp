// Direct convolution: the definition as loops. Any configuration, every direction; the oracle of the other kernels and
// the quickest for tiny problems, since it prepares nothing.
//
//   fprop  y[n,k,p,q]  = b[k] + sum_{c,r,s} x[n,c,h,w] * w[k,c,r,s]     h = p*stride_h - pad_h + r*dilation_h, w alike
//   dgrad  dx[n,c,h,w] = sum_{k,r,s with p,q whole} g[n,k,p,q] * w[k,c,r,s]
//   wgrad  dw[k,c,r,s] = sum_{n,p,q} g[n,k,p,q] * x[n,c,h,w]
//   bgrad  db[k]       = sum_{n,p,q} g[n,k,p,q]
//
// fprop with more operands is conv_bn_act: its sums go through epilogue.h before they are stored.
//
// One task computes up to 64 channels of one output pixel (fprop, dgrad), one filter tap of one output channel (wgrad),
// one vector of channels (bgrad). Operands have any strides (bgrad reads NHWC). Sums are in float for float, bf16 and
// fp16, in double for double; blocks of 8 sums run side by side to hide the latency of the additions, and long sums are
// sums of short ones (a tap's channels, a row's pixels), which keeps their error small. Each output is summed by one
// thread in one order: results don't depend on the thread count. Taps in the padding are skipped, so an Inf or NaN
// weight there leaves no trace (oneDNN does the same; ATen's native path multiplies it by zero).
#include "conv2d_direct.h"

#include "../common/kernel_table.h"
#include "conv2d_view.h"
#include "primitives/parallel.h"

namespace cnnfast {
namespace CNNFAST_ISA {
namespace {

constexpr int kBlock = 8;                       // sums side by side
constexpr int64_t kChain = 128;                 // additions in a row
constexpr int64_t kTaskChannels = 64;           // output channels of a task
constexpr int64_t kMacsWorthThreads = 1 << 16;  // below, a parallel region costs more than it saves

int useful_threads(int threads, int64_t macs) { return macs < kMacsWorthThreads ? 1 : threads; }

// out[j] = init[j] + sum over the run of a[i*a_in] * b[j*b_out + i*b_in]: kBlock or fewer outputs.
template <class S, class T, int n>
CNNFAST_INLINE void accumulate(T* sums, const S* a, int64_t a_in, const S* b, int64_t b_out, int64_t b_in,
                               int64_t run) {
  for (int64_t i = 0; i < run; ++i) {
    const T value = widen_one(a[i * a_in]);
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) sums[j] += value * widen_one(b[j * b_out + i * b_in]);
  }
}

// The same where neighbours in the run are neighbours in b, too (1x1 weights): each lane sums its own share of the run.
template <class S, class T, int n>
CNNFAST_INLINE void accumulate_lanes(T* sums, const S* a, const S* b, int64_t b_out, int64_t run) {
  constexpr int VL = kLanes<T>;
  Vec<T> lanes[n] = {};
  int64_t i = 0;
  for (; i + VL <= run; i += VL) {
    const Vec<T> value = load_wide(a + i);
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) lanes[j] += value * load_wide(b + j * b_out + i);
  }
  if (i < run) {
    const Vec<T> value = load_wide(a + i, run - i);
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) lanes[j] += value * load_wide(b + j * b_out + i, run - i);
  }
  for (int j = 0; j < n; ++j)
    for (int l = 0; l < VL; ++l) sums[j] += lanes[j][l];
}

template <class S, class T>
CNNFAST_INLINE void accumulate_block(T* sums, int64_t n, const S* a, int64_t a_in, const S* b, int64_t b_out,
                                     int64_t b_in, int64_t run) {
  if (a_in == 1 && b_in == 1 && run >= kLanes<T>) {
    if (n == kBlock) return accumulate_lanes<S, T, kBlock>(sums, a, b, b_out, run);
    for (int64_t j = 0; j < n; ++j) accumulate_lanes<S, T, 1>(sums + j, a, b + j * b_out, b_out, run);
    return;
  }
  for (int64_t i = 0; i < run; i += kChain) {
    T part[kBlock] = {};
    const int64_t length = min(kChain, run - i);
    if (n == kBlock)
      accumulate<S, T, kBlock>(part, a + i * a_in, a_in, b + i * b_in, b_out, b_in, length);
    else
      for (int64_t j = 0; j < n; ++j)
        accumulate<S, T, 1>(part + j, a + i * a_in, a_in, b + j * b_out + i * b_in, b_out, b_in, length);
    for (int64_t j = 0; j < n; ++j) sums[j] += part[j];
  }
}

// Channels [k, end) of group g of one pixel of any view: fprop's, or a dgrad class's.
template <class S>
CNNFAST_INLINE void pixel(const Conv2dView& v, const S* x, const S* w, const S* bias, S* y, int64_t index, int64_t g,
                          int64_t k, int64_t end, const Epilogue<S>* epilogue) {
  using T = Compute<S>;
  const int64_t n = index / (v.P * v.Q), p = index / v.Q % v.P, q = index % v.Q;
  const int64_t h0 = p * v.stride_h - v.pad_h, w0 = q * v.stride_w - v.pad_w;
  for (; k < end; k += kBlock) {
    const int64_t block = min(kBlock, end - k);
    T sums[kBlock] = {};
    for (int64_t r = 0; r < v.R; ++r) {
      const int64_t h = h0 + r * v.dilation_h;
      if (h < 0 || h >= v.H) continue;
      for (int64_t s = 0; s < v.S; ++s) {
        const int64_t ww = w0 + s * v.dilation_w;
        if (ww < 0 || ww >= v.W) continue;
        accumulate_block<S, T>(sums, block, x + n * v.x_n + h * v.x_h + ww * v.x_w + g * v.C * v.x_c, v.x_c,
                               w + g * v.w_g + k * v.w_k + r * v.w_r + s * v.w_s, v.w_k, v.w_c, v.C);
      }
    }
    if (bias)
      for (int64_t j = 0; j < block; ++j) sums[j] += widen_one(bias[g * v.K + k + j]);
    if (epilogue)
      for (int64_t j = 0; j < block; ++j)
        sums[j] = epilogue->apply(sums[j], epilogue->residual_at(n, p, q), g * v.K + k + j);
    S* out = y + n * v.y_n + p * v.y_h + q * v.y_w + (g * v.K + k) * v.y_c;
    for (int64_t j = 0; j < block; ++j) narrow_one(out + j * v.y_c, sums[j]);
  }
}

template <class S>
void run_view(const Conv2dView& v, const S* x, const S* w, const S* bias, S* y, int threads,
              const Epilogue<S>* epilogue) {
  const int64_t pixels = v.N * v.P * v.Q, parts = ceil_div(v.K, kTaskChannels);
  threads = useful_threads(threads, pixels * v.G * v.K * max(1, v.C * v.R * v.S));
  parallel_for(
      threads, v.G * parts * pixels,
      [&](int64_t task) {
        const int64_t part = task / pixels, k = part % parts * kTaskChannels;
        pixel(v, x, w, bias, y, task % pixels, part / parts, k, min(v.K, k + kTaskChannels), epilogue);
      },
      kDenormals<S>);
}

// The outputs whose tap lies inside the input: [first, last).
struct Range {
  int64_t first, last;
};
Range valid_outputs(int64_t outputs, int64_t size, int64_t stride, int64_t offset) {
  return {offset >= 0 ? 0 : ceil_div(-offset, stride),
          offset < size ? min(outputs, (size - 1 - offset) / stride + 1) : 0};
}

}  // namespace

template <class S>
void direct_pixel(const Conv2dView& v, const S* x, const S* w, const S* bias, S* y, int64_t index, int64_t g, int64_t k,
                  int64_t end, const Epilogue<S>* epilogue) {
  pixel(v, x, w, bias, y, index, g, k, end, epilogue);
}

template <class S>
void direct_fprop(const Conv2dParams& p, const S* x, const S* w, const S* bias, S* y, int threads,
                  const Epilogue<S>* epilogue) {
  run_view(fprop_view(p), x, w, bias, y, threads, epilogue);
}

template <class S>
void direct_dgrad(const Conv2dParams& p, S* dx, const S* w, const S* g, int threads) {
  for_each_dgrad_view(p, [&](const Conv2dView& v, int64_t w_offset, int64_t dx_offset) {
    run_view<S>(v, g, w + w_offset, nullptr, dx + dx_offset, threads, nullptr);
  });
}

template <class S>
void direct_wgrad(const Conv2dParams& p, const S* x, S* dw, const S* g, int threads) {
  using T = Compute<S>;
  const int64_t channels = p.C / p.G, taps = p.R * p.S, tasks = p.K * taps;
  threads = useful_threads(threads, p.N * p.P * p.Q * tasks * channels);
  parallel_for(
      threads, tasks,
      [&](int64_t task) {
        const int64_t k = task / taps, r = task / p.S % p.R, s = task % p.S, group = k / (p.K / p.G);
        const int64_t h0 = r * p.dilation_h - p.pad_h, w0 = s * p.dilation_w - p.pad_w;
        const Range rows = valid_outputs(p.P, p.H, p.stride_h, h0), columns = valid_outputs(p.Q, p.W, p.stride_w, w0);
        for (int64_t c = 0; c < channels; c += kBlock) {
          const int64_t block = min(kBlock, channels - c);
          T sums[kBlock] = {};
          for (int64_t n = 0; n < p.N; ++n) {
            T image[kBlock] = {};
            for (int64_t i = rows.first; i < rows.last; ++i) {
              const S* gp = g + n * p.y_n + i * p.y_h + k * p.y_c;
              const S* xp = x + n * p.x_n + (i * p.stride_h + h0) * p.x_h + w0 * p.x_w + (group * channels + c) * p.x_c;
              T row[kBlock] = {};
              for (int64_t q = columns.first; q < columns.last; ++q) {
                const T value = widen_one(gp[q * p.y_w]);
                const S* xq = xp + q * p.stride_w * p.x_w;
                for (int64_t j = 0; j < block; ++j) row[j] += value * widen_one(xq[j * p.x_c]);
              }
              for (int64_t j = 0; j < block; ++j) image[j] += row[j];
            }
            for (int64_t j = 0; j < block; ++j) sums[j] += image[j];
          }
          S* out = dw + k * p.w_k + c * p.w_c + r * p.w_r + s * p.w_s;
          for (int64_t j = 0; j < block; ++j) narrow_one(out + j * p.w_c, sums[j]);
        }
      },
      kDenormals<S>);
}

namespace {

template <class S>
void direct_bgrad(const Conv2dParams& p, const S* g, S* db, int threads) {
  using T = Compute<S>;
  constexpr int VL = kLanes<T>;
  threads = useful_threads(threads, p.N * p.P * p.Q * p.K);
  parallel_for(threads, ceil_div(p.K, VL), [&](int64_t task) {
    const int64_t k = task * VL, lanes = min(VL, p.K - k);
    // A row's sum is added to an image's, an image's to the total: the error grows with the levels, not with the
    // pixels.
    Vec<T> total{};
    for (int64_t n = 0; n < p.N; ++n) {
      Vec<T> image{};
      for (int64_t i = 0; i < p.P; ++i) {
        const S* gp = g + n * p.y_n + i * p.y_h + k;
        Vec<T> row{};
        if (lanes == VL)
          for (int64_t q = 0; q < p.Q; ++q) row += load_wide(gp + q * p.y_w);
        else
          for (int64_t q = 0; q < p.Q; ++q) row += load_wide(gp + q * p.y_w, lanes);
        image += row;
      }
      total += image;
    }
    store_narrow(db + k, total, lanes);
  });
}

template <class S>
const char* launch_fprop(const void* params, const Launch& l) {
  const Conv2dParams& p = *static_cast<const Conv2dParams*>(params);
  const Epilogue<S> epilogue(p, l);
  direct_fprop(p, static_cast<const S*>(l.operands[0]), static_cast<const S*>(l.operands[1]),
               static_cast<const S*>(l.operands[2]), static_cast<S*>(l.operands[3]), l.threads, epilogue.or_null());
  return nullptr;
}

template <class S>
const char* launch_dgrad(const void* params, const Launch& l) {
  direct_dgrad(*static_cast<const Conv2dParams*>(params), static_cast<S*>(l.operands[0]),
               static_cast<const S*>(l.operands[1]), static_cast<const S*>(l.operands[3]), l.threads);
  return nullptr;
}

template <class S>
const char* launch_wgrad(const void* params, const Launch& l) {
  direct_wgrad(*static_cast<const Conv2dParams*>(params), static_cast<const S*>(l.operands[0]),
               static_cast<S*>(l.operands[1]), static_cast<const S*>(l.operands[3]), l.threads);
  return nullptr;
}

template <class S>
const char* launch_bgrad(const void* params, const Launch& l) {
  direct_bgrad(*static_cast<const Conv2dParams*>(params), static_cast<const S*>(l.operands[3]),
               static_cast<S*>(l.operands[2]), l.threads);
  return nullptr;
}

}  // namespace

#define CNNFAST_INSTANTIATE(S)                                                                                   \
  template void direct_pixel<S>(const Conv2dView&, const S*, const S*, const S*, S*, int64_t, int64_t, int64_t,  \
                                int64_t, const Epilogue<S>*);                                                    \
  template void direct_fprop<S>(const Conv2dParams&, const S*, const S*, const S*, S*, int, const Epilogue<S>*); \
  template void direct_dgrad<S>(const Conv2dParams&, S*, const S*, const S*, int);                               \
  template void direct_wgrad<S>(const Conv2dParams&, const S*, S*, const S*, int);
CNNFAST_INSTANTIATE(float)
CNNFAST_INSTANTIATE(double)
CNNFAST_INSTANTIATE(BFloat16)
CNNFAST_INSTANTIATE(Float16)
#undef CNNFAST_INSTANTIATE

// For kernels of ISAs that have no direct one of their own (avx512_bf16/direct.h).
const char* direct_fprop_bf16(const void* params, const Launch& l) { return launch_fprop<BFloat16>(params, l); }
const char* direct_dgrad_bf16(const void* params, const Launch& l) { return launch_dgrad<BFloat16>(params, l); }

CNNFAST_KERNEL("conv2d_direct.fprop.f32", Conv2dParams, launch_fprop<float>, nullptr)
CNNFAST_KERNEL("conv2d_direct.fprop.f64", Conv2dParams, launch_fprop<double>, nullptr)
CNNFAST_KERNEL("conv2d_direct.fprop.bf16", Conv2dParams, launch_fprop<BFloat16>, nullptr)
CNNFAST_KERNEL("conv2d_direct.fprop.f16", Conv2dParams, launch_fprop<Float16>, nullptr)
CNNFAST_KERNEL("conv2d_direct.dgrad.f32", Conv2dParams, launch_dgrad<float>, nullptr)
CNNFAST_KERNEL("conv2d_direct.dgrad.f64", Conv2dParams, launch_dgrad<double>, nullptr)
CNNFAST_KERNEL("conv2d_direct.dgrad.bf16", Conv2dParams, launch_dgrad<BFloat16>, nullptr)
CNNFAST_KERNEL("conv2d_direct.dgrad.f16", Conv2dParams, launch_dgrad<Float16>, nullptr)
CNNFAST_KERNEL("conv2d_direct.wgrad.f32", Conv2dParams, launch_wgrad<float>, nullptr)
CNNFAST_KERNEL("conv2d_direct.wgrad.f64", Conv2dParams, launch_wgrad<double>, nullptr)
CNNFAST_KERNEL("conv2d_direct.wgrad.bf16", Conv2dParams, launch_wgrad<BFloat16>, nullptr)
CNNFAST_KERNEL("conv2d_direct.wgrad.f16", Conv2dParams, launch_wgrad<Float16>, nullptr)
CNNFAST_KERNEL("conv2d_direct.bgrad.f32", Conv2dParams, launch_bgrad<float>, nullptr)
CNNFAST_KERNEL("conv2d_direct.bgrad.f64", Conv2dParams, launch_bgrad<double>, nullptr)
CNNFAST_KERNEL("conv2d_direct.bgrad.bf16", Conv2dParams, launch_bgrad<BFloat16>, nullptr)
CNNFAST_KERNEL("conv2d_direct.bgrad.f16", Conv2dParams, launch_bgrad<Float16>, nullptr)

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
