// Grouped 2-D convolution's weight gradient with 4, 8, 16 or 32 channels a group on tensor cores (sm_80 mma.sync),
// bf16, f16, and f32 in tf32 or as three products of tf32 (tf32x3).
//
//   dw[k, c, tap] = sum_m dy[m, k] x[m moved by tap, c]     m over positions, c over the channels of k's group
//
// A product of tensor cores is 16 rows, 8 channels each of two taps (or of one, where a group has more), by 8 filters
// of the same group, its depth positions (conv2d_grouped.h). Groups of 4 go in pairs, and half of such a product, one
// group's channels with the other's filters, is left out. Both operands lie across the depth: ldmatrix turns them, f32
// is read element by element.
//
// Mapping: a block computes the filters of 128 bytes of channels over a part of all tiles of positions, whose patches
// of x and positions of dy are staged by cp.async. A warp owns one super-group and some of the taps, all sums in
// registers. Deterministic, without atomics: the parts' sums lie in the workspace, and a second kernel adds them in
// order. The number of parts depends on sizes only. Layout NHWC, dense and 16-byte aligned, weights with any strides.
// Accumulator f32, one rounding at the end. Memory offsets are 64-bit; pixels are numbered in 32 bits.
#include "../common/kernel_table.h"
#include "conv2d_grouped_weights.h"
#include "primitives/launch.h"

