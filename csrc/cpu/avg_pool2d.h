// Averages over the windows of an image, and their gradient: what avg_pool2d and adaptive_avg_pool2d share.
//
//   fprop   y[n,p,q,c] = sum of x[n,h,w,c] over the elements h, w of window p, q, over its divisor
//   dgrad   x[n,h,w,c] = sum of y[n,p,q,c] over the windows p, q that cover h, w, each over its divisor
//
// Both gather: an element of the result has one owner, who adds its addends in their order. No atomics, and no
// dependence on the threads.
//
// Mapping: threads share the rows of the result and, where those are few, the channels. Three ways to a row:
//   direct      lanes are channels, up to 4 vectors of them an element of the result, its addends one after another.
//               The last vector of a pixel reaches back over channels already done: nothing is loaded in part.
//   walk        the same where 2 or 3 columns of addends overlap: the sums of the last columns stay in registers.
//   separable   the addends' rows are added up first, as one run over W*C, whatever C is; then, from that row in cache,
//               the columns. For channels that don't fill a vector, and for windows that overlap so much that R + S
//               additions beat R*S. What a vector holds beyond a pixel's channels is overwritten by the next pixel.
//
// Accumulator: float; double for double. Sums are nested, 16 addends a level: the error of a mean over a whole image
// stays that of a few roundings (N. Higham, The accuracy of floating point summation, 1993). fprop divides once; dgrad
// multiplies each addend by its divisor's reciprocal, so that no sum is larger than in torch, which divides first.
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

constexpr int kVecs = 4;                           // vectors of channels at a time
constexpr int64_t kFan = 16;                       // addends a level of a nested sum
constexpr int kLevels = 4;                         // levels above the first
constexpr int64_t kAddendsWorthThreads = 1 << 16;  // below, a parallel region costs more than it saves
constexpr int64_t kRowsAThread = 4;                // with fewer rows of the result threads share channels, too
constexpr int64_t kRowBytes = 1 << 18;             // separable: a row of sums that stays in cache
constexpr int64_t kWalkBytes = 1 << 13;            // walk: of a row that one block of channels goes along
constexpr int64_t kLeastWalk = 8;                  // elements of the result

// One call, seen as a gather from `in` to `out`.
template <class S, class Axis>
struct Gather {
  int64_t images, channels;
  Axis rows, columns;
  const S* in;
  S* out;
  int64_t in_n, in_h, in_w, out_n, out_h, out_w;
};

template <bool gradient, class Axis>
CNNFAST_INLINE Span addends_of(const Axis& axis, int64_t result) {
  if constexpr (gradient)
    return axis.windows(result);
  else
    return axis.elements(result);
}
template <bool gradient, class Axis>
CNNFAST_INLINE int64_t most_addends(const Axis& axis) {
  return gradient ? axis.most_windows() : axis.most_elements();
}
template <bool gradient, class Axis>
CNNFAST_INLINE int64_t results_of(const Axis& axis) {
  return gradient ? axis.size : axis.outputs;
}
template <bool gradient, class Axis>
CNNFAST_INLINE int64_t sources_of(const Axis& axis) {
  return gradient ? axis.outputs : axis.size;
}

// ---- sums -----------------------------------------------------------------------------------------------------------

// A sum of sums of kFan addends, of kFan of those, and so on.
template <class T, int vecs>
struct Nested {
  Vec<T> level[kLevels][vecs] = {};
  int64_t count = 0;

  CNNFAST_INLINE void add(const Vec<T>* part) {
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) level[0][v] += part[v];
    if (++count % kFan == 0) carry();
  }
  void carry() {
    int64_t n = count;
    for (int l = 0; l + 1 < kLevels && n % kFan == 0; ++l, n /= kFan) {
      for (int v = 0; v < vecs; ++v) {
        level[l + 1][v] += level[l][v];
        level[l][v] = Vec<T>{};
      }
    }
  }
  CNNFAST_INLINE void total(Vec<T>* sum) const {
    for (int v = 0; v < vecs; ++v) {
      sum[v] = level[0][v];
      for (int l = 1; l < kLevels; ++l) sum[v] += level[l][v];
    }
  }
};

