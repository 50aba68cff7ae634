// A tile of Winograd's: what it is along each axis, where it lies, and how products become pixels. (conv2d_winograd.h)
#pragma once
#include "conv2d_direct.h"
#include "conv2d_view.h"
#include "conv2d_winograd_transform.h"
#include "epilogue.h"

namespace cnnfast {
namespace CNNFAST_ISA {
namespace {

// An odd number of cache lines: arrays that are walked side by side don't share a set of L1.
template <class T>
CNNFAST_INLINE int64_t odd_lines(int64_t elements) {
  constexpr int64_t kLine = kLineBytes / sizeof(T);
  return (ceil_div(elements, kLine) | 1) * kLine;
}

// M outputs along an axis of a filter of `taps` taps, R of them in a segment.
template <int M, int R, int taps = R>
struct Axis {
  static constexpr int kOutputs = M, kTaps = R, kFilter = taps, kPoints = M + R - 1, kSegments = (taps + R - 1) / R;
  static constexpr int kStride = 1, kWeights = kPoints;

  static constexpr int first_tap(int segment) { return segment * R; }
  static constexpr int segment_taps(int segment) { return taps - segment * R < R ? taps - segment * R : R; }

  template <class T>
  static CNNFAST_INLINE void input(const Vec<T>* d, Vec<T>* t) {
    transform_input<T, M, R>(d, t);
  }
  template <class T>
  static CNNFAST_INLINE void weights(const Vec<T>* g, Vec<T>* t) {
    transform_weights<T, M, R>(g, t);
  }
  template <class T>
  static CNNFAST_INLINE void output(const Vec<T>* m, Vec<T>* y) {
    transform_output<T, M, R>(m, y);
  }
};

// 3 outputs of 3 taps, two inputs apart. The last three points have the same weights, the middle tap.
struct StridedAxis {
  static constexpr int kOutputs = 3, kTaps = 3, kFilter = 3, kPoints = 7, kSegments = 1, kStride = 2, kWeights = 5;

  static constexpr int first_tap(int) { return 0; }
  static constexpr int segment_taps(int) { return kTaps; }

  template <class T>
  static CNNFAST_INLINE void input(const Vec<T>* d, Vec<T>* t) {
    transform_strided_input<T>(d, t);
  }
  template <class T>
  static CNNFAST_INLINE void weights(const Vec<T>* g, Vec<T>* t) {
    transform_strided_weights<T>(g, t);
  }
  template <class T>
  static CNNFAST_INLINE void output(const Vec<T>* m, Vec<T>* y) {
    transform_strided_output<T>(m, y);
  }
};

template <class H_, class W_>
struct WinogradTile {
  using H = H_;
  using W = W_;
  static constexpr int kProducts = H::kPoints * W::kPoints, kSegments = H::kSegments * W::kSegments;
  static constexpr int kTaps = H::kTaps * W::kTaps;           // of a segment
  static constexpr int kWeights = H::kWeights * W::kWeights;  // transformed, of which the last serves the points left

