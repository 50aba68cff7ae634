// The search for the maxima of windows: lanes, the order of the elements, and two ways through a window. See
// max_pool2d.h.
#pragma once
#include "../common/params.h"
#include "pool_windows.h"
#include "primitives/scratch.h"
#include "primitives/vec.h"

namespace cnnfast {
namespace CNNFAST_ISA {
namespace {

constexpr int kSmallVecBytes = 16;   // where the channels don't fill a whole vector
constexpr int kVecs = 4;             // vectors of channels at a time
constexpr int64_t kRowsAThread = 4;  // with fewer rows threads share channels, too

enum class Direction { fprop, indices, jvp, dgrad, taps, scatter };

template <class S>
struct Operands {
  const S* x;
  S* y;
  int64_t* i;
  S* t;
  uint8_t* k;
};

// Channels in `parts` parts that hold at least one vector each.
CNNFAST_INLINE Span channels_of(Span all, int width, int64_t part, int64_t parts) {
  const int64_t vecs = (all.end - all.begin) / width;
  return {all.begin + vecs * part / parts * width,
          part + 1 == parts ? all.end : all.begin + vecs * (part + 1) / parts * width};
}

// ---- lanes ----------------------------------------------------------------------------------------------------------

// At least `width` elements, and at least 16 bytes: GCC has no good code for less.
template <class E, int width>
struct LanesOf {
  static constexpr int count = width * sizeof(E) < kSmallVecBytes ? kSmallVecBytes / sizeof(E) : width;
  typedef E Type __attribute__((vector_size(count * sizeof(E))));
};
template <class E, int width>
using Lanes = typename LanesOf<E, width>::Type;

template <class S>
constexpr bool kIs16 = sizeof(S) == 2;

// What a lane holds: the element; of 16-bit types its bits, in the gradients, which need float sums, its float.
template <class S, Direction direction>
constexpr auto lane() {
  if constexpr (!kIs16<S>)
    return S{};
  else if constexpr (direction == Direction::dgrad || direction == Direction::scatter)
    return float{};
  else
    return int16_t{};
}
template <class S, Direction direction>
using Lane = decltype(lane<S, direction>());

// As many labels as lanes, of their size or more; taps fit in any.
template <class E, Direction direction>
constexpr auto label() {
  if constexpr (kSame<E, double>)
    return int64_t{};
  else if constexpr (kSame<E, int16_t> && direction == Direction::taps)
    return int16_t{};
  else
    return int32_t{};
}
template <class E, Direction direction = Direction::indices>
using Label = decltype(label<E, direction>());
template <class E, int width, Direction direction = Direction::indices>
using Labels = typename LanesOf<Label<E, direction>, LanesOf<E, width>::count>::Type;

// The first `width` lanes; the others are zero.
template <class E, int width>
CNNFAST_INLINE Lanes<E, width> read(const void* p) {
  Lanes<E, width> v;
  if constexpr (width * sizeof(E) >= kSmallVecBytes) {
    memcpy(&v, p, sizeof v);
  } else {
    int64_t bytes = 0;
    memcpy(&bytes, p, width * sizeof(E));
    v = (Lanes<E, width>)Lanes<int64_t, 2>{bytes, 0};
  }
  return v;
}
template <class E, int width>
CNNFAST_INLINE void write(void* p, Lanes<E, width> v) {
  if constexpr (width * sizeof(E) >= kSmallVecBytes) {
    memcpy(p, &v, sizeof v);
  } else {
    const int64_t bytes = ((Lanes<int64_t, 2>)v)[0];
    memcpy(p, &bytes, width * sizeof(E));
  }
}

// Elements in memory -> lanes.
template <class S, class E, int width>
CNNFAST_INLINE Lanes<E, width> fetch(const S* p) {
  if constexpr (sizeof(S) == sizeof(E)) {
    return read<E, width>(p);
  } else if constexpr (width == kLanes<float>) {
    return load_wide(p);
  } else {
    Lanes<E, width> v{};
#pragma GCC unroll 4
    for (int l = 0; l < width; ++l) v[l] = widen_one(p[l]);
    return v;
  }
}

// The widest vectors of a direction's lanes; labels beside them are no wider, 32 bits of 16-bit types' indices.
template <class S, Direction direction>
constexpr int whole_width() {
  using E = Lane<S, direction>;
  constexpr int lanes = kVecBytes / static_cast<int>(direction == Direction::indices ? sizeof(Label<E>) : sizeof(E));
  constexpr int small = kSmallVecBytes / static_cast<int>(sizeof(E));
  return lanes < small ? small : lanes;
}

// Lanes -> elements in memory.
template <class S, class E, int width>
CNNFAST_INLINE void put(S* p, Lanes<E, width> v) {
  if constexpr (sizeof(S) == sizeof(E)) {
    write<E, width>(p, v);
  } else if constexpr (width == kLanes<float>) {
    store_narrow(p, v);
  } else {
#pragma GCC unroll 4
    for (int l = 0; l < width; ++l) narrow_one(p + l, v[l]);
  }
}

// The bytes k of `width` channels as labels, and back.
constexpr uint8_t kNoTap = 255;
template <int width, class L>
CNNFAST_INLINE L read_taps(const uint8_t* k) {
  constexpr int count = sizeof(L) / sizeof(L{}[0]);
  if constexpr (width == count) return load_bytes<L>(k);
  uint8_t bytes[count] = {};
  memcpy(bytes, k, width);
  return load_bytes<L>(bytes);
}
template <int width, class L>
CNNFAST_INLINE void write_taps(uint8_t* k, L labels) {
  constexpr int count = sizeof(L) / sizeof(L{}[0]);
  if constexpr (width == count) return store_bytes(k, labels);
  uint8_t bytes[count];
  store_bytes(bytes, labels);
  memcpy(k, bytes, width);
}

// Calls f(number of vectors, first channel, how many of its first lanes are done already) for the channels from c to
// end, at least `width` of them. Fewer lanes than whole_width() are for channels that don't fill one such vector, which
// have no kVecs of theirs.
template <int n>
struct Count {
  static constexpr int value = n;
};
template <class S, Direction direction, int width, class F>
CNNFAST_INLINE void for_each_block(int64_t c, int64_t end, const F& f) {
  if constexpr (width == whole_width<S, direction>())
    for (; c + kVecs * width <= end; c += kVecs * width) f(Count<kVecs>{}, c, int64_t{0});
  while (c < end) {
    const int64_t first = min(c, end - width);
    f(Count<1>{}, first, c - first);
    c = first + width;
  }
}

// ---- the order of the elements --------------------------------------------------------------------------------------

template <class S>
constexpr int16_t kInfinity = 0x7f80;
template <>
constexpr int16_t kInfinity<Float16> = 0x7c00;
constexpr int16_t kNaNKey = 0x7fff;

template <class S, class E>
constexpr E minus_infinity() {
  if constexpr (kSame<E, int16_t>)
    return static_cast<int16_t>(kInfinity<S> - 0x8000);
  else
    return -static_cast<E>(__builtin_inf());
}

// Bits of 16-bit types: sign and magnitude become two's complement, so that -0 equals 0; a NaN is above all others.
template <class S, class E, class V>
CNNFAST_INLINE V key_of(V v) {
  if constexpr (kSame<E, int16_t>) {
    const V sign = v >> 15, magnitude = v & static_cast<int16_t>(0x7fff);
    const V key = (magnitude ^ sign) - sign;
    return magnitude > kInfinity<S> ? V{} + kNaNKey : key;
  } else {
    return v;
  }
}

template <class E, class V>
CNNFAST_INLINE auto exceeds(V key, V best) {
  if constexpr (kSame<E, int16_t>)
    return (key > best) | (key == kNaNKey);
  else
    return (key > best) | (key != key);
}

// ---- windows --------------------------------------------------------------------------------------------------------

// The parameters of an operation and its windows along both axes. An axis has
//   elements(window)   its taps inside the image: begin, begin + step, ... below end
//   extent(window)     what it spans, inside or not; its ends grow with the window
//   windows(element)   those whose extent holds the element
//   most_taps(), most_extent(), step
//   kRegular           whether all windows have `filter` taps, `stride` apart
template <class Params, class Axis>
struct Pooling : Params {
  Axis rows, columns;
  static constexpr bool kRegular = Axis::kRegular;
};

// The labels of a window's taps: the first one's in the image, and what is added from row to row and column to column.
struct Labelling {
  int64_t first, row, column;
};
// By distance in the image, rows being `pitch` apart.
template <class Pool>
CNNFAST_INLINE Labelling by_pixels(const Pool& p, int64_t pitch) {
  return {0, p.rows.step * pitch, p.columns.step};
}
// By number, as k has them, for a window whose taps in the image are `rows` and `columns`.
template <class Pool>
CNNFAST_INLINE Labelling by_taps(const Pool& p, const Span& rows, int64_t row, const Span& columns, int64_t column) {
  const int64_t pitch = p.columns.most_taps();
  const int64_t r = (rows.begin - p.rows.extent(row).begin) / p.rows.step;
  const int64_t s = (columns.begin - p.columns.extent(column).begin) / p.columns.step;
  return {r * pitch + s, pitch, 1};
}

// The maxima of one window in vecs * width channels.
template <class S, int width, int vecs, Direction direction>
struct Maximum {
  using E = Lane<S, direction>;
  using V = Lanes<E, width>;
  using L = Labels<E, width, direction>;
  V key[vecs];
  V value[vecs];  // indices, taps: the element; jvp: the tangent at its place
  L label[vecs];  // indices, taps, dgrad: the maximum's

