// Winograd's F(M x M, 3 x 3) for 3x3 filters with stride and dilation 1, fprop and dgrad; M = 4 or 2.
//
//   y[tile, k] = bias[k] + A' [ sum_c (G w[k,c] G') . (B' x[tile, c] B) ] A        (conv2d_winograd_transform.h)
//
// A tile is M x M outputs of one image and the P x P inputs, P = M + 2, that they need. Its transformed inputs are
// multiplied with the transformed weights element by element and summed over c: P*P independent matrix products of
// tiles x C by C x K, 36 for 16 outputs (M = 4) or 16 for 4 (M = 2) where the direct sum takes 9 an output: 4 times and
// 2.25 times fewer multiplications. dgrad is fprop of the gradient with flipped taps and C, K exchanged
// (conv2d_view.h).
//
// Everything is fused over a block of tiles, all in scratch:
//
//   V [chunk][P*P][tile][c]         inputs of the block's tiles, transformed once
//   U [chunk][P*P][c][2 vectors]    weights of a panel of output channels, transformed inside the call (or beforehand,
//                                   for all panels: the pack entry)
//   M [P*P][tile][2 vectors]        products of a panel, by the register tile of the implicit GEMM (gemm_tile.h)
//
// and then the output transform adds the bias and writes M x M pixels of y. Input channels are summed in chunks, each
// a chain of at most 128; the chunks depend on C alone and no sum is split over threads, so that results are the same
// bits whatever the thread count. A thread owns a range of panels times a range of tiles, or, of a grouped convolution,
// some of the groups: each is a convolution of its own.
//
// Where a result isn't finite (Inf or NaN among the operands spreads over the whole tile, large values may overflow in
// between) the pixels of that tile are summed directly: infinities and NaNs come out where the direct kernel's do, and
// nowhere else.
//
// After Lavin and Gray (2016), and Zlateski, Jia, Li and Durand, The Anatomy of Efficient FFT and Winograd Convolutions
// on Modern CPUs (2019).
#pragma once
#include "../common/kernel_table.h"
#include "conv2d_direct.h"
#include "conv2d_view.h"
#include "conv2d_winograd_transform.h"
#include "gemm_tile.h"
#include "pack.h"
#include "primitives/parallel.h"
#include "primitives/scratch.h"

namespace cnnfast {
namespace CNNFAST_ISA {
namespace {

constexpr int64_t kChunk = 128;                 // input channels at a time
constexpr int64_t kSumChain = 32;               // additions in a row
constexpr int64_t kShortChain = 16;             // and where there are at most kSumChain channels
constexpr int64_t kSlice = 16;                  // input channels whose taps are transposed at a time
constexpr int64_t kHotWeightBytes = 1 << 20;    // transformed weights that stay in L2 beside a block
constexpr int64_t kKeptWeightBytes = 5 << 19;   // transformed weights that are kept from block to block
constexpr int64_t kHotInputBytes = 720 << 10;   // transformed inputs of a block, in L2
constexpr int64_t kInputBytes = 3 << 20;        // and where the weights pass by only once
constexpr int64_t kMostTiles = 128;             // in a block
constexpr int64_t kMacsWorthThreads = 1 << 18;  // below, one thread

constexpr const char* kNoMemory = "out of memory";

// An odd number of cache lines: arrays that are walked side by side don't share a set of L1.
template <class T>
CNNFAST_INLINE int64_t odd_lines(int64_t elements) {
  constexpr int64_t kLine = 64 / sizeof(T);
  return (ceil_div(elements, kLine) | 1) * kLine;
}

// What is decided from the sizes alone: also the format of the packed weights, which depends on C and K only.
template <class T, int M>
struct WinogradPlan {
  static constexpr int64_t VL = kLanes<T>, kProducts = kPoints<M> * kPoints<M>;

  int64_t tiles_h, tiles_w, tiles;  // of an image; of the batch
  int64_t vecs, panels;             // of output channels; a panel is kMaxTileVecs vectors
  int64_t chunk, chunks;            // of input channels
  int64_t u_product, u_unit;        // elements of one product, and of all, of one chunk of a panel
  int64_t v_pitch;                  // elements of a tile of a chunk
  int threads_g, threads_k, threads_t;

