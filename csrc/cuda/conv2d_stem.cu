// The first convolution of a network, fprop with at most 4 input channels, on tensor cores (sm_80 mma.sync): bf16, f16,
// and f32 in tf32 or as three products of tf32 (tf32x3). (The weight's gradient is in conv2d_stem_weights.cu.)
//
//   y[m, k] = b[k] + sum_r sum_j patch[m moved by row r, j] w[k, r, j]     j = (s, c): taps across, 4 channels each
//
// Three channels are no vector. Here a block stages the patch of x under a tile of positions with 4 channels a pixel,
// the last of zeros: a row of taps under a position is then one run of memory, and the runs of neighbouring positions
// overlap in it, so that a row of the product's left side is read where it lies: 7 taps are 28 of 32 elements of depth.
//
// Mapping: a block computes up to 128 positions (conv2d_grouped.h) x 64 (f32: 32) filters for several tiles, one after
// the other; the filters are laid out once in shared memory, as the tensor cores take them. A warp has 32 positions x
// half of the filters. Layout: x and weights with any strides, y NHWC and dense.
// Accumulator f32, bias and epilogue (conv_bn_act) applied to it, one rounding at the end. Memory offsets are 64-bit;
// pixels are numbered in 32 bits.
#include "../common/kernel_table.h"
#include "conv2d_stem.h"
#include "epilogue.h"
#include "primitives/launch.h"

namespace cnnfast::cuda {
namespace {

using namespace grouped;

constexpr int kWeightBytes = 66 * 1024;
constexpr size_t kMostShared = kPatchBytes + kWeightBytes;
constexpr int kWarpRows = 2;  // products, 16 positions each

// The sizes that the compiler knows.
template <class Math_>
struct Stem {
  using Math = Math_;
  using Element = typename Math::Element;
  static constexpr int kElements = 4 / sizeof(Element);  // of a register
  static constexpr int kDepth = 8 * kElements;           // of a product
  static constexpr int kColumns = sizeof(Element) == 4 ? 32 : 64;
  static constexpr int kWarpColumns = kColumns / 2 / 8;  // products side by side, of a warp
  static constexpr int kWords = kPixel / kElements;      // registers of a pixel
};

struct alignas(8) Fragment {
  uint32_t b[2];
};

// Products after each other for a row of taps.
template <class S>
__host__ __device__ __forceinline__ int steps_of(int taps) {
  return (taps * kPixel + S::kDepth - 1) / S::kDepth;
}

// Lays out the weights: [row of taps][step][8 filters][lane].
template <class S>
__device__ __forceinline__ void lay_out_weights(const Conv2dParams& p, int filter0,
                                                const typename S::Element* __restrict__ weight, uint32_t* to) {
  using T = typename S::Element;
  const int taps = static_cast<int>(p.S), steps = steps_of<S>(taps);
  const int count = static_cast<int>(p.R) * steps * S::kColumns * 8;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int lane = i / 2 % 32, rest = i / 64, filter = filter0 + rest % (S::kColumns / 8) * 8 + lane / 4;
    const int row = rest / (S::kColumns / 8) / steps, step = rest / (S::kColumns / 8) - row * steps;
    struct alignas(4) Register {
      T v[S::kElements];
    } value;
#pragma unroll
    for (int e = 0; e < S::kElements; ++e) {
      const int depth = step * S::kDepth + i % 2 * (S::kDepth / 2) + lane % 4 * S::kElements + e;
      const int tap = depth / kPixel, c = depth % kPixel;
      const bool present = tap < taps && c < p.C && filter < p.K;
      value.v[e] = present ? weight[filter * p.w_k + c * p.w_c + row * p.w_r + tap * p.w_s] : Numeric<T>::narrow(0.0f);
    }
    memcpy(&to[i], &value, sizeof value);
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, 2)
    correlate(const Conv2dParams p, const Tiling t, const typename S::Element* __restrict__ x,
              const typename S::Element* __restrict__ weight, const typename S::Element* __restrict__ bias,
              typename S::Element* __restrict__ y, const bool paired, const Epilogue<typename S::Element> epilogue) {
  using T = typename S::Element;
  struct alignas(2 * sizeof(T)) Pair {
    T v[2];
  };
  CNNFAST_DYNAMIC_SHARED(uint32_t, shared);
  CNNFAST_SHARED(int, positions, [kRows]);  // of a tile: row * 256 + column, -1 beyond the last
  uint32_t *patch = shared, *weights = shared + t.patch_rows * t.patch_columns * S::kWords;

  const int filter0 = static_cast<int>(blockIdx.x % t.chunks) * S::kColumns, block = blockIdx.x / t.chunks;
  lay_out_weights<S>(p, filter0, weight, weights);
  for (int i = threadIdx.x; i < kRows; i += kThreads) {
    const int row = i / t.columns;
    positions[i] = row < t.rows ? row * 256 + i - row * t.columns : -1;
  }
  __syncthreads();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, member = lane % 4;
  const int first_row = warp % 4 * kWarpRows * 16, first_column = warp / 4 * S::kWarpColumns;
  int run[kWarpRows][2];  // where the run of a row of the product begins under the first row of taps, in words
#pragma unroll
  for (int i = 0; i < kWarpRows; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int position = positions[first_row + i * 16 + half * 8 + lane / 4];
      const int row = position / 256 * static_cast<int>(p.stride_h);
      const int column = position % 256 * static_cast<int>(p.stride_w);
      run[i][half] = position < 0 ? member : (row * t.patch_columns + column) * S::kWords + member;
    }
  const int rows = static_cast<int>(p.R), taps = static_cast<int>(p.S), steps = steps_of<S>(taps);
  const int line = t.patch_columns * S::kWords, end = taps * S::kWords;
  const Fragment* fragments = reinterpret_cast<const Fragment*>(weights) + first_column * 32 + lane;
  const Activate<float> act(epilogue.act);

  for (int tile = block; tile < t.tiles(); tile += t.blocks) {
    const TilePlace at(t, tile);
    stage_pixels(p, t, at, x, reinterpret_cast<T*>(patch));
    __syncthreads();
    float sums[kWarpRows][S::kWarpColumns][4] = {};
    for (int r = 0; r < rows; ++r)
      for (int step = 0; step < steps; ++step) {
        uint32_t a[kWarpRows][4];
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int word = step * 8 + e / 2 * 4;  // beyond the last tap: 0, not what is there times 0
            a[i][e] = word + member < end ? patch[run[i][e % 2] + r * line + word] : 0;
          }
#pragma unroll
        for (int j = 0; j < S::kWarpColumns; ++j) {
          const Fragment fragment = fragments[((r * steps + step) * (S::kColumns / 8) + j) * 32];
#pragma unroll
          for (int i = 0; i < kWarpRows; ++i) multiply(typename S::Math{}, sums[i][j], a[i], fragment.b);
        }
      }
    __syncthreads();  // everybody has read the patch

#pragma unroll
    for (int i = 0; i < kWarpRows; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int position = positions[first_row + i * 16 + half * 8 + lane / 4];
        const int row = at.row + position / 256, column = at.column + position % 256;
        if (position < 0 || row >= p.P || column >= p.Q) continue;
        const int64_t target = ((at.n * p.P + row) * p.Q + column) * p.K;
#pragma unroll
        for (int j = 0; j < S::kWarpColumns; ++j) {
          const int k = filter0 + (first_column + j) * 8 + member * 2;
          if (k >= p.K) continue;
          Pair result{};
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (k + e >= p.K) continue;
            float sum = sums[i][j][half * 2 + e];
            if (bias) sum += Numeric<T>::widen(bias[k + e]);
            if (epilogue.scale) sum *= epilogue.scale[k + e];
            if (epilogue.shift) sum += epilogue.shift[k + e];
            if (epilogue.residual) sum += Numeric<T>::widen(epilogue.residual[target + k + e]);
            result.v[e] = Numeric<T>::narrow(act(sum));
            if (!paired) y[target + k + e] = result.v[e];
          }
          if (paired) *reinterpret_cast<Pair*>(y + target + k) = result;
        }
      }
  }
}

