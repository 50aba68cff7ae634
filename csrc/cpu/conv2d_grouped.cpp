// Grouped convolution with few channels a group, fprop and dgrad: as many output as input channels, 1 (depthwise), 2,
// 4, 8 or 16, or depthwise with 2 or 4 outputs a channel (dgrad: 2).
//
//   y[n,k,p,q] = b[k] + sum_{r,s, c of k's group} x[n,c,h,w] * w[k,c,r,s]     h = p*stride_h - pad_h + r*dilation_h
//
// A vector holds whole groups of output channels (grouped_lanes.h). Input channel q of every group is spread over its
// group's lanes by one shuffle and multiplied by a vector of weights packed in that order: every lane of every FMA is
// useful, where a GEMM a group would use kOut of them.
//
//   acc[pixel] += spread<q>(x[pixel moved by tap]) * w[tap][q]        8 pixels of one row x 1 vector a tile
//
// Filters of three columns spread an input pixel once for all three taps of a row, which leaves 16 shuffles for 42 FMAs
// in a tile of 14 pixels: on Zen 4 shuffles and FMAs share units, and a shuffle for each FMA halves its speed.
//
// dgrad is fprop of the gradient, one stride-1 convolution for each residue class (conv2d_view.h). fprop with more
// operands is conv_bn_act: sums go through epilogue.h.
// A thread owns vectors of channels times rows of the output. It packs the weights inside the call (or the pack entry
// did so beforehand), as many vectors' at a time as stay in L2, and goes through blocks of output rows. Of 4 vectors at
// a time it copies the rows of x that the block needs, a vector's beside each other [row][column][lanes]: every input
// pixel once, widened, with the zeros of the padding. What the next 4 need is asked for meanwhile: x comes from memory
// block by block, whole pixels, not a part of every pixel again and again. A single tap without padding reads x itself,
// and so does a depthwise filter (conv2d_depthwise_tile.h), row by row of whole pixels.
// Sums are in float for float, bf16 and fp16, in double for double; one rounding. Padding contributes nothing: a call
// that meets an Inf or a NaN among its weights is done again by the direct kernel (zeros stand for the padding).
#include "../common/kernel_table.h"
#include "conv2d_depthwise_tile.h"
#include "conv2d_direct.h"
#include "conv2d_view.h"
#include "grouped_lanes.h"
#include "pack.h"
#include "primitives/parallel.h"
#include "primitives/scratch.h"