  WinogradPlan(const Conv2dView& v, int threads) {
    tiles_h = ceil_div(v.P, M), tiles_w = ceil_div(v.Q, M), tiles = v.N * tiles_h * tiles_w;
    vecs = ceil_div(v.K, VL), panels = ceil_div(vecs, kMaxTileVecs);
    chunks = max(1, ceil_div(v.C, kChunk));
    chunk = chunks == 1 ? v.C : round_up(ceil_div(v.C, chunks), 16);
    chunks = max(1, ceil_div(v.C, max(1, chunk)));
    u_product = odd_lines<T>(max(1, chunk) * kMaxTileVecs * VL);
    u_unit = kProducts * u_product;
    v_pitch = odd_lines<T>(max(1, chunk));
    threads_g = v.G >= threads ? threads : 1;
    threads /= threads_g;
    // The split over threads, in cycles of a thread: products, and transforms that are done by more than one.
    double best = -1;
    for (int tk = 1; tk <= threads; ++tk) {
      if (threads % tk) continue;
      const double k = static_cast<double>(ceil_div(panels, tk) * kMaxTileVecs),
                   t = static_cast<double>(ceil_div(tiles, threads / tk)), c = static_cast<double>(v.C);
      const double cost =
          k * t * c * kProducts / 2 + (t * c / VL + k * t) * 4 * kProducts + k * c * (3 * kProducts + 20);
      if (best < 0 || cost < best) best = cost, threads_k = tk, threads_t = threads / tk;
    }
  }
  int64_t packed_elements() const { return panels * chunks * u_unit; }  // of a group
  int64_t panel_vecs(int64_t panel) const { return min(kMaxTileVecs, vecs - panel * kMaxTileVecs); }
  int64_t chunk_channels(int64_t i, int64_t C) const { return min(chunk, C - i * chunk); }
};

// Room for the taps of a slice of a panel.
template <class T>
constexpr int64_t slice_elements() {
  return kTapsAcross * kTapsAcross * kSlice * kMaxTileVecs * kLanes<T>;
}

// One chunk of a panel: U[product][c][lane] = G w[k,c] G'. `taps` has room for slice_elements().
template <class T, int M, class S>
void transform_panel(T* u, T* taps, const S* w, const Conv2dView& v, const WinogradPlan<T, M>& plan, int64_t panel,
                     int64_t chunk) {
  constexpr int P = kPoints<M>, R = kTapsAcross, VL = kLanes<T>;
  const int64_t k = panel * kMaxTileVecs * VL, vecs = plan.panel_vecs(panel), width = vecs * VL;
  const int64_t first = chunk * plan.chunk, end = first + plan.chunk_channels(chunk, v.C);
  for (int64_t c = first; c < end; c += kSlice) {
    const int64_t channels = min(kSlice, end - c);
    pack_panel<T>(taps, w + k * v.w_k + c * v.w_c,
                  {min(width, v.K - k), vecs, channels, R, R, v.w_k, v.w_c, v.w_r, v.w_s});
    for (int64_t i = 0; i < channels; ++i)
      for (int64_t j = 0; j < width; j += VL) {
        T* out = u + (c - first + i) * width + j;
        transform_both<T, R, P>(
            [&](int r, int s)
                __attribute__((always_inline)) { return load(taps + ((r * R + s) * channels + i) * width + j); },
            transform_weights<T, M>,
            [&](int a, int b, Vec<T> t)
                __attribute__((always_inline)) { store(out + (a * P + b) * plan.u_product, t); });
      }
  }
}

// One tile's channels: V[product][c] = B' x B, products `product` elements apart; lanes beyond the last channel zero.
template <class T, int M, class S>
CNNFAST_INLINE void transform_tile(T* v, int64_t product, const S* const* pixels, int64_t c, int64_t channels) {
  constexpr int P = kPoints<M>, VL = kLanes<T>;
  const auto step = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    transform_both<T, P, P>(
        [&](int a, int b) __attribute__((always_inline)) {
          const S* pixel = pixels[a * P + b] + c + i;
          return n == VL ? load_wide(pixel) : load_wide(pixel, n);
        },
        transform_input<T, M>,
        [&](int a, int b, Vec<T> t) __attribute__((always_inline)) { store(v + (a * P + b) * product + i, t); });
  };
  int64_t i = 0;
  for (; i + VL <= channels; i += VL) step(i, VL);
  if (i < channels) step(i, channels - i);
}

// Writes the part of a tile's vector of channels that lies in y. False: some of it isn't finite.
template <class T, int M, class S>
CNNFAST_INLINE bool store_tile(S* y, int64_t y_h, int64_t y_w, int64_t rows, int64_t columns, int64_t lanes,
                               Vec<T> (&values)[M][M], Vec<T> bias) {
  Vec<T> check{};  // stays zero as long as everything is finite
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i) {
    if (i >= rows) break;
#pragma GCC unroll 4
    for (int j = 0; j < M; ++j) {
      if (j >= columns) break;
      const Vec<T> value = values[i][j] + bias;
      check += value * T(0);
      S* out = y + i * y_h + j * y_w;
      if (lanes == kLanes<T>)
        store_narrow(out, value);
      else
        store_narrow(out, value, lanes);
    }
  }
  return all_zero(check);
}

// What one thread works with.
template <class T, int M, class S>
class Worker {
 public:
  using Plan = WinogradPlan<T, M>;

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
    const int64_t panels = last_panel_ - first_panel_, u = plan_.chunks * plan_.u_unit;
    const int64_t tile_bytes = plan_.chunks * kProducts * plan_.v_pitch * size;
    const bool hot = panels * u * size <= kHotWeightBytes;
    block_ = max(1, min(kMostTiles, (hot ? kHotInputBytes : kInputBytes) / tile_bytes));
    block_ = ceil_div(last - first, ceil_div(last - first, block_));
    keep_ = !packed_ && block_ < last - first && panels * u * size <= kKeptWeightBytes;
    v_product_ = odd_lines<T>(block_ * plan_.v_pitch);
    m_product_ = odd_lines<T>(block_ * kMaxTileVecs * VL);
    const int64_t weights = packed_ ? 0 : keep_ ? panels * u : plan_.u_unit;
    const auto carve = [&](Carver carver) {
      taps_ = carver.take<Tap>(TapList::capacity(1, max(1, plan_.chunk), kShortChain));
      pixels_ = carver.take<const S*>(kProducts);
      zeros_ = carver.take<S>(v_.C + VL);
      chains_ = carver.take<T>(kMostTileRows * kMaxTileVecs * VL);
      slice_ = carver.take<T>(slice_elements<T>());
      weights_ = carver.take<T>(weights);
      inputs_ = carver.take<T>(plan_.chunks * kProducts * v_product_);
      products_ = carver.take<T>(kProducts * m_product_);
      return carver.used();
    };
    void* scratch = thread_scratch(carve(Carver(nullptr)));
    if (!scratch) return false;
    carve(Carver(scratch));
    memset(zeros_, 0, static_cast<size_t>(v_.C) * sizeof(S));
    for (group_ = v_.G * tg / plan_.threads_g; group_ < v_.G * (tg + 1) / plan_.threads_g; ++group_) {
      if (keep_)
        for (int64_t panel = first_panel_; panel < last_panel_; ++panel)
          for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk)
            transform(weights_ + ((panel - first_panel_) * plan_.chunks + chunk) * plan_.u_unit, panel, chunk);
      for (int64_t tile = first; tile < last; tile += block_) run_block(tile, min(block_, last - tile));
    }
    return true;
  }

 private:
  static constexpr int P = kPoints<M>;
  static constexpr int64_t VL = kLanes<T>, kProducts = P * P;

  struct Place {
    int64_t n, p, q;  // the first pixel of a tile
  };
  Place place(int64_t tile) const {
    const int64_t row = tile / plan_.tiles_w;
    return {row / plan_.tiles_h, row % plan_.tiles_h * M, tile % plan_.tiles_w * M};
  }

  void transform(T* u, int64_t panel, int64_t chunk) const {
    transform_panel<T, M>(u, slice_, w_ + group_ * v_.w_g, v_, plan_, panel, chunk);
  }

  void run_block(int64_t tile, int64_t count) {
    for (int64_t i = 0; i < count; ++i) load_tile(i, place(tile + i));
    for (int64_t panel = first_panel_; panel < last_panel_; ++panel) {
      for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) multiply(panel, chunk, count);
      for (int64_t i = 0; i < count; ++i) finish_tile(i, place(tile + i), panel);
    }
  }

  void load_tile(int64_t index, const Place& at) {
    const S* x = x_ + at.n * v_.x_n + group_ * v_.C;
    for (int64_t a = 0; a < P; ++a) {
      const int64_t h = at.p - v_.pad_h + a;
      for (int64_t b = 0; b < P; ++b) {
        const int64_t w = at.q - v_.pad_w + b;
        pixels_[a * P + b] = h < 0 || h >= v_.H || w < 0 || w >= v_.W ? zeros_ : x + h * v_.x_h + w * v_.x_w;
      }
    }
    for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk)
      transform_tile<T, M>(inputs_ + chunk * kProducts * v_product_ + index * plan_.v_pitch, v_product_, pixels_,
                           chunk * plan_.chunk, plan_.chunk_channels(chunk, v_.C));
  }

  // The products of one chunk of a panel, added to those of the chunks before.
  void multiply(int64_t panel, int64_t chunk, int64_t count) {
    const int64_t channels = plan_.chunk_channels(chunk, v_.C), vecs = plan_.panel_vecs(panel), width = vecs * VL;
    const T* u = weights_;
    if (packed_)
      u = packed_ + ((group_ * plan_.panels + panel) * plan_.chunks + chunk) * plan_.u_unit;
    else if (keep_)
      u = weights_ + ((panel - first_panel_) * plan_.chunks + chunk) * plan_.u_unit;
    else
      transform(weights_, panel, chunk);
    TapList taps(taps_, v_.C > kSumChain ? kSumChain : kShortChain);
    if (channels) taps.add(0, channels, sizeof(T));
    TileArgs<T> args;
    args.a_row = plan_.v_pitch * static_cast<int64_t>(sizeof(T)), args.a_step = 0;
    args.taps = taps_, args.ntaps = taps.size(), args.chains = chains_;
    args.init_row = args.out_row = width;
    const int64_t groups = ceil_div(count, kMaxTileRows[vecs]);
    for (int64_t f = 0; f < kProducts; ++f) {
      const T* v = inputs_ + (chunk * kProducts + f) * v_product_;
      T* m = products_ + f * m_product_;
      args.b = u + f * plan_.u_product;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t i = count * g / groups, rows = count * (g + 1) / groups - i;
        args.a = v + i * plan_.v_pitch;
        args.out = m + i * width;
        args.init = chunk ? args.out : nullptr;
        if (packed_) fetch(args.b + plan_.u_product, channels * width, g, groups);
        tile_function<T, true>(rows, vecs)(args);
      }
    }
  }

  // Asks for part `part` of `parts` of the next product's weights, which were packed far from the caches.
  CNNFAST_INLINE void fetch(const T* u, int64_t elements, int64_t part, int64_t parts) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t i = elements * part / parts / kLine; i < elements * (part + 1) / parts / kLine; ++i)
      __builtin_prefetch(u + i * kLine, 0, 2);
  }

  // One tile of a panel: products to pixels.
  void finish_tile(int64_t index, const Place& at, int64_t panel) {
    const int64_t vecs = plan_.panel_vecs(panel), rows = min(M, v_.P - at.p), columns = min(M, v_.Q - at.q);
    for (int64_t j = 0; j < vecs; ++j) {
      const int64_t k = (panel * kMaxTileVecs + j) * VL, lanes = min(VL, v_.K - k);
      const T* m = products_ + (index * vecs + j) * VL;
      Vec<T> values[M][M];
      transform_both<T, P, M>(
          [&](int a, int b) __attribute__((always_inline)) { return load(m + (a * P + b) * m_product_); },
          transform_output<T, M>, [&](int i, int q, Vec<T> t) __attribute__((always_inline)) { values[i][q] = t; });
      const int64_t channel = group_ * v_.K + k;
      const Vec<T> bias = bias_ ? load_wide(bias_ + channel, lanes) : Vec<T>{};
      S* y = y_ + at.n * v_.y_n + at.p * v_.y_h + at.q * v_.y_w + channel;
      if (epilogue_ ? !finish_values(y, at, rows, columns, channel, lanes, values, bias)
                    : !store_tile<T, M>(y, v_.y_h, v_.y_w, rows, columns, lanes, values, bias))
        redo_tile(at, rows, columns, k, lanes);
    }
  }

  // As store_tile, through the epilogue (conv_bn_act).
  __attribute__((noinline)) bool finish_values(S* y, const Place& at, int64_t rows, int64_t columns, int64_t k,
                                               int64_t lanes, const Vec<T> (&values)[M][M], Vec<T> bias) {
    const auto factors = epilogue_->factors(k, lanes);
    Vec<T> check{};
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        const S* r = epilogue_->residual_at(at.n, at.p + i, at.q + j);
        const Vec<T> value = values[i][j] + bias;
        check += value * T(0);
        epilogue_->store(y + i * v_.y_h + j * v_.y_w, value, factors, r ? r + k : nullptr, lanes);
      }
    return all_zero(check);
  }

  __attribute__((noinline)) void redo_tile(const Place& at, int64_t rows, int64_t columns, int64_t k, int64_t lanes) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j)
        direct_pixel(v_, x_, w_, bias_, y_, (at.n * v_.P + at.p + i) * v_.Q + at.q + j, group_, k, k + lanes,
                     epilogue_);
  }

  const Conv2dView& v_;
  const Plan& plan_;
  const S *x_, *w_, *bias_;
  S* y_;
  const T* packed_;
  const Epilogue<S>* epilogue_;
  int64_t group_ = 0, first_panel_ = 0, last_panel_ = 0, block_ = 0, v_product_ = 0, m_product_ = 0;
  bool keep_ = false;
  Tap* taps_ = nullptr;
  const S** pixels_ = nullptr;
  S* zeros_ = nullptr;
  T *chains_ = nullptr, *slice_ = nullptr, *weights_ = nullptr, *inputs_ = nullptr, *products_ = nullptr;
};

