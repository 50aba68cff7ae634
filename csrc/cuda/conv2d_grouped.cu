// Grouped 2-D convolution with 4, 8, 16 or 32 channels a group, as many out as in, on tensor cores (sm_80 mma.sync),
// bf16, f16, and f32 in tf32 or as three products of tf32 (tf32x3); forward and the input's gradient.
// (The weight's gradient is in conv2d_grouped_weights.cu.)
//
//   fprop  y[m, k]  = b[k] + sum_{tap, c of k's group} x[m moved by tap, c] w[k, c, tap]
//   dgrad  dx[m, c] =        sum_{tap, k of c's group} dy[m moved by tap, k] w[k, c, tap]    m of a parity class
//
// Both are one kernel, a correlation (conv2d_axes.h). A GEMM a group would fill a tile of 64 columns with 4 to 32; here
// a product of tensor cores is as narrow as a group: 16 positions x 8 output channels, its depth the channels of one
// tap, or of two where a group has but 8 (conv2d_grouped.h). Groups of 4 go in pairs, one matrix with zeros beside the
// diagonal: half of the products are in vain, which such layers, bound by memory, don't feel.
//
// Mapping: a block computes the super-groups of 128 bytes of channels for several tiles of up to 128 positions, one
// after the other: the weights are laid out once in shared memory, as the tensor cores take them, and each tile's patch
// of the input is staged by cp.async while the one before is multiplied. A warp owns one super-group and a part of the
// positions. Layout NHWC, dense and 16-byte aligned, weights with any strides. Accumulator f32, bias and epilogue
// (conv_bn_act) applied to it, one rounding at the end. Memory offsets are 64-bit; pixels are numbered in 32 bits.
//
// Where a result of paired groups isn't finite it is summed again directly: an infinity times a zero beside the
// diagonal is NaN, and would spread from one group to the other.
#include "../common/kernel_table.h"
#include "conv2d_grouped.h"
#include "epilogue.h"
#include "primitives/launch.h"

namespace cnnfast::cuda {
namespace {

using namespace grouped;

constexpr size_t kMostShared = kPatchPixels * kSlices * sizeof(Vector) + 40960;

struct alignas(8) Fragment {
  uint32_t b[2];
};

// Where a slice of the depth lies: its tap's distance from a position in the patch, and its place in the super-group.
struct alignas(8) Depth {
  int pixel, slice;
};

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T v[2];
};

// The correlation that a block computes.
struct Correlation {
  Axis ah, aw;
  int channels;  // of all groups, in and out
  int64_t w_k, w_c, w_r, w_s;

  __device__ __forceinline__ int taps() const { return ah.taps * aw.taps; }
  __device__ __forceinline__ int64_t weight(int k, int c, int tap_r, int tap_s) const {
    return k * w_k + c * w_c + (ah.tap_first + tap_r * ah.tap_step) * w_r + (aw.tap_first + tap_s * aw.tap_step) * w_s;
  }
};

// Lays out the weights of a chunk: [super-group][columns of 8][pair of slices][lane]; zeros beside a group's own.
template <class Shape, bool kForward>
__device__ __forceinline__ void lay_out_weights(const Correlation& c,
                                                const typename Shape::Element* __restrict__ weight, int channel0,
                                                int pairs, Fragment* fragments) {
  using T = typename Shape::Element;
  constexpr int kElements = 4 / sizeof(T);  // of a register
  uint32_t* to = reinterpret_cast<uint32_t*>(fragments);
  for (int i = threadIdx.x; i < Shape::kSupers * Shape::kColumns * pairs * 64; i += kThreads) {
    const int lane = i / 2 % 32, rest = i / 64, slice = rest % pairs * 2 + i % 2, columns = rest / pairs;
    const int tap = slice / Shape::kSuperSlices, tap_r = tap / (c.aw.taps > 0 ? c.aw.taps : 1);
    const int first = channel0 + columns / Shape::kColumns * Shape::kSuper;  // channel of the super-group
    const int out = columns % Shape::kColumns * 8 + lane / 4;
    struct alignas(4) Register {
      T v[kElements];
    } value;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const int in = slice % Shape::kSuperSlices * Shape::kVector + lane % 4 * kElements + e;
      const bool present = tap < c.taps() && in / Shape::kGroup == out / Shape::kGroup && first + in < c.channels &&
                           first + out < c.channels;
      const int k = first + (kForward ? out : in), channel = (kForward ? in : out) % Shape::kGroup;
      value.v[e] = present ? weight[c.weight(k, channel, tap_r, tap - tap_r * c.aw.taps)] : Numeric<T>::narrow(0.0f);
    }
    memcpy(&to[i], &value, sizeof value);
  }
}

