// The values of maxima over windows: fprop, which asks for no place.
//
// Lanes hold keys: the element itself, of 16-bit types an integer of the elements' order, that is turned back where it
// is stored. Windows of 2 or 3 columns that overlap share them: the maxima of the last columns stay in registers while
// a block of channels walks along the row, some windows at a time, so that what it reads lies together.
//
// Of zeros with different signs the maximum is either, of NaNs any.
#pragma once
#include "max_pool2d_search.h"

namespace cnnfast {
namespace CNNFAST_ISA {
namespace {

constexpr int64_t kWalkBytes = 1 << 13;  // of a row that one block of channels walks along
constexpr int64_t kLeastWalk = 8;        // windows

template <class S, int width>
struct Keys {
  using E = Lane<S, Direction::fprop>;
  using V = Lanes<E, width>;

  static CNNFAST_INLINE V lowest() { return key_of<S, E>(V{} + minus_infinity<S, E>()); }
  static CNNFAST_INLINE V load(const S* p) { return key_of<S, E>(read<E, width>(p)); }
  static CNNFAST_INLINE V larger(V a, V b) {
    if constexpr (kSame<E, int16_t>)
      return a > b ? a : b;  // NaN's key is the largest
    else if constexpr (width == kLanes<E>)
      return maximum(a, b);
    else
      return (b > a) | (b != b) ? b : a;
  }
  static CNNFAST_INLINE void store(S* p, V key) {
    if constexpr (kSame<E, int16_t>) {
      const V sign = key >> 15, magnitude = (key ^ sign) - sign;
      key = magnitude | (sign & static_cast<int16_t>(-0x8000));
    }
    write<E, width>(p, key);
  }
};

// The maxima of a column of taps, in vecs * width channels; lowest where it isn't in the image.
template <class S, int width, int vecs, class Pool>
struct Column {
  using K = Keys<S, width>;
  typename K::V key[vecs];

  // x points to the first of `rows` rows.
  CNNFAST_INLINE void find(const Pool& p, const S* x, int64_t rows, int64_t w) {
    if (rows == 0 || w < 0 || w >= p.W) {
#pragma GCC unroll 4
      for (int v = 0; v < vecs; ++v) key[v] = K::lowest();
      return;
    }
    x += w * p.x_w;
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) key[v] = K::load(x + v * width);
    for (int64_t r = 1; r < rows; ++r) {
      x += p.rows.step * p.x_h;
#pragma GCC unroll 4
      for (int v = 0; v < vecs; ++v) key[v] = K::larger(key[v], K::load(x + v * width));
    }
  }
  CNNFAST_INLINE void join(const Column& other) {
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) key[v] = K::larger(key[v], other.key[v]);
  }
  CNNFAST_INLINE void store(S* y) const {
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) K::store(y + v * width, key[v]);
  }
};

// Windows first .. last - 1 of a row, of S = `filter` columns each, in vecs * width channels. x points to the first of
// `rows` rows, y to the row's first window.
template <class S, int width, int vecs, int filter, int stride, class Pool>
CNNFAST_INLINE void walk(const Pool& p, const S* x, S* y, int64_t rows, int64_t first, int64_t last) {
  constexpr int shared = filter - stride;
  Column<S, width, vecs, Pool> columns[filter];
  int64_t w = p.columns.extent(first).begin;
#pragma GCC unroll 3
  for (int i = 0; i < shared; ++i) columns[i].find(p, x, rows, w + i);
  for (int64_t q = first; q < last; ++q, w += stride) {
#pragma GCC unroll 3
    for (int i = shared; i < filter; ++i) columns[i].find(p, x, rows, w + i);
    Column<S, width, vecs, Pool> all = columns[0];
#pragma GCC unroll 3
    for (int i = 1; i < filter; ++i) all.join(columns[i]);
    all.store(y + q * p.y_w);
#pragma GCC unroll 3
    for (int i = 0; i < shared; ++i) columns[i] = columns[i + stride];
  }
}

template <class S, int width, int filter, int stride, class Pool>
void walk_row(const Pool& p, const S* x, S* y, int64_t rows, const Span& channels) {
  const int64_t step = max(kLeastWalk, kWalkBytes / (channels.size() * stride * static_cast<int64_t>(sizeof(S))));
  for (int64_t q = 0; q < p.Q; q += step)
    for_each_block<S, Direction::fprop, width>(channels.begin, channels.end, [&](auto count, int64_t c, int64_t) {
      walk<S, width, decltype(count)::value, filter, stride>(p, x + c, y + c, rows, q, min(q + step, p.Q));
    });
}

// A row of windows in some channels; x points to the image, y to the row's first window.
template <class S, int width, class Pool>
void pool_values(const Pool& p, const S* x, S* y, int64_t row, const Span& channels) {
  const Span taps = p.rows.elements(row);
  const int64_t rows = taps.empty() ? 0 : ceil_div(taps.size(), p.rows.step);
  x += taps.begin * p.x_h;
  if constexpr (Pool::kRegular) {
    if (p.columns.step == 1) {
      const int64_t filter = p.columns.filter, stride = p.columns.stride;
      if (filter == 3 && stride == 2) return walk_row<S, width, 3, 2>(p, x, y, rows, channels);
      if (filter == 3 && stride == 1) return walk_row<S, width, 3, 1>(p, x, y, rows, channels);
      if (filter == 2 && stride == 1) return walk_row<S, width, 2, 1>(p, x, y, rows, channels);
    }
  }
  for (int64_t q = 0; q < p.Q; ++q, y += p.y_w) {
    const Span columns = p.columns.elements(q);
    for_each_block<S, Direction::fprop, width>(channels.begin, channels.end, [&](auto count, int64_t c, int64_t) {
      Column<S, width, decltype(count)::value, Pool> all, next;
      all.find(p, x + c, columns.empty() ? 0 : rows, columns.begin);
      for (int64_t w = columns.begin + p.columns.step; w < columns.end; w += p.columns.step) {
        next.find(p, x + c, rows, w);
        all.join(next);
      }
      all.store(y + c);
    });
  }
}

}  // namespace
}  // namespace CNNFAST_ISA
}  // namespace cnnfast
