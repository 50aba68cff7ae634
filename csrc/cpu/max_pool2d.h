// Maxima over the windows of an image: what max_pool2d and adaptive_max_pool2d share.
//
//   fprop    y[n,p,q,c] = max x[n,h,w,c] over the taps h, w of window p, q
//   indices  the same, and i[n,p,q,c] = h*W + w of the maximum
//   jvp      y[n,p,q,c] = t[n,h,w,c] at the maximum
//   dgrad    t[n,h,w,c] = sum of y[n,p,q,c] over the windows that have their maximum at h, w
//
// The first of equal elements is the maximum; with NaNs the last NaN is. A window without elements gives -inf (and, as
// in torch, its first tap that isn't above or left of the image as index), 0 in jvp, and nothing to dgrad.
//
// Mapping: lanes are channels, up to 4 vectors of them a window. Nothing is loaded or stored in part: the last vector
// of a pixel reaches back over channels already done, and channels too few for a vector take 16 bytes, pairs, or one.
// The maximum is tracked as a key: the element itself; of 16-bit types an integer of their order beside the element's
// bits, so that nothing is converted, and in dgrad the float. Where the maximum lies is a label in 32 bits (64 for
// double), counted from the window's first tap; a window spans less than 2^30 pixels.
//
// Threads share the rows of the output (dgrad: of t) and, where those are few, the channels. dgrad walks the windows
// that reach into its rows and adds each one's gradient tap by tap, in the lanes that have their maximum there, or
// where a window has many taps lane by lane. The sums of float and double are t's own elements, cleared just ahead of
// the windows; those of the 16-bit types are float, in a ring of rows that are rounded once and stored when the windows
// have left them. A sum has one owner, who adds in the order of p, q: no atomics, and no dependence on the threads.
//
// Layout: NHWC, any pixel strides.
#pragma once
#include "../common/kernel_table.h"
#include "pool_windows.h"
#include "primitives/parallel.h"
#include "primitives/scratch.h"
#include "primitives/vec.h"

namespace cnnfast {
namespace CNNFAST_ISA {
namespace {

constexpr int kVecs = 4;                        // vectors of channels at a time
constexpr int kSmallVecBytes = 16;              // where the channels don't fill a whole vector
constexpr int64_t kTapsWorthThreads = 1 << 16;  // below, a parallel region costs more than it saves
constexpr int64_t kRowsAThread = 4;             // with fewer rows of the output threads share channels, too
constexpr int64_t kSpansAThread = 8;            // with fewer rows of t, in heights of a window, likewise
constexpr int64_t kTapsWorthScatter = 3;        // dgrad, taps a lane: with more, lanes are added one by one
constexpr int64_t kRingBytes = 1 << 19;         // dgrad: sums of a task that stay in cache

enum class Direction { fprop, indices, jvp, dgrad };

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

// What a lane holds: the element; of 16-bit types its bits, in dgrad, which needs float sums, its float.
template <class S, Direction direction>
constexpr auto lane() {
  if constexpr (!kIs16<S>)
    return S{};
  else if constexpr (direction == Direction::dgrad)
    return float{};
  else
    return int16_t{};
}
template <class S, Direction direction>
using Lane = decltype(lane<S, direction>());

// As many labels as lanes, of their size or more.
template <class E>
constexpr auto label() {
  if constexpr (kSame<E, double>)
    return int64_t{};
  else
    return int32_t{};
}
template <class E>
using Label = decltype(label<E>());
template <class E, int width>
using Labels = typename LanesOf<Label<E>, LanesOf<E, width>::count>::Type;

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
template <class Params, class Axis>
struct Pooling : Params {
  Axis rows, columns;
};

// The maxima of one window in vecs * width channels.
template <class S, int width, int vecs, Direction direction>
struct Maximum {
  using E = Lane<S, direction>;
  using V = Lanes<E, width>;
  using L = Labels<E, width>;
  V key[vecs];
  V value[vecs];  // fprop, indices: the element; jvp: the tangent at its place
  L label[vecs];  // indices, dgrad: rows * pitch + columns from the window's first tap