// One result as a direct sum.
template <class Shape, bool kForward>
__device__ __forceinline__ float direct(const Correlation& c, const typename Shape::Element* __restrict__ input,
                                        const typename Shape::Element* __restrict__ weight, int n, int row, int column,
                                        int out) {
  using N = Numeric<typename Shape::Element>;
  const int first = out / Shape::kGroup * Shape::kGroup;
  float sum = 0.0f;
#pragma unroll 1
  for (int r = 0; r < c.ah.taps; ++r)
#pragma unroll 1
    for (int s = 0; s < c.aw.taps; ++s) {
      const int h = c.ah.in_first + row * c.ah.in_step + r * c.ah.in_tap;
      const int w = c.aw.in_first + column * c.aw.in_step + s * c.aw.in_tap;
      if (h < 0 || h >= c.ah.in_size || w < 0 || w >= c.aw.in_size) continue;
      const auto* from = input + ((int64_t{n} * c.ah.in_size + h) * c.aw.in_size + w) * c.channels + first;
#pragma unroll 1
      for (int in = 0; in < Shape::kGroup; ++in)
        sum += N::widen(from[in]) *
               N::widen(weight[kForward ? c.weight(out, in, r, s) : c.weight(first + in, out - first, r, s)]);
    }
  return sum;
}

