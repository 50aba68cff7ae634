// Winograd's F(2 x 2, 3 x 3) on pairs of bf16 (vdpbf16ps), for 3x3 filters with stride and dilation 1, fprop and dgrad.
//
//   y[tile, k] = bias[k] + A' [ sum_{pairs of c} dot(G w[k,c] G', B' x[tile,c] B) ] A    (conv2d_winograd_transform.h)
//
// A tile is 2 x 2 outputs and the 4 x 4 inputs they need: 16 products where the direct sum takes 36. Inputs and weights
// are transformed in float and rounded to bf16 once more; products are summed, and transformed back, in float. Those
// two roundings cost 2 to 2.7 times the direct sum's error. (F(4 x 4) on bf16 would cost 6 times.)
//
// Everything is fused over a block of tiles, all in scratch:
//
//   V [16][tile][c]              inputs of the block's tiles; a row of tiles shares the columns between neighbours
//   U [16][pair][2 vectors][2]   weights of a panel of output channels, transformed from pairs of the plain weights
//   M [16][tile][2 vectors]      products of a panel, by the register tile (dot_tile.h), some tiles at a time
//
// and then the output transform ends in the epilogue. Plain weights in pairs [tap][pair][vectors][2] are what a plan
// packs beforehand, as large as they come; U would be 1.8 times that, and making it costs few per cent. dgrad is fprop
// of the gradient with flipped taps and C, K exchanged (conv2d_view.h). A thread owns a range of panels times a range
// of tiles; groups are taken one by one. No sum is split, so that results are the same bits whatever the thread count.
//
// Where a result isn't finite (Inf or NaN among the operands spreads over the whole tile, large values may overflow in
// between) the pixels of that tile are summed directly from the plain weights.
//
// After Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2016).
#include "../../common/kernel_table.h"
#include "../conv2d_view.h"
#include "../conv2d_winograd_transform.h"
#include "../epilogue.h"
#include "../primitives/parallel.h"
#include "../primitives/scratch.h"
#include "dot_pack.h"
#include "dot_tile.h"

namespace cnnfast {
namespace CNNFAST_ISA {
namespace {

constexpr int M = 2, P = kPoints<M>, kProducts = P * P, kTaps = kTapsAcross * kTapsAcross;
constexpr int64_t VL = kLanes<float>;
constexpr int64_t kHotWeightBytes = 640 << 10;  // transformed weights that stay in L2 beside a block
constexpr int64_t kHotInputBytes = 256 << 10;   // transformed inputs of a block beside them
constexpr int64_t kInputBytes = 7 << 19;        // and where the weights pass by only once
constexpr int64_t kMostTiles = 4 * kDotRows;    // whose products wait for the output transform
constexpr int64_t kMacsWorthThreads = 1 << 18;  // below, one thread
constexpr int64_t kLine = 64;
constexpr int kFetched = 6;  // lines of weights asked for beside a vector of a tile
constexpr const char* kNoMemory = "out of memory";

// An odd number of cache lines: arrays that are walked side by side don't share a set of L1.
CNNFAST_INLINE int64_t odd_lines(int64_t halves) { return (ceil_div(halves, kHalves) | 1) * kHalves; }

struct Plan {
  int64_t tiles_h, tiles_w, tiles;  // of an image; of the batch
  int64_t vecs, panels, pairs;      // of a group's output channels; of its input channels
  int64_t v_pitch, u_product;       // bf16 of a tile in V, of a product in U
  int threads_k, threads_t;