  static bool serves(const Conv2dView& v) { return v.R == H::kFilter && v.S == W::kFilter; }
  // Of a segment: its place along each axis, and whether point (a, b) of its transformed weights can be other than
  // zero: infinity's is the last tap, which the last segment may lack.
  static int row(int64_t segment) { return static_cast<int>(segment) / W::kSegments; }
  static int column(int64_t segment) { return static_cast<int>(segment) % W::kSegments; }
  static bool has_point(int64_t segment, int a, int b) {
    return (a + 1 < H::kPoints || H::segment_taps(row(segment)) == H::kTaps) &&
           (b + 1 < W::kPoints || W::segment_taps(column(segment)) == W::kTaps);
  }
};
template <int M, int R = kTapsAcross>
using SquareTile = WinogradTile<Axis<M, R>, Axis<M, R>>;

struct TilePlace {
  int64_t n, p, q;  // the first pixel of a tile
};
template <class F>
TilePlace tile_place(int64_t tile, int64_t tiles_h, int64_t tiles_w) {
  const int64_t row = tile / tiles_w;
  return {row / tiles_h, row % tiles_h * F::H::kOutputs, tile % tiles_w * F::W::kOutputs};
}

// Where a tile's vector of channels goes: the part of it that lies in y.
template <class S>
struct StoreArgs {
  S* y;
  int64_t y_h, y_w, rows, columns, lanes;
  bool streams;
};

// False: some of it isn't finite.
template <class T, int MH, int MW, class S>
CNNFAST_INLINE bool store_tile(const StoreArgs<S>& args, const Vec<T> (&values)[MH][MW], Vec<T> bias) {
  Vec<T> check{};  // stays zero as long as everything is finite
#pragma GCC unroll 4
  for (int i = 0; i < MH; ++i) {
    if (i >= args.rows) break;
#pragma GCC unroll 4
    for (int j = 0; j < MW; ++j) {
      if (j >= args.columns) break;
      const Vec<T> value = values[i][j] + bias;
      check += value * T(0);
      S* out = args.y + i * args.y_h + j * args.y_w;
      if (args.lanes != kLanes<T>)
        store_narrow(out, value, args.lanes);
      else if (args.streams)
        stream_narrow(out, value);
      else
        store_narrow(out, value);
    }
  }
  return all_zero(check);
}

// The same through the epilogue (conv_bn_act); `channel` is the first lane's.
template <class T, int MH, int MW, class S>
__attribute__((noinline)) bool store_tile_through(const Epilogue<S>& epilogue, const StoreArgs<S>& args,
                                                  const TilePlace& at, int64_t channel, const Vec<T> (&values)[MH][MW],
                                                  Vec<T> bias) {
  const auto factors = epilogue.factors(channel, args.lanes);
  Vec<T> check{};
  for (int64_t i = 0; i < args.rows; ++i)
    for (int64_t j = 0; j < args.columns; ++j) {
      const S* r = epilogue.residual_at(at.n, at.p + i, at.q + j);
      const Vec<T> value = values[i][j] + bias;
      check += value * T(0);
      epilogue.store(args.y + i * args.y_h + j * args.y_w, value, factors, r ? r + channel : nullptr, args.lanes,
                     args.streams);
    }
  return all_zero(check);
}

// One tile's vector of channels: products, `product` elements apart, to pixels of y. False: some aren't finite.
template <class T, class F, class S>
CNNFAST_INLINE bool finish_tile(const T* m, int64_t product, const Conv2dView& v, S* y, const TilePlace& at,
                                int64_t channel, int64_t lanes, Vec<T> bias, const Epilogue<S>* epilogue,
                                bool streams) {
  using H = typename F::H;
  using W = typename F::W;
  constexpr int MH = H::kOutputs, MW = W::kOutputs;
  Vec<T> values[MH][MW];
  transform_axes<T, H::kPoints, W::kPoints, MH, MW>(
      [&](int a, int b) __attribute__((always_inline)) { return load(m + (a * W::kPoints + b) * product); },
      H::template output<T>, W::template output<T>,
      [&](int i, int q, Vec<T> t) __attribute__((always_inline)) { values[i][q] = t; });
  y += at.n * v.y_n + at.p * v.y_h + at.q * v.y_w + channel;
  const StoreArgs<S> args = {y, v.y_h, v.y_w, min(MH, v.P - at.p), min(MW, v.Q - at.q), lanes, streams};
  return epilogue ? store_tile_through<T, MH, MW>(*epilogue, args, at, channel, values, bias)
                  : store_tile<T, MH, MW>(args, values, bias);
}

// The tile's channels [k, end) of a group as direct sums.
template <class F, class S>
__attribute__((noinline)) void redo_tile(const Conv2dView& v, const S* x, const S* w, const S* bias, S* y,
                                         const TilePlace& at, int64_t group, int64_t k, int64_t end,
                                         const Epilogue<S>* epilogue) {
  for (int64_t p = at.p; p < min(at.p + F::H::kOutputs, v.P); ++p)
    for (int64_t q = at.q; q < min(at.q + F::W::kOutputs, v.Q); ++q)
      direct_pixel(v, x, w, bias, y, (at.n * v.P + p) * v.Q + q, group, k, end, epilogue);
}

}  // namespace
}  // namespace CNNFAST_ISA
}  // namespace cnnfast