template <class Shape, Direction direction>
__global__ void __launch_bounds__(kThreads, 2)
    correlate(const Conv2dParams p, const Tiling t, const typename Shape::Element* __restrict__ input,
              const typename Shape::Element* __restrict__ weight, const typename Shape::Element* __restrict__ bias,
              typename Shape::Element* __restrict__ output, const Epilogue<typename Shape::Element> epilogue) {
  using T = typename Shape::Element;
  constexpr bool forward = direction == Direction::fprop;
  CNNFAST_DYNAMIC_SHARED(Vector, shared);
  CNNFAST_SHARED(Depth, depths, [kMostSlices]);
  CNNFAST_SHARED(int, positions, [kRows]);  // of a tile: row * 256 + column, -1 beyond the last
  Fragment* fragments = reinterpret_cast<Fragment*>(shared + t.buffers * t.patch_vectors());

  unsigned rest = blockIdx.x;
  const int channel0 = static_cast<int>(rest % t.chunks) * Shape::kChannels;
  rest /= t.chunks;
  const int classes = t.classes_h * t.classes_w, klass = static_cast<int>(rest % classes);
  const int block = static_cast<int>(rest / classes);
  Correlation c;
  c.ah = forward ? fprop_axis(p.P, p.H, p.R, p.stride_h, p.pad_h, p.dilation_h)
                 : dgrad_axis(klass / t.classes_w, p.H, p.P, p.R, p.stride_h, p.pad_h, p.dilation_h);
  c.aw = forward ? fprop_axis(p.Q, p.W, p.S, p.stride_w, p.pad_w, p.dilation_w)
                 : dgrad_axis(klass % t.classes_w, p.W, p.Q, p.S, p.stride_w, p.pad_w, p.dilation_w);
  c.channels = static_cast<int>(p.C);
  c.w_k = p.w_k, c.w_c = p.w_c, c.w_r = p.w_r, c.w_s = p.w_s;

  TilePlace at(t, block);
  stage_patch(shared, input, t, at, c.ah, c.aw, channel0, c.channels);
  copy_async_commit();
  const int slices = c.taps() * Shape::kSuperSlices, pairs = (slices + 1) / 2;
  lay_out_weights<Shape, forward>(c, weight, channel0, pairs, fragments);
  for (int i = threadIdx.x; i < pairs * 2; i += kThreads) {
    const int slice = i < slices ? i : slices - 1, tap = slice / Shape::kSuperSlices, tap_r = tap / c.aw.taps;
    depths[i] = {
        (tap_r * c.ah.in_tap - lowest(c.ah)) * t.patch_columns + (tap - tap_r * c.aw.taps) * c.aw.in_tap - lowest(c.aw),
        slice % Shape::kSuperSlices};
  }
  for (int i = threadIdx.x; i < kRows; i += kThreads) {
    const int row = i / t.columns;
    positions[i] = row < t.rows ? row * 256 + i - row * t.columns : -1;
  }
  __syncthreads();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int super = warp % Shape::kSupers, first_row = warp / Shape::kSupers * Shape::kMmaRows * 16;
  int pixel[Shape::kMmaRows];  // of this lane's row of ldmatrix under tap 0
#pragma unroll
  for (int i = 0; i < Shape::kMmaRows; ++i) {
    const int position = positions[first_row + i * 16 + lane % 16];
    pixel[i] = position < 0 ? 0 : position / 256 * c.ah.in_step * t.patch_columns + position % 256 * c.aw.in_step;
  }
  const Fragment* own = fragments + super * Shape::kColumns * pairs * 32 + lane;
  const Activate<float> act(epilogue.act);
  const bool changed = bias || !epilogue.identity();  // the sums, before they are stored
  const int out_height = static_cast<int>(forward ? p.P : p.H), out_width = static_cast<int>(forward ? p.Q : p.W);

  int buffer = 0;
  for (int tile = block; tile < t.tiles(); tile += t.blocks) {
    const int next = tile + t.blocks;
    const TilePlace next_at(t, next < t.tiles() ? next : tile);
    if (t.buffers == 2) {
      if (next < t.tiles())
        stage_patch(shared + (buffer ^ 1) * t.patch_vectors(), input, t, next_at, c.ah, c.aw, channel0, c.channels);
      copy_async_commit();
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();  // the patch is complete

    const Vector* patch = shared + buffer * t.patch_vectors();
    float sums[Shape::kMmaRows][Shape::kColumns][4] = {};
    for (int pair = 0; pair < pairs; ++pair) {
      const Depth depth = depths[pair * 2 + lane / 16];
      uint32_t b[Shape::kColumns][2];
#pragma unroll
      for (int j = 0; j < Shape::kColumns; ++j) {
        const Fragment fragment = own[(j * pairs + pair) * 32];
        b[j][0] = fragment.b[0];
        b[j][1] = fragment.b[1];
      }
#pragma unroll
      for (int i = 0; i < Shape::kMmaRows; ++i) {
        uint32_t a[4];
        ldmatrix_x4(a, patch + place(pixel[i] + depth.pixel, super * Shape::kSuperSlices + depth.slice));
        if (pair * 2 + 1 == slices) a[2] = a[3] = 0;  // there is no second slice: nothing times 0, not what is there
#pragma unroll
        for (int j = 0; j < Shape::kColumns; ++j) multiply(typename Shape::Math{}, sums[i][j], a, b[j]);
      }
    }
    __syncthreads();  // everybody has read the patch
    if (t.buffers == 1) {
      if (next < t.tiles()) stage_patch(shared, input, t, next_at, c.ah, c.aw, channel0, c.channels);
      copy_async_commit();
    } else {
      buffer ^= 1;
    }

#pragma unroll
    for (int i = 0; i < Shape::kMmaRows; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int position = positions[first_row + i * 16 + half * 8 + lane / 4];
        const int row = at.row + position / 256, column = at.column + position % 256;
        if (position < 0 || row >= c.ah.positions || column >= c.aw.positions) continue;
        const int64_t line = int64_t{at.n} * out_height + c.ah.out_first + row * c.ah.out_step;
        const int64_t target = (line * out_width + c.aw.out_first + column * c.aw.out_step) * c.channels;
#pragma unroll
        for (int j = 0; j < Shape::kColumns; ++j) {
          const int channel = channel0 + super * Shape::kSuper + j * 8 + lane % 4 * 2;
          if (channel >= c.channels) continue;
          Pair<T> residual{}, result;
          if (forward && epilogue.residual)
            residual = *reinterpret_cast<const Pair<T>*>(epilogue.residual + target + channel);
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float sum = sums[i][j][half * 2 + e];
            if (Shape::kGroup < 8 && !is_finite(sum))
              sum = direct<Shape, forward>(c, input, weight, at.n, row, column, channel + e);
            if (forward && changed) {
              if (bias) sum += Numeric<T>::widen(bias[channel + e]);
              if (epilogue.scale) sum *= epilogue.scale[channel + e];
              if (epilogue.shift) sum += epilogue.shift[channel + e];
              if (epilogue.residual) sum += Numeric<T>::widen(residual.v[e]);
              sum = act(sum);
            }
            result.v[e] = Numeric<T>::narrow(sum);
          }
          *reinterpret_cast<Pair<T>*>(output + target + channel) = result;
        }
      }
    at = next_at;
  }
}

