// The pixels of NHWC operands of one shape, counted through, and how blocks share them out: what the kernels that are
// bound by memory walk over.
#pragma once
#include <algorithm>

#include "packs.h"

namespace cnnfast::cuda {

// Distances between images, rows and pixels, in elements.
struct Strides {
  int64_t n, h, w;

  __host__ int64_t all() const { return n | h | w; }
};

// At most 2^30 of them.
struct Pixels {
  int count, H, W;
  bool even;  // in every operand all neighbours are equally far apart: no division to find one

  // strides: of the operands that are present.
  template <class... S>
  Pixels(int64_t N, int64_t H_, int64_t W_, const S&... strides)
      : count(static_cast<int>(N * H_ * W_)),
        H(static_cast<int>(H_)),
        W(static_cast<int>(W_)),
        even((is_even(N, H_, W_, strides) && ...)) {}

  __device__ __forceinline__ int64_t offset(const Strides& s, int pixel) const {
    if (even) return pixel * s.w;
    const int line = pixel / W, n = line / H;
    return n * s.n + (line - n * H) * s.h + (pixel - line * W) * s.w;
  }

 private:
  // A single row or image has no stride of its own.
  static bool is_even(int64_t N, int64_t H, int64_t W, const Strides& s) {
    return (H == 1 || s.h == W * s.w) && (N == 1 || s.n == H * W * s.w);
  }
};

// A block's share: a tile of `lanes` packs of channels and a chunk of `length` pixels, `rows` of which it walks over
// side by side. Thread t has pack t % lanes of pixel t / lanes, + rows, ...; a few threads may have nothing.
struct Shares {
  int lanes, rows;
  int64_t tiles, chunks, length;

  // `walk`: pixels a thread takes, at least and at most; between them so many that there are about `blocks` blocks.
  Shares(int64_t pixels, int64_t packs, int threads, int64_t least, int64_t most, int64_t blocks,
         int64_t most_lanes = 32) {  // packs that lie together: 512 bytes
    tiles = ceil_div(packs, most_lanes);
    lanes = static_cast<int>(ceil_div(packs, tiles));
    tiles = ceil_div(packs, lanes);
    rows = threads / lanes;
    const int64_t walk = std::min(most, ceil_div(ceil_div(pixels * tiles, rows * blocks), least) * least);
    length = std::max(walk, least) * rows;
    chunks = ceil_div(pixels, length);
  }
  __host__ __device__ int64_t count() const { return tiles * chunks; }
};

// What thread `thread` does of share `i`.
struct Share {
  int64_t pack, chunk;
  int row, first, end;  // its pixels: first, first + rows, ... below end
  bool present;

  __device__ __forceinline__ Share(const Shares& shares, int64_t i, int thread, int64_t packs, int pixels) {
    row = thread / shares.lanes;
    chunk = i / shares.tiles;
    pack = (i - chunk * shares.tiles) * shares.lanes + thread - row * shares.lanes;
    first = static_cast<int>(chunk * shares.length) + row;
    const int64_t past = (chunk + 1) * shares.length;
    end = past < pixels ? static_cast<int>(past) : pixels;
    present = row < shares.rows && pack < packs;
  }
};

// Joins what the rows of a block have, in an order that the sizes decide: merge(other) takes in what thread `other` has
// in shared memory, where this thread's own lies, too.
template <class Merge>
__device__ __forceinline__ void join_rows(int rows, int lanes, int row, const Merge& merge) {
  __syncthreads();
  for (int left = rows; left > 1;) {
    const int half = (left + 1) / 2;
    if (row + half < left) merge(static_cast<int>(threadIdx.x) + half * lanes);
    __syncthreads();
    left = half;
  }
}

}  // namespace cnnfast::cuda