  // x and t point to the window's first tap inside the image.
  template <class Pool>
  CNNFAST_INLINE void search(const Pool& p, const Span& rows, const Span& columns, const Labelling& labelling,
                             const S* x, const S* t) {
    constexpr bool tangents = direction == Direction::jvp, labels = !tangents;
    const V lowest = V{} + minus_infinity<S, E>();
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) {
      key[v] = key_of<S, E>(lowest);
      value[v] = lowest;
      if constexpr (tangents) value[v] = read<E, width>(t + v * width);
      label[v] = L{} + static_cast<Label<E, direction>>(labelling.first);
    }
    int64_t first = labelling.first;
    const int64_t x_row = p.rows.step * p.x_h, x_step = p.columns.step * p.x_w;
    const int64_t t_row = p.rows.step * p.t_h, t_step = p.columns.step * p.t_w;
    for (int64_t h = rows.begin; h < rows.end; h += p.rows.step, x += x_row, first += labelling.row) {
      const S *from = x, *tangent = t;
      int64_t number = first;
      for (int64_t w = columns.begin; w < columns.end;
           w += p.columns.step, from += x_step, number += labelling.column) {
        const L here = L{} + static_cast<Label<E, direction>>(number);
#pragma GCC unroll 4
        for (int v = 0; v < vecs; ++v) {
          const V element = fetch<S, E, width>(from + v * width), k = key_of<S, E>(element);
          const auto more = exceeds<E>(k, key[v]);
          key[v] = more ? k : key[v];
          if constexpr (tangents)
            value[v] = more ? read<E, width>(tangent + v * width) : value[v];
          else if constexpr (kSame<E, int16_t>)
            value[v] = more ? element : value[v];
          if constexpr (labels) label[v] = __builtin_convertvector(more, L) ? here : label[v];
        }
        if constexpr (tangents) tangent += t_step;
      }
      if constexpr (tangents) t += t_row;
    }
    if constexpr (!tangents && !kSame<E, int16_t>)
      for (int v = 0; v < vecs; ++v) value[v] = key[v];
  }
};

// The maxima of a row of windows, rows first: of each column of taps, then, from those in cache, of each window. R + S
// comparisons a window instead of R*S, in whole vectors whatever the number of channels: what a vector holds beyond a
// pixel's channels is of the next pixel, and not asked for. Keys are float or double.
template <class S, class Pool>
class RowMaxima {
 public:
  using E = Compute<S>;
  static constexpr int kWidth = kVecBytes / static_cast<int>(sizeof(E));
  using V = Lanes<E, kWidth>;
  using L = Labels<E, kWidth>;
  const int pitch_bits;

