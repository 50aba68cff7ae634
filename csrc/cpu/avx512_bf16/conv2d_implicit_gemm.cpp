// Implicit GEMM on pairs of bf16 (vdpbf16ps), fprop and dgrad: rows are output pixels, columns output channels, the
// reduction runs over taps and pairs of input channels.
//
//   y[pixel, k] = b[k] + sum_{r,s} sum_{pairs of c} dot(x[pixel moved by tap (r,s), c:c+2], w[k,c:c+2,r,s])
//
// dgrad is fprop of the gradient, one stride-1 convolution for each residue class (conv2d_view.h); groups are taken one
// by one. The register tile (dot_tile.h) computes up to 14 pixels x 2 vectors of channels. Its pixels lie at one
// distance (conv2d_implicit_gemm_plan.h):
//
//   kDirect   x itself: 1x1 without padding; a map in one piece counts as one row
//   kStrip    rows of x copied with their zero borders: no borders in the tile, no L1 set conflicts, odd C padded
//   kRows     fewer than 16 channels (stems): a strip whose pixels touch, so that the taps of a filter row are one run
//   of
//             S*C elements; where such a run isn't whole pairs and its neighbour isn't finite, or where taps don't
//             touch, the windows of a row of pixels are copied from the strip
//
// Weights are packed in pairs [tap][pair][vectors][2] inside the call, panel by panel, or all of them beforehand for a
// plan (the pack entry). A thread owns a range of panels times a range of rows or pixels, chosen by the estimated cost,
// and walks them in blocks whose pixels stay in L2; the next panel's weights are fetched while one is at work.
//
// fprop with more operands is conv_bn_act: a tile's sums go through scale, shift, residual and ReLU in registers, where
// anything else is needed through epilogue.h. Sums are in float, in one order whatever the thread count, rounded once
// to bf16. vdpbf16ps takes denormals for 0. Padding contributes nothing: zeros stand for it while the weights are
// finite, and a call that meets an Inf or a NaN among its weights is done again by the direct kernel.
//
// After Georganas et al., Anatomy of High-Performance Deep Learning Convolutions on SIMD Architectures (2018).
#include "../../common/kernel_table.h"
#include "../primitives/parallel.h"
#include "../primitives/scratch.h"
#include "conv2d_implicit_gemm_plan.h"
#include "direct.h"
#include "dot_pack.h"
#include "dot_results.h"

namespace cnnfast {
namespace CNNFAST_ISA {
namespace {

constexpr int64_t VL = kLanes<float>;
constexpr int64_t kMacsWorthThreads = 1 << 18;  // below, one thread
constexpr int64_t kLine = 64;
constexpr const char* kNoMemory = "out of memory";

struct Operands {
  const BFloat16 *x, *w, *bias;
  BFloat16* y;
  const BFloat16* packed;
};

struct Panel {
  int64_t group, k, vecs;  // k: first channel within the group
};

// The panels of a view, and how they are packed.
class Panels {
 public:
  Panels(const Conv2dView& v, const DotPlan& plan) : v_(v), plan_(plan) {}

  Panel at(int64_t panel) const {
    const int64_t of_group = ceil_div(plan_.vecs, kDotVecs), vec = panel % of_group * kDotVecs;
    return {panel / of_group, vec * VL, min(kDotVecs, plan_.vecs - vec)};
  }
  int64_t vec_elements() const { return plan_.taps * plan_.run * 2 * VL; }
  int64_t elements() const { return v_.G * plan_.vecs * vec_elements(); }
  int64_t offset(const Panel& panel) const { return (panel.group * plan_.vecs + panel.k / VL) * vec_elements(); }
  int64_t room() const { return slice_elements(shape({0, 0, min(kDotVecs, plan_.vecs)}), plan_.pairing()); }

  // False: a weight isn't finite.
  bool pack(const Panel& panel, const BFloat16* w, BFloat16* out, float* room) const {
    return plan_.run == 0 || pack_pairs(out, w + weights_at(panel), shape(panel), plan_.pairing(), room);
  }
  void unpack(const Panel& panel, const BFloat16* in, BFloat16* w, float* room) const {
    if (plan_.run) unpack_pairs(w + weights_at(panel), in, shape(panel), plan_.pairing(), room);
  }

 private:
  int64_t weights_at(const Panel& panel) const { return panel.group * v_.w_g + panel.k * v_.w_k; }
  PanelShape shape(const Panel& panel) const {
    return {min(panel.vecs * VL, v_.K - panel.k), panel.vecs, v_.C, v_.R, v_.S, v_.w_k, v_.w_c, v_.w_r, v_.w_s};
  }

