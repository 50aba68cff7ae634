// Depthwise 2-D convolution (one filter a channel), every filter, stride, padding and dilation, in f32, f64, bf16 and
// f16; forward and the input's gradient. (The weights' gradient is in conv2d_depthwise_weights.cu.)
//
//   fprop  y[n,p,q,c]  = b[c] + sum_{r,s} x[n, h, w, c] w[c,r,s]     h = p*stride - pad + r*dilation, w likewise
//   dgrad  dx[n,h,w,c] = sum_{r,s} dy[n, p, q, c] w[c,r,s]           over the p, q, r, s that meet at h, w
//
// Without stride dgrad is fprop with the filter turned round. With stride each row and column of dx finds the taps that
// meet it by a remainder.
//
// Mapping: neighbouring threads take neighbouring channels, 16 bytes of them, and four neighbouring columns of the
// result; a block is 32 packs of channels at most by the column groups that 256 threads have room for (pixels.h). Its
// channels' filters lie in shared memory, by taps, beside what the epilogue (conv_bn_act) has for them; whether there
// is a residual is a uniform branch. For filters 3, 5 and 7 wide a thread reads each column of its row of the image
// once and keeps it in registers for all taps. Layout: activations NHWC, any pixel strides, weights any; where sizes,
// strides or addresses don't allow packs a thread takes one channel. Accumulator f32 (f64 for f64), one rounding at the
// end. Memory offsets are 64-bit.
#include <type_traits>

#include "../common/kernel_table.h"
#include "epilogue.h"
#include "pixels.h"
#include "primitives/cuda.h"
#include "primitives/launch.h"
#include "primitives/numeric.h"

namespace cnnfast::cuda {
namespace {

constexpr int kThreads = 256;
// Columns of a thread: as many as there are registers for. filter: its width where that is known to the compiler, as
// stride then is, and there is no dilation; else 0.
template <int width, int filter, int stride>
constexpr int kColumns = width == 8 && filter * stride > 3 ? 2 : 4;
constexpr size_t kSharedBytes = 48 * 1024;  // of filters
constexpr int kLanes = 32;                  // packs of channels a block, at most
constexpr int64_t kBlocks = 1024;
constexpr int64_t kMostGroups = 8;  // of columns, a thread

// A correlation from the image `in` (H x W) to `out` (P x Q), whose columns are taken in groups. `flipped`: the
// filter's last tap comes first. `r`: the residual.
struct Correlation {
  int H, W, P, Q, R, S;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  Strides in, out, r;
  int64_t w_c, w_r, w_s;
  bool flipped;
  int groups = 0;
};

// The filters of a tile of channels: pack [tap][lane].
template <class T, int width>
__device__ __forceinline__ void stage_filters(const Correlation& c, const Shares& shares, int64_t first_pack,
                                              int64_t packs, const T* __restrict__ weight, T* filters) {
  const int taps = c.R * c.S, channels = shares.lanes * width;
  for (int i = threadIdx.x; i < taps * channels; i += kThreads) {
    const int channel = i / taps, tap = i - channel * taps, r = tap / c.S, s = tap - r * c.S;
    const int to = c.flipped ? taps - 1 - tap : tap;
    if (first_pack * width + channel < packs * width)
      filters[to * channels + channel] = weight[(first_pack * width + channel) * c.w_c + r * c.w_r + s * c.w_s];
  }
}

template <class T, int width, int filter, int stride>
struct Row {
  using Acc = Accumulator<T>;
  static constexpr int columns = kColumns<width, filter, stride>;