  Plan(const Conv2dView& v, int threads) {
    tiles_h = ceil_div(v.P, M), tiles_w = ceil_div(v.Q, M), tiles = v.N * tiles_h * tiles_w;
    vecs = ceil_div(v.K, VL), panels = ceil_div(vecs, kDotVecs), pairs = ceil_div(v.C, 2);
    v_pitch = odd_lines(2 * pairs), u_product = odd_lines(pairs * kDotVecs * 2 * VL);
    // The split over threads, in cycles of a thread: products, and transforms that are done by more than one.
    double best = -1;
    threads_k = threads_t = 1;
    for (int tk = 1; tk <= threads; ++tk) {
      if (threads % tk) continue;
      const double k = static_cast<double>(ceil_div(panels, tk) * kDotVecs),
                   t = static_cast<double>(ceil_div(tiles, threads / tk)), c = static_cast<double>(v.C);
      const double cost = kProducts * k * t * c / 2 + (t * c / VL + k * t) * 80 + k * c * 50;
      if (best < 0 || cost < best) best = cost, threads_k = tk, threads_t = threads / tk;
    }
  }
  int64_t panel_vecs(int64_t panel) const { return min(kDotVecs, vecs - panel * kDotVecs); }
  // bf16 of the plain weights of a vector, and of all.
  int64_t vec_elements() const { return kTaps * pairs * 2 * VL; }
  int64_t elements(const Conv2dView& v) const { return v.G * vecs * vec_elements(); }
};

PanelShape panel_shape(const Conv2dView& v, const Plan& plan, int64_t panel) {
  return {min(kDotVecs * VL, v.K - panel * kDotVecs * VL),
          plan.panel_vecs(panel),
          v.C,
          kTapsAcross,
          kTapsAcross,
          v.w_k,
          v.w_c,
          v.w_r,
          v.w_s};
}
void pack_plain(const Conv2dView& v, const Plan& plan, const BFloat16* w, int64_t group, int64_t panel, BFloat16* out,
                float* room) {
  pack_pairs(out, w + group * v.w_g + panel * kDotVecs * VL * v.w_k, panel_shape(v, plan, panel), Pairing::kTaps, room);
}

struct Operands {
  const BFloat16 *x, *w, *bias;
  BFloat16* y;
  const BFloat16* packed;
};

// What one thread works with.
class Worker {
 public:
  Worker(const Conv2dView& v, const Plan& plan, const Operands& o, const Epilogue<BFloat16>* epilogue)
      : v_(v), plan_(plan), o_(o), epilogue_(epilogue) {}

  // False: out of memory.
  bool run(int64_t task) {
    const int64_t tk = task / plan_.threads_t, tt = task % plan_.threads_t, size = sizeof(BFloat16);
    first_panel_ = plan_.panels * tk / plan_.threads_k, last_panel_ = plan_.panels * (tk + 1) / plan_.threads_k;
    const int64_t first = plan_.tiles * tt / plan_.threads_t, last = plan_.tiles * (tt + 1) / plan_.threads_t;
    if (first_panel_ == last_panel_ || first == last) return true;
    const int64_t panels = last_panel_ - first_panel_, u = kProducts * plan_.u_product;
    const int64_t plain = min(kDotVecs, plan_.vecs) * plan_.vec_elements();
    // Either all weights stay transformed while blocks pass by, or a block is large and they pass by it.
    const bool hot = panels * u * size <= kHotWeightBytes;
    block_ = max(1, (hot ? kHotInputBytes : kInputBytes) / (kProducts * plan_.v_pitch * size));
    block_ = min(last - first, hot ? max(block_, kDotRows) : block_);
    block_ = ceil_div(last - first, ceil_div(last - first, block_));
    keep_ = hot && block_ < last - first;
    v_product_ = odd_lines(block_ * plan_.v_pitch);
    const auto carve = [&](Carver carver) {
      zeros_ = carver.take<BFloat16>(v_.C + VL);
      room_ = carver.take<float>(o_.packed ? 0 : slice_elements(panel_shape(v_, plan_, 0), Pairing::kTaps));
      plain_ = carver.take<BFloat16>(o_.packed ? 0 : (keep_ ? panels : 1) * plain);
      weights_ = carver.take<BFloat16>((keep_ ? panels : 1) * u);
      inputs_ = carver.take<BFloat16>(kProducts * v_product_);
      products_ = carver.take<float>(kProducts * m_product());
      return carver.used();
    };
    void* scratch = thread_scratch(carve(Carver(nullptr)));
    if (!scratch) return false;
    carve(Carver(scratch));
    memset(zeros_, 0, static_cast<size_t>(v_.C) * sizeof(BFloat16));
    for (group_ = 0; group_ < v_.G; ++group_)
      for (int64_t tile = first; tile < last; tile += block_) {
        const int64_t count = min(block_, last - tile);
        fetch_ = fetch_end_ = reinterpret_cast<const char*>(o_.packed);
        if (o_.packed && tile == first) fetch_weights(first_panel_);
        load_tiles(tile, count);
        for (int64_t panel = first_panel_; panel < last_panel_; ++panel) {
          const int64_t slot = keep_ ? panel - first_panel_ : 0;
          const BFloat16* w = o_.packed ? packed(panel) : plain_ + slot * plain;
          BFloat16* u_panel = weights_ + slot * u;
          if (tile == first || !keep_) {
            if (!o_.packed) pack_plain(v_, plan_, o_.w, group_, panel, plain_ + slot * plain, room_);
            transform(u_panel, w, plan_.panel_vecs(panel));
          }
          // The next panel's weights, where they aren't transformed yet, come from far while this one is at work.
          fetch_ = fetch_end_ = reinterpret_cast<const char*>(w);
          if (o_.packed && panel + 1 < last_panel_ && (tile == first || !keep_)) fetch_weights(panel + 1);
          for (int64_t i = 0; i < count; i += kMostTiles)
            run_tiles(tile + i, i, min(kMostTiles, count - i), panel, u_panel, w);
        }
      }
    return true;
  }

