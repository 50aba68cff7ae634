// Direct 2-D convolution: every stride, padding, dilation and group count, in f32, f64, bf16 and f16; forward
// and the input's gradient. (The gradients of weights and bias are in conv2d_direct_weights.cu.)
//
//   fprop  y[n,k,p,q]  = b[k] + sum_{r,s,c} x[n, h, w, c] w[k,c,r,s]     h = p*stride - pad + r*dilation, w likewise
//   dgrad  dx[n,c,h,w] = sum_{r,s,k} dy[n, p, q, k] w[k,c,r,s]           over the p, q, r, s that meet at h, w
//
// Both directions here are one kernel, a correlation: outputs at regular positions, each a sum over taps and channels.
// For dgrad the positions of dx fall into stride_h * stride_w parity classes; within a class the same taps contribute,
// at regular distances, so that each class is a dense correlation without the zeros of an upsampled dy.
//
// Mapping: a block computes 64 positions x 32 channels of one group (and class), 4 x 4 a thread, over taps and channels
// in steps of 16 through shared memory; where the grid would be too large blocks take several tiles. Layout:
// activations NHWC, weights with any strides. Accumulator f32 (f64 for f64), in two levels; the epilogue (conv_bn_act)
// is applied to it, one rounding at the end.
// Memory offsets are 64-bit, coordinates within an image 32-bit.
#include "../common/kernel_table.h"
#include "conv2d_axes.h"
#include "conv2d_tile.h"
#include "epilogue.h"
#include "primitives/cuda.h"
#include "primitives/launch.h"
#include "primitives/numeric.h"

namespace cnnfast::cuda {
namespace {

using tile::kColumns;
using tile::kDepth;
using tile::kRows;
using tile::kThreads;

constexpr int kStepsATerm = 2;  // sums of 2 * kDepth products are added to the total as one term: less rounding error

// How the output is cut into tiles; the same for the launcher and the kernel.
struct Tiling {
  int classes_h, classes_w;
  int64_t row_tiles, column_tiles;  // of the largest class; of a group