namespace cnnfast {
namespace CNNFAST_ISA {
namespace {

constexpr int kKnownSteps = 2;  // pixels from output to output that tiles are compiled for
constexpr int kMaxRows = 8;     // pixels in a tile
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMaxSharedRows = 14;  // and where taps share what is spread
#else
constexpr int kMaxSharedRows = 8;
#endif
constexpr int kSharedTaps = 3;               // columns of such a filter
constexpr int64_t kVecs = 4;                 // vectors of channels whose rows are copied at a time
constexpr int64_t kPackedBytes = 384 << 10;  // weights packed at a time
constexpr int64_t kStripBytes = 64 << 10;    // copied rows of one vector
constexpr int64_t kFarBytes = 4 << 20;       // of x: what is smaller is still in the caches that its writer left it in
constexpr int64_t kImageBytes = 1 << 20;     // of g, while the classes of dgrad pass by
constexpr int64_t kMacsWorthThreads = 1 << 17;   // below, one thread
constexpr int64_t kRowsWorthSharing = 16;        // of a thread
constexpr int64_t kWeightsWorthTwice = 1 << 16;  // weights that threads may pack each for itself
constexpr int64_t kChain = 128;                  // products added up in a row; sums of sums stay accurate

template <class T>
struct TileArgs {
  const T* x;                  // the first pixel's vector
  int64_t pixel, row, column;  // elements between a tile's pixels, filter rows, filter columns
  int64_t R, S;
  int64_t flush_rows;  // filter rows in a chain
  const T* w;          // [tap][q][lanes]
  const T* bias;       // one vector
  T* out;              // vectors `out_step` elements apart
  int64_t out_step;
  bool streams;  // past the caches to `out`
};
template <class T>
using TileFn = void (*)(const TileArgs<T>&);

template <class T, int kIn, int kOut, int q = 0>
CNNFAST_INLINE void multiply(Vec<T>& acc, const GroupLanes<T, kIn, kOut>& x, const Vec<T>* weights) {
  if constexpr (q < kIn) {
    acc += x.template spread<q>() * weights[q];
    multiply<T, kIn, kOut, q + 1>(acc, x, weights);
  }
}

// Input channel q of one filter row of kSharedTaps taps: every pixel of the strip, `kStep` of them from output to
// output, is spread once.
template <class T, int kStep, int MR, class Spread>
CNNFAST_INLINE void multiply_spread(Vec<T> (&acc)[MR], const T* w, int64_t tap, const Spread& spread) {
  Vec<T> weights[kSharedTaps];
#pragma GCC unroll 3
  for (int s = 0; s < kSharedTaps; ++s) weights[s] = load(w + s * tap);
#pragma GCC unroll 32
  for (int j = 0; j < (MR - 1) * kStep + kSharedTaps; ++j) {
    const Vec<T> value = spread(j);
#pragma GCC unroll 3
    for (int s = 0; s < kSharedTaps; ++s)
      if (j >= s && (j - s) % kStep == 0 && (j - s) / kStep < MR) acc[(j - s) / kStep] += value * weights[s];
  }
}

// Such a row, for all q.
template <class T, int kIn, int kOut, int kStep, int MR, int q = 0>
CNNFAST_INLINE void multiply_row(Vec<T> (&acc)[MR], const T* x, const T* w) {
  using Lanes = GroupLanes<T, kIn, kOut>;
  constexpr int VL = kLanes<T>;
  if constexpr (Lanes::kBroadcasts) {
    // any lane can be broadcast from memory, so that q needn't be known to the compiler
    for (int i = 0; i < kIn; ++i, ++x, w += VL)
      multiply_spread<T, kStep>(acc, w, kIn * VL,
                                [&](int j) __attribute__((always_inline)) { return broadcast(x[j * VL]); });
  } else if constexpr (q < kIn) {
    multiply_spread<T, kStep>(acc, w + q * VL, kIn * VL, [&](int j) __attribute__((always_inline)) {
      return Lanes::template read<true>(x + j * Lanes::kVectors * VL, 0).template spread<q>();
    });
    multiply_row<T, kIn, kOut, kStep, MR, q + 1>(acc, x, w);
  }
}

// kStep: pixels of the strip from one of the tile's pixels to the next, known so that no address is computed; 0: any.
// kShared: kSharedTaps columns, one pixel of the strip apart.
template <class T, int kIn, int kOut, int kStep, bool kShared, int MR>
void tile(const TileArgs<T>& args) {
  constexpr int VL = kLanes<T>;
  const int64_t pixel = kStep ? kStep * GroupLanes<T, kIn, kOut>::kVectors * VL : args.pixel;
  Vec<T> total[MR], acc[MR];
#pragma GCC unroll 14
  for (int i = 0; i < MR; ++i) total[i] = load(args.bias);
  const T* w = args.w;
  for (int64_t r0 = 0; r0 < args.R; r0 += args.flush_rows) {
#pragma GCC unroll 14
    for (int i = 0; i < MR; ++i) acc[i] = Vec<T>{};
    const int64_t end = min(args.R, r0 + args.flush_rows);
    for (int64_t r = r0; r < end; ++r) {
      const T* x = args.x + r * args.row;
      if constexpr (kShared) {
        multiply_row<T, kIn, kOut, kStep, MR>(acc, x, w);
        w += kSharedTaps * kIn * VL;
      } else {
        for (int64_t s = 0; s < args.S; ++s, x += args.column, w += kIn * VL) {
          if constexpr (GroupLanes<T, kIn, kOut>::kBroadcasts) {
            for (int q = 0; q < kIn; ++q) {
              const Vec<T> weights = load(w + q * VL);
#pragma GCC unroll 8
              for (int i = 0; i < MR; ++i) acc[i] += broadcast(x[i * pixel + q]) * weights;
            }
          } else {
            Vec<T> weights[kIn];
#pragma GCC unroll 16
            for (int q = 0; q < kIn; ++q) weights[q] = load(w + q * VL);
#pragma GCC unroll 8
            for (int i = 0; i < MR; ++i)
              multiply<T, kIn, kOut>(acc[i], GroupLanes<T, kIn, kOut>::template read<true>(x + i * pixel, 0), weights);
          }
        }
      }
    }
#pragma GCC unroll 14
    for (int i = 0; i < MR; ++i) total[i] += acc[i];
  }
  if (args.streams) {
#pragma GCC unroll 14
    for (int i = 0; i < MR; ++i) stream(args.out + i * args.out_step, total[i]);
    return;
  }
#pragma GCC unroll 14
  for (int i = 0; i < MR; ++i) store(args.out + i * args.out_step, total[i]);
}

// Of double only the tiles that serve everything: networks are not in double, and each tile is compiled.
template <class T>
constexpr bool kSpecialised = kSame<T, float>;

template <class T>
struct Tiles {
  TileFn<T> function[kKnownSteps + 1][kMaxRows + 1];      // by step and pixels
  TileFn<T> shared[kKnownSteps + 1][kMaxSharedRows + 1];  // step 1 and more
};

template <class T, int kIn, int kOut, int MR>
constexpr void add_tiles(Tiles<T>& tiles) {
  if constexpr (MR <= kMaxRows) tiles.function[0][MR] = tile<T, kIn, kOut, 0, false, MR>;
  if constexpr (MR <= kMaxRows && kSpecialised<T>) {
    tiles.function[1][MR] = tile<T, kIn, kOut, 1, false, MR>;
    tiles.function[2][MR] = tile<T, kIn, kOut, 2, false, MR>;
  }
  if constexpr (MR <= kMaxSharedRows && kSpecialised<T>) {
    tiles.shared[1][MR] = tile<T, kIn, kOut, 1, true, MR>;
    tiles.shared[2][MR] = tile<T, kIn, kOut, 2, true, MR>;
  }
  if constexpr (MR < kMaxSharedRows) add_tiles<T, kIn, kOut, MR + 1>(tiles);
}
template <class T, int kIn, int kOut>
constexpr Tiles<T> make_tiles() {
  Tiles<T> tiles{};
  add_tiles<T, kIn, kOut, 1>(tiles);
  return tiles;
}
template <class T, int kIn, int kOut>
constexpr Tiles<T> kTiles = make_tiles<T, kIn, kOut>();

template <class T, int kIn, int kOut>
const Tiles<T>* tiles_or_null() {
  if constexpr (kGroupFits<T, kIn, kOut>)
    return &kTiles<T, kIn, kOut>;
  else
    return nullptr;
}
// Null where a vector can't hold the groups.
template <class T>
const Tiles<T>* tiles_for(int64_t in, int64_t out) {
  if (in == 1 && out == 2) return tiles_or_null<T, 1, 2>();
  if (in == 1 && out == 4) return tiles_or_null<T, 1, 4>();
  if (in == 2 && out == 1) return tiles_or_null<T, 2, 1>();
  if (in != out) return nullptr;
  if (in == 1) return tiles_or_null<T, 1, 1>();
  if (in == 2) return tiles_or_null<T, 2, 2>();
  if (in == 4) return tiles_or_null<T, 4, 4>();
  if (in == 8) return tiles_or_null<T, 8, 8>();
  if (in == 16) return tiles_or_null<T, 16, 16>();
  return nullptr;
}

// Elements of one vector's packed bias and weights.
template <class T>
int64_t packed_vector(const Conv2dView& v) {
  return (1 + v.R * v.S * v.C) * kLanes<T>;
}

// The tiles that read x where it lies, or null: of depthwise filters whose columns lie side by side.
template <class T, class S>
const DepthwiseFn<T, S>* depthwise_tiles(const Conv2dView& v) {
  if constexpr (kSpecialised<T>) {
    const bool depthwise = v.C == 1 && v.K == 1 && v.R * v.S <= kChain;
    if (depthwise && v.S <= kMostTaps && (v.dilation_w == 1 || v.S == 1) && v.stride_w <= 2) {
      const auto& tiles = kDepthwiseTiles<T, S, kMaxSharedRows>.function[v.S][v.stride_w - 1];
      return tiles[1] ? tiles : nullptr;
    }
  }
  return nullptr;
}

template <class T, class S>
class Worker {
 public:
  Worker(const Conv2dView& v, const Tiles<T>& tiles, const S* x, const S* w, const S* bias, S* y, const T* packed,
         const Epilogue<S>* epilogue)
      : v_(v), tiles_(tiles), x_(x), w_(w), bias_(bias), y_(y), epilogue_(epilogue), given_(packed) {}

