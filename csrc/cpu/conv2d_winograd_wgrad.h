// Winograd's F(M x M, 3 x 3), wgrad of 3x3 filters with stride and dilation 1; M = 4 or 2.
//
//   dw[k,c] = G' [ sum_tiles (A g[tile,k] A') . (B' x[tile,c] B) ] G        (conv2d_winograd_transform.h)
//
// This is fprop's formula differentiated by w. A tile is M x M pixels of g and the P x P pixels of x, P = M + 2, that
// they met; both are transformed and multiplied element by element, summed over the tiles of the batch: P*P independent
// products of C x tiles by tiles x K, 36 for 9 taps of 16 pixels (M = 4) or 16 for 9 taps of 4 (M = 2): 4 times and
// 2.25 times fewer multiplications than the direct sum.
//
//   V [P*P][tile][c]                  x of a chunk of tiles, in the workspace
//   Z [P*P][panel][tile][2 vectors]   g of the same tiles, in panels of output channels, in the workspace
//   D [task][P*P][c][2 vectors]       sums of a block of input channels and a panel; in scratch if there is one chunk
//
// All threads transform a chunk, then each multiplies for the blocks that it owns (gemm_tile.h), and after the last
// chunk turns its sums into weights. The chunks depend on the sizes alone and no sum is split over threads, so that
// results are the same bits whatever the thread count.
//
// Where a result isn't finite (Inf or NaN among the operands spreads over all taps, large values may overflow in
// between) the direct kernel does the whole call again.
//
// After Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2016).
#pragma once
#include "conv2d_winograd.h"

namespace cnnfast {
namespace CNNFAST_ISA {
namespace {

constexpr int64_t kTransformedBytes = 24 << 20;  // of a chunk, both operands
constexpr int64_t kFewerBytes = 6 << 20;         // and where the sums, which wait from chunk to chunk, are small
constexpr int64_t kSmallSums = 1 << 20;          // bytes
constexpr int64_t kBlockChannels = 112;          // input channels of a task, at most: its sums stay in L2
constexpr int64_t kPieceTiles = 256;             // that pass all tiles of registers before the next ones: Z stays in L1
constexpr int64_t kPixelChain = 16;              // additions in a row

// What is decided from the sizes alone, but for the tasks.
template <class T, int M>
struct WgradPlan {
  static constexpr int64_t VL = kLanes<T>, kProducts = kPoints<M> * kPoints<M>;

  int64_t tiles_h, tiles_w, tiles;  // of an image; of the batch
  int64_t vecs, panels;             // of output channels; a panel is kMaxTileVecs vectors
  int64_t chunk, chunks;            // tiles at a time
  int64_t v_pitch, v_product;       // elements of a tile of V, of a product
  int64_t z_panel, z_product;       // elements of a panel of Z, of a product
  int64_t blocks;                   // of input channels

  WgradPlan(const Conv2dView& v, int threads) {
    constexpr int64_t kWidth = kMaxTileVecs * VL, kSize = sizeof(T);
    tiles_h = ceil_div(v.P, M), tiles_w = ceil_div(v.Q, M), tiles = v.N * tiles_h * tiles_w;
    vecs = ceil_div(v.K, VL), panels = ceil_div(vecs, kMaxTileVecs);
    const int64_t tile_bytes = kProducts * (v.C + panels * kWidth) * kSize;
    const int64_t most_bytes = sums(v.C) * kSize > kSmallSums ? kTransformedBytes : kFewerBytes;
    chunks = ceil_div(tiles, max(kPixelChain, most_bytes / tile_bytes));
    chunk = ceil_div(tiles, chunks), chunks = ceil_div(tiles, chunk);
    v_pitch = odd_lines<T>(v.C), v_product = odd_lines<T>(chunk * v_pitch);
    z_panel = odd_lines<T>(chunk * kWidth), z_product = panels * z_panel;
    // Blocks of equal size, and as few as keep all threads at work.
    const int64_t least = ceil_div(v.C, kBlockChannels), most = ceil_div(v.C, kMostTileRows);
    int64_t best = -1;
    for (int64_t n = least; n <= max(least, most); ++n) {
      const int64_t rows = ceil_div(panels * n, threads) * ceil_div(v.C, n);
      if (best < 0 || rows < best) best = rows, blocks = n;
    }
  }
  int64_t tasks() const { return blocks * panels; }
  int64_t panel_vecs(int64_t panel) const { return min(kMaxTileVecs, vecs - panel * kMaxTileVecs); }
  int64_t transformed() const { return kProducts * (v_product + z_product); }
  int64_t sums(int64_t C) const { return kProducts * C * vecs * VL; }
  int64_t workspace(int64_t C) const { return transformed() + (chunks > 1 ? sums(C) : 0); }
};

// One tile's vector of channels: Z[product] = A g A'; pixels that lie outside of g are zeros.
template <class T, int M, class S>
CNNFAST_INLINE void transform_gradient_tile(T* z, int64_t product, const S* const* pixels, int64_t k, int64_t lanes) {
  constexpr int P = kPoints<M>;
  transform_both<T, M, P>(
      [&](int i, int j) __attribute__((always_inline)) {
        const S* pixel = pixels[i * M + j] + k;
        return lanes == kLanes<T> ? load_wide(pixel) : load_wide(pixel, lanes);
      },
      transform_gradient<T, M>,
      [&](int a, int b, Vec<T> t) __attribute__((always_inline)) { store(z + (a * P + b) * product, t); });
}

template <class T, int M, class S>
class WgradWorker {
 public:
  using Plan = WgradPlan<T, M>;