  Tiling(const Conv2dParams& p, Direction direction) {
    const Classes classes(p, direction);
    classes_h = classes.h;
    classes_w = classes.w;
    row_tiles = ceil_div(p.N * classes.positions, kRows);
    column_tiles = ceil_div((direction == Direction::fprop ? p.K : p.C) / p.G, kColumns);
  }
  __host__ __device__ int64_t tiles(const Conv2dParams& p) const {
    return row_tiles * column_tiles * p.G * classes_h * classes_w;
  }
};

// An output position of the tile: what its first tap reads, and where the result goes.
struct Row {
  int64_t in, out, residual;
  int h, w;  // of the first tap, perhaps outside of the input
  bool present;
};

// Bounds the registers: 128 a thread, 168 for f64.
template <class T>
constexpr int kBlocksPerProcessor = sizeof(T) == 8 ? 3 : 4;

template <class T, Direction direction>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<T>)
    correlate(const Conv2dParams p, const Tiling tiling, const T* __restrict__ input, const T* __restrict__ weight,
              const T* __restrict__ bias, T* __restrict__ output, const Epilogue<T> epilogue) {
  using Acc = Accumulator<T>;
  constexpr bool forward = direction == Direction::fprop;
  CNNFAST_SHARED(tile::SharedA<Acc>, a, );
  CNNFAST_SHARED(tile::SharedB<Acc>, b, );
  CNNFAST_SHARED(Row, rows, [kRows]);

  const int t = threadIdx.x;
  const int64_t in_n = forward ? p.x_n : p.y_n, in_h = forward ? p.x_h : p.y_h, in_w = forward ? p.x_w : p.y_w;
  const int64_t out_n = forward ? p.y_n : p.x_n, out_h = forward ? p.y_h : p.x_h, out_w = forward ? p.y_w : p.x_w;
  const int channels = static_cast<int>((forward ? p.C : p.K) / p.G);  // summed over
  const int columns = static_cast<int>((forward ? p.K : p.C) / p.G);   // computed
  const int64_t w_channel = forward ? p.w_c : p.w_k, w_column = forward ? p.w_k : p.w_c;

  const int64_t tiles = tiling.tiles(p);
  for (int64_t tile_index = blockIdx.x; tile_index < tiles; tile_index += gridDim.x) {
    int64_t rest = tile_index;
    const int column0 = static_cast<int>(rest % tiling.column_tiles) * kColumns;
    rest /= tiling.column_tiles;
    const int group = static_cast<int>(rest % p.G);
    rest /= p.G;
    const int64_t row0 = rest % tiling.row_tiles * kRows;
    const int klass = static_cast<int>(rest / tiling.row_tiles);

    const Axis ah = forward ? fprop_axis(p.P, p.H, p.R, p.stride_h, p.pad_h, p.dilation_h)
                            : dgrad_axis(klass / tiling.classes_w, p.H, p.P, p.R, p.stride_h, p.pad_h, p.dilation_h);
    const Axis aw = forward ? fprop_axis(p.Q, p.W, p.S, p.stride_w, p.pad_w, p.dilation_w)
                            : dgrad_axis(klass % tiling.classes_w, p.W, p.Q, p.S, p.stride_w, p.pad_w, p.dilation_w);
    const int64_t pixels = int64_t{p.N} * ah.positions * aw.positions;
    if (row0 >= pixels) continue;  // a smaller class; the whole block goes on

    if (t < kRows) {
      const int64_t pixel = row0 + t;
      Row row{0, 0, 0, 0, 0, pixel < pixels};
      if (row.present) {
        const int j = static_cast<int>(pixel % aw.positions);
        const int64_t line = pixel / aw.positions;
        const int i = static_cast<int>(line % ah.positions);
        const int64_t n = line / ah.positions;
        row.h = ah.in_first + i * ah.in_step;
        row.w = aw.in_first + j * aw.in_step;
        row.in = n * in_n + row.h * in_h + row.w * in_w;
        row.out = n * out_n + (ah.out_first + int64_t{i} * ah.out_step) * out_h +
                  (aw.out_first + int64_t{j} * aw.out_step) * out_w;
        row.residual = n * p.r_n + i * p.r_h + j * p.r_w;
      }
      rows[t] = row;
    }
    __syncthreads();

    // Thread t stages depth t % 16 of every step, for 8 rows and 4 columns: neighbouring threads read neighbouring
    // channels.
    const int depth = t % kDepth;
    Odometer at;
    at.advance(depth, channels, aw.taps > 0 ? aw.taps : 1);
    const T* in_group = input + int64_t{group} * channels;
    const T* w_group = weight + (forward ? int64_t{group} * columns * p.w_k : int64_t{group} * channels * p.w_k) +
                       ah.tap_first * p.w_r + aw.tap_first * p.w_s;

    tile::Results<Acc> total, sum;
    total.clear();
    sum.clear();
    const int64_t steps = ceil_div(int64_t{ah.taps} * aw.taps * channels, kDepth);
    for (int64_t step = 0; step < steps; ++step) {
      const bool inside = at.r < ah.taps;
      const int dh = at.r * ah.in_tap, dw = at.s * aw.in_tap;
      const int64_t in_offset = dh * in_h + dw * in_w + at.c;
#pragma unroll
      for (int i = 0; i < kRows * kDepth / kThreads; ++i) {
        const int row = t / kDepth + i * (kThreads / kDepth);
        const Row& from = rows[row];
        const bool valid = inside && from.present &&
                           static_cast<unsigned>(from.h + dh) < static_cast<unsigned>(ah.in_size) &&
                           static_cast<unsigned>(from.w + dw) < static_cast<unsigned>(aw.in_size);
        a[depth][row] = valid ? Numeric<T>::widen(in_group[from.in + in_offset]) : Acc(0);
      }
      const T* w_step =
          w_group + at.c * w_channel + int64_t{at.r} * ah.tap_step * p.w_r + int64_t{at.s} * aw.tap_step * p.w_s;
#pragma unroll
      for (int i = 0; i < kColumns * kDepth / kThreads; ++i) {
        const int column = t / kDepth + i * (kThreads / kDepth);
        const bool valid = inside && column0 + column < columns;
        b[depth][column] = valid ? Numeric<T>::widen(w_step[(column0 + column) * w_column]) : Acc(0);
      }
      at.advance(kDepth, channels, aw.taps);
      __syncthreads();
      sum.multiply(a, b, tile::first_row(t), tile::first_column(t));
      __syncthreads();
      if ((step + 1) % kStepsATerm == 0 || step + 1 == steps) {
        total.add(sum);
        sum.clear();
      }
    }

#pragma unroll
    for (int i = 0; i < tile::kPerThread; ++i) {
      const Row& to = rows[tile::first_row(t) + i];
#pragma unroll
      for (int j = 0; j < tile::kPerThread; ++j) {
        const int column = column0 + tile::first_column(t) + j;
        if (!to.present || column >= columns) continue;
        const int64_t channel = int64_t{group} * columns + column;
        Acc result = total.v[i][j];
        if constexpr (forward) {
          if (bias) result += Numeric<T>::widen(bias[channel]);
          if (epilogue.scale) result *= epilogue.scale[channel];
          if (epilogue.shift) result += epilogue.shift[channel];
          if (epilogue.residual) result += Numeric<T>::widen(epilogue.residual[to.residual + channel]);
          result = Activate<Acc>(epilogue.act)(result);
        }
        output[to.out + channel] = Numeric<T>::narrow(result);
      }
    }
    __syncthreads();  // the next tile overwrites rows
  }
}

template <class T, Direction direction>
const char* launch_correlate(const void* params, const Launch& run) {
  const auto& p = *static_cast<const Conv2dParams*>(params);
  constexpr bool forward = direction == Direction::fprop;
  const Tiling tiling(p, direction);
  const int64_t tiles = tiling.tiles(p);
  if (tiles == 0) return nullptr;
  const T* x = static_cast<const T*>(run.operands[0]);
  const T* w = static_cast<const T*>(run.operands[1]);
  const T* b = static_cast<const T*>(run.operands[2]);
  const T* y = static_cast<const T*>(run.operands[3]);
  return launch<correlate<T, direction>>(grid_for(tiles), dim3(kThreads, 1, 1), 0, run.stream, p, tiling,
                                         forward ? x : y, w, forward ? b : nullptr, const_cast<T*>(forward ? y : x),
                                         Epilogue<T>(p, run));
}

}  // namespace

