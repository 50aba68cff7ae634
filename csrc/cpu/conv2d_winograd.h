// Winograd's F(M, R) for filters with stride and dilation 1, fprop and dgrad; and for 3x3 with stride 2, fprop.
//
//   y[tile, k] = bias[k] + A' [ sum_c (G w[k,c] G') . (B' x[tile, c] B) ] A        (conv2d_winograd_transform.h)
//
// A tile is M outputs along an axis and the P = M + R - 1 inputs that they need. Its transformed inputs are multiplied
// with the transformed weights element by element and summed over c: an independent matrix product, of tiles x C by
// C x K, for each of its points. dgrad is fprop of the gradient with flipped taps and C, K exchanged (conv2d_view.h).
//
//   filter      tile                          points for outputs    times fewer multiplications
//   3x3         F(4,3) both ways              36 for 16             4
//   3x3         F(2,3) both ways              16 for 4              2.25
//   5x5         F(2,5) both ways              36 for 4              2.78
//   1x3, 3x1    F(4,3) along the filter       6 for 4               2
//   1x7, 7x1    F(3,4) twice, 4 taps and 3    11 for 3              1.91
//   3x3 /2      F(3,2) and 3 products, twice  49 for 9              1.65
//
// With stride 2 the points of the middle tap share its weights: 25 are transformed, kept and read, not 49.
//
// A filter longer than R is cut into segments: more input channels, of which each is the input moved by R. The last
// point of a segment that lacks its last tap is zero, and left out.
//
// Everything is fused over a block of tiles, all in scratch:
//
//   V [unit][point][tile][c]         inputs of the block's tiles, transformed once
//   U [unit][point][c][2 vectors]    weights of a panel of output channels, transformed inside the call (or beforehand,
//                                    for all panels: the pack entry)
//   M [point][tile][2 vectors]       products of a panel, by the register tile of the implicit GEMM (gemm_tile.h)
//
// and then the output transform adds the bias and writes a tile's pixels of y, past the caches where y is large: such
// pixels would be read first, and 3x3 layers of 32 to 128 channels were 6 to 25 % slower for it. A unit is a chunk of
// the input channels, of one segment, at most 128 of them; the chunks depend on C alone and no sum is split over
// threads, so that results are the same bits whatever the thread count. A thread owns a range of panels times a range
// of tiles, or, of a grouped convolution, some of the groups: each is a convolution of its own, but inputs of small
// neighbours are transformed together, a run of memory instead of a line of every pixel. (3x3 for groups that are half
// a vector, one or two: conv2d_winograd_lanes.h.)
//
// Where a result isn't finite (Inf or NaN among the operands spreads over the whole tile, large values may overflow in
// between) the pixels of that tile are summed directly: infinities and NaNs come out where the direct kernel's do, and
// nowhere else.
//
// After Lavin and Gray (2016), and Zlateski, Jia, Li and Durand, The Anatomy of Efficient FFT and Winograd Convolutions
// on Modern CPUs (2019).
#pragma once
#include "../common/kernel_table.h"
#include "conv2d_winograd_lanes.h"
#include "gemm_tile.h"

namespace cnnfast {
namespace CNNFAST_ISA {
namespace {

constexpr int64_t kChunk = 128;                 // input channels at a time
constexpr int64_t kSumChain = 32;               // additions in a row
constexpr int64_t kShortChain = 16;             // and where there are at most kSumChain channels
constexpr int64_t kSlice = 16;                  // input channels whose taps are transposed at a time
constexpr int64_t kHotWeightBytes = 1 << 20;    // transformed weights that stay in L2 beside a block
constexpr int64_t kKeptWeightBytes = 5 << 19;   // transformed weights that are kept for more than two blocks
constexpr int64_t kHotInputBytes = 720 << 10;   // transformed inputs of a block, in L2
constexpr int64_t kInputBytes = 3 << 20;        // and, with products, where the weights pass by only once
constexpr int64_t kMostTiles = 128;             // in a block
constexpr int64_t kTogether = 128;              // channels of small groups whose inputs are transformed together
constexpr int64_t kMacsWorthThreads = 1 << 18;  // below, one thread

constexpr const char* kNoMemory = "out of memory";

// What is decided from the sizes alone: also the format of the packed weights, which depends on C and K only.
template <class T, class F>
struct WinogradPlan {
  static constexpr int64_t VL = kLanes<T>, kProducts = F::kProducts;