// What sums are divided by.
template <class T>
struct Divisor {
  T value, inverse;
  explicit Divisor(T d) : value(d), inverse(T{1} / d) {}

  // sum / value, correctly rounded: a division takes as long as a window of 16 addends, this as one of 5. The quotient
  // by the reciprocal is an ulp off at most; its remainder, exact in one fused operation, corrects it (P. Markstein,
  // IBM J. Res. Dev. 34, 1990). An infinity has no remainder.
  CNNFAST_INLINE Vec<T> quotient(Vec<T> sum) const {
#if defined(__FMA__)
    const Vec<T> near = sum * inverse, corrected = near + (sum - near * value) * inverse;
    return near - near == Vec<T>{} ? corrected : near;
#else
    return sum / value;
#endif
  }
};

// Calls f(number of vectors, first channel) for channels.begin .. channels.end - 1, at least a vector of them.
template <int n>
struct Count {
  static constexpr int value = n;
};
template <int width, class F>
CNNFAST_INLINE void for_each_block(Span channels, const F& f) {
  int64_t c = channels.begin;
  for (; c + kVecs * width <= channels.end; c += kVecs * width) f(Count<kVecs>{}, c);
  for (; c + width <= channels.end; c += width) f(Count<1>{}, c);
  if (c < channels.end) f(Count<1>{}, channels.end - width);
}

// Pixels as one run where they are neighbours: calls f(offset in memory, offset in a dense row, elements).
template <class F>
CNNFAST_INLINE void for_each_run(int64_t pixels, int64_t stride, int64_t channels, const F& f) {
  if (stride == channels) return f(int64_t{0}, int64_t{0}, pixels * channels);
  for (int64_t i = 0; i < pixels; ++i) f(i * stride, i * channels, channels);
}

// ---- a task: some rows of the result and some channels
// ----------------------------------------------------------------

template <class S, bool gradient, class Axis>
class Task {
 public:
  using T = Compute<S>;
  static constexpr int kWidth = kLanes<T>;

  Task(const Gather<S, Axis>& g, Span channels)
      : g_(g),
        channels_(channels),
        results_(results_of<gradient>(g.columns)),
        sources_(sources_of<gradient>(g.columns)) {
    const int64_t rows = most_addends<gradient>(g.rows), columns = most_addends<gradient>(g.columns);
    separable_ =
        channels.size() < kWidth || rows * columns * results_ > 2 * (rows * sources_ + sources_ + columns * results_);
    const int64_t row = max(sources_, results_) * static_cast<int64_t>(sizeof(T));
    block_ = min(channels.size(), max(kRowBytes / row / kWidth, kVecs) * kWidth);
  }

  bool allocate() {
    Carver sizes(nullptr);
    carve(sizes);
    Carver parts(thread_scratch(sizes.used()));
    if (parts.used() == 0) return false;
    carve(parts);
    for (int64_t i = 0; i < results_; ++i) addends_[i] = addends_of<gradient>(g_.columns, i);
    for (int64_t i = 0; i < g_.columns.outputs; ++i) column_divisors_[i] = static_cast<T>(g_.columns.divisor(i));
    for (int64_t i = 0; i < g_.rows.outputs; ++i) row_divisors_[i] = static_cast<T>(g_.rows.divisor(i));
    return true;
  }

  void row(int64_t n, int64_t h) {
    const S* in = g_.in + n * g_.in_n;
    S* out = g_.out + n * g_.out_n + h * g_.out_h;
    const Span rows = addends_of<gradient>(g_.rows, h);
    if constexpr (gradient)
      if (!separable_) weigh(rows);
    if constexpr (Axis::kRegular) {
      const int64_t filter = g_.columns.filter, stride = g_.columns.stride;
      if (!separable_ && rows.size() * filter <= kFan) {
        if (filter == 3 && stride == 1) return walk_row<3, 1>(in, out, h, rows);
        if (filter == 2 && stride == 1) return walk_row<2, 1>(in, out, h, rows);
        if (!gradient && filter == 3 && stride == 2) return walk_row<3, 2>(in, out, h, rows);
      }
    }
    if (!separable_) return direct(in, out, h, rows, channels_);
    for (int64_t c = channels_.begin; c < channels_.end; c += block_)
      separable(in, out, h, rows, {c, min(c + block_, channels_.end)});
  }