 private:
  struct Place {
    int64_t n, p, q;  // the first pixel of a tile
  };
  Place place(int64_t tile) const {
    const int64_t row = tile / plan_.tiles_w;
    return {row / plan_.tiles_h, row % plan_.tiles_h * M, tile % plan_.tiles_w * M};
  }
  const BFloat16* packed(int64_t panel) const {
    return o_.packed + (group_ * plan_.vecs + panel * kDotVecs) * plan_.vec_elements();
  }
  void fetch_weights(int64_t panel) {
    fetch_ = reinterpret_cast<const char*>(packed(panel));
    fetch_end_ = reinterpret_cast<const char*>(packed(panel) + plan_.panel_vecs(panel) * plan_.vec_elements());
  }
  static int64_t m_product() { return (kMostTiles * kDotVecs + 1) * VL; }

  // U of a panel from its plain weights, two channels at a time.
  void transform(BFloat16* u, const BFloat16* w, int64_t vecs) const {
    const int64_t width = vecs * 2 * VL, row = plan_.pairs * width;
    for (int64_t i = 0; i < row; i += 2 * VL) {
      Vec<float> first[kTaps], second[kTaps], t[2][kProducts];
#pragma GCC unroll 9
      for (int tap = 0; tap < kTaps; ++tap) {
        const BitsVec pairs = load_halves(w + tap * row + i);
        first[tap] = first_of(pairs), second[tap] = second_of(pairs);
      }
      const auto both = [&](const Vec<float>* taps, Vec<float>* out) __attribute__((always_inline)) {
        transform_both<float, kTapsAcross, P>(
            [&](int r, int s) __attribute__((always_inline)) { return taps[r * kTapsAcross + s]; },
            transform_weights<float, M>,
            [&](int a, int b, Vec<float> value) __attribute__((always_inline)) { out[a * P + b] = value; });
      };
      both(first, t[0]);
      both(second, t[1]);
#pragma GCC unroll 16
      for (int f = 0; f < kProducts; ++f) store_halves(u + f * plan_.u_product + i, narrow_pairs(t[0][f], t[1][f]));
    }
  }

  // V of tiles [tile, tile + count), row by row of tiles.
  void load_tiles(int64_t tile, int64_t count) {
    for (int64_t i = 0; i < count;) {
      const Place at = place(tile + i);
      const int64_t tiles = min(count - i, plan_.tiles_w - at.q / M);
      for (int64_t c = 0; c < v_.C; c += VL) {
        if (v_.C - c >= VL)
          load_row<true>(at, tiles, c, inputs_ + i * plan_.v_pitch + c);
        else
          load_row<false>(at, tiles, c, inputs_ + i * plan_.v_pitch + c);
      }
      i += tiles;
    }
  }

