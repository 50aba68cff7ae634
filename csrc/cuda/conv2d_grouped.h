// What the grouped kernels share: how channels and pixels are cut, and the patch of the input that a block stages.
//
// A *slice* is 16 bytes of a pixel, 8 (f32: 4) channels. A *super-group* is what one product of tensor cores, 8 columns
// wide, has no room left beside: a group, or two groups of 4 channels. A *chunk* is the super-groups of 128 bytes of a
// pixel, which a block computes for some tiles of positions.
//
// A tile is a rectangle of at most kRows output positions of one image (and parity class). Its patch, the pixels under
// all its taps, is staged by cp.async with zeros for the padding, 128 bytes a pixel, slices swizzled so that the
// eight rows which one ldmatrix reads fall into different banks where they are neighbours. A row of ldmatrix is a slice
// of any pixel: a product takes its 16 (f32: 8) of depth from two slices, be they of one tap or of two.
#pragma once
#include <algorithm>
#include <cstdlib>

#include "conv2d_axes.h"
#include "conv2d_implicit_gemm.h"

namespace cnnfast::cuda::grouped {

using implicit_gemm::Half;
using implicit_gemm::Tf32;
using implicit_gemm::Tf32x3;
using implicit_gemm::Vector;

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRows = 128;           // positions of a tile
constexpr int kSlices = 8;           // of a pixel in a chunk
constexpr int kPatchPixels = 448;    // in shared memory: of one patch, or of two halves
constexpr int kMostSlices = 80;      // of a super-group, all taps
constexpr int64_t kTilesABlock = 4;  // wanted: weights are laid out once for all of them

// The sizes that the compiler knows. kGroup: channels of a group, as many in as out.
template <class Math_, int kGroup_>
struct Shape {
  using Math = Math_;
  using Element = typename Math::Element;
  static constexpr int kGroup = kGroup_, kVector = Math::kVector;
  static constexpr int kSuper = kGroup < 8 ? 8 : kGroup;      // channels of a super-group
  static constexpr int kSupers = kSlices * kVector / kSuper;  // of a chunk
  static constexpr int kSuperSlices = kSuper / kVector;       // of a super-group, a tap
  static constexpr int kColumns = kSuper / 8;                 // products side by side
  static constexpr int kChannels = kSlices * kVector;         // of a chunk
  static constexpr int kParts = kWarps / kSupers;             // warps that share a super-group
  static constexpr int kMmaRows = kRows / 16 / kParts;        // products, 16 positions each, of a warp
};

// How a correlation is cut into tiles, decided from its sizes alone.
struct Tiling {
  int rows, columns;              // positions of a tile
  int tiles_h, tiles_w, images;   // of the largest class
  int patch_rows, patch_columns;  // of the largest class
  int chunks, classes_h, classes_w;
  int taps;     // of the class that has the most
  int buffers;  // patches: one is read while the next one comes, where there is room for two
  int blocks;   // of a chunk and class

  __host__ __device__ int tiles() const { return images * tiles_h * tiles_w; }
  __host__ __device__ int patch_vectors() const { return patch_rows * patch_columns * kSlices; }
};

inline Axis axis_of(const Conv2dParams& p, Direction direction, bool vertical, int klass) {
  if (vertical)
    return direction == Direction::fprop ? fprop_axis(p.P, p.H, p.R, p.stride_h, p.pad_h, p.dilation_h)
                                         : dgrad_axis(klass, p.H, p.P, p.R, p.stride_h, p.pad_h, p.dilation_h);
  return direction == Direction::fprop ? fprop_axis(p.Q, p.W, p.S, p.stride_w, p.pad_w, p.dilation_w)
                                       : dgrad_axis(klass, p.W, p.Q, p.S, p.stride_w, p.pad_w, p.dilation_w);
}

// What the classes of an axis need at most.
struct Extent {
  int step = 1, span = 0, taps = 0;  // pixels between positions, and between the first tap and the last; taps