  int64_t tiles_h, tiles_w, tiles;  // of an image; of the batch
  int64_t vecs, panels;             // of output channels; a panel is kMaxTileVecs vectors
  int64_t chunk, chunks;            // of input channels
  int64_t units;                    // chunks of all segments
  int64_t u_product, u_unit;        // elements of one point's weights, and of all, of one unit of a panel
  int64_t together;                 // groups whose inputs lie side by side
  int64_t v_pitch;                  // elements of a tile of a unit: whole cache lines, none between tiles
  int threads_g, threads_k, threads_t;

  WinogradPlan(const Conv2dView& v, int threads) {
    tiles_h = ceil_div(v.P, F::H::kOutputs), tiles_w = ceil_div(v.Q, F::W::kOutputs), tiles = v.N * tiles_h * tiles_w;
    vecs = ceil_div(v.K, VL), panels = ceil_div(vecs, kMaxTileVecs);
    chunks = max(1, ceil_div(v.C, kChunk));
    chunk = chunks == 1 ? v.C : round_up(ceil_div(v.C, chunks), 16);
    chunks = max(1, ceil_div(v.C, max(1, chunk)));
    units = F::kSegments * chunks;
    u_product = odd_lines<T>(max(1, chunk) * kMaxTileVecs * VL);
    u_unit = F::kWeights * u_product;
    threads_g = v.G >= threads ? threads : 1;
    together = units > 1 ? 1 : max(1, min(v.G / threads_g, kTogether / max(1, v.C)));
    v_pitch = round_up(max(1, chunk * together), kLineBytes / static_cast<int64_t>(sizeof(T)));
    threads /= threads_g;
    // The split over threads, in cycles of a thread: products, and transforms that are done by more than one.
    double best = -1;
    for (int tk = 1; tk <= threads; ++tk) {
      if (threads % tk) continue;
      const double k = static_cast<double>(ceil_div(panels, tk) * kMaxTileVecs),
                   t = static_cast<double>(ceil_div(tiles, threads / tk)), c = static_cast<double>(F::kSegments * v.C);
      const double cost =
          k * t * c * kProducts / 2 + (t * c / VL + k * t) * 4 * kProducts + k * c * (3 * F::kWeights + 2 * F::kTaps);
      if (best < 0 || cost < best) best = cost, threads_k = tk, threads_t = threads / tk;
    }
  }
  int64_t packed_elements() const { return panels * units * u_unit; }  // of a group
  int64_t panel_vecs(int64_t panel) const { return min(kMaxTileVecs, vecs - panel * kMaxTileVecs); }
  int64_t first_channel(int64_t unit) const { return unit % chunks * chunk; }
  int64_t unit_channels(int64_t unit, int64_t C) const { return min(chunk, C - first_channel(unit)); }
};

// Room for the taps of a slice of a panel.
template <class T, class F>
constexpr int64_t slice_elements() {
  return F::kTaps * kSlice * kMaxTileVecs * kLanes<T>;
}

// One unit of a panel: U[product][c][lane] = G w[k,c] G'. `taps` has room for slice_elements().
template <class T, class F, class S>
void transform_panel(T* u, T* taps, const S* w, const Conv2dView& v, const WinogradPlan<T, F>& plan, int64_t panel,
                     int64_t unit) {
  using H = typename F::H;
  using W = typename F::W;
  constexpr int VL = kLanes<T>;
  const int64_t k = panel * kMaxTileVecs * VL, vecs = plan.panel_vecs(panel), width = vecs * VL;
  const int64_t first = plan.first_channel(unit), end = first + plan.unit_channels(unit, v.C);
  const int row = F::row(unit / plan.chunks), column = F::column(unit / plan.chunks);
  const int64_t rows = H::segment_taps(row), columns = W::segment_taps(column);
  w += H::first_tap(row) * v.w_r + W::first_tap(column) * v.w_s;
  for (int64_t c = first; c < end; c += kSlice) {
    const int64_t channels = min(kSlice, end - c);
    pack_panel<T>(taps, w + k * v.w_k + c * v.w_c,
                  {min(width, v.K - k), vecs, channels, rows, columns, v.w_k, v.w_c, v.w_r, v.w_s});
    for (int64_t i = 0; i < channels; ++i)
      for (int64_t j = 0; j < width; j += VL) {
        T* out = u + (c - first + i) * width + j;
        transform_axes<T, H::kTaps, W::kTaps, H::kWeights, W::kWeights>(
            [&](int r, int s) __attribute__((always_inline)) {
              if constexpr (F::kSegments > 1)
                if (r >= rows || s >= columns) return Vec<T>{};
              return load(taps + ((r * columns + s) * channels + i) * width + j);
            },
            H::template weights<T>, W::template weights<T>,
            [&](int a, int b, Vec<T> t)
                __attribute__((always_inline)) { store(out + (a * W::kWeights + b) * plan.u_product, t); });
      }
  }
}

// One tile's channels: V[product][c] = B' x B, products `product` elements apart; lanes beyond the last channel zero.
template <class T, class F, class S>
CNNFAST_INLINE void transform_tile(T* v, int64_t product, const S* const* pixels, int64_t c, int64_t channels) {
  using H = typename F::H;
  using W = typename F::W;
  constexpr int VL = kLanes<T>;
  const auto step = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    transform_axes<T, H::kPoints, W::kPoints, H::kPoints, W::kPoints>(
        [&](int a, int b) __attribute__((always_inline)) {
          const S* pixel = pixels[a * W::kPoints + b] + c + i;
          return n == VL ? load_wide(pixel) : load_wide(pixel, n);
        },
        H::template input<T>, W::template input<T>,
        [&](int a, int b, Vec<T> t)
            __attribute__((always_inline)) { store(v + (a * W::kPoints + b) * product + i, t); });
  };
  int64_t i = 0;
  for (; i + VL <= channels; i += VL) step(i, VL);
  if (i < channels) step(i, channels - i);
}

// What one thread works with.
template <class T, class F, class S>
class Worker {
 public:
  using Plan = WinogradPlan<T, F>;