  // A vector of channels of neighbouring tiles: B' is applied to columns once, and those of two tiles are shared.
  template <bool kWhole>
  void load_row(const Place& at, int64_t tiles, int64_t c, BFloat16* v) {
    const BFloat16* rows[P];
    int64_t inside[P];  // 0: the row is padding
    for (int a = 0; a < P; ++a) {
      const int64_t h = at.p - v_.pad_h + a;
      inside[a] = h >= 0 && h < v_.H;
      rows[a] = inside[a] ? o_.x + at.n * v_.x_n + h * v_.x_h + group_ * v_.C + c : zeros_;
    }
    const auto column = [&](int64_t w, Vec<float>* out) __attribute__((always_inline)) {
      Vec<float> d[P];
      const bool within = w >= 0 && w < v_.W;
#pragma GCC unroll 4
      for (int a = 0; a < P; ++a) {
        const BFloat16* pixel = within ? rows[a] + w * v_.x_w * inside[a] : zeros_;
        d[a] = kWhole ? load_wide(pixel) : load_wide(pixel, v_.C - c);
      }
      transform_input<float, M>(d, out);
    };
    Vec<float> columns[P][P];  // of a tile, each transformed
    int64_t w = at.q - v_.pad_w;
    column(w, columns[0]);
    column(w + 1, columns[1]);
    for (int64_t i = 0; i < tiles; ++i, v += plan_.v_pitch, w += M) {
      for (int i = 0; i < kFetched && fetch_ < fetch_end_; ++i, fetch_ += kLine) __builtin_prefetch(fetch_, 0, 2);
      if (c % kHalves == 0)
#pragma GCC unroll 4
        for (int a = 0; a < P; ++a) {
          __builtin_prefetch(rows[a] + (w + 6) * v_.x_w * inside[a]);
          __builtin_prefetch(rows[a] + (w + 7) * v_.x_w * inside[a]);
        }
      column(w + 2, columns[2]);
      column(w + 3, columns[3]);
#pragma GCC unroll 4
      for (int a = 0; a < P; ++a) {
        const Vec<float> row[P] = {columns[0][a], columns[1][a], columns[2][a], columns[3][a]};
        Vec<float> t[P];
        transform_input<float, M>(row, t);
#pragma GCC unroll 4
        for (int b = 0; b < P; ++b) {
          const HalfVec h = narrow_flushing(t[b]);
          memcpy(v + (a * P + b) * v_product_, &h, sizeof h);
        }
      }
#pragma GCC unroll 4
      for (int a = 0; a < P; ++a) columns[0][a] = columns[2][a], columns[1][a] = columns[3][a];
    }
  }

  // A panel's results of `count` tiles, whose inputs begin with the block's tile `index`.
  void run_tiles(int64_t tile, int64_t index, int64_t count, int64_t panel, const BFloat16* u, const BFloat16* plain) {
    const int64_t vecs = plan_.panel_vecs(panel), width = vecs * VL, groups = ceil_div(count, kDotRows), tap = 0;
    const Vec<float> none[kDotVecs] = {};
    DotTileArgs args{};
    args.a_row = plan_.v_pitch * static_cast<int64_t>(sizeof(BFloat16));
    args.taps = &tap, args.ntaps = 1, args.run = plan_.pairs;
    args.bias = reinterpret_cast<const float*>(none);
    for (int f = 0; f < kProducts; ++f) {
      args.b = u + f * plan_.u_product;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t i = count * g / groups, rows = count * (g + 1) / groups - i;
        args.a = reinterpret_cast<const char*>(inputs_ + f * v_product_ + (index + i) * plan_.v_pitch);
        args.sums = products_ + f * m_product() + i * width;
        args.next[0] = {fetch_, fetch_ < fetch_end_ ? kLine : 0};
        args.next[1] = {fetch_, 0};
        dot_tile_function(rows, vecs)(args);
        fetch_ += args.next[0].step * plan_.pairs;
      }
    }
    for (int64_t j = 0; j < vecs; ++j) {
      const int64_t k = panel * kDotVecs * VL + j * VL, lanes = min(VL, v_.K - k), channel = group_ * v_.K + k;
      const Vec<float> bias = o_.bias ? load_wide(o_.bias + channel, lanes) : Vec<float>{};
      Epilogue<BFloat16>::Factors factors{broadcast(1.f), Vec<float>{}};
      if (epilogue_) factors = epilogue_->factors(channel, lanes);
      const bool simple = lanes == VL && (!epilogue_ || epilogue_->act <= Activation::kRelu);
      for (int64_t i = 0; i < count; ++i) {
        const Place at = place(tile + i);
        const float* m = products_ + (i * vecs + j) * VL;
        bool finite;
        if (simple && at.p + M <= v_.P && at.q + M <= v_.Q)
          finite = finish_whole(at, m, channel, bias, factors);
        else
          finite = finish_any(at, m, channel, lanes, bias, factors);
        if (!finite) redo_tile(at, channel, lanes, bias, factors, plain + j * 2 * VL, vecs * 2 * VL);
      }
    }
  }

  static CNNFAST_INLINE void inverse(const float* m, Vec<float> bias, Vec<float> (&values)[M][M]) {
    transform_both<float, P, M>(
        [&](int a, int b) __attribute__((always_inline)) { return load(m + (a * P + b) * m_product()); },
        transform_output<float, M>,
        [&](int i, int q, Vec<float> t) __attribute__((always_inline)) { values[i][q] = t + bias; });
  }

