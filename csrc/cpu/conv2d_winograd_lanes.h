// Winograd's F(2, 3) and F(4, 3) both ways for groups of few channels, as many output as input: half a vector's (two
// groups share one then), a vector's or two vectors'; fprop and dgrad.
//
//   M[point][tile][k] = sum_{c of k's group} V[point][tile][c] * U[point][c][k]       (conv2d_winograd.h)
//
// For so few channels the transforms are as long as the products, and both are as fast as their data is near. So a unit
// of channels, one or two vectors of whole groups, of a block of tiles is transformed, multiplied and transformed back
// while everything is in L1: M takes the place of V. A thread owns units times tiles. It goes through as many units'
// weights as stay in L2, all of them for each block of tiles, and asks for the pixels of the next block meanwhile.
// Layout: NHWC; sums are in float for float, bf16 and fp16, in double for double. Tiles that aren't finite are summed
// directly, as there.
#pragma once
#include "conv2d_winograd_tile.h"
#include "gemm_tile.h"
#include "pack.h"
#include "primitives/parallel.h"
#include "primitives/scratch.h"

namespace cnnfast {
namespace CNNFAST_ISA {
namespace {

constexpr int64_t kLaneBlockBytes = 20 << 10;    // V of a block, in L1 beside weights
constexpr int64_t kLaneWeightBytes = 600 << 10;  // U of the vectors that a block goes through, in L2

template <class Axis>
constexpr bool kThreeTaps = Axis::kFilter == kTapsAcross && Axis::kTaps == kTapsAcross && Axis::kStride == 1;

// A unit of channels for groups of kGroup.
template <class T, int kGroup>
struct LaneUnit {
  static constexpr int kVecs = kGroup > kLanes<T> ? kGroup / kLanes<T> : 1;
  static constexpr int kWidth = kVecs * kLanes<T>, kGroups = kWidth / kGroup;  // channels, groups
  static constexpr int kRows = kMaxTileRows[kVecs];                            // tiles whose sums are in registers
  static constexpr int kTaps = kTapsAcross * kTapsAcross * kGroup * kWidth;    // room for a group's taps
};

// Channels a group, where a unit is one or two vectors; otherwise 0.
template <class T, class F>
int64_t lane_group(const Conv2dView& v) {
  constexpr int64_t VL = kLanes<T>;
  if (!kThreeTaps<typename F::H> || !kThreeTaps<typename F::W> || v.G < 2 || v.C != v.K || v.K < 8) return 0;
  return v.K == VL || v.K == 2 * VL || (2 * v.K == VL && v.G % 2 == 0) ? v.K : 0;
}

// What is decided from the sizes.
template <class T, class F>
struct LanePlan {
  int64_t tiles_h, tiles_w, tiles;  // of an image; of the batch
  int64_t units;                    // of channels
  int64_t weights;                  // elements of one, transformed
  int threads_u, threads_t;

