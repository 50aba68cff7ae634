// Maxima over the windows of an image: what max_pool2d and adaptive_max_pool2d share.
//
//   fprop    y[n,p,q,c] = max x[n,h,w,c] over the taps h, w of window p, q
//   indices  the same, and i[n,p,q,c] = h*W + w of the maximum
//   jvp      y[n,p,q,c] = t[n,h,w,c] at the maximum
//   dgrad    t[n,h,w,c] = sum of y[n,p,q,c] over the windows that have their maximum at h, w
//   taps     as fprop, and k[n,p,q,c] = the number of the maximum's tap, a byte
//   scatter  the same as dgrad, from k in place of x
//
// The first of equal elements is the maximum; with NaNs the last NaN is. A window without elements gives -inf (and, as
// in torch, its first tap that isn't above or left of the image as index), 0 in jvp, and nothing to dgrad; its k is
// 255. Tap r, s of a window is number r*S + s, counted from where the window begins, in the image or not, S being the
// most columns that a window has; 255 taps at most.
//
// Mapping: lanes are channels, up to 4 vectors of them a window. Nothing is loaded or stored in part: the last vector
// of a pixel reaches back over channels already done, and channels too few for a vector take 16 bytes, pairs, or one.
// The maximum is tracked as a key: the element itself; of 16-bit types an integer of their order beside the element's
// bits, so that nothing is converted, and in dgrad the float. Where the maximum lies is a label in 32 bits (64 for
// double), counted from the window's first tap; a window spans less than 2^30 pixels. fprop and taps:
// max_pool2d_value.h.
//
// Threads share the rows of the output (dgrad: of t) and, where those are few, the channels. dgrad walks the windows
// that reach into its rows and adds each one's gradient tap by tap, in the lanes that have their maximum there, or
// where a window has many taps lane by lane. Where channels are few, or windows large and overlapping, it searches a
// row of windows at once, rows first, and adds lane by lane. The sums of float and double are t's own elements, cleared
// just ahead of the windows; those of the 16-bit types are float, in a ring of rows that are rounded once and stored
// when the windows have left them. A sum has one owner, who adds in the order of p, q: no atomics, and no dependence on
// the threads. scatter gathers (max_pool2d_gather.h); where windows have many taps it does as dgrad, lane by lane,
// without the search.
//
// Layout: NHWC, any pixel strides.
#pragma once
#include "../common/kernel_table.h"
#include "max_pool2d_gather.h"
#include "max_pool2d_value.h"
#include "primitives/parallel.h"
#include "primitives/scratch.h"
#include "primitives/vec.h"

