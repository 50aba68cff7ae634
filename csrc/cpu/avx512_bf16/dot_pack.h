// Moving bf16 operands into the form that pairs are read in: weights into panels of pairs, and back; pixels into strips
// and windows. Bits are only moved: what comes back is what went in.
//
// A panel holds `vecs` vectors of output channels: row (tap, pair) is vecs * VL pairs of input channels, lanes beyond
// the last channel and the second of an odd last pair zero. pack.h does the transposing, some channels at a time.
#pragma once
#include "../pack.h"
#include "../primitives/dot.h"

namespace cnnfast {
namespace CNNFAST_ISA {

constexpr int64_t kSliceRows = 1024;  // rows of floats that wait to be paired

// Channels that are transposed at a time; with `one_run` (taps and channels paired as one sequence) all of them.
inline int64_t slice_channels(const PanelShape& p, bool one_run) {
  return one_run ? p.channels : min(round_up(p.channels, 2), max(2, kSliceRows / max(1, p.R * p.S) / 2 * 2));
}
inline int64_t slice_elements(const PanelShape& p, bool one_run) {
  return (p.R * p.S * slice_channels(p, one_run) + 1) * p.vecs * kLanes<float>;
}
// Pairs of a panel row by row: of all taps.
inline int64_t panel_pairs(const PanelShape& p, bool one_run) {
  return one_run ? ceil_div(p.R * p.S * p.channels, 2) : p.R * p.S * ceil_div(p.channels, 2);
}

// Calls fn(channels' slice as a panel of its own, its first channel) for all slices, and within
// pair(row of the slice, whether it has a second one, row of the panel).
template <class Slice, class Pair>
CNNFAST_INLINE void for_each_slice(const PanelShape& p, bool one_run, const Slice& slice, const Pair& pair) {
  const int64_t step = slice_channels(p, one_run), taps = p.R * p.S;
  for (int64_t c = 0; c < p.channels; c += step) {
    PanelShape part = p;
    part.channels = min(step, p.channels - c);
    slice(part, c, [&] {
      const int64_t runs = one_run ? 1 : taps, run = part.channels * (one_run ? taps : 1);
      for (int64_t t = 0; t < runs; ++t)
        for (int64_t i = 0; i < run; i += 2) pair(t * run + i, i + 1 < run, t * ceil_div(p.channels, 2) + (c + i) / 2);
    });
  }
}

// Packs one panel; `room` has slice_elements(). Returns false if a weight is Inf or NaN.
inline bool pack_pairs(BFloat16* panel, const BFloat16* w, const PanelShape& p, bool one_run, float* room) {
  const int64_t row = p.vecs * kLanes<float>;
  bool finite = true;
  for_each_slice(
      p, one_run,
      [&](const PanelShape& part, int64_t c, const auto& pairs) {
        finite &= pack_panel<float>(room, w + c * p.w_c, part);
        pairs();
      },
      [&](int64_t from, bool two, int64_t to) {
        for (int64_t l = 0; l < row; l += kLanes<float>) {
          const float* in = room + from * row + l;
          const BitsVec first = (BitsVec)load(in) >> 16, second = two ? (BitsVec)load(in + row) : BitsVec{};
          const BitsVec value = first | (second & 0xffff0000u);
          memcpy(panel + 2 * (to * row + l), &value, sizeof value);
        }
      });
  return finite;
}

// The way back.
inline void unpack_pairs(BFloat16* w, const BFloat16* panel, const PanelShape& p, bool one_run, float* room) {
  const int64_t row = p.vecs * kLanes<float>;
  for_each_slice(
      p, one_run,
      [&](const PanelShape& part, int64_t c, const auto& pairs) {
        pairs();
        unpack_panel<float>(w + c * p.w_c, room, part);
      },
      [&](int64_t to, bool two, int64_t from) {
        for (int64_t l = 0; l < row; l += kLanes<float>) {
          BitsVec value;
          memcpy(&value, panel + 2 * (from * row + l), sizeof value);
          store(room + to * row + l, (Vec<float>)(value << 16));
          if (two) store(room + (to + 1) * row + l, (Vec<float>)(value & 0xffff0000u));
        }
      });
}

// `count` elements, and up to the next whole vector zeros: the destination has room for them.
CNNFAST_INLINE void copy_halves(BFloat16* out, const BFloat16* in, int64_t count) {
  int64_t c = 0;
  for (; c + kHalves <= count; c += kHalves) store_halves(out + c, load_halves(in + c));
  if (c < count) store_halves(out + c, load_halves(in + c, count - c));
}
CNNFAST_INLINE void zero_halves(BFloat16* out, int64_t count) {
  for (int64_t c = 0; c < count; c += kHalves) store_halves(out + c, BitsVec{});
}

// One row of a strip: pixel i of `columns` is input pixel first + i * step, zero outside [0, width).
inline void copy_row_halves(BFloat16* out, const BFloat16* in, int64_t columns, int64_t first, int64_t step,
                            int64_t width, int64_t pixel_stride, int64_t channels, int64_t pitch) {
  const int64_t begin = min(columns, first >= 0 ? 0 : ceil_div(-first, step));
  const int64_t end = first < width ? max(begin, min(columns, (width - 1 - first) / step + 1)) : begin;
  for (int64_t i = 0; i < begin; ++i) zero_halves(out + i * pitch, channels);
  for (int64_t i = begin; i < end; ++i) copy_halves(out + i * pitch, in + (first + i * step) * pixel_stride, channels);
  for (int64_t i = end; i < columns; ++i) zero_halves(out + i * pitch, channels);
}

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
