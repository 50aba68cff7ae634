// What Winograd's weight gradients, F(3 x 3, M x M), share: how tiles are cut into blocks, where a tile lies, and the
// way from the products to dw. Formula and mapping are in conv2d_winograd_weights.cu (f32) and
// conv2d_winograd_weights_half.cu (bf16 and f16).
//
// A block sums the products of its channels over a slice of the tiles. Where a chain of sums ends, what G' and G make
// of it is added to the slice's taps in the workspace:
//
//   partial [slice][tap][c][k]
//
// A second kernel adds the slices in order. Deterministic, without atomics: the slices depend on sizes only. Where a
// result isn't finite (Inf or NaN among the operands spreads over all taps, large values may overflow in between) it
// sums that tap directly: infinities and NaNs come out where the direct kernel's do.
#pragma once
#include "../common/kernel_table.h"
#include "conv2d_axes.h"
#include "conv2d_winograd_tiles.h"
#include "conv2d_winograd_transform.h"
#include "primitives/launch.h"
#include "primitives/numeric.h"

namespace cnnfast::cuda::winograd {

constexpr int kTaps = kTapsAcross * kTapsAcross;
constexpr int kAddThreads = 256;
constexpr int64_t kBlocksWanted = 264;
constexpr int64_t kSliceTiles = 128;  // at least

// How the sums are cut into blocks: (input channels, output channels, slices of the tiles).
struct Cut {
  int tiles_h, tiles_w, tiles;  // of an image; of the batch
  int rows, columns;            // blocks of input, of output channels
  int slice, slices;            // tiles of a slice