  const Conv2dView& v_;
  const DotPlan& plan_;
};

// What one thread works with.
class Worker {
 public:
  Worker(const Conv2dView& v, const DotPlan& plan, const Operands& o, const Epilogue<BFloat16>* epilogue)
      : v_(v), plan_(plan), panels_(v, plan), o_(o), results_(v, o.bias, o.y, epilogue) {}

  // False: out of memory. `finite()` tells whether the weights were.
  bool run(int64_t task) {
    const int64_t tk = task / plan_.threads_u, tu = task % plan_.threads_u;
    first_panel_ = plan_.panels * tk / plan_.threads_k, last_panel_ = plan_.panels * (tk + 1) / plan_.threads_k;
    first_unit_ = plan_.units * tu / plan_.threads_u, last_unit_ = plan_.units * (tu + 1) / plan_.threads_u;
    if (first_panel_ == last_panel_ || first_unit_ == last_unit_) return true;
    const int64_t panel = min(kDotVecs, plan_.vecs) * panels_.vec_elements(), size = sizeof(BFloat16);
    const int64_t panels = last_panel_ - first_panel_;
    const bool one_block = last_unit_ - first_unit_ <= plan_.block && plan_.columns == v_.Q && v_.N == 1;
    hot_ = panels * panel * size <= kHotBytes;
    kept_ = o_.packed ? panels : one_block && !hot_ ? 1 : max(1, min(panels, kPanelBytes / max(1, panel * size)));
    const auto carve = [&](Carver carver) {
      taps_ = carver.take<int64_t>(plan_.taps);
      window_taps_ = carver.take<int64_t>(plan_.taps);
      room_ = carver.take<float>(o_.packed ? 0 : panels_.room());
      weights_ = carver.take<BFloat16>(o_.packed ? 0 : kept_ * panel);
      results_.set_room(carver.take<float>(DotResults::kSums));
      source_ = carver.take<BFloat16>(plan_.copied_elements(v_, plan_.block) + kHalves);
      windows_ = carver.take<BFloat16>(plan_.source == Source::kRows ? plan_.columns * plan_.window() : 0);
      return carver.used();
    };
    void* scratch = thread_scratch(carve(Carver(nullptr)));
    if (!scratch) return false;
    carve(Carver(scratch));
    set_taps();
    for (int64_t first = first_panel_; first < last_panel_; first += kept_)
      walk(first, min(first + kept_, last_panel_), panel);
    return true;
  }
  bool finite() const { return finite_; }

 private:
  struct Block {
    int64_t n, p, q, rows, columns;  // rows of one image
    int64_t pixel, pixels;           // flat: pixels of the batch
  };

  // Where each run's elements start, seen from a pixel's first.
  void set_taps() {
    const int64_t size = sizeof(BFloat16), pitch = plan_.pitch(v_);
    taps_[0] = window_taps_[0] = 0;
    pixel_step_ = (plan_.flat ? 1 : v_.stride_w / plan_.step_w) * pitch * size;
    const int64_t h = v_.dilation_h / plan_.step_h * plan_.row_pitch(v_), w = v_.dilation_w / plan_.step_w * pitch;
    if (plan_.source == Source::kDirect)
      pixel_step_ = v_.stride_w * v_.x_w * size;
    else if (plan_.source == Source::kRows)
      for (int64_t r = 0; r < v_.R; ++r) taps_[r] = r * h * size, window_taps_[r] = r * 2 * plan_.run * size;
    else
      for (int64_t r = 0; r < v_.R; ++r)
        for (int64_t s = 0; s < v_.S; ++s) taps_[r * v_.S + s] = (r * h + s * w) * size;
  }

  // Panels [first, last) over all blocks.
  void walk(int64_t first, int64_t last, int64_t panel_elements) {
    packed_to_ = first;
    const auto run_group = [&](const Block& block, int64_t begin, int64_t end) {
      run_block(block, begin, end, first, panel_elements);
    };
    // The panels of one group after the other, so that a block of its pixels is copied once.
    const int64_t of_group = ceil_div(plan_.vecs, kDotVecs);
    for (int64_t begin = first; begin < last;) {
      const int64_t end = min(last, (begin / of_group + 1) * of_group);
      if (plan_.flat) {
        for (int64_t u = first_unit_; u < last_unit_; u += plan_.block)
          run_group({0, 0, 0, 0, 0, u, min(plan_.block, last_unit_ - u)}, begin, end);
      } else {
        for (int64_t u = first_unit_; u < last_unit_;) {
          const int64_t n = u / v_.P, p = u % v_.P, rows = min(plan_.block, min(v_.P - p, last_unit_ - u));
          for (int64_t q = 0; q < v_.Q; q += plan_.columns)
            run_group({n, p, q, rows, min(plan_.columns, v_.Q - q), u * v_.Q + q, 0}, begin, end);
          u += rows;
        }
      }
      begin = end;
    }
  }