  bool finite() const { return finite_; }

  // One vector's bias, then its weights [tap][q][lane], to `out`.
  void pack(int64_t vec, T* out) {
    const int64_t channel = vec * VL, lanes = min(VL, channels() - channel);
    store(out, bias_ ? load_wide(bias_ + channel, lanes) : Vec<T>{});
    out += VL;
    const S* w = w_ + channel / v_.K * v_.w_g;
    if (!taps()) return;
    const PanelShape shape = panel(lanes);
    if (v_.w_g == v_.K * v_.w_k) {
      finite_ &= pack_panel<T>(out, w, shape);
      return;
    }
    Vec<T> check{};
    for_each_row(shape, [&](int64_t offset) {
      Vec<T> value{};
      for (int64_t l = 0; l < lanes; ++l) value[l] = widen_one(w[offset + lane(l)]);
      check += value * T(0);
      store(out, value);
      out += VL;
    });
    for (int l = 0; l < VL; ++l) finite_ &= check[l] == T(0);
  }

  // The way back, to weights at `w`.
  void unpack(int64_t vec, const T* packed, S* w) const {
    const int64_t lanes = min(VL, channels() - vec * VL);
    w += vec * VL / v_.K * v_.w_g;
    for_each_row(panel(lanes), [&](int64_t offset) {
      packed += VL;  // the first vector is the bias
      for (int64_t l = 0; l < lanes; ++l) narrow_one(w + offset + lane(l), packed[l]);
    });
  }

