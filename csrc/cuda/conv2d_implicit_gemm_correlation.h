// What the kernels share that gather a correlation's input on the way into shared memory (conv2d_implicit_gemm.cu,
// bn_act_conv_implicit_gemm.cu): how the output is cut into tiles, what a block works on, and its product, staged 16
// bytes at a time.
#pragma once
#include "../common/params.h"
#include "conv2d_axes.h"
#include "conv2d_implicit_gemm.h"
#include "conv2d_implicit_gemm_plan.h"

namespace cnnfast::cuda::implicit_gemm {

// How the output is cut into tiles: (slice, row tile, class, group, column tile), the last fastest.
struct Tiling {
  int column_tiles, groups, classes, classes_w;
  int row_tiles;            // of the largest class
  int slices, slice_depth;  // of the depth; elements of it, whole steps
  int64_t elements;         // of the result

  Tiling(const Conv2dParams& p, const Classes& c, Direction direction, const TileShape& tile, const Split& split)
      : column_tiles(
            static_cast<int>(ceil_div((direction == Direction::fprop ? p.K : p.C) / p.G, int64_t{tile.columns}))),
        groups(static_cast<int>(p.G)),
        classes(c.h * c.w),
        classes_w(c.w),
        row_tiles(static_cast<int>(ceil_div(p.N * c.positions, int64_t{tile.rows}))),
        slices(static_cast<int>(split.slices)),
        slice_depth(static_cast<int>(split.depth)),
        elements(direction == Direction::fprop ? p.N * p.P * p.Q * p.K : p.N * p.H * p.W * p.C) {}
  int64_t blocks() const { return int64_t{slices} * row_tiles * classes * groups * column_tiles; }
  __device__ __forceinline__ int slice(unsigned block) const {
    return static_cast<int>(block / (static_cast<unsigned>(row_tiles) * classes * groups * column_tiles));
  }
};

// Pixel m of all the positions of a class.
struct Pixels {
  int image0, first, height, width;
  __device__ __forceinline__ Pixels(int height_, int width_, int m0)
      : image0(m0 / (height_ * width_)), first(m0 % (height_ * width_)), height(height_), width(width_) {}
  // (image, row, column) of pixel m0 + i.
  __device__ __forceinline__ void at(int i, int& n, int& row, int& column) const {
    const int line = (first + i) / width;
    column = first + i - line * width;
    row = line % height;
    n = image0 + line / height;
  }
};

// Counts through (vector of channels, tap s, tap r), the channels fastest.
struct Position {
  int c = 0, s = 0, r = 0;
  __device__ __forceinline__ void advance(int by, int channels, int taps_s) {
    c += by;
    while (c >= channels) {
      c -= channels;
      if (++s == taps_s) {
        s = 0;
        ++r;
      }
    }
  }
};

// What a block works on; nothing where row0 is beyond the pixels. Tensors are dense: strides are sizes.
struct Block {
  Axis ah, aw;
  Pixels pixel;
  int row0, pixels;                       // the tile's first position, and all of the class
  int column0, columns, group, channels;  // computed and summed over, of a group
  int in_height, in_width, in_channels;
  int out_height, out_width, out_channels;
  int S, filter;           // elements of a filter
  int slice, slice_depth;  // the block's part of the depth
};

template <class Tile, Direction direction>
__device__ __forceinline__ Block block_of(const Conv2dParams& p, const Tiling& tiling) {
  constexpr bool forward = direction == Direction::fprop;
  unsigned rest = blockIdx.x;
  const int column0 = static_cast<int>(rest % tiling.column_tiles) * Tile::kColumns;
  rest /= tiling.column_tiles;
  const int group = static_cast<int>(rest % tiling.groups);
  rest /= tiling.groups;
  const int klass = static_cast<int>(rest % tiling.classes);
  rest /= tiling.classes;
  const int row0 = static_cast<int>(rest % tiling.row_tiles) * Tile::kRows;

  const Axis ah = forward ? fprop_axis(p.P, p.H, p.R, p.stride_h, p.pad_h, p.dilation_h)
                          : dgrad_axis(klass / tiling.classes_w, p.H, p.P, p.R, p.stride_h, p.pad_h, p.dilation_h);
  const Axis aw = forward ? fprop_axis(p.Q, p.W, p.S, p.stride_w, p.pad_w, p.dilation_w)
                          : dgrad_axis(klass % tiling.classes_w, p.W, p.Q, p.S, p.stride_w, p.pad_w, p.dilation_w);
  const int in_channels = static_cast<int>(forward ? p.C : p.K), out_channels = static_cast<int>(forward ? p.K : p.C);
  return {ah,
          aw,
          Pixels(ah.positions, aw.positions, row0),
          row0,
          static_cast<int>(p.N) * ah.positions * aw.positions,
          column0,
          out_channels / tiling.groups,
          group,
          in_channels / tiling.groups,
          static_cast<int>(forward ? p.H : p.P),
          static_cast<int>(forward ? p.W : p.Q),
          in_channels,
          static_cast<int>(forward ? p.P : p.H),
          static_cast<int>(forward ? p.Q : p.W),
          out_channels,
          static_cast<int>(p.S),
          static_cast<int>(p.R * p.S * (p.C / p.G)),
          tiling.slice(blockIdx.x),
          tiling.slice_depth};
}

// sums += A B, staged 16 bytes at a time: for fprop both along the depth, for dgrad the weights across it.
template <class Math, class Tile, bool kForward>
__device__ __forceinline__ void accumulate_vectors(const Block& b, const typename Math::Element* __restrict__ input,
                                                   const typename Math::Element* __restrict__ weight, Vector* shared,
                                                   Sums<Tile>& sums) {
  using T = typename Math::Element;
  constexpr int kVector = Math::kVector;
  const int t = threadIdx.x, channel_vectors = b.channels / kVector;
  const int begin = kForward ? b.slice * (b.slice_depth / kVector) : 0;  // of the depth, in vectors

  // ---- A: this thread's vector of each step, for some pixels
  constexpr int kRowsAtOnce = Tile::kThreads / kRowVectors, kRowsA = Tile::kRows / kRowsAtOnce;
  const int vector = t % kRowVectors, first = t / kRowVectors;
  int pixel_at[kRowsA], pixel_h[kRowsA], pixel_w[kRowsA];  // under tap (0, 0): perhaps outside of the image
#pragma unroll
  for (int i = 0; i < kRowsA; ++i) {
    int n, row, column;
    b.pixel.at(first + i * kRowsAtOnce, n, row, column);
    pixel_h[i] = b.ah.in_first + row * b.ah.in_step;
    pixel_w[i] = b.aw.in_first + column * b.aw.in_step;
    pixel_at[i] = (n * b.in_height + pixel_h[i]) * b.in_width + pixel_w[i];
    // A pixel past the end gets a row outside of every input.
    if (b.row0 + first + i * kRowsAtOnce >= b.pixels) pixel_h[i] = -(1 << 30);
  }
  const T* channel_at = input + b.group * b.channels;
  Position at_a;
  at_a.advance(begin + vector, channel_vectors, b.aw.taps);

  // ---- B: along the depth a vector of some filters, across it a vector of channels of some filters
  constexpr int kWidthB = Tile::kColumns / kVector, kDepthsAtOnce = Tile::kThreads / kWidthB;
  constexpr int kRowsB = kForward ? Tile::kColumns / kRowsAtOnce : Math::kDepth / kDepthsAtOnce;
  static_assert(kRowsAtOnce % 8 == 0 && kDepthsAtOnce % kVector == 0, "rows staged together share a swizzle");
  const int vector_b = kForward ? vector : t % kWidthB, first_b = kForward ? first : t / kWidthB;
  const int column_b = b.column0 + (kForward ? first_b : vector_b * kVector);
  int filter_at = kForward ? (b.group * b.columns + column_b) * b.filter + (begin + vector) * kVector
                           : (b.group * b.channels + first_b % kVector) * b.filter + column_b +
                                 (b.ah.tap_first * b.S + b.aw.tap_first) * b.columns;
  const int tap_r = b.ah.tap_step * b.S * b.columns, tap_s = b.aw.tap_step * b.columns;
  int depth_b = (begin + vector) * kVector;  // of this thread's vector, fprop
  Position at_b;                             // of this thread's first filter, dgrad
  const int taps_b = column_b < b.columns ? b.ah.taps : 0;
  if (!kForward) at_b.advance(first_b / kVector, channel_vectors, b.aw.taps);
  const int place_b = kForward ? along(first_b, vector) : Math::template across<kWidthB>(first_b, vector_b);

  auto stage_next = [&](Vector* tile_a, Vector* tile_b) {
    Vector *to_a = tile_a + along(first, vector), *to_b = tile_b + place_b;
    const bool inside = at_a.r < b.ah.taps;
    const int dh = at_a.r * b.ah.in_tap, dw = at_a.s * b.aw.in_tap;
    const T* from = channel_at + at_a.c * kVector;
    const int shift = dh * b.in_width + dw;
#pragma unroll
    for (int i = 0; i < kRowsA; ++i) {
      const bool valid = inside && static_cast<unsigned>(pixel_h[i] + dh) < static_cast<unsigned>(b.ah.in_size) &&
                         static_cast<unsigned>(pixel_w[i] + dw) < static_cast<unsigned>(b.aw.in_size);
      copy_async_16(to_a + i * kRowsAtOnce * kRowVectors, from + int64_t{pixel_at[i] + shift} * b.in_channels, valid);
    }
    at_a.advance(kRowVectors, channel_vectors, b.aw.taps);
    if constexpr (kForward) {
#pragma unroll
      for (int i = 0; i < kRowsB; ++i)
        copy_async_16(to_b + i * kRowsAtOnce * kRowVectors, weight + (filter_at + i * kRowsAtOnce * b.filter),
                      depth_b < b.filter && column_b + i * kRowsAtOnce < b.columns);
      filter_at += Math::kDepth;
      depth_b += Math::kDepth;
    } else {
#pragma unroll
      for (int i = 0; i < kRowsB; ++i) {
        copy_async_16(to_b + Math::template across<kWidthB>(i * kDepthsAtOnce, 0),
                      weight + (filter_at + at_b.c * kVector * b.filter + at_b.r * tap_r + at_b.s * tap_s),
                      at_b.r < taps_b);
        at_b.advance(kDepthsAtOnce / kVector, channel_vectors, b.aw.taps);
      }
    }
  };
  int depth_vectors = b.ah.taps * b.aw.taps * channel_vectors - begin;
  if (kForward && depth_vectors > b.slice_depth / kVector) depth_vectors = b.slice_depth / kVector;
  accumulate<Math, Tile, false, !kForward>(sums, shared, (depth_vectors + kRowVectors - 1) / kRowVectors, stage_next);
}

}  // namespace cnnfast::cuda::implicit_gemm