  LanePlan(const Conv2dView& v, int64_t width, bool packed, int threads) {
    tiles_h = ceil_div(v.P, F::H::kOutputs), tiles_w = ceil_div(v.Q, F::W::kOutputs), tiles = v.N * tiles_h * tiles_w;
    units = v.G * v.K / width;
    weights = F::kProducts * v.C * width;
    // Units are shared unless each thread can have all weights in its L2: then pixels are read and written whole.
    const bool hot = packed && units * weights * static_cast<int64_t>(sizeof(T)) <= kLaneWeightBytes;
    threads_u = hot && tiles >= kMostTileRows * threads ? 1 : static_cast<int>(gcd(units, threads));
    threads_t = threads / threads_u;
  }
};

// The weights of a unit: U[point][c][k] = G w[k,c] G'. `taps` has room for its groups' taps.
template <class T, class F, int kGroup, class S>
void transform_lanes(T* u, T* taps, const S* w, const Conv2dView& v, int64_t unit) {
  using Unit = LaneUnit<T, kGroup>;
  constexpr int64_t kWidth = Unit::kWidth;
  for (int64_t g = 0; g < Unit::kGroups; ++g)
    pack_panel<T>(taps + g * Unit::kTaps, w + (unit * Unit::kGroups + g) * v.w_g,
                  {kGroup, Unit::kVecs, kGroup, kTapsAcross, kTapsAcross, v.w_k, v.w_c, v.w_r, v.w_s});
  for (int64_t g = 1; g < Unit::kGroups; ++g)
    for (int64_t i = 0; i < Unit::kTaps; i += kWidth)
      memcpy(taps + i + g * kGroup, taps + g * Unit::kTaps + i, kGroup * sizeof(T));
  for (int64_t i = 0; i < kGroup * kWidth; i += kLanes<T>)
    transform_axes<T, kTapsAcross, kTapsAcross, F::H::kPoints, F::W::kPoints>(
        [&](int r, int s)
            __attribute__((always_inline)) { return load(taps + (r * kTapsAcross + s) * kGroup * kWidth + i); },
        F::H::template weights<T>, F::W::template weights<T>,
        [&](int a, int b, Vec<T> t)
            __attribute__((always_inline)) { store(u + (a * F::W::kPoints + b) * kGroup * kWidth + i, t); });
}

// One point of MR tiles, whose inputs in v make place for the sums. Two groups of half a vector each come one after the
// other, in vectors of their size: each input is then a broadcast from memory, where a shuffle for every FMA would cost
// Zen 4 a quarter of its speed (82 and 105 of 116 GFLOP/s). Two FMAs of half a vector take as long as one of a whole.
template <class T, int kGroup, int MR>
void lane_tile(T* v, const T* u) {
  using Unit = LaneUnit<T, kGroup>;
  constexpr int kWidth = Unit::kWidth, kVecs = Unit::kVecs, kSize = kGroup / kVecs;  // elements of a vector
  typedef T Lanes __attribute__((vector_size(kSize * sizeof(T))));
  typedef T Unaligned __attribute__((vector_size(kSize * sizeof(T)), aligned(sizeof(T)), may_alias));
#pragma GCC unroll 1
  for (int g = 0; g < Unit::kGroups; ++g, v += kGroup, u += kGroup) {
    Lanes acc[MR][kVecs];
    const auto step = [&](int c, bool first) __attribute__((always_inline)) {
      Lanes weights[kVecs];
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) weights[j] = *reinterpret_cast<const Unaligned*>(u + c * kWidth + j * kSize);
#pragma GCC unroll 14
      for (int i = 0; i < MR; ++i) {
        const Lanes input = v[i * kWidth + c] - Lanes{};
#pragma GCC unroll 2
        for (int j = 0; j < kVecs; ++j) acc[i][j] = first ? input * weights[j] : acc[i][j] + input * weights[j];
      }
    };
    step(0, true);
#pragma GCC unroll 8
    for (int c = 1; c < kGroup; ++c) step(c, false);
#pragma GCC unroll 14
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) *reinterpret_cast<Unaligned*>(v + i * kWidth + j * kSize) = acc[i][j];
  }
}

template <class T>
using LaneTileFn = void (*)(T*, const T*);
template <class T>
struct LaneTiles {
  LaneTileFn<T> function[kMostTileRows + 1];
};
template <class T, int kGroup, int MR = 1>
constexpr void add_lane_tiles(LaneTiles<T>& tiles) {
  if constexpr (MR <= LaneUnit<T, kGroup>::kRows) {
    tiles.function[MR] = lane_tile<T, kGroup, MR>;
    add_lane_tiles<T, kGroup, MR + 1>(tiles);
  }
}
template <class T, int kGroup>
constexpr LaneTiles<T> make_lane_tiles() {
  LaneTiles<T> tiles{};
  add_lane_tiles<T, kGroup>(tiles);
  return tiles;
}
template <class T, int kGroup>
constexpr LaneTiles<T> kLaneTiles = make_lane_tiles<T, kGroup>();

// What one thread works with.
template <class T, class F, int kGroup, class S>
class LaneWorker {
 public:
  using Plan = LanePlan<T, F>;

  LaneWorker(const Conv2dView& v, const Plan& plan, const S* x, const S* w, const S* bias, S* y, const T* packed,
             const Epilogue<S>* epilogue)
      : v_(v), plan_(plan), x_(x), w_(w), bias_(bias), y_(y), packed_(packed), epilogue_(epilogue) {}

