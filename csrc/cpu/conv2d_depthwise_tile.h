// The register tile of depthwise convolutions that read x where it lies.
//
//   acc[i] += x[column i * kStep + s] * w[r][s]       i: `MR` neighbours of one output row, one vector of channels
//
// A pixel of x is loaded once for all taps of a filter row that meet it: with kTaps = 3 that is 16 loads for 42 FMAs of
// 14 pixels. Columns outside the map are zeros in registers; filter rows outside are left out by the caller. Against a
// strip that is copied first, that saves a load and a store for each pixel.
#pragma once
#include "conv2d_view.h"

namespace cnnfast {
namespace CNNFAST_ISA {

constexpr int kMostTaps = 7;

template <class T, class S>
struct DepthwiseArgs {
  const S* x;             // column 0 of the first filter row; what lies outside the map is not read
  int64_t row, column;    // elements of x from one filter row to the next, from one column to the next
  int64_t first, inside;  // columns [first, first + inside) lie in the map
  int64_t R;              // filter rows
  const T* w;             // [row][tap][lanes]
  const T* bias;          // one vector
  T* out;                 // vectors `out_step` elements apart
  int64_t out_step;
  bool streams;  // past the caches to `out`
};
template <class T, class S>
using DepthwiseFn = void (*)(const DepthwiseArgs<T, S>&);

template <class T, class S, int kTaps, int kStep, int MR>
void depthwise_tile(const DepthwiseArgs<T, S>& args) {
  constexpr int VL = kLanes<T>;
  Vec<T> acc[MR];
#pragma GCC unroll 14
  for (int i = 0; i < MR; ++i) acc[i] = Vec<T>{};
  const S* x = args.x;
  const T* w = args.w;
  const int64_t column = args.column, first = args.first;
  const uint64_t inside = static_cast<uint64_t>(args.inside);
  for (int64_t r = 0; r < args.R; ++r, x += args.row, w += kTaps * VL) {
    Vec<T> weights[kTaps];
#pragma GCC unroll 7
    for (int s = 0; s < kTaps; ++s) weights[s] = load(w + s * VL);
#pragma GCC unroll 40
    for (int j = 0; j < (MR - 1) * kStep + kTaps; ++j) {
      const Vec<T> value = static_cast<uint64_t>(j - first) < inside ? load_wide(x + j * column) : Vec<T>{};
#pragma GCC unroll 7
      for (int s = 0; s < kTaps; ++s)
        if (j >= s && (j - s) % kStep == 0 && (j - s) / kStep < MR) acc[(j - s) / kStep] += value * weights[s];
    }
  }
  const Vec<T> bias = load(args.bias);
  if (args.streams) {
#pragma GCC unroll 14
    for (int i = 0; i < MR; ++i) stream(args.out + i * args.out_step, bias + acc[i]);
    return;
  }
#pragma GCC unroll 14
  for (int i = 0; i < MR; ++i) store(args.out + i * args.out_step, bias + acc[i]);
}

// By pixels, 1 to kMost.
template <class T, class S, int kMost>
using DepthwiseTiles = DepthwiseFn<T, S>[kMost + 1];

template <class T, class S, int kTaps, int kStep, int kMost, int MR = 1>
constexpr void add_depthwise_tiles(DepthwiseTiles<T, S, kMost>& tiles) {
  tiles[MR] = depthwise_tile<T, S, kTaps, kStep, MR>;
  if constexpr (MR < kMost) add_depthwise_tiles<T, S, kTaps, kStep, kMost, MR + 1>(tiles);
}
template <class T, class S, int kMost>
struct AllDepthwiseTiles {
  DepthwiseTiles<T, S, kMost> function[kMostTaps + 1][2];  // by columns of the filter; step 1 and 2; null where none is
};
template <class T, class S, int kMost>
constexpr AllDepthwiseTiles<T, S, kMost> make_depthwise_tiles() {
  AllDepthwiseTiles<T, S, kMost> tiles{};
  // 1 and 2: the classes of a gradient with stride 2
  add_depthwise_tiles<T, S, 1, 1, kMost>(tiles.function[1][0]);
  add_depthwise_tiles<T, S, 2, 1, kMost>(tiles.function[2][0]);
  add_depthwise_tiles<T, S, 3, 1, kMost>(tiles.function[3][0]);
  add_depthwise_tiles<T, S, 3, 2, kMost>(tiles.function[3][1]);
  add_depthwise_tiles<T, S, 5, 1, kMost>(tiles.function[5][0]);
  add_depthwise_tiles<T, S, 5, 2, kMost>(tiles.function[5][1]);
  add_depthwise_tiles<T, S, 7, 1, kMost>(tiles.function[7][0]);
  add_depthwise_tiles<T, S, 7, 2, kMost>(tiles.function[7][1]);
  return tiles;
}
template <class T, class S, int kMost>
constexpr AllDepthwiseTiles<T, S, kMost> kDepthwiseTiles = make_depthwise_tiles<T, S, kMost>();

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
