// Grouped convolution with few channels a group, wgrad: depthwise (also with 2 or 4 outputs a channel), or 2, 4, 8, 16
// input and as many output channels.
//
//   dw[k,c,r,s] = sum_{n,p,q} x[n,c,h,w] * g[n,k,p,q]     h = p*stride_h - pad_h + r*dilation_h, w alike
//
// A vector holds whole groups of output channels (grouped_lanes.h): input channel c of every group is spread over its
// group's lanes and multiplied by the gradient, so that every lane of every FMA is useful, where a GEMM a group would
// use kOut of them.
//
//   acc[r][s][c] += spread<c>(x[pixel moved by tap (r,s)]) * g[pixel]       up to 24 accumulators over ~128 pixels
//
// A tile's pixels are those for which all its taps lie inside the image: nothing is copied, no zeros stand for the
// padding, and an Inf or a NaN goes where it should. A border pixel's tap is a tile of its own.
//
// A task owns a range of vectors and one of a few fixed parts of the pixels, and walks a few rows at a time, all
// vectors over each. The sums of several parts wait in the workspace and are added in the order of the parts: the same
// bit for bit in every run, whatever the thread count. Sums are in float for float, bf16 and fp16, in double for
// double; one rounding at the end.
#include "../common/kernel_table.h"
#include "conv2d_direct.h"
#include "conv2d_view.h"
#include "grouped_lanes.h"
#include "primitives/parallel.h"
#include "primitives/scratch.h"

