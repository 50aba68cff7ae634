// The weight gradient of a network's first convolution, with at most 4 input channels, on tensor cores (sm_80
// mma.sync): bf16, f16, and f32 in tf32 or as three products of tf32 (tf32x3).
//
//   dw[k, r, j] = sum_m dy[m, k] patch[m moved by row r, j]     j = (s, c): taps across, 4 channels each
//
// x is staged as in conv2d_stem.cu. A product of tensor cores is 16 filters by two taps of a row, its depth positions;
// dy lies across the depth and is turned by ldmatrix (f32: read element by element), the patch is read element by
// element: a column of the product is the same place of every position's run.
//
// Mapping: a block computes 64 (f32: 32) filters over a part of all tiles of positions; a warp has some pairs of taps,
// all filters, all sums in registers. Deterministic, without atomics: the parts' sums lie in the workspace, and a
// second kernel adds them in order. The number of parts depends on sizes only. Layout: x and weights with any strides,
// y NHWC, dense and 16-byte aligned. Accumulator f32, one rounding at the end. Memory offsets are 64-bit; pixels are
// numbered in 32 bits.
#include "../common/kernel_table.h"
#include "conv2d_grouped_weights.h"
#include "conv2d_stem.h"

namespace cnnfast::cuda {
namespace {

using namespace grouped;

constexpr int kMostPairs = 4;  // of taps, of a warp
constexpr size_t kMostShared = kPatchBytes + kRows * kSlices * sizeof(Vector);

// The sizes that the compiler knows.
template <class Math_>
struct Stem {
  using Math = Math_;
  using Element = typename Math::Element;
  static constexpr int kFilters = kSlices * Math::kVector;
  static constexpr int kMmaRows = kFilters / 16;
  static constexpr int kDepth = sizeof(Element) == 4 ? 8 : 16;  // positions of a product
};

template <class S>
__global__ void __launch_bounds__(kThreads, 2)
    wgrad(const Conv2dParams p, const Tiling t, const typename S::Element* __restrict__ x,
          const typename S::Element* __restrict__ y, float* __restrict__ partial) {
  using T = typename S::Element;
  constexpr bool by_element = sizeof(T) == 4;
  CNNFAST_DYNAMIC_SHARED(Vector, shared);
  CNNFAST_SHARED(int, positions, [kRows]);  // of a tile: row * 256 + column, -1 beyond the last
  Vector* tile_y = shared;
  T* patch = reinterpret_cast<T*>(shared + kRows * kSlices);

  const int filter0 = static_cast<int>(blockIdx.x % t.chunks) * S::kFilters, part = blockIdx.x / t.chunks;
  for (int i = threadIdx.x; i < kRows; i += kThreads) {
    const int row = i / t.columns;
    positions[i] = row < t.rows ? row * 256 + i - row * t.columns : -1;
  }
  __syncthreads();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, P = static_cast<int>(p.P), Q = static_cast<int>(p.Q);
  const int taps = static_cast<int>(p.S), across = (taps + 1) / 2, pairs = static_cast<int>(p.R) * across;
  int column[kMostPairs];  // where this lane's column of each pair of taps begins under a position
#pragma unroll
  for (int i = 0; i < kMostPairs; ++i) {
    const int pair = warp + i * kWarps, row = pair / across;
    column[i] = (row * t.patch_columns + (pair - row * across) * 2) * kPixel + lane / 4;
  }
  float sums[kMostPairs][S::kMmaRows][4] = {};

  for (int tile = part; tile < t.tiles(); tile += t.blocks) {
    const TilePlace at(t, tile);
    stage_positions(tile_y, y, at, positions, P, Q, filter0, static_cast<int>(p.K));
    copy_async_commit();
    stage_pixels(p, t, at, x, patch);
    copy_async_wait<0>();
    __syncthreads();  // the tile is complete

    // Where the run of position m begins; -1: no such position, whatever the patch holds there.
    const auto run_of = [&](int m) {
      const int position = positions[m], row = position / 256, at_column = position % 256;
      const bool present = position >= 0 && at.row + row < P && at.column + at_column < Q;
      const int pixel = row * static_cast<int>(p.stride_h) * t.patch_columns + at_column * static_cast<int>(p.stride_w);
      return present ? pixel * kPixel : -1;
    };
#pragma unroll 1
    for (int m = 0; m < t.rows * t.columns; m += S::kDepth) {
      uint32_t a[S::kMmaRows][4];
      int run[by_element ? 2 : 4];  // of the positions of this lane's rows of the patch
      if constexpr (by_element) {
#pragma unroll
        for (int i = 0; i < 2; ++i) run[i] = run_of(m + lane % 4 + i * 4);
#pragma unroll
        for (int i = 0; i < S::kMmaRows; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int filter = i * 16 + e % 2 * 8 + lane / 4;
            a[i][e] =
                reinterpret_cast<const uint32_t*>(tile_y + place(m + lane % 4 + e / 2 * 4, filter / 4))[filter % 4];
          }
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) run[i] = run_of(m + i / 2 * 8 + lane % 4 * 2 + i % 2);
#pragma unroll
        for (int i = 0; i < S::kMmaRows; ++i)
          ldmatrix_x4_transposed(a[i], tile_y + place(m + lane / 16 * 8 + lane % 8, i * 2 + lane / 8 % 2));
      }
#pragma unroll
      for (int i = 0; i < kMostPairs; ++i) {
        if (warp + i * kWarps >= pairs) break;
        const T zero = Numeric<T>::narrow(0.0f);
        struct alignas(4) Register {
          T v[4 / sizeof(T)];
        };
        uint32_t b[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          Register value;
#pragma unroll
          for (int h = 0; h < 4 / static_cast<int>(sizeof(T)); ++h) {
            const int from = run[e * (4 / static_cast<int>(sizeof(T))) + h];
            value.v[h] = from < 0 ? zero : patch[from + column[i]];
          }
          memcpy(&b[e], &value, sizeof value);
        }
#pragma unroll
        for (int j = 0; j < S::kMmaRows; ++j) multiply(typename S::Math{}, sums[i][j], a[j], b);
      }
    }
    __syncthreads();  // everybody has read the tile
  }