  Worker(const Conv2dView& v, const Plan& plan, const S* x, const S* w, const S* bias, S* y, const T* packed,
         const Epilogue<S>* epilogue)
      : v_(v), plan_(plan), x_(x), w_(w), bias_(bias), y_(y), packed_(packed), epilogue_(epilogue) {}

  // False: out of memory.
  bool run(int64_t task) {
    const int64_t tg = task / (plan_.threads_k * plan_.threads_t);
    const int64_t tk = task / plan_.threads_t % plan_.threads_k, tt = task % plan_.threads_t;
    first_panel_ = plan_.panels * tk / plan_.threads_k;
    last_panel_ = plan_.panels * (tk + 1) / plan_.threads_k;
    const int64_t first = plan_.tiles * tt / plan_.threads_t, last = plan_.tiles * (tt + 1) / plan_.threads_t;
    if (first_panel_ == last_panel_ || first == last) return true;
    constexpr int64_t size = sizeof(T);
    const int64_t panels = plan_.together * (last_panel_ - first_panel_), u = plan_.units * plan_.u_unit;
    const int64_t tile_bytes = plan_.units * kProducts * plan_.v_pitch * size;
    const bool hot = panels * u * size <= kHotWeightBytes;
    const int64_t product_bytes = kProducts * kMaxTileVecs * VL * size;
    block_ = hot ? kHotInputBytes / tile_bytes : kInputBytes / (tile_bytes + product_bytes);
    block_ = max(1, min(kMostTiles, block_));
    block_ = ceil_div(last - first, ceil_div(last - first, block_));
    keep_ = !packed_ && 2 * block_ < last - first && panels * u * size <= kKeptWeightBytes;
    v_product_ = odd_lines<T>(block_ * plan_.v_pitch);
    m_product_ = odd_lines<T>(block_ * kMaxTileVecs * VL);
    const int64_t weights = packed_ ? 0 : keep_ ? panels * u : plan_.u_unit;
    const auto carve = [&](Carver carver) {
      taps_ = carver.take<Tap>(TapList::capacity(1, max(1, plan_.chunk), kShortChain));
      pixels_ = carver.take<const S*>(kProducts);
      zeros_ = carver.take<S>(plan_.together * v_.C + VL);
      chains_ = carver.take<T>(kMostTileRows * kMaxTileVecs * VL);
      slice_ = carver.take<T>(slice_elements<T, F>());
      weights_ = carver.take<T>(weights);
      inputs_ = carver.take<T>(plan_.units * kProducts * v_product_);
      products_ = carver.take<T>(kProducts * m_product_);
      return carver.used();
    };
    void* scratch = thread_scratch(carve(Carver(nullptr)));
    if (!scratch) return false;
    carve(Carver(scratch));
    memset(zeros_, 0, static_cast<size_t>(plan_.together * v_.C) * sizeof(S));
    streams_ = kLineVectors && streams_result(v_, y_, v_.K % VL == 0);
    const int64_t last_group = v_.G * (tg + 1) / plan_.threads_g;
    for (first_group_ = v_.G * tg / plan_.threads_g; first_group_ < last_group; first_group_ += groups_) {
      groups_ = min(plan_.together, last_group - first_group_);
      if (keep_)
        for (int64_t group = first_group_; group < first_group_ + groups_; ++group)
          for (int64_t panel = first_panel_; panel < last_panel_; ++panel)
            for (int64_t unit = 0; unit < plan_.units; ++unit) transform(kept(group, panel, unit), group, panel, unit);
      for (int64_t tile = first; tile < last; tile += block_) run_block(tile, min(block_, last - tile));
    }
    if (streams_) stream_end();
    return true;
  }

