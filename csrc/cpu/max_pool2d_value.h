// The values of maxima over windows: fprop, which asks for no place, and taps, which wants the number of the tap.
//
// Lanes hold keys: the element itself, of 16-bit types an integer of the elements' order, that is turned back where it
// is stored. Windows of 2 or 3 columns that overlap share them: the maxima of the last columns stay in registers while
// a block of channels walks along the row, some windows at a time, so that what it reads lies together.
//
// For taps a column holds its first maximum's number beside it, and of the columns that hold the window's maximum the
// least number counts. That is wrong where there are NaNs, of which the last is the maximum: one comparison an element
// less, and a row of windows that has any is done again by the search that knows them (max_pool2d.h).
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
  static bool has_nan(V keys) {
    E lanes[LanesOf<E, width>::count];
    memcpy(lanes, &keys, sizeof lanes);
    bool any = false;
    for (const E key : lanes) any |= kSame<E, int16_t> ? key == static_cast<E>(kNaNKey) : key != key;
    return any;
  }
};

// Of a row of windows: y, k where the numbers of the taps are asked for, and the largest keys of all, a NaN where one
// is.
template <class S, int width, bool numbered>
struct Row {
  S* y;
  uint8_t* k;
  typename Keys<S, width>::V largest{};
};

template <class L, int vecs, bool numbered>
struct Numbers {
  L number[vecs];
};
template <class L, int vecs>
struct Numbers<L, vecs, false> {};

// The maxima of a column of taps, in vecs * width channels; lowest where it isn't in the image.
template <class S, int width, int vecs, bool numbered, class Pool>
struct Column : Numbers<Labels<Lane<S, Direction::taps>, width, Direction::taps>, vecs, numbered> {
  using K = Keys<S, width>;
  using N = Label<Lane<S, Direction::taps>, Direction::taps>;
  using L = Labels<Lane<S, Direction::taps>, width, Direction::taps>;
  static constexpr N kNone = 1 << 14 | kNoTap;  // above all numbers
  typename K::V key[vecs];

  CNNFAST_INLINE void set_none() {
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) {
      key[v] = K::lowest();
      if constexpr (numbered) this->number[v] = L{} + kNone;
    }
  }
  CNNFAST_INLINE void set(const S* x, int64_t number) {
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) {
      key[v] = K::load(x + v * width);
      if constexpr (numbered) this->number[v] = L{} + static_cast<N>(number);
    }
  }
  CNNFAST_INLINE void join(const S* x, int64_t number) {
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) {
      const auto other = K::load(x + v * width);
      if constexpr (numbered) this->number[v] = other > key[v] ? L{} + static_cast<N>(number) : this->number[v];
      key[v] = K::larger(key[v], other);
    }
  }
  // x points to the first of `rows` rows, whose taps' numbers are `first` and, row by row, `pitch` more.
  CNNFAST_INLINE void find(const Pool& p, const S* x, int64_t rows, int64_t w, int64_t first = 0, int64_t pitch = 0) {
    if (rows == 0 || w < 0 || w >= p.W) return set_none();
    x += w * p.x_w;
    set(x, first);
    for (int64_t r = 1; r < rows; ++r) {
      x += p.rows.step * p.x_h;
      join(x, first += pitch);
    }
  }
  // A whole window, tap by tap, the first one's number first: so the first of equal elements is found.
  CNNFAST_INLINE void search(const Pool& p, const S* x, int64_t rows, const Span& columns, Labelling labelling) {
    if (rows == 0 || columns.empty()) return set_none();
    x += columns.begin * p.x_w;
    set(x, labelling.first);
    const int64_t step = p.columns.step * p.x_w;
    const S* from = x + step;
    int64_t number = labelling.first, w = columns.begin + p.columns.step;
    for (int64_t r = 0; r < rows; ++r) {
      for (; w < columns.end; w += p.columns.step, from += step) join(from, number += labelling.column);
      from = x += p.rows.step * p.x_h;
      w = columns.begin;
      number = (labelling.first += labelling.row) - labelling.column;
    }
  }
  CNNFAST_INLINE void join(const Column& other) {
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) key[v] = K::larger(key[v], other.key[v]);
  }
  // The numbers, of a window whose columns these are; a column's own don't count the columns before it.
  template <int filter>
  CNNFAST_INLINE void number_among(const Column (&columns)[filter]) {
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) {
      L least = L{} + kNone;
#pragma GCC unroll 3
      for (int i = 0; i < filter; ++i) {
        const L number = columns[i].key[v] == key[v] ? columns[i].number[v] + static_cast<N>(i) : L{} + kNone;
        least = number < least ? number : least;
      }
      this->number[v] = least;
    }
  }
  CNNFAST_INLINE void store(Row<S, width, numbered>& row, int64_t y, int64_t k) const {
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) {
      K::store(row.y + y + v * width, key[v]);
      if constexpr (numbered) {
        write_taps<width>(row.k + k + v * width, this->number[v]);
        row.largest = K::larger(row.largest, key[v]);
      }
    }
  }
};

