// How the implicit GEMM of one view on pairs of bf16 is cut up: where its pixels come from, the blocks, and the split
// over the threads. Decided from the sizes alone, by every thread for itself.
#pragma once
#include "../conv2d_view.h"
#include "dot_pack.h"
#include "dot_tile.h"

namespace cnnfast {
namespace CNNFAST_ISA {

constexpr int64_t kPixelBytes = 400 << 10;    // pixels of a block, in L2 beside a panel
constexpr int64_t kPanelBytes = 2300 << 10;   // packed panels kept for several blocks
constexpr int64_t kHotBytes = 384 << 10;      // panels that stay in L2 beside everything else
constexpr int64_t kFoldChannels = 16;         // fewer channels: a filter row becomes one run
constexpr int64_t kHotPixels = 8 * kDotRows;  // pixels that pass through all hot panels in one go

enum class Source { kDirect, kStrip, kRows };

struct DotPlan {
  Source source;
  bool flat;               // a unit of work is a pixel of the whole batch, not a row
  int64_t step_h, step_w;  // strip row i is input row i * step_h - pad_h
  int64_t taps, run;       // runs of the reduction, and pairs of each
  int64_t columns;         // output columns at a time (rows only)
  int64_t units;           // rows or pixels in all
  int64_t block;           // rows or pixels at a time
  int64_t vecs, panels;    // vectors of output channels of a group; panels of all groups
  int threads_k, threads_u;

  Pairing pairing() const { return source == Source::kRows ? Pairing::kRows : Pairing::kTaps; }
  // Elements from pixel to pixel of a strip, an odd number of lines; from row to row of one whose pixels touch.
  int64_t pitch(const Conv2dView& v) const {
    return source == Source::kRows ? v.C : (ceil_div(v.C, kHalves) | 1) * kHalves;
  }
  int64_t row_pitch(const Conv2dView& v) const {
    const int64_t elements = strip_columns(v, columns) * pitch(v);
    return source == Source::kRows ? round_up(elements, kHalves) + 2 * kHalves : elements;
  }
  // Elements from window to window, whose rows have whole pairs.
  int64_t window() const { return (ceil_div(2 * taps * run, kHalves) | 1) * kHalves + 2 * kHalves; }
  int64_t strip_columns(const Conv2dView& v, int64_t count) const {
    return ((count - 1) * v.stride_w + (v.S - 1) * v.dilation_w) / step_w + 1;
  }
  int64_t strip_rows(const Conv2dView& v, int64_t rows) const {
    return ((rows - 1) * v.stride_h + (v.R - 1) * v.dilation_h) / step_h + 1;
  }
  int64_t copied_elements(const Conv2dView& v, int64_t count) const {  // for so many units
    if (source == Source::kDirect) return 0;
    return flat ? count * pitch(v) : strip_rows(v, count) * row_pitch(v);
  }
};

// `packed`: the weights are packed already.
inline DotPlan make_dot_plan(const Conv2dView& v, int threads, bool packed) {
  constexpr int64_t VL = kLanes<float>, size = sizeof(BFloat16);
  DotPlan plan{};
  const int64_t taps = v.R * v.S, reduction = taps * v.C;
  const bool one_tap = taps == 1 && v.stride_h == 1 && v.stride_w == 1 && v.pad_h == 0 && v.pad_w == 0;
  const bool flat_x = one_tap && v.P == v.H && v.Q == v.W && v.x_h == v.W * v.x_w && (v.N == 1 || v.x_n == v.H * v.x_h);
  plan.step_h = needed_step(v.P, v.R, v.stride_h, v.dilation_h);
  plan.step_w = needed_step(v.Q, v.S, v.stride_w, v.dilation_w);
  plan.vecs = ceil_div(v.K, VL);
  plan.panels = v.G * ceil_div(plan.vecs, kDotVecs);
  // A pixel's last pair must be its own, and pixels a multiple of 2 KiB apart share a few sets of L1.
  const bool in_place = taps == 1 && v.C % 2 == 0 && !reaches_padding(v) &&
                        (v.stride_w * v.x_w * size % 2048 || v.K <= kDotVecs * VL || v.Q * v.P == 1);
  if (reduction == 0 || in_place)
    plan.source = Source::kDirect, plan.flat = flat_x;
  else if (taps > 1 && v.C < kFoldChannels)
    plan.source = Source::kRows;
  else
    plan.source = Source::kStrip, plan.flat = flat_x;
  const bool rows = plan.source == Source::kRows;
  plan.taps = reduction == 0 ? 1 : rows ? v.R : taps;
  plan.run = reduction == 0 ? 0 : ceil_div(rows ? v.S * v.C : v.C, 2);

  plan.columns = v.Q;
  while (!plan.flat && plan.columns > kDotRows && plan.copied_elements(v, 1) * size > kPixelBytes)
    plan.columns = ceil_div(plan.columns, 2);

  // The split over threads, in cycles: dot products, packing or reading weights, copying pixels.
  plan.units = plan.flat ? v.N * v.P * v.Q : v.N * v.P;
  const double pixels_of_unit = static_cast<double>(plan.flat ? 1 : v.Q),
               steps = static_cast<double>(plan.taps * plan.run);
  double best = -1;
  for (int tk = 1; tk <= threads; ++tk) {
    if (threads % tk) continue;
    const int64_t tu = threads / tk;
    const double panels = static_cast<double>(ceil_div(plan.panels, tk)),
                 vecs = plan.vecs == 1 ? panels : panels * kDotVecs,
                 pixels = static_cast<double>(ceil_div(plan.units, tu)) * pixels_of_unit;
    const double weights = vecs * steps * (packed ? 4 : 40);
    const double read = static_cast<double>(v.C * (v.stride_h / plan.step_h) * (v.stride_w / plan.step_w));
    const double groups = static_cast<double>(max(1, ceil_div(v.G, tk)));
    const double copied = groups * pixels * read / (plan.source == Source::kDirect ? 32 : 12);
    const double cost = vecs * steps * pixels + weights + copied;
    if (best < 0 || cost < best) best = cost, plan.threads_k = tk, plan.threads_u = static_cast<int>(tu);
  }

  plan.block = ceil_div(plan.units, plan.threads_u);
  if (!plan.flat) plan.block = min(plan.block, v.P);
  if (plan.source == Source::kDirect) {
    const int64_t unit_bytes = (plan.flat ? 1 : v.Q) * v.stride_h * v.stride_w * v.C * size;
    plan.block = max(1, min(plan.block, kPixelBytes / max(1, unit_bytes)));
  } else {
    while (plan.block > 1 && plan.copied_elements(v, plan.block) * size > kPixelBytes)
      plan.block = ceil_div(plan.block, 2);
  }
  if (plan.flat && plan.source == Source::kDirect) plan.block = max(plan.block, min(kHotPixels, plan.units));
  return plan;
}

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