template <class S, int M>
const char* run_view(const Conv2dView& v, const S* x, const S* w, const S* bias, S* y, const void* packed, int threads,
                     const Epilogue<S>* epilogue) {
  using T = Compute<S>;
  if (v.N * v.P * v.Q * v.K * v.G == 0) return nullptr;
  if (v.N * v.P * v.Q * v.K * v.C * v.G * kTapsAcross * kTapsAcross < kMacsWorthThreads) threads = 1;
  const WinogradPlan<T, M> plan(v, threads);
  bool no_memory = false;
  parallel_for(
      threads, threads,
      [&](int64_t task) {
        Worker<T, M, S> worker(v, plan, x, w, bias, y, static_cast<const T*>(packed), epilogue);
        if (!worker.run(task)) __atomic_store_n(&no_memory, true, __ATOMIC_RELAXED);
      },
      kDenormals<S>);
  return no_memory ? kNoMemory : nullptr;
}

template <class S, int M>
const char* launch_fprop(const void* params, const Launch& l) {
  const Conv2dParams& p = *static_cast<const Conv2dParams*>(params);
  const Epilogue<S> epilogue(p, l);
  return run_view<S, M>(fprop_view(p), static_cast<const S*>(l.operands[0]), static_cast<const S*>(l.operands[1]),
                        static_cast<const S*>(l.operands[2]), static_cast<S*>(l.operands[3]),
                        l.operands[kPackedOperand], l.threads, epilogue.or_null());
}