  // Products to pixels that all lie in y, activation none or ReLU. False: some sum isn't finite.
  CNNFAST_INLINE bool finish_whole(const Place& at, const float* m, int64_t channel, Vec<float> bias,
                                   const Epilogue<BFloat16>::Factors& f) const {
    Vec<float> values[M][M], check{};  // stays zero as long as everything is finite
    const Vec<float> zero{};
    inverse(m, bias, values);
    const BFloat16* r = epilogue_ ? epilogue_->residual_at(at.n, at.p, at.q) : nullptr;
    const bool relu = epilogue_ && epilogue_->act == Activation::kRelu;
    BFloat16* y = o_.y + at.n * v_.y_n + at.p * v_.y_h + at.q * v_.y_w + channel;
#pragma GCC unroll 2
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < M; ++j) {
        check += values[i][j] * 0.f;
        Vec<float> value = values[i][j] * f.scale + f.shift;
        if (r) value += load_wide(r + i * epilogue_->r_h + j * epilogue_->r_w + channel);
        if (relu) value = zero > value ? zero : value;
        const HalfVec h = narrow_flushing(value);
        memcpy(y + i * v_.y_h + j * v_.y_w, &h, sizeof h);
      }
    return all_zero(check);
  }

  __attribute__((noinline)) bool finish_any(const Place& at, const float* m, int64_t channel, int64_t lanes,
                                            Vec<float> bias, const Epilogue<BFloat16>::Factors& f) const {
    Vec<float> values[M][M], check{};
    inverse(m, bias, values);
    for (int64_t i = 0; i < min(M, v_.P - at.p); ++i)
      for (int64_t j = 0; j < min(M, v_.Q - at.q); ++j) {
        check += values[i][j] * 0.f;
        store_pixel({at.n, at.p + i, at.q + j}, values[i][j], channel, lanes, f);
      }
    return all_zero(check);
  }

  void store_pixel(const Place& at, Vec<float> sum, int64_t channel, int64_t lanes,
                   const Epilogue<BFloat16>::Factors& f) const {
    BFloat16* y = o_.y + at.n * v_.y_n + at.p * v_.y_h + at.q * v_.y_w + channel;
    if (epilogue_) {
      const BFloat16* r = epilogue_->residual_at(at.n, at.p, at.q);
      epilogue_->store(y, sum, f, r ? r + channel : nullptr, lanes, false);
    } else {
      store_narrow(y, sum, lanes);
    }
  }

  // A tile's pixels from the plain weights `w`, pairs of them `pair` elements apart.
  __attribute__((noinline)) void redo_tile(const Place& at, int64_t channel, int64_t lanes, Vec<float> bias,
                                           const Epilogue<BFloat16>::Factors& f, const BFloat16* w,
                                           int64_t pair) const {
    for (int64_t p = at.p; p < min(at.p + M, v_.P); ++p)
      for (int64_t q = at.q; q < min(at.q + M, v_.Q); ++q) {
        Vec<float> sum = bias;
        for (int64_t tap = 0; tap < kTaps; ++tap) {
          const int64_t h = p - v_.pad_h + tap / kTapsAcross, x_w = q - v_.pad_w + tap % kTapsAcross;
          if (h < 0 || h >= v_.H || x_w < 0 || x_w >= v_.W) continue;
          const BFloat16* x = o_.x + at.n * v_.x_n + h * v_.x_h + x_w * v_.x_w + group_ * v_.C;
          for (int64_t c = 0; c < v_.C; ++c) {
            const BitsVec pairs = load_halves(w + (tap * plan_.pairs + c / 2) * pair);
            sum += widen_one(x[c]) * (c % 2 ? second_of(pairs) : first_of(pairs));
          }
        }
        store_pixel({at.n, p, q}, sum, channel, lanes, f);
      }
  }