CNNFAST_KERNEL("conv2d_direct.fprop.f32", Conv2dParams, (launch_correlate<float, Direction::fprop>), nullptr)
CNNFAST_KERNEL("conv2d_direct.fprop.f64", Conv2dParams, (launch_correlate<double, Direction::fprop>), nullptr)
CNNFAST_KERNEL("conv2d_direct.fprop.bf16", Conv2dParams, (launch_correlate<__nv_bfloat16, Direction::fprop>), nullptr)
CNNFAST_KERNEL("conv2d_direct.fprop.f16", Conv2dParams, (launch_correlate<__half, Direction::fprop>), nullptr)
CNNFAST_KERNEL("conv2d_direct.dgrad.f32", Conv2dParams, (launch_correlate<float, Direction::dgrad>), nullptr)
CNNFAST_KERNEL("conv2d_direct.dgrad.f64", Conv2dParams, (launch_correlate<double, Direction::dgrad>), nullptr)
CNNFAST_KERNEL("conv2d_direct.dgrad.bf16", Conv2dParams, (launch_correlate<__nv_bfloat16, Direction::dgrad>), nullptr)
CNNFAST_KERNEL("conv2d_direct.dgrad.f16", Conv2dParams, (launch_correlate<__half, Direction::dgrad>), nullptr)

}  // namespace cnnfast::cuda