 private:
  using H = typename F::H;
  using W = typename F::W;
  static constexpr int MW = W::kOutputs;
  static constexpr int64_t VL = kLanes<T>, kProducts = F::kProducts;

  TilePlace place(int64_t tile) const { return tile_place<F>(tile, plan_.tiles_h, plan_.tiles_w); }

  void transform(T* u, int64_t group, int64_t panel, int64_t unit) const {
    transform_panel<T, F>(u, slice_, w_ + group * v_.w_g, v_, plan_, panel, unit);
  }
  T* kept(int64_t group, int64_t panel, int64_t unit) const {
    const int64_t of_group = (group - first_group_) * (last_panel_ - first_panel_);
    return weights_ + ((of_group + panel - first_panel_) * plan_.units + unit) * plan_.u_unit;
  }

  void run_block(int64_t tile, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      if (i + 1 < count) fetch_tile(place(tile + i), place(tile + i + 1));
      load_tile(i, place(tile + i));
    }
    for (int64_t group = first_group_; group < first_group_ + groups_; ++group)
      for (int64_t panel = first_panel_; panel < last_panel_; ++panel) {
        for (int64_t unit = 0; unit < plan_.units; ++unit) multiply(group, panel, unit, count);
        for (int64_t i = 0; i < count; ++i) finish(i, place(tile + i), group, panel);
      }
  }