  // Vectors [vec, last_vec) of rows [unit, last_unit) of the batch. False: out of memory.
  bool run(int64_t vec, int64_t last_vec, int64_t unit, int64_t last_unit) {
    if (vec == last_vec || unit == last_unit) return true;
    const int64_t vector = packed_vector<T>(v_);
    const int64_t packed_vecs = min(last_vec - vec, max(1, kPackedBytes / (vector * static_cast<int64_t>(sizeof(T)))));
    const int64_t vecs = ceil_div(packed_vecs, ceil_div(packed_vecs, kVecs));
    step_h_ = needed_step(v_.P, v_.R, v_.stride_h, v_.dilation_h);
    step_w_ = needed_step(v_.Q, v_.S, v_.stride_w, v_.dilation_w);
    columns_ = taps() ? ((v_.Q - 1) * v_.stride_w + (v_.S - 1) * v_.dilation_w) / step_w_ + 1 : 0;
    pitch_ = max(1, v_.C / v_.K) * VL;
    direct_ = kSame<S, T> && taps() == 1 && !reaches_padding(v_);
    in_place_ = depthwise_tiles<T, S>(v_);
    block_ = v_.P;
    while (block_ > 1 && strip_elements(block_) * static_cast<int64_t>(sizeof(T)) > kStripBytes)
      block_ = ceil_div(block_, 2);
    const auto carve = [&](Carver carver) {
      packed_ = carver.take<T>(given_ ? 0 : packed_vecs * vector);
      tile_ = carver.take<T>(kMaxSharedRows * VL);
      strip_ = carver.take<T>(max(pitch_, vecs * strip_elements(block_)) + VL);
      return carver.used();
    };
    void* scratch = thread_scratch(carve(Carver(nullptr)));
    if (!scratch) return false;
    carve(Carver(scratch));
    streams_ = kLineVectors && streams_result(v_, y_, true);
    for (; vec < last_vec; vec += packed_vecs) {
      const int64_t end = min(vec + packed_vecs, last_vec);
      for (int64_t j = vec; j < end && !given_; ++j) pack(j, packed_ + (j - vec) * vector);
      const T* packed = given_ ? given_ + vec * vector : packed_;
      const int64_t first = in_place_ ? max(vec, min(end, channels() / VL)) : vec;
      // Whole pixels are read in the order in which they lie; of a part of them, whose other part is another thread's,
      // few vectors at a time: else each thread's core fetches the lines ahead that the other one writes.
      const int64_t together = end - vec == ceil_div(channels(), VL) ? end - vec : vecs;
      for (int64_t j = vec; j < first; j += together)
        for (int64_t u = unit; u < last_unit; ++u)
          run_row_in_place(j, min(j + together, first), packed + (j - vec) * vector, u, u + 1 < last_unit ? u + 1 : -1);
      for (int64_t u = unit; u < last_unit && first < end;) {
        const int64_t rows = min(block_, min(v_.P - u % v_.P, last_unit - u));
        for (int64_t j = first; j < end; j += vecs) {
          const bool more = j + vecs < end;
          run_block({j, min(vecs, end - j), u, rows}, {more ? j + vecs : first, more ? u : u + rows, end, last_unit},
                    packed + (j - vec) * vector);
        }
        u += rows;
      }
    }
    if (streams_) stream_end();
    return true;
  }

 private:
  static constexpr int64_t VL = kLanes<T>;

  struct Block {
    int64_t vec, vecs, unit, rows;  // rows of one image
  };
  struct Next {
    int64_t vec, unit, last_vec, last_unit;  // where the block after starts, and what there is
  };

  // One vector's weights, of `lanes` channels: groups are panels of one vector, if their lanes are evenly apart.
  PanelShape panel(int64_t lanes) const { return {lanes, 1, v_.C, v_.R, v_.S, v_.w_k, v_.w_c, v_.w_r, v_.w_s}; }
  // Where lane l lies from the first one.
  int64_t lane(int64_t l) const { return l / v_.K * v_.w_g + l % v_.K * v_.w_k; }