 private:
  void carve(Carver& parts) {
    addends_ = parts.take<Span>(results_);
    column_divisors_ = parts.take<T>(g_.columns.outputs);
    row_divisors_ = parts.take<T>(g_.rows.outputs);
    if (gradient && !separable_) weights_ = parts.take<T>(most_addends<gradient>(g_.rows) * sources_);
    if (!separable_) return;
    sums_ = parts.take<T>(sources_ * block_ + kWidth);
    results_row_ = parts.take<T>(results_ * block_ + kWidth);
    if constexpr (gradient) inverse_ = parts.take<T>(sources_ * block_ + kWidth);
  }

  void direct(const S* in, S* out, int64_t h, Span rows, Span channels) {
    for (int64_t i = 0; i < results_; ++i, out += g_.out_w) {
      const Span columns = addends_[i];
      const S* from = in + rows.begin * g_.in_h + columns.begin * g_.in_w;
      const Divisor<T> divisor(gradient ? T{1} : row_divisors_[h] * column_divisors_[i]);
      for_each_block<kWidth>(channels, [&](auto count, int64_t c) {
        constexpr int vecs = decltype(count)::value;
        Vec<T> sum[vecs] = {};
        if (rows.size() * columns.size() <= kFan) {
          add(sum, from + c, weights_, rows.size(), columns);
        } else {
          Nested<T, vecs> nested;
          for (int64_t r = rows.begin; r < rows.end; ++r) {
            for (int64_t q = columns.begin; q < columns.end; q += kFan) {
              Vec<T> part[vecs] = {};
              add(part, in + r * g_.in_h + q * g_.in_w + c, gradient ? weights_ + (r - rows.begin) * sources_ : nullptr,
                  1, {q, min(q + kFan, columns.end)});
              nested.add(part);
            }
          }
          nested.total(sum);
        }
#pragma GCC unroll 4
        for (int v = 0; v < vecs; ++v) store_narrow(out + c + v * kWidth, gradient ? sum[v] : divisor.quotient(sum[v]));
      });
    }
  }

  template <int vecs>
  CNNFAST_INLINE void add(Vec<T> (&sum)[vecs], const S* from, const T* weights, int64_t rows, Span columns) const {
    for (int64_t r = 0; r < rows; ++r, from += g_.in_h) {
      const S* p = from;
      for (int64_t q = columns.begin; q < columns.end; ++q, p += g_.in_w) {
#pragma GCC unroll 4
        for (int v = 0; v < vecs; ++v) {
          const Vec<T> addend = load_wide(p + v * kWidth);
          sum[v] += gradient ? addend * weights[q] : addend;
        }
      }
      if constexpr (gradient) weights += sources_;
    }
  }

  // weights_ = the reciprocals of the divisors of some rows of windows.
  void weigh(Span rows) {
    T* to = weights_;
    for (int64_t r = rows.begin; r < rows.end; ++r, to += sources_)
      for (int64_t q = 0; q < sources_; ++q) to[q] = T{1} / (row_divisors_[r] * column_divisors_[q]);
  }

  // Elements of the result that add up `filter` columns each, the next one's `step` further.
  template <int filter, int step>
  void walk_row(const S* in, S* out, int64_t h, Span rows) {
    const S* from = in + rows.begin * g_.in_h;
    const int64_t size = static_cast<int64_t>(sizeof(S));
    const int64_t some = max(kLeastWalk, kWalkBytes / (channels_.size() * step * size));
    for (int64_t i = 0; i < results_; i += some)
      for_each_block<kWidth>(channels_, [&](auto count, int64_t c) {
        walk<decltype(count)::value, filter, step>(from + c, out + c, h, rows.size(), i, min(i + some, results_));
      });
  }