// What the walk after this one reads, `count` columns of it: block by block it lies too far apart for the processor to
// foresee, and with the numbers there is too much to do between loads for it to look ahead by itself.
template <class S, int width, int vecs, int count, class Pool>
CNNFAST_INLINE void prefetch(const Pool& p, const S* x, int64_t rows, int64_t w) {
  x += w * p.x_w;
  for (int64_t r = 0; r < rows; ++r, x += p.rows.step * p.x_h)
#pragma GCC unroll 3
    for (int i = 0; i < count; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < vecs; ++v) __builtin_prefetch(x + i * p.x_w + v * width, 0, 2);
}

// Windows first .. last - 1 of a row, of S = `filter` columns each, in vecs * width channels from c on. x points to the
// first of `rows` rows, the first of whose taps has the number `number`.
template <class S, int width, int vecs, int filter, int stride, bool numbered, class Pool>
CNNFAST_INLINE void walk(const Pool& p, const S* x, Row<S, width, numbered>& row, int64_t c, int64_t rows,
                         int64_t number, int64_t first, int64_t last) {
  constexpr int shared = filter - stride;
  Column<S, width, vecs, numbered, Pool> columns[filter];
  int64_t w = p.columns.extent(first).begin;
#pragma GCC unroll 3
  for (int i = 0; i < shared; ++i) columns[i].find(p, x + c, rows, w + i, number, filter);
  for (int64_t q = first; q < last; ++q, w += stride) {
    if constexpr (numbered)
      if (p.C > vecs * width) prefetch<S, width, vecs, stride>(p, x + c, rows, w + (last - first) * stride + shared);
#pragma GCC unroll 3
    for (int i = shared; i < filter; ++i) columns[i].find(p, x + c, rows, w + i, number, filter);
    Column<S, width, vecs, numbered, Pool> all = columns[0];
#pragma GCC unroll 3
    for (int i = 1; i < filter; ++i) all.join(columns[i]);
    if constexpr (numbered) all.number_among(columns);
    all.store(row, q * p.y_w + c, q * p.k_w + c);
#pragma GCC unroll 3
    for (int i = 0; i < shared; ++i) columns[i] = columns[i + stride];
  }
}

template <class S, int width, int filter, int stride, bool numbered, class Pool>
void walk_row(const Pool& p, const S* x, Row<S, width, numbered>& row, int64_t rows, int64_t number,
              const Span& channels) {
  const int64_t step = max(kLeastWalk, kWalkBytes / (channels.size() * stride * static_cast<int64_t>(sizeof(S))));
  for (int64_t q = 0; q < p.Q; q += step)
    for_each_block<S, Direction::fprop, width>(channels.begin, channels.end, [&](auto count, int64_t c, int64_t) {
      walk<S, width, decltype(count)::value, filter, stride>(p, x, row, c, rows, number, q, min(q + step, p.Q));
    });
}

// A row of windows in some channels; x points to the image, y and k to the row's first window.
template <class S, int width, bool numbered, class Pool>
void pool_row_values(const Pool& p, const S* x, Row<S, width, numbered>& to, int64_t row, const Span& channels) {
  const Span taps = p.rows.elements(row);
  const int64_t rows = taps.empty() ? 0 : ceil_div(taps.size(), p.rows.step);
  x += taps.begin * p.x_h;
  if constexpr (Pool::kRegular) {
    if (p.columns.step == 1) {
      const int64_t filter = p.columns.filter, stride = p.columns.stride;
      const int64_t number = numbered ? (taps.begin - p.rows.extent(row).begin) / p.rows.step * filter : 0;
      if (filter == 3 && stride == 2) return walk_row<S, width, 3, 2>(p, x, to, rows, number, channels);
      if (filter == 3 && stride == 1) return walk_row<S, width, 3, 1>(p, x, to, rows, number, channels);
      if (filter == 2 && stride == 1) return walk_row<S, width, 2, 1>(p, x, to, rows, number, channels);
    }
  }
  for (int64_t q = 0; q < p.Q; ++q) {
    const Span columns = p.columns.elements(q);
    const Labelling labelling = numbered ? by_taps(p, taps, row, columns, q) : Labelling{};
    for_each_block<S, Direction::fprop, width>(channels.begin, channels.end, [&](auto count, int64_t c, int64_t) {
      Column<S, width, decltype(count)::value, numbered, Pool> all, next;
      if constexpr (numbered) {
        all.search(p, x + c, columns.empty() ? 0 : rows, columns, labelling);
      } else {
        all.find(p, x + c, columns.empty() ? 0 : rows, columns.begin);
        for (int64_t w = columns.begin + p.columns.step; w < columns.end; w += p.columns.step) {
          next.find(p, x + c, rows, w);
          all.join(next);
        }
      }
      all.store(to, q * p.y_w + c, q * p.k_w + c);
    });
  }
}

}  // namespace
}  // namespace CNNFAST_ISA
}  // namespace cnnfast