namespace cnnfast {
namespace CNNFAST_ISA {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kAccumulators = 24;
#else
constexpr int kAccumulators = 12;
#endif
constexpr int kMaxTaps = 3;                     // along each axis, in a tile
constexpr int64_t kChain = 128;                 // products added up in a row; sums of sums stay accurate
constexpr int64_t kPartsBytes = 4 << 20;        // sums of all parts
constexpr int64_t kMostParts = 16;              // of the pixels
constexpr int64_t kPartPixels = 512;            // at least, of a part
constexpr int64_t kMacsWorthThreads = 1 << 17;  // below, one thread

template <class T, class S>
struct TileArgs {
  const S *x, *g;                          // of the first pixel and tap
  int64_t x_row, x_pixel, g_row, g_pixel;  // elements from output row to row and pixel to pixel
  int64_t tap_row, tap_column;             // elements of x from tap to tap
  int64_t rows, columns;                   // of pixels
  int64_t inputs, lanes;                   // channels of x and of g that there are
  T* sums;                                 // [r][s][c][lanes]; `sums_row` elements from r to r
  int64_t sums_row;
};
template <class T, class S>
using TileFn = void (*)(const TileArgs<T, S>&);

template <class T, int kIn, int kOut, int c = 0>
CNNFAST_INLINE void multiply(Vec<T> (&acc)[kIn], const GroupLanes<T, kIn, kOut>& x, Vec<T> g) {
  if constexpr (c < kIn) {
    acc[c] += x.template spread<c>() * g;
    multiply<T, kIn, kOut, c + 1>(acc, x, g);
  }
}

template <class T, class S, int kIn, int kOut, int NR, int NS, bool kWhole>
void tile(const TileArgs<T, S>& args) {
  using Lanes = GroupLanes<T, kIn, kOut>;
  constexpr int VL = kLanes<T>;
  Vec<T> acc[NR][NS][kIn];
#pragma GCC unroll 3
  for (int r = 0; r < NR; ++r)
#pragma GCC unroll 3
    for (int s = 0; s < NS; ++s)
#pragma GCC unroll 16
      for (int c = 0; c < kIn; ++c) acc[r][s][c] = Vec<T>{};
  for (int64_t p = 0; p < args.rows; ++p) {
    const S *x = args.x + p * args.x_row, *g = args.g + p * args.g_row;
    for (int64_t q = 0; q < args.columns; ++q, x += args.x_pixel, g += args.g_pixel) {
      const Vec<T> value = kWhole ? load_wide(g) : load_wide(g, args.lanes);
#pragma GCC unroll 3
      for (int r = 0; r < NR; ++r)
#pragma GCC unroll 3
        for (int s = 0; s < NS; ++s)
          multiply<T, kIn, kOut>(
              acc[r][s], Lanes::template read<kWhole>(x + r * args.tap_row + s * args.tap_column, args.inputs), value);
    }
  }
#pragma GCC unroll 3
  for (int r = 0; r < NR; ++r)
#pragma GCC unroll 3
    for (int s = 0; s < NS; ++s)
#pragma GCC unroll 16
      for (int c = 0; c < kIn; ++c) {
        T* sum = args.sums + r * args.sums_row + (s * kIn + c) * VL;
        store(sum, load(sum) + acc[r][s][c]);
      }
}

// The tiles of one pair of group sizes, by taps down and across (each less one), then whether the vector is whole.
template <class T, class S>
struct Tiles {
  TileFn<T, S> function[kMaxTaps][kMaxTaps][2];
};

template <class T, class S, int kIn, int kOut, int NR, int NS, bool kWhole>
constexpr TileFn<T, S> tile_or_null() {
  if constexpr (NR * NS * kIn <= kAccumulators || NR * NS == 1)
    return tile<T, S, kIn, kOut, NR, NS, kWhole>;
  else
    return nullptr;
}
#define CNNFAST_TILES(NR, NS) \
  {tile_or_null<T, S, kIn, kOut, NR, NS, false>(), tile_or_null<T, S, kIn, kOut, NR, NS, true>()}
template <class T, class S, int kIn, int kOut>
constexpr Tiles<T, S> kTiles = {{{CNNFAST_TILES(1, 1), CNNFAST_TILES(1, 2), CNNFAST_TILES(1, 3)},
                                 {CNNFAST_TILES(2, 1), CNNFAST_TILES(2, 2), CNNFAST_TILES(2, 3)},
                                 {CNNFAST_TILES(3, 1), CNNFAST_TILES(3, 2), CNNFAST_TILES(3, 3)}}};
#undef CNNFAST_TILES

template <class T, class S, int kIn, int kOut>
const Tiles<T, S>* tiles_or_null() {
  if constexpr (kGroupFits<T, kIn, kOut>)
    return &kTiles<T, S, kIn, kOut>;
  else
    return nullptr;
}
// Null where a vector can't hold the groups.
template <class T, class S>
const Tiles<T, S>* tiles_for(int64_t in, int64_t out) {
  if (in == 1 && out == 1) return tiles_or_null<T, S, 1, 1>();
  if (in == 1 && out == 2) return tiles_or_null<T, S, 1, 2>();
  if (in == 1 && out == 4) return tiles_or_null<T, S, 1, 4>();
  if (in != out) return nullptr;
  if (in == 2) return tiles_or_null<T, S, 2, 2>();
  if (in == 4) return tiles_or_null<T, S, 4, 4>();
  if (in == 8) return tiles_or_null<T, S, 8, 8>();
  if (in == 16) return tiles_or_null<T, S, 16, 16>();
  return nullptr;
}

// The outputs of one axis whose tap lies inside: [first, last).
struct Range {
  int64_t first, last;
};
Range inside(int64_t tap, int64_t outputs, int64_t size, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t offset = tap * dilation - pad;  // of output 0
  const int64_t first = offset >= 0 ? 0 : ceil_div(-offset, stride);
  const int64_t last = size - 1 - offset < 0 ? 0 : (size - 1 - offset) / stride + 1;
  return {min(first, outputs), max(min(first, outputs), min(last, outputs))};
}

// Decided without the thread count, since the workspace is.
int64_t parts_of(const Conv2dParams& p) {
  const int64_t bytes = p.K * (p.C / p.G) * p.R * p.S * 8;
  int64_t parts = kMostParts;
  while (parts > 1 && (parts * kPartPixels > p.N * p.P * p.Q || parts > p.N * p.P || parts * bytes > kPartsBytes))
    parts /= 2;
  return parts;
}

template <class T, class S>
class Worker {
 public:
  Worker(const Conv2dView& v, const Tiles<T, S>& tiles, const S* x, S* dw, const S* g)
      : v_(v), tiles_(tiles), x_(x), dw_(dw), g_(g), sum_(v.R * v.S * v.C * VL) {}

  int64_t sum() const { return sum_; }  // elements of one vector's sums

  // Adds up rows [unit, last_unit) of the batch for vectors [vec, last_vec), into `sums` [vec][r][s][c][lane].
  void run(int64_t vec, int64_t last_vec, int64_t unit, int64_t last_unit, T* sums) {
    for (int64_t i = 0; i < (last_vec - vec) * sum_; i += VL) store(sums + i, Vec<T>{});
    const int64_t most = max(1, kChain / max(1, v_.Q));  // rows at a time
    for (int64_t u = unit; u < last_unit;) {
      const int64_t n = u / v_.P, p = u % v_.P, rows = min(most, min(v_.P - p, last_unit - u));
      for (int64_t j = vec; j < last_vec; ++j) run_rows(j, n, p, p + rows, sums + (j - vec) * sum_);
      u += rows;
    }
  }