  const Conv2dView& v_;
  const Plan& plan_;
  const Operands& o_;
  const Epilogue<BFloat16>* epilogue_;
  int64_t group_ = 0, first_panel_ = 0, last_panel_ = 0, block_ = 0, v_product_ = 0;
  bool keep_ = false;
  const char *fetch_ = nullptr, *fetch_end_ = nullptr;
  BFloat16 *zeros_ = nullptr, *plain_ = nullptr, *weights_ = nullptr, *inputs_ = nullptr;
  float *room_ = nullptr, *products_ = nullptr;
};

const char* run_view(const Conv2dView& v, const Operands& o, int threads, const Epilogue<BFloat16>* epilogue) {
  if (v.N * v.P * v.Q * v.K * v.G == 0) return nullptr;
  if (v.N * v.P * v.Q * v.K * v.C * v.G * kTaps < kMacsWorthThreads) threads = 1;
  const Plan plan(v, threads);
  bool no_memory = false;
  parallel_for(
      threads, threads,
      [&](int64_t task) {
        Worker worker(v, plan, o, epilogue);
        if (!worker.run(task)) __atomic_store_n(&no_memory, true, __ATOMIC_RELAXED);
      },
      kDenormals<BFloat16>);
  return no_memory ? kNoMemory : nullptr;
}

template <class T>
T* operand(const Launch& l, int i) {
  return static_cast<T*>(l.operands[i]);
}

const char* launch_fprop(const void* params, const Launch& l) {
  const Conv2dParams& p = *static_cast<const Conv2dParams*>(params);
  const Epilogue<BFloat16> epilogue(p, l);
  return run_view(fprop_view(p),
                  {operand<const BFloat16>(l, 0), operand<const BFloat16>(l, 1), operand<const BFloat16>(l, 2),
                   operand<BFloat16>(l, 3), operand<const BFloat16>(l, kPackedOperand)},
                  l.threads, epilogue.or_null());
}

// Calls fn(group, panel, its offset in the packed form, room) for every panel of fprop. Null, or what went wrong.
template <class F>
const char* for_each_panel(const Conv2dView& v, const Plan& plan, int threads, const F& fn) {
  bool no_memory = false;
  const size_t room = static_cast<size_t>(slice_elements(panel_shape(v, plan, 0), Pairing::kTaps)) * sizeof(float);
  parallel_for(threads, v.G * plan.panels, [&](int64_t task) {
    const int64_t group = task / plan.panels, panel = task % plan.panels;
    if (float* memory = static_cast<float*>(thread_scratch(room)))
      fn(group, panel, (group * plan.vecs + panel * kDotVecs) * plan.vec_elements(), memory);
    else
      __atomic_store_n(&no_memory, true, __ATOMIC_RELAXED);
  });
  return no_memory ? kNoMemory : nullptr;
}

const char* launch_pack(const void* params, const Launch& l) {
  const Conv2dView v = fprop_view(*static_cast<const Conv2dParams*>(params));
  const Plan plan(v, 1);
  return for_each_panel(v, plan, l.threads, [&](int64_t group, int64_t panel, int64_t offset, float* room) {
    pack_plain(v, plan, operand<const BFloat16>(l, 1), group, panel, static_cast<BFloat16*>(l.workspace) + offset,
               room);
  });
}

const char* launch_unpack(const void* params, const Launch& l) {
  const Conv2dView v = fprop_view(*static_cast<const Conv2dParams*>(params));
  const Plan plan(v, 1);
  return for_each_panel(v, plan, l.threads, [&](int64_t group, int64_t panel, int64_t offset, float* room) {
    unpack_pairs(operand<BFloat16>(l, 1) + group * v.w_g + panel * kDotVecs * VL * v.w_k,
                 operand<const BFloat16>(l, kPackedOperand) + offset, panel_shape(v, plan, panel), Pairing::kTaps,
                 room);
  });
}

int64_t packed_bytes(const void* params) {
  const Conv2dView v = fprop_view(*static_cast<const Conv2dParams*>(params));
  return Plan(v, 1).elements(v) * static_cast<int64_t>(sizeof(BFloat16));
}

const char* launch_dgrad(const void* params, const Launch& l) {
  const char* error = nullptr;
  // with stride 1 there is one residue class
  for_each_dgrad_view(*static_cast<const Conv2dParams*>(params),
                      [&](const Conv2dView& v, int64_t w_offset, int64_t dx_offset) {
                        error = run_view(v,
                                         {operand<const BFloat16>(l, 3), operand<const BFloat16>(l, 1) + w_offset,
                                          nullptr, operand<BFloat16>(l, 0) + dx_offset, nullptr},
                                         l.threads, nullptr);
                      });
  return error;
}

}  // namespace

CNNFAST_KERNEL("conv2d_winograd_f2x2.fprop.bf16", Conv2dParams, launch_fprop, nullptr)
CNNFAST_KERNEL("conv2d_winograd_f2x2.fprop.bf16.pack", Conv2dParams, launch_pack, packed_bytes)
CNNFAST_KERNEL("conv2d_winograd_f2x2.fprop.bf16.unpack", Conv2dParams, launch_unpack, nullptr)
CNNFAST_KERNEL("conv2d_winograd_f2x2.dgrad.bf16", Conv2dParams, launch_dgrad, nullptr)

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