template <class Math>
const char* launch_fprop(const void* params, const Launch& run) {
  using S = Stem<Math>;
  using T = typename S::Element;
  const auto& p = *static_cast<const Conv2dParams*>(params);
  Conv2dParams padded = p;  // whole products: the patch reaches as far as they read
  padded.S = steps_of<S>(static_cast<int>(p.S)) * S::kDepth / kPixel;
  Tiling t = tiling_of(padded, Direction::fprop, 1, kPatchBytes / (kPixel * static_cast<int>(sizeof(T))));
  t.chunks = static_cast<int>(ceil_div(p.K, S::kColumns));
  if (t.tiles() == 0 || t.chunks == 0) return nullptr;
  t.blocks = static_cast<int>(
      std::min<int64_t>(t.tiles(), std::max(ceil_div(t.tiles(), kTilesABlock), ceil_div(2 * processors(), t.chunks))));
  T* y = static_cast<T*>(run.operands[3]);
  const bool paired = p.K % 2 == 0 && reinterpret_cast<uintptr_t>(y) % (2 * sizeof(T)) == 0;  // two filters a store
  const size_t bytes =
      static_cast<size_t>(t.patch_rows) * t.patch_columns * kPixel * sizeof(T) +
      static_cast<size_t>(p.R) * steps_of<S>(static_cast<int>(p.S)) * S::kColumns * 4 * sizeof(Fragment);
  return launch<correlate<S>, kMostShared>(dim3(static_cast<unsigned>(t.blocks * t.chunks), 1, 1), dim3(kThreads, 1, 1),
                                           bytes, run.stream, p, t, static_cast<const T*>(run.operands[0]),
                                           static_cast<const T*>(run.operands[1]),
                                           static_cast<const T*>(run.operands[2]), y, paired, Epilogue<T>(p, run));
}

}  // namespace

CNNFAST_KERNEL("conv2d_stem.fprop.bf16", Conv2dParams, launch_fprop<Half<__nv_bfloat16>>, nullptr)
CNNFAST_KERNEL("conv2d_stem.fprop.f16", Conv2dParams, launch_fprop<Half<__half>>, nullptr)
CNNFAST_KERNEL("conv2d_stem.fprop.f32.tf32", Conv2dParams, launch_fprop<Tf32>, nullptr)
CNNFAST_KERNEL("conv2d_stem.fprop.f32.tf32x3", Conv2dParams, launch_fprop<Tf32x3>, nullptr)

}  // namespace cnnfast::cuda