// Every group's and panel's U, for fprop, into the workspace.
template <class S, int M>
const char* launch_pack(const void* params, const Launch& l) {
  using T = Compute<S>;
  const Conv2dView v = fprop_view(*static_cast<const Conv2dParams*>(params));
  const WinogradPlan<T, M> plan(v, 1);
  const S* w = static_cast<const S*>(l.operands[1]);
  bool no_memory = false;
  parallel_for(l.threads, v.G * plan.panels * plan.chunks, [&](int64_t task) {
    T* taps = static_cast<T*>(thread_scratch(slice_elements<T>() * sizeof(T)));
    const int64_t chunk = task % plan.chunks, panel = task / plan.chunks % plan.panels;
    const S* of_group = w + task / plan.chunks / plan.panels * v.w_g;
    if (taps)
      transform_panel<T, M>(static_cast<T*>(l.workspace) + task * plan.u_unit, taps, of_group, v, plan, panel, chunk);
    else
      __atomic_store_n(&no_memory, true, __ATOMIC_RELAXED);
  });
  return no_memory ? kNoMemory : nullptr;
}

template <class S, int M>
int64_t packed_bytes(const void* params) {
  using T = Compute<S>;
  const Conv2dView v = fprop_view(*static_cast<const Conv2dParams*>(params));
  return v.G * WinogradPlan<T, M>(v, 1).packed_elements() * static_cast<int64_t>(sizeof(T));
}

template <class S, int M>
const char* launch_dgrad(const void* params, const Launch& l) {
  const char* error = nullptr;
  const S *w = static_cast<const S*>(l.operands[1]), *g = static_cast<const S*>(l.operands[3]);
  S* dx = static_cast<S*>(l.operands[0]);
  // with stride 1 there is one residue class
  for_each_dgrad_view(
      *static_cast<const Conv2dParams*>(params), [&](const Conv2dView& v, int64_t w_offset, int64_t dx_offset) {
        error = run_view<S, M>(v, g, w + w_offset, nullptr, dx + dx_offset, nullptr, l.threads, nullptr);
      });
  return error;
}

}  // namespace
}  // namespace CNNFAST_ISA
}  // namespace cnnfast