  // x and t point to the window's first tap inside the image.
  template <class Pool>
  CNNFAST_INLINE void search(const Pool& p, const Span& rows, const Span& columns, int64_t pitch, const S* x,
                             const S* t) {
    constexpr bool tangents = direction == Direction::jvp;
    constexpr bool labels = direction == Direction::indices || direction == Direction::dgrad;
    const V lowest = V{} + minus_infinity<S, E>();
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) {
      key[v] = key_of<S, E>(lowest);
      value[v] = lowest;
      if constexpr (tangents) value[v] = read<E, width>(t + v * width);
      label[v] = L{};
    }
    const int64_t x_row = p.rows.step * p.x_h, x_step = p.columns.step * p.x_w;
    const int64_t t_row = p.rows.step * p.t_h, t_step = p.columns.step * p.t_w;
    for (int64_t h = rows.begin; h < rows.end; h += p.rows.step, x += x_row) {
      const S *from = x, *tangent = t;
      for (int64_t w = columns.begin; w < columns.end; w += p.columns.step, from += x_step) {
        const L here = L{} + static_cast<Label<E>>((h - rows.begin) * pitch + w - columns.begin);
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

// Calls f(number of vectors, first channel, how many of its first lanes are done already) for the channels from c to
// end, at least `width` of them.
template <int n>
struct Count {
  static constexpr int value = n;
};
template <int width, class F>
CNNFAST_INLINE void for_each_block(int64_t c, int64_t end, const F& f) {
  for (; c + kVecs * width <= end; c += kVecs * width) f(Count<kVecs>{}, c, 0);
  for (; c + width <= end; c += width) f(Count<1>{}, c, 0);
  if (c < end) f(Count<1>{}, end - width, c - (end - width));
}

// Channels in `parts` parts that hold at least one vector each.
CNNFAST_INLINE Span channels_of(Span all, int width, int64_t part, int64_t parts) {
  const int64_t vecs = (all.end - all.begin) / width;
  return {all.begin + vecs * part / parts * width,
          part + 1 == parts ? all.end : all.begin + vecs * (part + 1) / parts * width};
}

template <class Pool>
int useful_threads(const Pool& p, int threads) {
  return p.N * p.P * p.Q * p.C * p.rows.most_taps() * p.columns.most_taps() < kTapsWorthThreads ? 1 : threads;
}

// ---- fprop, indices, jvp --------------------------------------------------------------------------------------------

template <class S>
struct Operands {
  const S* x;
  S* y;
  int64_t* i;
  S* t;
};

template <class S, int width, Direction direction, class Pool>
void pool_row(const Pool& p, const Operands<S>& o, int64_t n, int64_t row, Span channels) {
  using E = Lane<S, direction>;
  constexpr bool indices = direction == Direction::indices, tangents = direction == Direction::jvp;
  const Span rows = p.rows.elements(row);
  for (int64_t q = 0; q < p.Q; ++q) {
    const Span columns = p.columns.elements(q);
    const int64_t place = rows.begin * p.W + columns.begin;
    S* y = o.y + n * p.y_n + row * p.y_h + q * p.y_w;
    int64_t* i = indices ? o.i + n * p.i_n + row * p.i_h + q * p.i_w : nullptr;
    if (rows.empty() || columns.empty()) {
      const E value = tangents ? E{} : minus_infinity<S, E>();
      for (int64_t c = channels.begin; c < channels.end; ++c) {
        memcpy(static_cast<void*>(y + c), &value, sizeof value);
        if constexpr (indices) i[c] = place;
      }
      continue;
    }
    const S* x = o.x + n * p.x_n + rows.begin * p.x_h + columns.begin * p.x_w;
    const S* t = tangents ? o.t + n * p.t_n + rows.begin * p.t_h + columns.begin * p.t_w : nullptr;
    for_each_block<width>(channels.begin, channels.end, [&](auto count, int64_t c, int64_t) {
      constexpr int vecs = decltype(count)::value;
      Maximum<S, width, vecs, direction> maximum;
      maximum.search(p, rows, columns, p.W, x + c, tangents ? t + c : nullptr);
#pragma GCC unroll 4
      for (int v = 0; v < vecs; ++v) {
        write<E, width>(y + c + v * width, maximum.value[v]);
        if constexpr (indices) {
          Label<E> labels[LanesOf<E, width>::count];
          memcpy(labels, &maximum.label[v], sizeof labels);
          for (int l = 0; l < width; ++l) i[c + v * width + l] = place + labels[l];
        }
      }
    });
  }
}

template <class S, int width, Direction direction, class Pool>
const char* pool(const Pool& p, const Operands<S>& o, int threads) {
  const int64_t rows = p.N * p.P, parts = rows < kRowsAThread * threads ? min(threads, p.C / width) : 1;
  parallel_for(threads, rows * parts, [&](int64_t task) {
    const int64_t row = task % rows;
    pool_row<S, width, direction>(p, o, row / p.P, row % p.P, channels_of({0, p.C}, width, task / rows, parts));
  });
  return nullptr;
}

// ---- dgrad ----------------------------------------------------------------------------------------------------------

// The sums of some channels of an image's rows begin .. end - 1: t itself, or a ring of float rows.
template <class S, int width, class Pool>
class Sums {
 public:
  using T = Compute<S>;
  int64_t pixel;  // elements between pixels

  Sums(const Pool& p, S* t, Span rows, int64_t channels) : p_(p), t_(t), rows_(rows), channels_(channels) {
    pixel = kIs16<S> ? channels : p.t_w;
    while (mask_ + 1 < min(p.rows.most_extent(), rows.size())) mask_ = 2 * mask_ + 1;
    opened_ = closed_ = rows.begin;
  }
  bool allocate() {
    if constexpr (kIs16<S>) {
      ring_ = static_cast<T*>(thread_scratch(static_cast<size_t>((mask_ + 1) * p_.W * channels_) * sizeof(T)));
      return ring_ != nullptr;
    }
    return true;
  }

  CNNFAST_INLINE bool owns(int64_t h) const { return h >= rows_.begin && h < rows_.end; }
  CNNFAST_INLINE T* row(int64_t h) const {
    if constexpr (kIs16<S>)
      return ring_ + (h & mask_) * p_.W * channels_;
    else
      return t_ + h * p_.t_h;
  }

  // From now on windows only reach rows from .. to - 1; both only ever grow.
  void move(int64_t from, int64_t to) {
    from = max(rows_.begin, min(from, rows_.end));
    to = max(rows_.begin, min(to, rows_.end));
    for (; closed_ < from; ++closed_) {
      if (closed_ >= opened_)
        clear_t(closed_);
      else if constexpr (kIs16<S>)
        round(closed_);
    }
    for (opened_ = max(opened_, from); opened_ < to; ++opened_) {
      if constexpr (kIs16<S>)
        memset(row(opened_), 0, static_cast<size_t>(p_.W * channels_) * sizeof(T));
      else
        clear_t(opened_);
    }
  }
  void finish() { move(rows_.end, rows_.end); }

 private:
  // A row of t as one run where its pixels are neighbours.
  template <class F>
  void for_each_run(int64_t h, const F& f) {
    S* row = t_ + h * p_.t_h;
    if (p_.t_w == channels_) return f(row, int64_t{0}, p_.W * channels_);
    for (int64_t w = 0; w < p_.W; ++w) f(row + w * p_.t_w, w * channels_, channels_);
  }
  void clear_t(int64_t h) {
    for_each_run(
        h, [](S* to, int64_t, int64_t n) { memset(static_cast<void*>(to), 0, static_cast<size_t>(n) * sizeof(S)); });
  }
  void round(int64_t h) {
    const T* sums = row(h);
    for_each_run(h, [sums](S* to, int64_t offset, int64_t n) {
      const T* from = sums + offset;
      int64_t i = 0;
      for (; i + kLanes<T> <= n; i += kLanes<T>) store_narrow(to + i, load(from + i));
      if (i < n) store_narrow(to + i, load_partial(from + i, n - i), n - i);
    });
  }

  const Pool& p_;
  S* t_;
  Span rows_;
  int64_t channels_;
  T* ring_ = nullptr;
  int64_t mask_ = 0;
  int64_t opened_, closed_;  // rows below have been cleared; are done
};

// One window: adds its gradient to the sums. The first `done` lanes are left out.
template <class S, int width, int vecs, class Pool>
CNNFAST_INLINE void add_window(const Pool& p, const Span& rows, const Span& columns, int pitch_bits, const S* x,
                               const S* y, const Sums<S, width, Pool>& sums, int64_t c, int64_t done) {
  using E = Compute<S>;
  using V = Lanes<E, width>;
  using L = Labels<E, width>;
  constexpr int count = LanesOf<E, width>::count;
  Maximum<S, width, vecs, Direction::dgrad> maximum;
  maximum.search(p, rows, columns, int64_t{1} << pitch_bits, x, nullptr);
  V gradient[vecs];
#pragma GCC unroll 4
  for (int v = 0; v < vecs; ++v) gradient[v] = fetch<S, E, width>(y + v * width);

  if ((rows.end - rows.begin) * (columns.end - columns.begin) >
      kTapsWorthScatter * width * p.rows.step * p.columns.step) {
    // Many taps: each lane goes to its own.
    for (int v = 0; v < vecs; ++v) {
      Label<E> labels[count];
      E addends[count];
      memcpy(labels, &maximum.label[v], sizeof labels);
      memcpy(addends, &gradient[v], sizeof addends);
      for (int l = static_cast<int>(done); l < width; ++l) {
        const int64_t h = rows.begin + (labels[l] >> pitch_bits);
        const int64_t w = columns.begin + (labels[l] & ((Label<E>{1} << pitch_bits) - 1));
        if (sums.owns(h)) sums.row(h)[w * sums.pixel + c + v * width + l] += addends[l];
      }
    }
    return;
  }
  if (done > 0) {
    for (int l = 0; l < width; ++l)
      if (l < done) gradient[0][l] = 0;
  }
  const int64_t step = p.columns.step * sums.pixel;
  for (int64_t h = rows.begin; h < rows.end; h += p.rows.step) {
    if (!sums.owns(h)) continue;
    E* to = sums.row(h) + columns.begin * sums.pixel + c;
    for (int64_t w = columns.begin; w < columns.end; w += p.columns.step, to += step) {
      const L here = L{} + static_cast<Label<E>>(((h - rows.begin) << pitch_bits) + w - columns.begin);
#pragma GCC unroll 4
      for (int v = 0; v < vecs; ++v) {
        const V part = maximum.label[v] == here ? gradient[v] : V{};
        write<E, width>(to + v * width, read<E, width>(to + v * width) + part);
      }
    }
  }
}

// Rows of t of one image, and some channels.
template <class S, int width, class Pool>
bool dgrad_rows(const Pool& p, const S* x, const S* y, S* t, Span rows, int64_t channels) {
  Sums<S, width, Pool> sums(p, t, rows, channels);
  if (!sums.allocate()) return false;
  const Span windows{p.rows.windows(rows.begin).begin, p.rows.windows(rows.end - 1).end};
  int pitch_bits = 0;
  while (int64_t{1} << pitch_bits < p.W) ++pitch_bits;
  for (int64_t row = windows.begin; row < windows.end; ++row) {
    const Span extent = p.rows.extent(row);
    const Span taps = p.rows.elements(row);
    sums.move(extent.begin, extent.end);
    if (taps.empty()) continue;
    for (int64_t q = 0; q < p.Q; ++q) {
      const Span columns = p.columns.elements(q);
      if (columns.empty()) continue;
      const S* from = x + taps.begin * p.x_h + columns.begin * p.x_w;
      const S* gradient = y + row * p.y_h + q * p.y_w;
      for_each_block<width>(0, channels, [&](auto count, int64_t c, int64_t done) {
        add_window<S, width, decltype(count)::value>(p, taps, columns, pitch_bits, from + c, gradient + c, sums, c,
                                                     done);
      });
    }
  }
  sums.finish();
  return true;
}

template <class S, int width, class Pool>
const char* dgrad(const Pool& p, const Operands<S>& o, int threads) {
  // Windows across the border of two tasks' rows are searched by both.
  const int64_t rows = p.N * p.H, span = p.rows.most_extent();
  const bool by_rows = p.N >= threads || rows >= kSpansAThread * span * threads;
  const int64_t parts = by_rows ? 1 : min(threads, p.C / width), row_parts = min(rows, ceil_div(threads, parts));
  bool no_memory = false;
  parallel_for(threads, parts * row_parts, [&](int64_t task) {
    const int64_t part = task / row_parts, first = task % row_parts;
    const Span channels = channels_of({0, p.C}, width, part, parts);
    const int64_t end = rows * (first + 1) / row_parts;
    for (int64_t begin = rows * first / row_parts; begin < end;) {
      const int64_t n = begin / p.H, h = begin % p.H, h_end = min(p.H, h + end - begin);
      // A ring that stays in cache.
      const int64_t vecs = (channels.end - channels.begin) / width;
      const int64_t fit = kIs16<S> ? max(1, kRingBytes / (min(span, p.H) * p.W * width * 4)) : vecs;
      const int64_t blocks = ceil_div(vecs, fit);
      for (int64_t block = 0; block < blocks; ++block) {
        const Span c = channels_of(channels, width, block, blocks);
        if (!dgrad_rows<S, width>(p, o.x + n * p.x_n + c.begin, o.y + n * p.y_n + c.begin, o.t + n * p.t_n + c.begin,
                                  {h, h_end}, c.end - c.begin))
          __atomic_store_n(&no_memory, true, __ATOMIC_RELAXED);
      }
      begin += h_end - h;
    }
  });
  return no_memory ? "out of memory" : nullptr;
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <class S, int width, Direction direction, class Pool>
const char* run(const Pool& p, const Operands<S>& o, int threads) {
  if constexpr (direction == Direction::dgrad)
    return dgrad<S, width>(p, o, threads);
  else
    return pool<S, width, direction>(p, o, threads);
}

// A direction of a pooling.
template <class S, Direction direction, class Pool>
const char* launch_pooling(const Pool& p, const Launch& l) {
  using E = Lane<S, direction>;
  constexpr int small = kSmallVecBytes / sizeof(E);
  // A vector of labels is the widest of indices: 32 bits for 16-bit types.
  constexpr int lanes = direction == Direction::indices ? kVecBytes / sizeof(Label<E>) : kVecBytes / sizeof(E);
  constexpr int whole = lanes < small ? small : lanes;
  const Operands<S> o{static_cast<const S*>(l.operands[0]), static_cast<S*>(l.operands[1]),
                      static_cast<int64_t*>(l.operands[2]), static_cast<S*>(l.operands[3])};
  const int threads = useful_threads(p, l.threads);
  if (p.N * p.C * p.P * p.Q == 0) return nullptr;
  if (p.C >= whole) return run<S, whole, direction>(p, o, threads);
  if (p.C >= small) return run<S, small, direction>(p, o, threads);
  if (p.C >= 2) return run<S, 2, direction>(p, o, threads);
  return run<S, 1, direction>(p, o, threads);
}

}  // namespace
}  // namespace CNNFAST_ISA
}  // namespace cnnfast