  int64_t taps() const { return v_.R * v_.S; }
  int64_t channels() const { return v_.G * v_.K; }
  // Input channels of a vector of outputs: the first, and how many.
  int64_t input(int64_t vec) const { return vec * VL / v_.K * v_.C; }
  int64_t inputs(int64_t vec) const { return min(VL, channels() - vec * VL) / v_.K * v_.C; }
  // The last row of x that a row of the batch needs.
  const S* row_of(int64_t unit) const {
    const int64_t h = unit % v_.P * v_.stride_h - v_.pad_h + (v_.R - 1) * v_.dilation_h;
    return x_ + unit / v_.P * v_.x_n + max(0, min(v_.H - 1, h)) * v_.x_h;
  }
  bool far() const { return v_.N * v_.H * v_.W * v_.C * v_.G * static_cast<int64_t>(sizeof(S)) >= kFarBytes; }
  // Elements of the strip for `rows` output rows, and from one output row to the next.
  int64_t strip_elements(int64_t rows) const {
    if (direct_ || !taps()) return 0;
    return (((rows - 1) * v_.stride_h + (v_.R - 1) * v_.dilation_h) / step_h_ + 1) * columns_ * pitch_;
  }
  int64_t strip_row() const { return v_.P == 1 ? 0 : v_.stride_h / step_h_ * columns_ * pitch_; }

  // The rows of x that output rows [p, p + rows) of image n need.
  void copy_rows(int64_t vec, int64_t n, int64_t p, int64_t rows, T* strip) {
    const int64_t strip_rows = strip_elements(rows) / max(1, columns_ * pitch_);
    for (int64_t i = 0; i < strip_rows; ++i, strip += columns_ * pitch_) {
      const int64_t h = p * v_.stride_h - v_.pad_h + i * step_h_;
      const bool inside = h >= 0 && h < v_.H;
      copy_row(strip, x_ + n * v_.x_n + (inside ? h : 0) * v_.x_h + input(vec), columns_, -v_.pad_w, step_w_,
               inside ? v_.W : 0, v_.x_w, inputs(vec), pitch_);
    }
  }

  void run_block(const Block& block, const Next& next, const T* packed) {
    const int64_t n = block.unit / v_.P, p = block.unit % v_.P, strip = strip_elements(block_);
    if (taps())
      for (int64_t j = 0; j < block.vecs; ++j) copy_rows(block.vec + j, n, p, block.rows, strip_ + j * strip);
    for (int64_t i = 0; i < block.rows; ++i)
      for (int64_t j = 0; j < block.vecs; ++j) {
        const bool more = far() && next.unit + i < next.last_unit && next.vec + j < next.last_vec;
        next_ = more ? row_of(next.unit + i) + input(next.vec + j) : nullptr;
        run_row(block.vec + j, packed + j * packed_vector<T>(v_), n, p + i, strip_ + j * strip + i * strip_row());
      }
  }

  // One row of vectors [vec, last_vec), a tile of pixels after the other: so x is read in the order in which it lies.
  void run_row_in_place(int64_t vec, int64_t last_vec, const T* packed, int64_t unit, int64_t next_unit) {
    const int64_t n = unit / v_.P, p = unit % v_.P, h = p * v_.stride_h - v_.pad_h;
    const int64_t r = h < 0 ? min(v_.R, ceil_div(-h, v_.dilation_h)) : 0;
    S* y = y_ + n * v_.y_n + p * v_.y_h;
    DepthwiseArgs<T, S> args;
    args.R = max(0, min(v_.R, ceil_div(v_.H - h, v_.dilation_h)) - r);
    args.row = v_.dilation_h * v_.x_h, args.column = v_.x_w;
    const S* x = x_ + n * v_.x_n + (h + r * v_.dilation_h) * v_.x_h;
    const S* next = next_unit >= 0 && far() ? row_of(next_unit) : nullptr;
    const int64_t tiles = ceil_div(v_.Q, kMaxSharedRows), vector = packed_vector<T>(v_);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t q = v_.Q * t / tiles, pixels = v_.Q * (t + 1) / tiles - q, w = q * v_.stride_w - v_.pad_w;
      args.first = max(0, -w), args.inside = max(0, v_.W - w - args.first);
      for (int64_t j = vec; j < last_vec; ++j) {
        const int64_t channel = j * VL;
        args.bias = packed + (j - vec) * vector, args.w = args.bias + (1 + r * v_.S) * VL;
        args.x = x + w * v_.x_w + channel;
        next_ = next ? next + channel : nullptr;
        prefetch(q, pixels);
        run_tile(in_place_[pixels], args, y + q * v_.y_w + channel, pixels, VL, residual(n, p, q), channel);
      }
    }
  }