  // sums[i] += the products of row `line` of the image and the filter's row `taps` for columns q, q + 1, ...
  static __device__ __forceinline__ void add(const Correlation& c, const T* line, const Pack<T, width>* taps, int lanes,
                                             int q, Acc (&sums)[columns][width]) {
    if constexpr (filter > 0) {
      constexpr int reach = (columns - 1) * stride + filter;
      const int first = q * stride - c.pad_w;
      Pack<T, width> x[reach];
#pragma unroll
      for (int j = 0; j < reach; ++j) {
        const bool inside = static_cast<unsigned>(first + j) < static_cast<unsigned>(c.W);
        x[j] = inside ? load<T, width>(line + (first + j) * c.in.w) : Pack<T, width>{};
      }
#pragma unroll
      for (int s = 0; s < filter; ++s) {
        const Pack<T, width> tap = taps[s * lanes];
#pragma unroll
        for (int i = 0; i < columns; ++i) multiply(x[i * stride + s], tap, sums[i]);
      }
    } else {
      for (int s = 0; s < c.S; ++s) {
        const Pack<T, width> tap = taps[s * lanes];
#pragma unroll
        for (int i = 0; i < columns; ++i) {
          const int w = (q + i) * c.stride_w - c.pad_w + s * c.dilation_w;
          if (static_cast<unsigned>(w) < static_cast<unsigned>(c.W))
            multiply(load<T, width>(line + w * c.in.w), tap, sums[i]);
        }
      }
    }
  }

  static __device__ __forceinline__ void multiply(const Pack<T, width>& x, const Pack<T, width>& tap,
                                                  Acc (&sum)[width]) {
#pragma unroll
    for (int e = 0; e < width; ++e) sum[e] += Numeric<T>::widen(x.v[e]) * Numeric<T>::widen(tap.v[e]);
  }
};

// A group of columns of the result: its image, row and first column.
struct Group {
  int n, row, column;

  __device__ __forceinline__ Group(const Correlation& c, int columns, int i) {
    const int line = i / c.groups;
    column = (i - line * c.groups) * columns;
    n = line / c.P;
    row = line - n * c.P;
  }
};

// What the epilogue has for each channel of a tile; where an operand is absent, what changes nothing.
template <class T, int width>
struct Vectors {
  using Acc = Accumulator<T>;
  Pack<Acc, width> bias[kLanes], scale[kLanes], shift[kLanes];