  // Asks for the pixels of tile `next` that `at`, the tile before it, lacks: short runs of several rows, which
  // processors don't see coming.
  CNNFAST_INLINE void fetch_tile(const TilePlace& at, const TilePlace& next) const {
    const int64_t shared = next.p == at.p && next.n == at.n ? W::kPoints - MW * W::kStride : 0;
    const S* x = x_ + next.n * v_.x_n + first_group_ * v_.C;
    const int64_t h = next.p * H::kStride - v_.pad_h, w = next.q * W::kStride - v_.pad_w;
    for (int64_t i = max(0, h); i < min(v_.H, h + H::kPoints); ++i)
      for (int64_t j = max(0, w + shared); j < min(v_.W, w + W::kPoints); ++j)
        for (int64_t c = 0; c < groups_ * v_.C; c += kLineBytes / static_cast<int64_t>(sizeof(S)))
          __builtin_prefetch(x + i * v_.x_h + j * v_.x_w + c);
  }

  void load_tile(int64_t index, const TilePlace& at) {
    const S* x = x_ + at.n * v_.x_n + first_group_ * v_.C;
    for (int64_t segment = 0; segment < F::kSegments; ++segment) {
      const int64_t p = at.p * H::kStride - v_.pad_h + H::first_tap(F::row(segment));
      const int64_t q = at.q * W::kStride - v_.pad_w + W::first_tap(F::column(segment));
      for (int64_t a = 0; a < H::kPoints; ++a) {
        const int64_t h = p + a;
        for (int64_t b = 0; b < W::kPoints; ++b) {
          const int64_t w = q + b;
          pixels_[a * W::kPoints + b] = h < 0 || h >= v_.H || w < 0 || w >= v_.W ? zeros_ : x + h * v_.x_h + w * v_.x_w;
        }
      }
      for (int64_t unit = segment * plan_.chunks; unit < (segment + 1) * plan_.chunks; ++unit)
        transform_tile<T, F>(inputs_ + unit * kProducts * v_product_ + index * plan_.v_pitch, v_product_, pixels_,
                             plan_.first_channel(unit), groups_ * plan_.unit_channels(unit, v_.C));
    }
  }

  // The products of one unit of a group's panel, added to those of the units before.
  void multiply(int64_t group, int64_t panel, int64_t unit, int64_t count) {
    const int64_t channels = plan_.unit_channels(unit, v_.C), vecs = plan_.panel_vecs(panel), width = vecs * VL;
    const T* u = weights_;
    if (packed_)
      u = packed_ + ((group * plan_.panels + panel) * plan_.units + unit) * plan_.u_unit;
    else if (keep_)
      u = kept(group, panel, unit);
    else
      transform(weights_, group, panel, unit);
    TapList taps(taps_, v_.C > kSumChain ? kSumChain : kShortChain);
    if (channels) taps.add(0, channels, sizeof(T));
    TileArgs<T> args;
    args.a_row = plan_.v_pitch * static_cast<int64_t>(sizeof(T)), args.a_step = 0;
    args.taps = taps_, args.ntaps = taps.size(), args.chains = chains_;
    args.init_row = args.out_row = width;
    const int64_t groups = ceil_div(count, kMaxTileRows[vecs]);
    for (int i = 0; i < H::kWeights; ++i)
      for (int j = 0; j < W::kWeights; ++j) {
        if (!F::has_point(unit / plan_.chunks, i, j)) continue;
        args.b = u + (i * W::kWeights + j) * plan_.u_product;
        // The points that have these weights.
        const int rows = i + 1 < H::kWeights ? 1 : H::kPoints - i, columns = j + 1 < W::kWeights ? 1 : W::kPoints - j;
        for (int f = 0; f < rows * columns; ++f) {
          const int64_t point = (i + f / columns) * W::kPoints + j + f % columns;
          const T* v = inputs_ + (unit * kProducts + point) * v_product_ + (group - first_group_) * v_.C;
          T* m = products_ + point * m_product_;
          for (int64_t g = 0; g < groups; ++g) {
            const int64_t tile = count * g / groups, tiles = count * (g + 1) / groups - tile;
            args.a = v + tile * plan_.v_pitch;
            args.out = m + tile * width;
            args.init = unit ? args.out : nullptr;
            if (packed_) fetch(args.b + plan_.u_product, channels * width, f * groups + g, rows * columns * groups);
            tile_function<T, true>(tiles, vecs)(args);
          }
        }
      }
  }