  template <int vecs, int filter, int step>
  CNNFAST_INLINE void walk(const S* in, S* out, int64_t h, int64_t rows, int64_t first, int64_t last) const {
    constexpr int shared = filter - step;
    Vec<T> columns[filter][vecs];
    const auto find = [&](int i, int64_t column) {
#pragma GCC unroll 4
      for (int v = 0; v < vecs; ++v) columns[i][v] = Vec<T>{};
      if (column >= 0 && column < sources_)
        add(columns[i], in + column * g_.in_w, weights_, rows, {column, column + 1});
    };
    int64_t column = first * step - (gradient ? filter - 1 - g_.columns.pad : g_.columns.pad);
#pragma GCC unroll 3
    for (int i = 0; i < shared; ++i) find(i, column + i);
    for (int64_t result = first; result < last; ++result, column += step) {
#pragma GCC unroll 3
      for (int i = shared; i < filter; ++i) find(i, column + i);
      const Divisor<T> divisor(gradient ? T{1} : row_divisors_[h] * column_divisors_[result]);
#pragma GCC unroll 4
      for (int v = 0; v < vecs; ++v) {
        Vec<T> sum = columns[0][v];
#pragma GCC unroll 3
        for (int i = 1; i < filter; ++i) sum += columns[i][v];
        store_narrow(out + result * g_.out_w + v * kWidth, gradient ? sum : divisor.quotient(sum));
#pragma GCC unroll 3
        for (int i = 0; i < shared; ++i) columns[i][v] = columns[i + step][v];
      }
    }
  }

  void separable(const S* in, S* out, int64_t h, Span rows, Span channels) {
    const int64_t n = channels.size();
    add_rows(in + channels.begin, rows, n);
    T* result = results_row_;
    for (int64_t i = 0; i < results_; ++i, result += n) {
      const Span columns = addends_[i];
      const Divisor<T> divisor(gradient ? T{1} : row_divisors_[h] * column_divisors_[i]);
      for (int64_t c = 0; c < n; c += kWidth) {
        Vec<T> sum{};
        const T* from = sums_ + columns.begin * n + c;
        int64_t left = columns.size();
        for (; left > kFan; left -= kFan) {
          Vec<T> part{};
          for (const T* end = from + kFan * n; from != end; from += n) part += load(from);
          sum += part;
        }
        Vec<T> part{};
        for (; left > 0; --left, from += n) part += load(from);
        sum += part;
        store(result + c, gradient ? sum : divisor.quotient(sum));
      }
    }
    for_each_run(results_, g_.out_w, n, [&](int64_t to, int64_t offset, int64_t count) {
      S* p = out + channels.begin + to;
      const T* from = results_row_ + offset;
      int64_t i = 0;
      for (; i + kWidth <= count; i += kWidth) store_narrow(p + i, load(from + i));
      if (i < count) store_narrow(p + i, load_partial(from + i, count - i), count - i);
    });
  }

  // sums_ = the sums of some rows, in dgrad each addend over its window's divisor.
  void add_rows(const S* in, Span rows, int64_t n) {
    if (rows.empty()) memset(sums_, 0, static_cast<size_t>(sources_ * n) * sizeof(T));
    for (int64_t r = rows.begin; r < rows.end;) {
      const bool first = r == rows.begin;
      int64_t end = min(r + kFan, rows.end);
      if constexpr (gradient) {
        for (int64_t other = r + 1; other < end; ++other)
          if (row_divisors_[other] != row_divisors_[r]) end = other;
        invert(row_divisors_[r], n);
      }
      for_each_run(sources_, g_.in_w, n, [&](int64_t at, int64_t offset, int64_t count) {
        const S* from = in + r * g_.in_h + at;
        int64_t i = 0;
        for (; i + kVecs * kWidth <= count; i += kVecs * kWidth)
          add_run<kVecs>(from + i, offset + i, end - r, first, kVecs * kWidth);
        for (; i < count; i += kWidth) add_run<1>(from + i, offset + i, end - r, first, min(count - i, kWidth));
      });
      r = end;
    }
  }