namespace cnnfast::cuda {
namespace {

using namespace grouped;

constexpr int kMostTaps = 10;
template <class Shape>
constexpr int kMostPairs =  // products below each other, of a warp
    (kMostTaps * Shape::kColumns / 2 + Shape::kParts - 1) / Shape::kParts;
constexpr size_t kMostShared = (kPatchPixels + 2 * kRows) * kSlices * sizeof(Vector);

// Where eight channels of one tap lie: the tap's distance from a position in the patch, the first slice of the
// super-group.
struct alignas(8) Octet {
  int pixel, slice;
};

template <class Shape>
__global__ void __launch_bounds__(kThreads, 2)
    wgrad(const Conv2dParams p, const Tiling t, const typename Shape::Element* __restrict__ x,
          const typename Shape::Element* __restrict__ y, float* __restrict__ partial) {
  using Math = typename Shape::Math;
  constexpr bool by_element = sizeof(typename Shape::Element) == 4;
  constexpr int kOctetSlices = 8 / Shape::kVector, kStep = by_element ? 8 : 32;  // positions multiplied at a time
  CNNFAST_DYNAMIC_SHARED(Vector, shared);
  CNNFAST_SHARED(Octet, octets, [kMostTaps * Shape::kColumns + 1]);
  CNNFAST_SHARED(int, positions, [kRows]);  // of a tile: row * 256 + column, -1 beyond the last
  CNNFAST_SHARED(Vector, zero, [1]);

  const int channel0 = static_cast<int>(blockIdx.x % t.chunks) * Shape::kChannels, part = blockIdx.x / t.chunks;
  const Axis ah = fprop_axis(p.P, p.H, p.R, p.stride_h, p.pad_h, p.dilation_h);
  const Axis aw = fprop_axis(p.Q, p.W, p.S, p.stride_w, p.pad_w, p.dilation_w);
  const int channels = static_cast<int>(p.C), taps = ah.taps * aw.taps, count = taps * Shape::kColumns;
  for (int i = threadIdx.x; i < count + 1; i += kThreads) {
    const int octet = i < count ? i : count - 1, tap = octet / Shape::kColumns, tap_r = tap / aw.taps;
    octets[i] = {tap_r * ah.in_tap * t.patch_columns + (tap - tap_r * aw.taps) * aw.in_tap,
                 octet % Shape::kColumns * kOctetSlices};
  }
  for (int i = threadIdx.x; i < kRows; i += kThreads) {
    const int row = i / t.columns;
    positions[i] = row < t.rows ? row * 256 + i - row * t.columns : -1;
  }
  if (threadIdx.x == 0) zero[0].bits = make_uint4(0, 0, 0, 0);
  __syncthreads();

  const int buffer_vectors = t.patch_vectors() + kRows * kSlices;
  const auto stage = [&](int tile, int buffer) {
    const TilePlace at(t, tile);
    Vector* to = shared + buffer * buffer_vectors;
    stage_patch(to, x, t, at, ah, aw, channel0, channels);
    stage_positions(to + t.patch_vectors(), y, at, positions, ah.positions, aw.positions, channel0, channels);
  };
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, super = warp % Shape::kSupers;
  const int first_pair = warp / Shape::kSupers, slice0 = super * Shape::kSuperSlices;
  float sums[kMostPairs<Shape>][Shape::kColumns][4] = {};

  int tile = part, buffer = 0;
  stage(tile, 0);
  copy_async_commit();
  for (; tile < t.tiles(); tile += t.blocks) {
    const int next = tile + t.blocks;
    if (t.buffers == 2) {
      if (next < t.tiles()) stage(next, buffer ^ 1);
      copy_async_commit();
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();  // the tile is complete

    const Vector *patch = shared + buffer * buffer_vectors, *tile_y = patch + t.patch_vectors();
    const TilePlace at(t, tile);
    // The pixel under tap 0 of position m; -1: no such position, whatever the patch holds there.
    const auto pixel_of = [&](int m) {
      const int position = positions[m], row = position / 256, column = position % 256;
      const bool present = position >= 0 && at.row + row < ah.positions && at.column + column < aw.positions;
      return present ? row * ah.in_step * t.patch_columns + column * aw.in_step : -1;
    };
#pragma unroll 1
    for (int m = 0; m < t.rows * t.columns; m += kStep) {
      if constexpr (by_element) {
        int pixel[2];
        uint32_t b[Shape::kColumns][2];
        const auto element = [&](const Vector* from, int slice) {
          return reinterpret_cast<const uint32_t*>(from)[slice % 4];
        };
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int position = m + lane % 4 + i * 4;
          pixel[i] = pixel_of(position);
#pragma unroll
          for (int j = 0; j < Shape::kColumns; ++j)
            b[j][i] = element(tile_y + place(position, slice0 + j * 2 + lane / 16), lane / 4);
        }
#pragma unroll
        for (int i = 0; i < kMostPairs<Shape>; ++i) {
          const int pair = first_pair + i * Shape::kParts;
          if (pair * 2 >= count) break;
          uint32_t a[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const Octet octet = octets[pair * 2 + e % 2];
            const int from = pixel[e / 2];
            a[e] = element(from < 0 ? zero : patch + place(from + octet.pixel, slice0 + octet.slice + lane / 16),
                           lane / 4);
          }
#pragma unroll
          for (int j = 0; j < Shape::kColumns; ++j) multiply(Math{}, sums[i][j], a, b[j]);
        }
      } else {
        uint32_t b[Shape::kColumns][4];
#pragma unroll
        for (int j = 0; j < Shape::kColumns; ++j) ldmatrix_x4_transposed(b[j], tile_y + place(m + lane, slice0 + j));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int pixel = pixel_of(m + half * 16 + lane / 16 * 8 + lane % 8);
#pragma unroll
          for (int i = 0; i < kMostPairs<Shape>; ++i) {
            const int pair = first_pair + i * Shape::kParts;
            if (pair * 2 >= count) break;
            const Octet octet = octets[pair * 2 + lane / 8 % 2];
            uint32_t a[4];
            ldmatrix_x4_transposed(a, pixel < 0 ? zero : patch + place(pixel + octet.pixel, slice0 + octet.slice));
#pragma unroll
            for (int j = 0; j < Shape::kColumns; ++j) {
              const uint32_t columns[2] = {b[j][half * 2], b[j][half * 2 + 1]};
              multiply(Math{}, sums[i][j], a, columns);
            }
          }
        }
      }
    }
    __syncthreads();  // everybody has read the tile
    if (t.buffers == 1) {
      if (next < t.tiles()) stage(next, 0);
      copy_async_commit();
    } else {
      buffer ^= 1;
    }
  }