namespace cnnfast {
namespace CNNFAST_ISA {
namespace {

constexpr int64_t kTapsWorthThreads = 1 << 16;  // below, a parallel region costs more than it saves
constexpr int64_t kSpansAThread = 8;            // with fewer rows of t, in heights of a window, likewise
constexpr int64_t kTapsWorthScatter = 3;        // dgrad, taps a lane: with more, lanes are added one by one
constexpr int64_t kRingBytes = 1 << 19;         // dgrad: sums of a task that stay in cache

template <class Pool>
int useful_threads(const Pool& p, int threads) {
  return p.N * p.P * p.Q * p.C * p.rows.most_taps() * p.columns.most_taps() < kTapsWorthThreads ? 1 : threads;
}

// ---- fprop, indices, jvp --------------------------------------------------------------------------------------------

template <class S, int width, Direction direction, class Pool>
void pool_row(const Pool& p, const Operands<S>& o, int64_t n, int64_t row, Span channels) {
  using E = Lane<S, direction>;
  constexpr bool indices = direction == Direction::indices, tangents = direction == Direction::jvp;
  constexpr bool taps = direction == Direction::taps;
  const Span rows = p.rows.elements(row);
  for (int64_t q = 0; q < p.Q; ++q) {
    const Span columns = p.columns.elements(q);
    const int64_t place = rows.begin * p.W + columns.begin;
    S* y = o.y + n * p.y_n + row * p.y_h + q * p.y_w;
    int64_t* i = indices ? o.i + n * p.i_n + row * p.i_h + q * p.i_w : nullptr;
    uint8_t* k = taps ? o.k + n * p.k_n + row * p.k_h + q * p.k_w : nullptr;
    if (rows.empty() || columns.empty()) {
      const E value = tangents ? E{} : minus_infinity<S, E>();
      for (int64_t c = channels.begin; c < channels.end; ++c) {
        memcpy(static_cast<void*>(y + c), &value, sizeof value);
        if constexpr (indices) i[c] = place;
        if constexpr (taps) k[c] = kNoTap;
      }
      continue;
    }
    const S* x = o.x + n * p.x_n + rows.begin * p.x_h + columns.begin * p.x_w;
    const S* t = tangents ? o.t + n * p.t_n + rows.begin * p.t_h + columns.begin * p.t_w : nullptr;
    const Labelling labelling = taps ? by_taps(p, rows, row, columns, q) : by_pixels(p, p.W);
    for_each_block<S, direction, width>(channels.begin, channels.end, [&](auto count, int64_t c, int64_t) {
      constexpr int vecs = decltype(count)::value;
      Maximum<S, width, vecs, direction> maximum;
      maximum.search(p, rows, columns, labelling, x + c, tangents ? t + c : nullptr);
#pragma GCC unroll 4
      for (int v = 0; v < vecs; ++v) {
        write<E, width>(y + c + v * width, maximum.value[v]);
        if constexpr (taps) write_taps<width>(k + c + v * width, maximum.label[v]);
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
    const int64_t row = task % rows, n = row / p.P, h = row % p.P;
    const Span channels = channels_of({0, p.C}, width, task / rows, parts);
    if constexpr (direction == Direction::fprop || direction == Direction::taps) {
      constexpr bool numbered = direction == Direction::taps;
      Row<S, width, numbered> to{o.y + n * p.y_n + h * p.y_h, numbered ? o.k + n * p.k_n + h * p.k_h : nullptr};
      pool_row_values(p, o.x + n * p.x_n, to, h, channels);
      if constexpr (numbered)
        if (Keys<S, width>::has_nan(to.largest)) pool_row<S, width, direction>(p, o, n, h, channels);
    } else {
      pool_row<S, width, direction>(p, o, n, h, channels);
    }
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
  void carve(Carver& parts) {
    if constexpr (kIs16<S>) ring_ = parts.take<T>((mask_ + 1) * p_.W * channels_);
  }

  int64_t channels() const { return channels_; }
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
  maximum.search(p, rows, columns, by_pixels(p, int64_t{1} << pitch_bits), x, nullptr);
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

// One window of a row that has been searched: each lane goes to its own tap.
template <class S, int width, class Pool>
CNNFAST_INLINE void add_maxima(const RowMaxima<S, Pool>& maxima, const Span& rows, const Span& columns, const S* y,
                               const Sums<S, width, Pool>& sums) {
  constexpr int lanes = RowMaxima<S, Pool>::kWidth;
  using L = Label<Compute<S>>;
  if (columns.empty()) return;
  const int64_t channels = sums.channels();
  for (int64_t c = 0; c < channels; c += lanes) {
    const auto found = maxima.search(columns, c);
    L labels[lanes];
    memcpy(labels, &found, sizeof labels);
    const int64_t count = min(lanes, channels - c);
    for (int64_t l = 0; l < count; ++l) {
      const int64_t h = rows.begin + (labels[l] >> maxima.pitch_bits);
      const int64_t w = labels[l] & ((L{1} << maxima.pitch_bits) - 1);
      if (sums.owns(h)) sums.row(h)[w * sums.pixel + c + l] += widen_one(y[c + l]);
    }
  }
}

// A row of windows whose maxima are known: each lane goes to its tap. What k says is bytes from anywhere: a tap that
// isn't in the image is none.
template <class S, int width, class Pool>
void add_at_taps(const Pool& p, int64_t row, const S* y, const uint8_t* k, const Sums<S, width, Pool>& sums) {
  using T = Compute<S>;
  T* taps[kNoTap + 1] = {};          // of a window that begins in column 0; null: none, or another task's
  int64_t columns[kNoTap + 1] = {};  // of the taps in the window
  const int64_t first = p.rows.extent(row).begin, count = p.columns.most_taps();
  for (int64_t r = 0; r < p.rows.most_taps(); ++r) {
    const int64_t h = first + r * p.rows.step;
    if (!sums.owns(h)) continue;
    for (int64_t s = 0; s < count; ++s) {
      columns[r * count + s] = s * p.columns.step;
      taps[r * count + s] = sums.row(h) + s * p.columns.step * sums.pixel;
    }
  }
  for (int64_t q = 0; q < p.Q; ++q, y += p.y_w, k += p.k_w) {
    const int64_t begin = p.columns.extent(q).begin, at = begin * sums.pixel;
    const bool inside = begin >= 0 && begin + (count - 1) * p.columns.step < p.W;
    for (int64_t c = 0; c < sums.channels(); ++c) {
      T* const to = taps[k[c]];
      if (!to || (!inside && static_cast<uint64_t>(begin + columns[k[c]]) >= static_cast<uint64_t>(p.W))) continue;
      to[at + c] += widen_one(y[c]);
    }
  }
}

// Rows of t of one image, and some channels. The operands are the image's, in those channels.
template <class S, int width, Direction direction, class Pool>
bool dgrad_rows(const Pool& p, const Operands<S>& o, Span rows, int64_t channels) {
  const S *x = o.x, *y = o.y;
  int pitch_bits = 0;
  while (int64_t{1} << pitch_bits < p.W) ++pitch_bits;
  const bool known = direction == Direction::scatter, rows_first = !known && RowMaxima<S, Pool>::pays(p);
  Sums<S, width, Pool> sums(p, o.t, rows, channels);
  RowMaxima<S, Pool> maxima(p, channels, pitch_bits);
  const auto carve = [&](Carver& parts) {
    sums.carve(parts);
    if (rows_first) maxima.carve(parts);
  };
  Carver sizes(nullptr);
  carve(sizes);
  if (sizes.used() > 0) {
    void* scratch = thread_scratch(sizes.used());
    if (!scratch) return false;
    Carver parts(scratch);
    carve(parts);
  }
  const Span windows{p.rows.windows(rows.begin).begin, p.rows.windows(rows.end - 1).end};
  for (int64_t row = windows.begin; row < windows.end; ++row) {
    const Span extent = p.rows.extent(row);
    const Span taps = p.rows.elements(row);
    sums.move(extent.begin, extent.end);
    if (taps.empty()) continue;
    if constexpr (direction == Direction::scatter) {
      add_at_taps(p, row, y + row * p.y_h, o.k + row * p.k_h, sums);
      continue;
    }
    if (rows_first) {
      maxima.search_columns(x, taps);
      const S* gradient = y + row * p.y_h;
      for (int64_t q = 0; q < p.Q; ++q, gradient += p.y_w)
        add_maxima(maxima, taps, p.columns.elements(q), gradient, sums);
      continue;
    }
    for (int64_t q = 0; q < p.Q; ++q) {
      const Span columns = p.columns.elements(q);
      if (columns.empty()) continue;
      const S* from = x + taps.begin * p.x_h + columns.begin * p.x_w;
      const S* gradient = y + row * p.y_h + q * p.y_w;
      for_each_block<S, Direction::dgrad, width>(0, channels, [&](auto count, int64_t c, int64_t done) {
        add_window<S, width, decltype(count)::value>(p, taps, columns, pitch_bits, from + c, gradient + c, sums, c,
                                                     done);
      });
    }
  }
  sums.finish();
  return true;
}

template <class S, int width, Direction direction, class Pool>
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
      // A ring, and a row of maxima, that stay in cache.
      const int64_t vecs = (channels.end - channels.begin) / width;
      const bool rows_first = direction == Direction::dgrad && RowMaxima<S, Pool>::pays(p);
      const int64_t pixel = (kIs16<S> ? min(span, p.H) * 4 : 0) + (rows_first ? 8 : 0);
      const int64_t fit = pixel ? max(1, kRingBytes / (pixel * p.W * width)) : vecs;
      const int64_t blocks = ceil_div(vecs, fit);
      for (int64_t block = 0; block < blocks; ++block) {
        const Span c = channels_of(channels, width, block, blocks);
        const Operands<S> image{o.x + n * p.x_n + c.begin, o.y + n * p.y_n + c.begin, nullptr,
                                o.t + n * p.t_n + c.begin, o.k + n * p.k_n + c.begin};
        if (!dgrad_rows<S, width, direction>(p, image, {h, h_end}, c.end - c.begin))
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
  if constexpr (direction == Direction::scatter)
    if (gather_pays<width>(p)) return gather<S, width>(p, o, threads);
  if constexpr (direction == Direction::dgrad || direction == Direction::scatter)
    return dgrad<S, width, direction>(p, o, threads);
  else
    return pool<S, width, direction>(p, o, threads);
}

// A direction of a pooling.
template <class S, Direction direction, class Pool>
const char* launch_pooling(const Pool& p, const Launch& l) {
  using E = Lane<S, direction>;
  constexpr int small = kSmallVecBytes / sizeof(E), whole = whole_width<S, direction>();
  const Operands<S> o{static_cast<const S*>(l.operands[0]), static_cast<S*>(l.operands[1]),
                      static_cast<int64_t*>(l.operands[2]), static_cast<S*>(l.operands[3]),
                      static_cast<uint8_t*>(l.operands[4])};
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
