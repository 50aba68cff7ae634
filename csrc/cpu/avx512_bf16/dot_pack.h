// Moving bf16 operands into the form that pairs are read in: weights into panels of pairs, and back; pixels into
// strips. Bits are only moved: what comes back is what went in.
//
// A panel holds `vecs` vectors of output channels: row (run, pair) is vecs * VL pairs of input channels, lanes beyond
// the last channel and the second of an odd last pair zero. pack.h does the transposing, some channels at a time.
#pragma once
#include "../pack.h"
#include "../primitives/dot.h"

namespace cnnfast {
namespace CNNFAST_ISA {

constexpr int64_t kSliceRows = 1024;  // rows of floats that wait to be paired

// How channels are paired: tap by tap, or, where there are few, along a filter row (its taps' channels are one run, as
// they are in x).
enum class Pairing { kTaps, kRows };

// Channels that are transposed at a time: all of them where rows are paired.
inline int64_t slice_channels(const PanelShape& p, Pairing pairing) {
  if (pairing == Pairing::kRows) return p.channels;
  return min(round_up(p.channels, 2), max(2, kSliceRows / max(1, p.R * p.S) / 2 * 2));
}
inline int64_t slice_elements(const PanelShape& p, Pairing pairing) {
  return (p.R * p.S * slice_channels(p, pairing) + 1) * p.vecs * kLanes<float>;
}

// Calls slice(some channels as a panel of their own, the first, pairs) for all channels; pairs() calls
// pair(row of the slice, whether it has a second one, row of the panel).
template <class Slice, class Pair>
CNNFAST_INLINE void for_each_slice(const PanelShape& p, Pairing pairing, const Slice& slice, const Pair& pair) {
  const bool rows = pairing == Pairing::kRows;
  const int64_t step = slice_channels(p, pairing), runs = rows ? p.R : p.R * p.S;
  const int64_t pairs = ceil_div(rows ? p.S * p.channels : p.channels, 2);  // of a run
  for (int64_t c = 0; c < p.channels; c += step) {
    PanelShape part = p;
    part.channels = min(step, p.channels - c);
    slice(part, c, [&] {
      const int64_t run = rows ? p.S * part.channels : part.channels;
      for (int64_t t = 0; t < runs; ++t)
        for (int64_t i = 0; i < run; i += 2) pair(t * run + i, i + 1 < run, t * pairs + (c + i) / 2);
    });
  }
}

// Packs one panel; `room` has slice_elements(). Returns false if a weight is Inf or NaN.
inline bool pack_pairs(BFloat16* panel, const BFloat16* w, const PanelShape& p, Pairing pairing, float* room) {
  const int64_t row = p.vecs * kLanes<float>;
  bool finite = true;
  for_each_slice(
      p, pairing,
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
inline void unpack_pairs(BFloat16* w, const BFloat16* panel, const PanelShape& p, Pairing pairing, float* room) {
  const int64_t row = p.vecs * kLanes<float>;
  for_each_slice(
      p, pairing,
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

// The same where pixels touch, and after the last one zeros. Returns false if an element is Inf or NaN.
inline bool copy_row_touching(BFloat16* out, const BFloat16* in, int64_t columns, int64_t first, int64_t step,
                              int64_t width, int64_t pixel_stride, int64_t channels) {
  const int64_t begin = min(columns, first >= 0 ? 0 : ceil_div(-first, step));
  const int64_t end = first < width ? max(begin, min(columns, (width - 1 - first) / step + 1)) : begin;
  zero_halves(out, begin * channels);
  if (step == 1 && pixel_stride == channels)
    copy_halves(out + begin * channels, in + (first + begin) * pixel_stride, (end - begin) * channels);
  else
    for (int64_t i = begin; i < end; ++i)
      copy_halves(out + i * channels, in + (first + i * step) * pixel_stride, channels);
  zero_halves(out + end * channels, (columns - end) * channels + kHalves);
  BitsVec special{};
  for (int64_t i = 0; i < columns * channels; i += kHalves) {
    const BitsVec pairs = load_halves(out + i);
    special |= (BitsVec)((pairs & 0x7f800000u) == 0x7f800000u) | (BitsVec)((pairs & 0x7f80u) == 0x7f80u);
  }
  return all_zero(__builtin_convertvector(special, Vec<float>));
}

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