  // Asks for part `part` of `parts` of the next product's weights, which were packed far from the caches.
  CNNFAST_INLINE void fetch(const T* u, int64_t elements, int64_t part, int64_t parts) const {
    constexpr int64_t kLine = kLineBytes / sizeof(T);
    for (int64_t i = elements * part / parts / kLine; i < elements * (part + 1) / parts / kLine; ++i)
      __builtin_prefetch(u + i * kLine, 0, 2);
  }

  // One tile of a panel: products to pixels.
  void finish(int64_t index, const TilePlace& at, int64_t group, int64_t panel) {
    const int64_t vecs = plan_.panel_vecs(panel);
    for (int64_t j = 0; j < vecs; ++j) {
      const int64_t k = (panel * kMaxTileVecs + j) * VL, lanes = min(VL, v_.K - k), channel = group * v_.K + k;
      const Vec<T> bias = bias_ ? load_wide(bias_ + channel, lanes) : Vec<T>{};
      if (!finish_tile<T, F>(products_ + (index * vecs + j) * VL, m_product_, v_, y_, at, channel, lanes, bias,
                             epilogue_, streams_))
        redo_tile<F>(v_, x_, w_, bias_, y_, at, group, k, k + lanes, epilogue_);
    }
  }

  const Conv2dView& v_;
  const Plan& plan_;
  const S *x_, *w_, *bias_;
  S* y_;
  const T* packed_;
  const Epilogue<S>* epilogue_;
  int64_t first_group_ = 0, groups_ = 1, first_panel_ = 0, last_panel_ = 0, block_ = 0, v_product_ = 0, m_product_ = 0;
  bool keep_ = false, streams_ = false;
  Tap* taps_ = nullptr;
  const S** pixels_ = nullptr;
  S* zeros_ = nullptr;
  T *chains_ = nullptr, *slice_ = nullptr, *weights_ = nullptr, *inputs_ = nullptr, *products_ = nullptr;
};

template <class S, class F>
const char* run_view(const Conv2dView& v, const S* x, const S* w, const S* bias, S* y, const void* packed, int threads,
                     const Epilogue<S>* epilogue) {
  using T = Compute<S>;
  if (v.N * v.P * v.Q * v.K * v.G == 0) return nullptr;
  if (v.N * v.P * v.Q * v.K * v.C * v.G * v.R * v.S < kMacsWorthThreads) threads = 1;
  bool no_memory = false;
  const bool in_lanes = with_lane_group<T, F>(v, [&](auto group) {
    const LanePlan<T, F> plan(v, LaneUnit<T, decltype(group)::kValue>::kWidth, packed != nullptr, threads);
    parallel_for(
        threads, threads,
        [&](int64_t task) {
          LaneWorker<T, F, decltype(group)::kValue, S> worker(v, plan, x, w, bias, y, static_cast<const T*>(packed),
                                                              epilogue);
          if (!worker.run(task)) __atomic_store_n(&no_memory, true, __ATOMIC_RELAXED);
        },
        kDenormals<S>);
  });
  if (in_lanes) return no_memory ? kNoMemory : nullptr;
  const WinogradPlan<T, F> plan(v, threads);
  parallel_for(
      threads, threads,
      [&](int64_t task) {
        Worker<T, F, S> worker(v, plan, x, w, bias, y, static_cast<const T*>(packed), epilogue);
        if (!worker.run(task)) __atomic_store_n(&no_memory, true, __ATOMIC_RELAXED);
      },
      kDenormals<S>);
  return no_memory ? kNoMemory : nullptr;
}

// The launchers take the tiles of a kernel, at most one for each size of filter.

template <class S, class F, class... Others>
const char* launch_fprop(const void* params, const Launch& l) {
  const Conv2dParams& p = *static_cast<const Conv2dParams*>(params);
  const Conv2dView v = fprop_view(p);
  if constexpr (sizeof...(Others) > 0)
    if (!F::serves(v)) return launch_fprop<S, Others...>(params, l);
  const Epilogue<S> epilogue(p, l);
  return run_view<S, F>(v, static_cast<const S*>(l.operands[0]), static_cast<const S*>(l.operands[1]),
                        static_cast<const S*>(l.operands[2]), static_cast<S*>(l.operands[3]),
                        l.operands[kPackedOperand], l.threads, epilogue.or_null());
}

// Every group's and panel's U, for fprop, into the workspace.
template <class S, class F, class... Others>
const char* launch_pack(const void* params, const Launch& l) {
  using T = Compute<S>;
  const Conv2dView v = fprop_view(*static_cast<const Conv2dParams*>(params));
  if constexpr (sizeof...(Others) > 0)
    if (!F::serves(v)) return launch_pack<S, Others...>(params, l);
  const S* w = static_cast<const S*>(l.operands[1]);
  bool no_memory = false;
  const bool in_lanes = with_lane_group<T, F>(v, [&](auto group) {
    constexpr int kGroup = decltype(group)::kValue;
    using Unit = LaneUnit<T, kGroup>;
    const LanePlan<T, F> plan(v, Unit::kWidth, true, 1);
    parallel_for(l.threads, plan.units, [&](int64_t unit) {
      T* taps = static_cast<T*>(thread_scratch(Unit::kGroups * Unit::kTaps * sizeof(T)));
      if (taps)
        transform_lanes<T, F, kGroup>(static_cast<T*>(l.workspace) + unit * plan.weights, taps, w, v, unit);
      else
        __atomic_store_n(&no_memory, true, __ATOMIC_RELAXED);
    });
  });
  if (in_lanes) return no_memory ? kNoMemory : nullptr;
  const WinogradPlan<T, F> plan(v, 1);
  parallel_for(l.threads, v.G * plan.panels * plan.units, [&](int64_t task) {
    T* taps = static_cast<T*>(thread_scratch(slice_elements<T, F>() * sizeof(T)));
    const int64_t unit = task % plan.units, panel = task / plan.units % plan.panels;
    const S* of_group = w + task / plan.units / plan.panels * v.w_g;
    if (taps)
      transform_panel<T, F>(static_cast<T*>(l.workspace) + task * plan.u_unit, taps, of_group, v, plan, panel, unit);
    else
      __atomic_store_n(&no_memory, true, __ATOMIC_RELAXED);
  });
  return no_memory ? kNoMemory : nullptr;
}

template <class S, class F, class... Others>
int64_t packed_bytes(const void* params) {
  using T = Compute<S>;
  const Conv2dView v = fprop_view(*static_cast<const Conv2dParams*>(params));
  if constexpr (sizeof...(Others) > 0)
    if (!F::serves(v)) return packed_bytes<S, Others...>(params);
  const int64_t of_group = lane_group<T, F>(v) ? F::kProducts * v.C * v.K : WinogradPlan<T, F>(v, 1).packed_elements();
  return v.G * of_group * static_cast<int64_t>(sizeof(T));
}

template <class S, class F, class... Others>
const char* launch_dgrad(const void* params, const Launch& l) {
  const Conv2dParams& p = *static_cast<const Conv2dParams*>(params);
  if constexpr (sizeof...(Others) > 0)
    if (!F::serves(fprop_view(p))) return launch_dgrad<S, Others...>(params, l);
  const char* error = nullptr;
  const S *w = static_cast<const S*>(l.operands[1]), *g = static_cast<const S*>(l.operands[3]);
  S* dx = static_cast<S*>(l.operands[0]);
  // with stride 1 there is one residue class
  for_each_dgrad_view(p, [&](const Conv2dView& v, int64_t w_offset, int64_t dx_offset) {
    error = run_view<S, F>(v, g, w + w_offset, nullptr, dx + dx_offset, nullptr, l.threads, nullptr);
  });
  return error;
}

}  // namespace
}  // namespace CNNFAST_ISA
}  // namespace cnnfast