  template <int vecs>
  CNNFAST_INLINE void add_run(const S* from, int64_t to, int64_t rows, bool first, int64_t count) {
    Vec<T> sum[vecs] = {}, weight[vecs] = {};
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v)
      if constexpr (gradient) weight[v] = load(inverse_ + to + v * kWidth);
    for (int64_t r = 0; r < rows; ++r, from += g_.in_h) {
#pragma GCC unroll 4
      for (int v = 0; v < vecs; ++v) {
        const Vec<T> addend =
            vecs > 1 || count == kWidth ? load_wide(from + v * kWidth) : load_wide(from + v * kWidth, count);
        sum[v] += gradient ? addend * weight[v] : addend;
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) {
      T* p = sums_ + to + v * kWidth;
      store(p, first ? sum[v] : load(p) + sum[v]);
    }
  }

  // inverse_ = the reciprocals of the divisors of a row of windows, for every channel.
  void invert(T row_divisor, int64_t n) {
    if (inverted_ == row_divisor && inverted_channels_ == n) return;
    inverted_ = row_divisor;
    inverted_channels_ = n;
    T* p = inverse_;
    for (int64_t q = 0; q < sources_; ++q, p += n) {
      const Vec<T> inverse = broadcast(T{1} / (row_divisor * column_divisors_[q]));
      for (int64_t c = 0; c < n; c += kWidth) store(p + c, inverse);
    }
  }

  const Gather<S, Axis>& g_;
  Span channels_;
  int64_t results_, sources_;  // columns of the result and of what is added
  bool separable_;
  int64_t block_;  // channels of a row of sums
  Span* addends_ = nullptr;
  T *column_divisors_ = nullptr, *row_divisors_ = nullptr, *sums_ = nullptr, *results_row_ = nullptr;
  T *inverse_ = nullptr, *weights_ = nullptr;
  T inverted_ = 0;
  int64_t inverted_channels_ = 0;
};

// ---- launch ---------------------------------------------------------------------------------------------------------

template <bool gradient, class S, class Axis>
const char* gather(const Gather<S, Axis>& g, int threads) {
  constexpr int width = kLanes<Compute<S>>;
  const int64_t height = results_of<gradient>(g.rows), rows = g.images * height;
  if (rows * g.channels * results_of<gradient>(g.columns) == 0) return nullptr;
  const int64_t addends = most_addends<gradient>(g.rows) * most_addends<gradient>(g.columns);
  if (rows * results_of<gradient>(g.columns) * g.channels * addends < kAddendsWorthThreads) threads = 1;
  const int64_t parts = rows < kRowsAThread * threads ? max(1, min(threads, g.channels / width)) : 1;
  const int64_t row_parts = min(rows, ceil_div(threads, parts)), vecs = g.channels / width;
  bool no_memory = false;
  parallel_for(threads, parts * row_parts, [&](int64_t task) {
    const int64_t part = task / row_parts, first = task % row_parts;
    const Span channels{vecs * part / parts * width,
                        part + 1 == parts ? g.channels : vecs * (part + 1) / parts * width};
    Task<S, gradient, Axis> work(g, channels);
    if (!work.allocate()) return __atomic_store_n(&no_memory, true, __ATOMIC_RELAXED);
    for (int64_t row = rows * first / row_parts; row < rows * (first + 1) / row_parts; ++row)
      work.row(row / height, row % height);
  });
  return no_memory ? "out of memory" : nullptr;
}

// The direction of an average pooling with parameters p over the given axes.
template <class S, bool gradient, class Params, class Axis>
const char* average(const Params& p, const Launch& l, const Axis& rows, const Axis& columns) {
  if constexpr (gradient)
    return gather<true>(Gather<S, Axis>{p.N, p.C, rows, columns, static_cast<const S*>(l.operands[1]),
                                        static_cast<S*>(l.operands[0]), p.y_n, p.y_h, p.y_w, p.x_n, p.x_h, p.x_w},
                        l.threads);
  else
    return gather<false>(Gather<S, Axis>{p.N, p.C, rows, columns, static_cast<const S*>(l.operands[0]),
                                         static_cast<S*>(l.operands[1]), p.x_n, p.x_h, p.x_w, p.y_n, p.y_h, p.y_w},
                         l.threads);
}

}  // namespace
}  // namespace CNNFAST_ISA
}  // namespace cnnfast
