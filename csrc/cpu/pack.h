// Moving operands into the form the register tile reads: weights of any strides into panels (and panels back into
// weight gradients), input pixels into a strip or into rows of filter windows.
//
// A panel holds `vecs` vectors of output channels: row (tap * channels + c) of vecs * VL elements, lanes beyond the
// last channel zero. Where the memory order of the weights is not the panel's, blocks of VL x VL are transposed in
// registers.
#pragma once
#include "primitives/vec.h"

namespace cnnfast {
namespace CNNFAST_ISA {

constexpr int64_t kPackedHead = 64;  // bytes before what a pack entry packs; the first: whether all weights are finite

// The weights of one panel: lane k, channel c, tap (r, s) is at k*w_k + c*w_c + r*w_r + s*w_s.
struct PanelShape {
  int64_t lanes;  // output channels, at most vecs * VL
  int64_t vecs, channels, R, S;
  int64_t w_k, w_c, w_r, w_s;
};

// How the panel's rows follow each other in memory.
enum class PanelOrder {
  kLanes,     // neighbours are output channels: rows are read as they are
  kChannels,  // neighbours are input channels (1x1 weights, channels_last weights)
  kAll,       // channels, rows and columns are one contiguous run (contiguous KCRS weights)
  kTaps,      // the taps of one channel lie within a short window (a transposed or flipped contiguous weight)
  kAny
};
constexpr int64_t kMaxWindow = 64;

inline int64_t magnitude(int64_t x) { return x < 0 ? -x : x; }

inline PanelOrder panel_order(const PanelShape& p) {
  if (p.w_k == 1) return PanelOrder::kLanes;
  const int64_t r = magnitude(p.w_r), s = magnitude(p.w_s);
  const int64_t window = 1 + (p.R - 1) * r + (p.S - 1) * s;
  // an expanded weight's taps share addresses: they can't be told apart by their place in the window
  const bool distinct =
      (p.S == 1 || s > 0) && (p.R == 1 || r > 0) && (p.R == 1 || p.S == 1 || r >= p.S * s || s >= p.R * r);
  if (p.w_s == 1 && p.w_r == p.S && p.w_c == p.R * p.S && p.R * p.S > 1) return PanelOrder::kAll;
  if (p.w_c == 1) return PanelOrder::kChannels;
  if (distinct && window <= kMaxWindow && window <= 4 * p.R * p.S && p.R * p.S > 1) return PanelOrder::kTaps;
  return PanelOrder::kAny;
}

// Visits the panel as blocks of VL consecutive elements in memory: fn(offset of the block from a lane's first element,
// number of elements, their panel rows, -1 where an element belongs to none).
template <int VL, class F>
CNNFAST_INLINE void for_each_block(const PanelShape& p, PanelOrder order, const F& fn) {
  int64_t rows[VL];
  const int64_t taps = p.R * p.S;
  if (order == PanelOrder::kChannels) {
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t c = 0; c < p.channels; c += VL) {
        for (int i = 0; i < VL; ++i) rows[i] = tap * p.channels + c + i;
        fn(tap / p.S * p.w_r + tap % p.S * p.w_s + c, min(VL, p.channels - c), rows);
      }
  } else if (order == PanelOrder::kAll) {
    int64_t tap = 0, c = 0;
    const int64_t run = p.channels * taps;
    for (int64_t m = 0; m < run; m += VL) {
      for (int i = 0; i < VL; ++i) {
        rows[i] = tap * p.channels + c;
        if (++tap == taps) tap = 0, ++c;
      }
      fn(m, min(VL, run - m), rows);
    }
  } else {
    const int64_t first = min(0, (p.R - 1) * p.w_r) + min(0, (p.S - 1) * p.w_s);
    const int64_t window = 1 + (p.R - 1) * magnitude(p.w_r) + (p.S - 1) * magnitude(p.w_s);
    int64_t tap_at[kMaxWindow + VL];
    for (int64_t i = 0; i < kMaxWindow + VL; ++i) tap_at[i] = -1;
    for (int64_t r = 0; r < p.R; ++r)
      for (int64_t s = 0; s < p.S; ++s) tap_at[r * p.w_r + s * p.w_s - first] = r * p.S + s;
    for (int64_t c = 0; c < p.channels; ++c)
      for (int64_t m = 0; m < window; m += VL) {
        for (int i = 0; i < VL; ++i) rows[i] = tap_at[m + i] < 0 ? -1 : tap_at[m + i] * p.channels + c;
        fn(first + c * p.w_c + m, min(VL, window - m), rows);
      }
  }
}

// The offset of every panel row's weights from a lane's first element, in the panel's order.
template <class F>
CNNFAST_INLINE void for_each_row(const PanelShape& p, const F& fn) {
  for (int64_t r = 0; r < p.R; ++r)
    for (int64_t s = 0; s < p.S; ++s)
      for (int64_t c = 0; c < p.channels; ++c) fn(r * p.w_r + s * p.w_s + c * p.w_c);
}

constexpr int64_t kRowsAhead = 16;

// Packs a panel whose rows are read as they are, each of them whole, and asked for before: they may be pages apart,
// where no processor fetches ahead by itself.
template <class T, class S>
bool pack_rows(T* panel, const S* w, const PanelShape& p) {
  constexpr int VL = kLanes<T>;
  const int64_t whole = p.lanes / VL, rest = p.lanes % VL;
  Vec<T> checks[2] = {};
  for_each_row(p, [&](int64_t offset) __attribute__((always_inline)) {
    const S* in = w + offset;
    for (int64_t j = 0; j < p.vecs; ++j, panel += VL) {
      __builtin_prefetch(in + kRowsAhead * p.w_c + j * VL);
      const Vec<T> v = j < whole            ? load_wide(in + j * VL)
                       : j == whole && rest ? load_wide(in + j * VL, rest)
                                            : Vec<T>{};
      checks[j & 1] += v * T(0);
      store(panel, v);
    }
  });
  const Vec<T> check = checks[0] + checks[1];
  for (int l = 0; l < VL; ++l)
    if (!(check[l] == T(0))) return false;
  return true;
}

// Packs one panel. Returns false if a weight is Inf or NaN: multiplied by the zeros of the padding it would spread, so
// that the caller has to choose another way.
template <class T, class S>
bool pack_panel(T* panel, const S* w, const PanelShape& p) {
  constexpr int VL = kLanes<T>;
  const PanelOrder order = panel_order(p);
  if (order == PanelOrder::kLanes) return pack_rows<T>(panel, w, p);
  const int64_t row = p.vecs * VL;
  Vec<T> check{};  // stays zero as long as everything is finite
  for (int64_t j = 0; j < p.vecs; ++j) {
    const int64_t lanes = max(0, min(VL, p.lanes - j * VL));
    const S* wj = w + j * VL * p.w_k;
    T* out = panel + j * VL;
    if (order == PanelOrder::kAny) {
      for_each_row(p, [&](int64_t offset) __attribute__((always_inline)) {
        Vec<T> v{};
        for (int64_t l = 0; l < lanes; ++l) v[l] = widen_one(wj[offset + l * p.w_k]);
        check += v * T(0);
        store(out, v);
        out += row;
      });
    } else {
      for_each_block<VL>(p, order, [&](int64_t offset, int64_t n, const int64_t* rows) __attribute__((always_inline)) {
        Vec<T> v[VL];
        const S* source = wj + offset;
        if (lanes == VL && n == VL) {
#pragma GCC unroll 16
          for (int l = 0; l < VL; ++l) v[l] = load_wide(source + l * p.w_k);
        } else {
          for (int l = 0; l < VL; ++l) v[l] = l < lanes ? load_wide(source + l * p.w_k, n) : Vec<T>{};
        }
        transpose<T>(v);
        if (order != PanelOrder::kTaps && n == VL) {
#pragma GCC unroll 16
          for (int i = 0; i < VL; ++i) {
            check += v[i] * T(0);
            store(out + rows[i] * row, v[i]);
          }
        } else {
          for (int i = 0; i < n; ++i) {
            if (rows[i] < 0) continue;
            check += v[i] * T(0);
            store(out + rows[i] * row, v[i]);
          }
        }
      });
    }
  }
  for (int l = 0; l < VL; ++l)
    if (!(check[l] == T(0))) return false;
  return true;
}

// The way back: one panel of sums becomes weights.
template <class T, class S>
void unpack_panel(S* w, const T* panel, const PanelShape& p) {
  constexpr int VL = kLanes<T>;
  const PanelOrder order = panel_order(p);
  const int64_t row = p.vecs * VL;
  if (order == PanelOrder::kLanes) {
    const int64_t whole = p.lanes / VL, rest = p.lanes % VL;
    for_each_row(p, [&](int64_t offset) __attribute__((always_inline)) {
      S* out = w + offset;
      for (int64_t j = 0; j < whole; ++j) store_narrow(out + j * VL, load(panel + j * VL));
      if (rest) store_narrow(out + whole * VL, load(panel + whole * VL), rest);
      panel += row;
    });
    return;
  }
  for (int64_t j = 0; j < p.vecs; ++j) {
    const int64_t lanes = max(0, min(VL, p.lanes - j * VL));
    S* wj = w + j * VL * p.w_k;
    const T* in = panel + j * VL;
    if (order == PanelOrder::kChannels || order == PanelOrder::kAll) {
      for_each_block<VL>(p, order, [&](int64_t offset, int64_t n, const int64_t* rows) __attribute__((always_inline)) {
        Vec<T> v[VL];
        for (int i = 0; i < VL; ++i) v[i] = i < n ? load(in + rows[i] * row) : Vec<T>{};
        transpose<T>(v);
        S* out = wj + offset;
        for (int l = 0; l < lanes; ++l) {
          if (n == VL)
            store_narrow(out + l * p.w_k, v[l]);
          else
            store_narrow(out + l * p.w_k, v[l], n);
        }
      });
    } else {
      for_each_row(p, [&](int64_t offset) __attribute__((always_inline)) {
        for (int64_t l = 0; l < lanes; ++l) narrow_one(wj + offset + l * p.w_k, in[l]);
        in += row;
      });
    }
  }
}

// `count` elements, and up to the next whole vector zeros: the destination has room for them.
template <class T, class S>
CNNFAST_INLINE void copy_channels(T* out, const S* in, int64_t count) {
  constexpr int VL = kLanes<T>;
  int64_t c = 0;
  for (; c + VL <= count; c += VL) store(out + c, load_wide(in + c));
  if (c < count) store(out + c, load_wide(in + c, count - c));
}

template <class T>
CNNFAST_INLINE void zero_channels(T* out, int64_t count) {
  constexpr int VL = kLanes<T>;
  for (int64_t c = 0; c < count; c += VL) store(out + c, Vec<T>{});
}

// One row of a strip: pixel i of `columns` is input pixel first + i * step, zero outside [0, width). A pixel takes
// `pitch` elements of the strip, of which `channels` are written (rounded up to whole vectors: the next pixel is
// written later).
template <class T, class S>
void copy_row(T* out, const S* in, int64_t columns, int64_t first, int64_t step, int64_t width, int64_t pixel_stride,
              int64_t channels, int64_t pitch) {
  const int64_t begin = min(columns, first >= 0 ? 0 : ceil_div(-first, step));
  const int64_t end = first < width ? max(begin, min(columns, (width - 1 - first) / step + 1)) : begin;
  for (int64_t i = 0; i < begin; ++i) zero_channels(out + i * pitch, channels);
  if (pitch == channels && step == 1 && pixel_stride == channels) {
    copy_channels(out + begin * pitch, in + (first + begin) * pixel_stride, (end - begin) * channels);
  } else {
    for (int64_t i = begin; i < end; ++i)
      copy_channels(out + i * pitch, in + (first + i * step) * pixel_stride, channels);
  }
  for (int64_t i = end; i < columns; ++i) zero_channels(out + i * pitch, channels);
}

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