  __device__ __forceinline__ void stage(const Shares& shares, int64_t first_pack, int64_t packs,
                                        const T* __restrict__ of_bias, const Epilogue<T>& epilogue) {
    const int64_t first = first_pack * width;
    for (int i = threadIdx.x; i < shares.lanes * width && first + i < packs * width; i += kThreads) {
      bias[i / width].v[i % width] = of_bias ? Numeric<T>::widen(of_bias[first + i]) : Acc(0);
      scale[i / width].v[i % width] = epilogue.scale ? epilogue.scale[first + i] : Acc(1);
      shift[i / width].v[i % width] = epilogue.shift ? epilogue.shift[first + i] : Acc(0);
    }
  }
};

// end(i): the results of column i.
template <class T, int width, int columns, class End>
__device__ __forceinline__ void store(const Correlation& c, const Group& group, int64_t pack, T* __restrict__ out,
                                      const End& end) {
  T* to = out + group.n * c.out.n + group.row * c.out.h + group.column * c.out.w;
#pragma unroll
  for (int i = 0; i < columns; ++i) {
    if (group.column + i >= c.Q) break;
    pack_of<T, width>(to + i * c.out.w, pack) = end(i);
  }
}

template <class T, int width>
__device__ __forceinline__ Pack<T, width> narrow(const Accumulator<T> (&sum)[width]) {
  Pack<T, width> result;
#pragma unroll
  for (int e = 0; e < width; ++e) result.v[e] = Numeric<T>::narrow(sum[e]);
  return result;
}

// act comes from the launcher: its bounds are constants of the launch, not registers.
template <class T, int width, int filter, int stride>
__global__ void __launch_bounds__(kThreads, 2)
    correlate(const Correlation c, const Shares shares, const int64_t packs, const int count, const T* __restrict__ in,
              const T* __restrict__ weight, const T* __restrict__ bias, T* __restrict__ out, const Epilogue<T> epilogue,
              const Activate<Accumulator<T>> act) {
  constexpr int columns = kColumns<width, filter, stride>;
  using Acc = Accumulator<T>;
  using VectorsOfTile = Vectors<T, width>;
  CNNFAST_DYNAMIC_SHARED(T, filters);
  CNNFAST_SHARED(VectorsOfTile, vectors, );
  for (int64_t item = blockIdx.x; item < shares.count(); item += gridDim.x) {
    const Share share(shares, item, threadIdx.x, packs, count);
    const int lane = static_cast<int>(threadIdx.x) - share.row * shares.lanes;
    stage_filters<T, width>(c, shares, share.pack - lane, packs, weight, filters);
    vectors.stage(shares, share.pack - lane, packs, bias, epilogue);
    __syncthreads();
    const Pack<T, width>* taps = reinterpret_cast<const Pack<T, width>*>(filters) + lane;
    for (int i = share.first; share.present && i < share.end; i += shares.rows) {
      const Group group(c, columns, i);
      Accumulator<T> sums[columns][width] = {};
      const T* image = in + group.n * c.in.n + share.pack * width;
      for (int r = 0; r < c.R; ++r) {
        const int h = group.row * c.stride_h - c.pad_h + r * c.dilation_h;
        if (static_cast<unsigned>(h) >= static_cast<unsigned>(c.H)) continue;
        Row<T, width, filter, stride>::add(c, image + h * c.in.h, taps + r * c.S * shares.lanes, shares.lanes,
                                           group.column, sums);
      }
      const Pack<Acc, width>&first = vectors.bias[lane], &scale = vectors.scale[lane], &shift = vectors.shift[lane];
      const int64_t residual = group.n * c.r.n + group.row * c.r.h + group.column * c.r.w + share.pack * width;
      store<T, width, columns>(c, group, share.pack, out, [&](int i) {
        Acc z[width];
#pragma unroll
        for (int e = 0; e < width; ++e) z[e] = scale.v[e] * (sums[i][e] + first.v[e]) + shift.v[e];
        if (epilogue.residual) {
          const Pack<T, width> plus = load<T, width>(epilogue.residual + residual + i * c.r.w);
#pragma unroll
          for (int e = 0; e < width; ++e) z[e] += Numeric<T>::widen(plus.v[e]);
        }
#pragma unroll
        for (int e = 0; e < width; ++e) z[e] = act(z[e]);
        return narrow<T, width>(z);
      });
    }
    __syncthreads();  // the next tile overwrites the filters
  }
}

// dgrad with stride: `in` is dy, `out` dx; stride_w: where it is known to the compiler, else 0. Registers for three
// blocks at once are enough.
template <class T, int width, int known_stride>
__global__ void __launch_bounds__(kThreads, 3)
    spread(const Correlation c, const Shares shares, const int64_t packs, const int count, const T* __restrict__ in,
           const T* __restrict__ weight, T* __restrict__ out) {
  constexpr int columns = kColumns<width, 0, 0>;
  CNNFAST_DYNAMIC_SHARED(T, filters);
  const int stride_w = known_stride ? known_stride : c.stride_w;
  for (int64_t item = blockIdx.x; item < shares.count(); item += gridDim.x) {
    const Share share(shares, item, threadIdx.x, packs, count);
    const int lane = static_cast<int>(threadIdx.x) - share.row * shares.lanes;
    stage_filters<T, width>(c, shares, share.pack - lane, packs, weight, filters);
    __syncthreads();
    const Pack<T, width>* taps = reinterpret_cast<const Pack<T, width>*>(filters) + lane;
    for (int i = share.first; share.present && i < share.end; i += shares.rows) {
      const Group group(c, columns, i);
      Accumulator<T> sums[columns][width] = {};
      const T* image = in + group.n * c.in.n + share.pack * width;
      for (int r = 0; r < c.R; ++r) {
        const int above = group.row + c.pad_h - r * c.dilation_h, p = above / c.stride_h;
        if (above < 0 || p >= c.H || p * c.stride_h != above) continue;
        const T* line = image + p * c.in.h;
        for (int s = 0; s < c.S; ++s) {
          const Pack<T, width> tap = taps[(r * c.S + s) * shares.lanes];
          const int before = group.column + c.pad_w - s * c.dilation_w;
#pragma unroll
          for (int j = 0; j < columns; ++j) {
            const int q = (before + j) / stride_w;
            if (before + j >= 0 && q < c.W && q * stride_w == before + j)
              Row<T, width, 0, 0>::multiply(load<T, width>(line + q * c.in.w), tap, sums[j]);
          }
        }
      }
      store<T, width, columns>(c, group, share.pack, out, [&](int i) { return narrow<T, width>(sums[i]); });
    }
    __syncthreads();  // the next tile overwrites the filters
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

int to_int(int64_t n) { return static_cast<int>(n); }

// Fewer lanes where filters are so large that those of 32 don't fit shared memory.
template <class T, int width>
Shares shares_of(int64_t count, int64_t packs, int taps) {
  const int64_t most = kSharedBytes / (taps * width * static_cast<int64_t>(sizeof(T)));
  return Shares(count, packs, kThreads, 1, kMostGroups, kBlocks, std::min<int64_t>(most, kLanes));
}

template <class T, int width>
const char* launch_of(Correlation c, int64_t images, int64_t channels, bool strided, const T* in, const T* weight,
                      const T* bias, T* out, const Epilogue<T>& epilogue, void* stream) {
  using std::integral_constant;
  const auto run = [&](auto filter, auto stride) {
    c.groups = to_int(ceil_div(c.Q, kColumns<width, filter.value, stride.value>));
    const int64_t packs = channels / width;
    const int count = to_int(images * c.P * c.groups);
    const Shares shares = shares_of<T, width>(count, packs, c.R * c.S);
    if (shares.count() == 0) return static_cast<const char*>(nullptr);
    const dim3 grid = grid_for(shares.count()), block(kThreads, 1, 1);
    const size_t bytes = static_cast<size_t>(c.R) * c.S * shares.lanes * width * sizeof(T);
    if constexpr (filter.value == 0)
      if (strided)
        return launch<spread<T, width, stride.value>, kSharedBytes>(grid, block, bytes, stream, c, shares, packs, count,
                                                                    in, weight, out);
    return launch<correlate<T, width, filter.value, filter.value ? stride.value : 0>, kSharedBytes>(
        grid, block, bytes, stream, c, shares, packs, count, in, weight, bias, out, epilogue,
        Activate<Accumulator<T>>(epilogue.act));
  };
  if (strided && c.stride_w == 2) return run(integral_constant<int, 0>{}, integral_constant<int, 2>{});
  if constexpr (width > 1 && sizeof(T) < sizeof(double)) {
    const int filter = strided || c.dilation_w != 1 ? 0 : c.S;
    if (filter == 3 && c.stride_w == 1) return run(integral_constant<int, 3>{}, integral_constant<int, 1>{});
    if (filter == 3 && c.stride_w == 2) return run(integral_constant<int, 3>{}, integral_constant<int, 2>{});
    if (filter == 5 && c.stride_w == 1) return run(integral_constant<int, 5>{}, integral_constant<int, 1>{});
    if (filter == 5 && c.stride_w == 2) return run(integral_constant<int, 5>{}, integral_constant<int, 2>{});
    if (filter == 7 && c.stride_w == 1) return run(integral_constant<int, 7>{}, integral_constant<int, 1>{});
  }
  return run(integral_constant<int, 0>{}, integral_constant<int, 0>{});
}

template <class T>
const char* launch_packed(const Correlation& c, const Conv2dParams& p, bool strided, const T* in, const T* weight,
                          const T* bias, T* out, const Epilogue<T>& epilogue, void* stream) {
  constexpr int width = kPackWidth<T>;
  const bool packed = p.C % width == 0 && takes_packs(in, c.in.all(), width, sizeof(T)) &&
                      takes_packs(out, c.out.all(), width, sizeof(T)) &&
                      takes_packs(epilogue.residual, c.r.all(), width, sizeof(T));
  return packed ? launch_of<T, width>(c, p.N, p.C, strided, in, weight, bias, out, epilogue, stream)
                : launch_of<T, 1>(c, p.N, p.C, strided, in, weight, bias, out, epilogue, stream);
}

template <class T>
const char* launch_fprop(const void* params, const Launch& run) {
  const auto& p = *static_cast<const Conv2dParams*>(params);
  const Correlation c{to_int(p.H),
                      to_int(p.W),
                      to_int(p.P),
                      to_int(p.Q),
                      to_int(p.R),
                      to_int(p.S),
                      to_int(p.stride_h),
                      to_int(p.stride_w),
                      to_int(p.pad_h),
                      to_int(p.pad_w),
                      to_int(p.dilation_h),
                      to_int(p.dilation_w),
                      {p.x_n, p.x_h, p.x_w},
                      {p.y_n, p.y_h, p.y_w},
                      {p.r_n, p.r_h, p.r_w},
                      p.w_k,
                      p.w_r,
                      p.w_s,
                      false};
  return launch_packed<T>(c, p, false, static_cast<const T*>(run.operands[0]), static_cast<const T*>(run.operands[1]),
                          static_cast<const T*>(run.operands[2]), static_cast<T*>(run.operands[3]), Epilogue<T>(p, run),
                          run.stream);
}

template <class T>
const char* launch_dgrad(const void* params, const Launch& run) {
  const auto& p = *static_cast<const Conv2dParams*>(params);
  const bool strided = p.stride_h != 1 || p.stride_w != 1;
  const Correlation c{to_int(p.P),
                      to_int(p.Q),
                      to_int(p.H),
                      to_int(p.W),
                      to_int(p.R),
                      to_int(p.S),
                      to_int(p.stride_h),
                      to_int(p.stride_w),
                      to_int(strided ? p.pad_h : (p.R - 1) * p.dilation_h - p.pad_h),
                      to_int(strided ? p.pad_w : (p.S - 1) * p.dilation_w - p.pad_w),
                      to_int(p.dilation_h),
                      to_int(p.dilation_w),
                      {p.y_n, p.y_h, p.y_w},
                      {p.x_n, p.x_h, p.x_w},
                      {p.r_n, p.r_h, p.r_w},
                      p.w_k,
                      p.w_r,
                      p.w_s,
                      !strided};
  return launch_packed<T>(c, p, strided, static_cast<const T*>(run.operands[3]), static_cast<const T*>(run.operands[1]),
                          nullptr, static_cast<T*>(run.operands[0]), Epilogue<T>(p, run), run.stream);
}

}  // namespace

CNNFAST_KERNEL("conv2d_depthwise.fprop.f32", Conv2dParams, launch_fprop<float>, nullptr)
CNNFAST_KERNEL("conv2d_depthwise.fprop.f64", Conv2dParams, launch_fprop<double>, nullptr)
CNNFAST_KERNEL("conv2d_depthwise.fprop.bf16", Conv2dParams, launch_fprop<__nv_bfloat16>, nullptr)
CNNFAST_KERNEL("conv2d_depthwise.fprop.f16", Conv2dParams, launch_fprop<__half>, nullptr)
CNNFAST_KERNEL("conv2d_depthwise.dgrad.f32", Conv2dParams, launch_dgrad<float>, nullptr)
CNNFAST_KERNEL("conv2d_depthwise.dgrad.f64", Conv2dParams, launch_dgrad<double>, nullptr)
CNNFAST_KERNEL("conv2d_depthwise.dgrad.bf16", Conv2dParams, launch_dgrad<__nv_bfloat16>, nullptr)
CNNFAST_KERNEL("conv2d_depthwise.dgrad.f16", Conv2dParams, launch_dgrad<__half>, nullptr)

}  // namespace cnnfast::cuda