  // Whether that beats a search window by window.
  static bool pays(const Pool& p) {
    const int64_t rows = p.rows.most_taps(), columns = p.columns.most_taps();
    return p.C < kWidth || rows * columns * p.Q > 2 * (rows * p.W + p.W + 2 * columns * p.Q);
  }

  RowMaxima(const Pool& p, int64_t channels, int bits) : pitch_bits(bits), p_(p), channels_(channels) {}
  void carve(Carver& parts) {
    keys_ = parts.take<E>(p_.W * channels_ + kWidth);
    labels_ = parts.take<Label<E>>(p_.W * channels_ + kWidth);
  }

  // Searches the columns of these rows of an image.
  void search_columns(const S* x, const Span& rows) {
    const bool dense = p_.x_w == channels_;
    const int64_t pixels = dense ? 1 : p_.W, run = dense ? p_.W * channels_ : channels_;
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      const S* from = x + rows.begin * p_.x_h + pixel * p_.x_w;
      for (int64_t i = 0; i < run; i += kWidth) search_column(from + i, rows, pixel * run + i, min(run - i, kWidth));
    }
  }

  // Labels of the maxima in channels c .. c + kWidth - 1 of a window: (row << pitch_bits) + column, from the window's
  // first row and the image's first column.
  CNNFAST_INLINE L search(const Span& columns, int64_t c) const {
    const int64_t first = columns.begin * channels_ + c, step = p_.columns.step * channels_;
    const E* keys = keys_ + first;
    const Label<E>* labels = labels_ + first;
    V best = read<E, kWidth>(keys);
    L label = read<Label<E>, kWidth>(labels) + static_cast<Label<E>>(columns.begin);
    for (int64_t w = columns.begin + p_.columns.step; w < columns.end; w += p_.columns.step) {
      keys += step;
      labels += step;
      const V key = read<E, kWidth>(keys);
      const L here = read<Label<E>, kWidth>(labels) + static_cast<Label<E>>(w);
      // the first of equal elements, the last of NaNs
      const auto more =
          (key > best) | ((key == best) & (here < label)) | ((key != key) & ((best == best) | (here > label)));
      best = more ? key : best;
      label = more ? here : label;
    }
    return label;
  }

 private:
  CNNFAST_INLINE void search_column(const S* x, const Span& rows, int64_t to, int64_t count) {
    const auto at = [count](const S* from) { return count == kWidth ? load_wide(from) : load_wide(from, count); };
    V best = at(x);
    L label{};
    for (int64_t h = rows.begin + p_.rows.step; h < rows.end; h += p_.rows.step) {
      x += p_.rows.step * p_.x_h;
      const V key = at(x);
      const auto more = exceeds<E>(key, best);
      best = more ? key : best;
      label = more ? L{} + static_cast<Label<E>>((h - rows.begin) << pitch_bits) : label;
    }
    write<E, kWidth>(keys_ + to, best);
    write<Label<E>, kWidth>(labels_ + to, label);
  }

  const Pool& p_;
  int64_t channels_;
  E* keys_ = nullptr;
  Label<E>* labels_ = nullptr;
};

}  // namespace
}  // namespace CNNFAST_ISA
}  // namespace cnnfast