  void run_row(int64_t vec, const T* packed, int64_t n, int64_t p, const T* strip) {
    const int64_t channel = vec * VL, lanes = min(VL, channels() - channel);
    S* y = y_ + n * v_.y_n + p * v_.y_h + channel;
    TileArgs<T> args;
    args.bias = packed, args.w = packed + VL;
    args.R = v_.R, args.S = v_.S;
    args.flush_rows = max(1, kChain / max(1, v_.S * v_.C));
    const int64_t step = v_.Q == 1 || direct_ ? 0 : v_.stride_w / step_w_;
    const bool known = kSpecialised<T> && step <= kKnownSteps;
    const bool shared = known && step && v_.S == kSharedTaps && v_.dilation_w == step_w_;
    step_tiles_ = shared ? tiles_.shared[step] : tiles_.function[known ? step : 0];
    const int64_t tiles = ceil_div(v_.Q, shared ? kMaxSharedRows : kMaxRows);
    args.pixel = step * pitch_;
    args.row = v_.R == 1 ? 0 : v_.dilation_h / step_h_ * columns_ * pitch_;
    args.column = v_.S == 1 ? 0 : v_.dilation_w / step_w_ * pitch_;
    args.x = strip;
    if constexpr (kSame<S, T>)
      if (direct_) {
        args.x = x_ + n * v_.x_n + (p * v_.stride_h - v_.pad_h) * v_.x_h - v_.pad_w * v_.x_w + input(vec);
        args.pixel = v_.stride_w * v_.x_w;
        if (lanes < VL) return run_partial(args, vec, n, p, y, lanes);
      }
    const T* first = args.x;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t q = v_.Q * t / tiles, pixels = v_.Q * (t + 1) / tiles - q;
      args.x = first + q * args.pixel;
      prefetch(q, pixels);
      run_tile(step_tiles_[pixels], args, y + q * v_.y_w, pixels, lanes, residual(n, p, q), channel);
    }
  }

  // A row of x itself whose vectors aren't whole, pixel by pixel.
  void run_partial(TileArgs<T>& args, int64_t vec, int64_t n, int64_t p, S* y, int64_t lanes) {
    const T* x = args.x;
    args.x = strip_;
    for (int64_t q = 0; q < v_.Q; ++q, x += args.pixel) {
      copy_channels(strip_, x, inputs(vec));
      run_tile(step_tiles_[1], args, y + q * v_.y_w, 1, lanes, residual(n, p, q), vec * VL);
    }
  }

  // The pixels of the next block that lie where these `pixels` do in this one: of all rows that its row is the first to
  // need. Inlined by force: GCC takes a function that only prefetches for one without effect, and drops its calls.
  CNNFAST_INLINE void prefetch(int64_t q, int64_t pixels) const {
    if (!next_) return;
    const int64_t end = min(v_.W, (q + pixels) * v_.stride_w);
    const S* row = next_;
    const int64_t rows = min(v_.stride_h, (v_.R - 1) * v_.dilation_h + 1);
    for (int64_t i = 0; i < rows && row >= x_; ++i, row -= v_.x_h)
      for (int64_t w = q * v_.stride_w; w < end; ++w) __builtin_prefetch(row + w * v_.x_w, 0, 2);
  }

  const S* residual(int64_t n, int64_t p, int64_t q) const {
    return epilogue_ ? epilogue_->residual_at(n, p, q) : nullptr;
  }

  // r: the first pixel's residual; channel: the first lane's.
  template <class Tile, class Args>
  void run_tile(Tile* tile, Args& args, S* y, int64_t pixels, int64_t lanes, const S* r, int64_t channel) {
    if constexpr (kSame<S, T>) {
      if (lanes == VL && !epilogue_) {
        args.out = y, args.out_step = v_.y_w, args.streams = streams_;
        tile(args);
        return;
      }
    }
    args.out = tile_, args.out_step = VL, args.streams = false;
    tile(args);
    if (epilogue_) {
      const auto factors = epilogue_->factors(channel, lanes);
      if (r) r += channel;
      for (int64_t m = 0; m < pixels; ++m)
        epilogue_->store(y + m * v_.y_w, load(tile_ + m * VL), factors, r ? r + m * epilogue_->r_w : nullptr, lanes,
                         streams_);
      return;
    }
    for (int64_t m = 0; m < pixels; ++m) {
      if (lanes == VL)
        store_narrow(y + m * v_.y_w, load(tile_ + m * VL));
      else
        store_narrow(y + m * v_.y_w, load(tile_ + m * VL), lanes);
    }
  }

