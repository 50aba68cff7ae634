// How the implicit GEMM of one view is cut up: where its pixels come from, the blocks, and the split over the threads.
//
// Everything here is decided from the sizes alone, in a few hundred nanoseconds, by every thread for itself.
#pragma once
#include "conv2d_view.h"
#include "gemm_tile.h"

namespace cnnfast {
namespace CNNFAST_ISA {

constexpr int64_t kPixelBytes = 800 << 10;   // copied pixels of a block
constexpr int64_t kPanelBytes = 2300 << 10;  // packed panels kept for several blocks
constexpr int64_t kPad = 16;                 // elements between pixels
constexpr int64_t kFoldChannels = 16;        // fewer channels: taps of a filter row become one run
constexpr int64_t kSetBytes = 4096;          // addresses so far apart share a set of L1 ...
constexpr int64_t kSetWays = 8;              // ... which keeps so many lines
constexpr int64_t kNarrow = 10;              // maps narrower than this are copied as windows
// Windows with longer panels are walked by chunks of channels: this much at a time of so many pixels and their sums.
constexpr int64_t kDeepPanelBytes = 256 << 10;
constexpr int64_t kDeepPixelBytes = 8000 << 10;
constexpr int64_t kDeepPixels = 1024;

enum class Source { kDirect, kStrip, kWindows };

// Everything that is decided before the threads start.
struct Plan {
  Source source;
  bool flat;               // a unit of work is a pixel of the whole batch, not a row
  bool fold;               // taps of a filter row are one run
  int64_t step_h, step_w;  // strip row i is input row i * step_h - pad_h
  bool deep;               // chunks come first: pixels are copied once, and the sums of all output channels wait
  int64_t chunk;           // input channels at a time
  int64_t columns;         // output columns at a time (rows only)
  int64_t units;           // rows or pixels in all
  int64_t block;           // rows or pixels at a time
  int64_t vecs;            // vectors of channels in all, over the groups
  int64_t group_vecs;      // of one group
  int threads_k, threads_u;
};

inline int64_t pixel_pitch(const Plan& plan, const Conv2dView& v, int64_t channels) {
  if (plan.source == Source::kWindows) return round_up(v.R * v.S * channels, kPad) + kPad;
  return plan.fold ? channels : round_up(channels, kPad) + kPad;
}
inline int64_t strip_columns(const Plan& plan, const Conv2dView& v, int64_t columns) {
  return ((columns - 1) * v.stride_w + (v.S - 1) * v.dilation_w) / plan.step_w + 1;
}
inline int64_t strip_rows(const Plan& plan, const Conv2dView& v, int64_t rows) {
  return ((rows - 1) * v.stride_h + (v.R - 1) * v.dilation_h) / plan.step_h + 1;
}
inline int64_t copied_elements(const Plan& plan, const Conv2dView& v, int64_t units, int64_t columns,
                               int64_t channels) {
  if (plan.source == Source::kDirect) return 0;
  if (plan.source == Source::kWindows) return units * pixel_pitch(plan, v, channels);
  return strip_rows(plan, v, units) * strip_columns(plan, v, columns) * pixel_pitch(plan, v, channels);
}

template <class T>
bool direct_fits(const Conv2dView& v) {
  if (reaches_padding(v) || v.R * v.S != 1) return false;
  // Pixels a power of two apart share sets of L1: those of a tile must leave a way of their sets to the panel.
  const int64_t distance = v.stride_w * v.x_w * static_cast<int64_t>(sizeof(T));
  const int64_t rows_in_set = ceil_div(kMostTileRows * min(kSetBytes, distance & -distance), kSetBytes);
  return rows_in_set < kSetWays || v.K <= 2 * kLanes<T> || v.Q == 1;
}

// `packed`: the panels are packed already and can't be cut anew; all but the split over threads is the same.
template <class T, class S>
Plan make_plan(const Conv2dView& v, int threads, bool packed) {
  constexpr int64_t VL = kLanes<T>;
  Plan plan{};
  const int64_t taps = v.R * v.S, reduction = taps * v.C;
  const bool one_tap = taps == 1 && v.stride_h == 1 && v.stride_w == 1 && v.pad_h == 0 && v.pad_w == 0;
  const bool flat_x = one_tap && v.P == v.H && v.Q == v.W && v.x_h == v.W * v.x_w && (v.N == 1 || v.x_n == v.H * v.x_h);
  plan.step_h = needed_step(v.P, v.R, v.stride_h, v.dilation_h);
  plan.step_w = needed_step(v.Q, v.S, v.stride_w, v.dilation_w);
  plan.group_vecs = ceil_div(v.K, VL);
  plan.vecs = plan.group_vecs * v.G;
  const bool narrow = v.Q < kNarrow && v.P > 1;
  if (reduction == 0) {
    plan.source = Source::kDirect;  // nothing is read
  } else if (kSame<S, T> && direct_fits<T>(v) && (flat_x || !narrow)) {
    plan.source = Source::kDirect;
    plan.flat = flat_x;
  } else if (flat_x || (narrow && v.C * v.G >= kFoldChannels && (taps == 1 || v.K > VL))) {
    plan.source = Source::kWindows;
    plan.flat = true;
  } else {
    plan.source = Source::kStrip;
    plan.fold = v.G == 1 && v.S > 1 && v.dilation_w == plan.step_w && v.C < kFoldChannels;
  }

  // Chunks of the reduction, columns and rows such that a panel and a block of pixels fit.
  plan.chunk = v.C;
  plan.columns = v.Q;
  const auto panel_bytes = [&] { return taps * plan.chunk * kMaxTileVecs * VL * static_cast<int64_t>(sizeof(T)); };
  const auto pixel_bytes = [&](int64_t units, int64_t channels) {
    return copied_elements(plan, v, units, plan.columns, channels) * static_cast<int64_t>(sizeof(T));
  };
  if (plan.source == Source::kWindows && taps > 1 && v.G == 1 && panel_bytes() > kDeepPanelBytes) {
    plan.deep = true;
    const int64_t bytes = taps * min(kDeepPixels, v.N * v.P * v.Q) * static_cast<int64_t>(sizeof(T));
    plan.chunk = min(v.C, max(16, kDeepPixelBytes / bytes / 16 * 16));
  }
  while (panel_bytes() > kPanelBytes && plan.chunk > 16) plan.chunk = round_up(plan.chunk / 2, 16);
  while (pixel_bytes(1, plan.chunk) > kPixelBytes && plan.columns > kMostTileRows && !plan.flat)
    plan.columns = ceil_div(plan.columns, 2);
  while (pixel_bytes(1, plan.chunk) > kPixelBytes && plan.chunk > 16) plan.chunk = round_up(plan.chunk / 2, 16);
  if (plan.chunk < v.C) plan.fold = false;

  // The split over threads: what one thread has to multiply, pack and copy, in cycles.
  plan.units = plan.flat ? v.N * v.P * v.Q : v.N * v.P;
  const int64_t unit_pixels = plan.flat ? 1 : v.Q;
  double best = -1;
  for (int tk = 1; tk <= threads; ++tk) {
    if (threads % tk) continue;
    const int tu = threads / tk;
    const int64_t panels = v.G * ceil_div(plan.group_vecs, kMaxTileVecs);
    const double vecs = static_cast<double>(packed ? min(plan.vecs, ceil_div(panels, tk) * kMaxTileVecs)
                                                   : ceil_div(plan.vecs, tk)),
                 units = static_cast<double>(ceil_div(plan.units, tu));
    const double pixels = units * static_cast<double>(unit_pixels), sum = static_cast<double>(reduction);
    const double groups = max(1, static_cast<int64_t>(vecs) / max(1, plan.group_vecs));
    const double multiply = vecs * pixels * sum / 2, pack = packed ? 0 : vecs * sum * static_cast<double>(VL) / 4;
    // Elements read for a pixel; those of one filter window overlap in a strip.
    const double read = plan.source == Source::kWindows
                            ? sum
                            : static_cast<double>(v.C * (v.stride_h / plan.step_h) * (v.stride_w / plan.step_w));
    const double copied = pixels * read / (plan.source == Source::kDirect ? 8 : 3);
    const double cost = multiply + pack + copied * groups;
    if (best < 0 || cost < best) best = cost, plan.threads_k = tk, plan.threads_u = tu;
  }

  const int64_t channels =
      plan.chunk < v.C ? plan.chunk : v.C * min(v.G, ceil_div(plan.vecs, plan.threads_k) / max(1, plan.group_vecs) + 2);
  plan.block = ceil_div(plan.units, plan.threads_u);
  if (!plan.flat) plan.block = min(plan.block, v.P);
  if (plan.deep) {
    const int64_t sums = ceil_div(plan.vecs, plan.threads_k) * VL * static_cast<int64_t>(sizeof(T));
    const int64_t most = max(kMostTileRows, min(kDeepPixels, kDeepPixelBytes / sums));
    plan.block = ceil_div(plan.block, ceil_div(plan.block, most));
  } else if (plan.source == Source::kDirect) {
    // x is read in place; a block is what L2 keeps while the panels pass by.
    const int64_t unit_bytes = unit_pixels * v.stride_h * v.stride_w * v.C * v.G * static_cast<int64_t>(sizeof(T));
    plan.block = max(1, min(plan.block, kPixelBytes / max(1, unit_bytes)));
    if (plan.flat) plan.block = max(plan.block, 8 * kMostTileRows);
  } else {
    while (plan.block > 1 && pixel_bytes(plan.block, channels) > kPixelBytes) plan.block = ceil_div(plan.block, 2);
  }
  return plan;
}

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