template <class Math, int kGroup, Direction direction>
const char* launch_shape(const Conv2dParams& p, const Launch& run) {
  using S = Shape<Math, kGroup>;
  using T = typename S::Element;
  constexpr bool forward = direction == Direction::fprop;
  Tiling t = tiling_of(p, direction, S::kChannels);
  if (t.tiles() == 0 || t.chunks == 0) return nullptr;
  const int64_t sets = int64_t{t.chunks} * t.classes_h * t.classes_w;  // of weights
  t.blocks = static_cast<int>(
      std::min<int64_t>(t.tiles(), std::max(ceil_div(t.tiles(), kTilesABlock), ceil_div(2 * processors(), sets))));
  const int pairs = (t.taps * S::kSuperSlices + 1) / 2;
  const size_t bytes = t.buffers * t.patch_vectors() * sizeof(Vector) +
                       static_cast<size_t>(S::kSupers) * S::kColumns * pairs * 32 * sizeof(Fragment);
  const T *x = static_cast<const T*>(run.operands[0]), *y = static_cast<const T*>(run.operands[3]);
  return launch<correlate<S, direction>, kMostShared>(
      dim3(static_cast<unsigned>(t.blocks * sets), 1, 1), dim3(kThreads, 1, 1), bytes, run.stream, p, t,
      forward ? x : y, static_cast<const T*>(run.operands[1]),
      forward ? static_cast<const T*>(run.operands[2]) : nullptr, const_cast<T*>(forward ? y : x), Epilogue<T>(p, run));
}

template <class Math, Direction direction>
const char* launch_correlate(const void* params, const Launch& run) {
  const auto& p = *static_cast<const Conv2dParams*>(params);
  switch (p.C / p.G) {
    case 4:
      return launch_shape<Math, 4, direction>(p, run);
    case 8:
      return launch_shape<Math, 8, direction>(p, run);
    case 16:
      return launch_shape<Math, 16, direction>(p, run);
    default:
      return launch_shape<Math, 32, direction>(p, run);
  }
}

}  // namespace

CNNFAST_KERNEL("conv2d_grouped.fprop.bf16", Conv2dParams, (launch_correlate<Half<__nv_bfloat16>, Direction::fprop>),
               nullptr)
CNNFAST_KERNEL("conv2d_grouped.fprop.f16", Conv2dParams, (launch_correlate<Half<__half>, Direction::fprop>), nullptr)
CNNFAST_KERNEL("conv2d_grouped.fprop.f32.tf32", Conv2dParams, (launch_correlate<Tf32, Direction::fprop>), nullptr)
CNNFAST_KERNEL("conv2d_grouped.fprop.f32.tf32x3", Conv2dParams, (launch_correlate<Tf32x3, Direction::fprop>), nullptr)
CNNFAST_KERNEL("conv2d_grouped.dgrad.bf16", Conv2dParams, (launch_correlate<Half<__nv_bfloat16>, Direction::dgrad>),
               nullptr)
CNNFAST_KERNEL("conv2d_grouped.dgrad.f16", Conv2dParams, (launch_correlate<Half<__half>, Direction::dgrad>), nullptr)
CNNFAST_KERNEL("conv2d_grouped.dgrad.f32.tf32", Conv2dParams, (launch_correlate<Tf32, Direction::dgrad>), nullptr)
CNNFAST_KERNEL("conv2d_grouped.dgrad.f32.tf32x3", Conv2dParams, (launch_correlate<Tf32x3, Direction::dgrad>), nullptr)

}  // namespace cnnfast::cuda