  // False: out of memory.
  bool run(int64_t task) {
    const int64_t tu = task / plan_.threads_t, tt = task % plan_.threads_t;
    const int64_t first_unit = plan_.units * tu / plan_.threads_u, last_unit = plan_.units * (tu + 1) / plan_.threads_u;
    const int64_t first = plan_.tiles * tt / plan_.threads_t, last = plan_.tiles * (tt + 1) / plan_.threads_t;
    if (first_unit == last_unit || first == last) return true;
    const int64_t at_a_time = max(1, kLaneWeightBytes / (plan_.weights * static_cast<int64_t>(sizeof(T))));
    const int64_t chunk = ceil_div(last_unit - first_unit, ceil_div(last_unit - first_unit, at_a_time));
    int64_t block = max(1, kLaneBlockBytes / (kProducts * kWidth * static_cast<int64_t>(sizeof(T))));
    if (block > Unit::kRows) block = block / Unit::kRows * Unit::kRows;
    block = ceil_div(last - first, ceil_div(last - first, block));
    v_product_ = odd_lines<T>(block * kWidth);
    const auto carve = [&](Carver carver) {
      tiles_ = carver.take<Tile>(block);
      pixels_ = carver.take<const S*>(block * kProducts);
      zeros_ = carver.take<S>(v_.G * v_.K);
      taps_ = carver.take<T>(packed_ ? 0 : Unit::kGroups * Unit::kTaps);
      weights_ = carver.take<T>(packed_ ? 0 : chunk * plan_.weights);
      points_ = carver.take<T>(kProducts * v_product_);
      return carver.used();
    };
    void* scratch = thread_scratch(carve(Carver(nullptr)));
    if (!scratch) return false;
    carve(Carver(scratch));
    memset(zeros_, 0, static_cast<size_t>(v_.G * v_.K) * sizeof(S));
    streams_ = kLineVectors && streams_result(v_, y_, true);
    for (int64_t unit = first_unit; unit < last_unit; unit += chunk) {
      const int64_t end = min(unit + chunk, last_unit);
      if (!packed_)
        for (int64_t j = unit; j < end; ++j)
          transform_lanes<T, F, kGroup>(weights_ + (j - unit) * plan_.weights, taps_, w_, v_, j);
      const T* u = packed_ ? packed_ + unit * plan_.weights : weights_;
      for (int64_t tile = first; tile < last; tile += block) {
        const int64_t count = min(block, last - tile);
        place_tiles(tile, count, min(block, last - tile - count));
        for (int64_t j = unit; j < end; ++j) run_unit(j, u + (j - unit) * plan_.weights, count);
      }
    }
    if (streams_) stream_end();
    return true;
  }

 private:
  using H = typename F::H;
  using W = typename F::W;
  static constexpr int MH = H::kOutputs, MW = W::kOutputs;
  using Unit = LaneUnit<T, kGroup>;
  static constexpr int64_t VL = kLanes<T>, kProducts = F::kProducts, kWidth = Unit::kWidth;

  struct Tile {
    TilePlace at;
    const S* next;  // a pixel of the tile that takes this one's place in the next block; null: none
  };

  TilePlace place(int64_t tile) const { return tile_place<F>(tile, plan_.tiles_h, plan_.tiles_w); }

  // Finds the pixels of a block's tiles, of the first channel, and where the next block's begin.
  void place_tiles(int64_t tile, int64_t count, int64_t next) {
    for (int64_t i = 0; i < count; ++i) {
      const TilePlace at = place(tile + i);
      const S* x = x_ + at.n * v_.x_n;
      const S** pixels = pixels_ + i * kProducts;
      for (int64_t a = 0; a < H::kPoints; ++a) {
        const int64_t h = at.p - v_.pad_h + a;
        for (int64_t b = 0; b < W::kPoints; ++b) {
          const int64_t w = at.q - v_.pad_w + b;
          *pixels++ = h < 0 || h >= v_.H || w < 0 || w >= v_.W ? zeros_ : x + h * v_.x_h + w * v_.x_w;
        }
      }
      tiles_[i] = {at, nullptr};
      if (i >= next) continue;
      const TilePlace then = place(tile + count + i);
      const int64_t h = then.p - v_.pad_h + H::kPoints - MH, w = then.q - v_.pad_w + W::kPoints - MW;
      if (h + MH <= v_.H && w + MW <= v_.W && h >= 0 && w >= 0)
        tiles_[i].next = x_ + then.n * v_.x_n + h * v_.x_h + w * v_.x_w;
    }
  }