  WgradWorker(const Conv2dView& v, const Plan& plan, const S* x, S* dw, const S* g, T* workspace)
      : v_(v),
        plan_(plan),
        x_(x),
        dw_(dw),
        g_(g),
        inputs_(workspace),
        gradients_(workspace + Plan::kProducts * plan.v_product),
        kept_(workspace + plan.transformed()) {}

  // Transforms part `part` of `parts` of a chunk's tiles. False: out of memory.
  bool transform(int64_t chunk, int64_t part, int64_t parts) const {
    const int64_t first = chunk * plan_.chunk, count = min(plan_.chunk, plan_.tiles - first);
    S* zeros = static_cast<S*>(thread_scratch(static_cast<size_t>(max(v_.C, v_.K) + VL) * sizeof(S)));
    if (!zeros) return false;
    memset(zeros, 0, static_cast<size_t>(max(v_.C, v_.K)) * sizeof(S));
    for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i) {
      const int64_t row = (first + i) / plan_.tiles_w, n = row / plan_.tiles_h;
      const int64_t p = row % plan_.tiles_h * M, q = (first + i) % plan_.tiles_w * M;
      const S* pixels[Plan::kProducts];
      for (int64_t a = 0; a < P; ++a)
        for (int64_t b = 0; b < P; ++b) {
          const int64_t h = p - v_.pad_h + a, w = q - v_.pad_w + b;
          const bool outside = h < 0 || h >= v_.H || w < 0 || w >= v_.W;
          pixels[a * P + b] = outside ? zeros : x_ + n * v_.x_n + h * v_.x_h + w * v_.x_w;
        }
      transform_tile<T, SquareTile<M>>(inputs_ + i * plan_.v_pitch, plan_.v_product, pixels, 0, v_.C);
      for (int64_t a = 0; a < M; ++a)
        for (int64_t b = 0; b < M; ++b)
          pixels[a * M + b] =
              p + a < v_.P && q + b < v_.Q ? g_ + n * v_.y_n + (p + a) * v_.y_h + (q + b) * v_.y_w : zeros;
      for (int64_t j = 0; j < plan_.vecs; ++j) {
        const int64_t panel = j / kMaxTileVecs, width = plan_.panel_vecs(panel) * VL;
        transform_gradient_tile<T, M>(gradients_ + panel * plan_.z_panel + i * width + j % kMaxTileVecs * VL,
                                      plan_.z_product, pixels, j * VL, min(VL, v_.K - j * VL));
      }
    }
    return true;
  }

  // Adds up a chunk for one task, and after the last chunk writes its weights.
  enum class Outcome { kDone, kNotFinite, kNoMemory };
  Outcome multiply(int64_t chunk, int64_t task) {
    const int64_t block = task % plan_.blocks, panel = task / plan_.blocks;
    const int64_t c = v_.C * block / plan_.blocks, channels = v_.C * (block + 1) / plan_.blocks - c;
    const int64_t vecs = plan_.panel_vecs(panel), width = vecs * VL,
                  count = min(plan_.chunk, plan_.tiles - chunk * plan_.chunk);
    const bool last = chunk + 1 == plan_.chunks;
    Tap* taps = nullptr;
    T *chains = nullptr, *sums = nullptr, *weights = nullptr;
    const auto carve = [&](Carver carver) {
      taps = carver.take<Tap>(TapList::capacity(1, kPieceTiles, kPixelChain));
      chains = carver.take<T>(kMostTileRows * kMaxTileVecs * VL);
      weights = carver.take<T>(last ? kTaps * channels * width : 0);
      sums = carver.take<T>(plan_.chunks == 1 ? Plan::kProducts * channels * width : 0);
      return carver.used();
    };
    void* scratch = thread_scratch(carve(Carver(nullptr)));
    if (!scratch) return Outcome::kNoMemory;
    carve(Carver(scratch));
    if (plan_.chunks > 1) sums = kept_ + Plan::kProducts * (panel * kMaxTileVecs * VL * v_.C + c * width);

    TileArgs<T> args;
    args.a_row = 0, args.a_step = plan_.v_pitch * static_cast<int64_t>(sizeof(T));
    args.b_step = args.init_row = args.out_row = width;
    args.taps = taps, args.chains = chains;
    const int64_t tiles = ceil_div(channels, kMaxTileRows[vecs]), pieces = ceil_div(count, kPieceTiles);
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t i = count * piece / pieces, n = count * (piece + 1) / pieces - i;
      TapList list(taps, kPixelChain);
      list.add(0, n, args.a_step);
      args.ntaps = list.size();
      for (int64_t f = 0; f < Plan::kProducts; ++f) {
        args.b = gradients_ + f * plan_.z_product + panel * plan_.z_panel + i * width;
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t row = channels * t / tiles, rows = channels * (t + 1) / tiles - row;
          args.a = inputs_ + f * plan_.v_product + i * plan_.v_pitch + c + row;
          args.out = sums + (f * channels + row) * width;
          args.init = chunk + piece ? args.out : nullptr;
          tile_function<T, false>(rows, vecs)(args);
        }
      }
    }
    return !last || write(weights, sums, c, channels, panel) ? Outcome::kDone : Outcome::kNotFinite;
  }