  const int channels = static_cast<int>(p.C);
  float* to = partial + int64_t{part} * p.K * p.R * taps * channels;
#pragma unroll
  for (int i = 0; i < kMostPairs; ++i)
#pragma unroll
    for (int j = 0; j < S::kMmaRows; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int pair = warp + i * kWarps, row = pair / across, place_in_row = lane % 4 * 2 + e % 2;
        const int tap = (pair - row * across) * 2 + place_in_row / kPixel, c = place_in_row % kPixel;
        const int filter = filter0 + j * 16 + e / 2 * 8 + lane / 4;
        if (pair < pairs && tap < taps && c < channels && filter < p.K)
          to[((int64_t{filter} * p.R + row) * taps + tap) * channels + c] = sums[i][j][e];
      }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <class S>
Tiling cut(const Conv2dParams& p) {
  Conv2dParams padded = p;  // the patch reaches as far as pairs of taps do
  padded.S = ceil_div(p.S, 2) * 2;
  Tiling t =
      tiling_of(padded, Direction::fprop, 1, kPatchBytes / (kPixel * static_cast<int>(sizeof(typename S::Element))));
  t.chunks = static_cast<int>(ceil_div(p.K, S::kFilters));
  t.blocks = parts_of(t);
  return t;
}

template <class Math>
int64_t wgrad_workspace(const void* params) {
  const auto& p = *static_cast<const Conv2dParams*>(params);
  return cut<Stem<Math>>(p).blocks * elements_of(p) * static_cast<int64_t>(sizeof(float));
}

template <class Math>
const char* launch_wgrad(const void* params, const Launch& run) {
  using S = Stem<Math>;
  using T = typename S::Element;
  const auto& p = *static_cast<const Conv2dParams*>(params);
  const Tiling t = cut<S>(p);
  const int64_t elements = elements_of(p);
  T* w = static_cast<T*>(run.operands[1]);
  float* partial = static_cast<float*>(run.workspace);
  if (elements == 0) return nullptr;
  if (t.blocks > 0) {
    const size_t bytes =
        kRows * kSlices * sizeof(Vector) + static_cast<size_t>(t.patch_rows) * t.patch_columns * kPixel * sizeof(T);
    const char* error = launch<wgrad<S>, kMostShared>(
        dim3(static_cast<unsigned>(t.blocks * t.chunks), 1, 1), dim3(kThreads, 1, 1), bytes, run.stream, p, t,
        static_cast<const T*>(run.operands[0]), static_cast<const T*>(run.operands[3]), partial);
    if (error) return error;
  }
  return launch<add_parts<T>>(grid_for(ceil_div(elements, kAddThreads)), dim3(kAddThreads, 1, 1), 0, run.stream, p,
                              static_cast<const float*>(partial), w, t.blocks, elements);
}

}  // namespace

CNNFAST_KERNEL("conv2d_stem.wgrad.bf16.dense", Conv2dParams, launch_wgrad<Half<__nv_bfloat16>>,
               wgrad_workspace<Half<__nv_bfloat16>>)
CNNFAST_KERNEL("conv2d_stem.wgrad.f16.dense", Conv2dParams, launch_wgrad<Half<__half>>, wgrad_workspace<Half<__half>>)
CNNFAST_KERNEL("conv2d_stem.wgrad.f32.dense_tf32", Conv2dParams, launch_wgrad<Tf32>, wgrad_workspace<Tf32>)
CNNFAST_KERNEL("conv2d_stem.wgrad.f32.dense_tf32x3", Conv2dParams, launch_wgrad<Tf32x3>, wgrad_workspace<Tf32x3>)

}  // namespace cnnfast::cuda