  const Conv2dView& v_;
  const Tiles<T>& tiles_;
  const TileFn<T>* step_tiles_ = nullptr;  // those of the row's step
  const DepthwiseFn<T, S>* in_place_ = nullptr;
  const S *x_, *w_, *bias_;
  S* y_;
  const Epilogue<S>* epilogue_;
  const T* given_;                                             // weights that were packed beforehand, or null
  int64_t step_h_ = 1, step_w_ = 1, columns_ = 0, pitch_ = 0;  // of the strip
  int64_t block_ = 0;                                          // rows of y at a time
  const S* next_ = nullptr;                                    // a row of x that is needed soon
  bool direct_ = false;                                        // x is read where it lies
  T *packed_ = nullptr, *tile_ = nullptr, *strip_ = nullptr;
  bool finite_ = true;
  bool streams_ = false;
};

// What became of a call; the threads only ever set these.
struct Outcome {
  bool no_memory = false;
  bool not_finite = false;  // a weight is Inf or NaN, and zeros stood for the padding beside it
};

// The share of one thread in one view.
template <class S>
void run_view(const Conv2dView& v, const S* x, const S* w, const S* bias, S* y, const void* packed, int threads,
              int64_t task, Outcome& outcome, const Epilogue<S>* epilogue) {
  using T = Compute<S>;
  const int64_t vecs = ceil_div(v.G * v.K, kLanes<T>), units = v.N * v.P;
  const Tiles<T>* tiles = tiles_for<T>(v.C, v.K);
  if (vecs * units * v.Q == 0 || !tiles) return;
  // Vectors are the better half to share: no weights are packed and no rows copied twice. But of large maps a thread
  // then reads and writes a part of every pixel, and both together more cache lines than there are. What is read in
  // place is split by rows, unless one thread would have a quarter more of them than its share.
  const bool even = ceil_div(units, threads) * threads * 4 <= units * 5;
  const bool cheap = packed || v.R * v.S * v.C * v.K * v.G <= kWeightsWorthTwice;
  const bool by_rows = depthwise_tiles<T, S>(v) ? even : units >= kRowsWorthSharing * threads && cheap;
  const int64_t threads_v = by_rows ? 1 : vecs % threads == 0 || vecs >= 4 * threads ? threads : gcd(vecs, threads);
  const int64_t threads_u = threads / threads_v, tv = task / threads_u, tu = task % threads_u;
  const char* head = static_cast<const char*>(packed);
  Worker<T, S> worker(v, *tiles, x, w, bias, y, head ? reinterpret_cast<const T*>(head + kPackedHead) : nullptr,
                      epilogue);
  if (!worker.run(vecs * tv / threads_v, vecs * (tv + 1) / threads_v, units * tu / threads_u,
                  units * (tu + 1) / threads_u))
    __atomic_store_n(&outcome.no_memory, true, __ATOMIC_RELAXED);
  if (!(head ? *head : worker.finite()) && reaches_padding(v))
    __atomic_store_n(&outcome.not_finite, true, __ATOMIC_RELAXED);
}

int useful_threads(const Conv2dParams& p, int threads) {
  return p.N * p.P * p.Q * p.K * (p.C / p.G) * p.R * p.S < kMacsWorthThreads ? 1 : threads;
}

constexpr const char* kNoMemory = "out of memory";

template <class S>
const char* launch_fprop(const void* params, const Launch& l) {
  const Conv2dParams& p = *static_cast<const Conv2dParams*>(params);
  const S *x = static_cast<const S*>(l.operands[0]), *w = static_cast<const S*>(l.operands[1]);
  const S* bias = static_cast<const S*>(l.operands[2]);
  S* y = static_cast<S*>(l.operands[3]);
  const int threads = useful_threads(p, l.threads);
  const Epilogue<S> operands(p, l);
  const Epilogue<S>* epilogue = operands.or_null();
  const void* packed = l.operands[kPackedOperand];
  Outcome outcome;
  parallel_for(
      threads, threads,
      [&](int64_t task) { run_view(fprop_view(p), x, w, bias, y, packed, threads, task, outcome, epilogue); },
      kDenormals<S>);
  if (outcome.no_memory) return kNoMemory;
  if (outcome.not_finite) direct_fprop(p, x, w, bias, y, l.threads, epilogue);
  return nullptr;
}

// Every vector of fprop, with its bias, into the workspace.
template <class S>
const char* launch_pack(const void* params, const Launch& l) {
  using T = Compute<S>;
  const Conv2dView v = fprop_view(*static_cast<const Conv2dParams*>(params));
  char* head = static_cast<char*>(l.workspace);
  *head = true;
  const Tiles<T>* tiles = tiles_for<T>(v.C, v.K);
  if (!tiles) return nullptr;
  parallel_for(l.threads, ceil_div(v.G * v.K, kLanes<T>), [&](int64_t vec) {
    Worker<T, S> worker(v, *tiles, nullptr, static_cast<const S*>(l.operands[1]), static_cast<const S*>(l.operands[2]),
                        nullptr, nullptr, nullptr);
    worker.pack(vec, reinterpret_cast<T*>(head + kPackedHead) + vec * packed_vector<T>(v));
    if (!worker.finite()) __atomic_store_n(head, false, __ATOMIC_RELAXED);
  });
  return nullptr;
}

// The weights that the pack entry packed, back to where the second operand is.
template <class S>
const char* launch_unpack(const void* params, const Launch& l) {
  using T = Compute<S>;
  const Conv2dView v = fprop_view(*static_cast<const Conv2dParams*>(params));
  const char* head = static_cast<const char*>(l.operands[kPackedOperand]);
  S* w = static_cast<S*>(l.operands[1]);
  const Tiles<T>* tiles = tiles_for<T>(v.C, v.K);
  if (!tiles) return nullptr;
  parallel_for(l.threads, ceil_div(v.G * v.K, kLanes<T>), [&](int64_t vec) {
    const Worker<T, S> worker(v, *tiles, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr);
    worker.unpack(vec, reinterpret_cast<const T*>(head + kPackedHead) + vec * packed_vector<T>(v), w);
  });
  return nullptr;
}

template <class S>
int64_t packed_bytes(const void* params) {
  using T = Compute<S>;
  const Conv2dView v = fprop_view(*static_cast<const Conv2dParams*>(params));
  return kPackedHead + ceil_div(v.G * v.K, kLanes<T>) * packed_vector<T>(v) * static_cast<int64_t>(sizeof(T));
}

template <class S>
const char* launch_dgrad(const void* params, const Launch& l) {
  const Conv2dParams& p = *static_cast<const Conv2dParams*>(params);
  S* dx = static_cast<S*>(l.operands[0]);
  const S *w = static_cast<const S*>(l.operands[1]), *g = static_cast<const S*>(l.operands[3]);
  const int threads = useful_threads(p, l.threads);
  const int64_t image = p.P * p.Q * p.K * static_cast<int64_t>(sizeof(S));
  const int64_t images = p.stride_h * p.stride_w == 1 ? p.N : max(1, kImageBytes / max(1, image));
  Outcome outcome;
  parallel_for(
      threads, threads,
      [&](int64_t task) {
        // All classes of a few images before the next ones, so that g comes from memory once.
        for (int64_t n = 0; n < p.N; n += images)
          for_each_dgrad_view(p, [&](Conv2dView v, int64_t w_offset, int64_t dx_offset) {
            v.N = min(images, p.N - n);
            run_view<S>(v, g + n * p.y_n, w + w_offset, nullptr, dx + n * p.x_n + dx_offset, nullptr, threads, task,
                        outcome, nullptr);
          });
      },
      kDenormals<S>);
  if (outcome.no_memory) return kNoMemory;
  if (outcome.not_finite) direct_dgrad(p, dx, w, g, l.threads);
  return nullptr;
}

}  // namespace