 private:
  static constexpr int P = kPoints<M>, kTaps = kTapsAcross * kTapsAcross;
  static constexpr int64_t VL = kLanes<T>;

  // A task's sums become weights: G' D G, by way of a panel [tap][c][vectors]. False: some of it isn't finite.
  bool write(T* weights, const T* sums, int64_t c, int64_t channels, int64_t panel) const {
    const int64_t vecs = plan_.panel_vecs(panel), width = vecs * VL, product = channels * width;
    const int64_t k = panel * kMaxTileVecs * VL;
    Vec<T> check{};  // stays zero as long as everything is finite
    for (int64_t i = 0; i < product; i += VL) {
      transform_both<T, P, kTapsAcross>(
          [&](int a, int b) __attribute__((always_inline)) { return load(sums + (a * P + b) * product + i); },
          transform_taps<T, M>,
          [&](int r, int s, Vec<T> t) __attribute__((always_inline)) {
            check += t * T(0);
            store(weights + (r * kTapsAcross + s) * product + i, t);
          });
    }
    unpack_panel(dw_ + k * v_.w_k + c * v_.w_c, weights,
                 {min(width, v_.K - k), vecs, channels, kTapsAcross, kTapsAcross, v_.w_k, v_.w_c, v_.w_r, v_.w_s});
    return all_zero(check);
  }

  const Conv2dView& v_;
  const Plan& plan_;
  const S* x_;
  S* dw_;
  const S* g_;
  T *inputs_, *gradients_, *kept_;  // V, Z, D
};

template <class S, int M>
const char* launch_wgrad(const void* params, const Launch& l) {
  using T = Compute<S>;
  using Worker = WgradWorker<T, M, S>;
  const Conv2dParams& p = *static_cast<const Conv2dParams*>(params);
  const S *x = static_cast<const S*>(l.operands[0]), *g = static_cast<const S*>(l.operands[3]);
  S* dw = static_cast<S*>(l.operands[1]);
  const Conv2dView v = fprop_view(p);
  if (v.K * v.C == 0) return nullptr;
  if (v.N * v.P * v.Q == 0) {
    direct_wgrad(p, x, dw, g, 1);  // writes zeros
    return nullptr;
  }
  const int threads = v.N * v.P * v.Q * v.K * v.C * kTapsAcross * kTapsAcross < kMacsWorthThreads ? 1 : l.threads;
  const WgradPlan<T, M> plan(v, threads);
  T* workspace = static_cast<T*>(l.workspace);
  bool finite = true, memory = true;  // only ever set to false, so that the threads may race
  for (int64_t chunk = 0; chunk < plan.chunks && memory; ++chunk) {
    parallel_for(
        threads, threads,
        [&](int64_t part) {
          if (!Worker(v, plan, x, dw, g, workspace).transform(chunk, part, threads))
            __atomic_store_n(&memory, false, __ATOMIC_RELAXED);
        },
        kDenormals<S>);
    parallel_for(
        threads, plan.tasks(),
        [&](int64_t task) {
          const auto outcome = Worker(v, plan, x, dw, g, workspace).multiply(chunk, task);
          if (outcome == Worker::Outcome::kNoMemory) __atomic_store_n(&memory, false, __ATOMIC_RELAXED);
          if (outcome == Worker::Outcome::kNotFinite) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
        },
        kDenormals<S>);
  }
  if (!memory) return kNoMemory;
  if (!finite) direct_wgrad(p, x, dw, g, l.threads);
  return nullptr;
}

template <class S, int M>
int64_t wgrad_workspace(const void* params) {
  using T = Compute<S>;
  const Conv2dView v = fprop_view(*static_cast<const Conv2dParams*>(params));
  if (v.N * v.P * v.Q * v.K * v.C == 0) return 0;
  return WgradPlan<T, M>(v, 1).workspace(v.C) * static_cast<int64_t>(sizeof(T));
}

}  // namespace
}  // namespace CNNFAST_ISA
}  // namespace cnnfast