  void run_block(const Block& block, int64_t begin, int64_t end, int64_t first, int64_t panel_elements) {
    copy_source(block, panels_.at(begin).group);
    // Panels that stay in L2 together all pass over a row before the next one: the row of y is written in one go.
    const int64_t units = plan_.flat ? block.pixels : block.rows;
    const int64_t step = !hot_ ? units : plan_.flat ? kHotPixels : 1;
    for (int64_t unit = 0; unit < units; unit += step)
      for (int64_t i = begin; i < end; ++i) {
        const Panel panel = panels_.at(i);
        const BFloat16* weights = o_.packed + panels_.offset(panel);
        fetch_ = fetch_end_ = reinterpret_cast<const char*>(weights);
        if (!o_.packed) {
          weights = weights_ + (i - first) * panel_elements;
          if (i >= packed_to_) finite_ &= panels_.pack(panel, o_.w, weights_ + (i - first) * panel_elements, room_);
          packed_to_ = max(packed_to_, i + 1);
        } else if (i + 1 < last_panel_ && (!hot_ || unit == 0)) {
          const Panel next = panels_.at(i + 1);
          fetch_ = reinterpret_cast<const char*>(o_.packed + panels_.offset(next));
          fetch_end_ = fetch_ + next.vecs * panels_.vec_elements() * static_cast<int64_t>(sizeof(BFloat16));
        }
        new_pixels_ = i == begin && plan_.source == Source::kDirect && v_.x_w == v_.C && plan_.flat;
        run_panel(block, unit, min(step, units - unit), panel, weights);
      }
  }

  // Copies the pixels a block needs, unless they are there already.
  void copy_source(const Block& block, int64_t group) {
    if (plan_.source == Source::kDirect || (loaded_pixel_ == block.pixel && loaded_group_ == group)) return;
    loaded_pixel_ = block.pixel, loaded_group_ = group;
    const int64_t pitch = plan_.pitch(v_);
    const BFloat16* x = o_.x + group * v_.C;
    if (plan_.flat)
      return copy_row_halves(source_, x, block.pixels, block.pixel, 1, v_.N * v_.H * v_.W, v_.x_w, v_.C, pitch);
    const int64_t used = plan_.strip_columns(v_, block.columns), rows = plan_.strip_rows(v_, block.rows);
    bool finite = true;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t h = block.p * v_.stride_h - v_.pad_h + i * plan_.step_h;
      const bool inside = h >= 0 && h < v_.H;
      BFloat16* out = source_ + i * plan_.row_pitch(v_);
      const BFloat16* in = x + block.n * v_.x_n + (inside ? h : 0) * v_.x_h;
      const int64_t first = block.q * v_.stride_w - v_.pad_w, width = inside ? v_.W : 0;
      if (plan_.source == Source::kRows)
        finite &= copy_row_touching(out, in, used, first, plan_.step_w, width, v_.x_w, v_.C);
      else
        copy_row_halves(out, in, used, first, plan_.step_w, width, v_.x_w, v_.C, pitch);
    }
    runs_ = (finite || v_.S * v_.C % 2 == 0) && (v_.S == 1 || v_.dilation_w == plan_.step_w);
  }

  // The filter windows of a row of pixels that begins at `strip`.
  void copy_windows(const BFloat16* strip, int64_t columns) {
    for (int64_t j = 0; j < columns; ++j, strip += pixel_step_ / static_cast<int64_t>(sizeof(BFloat16)))
      for (int64_t r = 0; r < v_.R; ++r)
        for (int64_t s = 0; s < v_.S; ++s)
          copy_halves(windows_ + j * plan_.window() + r * 2 * plan_.run + s * v_.C,
                      strip + r * (v_.dilation_h / plan_.step_h) * plan_.row_pitch(v_) +
                          s * (v_.dilation_w / plan_.step_w) * v_.C,
                      v_.C);
  }