  void run_unit(int64_t unit, const T* u, int64_t count) {
    const int64_t channel = unit * kWidth;
    for (int64_t i = 0; i < count; ++i) {
      if (const S* next = tiles_[i].next) fetch_tile(next + channel);
      for (int64_t j = 0; j < kWidth; j += VL) {
        const S* const* pixels = pixels_ + i * kProducts;
        T* v = points_ + i * kWidth + j;
        transform_axes<T, H::kPoints, W::kPoints, H::kPoints, W::kPoints>(
            [&](int a, int b)
                __attribute__((always_inline)) { return load_wide(pixels[a * W::kPoints + b] + channel + j); },
            H::template input<T>, W::template input<T>,
            [&](int a, int b, Vec<T> t)
                __attribute__((always_inline)) { store(v + (a * W::kPoints + b) * v_product_, t); });
      }
    }
    const int64_t runs = ceil_div(count, Unit::kRows);
    for (int64_t f = 0; f < kProducts; ++f, u += kGroup * kWidth)
      for (int64_t r = 0; r < runs; ++r) {
        const int64_t i = count * r / runs, rows = count * (r + 1) / runs - i;
        kLaneTiles<T, kGroup>.function[rows](points_ + f * v_product_ + i * kWidth, u);
      }
    for (int64_t j = 0; j < kWidth; j += VL) {
      const Vec<T> bias = bias_ ? load_wide(bias_ + channel + j) : Vec<T>{};
      for (int64_t i = 0; i < count; ++i)
        if (!finish_tile<T, F>(points_ + i * kWidth + j, v_product_, v_, y_, tiles_[i].at, channel + j, VL, bias,
                               epilogue_, streams_))
          redo(tiles_[i].at, channel + j);
    }
  }

  CNNFAST_INLINE void fetch_tile(const S* x) const {
    for (int64_t h = 0; h < MH; ++h)
      for (int64_t w = 0; w < MW; ++w)
        for (int64_t c = 0; c < kWidth; c += kLineBytes / static_cast<int64_t>(sizeof(S)))
          __builtin_prefetch(x + h * v_.x_h + w * v_.x_w + c, 0, 2);
  }

  // A vector of one tile's channels, group by group.
  void redo(const TilePlace& at, int64_t channel) {
    constexpr int64_t kShare = kGroup < VL ? kGroup : VL;
    for (int64_t k = channel; k < channel + VL; k += kShare)
      redo_tile<F>(v_, x_, w_, bias_, y_, at, k / kGroup, k % kGroup, k % kGroup + kShare, epilogue_);
  }

  const Conv2dView& v_;
  const Plan& plan_;
  const S *x_, *w_, *bias_;
  S* y_;
  const T* packed_;
  const Epilogue<S>* epilogue_;
  int64_t v_product_ = 0;
  bool streams_ = false;
  Tile* tiles_ = nullptr;
  const S** pixels_ = nullptr;
  S* zeros_ = nullptr;
  T *taps_ = nullptr, *weights_ = nullptr, *points_ = nullptr;
};

template <int value>
struct KnownInt {
  static constexpr int kValue = value;
};

// Calls f with the channels of a group, which the compiler then knows, where a unit is one or two vectors of them.
template <class T, class F, class Fn>
bool with_lane_group(const Conv2dView& v, const Fn& f) {
  constexpr int VL = kLanes<T>;
  const int64_t group = lane_group<T, F>(v);
  if constexpr (kThreeTaps<typename F::H> && kThreeTaps<typename F::W>) {
    if (group == 2 * VL) return f(KnownInt<2 * VL>{}), true;
    if constexpr (VL >= 8)
      if (group == VL) return f(KnownInt<VL>{}), true;
    if constexpr (VL >= 16)
      if (group == VL / 2) return f(KnownInt<VL / 2>{}), true;
  }
  return false;
}

}  // namespace
}  // namespace CNNFAST_ISA
}  // namespace cnnfast