  float* to = partial + int64_t{part} * channels * taps * Shape::kGroup;
#pragma unroll
  for (int i = 0; i < kMostPairs<Shape>; ++i)
#pragma unroll
    for (int j = 0; j < Shape::kColumns; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int octet = (first_pair + i * Shape::kParts) * 2 + e / 2;
        const int c = octet % Shape::kColumns * 8 + lane / 4, k = j * 8 + lane % 4 * 2 + e % 2;
        const int filter = channel0 + super * Shape::kSuper + k;
        if (octet < count && c / Shape::kGroup == k / Shape::kGroup && filter < channels)
          to[(int64_t{filter} * taps + octet / Shape::kColumns) * Shape::kGroup + c % Shape::kGroup] = sums[i][j][e];
      }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <class T>
Tiling cut(const Conv2dParams& p) {
  Tiling t = tiling_of(p, Direction::fprop, kSlices * 16 / static_cast<int>(sizeof(T)));
  t.blocks = parts_of(t);
  return t;
}

template <class T>
int64_t wgrad_workspace(const void* params) {
  const auto& p = *static_cast<const Conv2dParams*>(params);
  return cut<T>(p).blocks * elements_of(p) * static_cast<int64_t>(sizeof(float));
}

template <class Math, int kGroup>
const char* launch_shape(const Conv2dParams& p, const Launch& run) {
  using S = Shape<Math, kGroup>;
  using T = typename S::Element;
  const Tiling t = cut<T>(p);
  const int64_t elements = elements_of(p);
  T* w = static_cast<T*>(run.operands[1]);
  float* partial = static_cast<float*>(run.workspace);
  if (elements == 0) return nullptr;
  if (t.blocks > 0) {
    const size_t bytes = t.buffers * (t.patch_vectors() + kRows * kSlices) * sizeof(Vector);
    const char* error = launch<wgrad<S>, kMostShared>(
        dim3(static_cast<unsigned>(t.blocks * t.chunks), 1, 1), dim3(kThreads, 1, 1), bytes, run.stream, p, t,
        static_cast<const T*>(run.operands[0]), static_cast<const T*>(run.operands[3]), partial);
    if (error) return error;
  }
  return launch<add_parts<T>>(grid_for(ceil_div(elements, kAddThreads)), dim3(kAddThreads, 1, 1), 0, run.stream, p,
                              static_cast<const float*>(partial), w, t.blocks, elements);
}

template <class Math>
const char* launch_wgrad(const void* params, const Launch& run) {
  const auto& p = *static_cast<const Conv2dParams*>(params);
  switch (p.C / p.G) {
    case 4:
      return launch_shape<Math, 4>(p, run);
    case 8:
      return launch_shape<Math, 8>(p, run);
    case 16:
      return launch_shape<Math, 16>(p, run);
    default:
      return launch_shape<Math, 32>(p, run);
  }
}

}  // namespace

CNNFAST_KERNEL("conv2d_grouped.wgrad.bf16", Conv2dParams, launch_wgrad<Half<__nv_bfloat16>>,
               wgrad_workspace<__nv_bfloat16>)
CNNFAST_KERNEL("conv2d_grouped.wgrad.f16", Conv2dParams, launch_wgrad<Half<__half>>, wgrad_workspace<__half>)
CNNFAST_KERNEL("conv2d_grouped.wgrad.f32.tf32", Conv2dParams, launch_wgrad<Tf32>, wgrad_workspace<float>)
CNNFAST_KERNEL("conv2d_grouped.wgrad.f32.tf32x3", Conv2dParams, launch_wgrad<Tf32x3>, wgrad_workspace<float>)

}  // namespace cnnfast::cuda