  template <class Block>
  static Cut of(const Conv2dParams& p) {
    Cut cut;
    cut.tiles_h = static_cast<int>(ceil_div(p.P, Block::kOutputs));
    cut.tiles_w = static_cast<int>(ceil_div(p.Q, Block::kOutputs));
    cut.tiles = static_cast<int>(p.N) * cut.tiles_h * cut.tiles_w;
    cut.rows = static_cast<int>(ceil_div(p.C, Block::kRows));
    cut.columns = static_cast<int>(ceil_div(p.K, Block::kColumns));
    const int64_t owners = std::max<int64_t>(1, int64_t{cut.rows} * cut.columns);
    const int64_t wanted = std::min(ceil_div(kBlocksWanted, owners), ceil_div(cut.tiles, kSliceTiles));
    const int64_t steps = ceil_div(ceil_div(cut.tiles, std::max<int64_t>(1, wanted)), Block::kStep);
    cut.slice = static_cast<int>(steps) * Block::kStep;
    cut.slices = cut.tiles == 0 ? 0 : static_cast<int>(ceil_div(cut.tiles, cut.slice));
    return cut;
  }
  dim3 blocks() const {
    return dim3(static_cast<unsigned>(rows), static_cast<unsigned>(columns), static_cast<unsigned>(slices));
  }
};

// Where a tile lies: offsets of its first pixels, that of x perhaps outside of the image; which of its rows and columns
// are inside, a bit each.
struct TilePlace {
  int64_t x, y;
  unsigned x_rows, x_columns, y_rows, y_columns;
};

template <int M>
__device__ __forceinline__ TilePlace place_of(const Conv2dParams& p, const Cut& cut, int tile, int end) {
  const Place at = place_of<M>(cut.tiles_h, cut.tiles_w, tile, end);
  const int h = at.p - static_cast<int>(p.pad_h), w = at.q - static_cast<int>(p.pad_w);
  TilePlace place{at.n * p.x_n + h * p.x_h + w * p.x_w, at.n * p.y_n + at.p * p.y_h + at.q * p.y_w, 0, 0, 0, 0};
  if (!at.present) return place;
  place.x_rows = inside<kPoints<M>>(h, p.H), place.x_columns = inside<kPoints<M>>(w, p.W);
  place.y_rows = inside<M>(at.p, p.P), place.y_columns = inside<M>(at.q, p.Q);
  return place;
}

// What a chain's products of a pair of channels, kApart floats apart, are to its taps, `pitch` apart; added unless the
// chain is the slice's first.
template <int M, int kApart>
__device__ __forceinline__ void finish(const float* products, float* __restrict__ to, int64_t pitch, bool first) {
  constexpr int P = kPoints<M>, R = kTapsAcross;
  float rows[R][P];
#pragma unroll
  for (int b = 0; b < P; ++b) {
    float column[P], g[R];
#pragma unroll
    for (int a = 0; a < P; ++a) column[a] = products[(a * P + b) * kApart];
    transform_taps<M>(column, g);
#pragma unroll
    for (int r = 0; r < R; ++r) rows[r][b] = g[r];
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    float g[R];
    transform_taps<M>(rows[r], g);
#pragma unroll
    for (int s = 0; s < R; ++s) {
      float& tap = to[(r * R + s) * pitch];
      tap = first ? g[s] : tap + g[s];
    }
  }
}

// One tap of a pair of channels as a direct sum.
template <class T>
__device__ float direct(const Conv2dParams& p, const T* __restrict__ x, const T* __restrict__ y, int r, int s,
                        int64_t c, int64_t k) {
  float total = 0.0f;
#pragma unroll 1
  for (int64_t line = 0; line < p.N * p.P; ++line) {
    const int64_t n = line / p.P, row = line % p.P, h = row - p.pad_h + r;
    if (h < 0 || h >= p.H) continue;
    float sum = 0.0f;
#pragma unroll 1
    for (int64_t q = 0; q < p.Q; ++q) {
      const int64_t w = q - p.pad_w + s;
      if (w >= 0 && w < p.W)
        sum += Numeric<T>::widen(y[n * p.y_n + row * p.y_h + q * p.y_w + k]) *
               Numeric<T>::widen(x[n * p.x_n + h * p.x_h + w * p.x_w + c]);
    }
    total += sum;
  }
  return total;
}

// dw = the sum over slices, in order; a thread for each element.
template <class T>
__global__ void __launch_bounds__(kAddThreads)
    add_slices(const Conv2dParams p, const float* __restrict__ partial, const int slices, const T* __restrict__ x,
               const T* __restrict__ y, T* __restrict__ w) {
  const int64_t elements = kTaps * p.C * p.K;
  for (int64_t i = int64_t{blockIdx.x} * kAddThreads + threadIdx.x; i < elements;
       i += int64_t{gridDim.x} * kAddThreads) {
    float sum = 0.0f;
#pragma unroll 1
    for (int slice = 0; slice < slices; ++slice) sum += partial[slice * elements + i];
    const int64_t k = i % p.K, rest = i / p.K, c = rest % p.C;
    const int tap = static_cast<int>(rest / p.C), r = tap / kTapsAcross, s = tap % kTapsAcross;
    if (!is_finite(sum)) sum = direct(p, x, y, r, s, c, k);
    w[k * p.w_k + c * p.w_c + r * p.w_r + s * p.w_s] = Numeric<T>::narrow(sum);
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <class Block>
int64_t wgrad_workspace(const void* params) {
  const auto& p = *static_cast<const Conv2dParams*>(params);
  return Cut::of<Block>(p).slices * kTaps * p.C * p.K * static_cast<int64_t>(sizeof(float));
}

// `kernel` computes the slices' taps.
template <class T, class Block, auto kernel>
const char* launch_wgrad(const void* params, const Launch& run) {
  const auto& p = *static_cast<const Conv2dParams*>(params);
  const Cut cut = Cut::of<Block>(p);
  const T *x = static_cast<const T*>(run.operands[0]), *y = static_cast<const T*>(run.operands[3]);
  T* w = static_cast<T*>(run.operands[1]);
  float* partial = static_cast<float*>(run.workspace);
  if (p.C * p.K == 0) return nullptr;
  if (cut.slices > 0) {
    const char* error = launch<kernel>(cut.blocks(), dim3(Block::kThreads, 1, 1), Block::kSharedBytes, run.stream, p,
                                       cut, x, y, partial);
    if (error) return error;
  }
  return launch<add_slices<T>>(grid_for(ceil_div(kTaps * p.C * p.K, kAddThreads)), dim3(kAddThreads, 1, 1), 0,
                               run.stream, p, static_cast<const float*>(partial), cut.slices, x, y, w);
}

}  // namespace cnnfast::cuda::winograd