  Extent(const Conv2dParams& p, Direction direction, bool vertical, int classes) {
    for (int i = 0; i < classes; ++i) {
      const Axis axis = axis_of(p, direction, vertical, i);
      step = axis.in_step;
      span = std::max(span, (axis.taps - 1) * std::abs(axis.in_tap));
      taps = std::max(taps, axis.taps);
    }
  }
  int reach(int positions) const { return (positions - 1) * step + span + 1; }
};

// The rectangle that reads the fewest pixels in all; ties go to wider ones. `channels`: of a chunk.
inline Tiling tiling_of(const Conv2dParams& p, Direction direction, int channels, int most_pixels = kPatchPixels) {
  Tiling t{};
  const Classes classes(p, direction);
  const bool forward = direction == Direction::fprop;
  t.images = static_cast<int>(p.N);
  t.classes_h = classes.h, t.classes_w = classes.w;
  t.chunks = static_cast<int>(ceil_div(forward ? p.C : p.K, channels));
  const int height = static_cast<int>(forward ? p.P : ceil_div(p.H, p.stride_h));
  const int width = static_cast<int>(forward ? p.Q : ceil_div(p.W, p.stride_w));
  if (height == 0 || width == 0) return t;
  const Extent vertical(p, direction, true, classes.h), horizontal(p, direction, false, classes.w);
  int64_t least = -1;
  for (int columns = std::min(width, kRows); columns >= 1; --columns) {
    const int across = horizontal.reach(columns), room = most_pixels / across - vertical.span - 1;
    if (room < 0) continue;
    const int rows = std::min({height, kRows / columns, room / vertical.step + 1}), down = vertical.reach(rows);
    const int64_t tiles = ceil_div(height, rows) * ceil_div(width, columns);
    const int64_t cost = tiles * (int64_t{down} * across + 2 * kRows);  // and what a tile costs, however small
    if (least >= 0 && cost >= least) continue;
    least = cost;
    t.rows = rows, t.columns = columns, t.patch_rows = down, t.patch_columns = across;
  }
  t.tiles_h = static_cast<int>(ceil_div(height, t.rows)), t.tiles_w = static_cast<int>(ceil_div(width, t.columns));
  t.taps = vertical.taps * horizontal.taps;
  t.buffers = 2 * t.patch_rows * t.patch_columns <= most_pixels ? 2 : 1;
  return t;
}

// Where slice `slice` of a patch's pixel lies.
__device__ __forceinline__ int place(int pixel, int slice) { return pixel * kSlices + (slice ^ pixel % kSlices); }

// A tile's image and first position.
struct TilePlace {
  int n, row, column;
  __device__ __forceinline__ TilePlace(const Tiling& t, int tile) {
    const int line = tile / t.tiles_w;
    column = (tile - line * t.tiles_w) * t.columns;
    n = line / t.tiles_h;
    row = (line - n * t.tiles_h) * t.rows;
  }
};

// The first pixel of a patch relative to that under tap 0: taps may run backwards.
__device__ __forceinline__ int lowest(const Axis& axis) {
  return axis.in_tap < 0 && axis.taps > 1 ? (axis.taps - 1) * axis.in_tap : 0;
}

// Issues the copies of a tile's patch; a thread's slice is always the same.
template <class T>
__device__ __forceinline__ void stage_patch(Vector* patch, const T* __restrict__ input, const Tiling& t,
                                            const TilePlace& at, const Axis& ah, const Axis& aw, int channel0,
                                            int channels) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T)), kAtOnce = kThreads / kSlices;
  const int slice = static_cast<int>(threadIdx.x) % kSlices, first = static_cast<int>(threadIdx.x) / kSlices;
  const int channel = channel0 + slice * kVector;
  const int h0 = ah.in_first + at.row * ah.in_step + lowest(ah), w0 = aw.in_first + at.column * aw.in_step + lowest(aw);
  const T* image = input + int64_t{at.n} * ah.in_size * aw.in_size * channels + channel;
  int row = first / t.patch_columns, column = first - row * t.patch_columns;
  for (int pixel = first; pixel < t.patch_rows * t.patch_columns; pixel += kAtOnce) {
    const int h = h0 + row, w = w0 + column;
    const bool valid = channel < channels && static_cast<unsigned>(h) < static_cast<unsigned>(ah.in_size) &&
                       static_cast<unsigned>(w) < static_cast<unsigned>(aw.in_size);
    copy_async_16(patch + place(pixel, slice), image + (int64_t{h} * aw.in_size + w) * channels, valid);
    column += kAtOnce;
    while (column >= t.patch_columns) column -= t.patch_columns, ++row;
  }
}

// d += a b
template <class T>
__device__ __forceinline__ void multiply(Half<T>, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_m16n8k16<T>(d, a, b);
}
__device__ __forceinline__ void multiply(Tf32, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  uint32_t large_a[4], large_b[2];
#pragma unroll
  for (int e = 0; e < 4; ++e) large_a[e] = round_tf32(float_of_bits(a[e]));
#pragma unroll
  for (int e = 0; e < 2; ++e) large_b[e] = round_tf32(float_of_bits(b[e]));
  mma_m16n8k8_tf32(d, large_a, large_b);
}
// As in conv2d_implicit_gemm.h.
__device__ __forceinline__ void multiply(Tf32x3, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  uint32_t large_a[4], small_a[4], large_b[2], small_b[2];
  implicit_gemm::split_tf32(a, large_a, small_a);
  implicit_gemm::split_tf32(b, large_b, small_b);
  float term[4] = {};
  mma_m16n8k8_tf32(term, small_a, large_b);
  mma_m16n8k8_tf32(term, large_a, small_b);
#pragma unroll
  for (int e = 0; e < 4; ++e) term[e] = is_finite(term[e]) ? term[e] : 0.0f;
  mma_m16n8k8_tf32(term, large_a, large_b);
#pragma unroll
  for (int e = 0; e < 4; ++e) d[e] += term[e];
}

}  // namespace cnnfast::cuda::grouped