  // One panel over `count` rows (or pixels, where flat) of a block, from the `first` on.
  void run_panel(const Block& block, int64_t first, int64_t count, const Panel& panel, const BFloat16* weights) {
    results_.set_channels(panel.group * v_.K + panel.k, min(panel.vecs * VL, v_.K - panel.k), panel.vecs);
    const bool direct = plan_.source == Source::kDirect;
    const BFloat16* x = o_.x + panel.group * v_.C;
    if (plan_.flat) {
      const BFloat16* a = direct ? x + (block.pixel + first) * v_.x_w : source_ + first * plan_.pitch(v_);
      return run_pixels(a, pixel_step_, taps_, block.pixel + first, count, panel, weights);
    }
    for (int64_t i = first; i < first + count; ++i) {
      const int64_t p = block.p + i;
      const BFloat16* a;
      if (direct)
        a = x + block.n * v_.x_n + (p * v_.stride_h - v_.pad_h) * v_.x_h + (block.q * v_.stride_w - v_.pad_w) * v_.x_w;
      else
        a = source_ + (block.rows == 1 ? 0 : i * (v_.stride_h / plan_.step_h)) * plan_.row_pitch(v_);
      const int64_t pixel = (block.n * v_.P + p) * v_.Q + block.q;
      if (plan_.source == Source::kRows && !runs_) {
        copy_windows(a, block.columns);
        run_pixels(windows_, plan_.window() * static_cast<int64_t>(sizeof(BFloat16)), window_taps_, pixel,
                   block.columns, panel, weights);
      } else {
        run_pixels(a, pixel_step_, taps_, pixel, block.columns, panel, weights);
      }
    }
  }

  // Tiles over `count` pixels, `step` bytes apart from `a`; the first is output pixel `pixel`.
  void run_pixels(const BFloat16* a, int64_t step, const int64_t* taps, int64_t pixel, int64_t count,
                  const Panel& panel, const BFloat16* weights) {
    DotTileArgs args;
    args.a_row = step;
    args.taps = taps, args.ntaps = plan_.run ? plan_.taps : 0, args.run = plan_.run, args.b = weights;
    for_each_tile(count, [&](int64_t i, int64_t rows) {
      args.a = reinterpret_cast<const char*>(a) + i * step;
      // pixels in one piece, seen for the first time
      args.next[0] = {args.a + rows * step, new_pixels_ && i + rows < count ? kLine : 0};
      args.next[1] = {fetch_, fetch_ < fetch_end_ ? kLine : 0};
      fetch_ += args.next[1].step * args.ntaps * args.run;
      results_.run(dot_tile_function(rows, panel.vecs), args, pixel + i, rows);
    });
  }