  void write(int64_t vec, const T* sums) {
    const int64_t k = vec * VL, lanes = min(VL, v_.G * v_.K - k);
    for (int64_t r = 0; r < v_.R; ++r)
      for (int64_t s = 0; s < v_.S; ++s)
        for (int64_t c = 0; c < v_.C; ++c, sums += VL) {
          S* out = dw_ + r * v_.w_r + s * v_.w_s + c * v_.w_c;
          for (int64_t l = 0; l < lanes; ++l)
            narrow_one(out + (k + l) / v_.K * v_.w_g + (k + l) % v_.K * v_.w_k, sums[l]);
        }
  }

 private:
  static constexpr int64_t VL = kLanes<T>;

  // Rows [p0, p1) of one image for one vector.
  void run_rows(int64_t vec, int64_t n, int64_t p0, int64_t p1, T* sums) {
    const int64_t k = vec * VL, c = k / v_.K * v_.C;
    args_.lanes = min(VL, v_.G * v_.K - k), args_.inputs = args_.lanes / v_.K * v_.C;
    args_.x_row = v_.stride_h * v_.x_h, args_.x_pixel = v_.stride_w * v_.x_w;
    args_.g_row = v_.y_h, args_.g_pixel = v_.y_w;
    args_.tap_row = v_.dilation_h * v_.x_h, args_.tap_column = v_.dilation_w * v_.x_w;
    args_.sums_row = v_.S * v_.C * VL;
    x_image_ = x_ + n * v_.x_n + c, g_image_ = g_ + n * v_.y_n + k, image_sums_ = sums;
    // As many taps at a time as fit, all of the rows' taps before those of more rows.
    const int64_t across = min(kMaxTaps, max(1, kAccumulators / v_.C)),
                  down = min(kMaxTaps, max(1, kAccumulators / (min(across, v_.S) * v_.C)));
    for (int64_t r = 0; r < v_.R; r += down) {
      const int64_t nr = min(down, v_.R - r);
      // the rows that all of these taps reach are done together, the others tap by tap
      const Range lowest = rows_inside(r), highest = rows_inside(r + nr - 1);
      const int64_t first = max(p0, max(lowest.first, highest.first)), last = min(p1, min(lowest.last, highest.last));
      if (first < last) run_taps(r, nr, across, first, last);
      for (int64_t i = r; i < r + nr; ++i) {
        const Range range = rows_inside(i);
        const int64_t a = max(p0, range.first), b = min(p1, range.last);
        if (first >= last) {
          if (a < b) run_taps(i, 1, across, a, b);
          continue;
        }
        if (a < first) run_taps(i, 1, across, a, first);
        if (last < b) run_taps(i, 1, across, last, b);
      }
    }
  }
  Range rows_inside(int64_t r) const { return inside(r, v_.P, v_.H, v_.stride_h, v_.pad_h, v_.dilation_h); }
  Range columns_inside(int64_t s) const { return inside(s, v_.Q, v_.W, v_.stride_w, v_.pad_w, v_.dilation_w); }

  // nr filter rows from r on over output rows [p0, p1), which they all reach.
  void run_taps(int64_t r, int64_t nr, int64_t across, int64_t p0, int64_t p1) {
    for (int64_t s = 0; s < v_.S; s += across) {
      const int64_t ns = min(across, v_.S - s);
      const Range leftmost = columns_inside(s), rightmost = columns_inside(s + ns - 1);
      const int64_t first = max(leftmost.first, rightmost.first), last = min(leftmost.last, rightmost.last);
      if (first < last) run_columns(r, nr, s, ns, p0, p1, first, last);
      for (int64_t i = s; i < s + ns; ++i) {
        const Range range = columns_inside(i);
        if (first >= last) {
          run_columns(r, nr, i, 1, p0, p1, range.first, range.last);
          continue;
        }
        run_columns(r, nr, i, 1, p0, p1, range.first, first);
        run_columns(r, nr, i, 1, p0, p1, last, range.last);
      }
    }
  }

