// Where the tiles of Winograd's F(M x M, 3 x 3) lie, and the way of tensor cores' products out of registers: what the
// kernels of both directions and of the weights' gradient share.
#pragma once
#include "primitives/cuda.h"

namespace cnnfast::cuda::winograd {

// A tile of outputs: its image and first pixel.
struct Place {
  int n, p, q;
  bool present;
};

// Of tile number `tile` of the batch, tiles_h x tiles_w an image; there are those below `end`.
template <int M>
__device__ __forceinline__ Place place_of(int tiles_h, int tiles_w, int tile, int end) {
  const int line = tile / tiles_w, n = line / tiles_h;
  return {n, (line - n * tiles_h) * M, (tile - line * tiles_w) * M, tile < end};
}

// Which of the `count` rows, or columns, from `first` on are among the `size` of an image, a bit each.
template <int count, class Size>
__device__ __forceinline__ unsigned inside(int first, Size size) {
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < count; ++i) bits |= static_cast<unsigned>(first + i >= 0 && first + i < size) << i;
  return bits;
}

// Half of the rows of a warp's products, mma.m16n8k16's sums, go through shared memory to threads that take all
// products of a row and column each: [product][row][column], columns swizzled by eights so that neither side has bank
// conflicts.
template <class Block>
struct HalfOfProducts {
  static constexpr int kRows = 16, kColumns = Block::kColumns, kProduct = kRows * kColumns;  // floats

  template <int rows>
  static __device__ __forceinline__ void store(const float (&sums)[Block::kOwn][rows][kColumns / 8][4], int half,
                                               float* products) {
    struct alignas(8) Pair {
      float v[2];
    };
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int f = 0; f < Block::kOwn; ++f)
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = i * 8 + lane / 4, column = (j ^ lane / 4) * 8 + lane % 4 * 2;
          *reinterpret_cast<Pair*>(products + ((warp * Block::kOwn + f) * kRows + row) * kColumns + column) =
              Pair{{sums[f][half][j][i * 2], sums[f][half][j][i * 2 + 1]}};
        }
  }
  // Of a row and column, kProduct apart.
  static __device__ __forceinline__ const float* at(const float* products, int row, int column) {
    return products + row * kColumns + (column ^ row % 8 * 8);
  }
};

}  // namespace cnnfast::cuda::winograd