CNNFAST_KERNEL("conv2d_grouped.fprop.f32", Conv2dParams, launch_fprop<float>, nullptr)
CNNFAST_KERNEL("conv2d_grouped.fprop.f64", Conv2dParams, launch_fprop<double>, nullptr)
CNNFAST_KERNEL("conv2d_grouped.fprop.bf16", Conv2dParams, launch_fprop<BFloat16>, nullptr)
CNNFAST_KERNEL("conv2d_grouped.fprop.f16", Conv2dParams, launch_fprop<Float16>, nullptr)
CNNFAST_KERNEL("conv2d_grouped.fprop.f32.pack", Conv2dParams, launch_pack<float>, packed_bytes<float>)
CNNFAST_KERNEL("conv2d_grouped.fprop.f64.pack", Conv2dParams, launch_pack<double>, packed_bytes<double>)
CNNFAST_KERNEL("conv2d_grouped.fprop.bf16.pack", Conv2dParams, launch_pack<BFloat16>, packed_bytes<BFloat16>)
CNNFAST_KERNEL("conv2d_grouped.fprop.f16.pack", Conv2dParams, launch_pack<Float16>, packed_bytes<Float16>)
CNNFAST_KERNEL("conv2d_grouped.fprop.f32.unpack", Conv2dParams, launch_unpack<float>, nullptr)
CNNFAST_KERNEL("conv2d_grouped.fprop.f64.unpack", Conv2dParams, launch_unpack<double>, nullptr)
CNNFAST_KERNEL("conv2d_grouped.fprop.bf16.unpack", Conv2dParams, launch_unpack<BFloat16>, nullptr)
CNNFAST_KERNEL("conv2d_grouped.fprop.f16.unpack", Conv2dParams, launch_unpack<Float16>, nullptr)
CNNFAST_KERNEL("conv2d_grouped.dgrad.f32", Conv2dParams, launch_dgrad<float>, nullptr)
CNNFAST_KERNEL("conv2d_grouped.dgrad.f64", Conv2dParams, launch_dgrad<double>, nullptr)
CNNFAST_KERNEL("conv2d_grouped.dgrad.bf16", Conv2dParams, launch_dgrad<BFloat16>, nullptr)
CNNFAST_KERNEL("conv2d_grouped.dgrad.f16", Conv2dParams, launch_dgrad<Float16>, nullptr)

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