  const Conv2dView& v_;
  const DotPlan& plan_;
  const Panels panels_;
  const Operands& o_;
  DotResults results_;
  int64_t first_panel_ = 0, last_panel_ = 0, first_unit_ = 0, last_unit_ = 0, kept_ = 1, packed_to_ = 0;
  int64_t loaded_pixel_ = -1, loaded_group_ = -1, pixel_step_ = 0;  // bytes from output pixel to output pixel
  bool hot_ = false, new_pixels_ = false, runs_ = true, finite_ = true;
  const char *fetch_ = nullptr, *fetch_end_ = nullptr;
  int64_t *taps_ = nullptr, *window_taps_ = nullptr;
  float* room_ = nullptr;
  BFloat16 *weights_ = nullptr, *source_ = nullptr, *windows_ = nullptr;
};

// What became of a call; the threads only ever set these.
struct Outcome {
  bool no_memory = false;
  bool not_finite = false;  // a weight is Inf or NaN, and zeros stood for the padding beside it
};

// The share of one thread in one view.
void run_view(const Conv2dView& v, Operands o, const char* head, int threads, int64_t task, Outcome& outcome,
              const Epilogue<BFloat16>* epilogue) {
  if (v.N * v.P * v.Q * v.K * v.G == 0) return;
  const DotPlan plan = make_dot_plan(v, threads, head != nullptr);
  o.packed = head ? reinterpret_cast<const BFloat16*>(head + kPackedHead) : nullptr;
  Worker worker(v, plan, o, epilogue);
  if (!worker.run(task)) __atomic_store_n(&outcome.no_memory, true, __ATOMIC_RELAXED);
  if (!(head ? *head : worker.finite()) && reaches_padding(v))
    __atomic_store_n(&outcome.not_finite, true, __ATOMIC_RELAXED);
}

int useful_threads(const Conv2dParams& p, int threads) {
  return p.N * p.P * p.Q * p.K * (p.C / p.G) * p.R * p.S < kMacsWorthThreads ? 1 : threads;
}

template <class T>
T* operand(const Launch& l, int i) {
  return static_cast<T*>(l.operands[i]);
}

const char* launch_fprop(const void* params, const Launch& l) {
  const Conv2dParams& p = *static_cast<const Conv2dParams*>(params);
  const Operands o{operand<const BFloat16>(l, 0), operand<const BFloat16>(l, 1), operand<const BFloat16>(l, 2),
                   operand<BFloat16>(l, 3), nullptr};
  const int threads = useful_threads(p, l.threads);
  const Epilogue<BFloat16> epilogue(p, l);
  const char* head = operand<const char>(l, kPackedOperand);
  const Conv2dView v = fprop_view(p);
  Outcome outcome;
  parallel_for(
      threads, threads, [&](int64_t task) { run_view(v, o, head, threads, task, outcome, epilogue.or_null()); },
      kDenormals<BFloat16>);
  if (outcome.no_memory) return kNoMemory;
  return outcome.not_finite ? avx512::direct_fprop_bf16(params, l) : nullptr;
}

// Every panel of fprop, through fn(panels, panel, its place in the packed form, room); the room may be null.
template <class F>
void for_each_panel(const Conv2dView& v, int threads, char* head, const F& fn) {
  const DotPlan plan = make_dot_plan(v, 1, true);
  const Panels panels(v, plan);
  parallel_for(threads, plan.panels, [&](int64_t task) {
    const Panel panel = panels.at(task);
    float* room = static_cast<float*>(thread_scratch(static_cast<size_t>(panels.room()) * sizeof(float)));
    fn(panels, panel, reinterpret_cast<BFloat16*>(head + kPackedHead) + panels.offset(panel), room);
  });
}

const char* launch_pack(const void* params, const Launch& l) {
  char* head = static_cast<char*>(l.workspace);
  *head = true;
  bool no_memory = false;
  for_each_panel(fprop_view(*static_cast<const Conv2dParams*>(params)), l.threads, head,
                 [&](const Panels& panels, const Panel& panel, BFloat16* place, float* room) {
                   if (!room)
                     __atomic_store_n(&no_memory, true, __ATOMIC_RELAXED);
                   else if (!panels.pack(panel, operand<const BFloat16>(l, 1), place, room))
                     __atomic_store_n(head, false, __ATOMIC_RELAXED);
                 });
  return no_memory ? kNoMemory : nullptr;
}

// The weights that the pack entry packed, back to where the second operand is.
const char* launch_unpack(const void* params, const Launch& l) {
  bool no_memory = false;
  for_each_panel(fprop_view(*static_cast<const Conv2dParams*>(params)), l.threads, operand<char>(l, kPackedOperand),
                 [&](const Panels& panels, const Panel& panel, const BFloat16* place, float* room) {
                   if (room)
                     panels.unpack(panel, place, operand<BFloat16>(l, 1), room);
                   else
                     __atomic_store_n(&no_memory, true, __ATOMIC_RELAXED);
                 });
  return no_memory ? kNoMemory : nullptr;
}

int64_t packed_bytes(const void* params) {
  const Conv2dView v = fprop_view(*static_cast<const Conv2dParams*>(params));
  const DotPlan plan = make_dot_plan(v, 1, true);
  return kPackedHead + Panels(v, plan).elements() * static_cast<int64_t>(sizeof(BFloat16));
}

const char* launch_dgrad(const void* params, const Launch& l) {
  const Conv2dParams& p = *static_cast<const Conv2dParams*>(params);
  BFloat16* dx = operand<BFloat16>(l, 0);
  const BFloat16 *w = operand<const BFloat16>(l, 1), *g = operand<const BFloat16>(l, 3);
  const int threads = useful_threads(p, l.threads);
  Outcome outcome;
  // The classes write different pixels: a thread goes through all of them without waiting for the others.
  parallel_for(
      threads, threads,
      [&](int64_t task) {
        for_each_dgrad_view(p, [&](const Conv2dView& v, int64_t w_offset, int64_t dx_offset) {
          run_view(v, {g, w + w_offset, nullptr, dx + dx_offset, nullptr}, nullptr, threads, task, outcome, nullptr);
        });
      },
      kDenormals<BFloat16>);
  if (outcome.no_memory) return kNoMemory;
  return outcome.not_finite ? avx512::direct_dgrad_bf16(params, l) : nullptr;
}

}  // namespace

CNNFAST_KERNEL("conv2d_implicit_gemm.fprop.bf16", Conv2dParams, launch_fprop, nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.fprop.bf16.pack", Conv2dParams, launch_pack, packed_bytes)
CNNFAST_KERNEL("conv2d_implicit_gemm.fprop.bf16.unpack", Conv2dParams, launch_unpack, nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.dgrad.bf16", Conv2dParams, launch_dgrad, nullptr)

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