  void run_columns(int64_t r, int64_t nr, int64_t s, int64_t ns, int64_t p0, int64_t p1, int64_t q0, int64_t q1) {
    args_.rows = p1 - p0;
    args_.sums = image_sums_ + (r * v_.S + s) * v_.C * VL;
    for (; q0 < q1; q0 += kChain) {
      args_.columns = min(kChain, q1 - q0);
      const int64_t h = p0 * v_.stride_h - v_.pad_h + r * v_.dilation_h;
      const int64_t w = q0 * v_.stride_w - v_.pad_w + s * v_.dilation_w;
      args_.x = x_image_ + h * v_.x_h + w * v_.x_w;
      args_.g = g_image_ + p0 * v_.y_h + q0 * v_.y_w;
      tiles_.function[nr - 1][ns - 1][args_.lanes == VL](args_);
    }
  }

  const Conv2dView& v_;
  const Tiles<T, S>& tiles_;
  const S* x_;
  S* dw_;
  const S* g_;
  int64_t sum_;
  TileArgs<T, S> args_{};
  const S *x_image_ = nullptr, *g_image_ = nullptr;
  T* image_sums_ = nullptr;
};

template <class S>
const char* launch_wgrad(const void* params, const Launch& l) {
  using T = Compute<S>;
  constexpr int64_t VL = kLanes<T>;
  const Conv2dParams& p = *static_cast<const Conv2dParams*>(params);
  const S *x = static_cast<const S*>(l.operands[0]), *g = static_cast<const S*>(l.operands[3]);
  S* dw = static_cast<S*>(l.operands[1]);
  const Conv2dView v = fprop_view(p);
  const Tiles<T, S>* tiles = tiles_for<T, S>(v.C, v.K);
  if (v.G * v.R * v.S == 0 || !tiles) return nullptr;
  const int64_t parts = parts_of(p), vecs = ceil_div(p.K, VL), units = v.N * v.P;
  const int threads = units * v.Q * p.K * v.C * v.R * v.S < kMacsWorthThreads ? 1 : l.threads;
  const int64_t shares = parts >= threads ? 1 : min(vecs, threads);  // of the vectors
  T* partials = static_cast<T*>(l.workspace);
  const int64_t all = vecs * v.R * v.S * v.C * VL;
  bool memory = true;  // only ever set to false
  parallel_for(
      threads, parts * shares,
      [&](int64_t task) {
        const int64_t part = task / shares, share = task % shares;
        const int64_t vec = vecs * share / shares, last_vec = vecs * (share + 1) / shares;
        Worker<T, S> worker(v, *tiles, x, dw, g);
        T* sums = partials ? partials + part * all + vec * worker.sum()
                           : static_cast<T*>(thread_scratch((last_vec - vec) * worker.sum() * sizeof(T)));
        if (!sums) return __atomic_store_n(&memory, false, __ATOMIC_RELAXED);
        worker.run(vec, last_vec, units * part / parts, units * (part + 1) / parts, sums);
        if (!partials)
          for (int64_t j = vec; j < last_vec; ++j) worker.write(j, sums + (j - vec) * worker.sum());
      },
      kDenormals<S>);
  if (!memory) return "out of memory";
  if (partials)
    parallel_for(
        threads, vecs,
        [&](int64_t vec) {
          Worker<T, S> worker(v, *tiles, x, dw, g);
          T* sums = partials + vec * worker.sum();
          for (int64_t part = 1; part < parts; ++part)
            for (int64_t i = 0; i < worker.sum(); i += VL)
              store(sums + i, load(sums + i) + load(sums + part * all + i));
          worker.write(vec, sums);
        },
        kDenormals<S>);
  return nullptr;
}

template <class S>
int64_t wgrad_workspace(const void* params) {
  using T = Compute<S>;
  const Conv2dParams& p = *static_cast<const Conv2dParams*>(params);
  const int64_t parts = parts_of(p), all = round_up(p.K, kLanes<T>) * p.R * p.S * (p.C / p.G);
  return parts > 1 ? parts * all * static_cast<int64_t>(sizeof(T)) : 0;
}

}  // namespace

CNNFAST_KERNEL("conv2d_grouped.wgrad.f32", Conv2dParams, launch_wgrad<float>, wgrad_workspace<float>)
CNNFAST_KERNEL("conv2d_grouped.wgrad.f64", Conv2dParams, launch_wgrad<double>, wgrad_workspace<double>)
CNNFAST_KERNEL("conv2d_grouped.wgrad.bf16", Conv2dParams, launch_wgrad<BFloat16>, wgrad_workspace<BFloat16>)
CNNFAST_KERNEL("conv2d_grouped.wgrad.f16", Conv2dParams, launch_wgrad<Float16>, wgrad_workspace<Float16>)

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
