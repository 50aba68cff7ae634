// Batch normalisation with a residual and an activation: statistics, result, and both halves of the gradient.
//
//   stats           m[c] = mean of x, v[c] = 1 / sqrt(mean of (x - m)^2 + eps), s[c] = sum of (x - m)^2 / (count - 1)
//   fprop           y = act((x - m) * v * w + b + r)
//   wgrad           dw[c] = sum of dz * xhat, db[c] = sum of dz     dz = dy * act', xhat = (x - m) * v
//   dgrad           dx = w * v * dz, the statistics being constants
//   backward        dw, db and dx; in training dx = w * v * (dz - (db + xhat * dw) / count)
//   backward_residual  these and u = dz, which is then all that the second pass has to read beside x
//
// Each direction reads its operands once, backward twice (its sums come first). act' is taken from the result where
// there was a residual; where there was none fprop's value is computed again from x by the same instructions, which is
// cheaper than reading the result.
//
// Mapping: lanes are channels (rows.h); a task is a chunk of rows, and where those are few a part of the channels.
// Chunks depend on the sizes alone, and their sums are added in order: results don't depend on the thread count. Sums
// read 8 rows side by side (the gradient's 4 of each operand), front to back; what is made of them then goes row by row
// from the end, which is still in the caches. Tensors that don't fit the caches stream by: rows.h. dz does, too:
// written once and read once it is 7 tensors moved, and none read only to be overwritten.
//
// Accumulators: double, to which sums of up to 32 rows are added that are float for float, bf16 and fp16. stats sums x
// - x0 and (x - x0)^2, x0 being a rough mean of the channel, so that a constant channel has exactly its value as mean
// and no variance, and a large mean costs no accuracy; where a square overflows in float it starts again in double
// throughout.
//
// Layout: NHWC, any pixel strides. Source: Chan, Golub, LeVeque, Algorithms for Computing the Sample Variance (1983).
#include "../common/kernel_table.h"
#include "epilogue.h"
#include "primitives/parallel.h"
#include "primitives/scratch.h"
#include "rows.h"

namespace cnnfast {
namespace CNNFAST_ISA {
namespace {

// Rows side by side: statistics' sums in registers; the gradient's, with as many of each operand; values for one set of
// factors.
constexpr int kSumRows = 8, kGradientRows = 4, kMapRows = 4;
constexpr int64_t kFloatRows = 32;  // rows whose sums are added up in float, before they go to the doubles
constexpr int64_t kElementsWorthThreads = 1 << 15;            // below, one thread
constexpr int64_t kChunkElements = 1 << 16, kChunkRows = 64;  // a chunk of a sum has at least so many
constexpr int64_t kMostChunks = 64;
constexpr int64_t kSamples = 16;  // elements of a channel that its rough mean is made of
constexpr const char* kNoMemory = "out of memory";

enum { kX, kW, kB, kM, kV, kR, kY, kS, kDw, kDb, kT, kU };

// As many doubles as a vector has lanes.
template <class T>
struct Wide {
  static constexpr int kVecs = static_cast<int>(sizeof(double) / sizeof(T));
  Vec<double> v[kVecs];
};
CNNFAST_INLINE Wide<double> widen_sum(Vec<double> v) { return {{v}}; }
CNNFAST_INLINE Wide<float> widen_sum(Vec<float> v) {
  typedef float Half __attribute__((vector_size(kVecBytes / 2)));
  Half h[2];
  memcpy(h, &v, sizeof v);
  return {{__builtin_convertvector(h[0], Vec<double>), __builtin_convertvector(h[1], Vec<double>)}};
}
template <class T>
CNNFAST_INLINE void add_to(double* p, const Wide<T>& w) {
#pragma GCC unroll 2
  for (int i = 0; i < Wide<T>::kVecs; ++i) store(p + i * kLanes<double>, load(p + i * kLanes<double>) + w.v[i]);
}

double eps_of(const BatchNormParams& p) {
  double eps;
  memcpy(&eps, &p.eps_bits, sizeof eps);
  return eps;
}

template <class S>
Pixels<S> pixels(const Launch& l, int operand, int64_t n, int64_t h, int64_t w) {
  return {static_cast<S*>(l.operands[operand]), n, h, w};
}

// f of every channel along a row: pixel after pixel. Lanes beyond the row are zero. No operand lies where another does:
// so the compiler may take many channels at once, which a small image with many of them takes most of its time for.
template <class T, class F>
void spread(T* out, int64_t C, int64_t len, const F& f) {
#pragma GCC ivdep
  for (int64_t c = 0; c < C; ++c) out[c] = f(c);
  for (int64_t i = C; i < len;) {  // twice as many each time
    const int64_t more = min(i, len - i);
    memcpy(out + i, out, static_cast<size_t>(more) * sizeof(T));
    i += more;
  }
  for (int64_t i = len; i < round_up(len, kLanes<T>); ++i) out[i] = T(0);
}
// The same of a vector, `missing` where it is absent.
template <class T>
void spread(T* out, const T* vector, T missing, int64_t C, int64_t len) {
  if (vector)
    spread(out, C, len, [=](int64_t c) { return vector[c]; });
  else
    spread(out, C, len, [=](int64_t) { return missing; });
}

// What a row is multiplied with.
template <class T>
struct Factors {
  T *mean, *invstd, *scale, *bias;  // scale: w * v

  static Factors take(Carver& carver, int64_t padded) {
    return {carver.take<T>(padded), carver.take<T>(padded), carver.take<T>(padded), carver.take<T>(padded)};
  }
  void fill(const BatchNormParams& p, const Launch& l, int64_t len) const {
    const T *w = static_cast<const T*>(l.operands[kW]), *v = static_cast<const T*>(l.operands[kV]);
    const T* factor = invstd;
    const double eps = eps_of(p);
    if (v && !p.training)
      spread(invstd, p.C, len,
             [=](int64_t c) { return static_cast<T>(1 / __builtin_sqrt(static_cast<double>(v[c]) + eps)); });
    else
      spread(invstd, v, T(1), p.C, len);
    if (w)
      spread(scale, p.C, len, [=](int64_t c) { return w[c] * factor[c]; });
    else
      spread(scale, factor, T(1), p.C, len);
    spread(mean, static_cast<const T*>(l.operands[kM]), T(0), p.C, len);
    spread(bias, static_cast<const T*>(l.operands[kB]), T(0), p.C, len);
  }
};

// The same instructions in every direction: wgrad and dgrad find the very value that fprop's activation saw.
template <class T>
CNNFAST_INLINE Vec<T> normalised(Vec<T> centred, Vec<T> scale, Vec<T> bias) {
  return centred * scale + bias;
}

// How rows and channels are shared out.
struct Tasks {
  int64_t chunks, parts;  // parts of a row, in vectors
  int64_t rows, vecs, len;

  int64_t count() const { return chunks * parts; }
  int64_t first_row(int64_t task) const { return rows * (task / parts) / chunks; }
  int64_t last_row(int64_t task) const { return rows * (task / parts + 1) / chunks; }
  int64_t begin(int64_t task, int64_t lanes) const { return vecs * (task % parts) / parts * lanes; }
  int64_t end(int64_t task, int64_t lanes) const {
    return task % parts + 1 == parts ? len : vecs * (task % parts + 1) / parts * lanes;
  }
};

template <class T>
Tasks make_tasks(const Rows& rows, int64_t chunks, int threads) {
  const int64_t vecs = ceil_div(rows.len, kLanes<T>);
  const int64_t parts = chunks < threads ? min(vecs, ceil_div(threads, chunks)) : 1;
  return {chunks, parts, rows.count(), vecs, rows.len};
}
int64_t sum_chunks(const Rows& rows) {
  return max(1, min(kMostChunks, rows.count() / max(kChunkRows, kChunkElements / rows.len)));
}
int useful_threads(const BatchNormParams& p, int threads) {
  return p.N * p.C * p.H * p.W < kElementsWorthThreads ? 1 : threads;
}

// sums += part, part = 0.
template <class T>
void flush(double* sums, T* part, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) sums[i] += static_cast<double>(part[i]), part[i] = 0;
}
template <class T>
CNNFAST_INLINE void accumulate(T* part, Vec<T> v) {
  store(part, load(part) + v);
}

// A task's sums of a row's elements: two doubles each, and what isn't added to them yet.
template <class T>
struct Sums {
  double *first, *second;
  T *first_part, *second_part;
  int64_t begin, end;

  static Sums take(double* partial, T* parts, const Tasks& tasks, int64_t task, int64_t padded) {
    const int64_t at = task / tasks.parts * 2 * padded;
    Sums sums{partial + at,        partial + at + padded,        parts + at,
              parts + at + padded, tasks.begin(task, kLanes<T>), tasks.end(task, kLanes<T>)};
    for (int64_t i = sums.begin; i < sums.padded_end(); ++i)
      sums.first[i] = sums.second[i] = 0, sums.first_part[i] = sums.second_part[i] = 0;
    return sums;
  }
  int64_t padded_end() const { return round_up(end, kLanes<T>); }

  // Calls f as for_each_rows does, for rows whose sums may be added up in T before they go to the doubles.
  template <int most, class F>
  CNNFAST_INLINE void over(const Rows& rows, int64_t row, int64_t last, const F& f, bool together = true) {
    while (row < last) {
      const int64_t some = min(last, row + kFloatRows);
      for_each_rows<most>(rows, row, some, f, together);
      flush(first, first_part, begin, padded_end());
      flush(second, second_part, begin, padded_end());
      row = some;
    }
  }
};

// Adds the chunks' sums up, and positions of a row that are the same channel: first[0 .. C-1], second[0 .. C-1].
void collect(double* partial, int64_t chunks, int64_t padded, int64_t C, int64_t len) {
  for (int64_t chunk = 1; chunk < chunks; ++chunk)
    for (int64_t i = 0; i < 2 * padded; ++i) partial[i] += partial[chunk * 2 * padded + i];
  for (int64_t pixel = C; pixel < len; pixel += C)
    for (int64_t c = 0; c < C; ++c) {
      partial[c] += partial[pixel + c];
      partial[padded + c] += partial[padded + pixel + c];
    }
}

// Calls f(how results are stored, the activation). What streams to memory waits for it, not for the choice of an
// activation; elsewhere the compiler knows the most common ones.
template <class S, class F>
CNNFAST_INLINE void with_results(const Rows& rows, const Pixels<S>& y, int64_t activation, const F& f,
                                 int64_t tensors = 3) {
  const Activation act = static_cast<Activation>(activation);
  with_stores(
      rows, y,
      [&](auto stores) {
        if constexpr (kSame<decltype(stores), Streamed>)
          f(stores, act);
        else
          with_activation<Compute<S>>(act, [&](auto known) { f(stores, known); });
      },
      tensors);
}
// What both passes of a gradient go through: x, g, t, and with a residual its y and u.
int64_t gradient_tensors(const Launch& l) { return l.operands[kU] ? 5 : 3; }

// ---- stats ----------------------------------------------------------------------------------------------------------

// What is subtracted before summing: a channel's first element, and the mean distance of some others from it, which is
// exactly 0 where the channel is constant.
template <class S>
void find_origin(const BatchNormParams& p, const Pixels<const S>& x, Compute<S>* origin, int64_t len) {
  using T = Compute<S>;
  const int64_t count = p.N * p.H * p.W, samples = min(count, kSamples);
  const T share = 1 / static_cast<T>(samples);
  for (int64_t i = 0; i < round_up(len, kLanes<T>); ++i) origin[i] = 0;
  if (!count) return;
  for (int64_t s = 1; s < samples; ++s) {
    const int64_t pixel = count / samples * s;
    const S* from = x.at(pixel / p.W / p.H, pixel / p.W % p.H, pixel % p.W);
#pragma GCC ivdep
    for (int64_t c = 0; c < p.C; ++c) origin[c] += (widen_one(from[c]) - widen_one(x.data[c])) * share;
  }
  for (int64_t c = 0; c < p.C; ++c) {
    const T value = origin[c] + widen_one(x.data[c]);
    origin[c] = value - value == 0 ? value : T(0);  // neither Inf nor NaN
  }
  for (int64_t i = p.C; i < len; ++i) origin[i] = origin[i - p.C];
}

// Sums of distances from the origin, and of their squares. Where kExact isn't set, some are added up in float first:
// memory's speed, but squares beyond float's range are infinite.
template <class S, bool kExact>
void sum_up(const Rows& rows, const Tasks& tasks, const Pixels<const S>& x, const Compute<S>* origin, double* partial,
            Compute<S>* parts, int64_t padded, int threads) {
  using T = Compute<S>;
  const auto sum = [&](auto reads) {
    parallel_for(threads, tasks.count(), [&](int64_t task) {
      Sums<T> sums = Sums<T>::take(partial, parts, tasks, task, padded);
      sums.template over<kSumRows>(rows, tasks.first_row(task), tasks.last_row(task),
                                   [&](auto count, int64_t n, int64_t h, int64_t w, int64_t len) {
                                     const S* from = x.at(n, h, w);
                                     const int64_t pitch = x.w;
                                     for_each_vector<T>(sums.begin, min(sums.end, len), [=](int64_t i, auto lanes) {
                                       const Vec<T> from_here = read(origin + i, lanes);
                                       if constexpr (kExact) {
                                         const Wide<T> exact = widen_sum(from_here);
                                         Wide<T> sum{}, square{};
                                         for (int j = 0; j < decltype(count)::value; ++j) {
                                           Wide<T> wide = widen_sum(read(from + j * pitch + i, lanes));
#pragma GCC unroll 2
                                           for (int k = 0; k < Wide<T>::kVecs; ++k) {
                                             wide.v[k] -= exact.v[k];
                                             sum.v[k] += wide.v[k];
                                             square.v[k] += wide.v[k] * wide.v[k];
                                           }
                                         }
                                         add_to<T>(sums.first + i, sum);
                                         add_to<T>(sums.second + i, square);
                                       } else {
                                         Vec<T> sum{}, square{};
#pragma GCC unroll 8
                                         for (int j = 0; j < decltype(count)::value; ++j) {
                                           reads.fetch(from + (decltype(count)::value + j) * pitch + i);
                                           const Vec<T> distance = read(from + j * pitch + i, lanes) - from_here;
                                           sum += distance;
                                           square += distance * distance;
                                         }
                                         accumulate(sums.first_part + i, sum);
                                         accumulate(sums.second_part + i, square);
                                       }
                                     });
                                   });
    });
  };
  if constexpr (kExact)
    sum(Kept{});
  else
    with_reads(rows, x, sum);
}

template <class S>
const char* launch_stats(const void* params, const Launch& l) {
  using T = Compute<S>;
  const BatchNormParams& p = *static_cast<const BatchNormParams*>(params);
  const int threads = useful_threads(p, l.threads);
  Pixels<const S> x = pixels<const S>(l, kX, p.x_n, p.x_h, p.x_w);
  const Rows rows = make_rows<T>(p.N, p.C, p.H, p.W, x);
  const Tasks tasks = make_tasks<T>(rows, sum_chunks(rows), threads);
  const int64_t padded = round_up(rows.len, kLanes<T>);
  T *origin, *parts;
  double* partial;
  const auto carve = [&](Carver carver) {
    origin = carver.take<T>(padded);
    partial = carver.take<double>(tasks.chunks * 2 * padded);
    parts = carver.take<T>(tasks.chunks * 2 * padded);
    return carver.used();
  };
  void* scratch = thread_scratch(carve(Carver(nullptr)));
  if (!scratch) return kNoMemory;
  carve(Carver(scratch));
  find_origin<S>(p, pixels<const S>(l, kX, p.x_n, p.x_h, p.x_w), origin, rows.len);
  sum_up<S, false>(rows, tasks, x, origin, partial, parts, padded, threads);
  collect(partial, tasks.chunks, padded, p.C, rows.len);
  if constexpr (!kSame<T, double>) {
    bool finite = true;
    for (int64_t c = 0; c < p.C; ++c) finite &= partial[padded + c] - partial[padded + c] == 0;
    if (!finite) {
      sum_up<S, true>(rows, tasks, x, origin, partial, parts, padded, threads);
      collect(partial, tasks.chunks, padded, p.C, rows.len);
    }
  }

  T *mean = static_cast<T*>(l.operands[kM]), *invstd = static_cast<T*>(l.operands[kV]);
  T* unbiased = static_cast<T*>(l.operands[kS]);
  const int64_t pixels = p.N * p.H * p.W;
  const double count = static_cast<double>(max(1, pixels)), less = static_cast<double>(max(1, pixels - 1));
  const double eps = eps_of(p);
#pragma GCC ivdep
  for (int64_t c = 0; c < p.C; ++c) {
    const double distance = partial[c] / count, moment = partial[padded + c] / count - distance * distance;
    const double var = moment < 0 ? 0 : moment;  // a NaN stays
    mean[c] = static_cast<T>(static_cast<double>(origin[c]) + distance);
    invstd[c] = static_cast<T>(1 / __builtin_sqrt(var + eps));
    unbiased[c] = static_cast<T>(var * (count / less));
  }
  return nullptr;
}

// ---- fprop ----------------------------------------------------------------------------------------------------------

// Of `count` rows, `pitch` elements apart in all operands. What the loops of this and the following need comes by
// value: behind a reference it would be read again after every store.
template <int count, class S, class Stores, class Act>
CNNFAST_INLINE void normalise(const S* x, const S* r, S* y, int64_t pitch, Factors<Compute<S>> factors, int64_t begin,
                              int64_t end, Stores stores, Act act) {
  using T = Compute<S>;
  for_each_vector<T>(begin, end, [=](int64_t i, auto lanes) {
    const Vec<T> mean = load(factors.mean + i), scale = load(factors.scale + i), bias = load(factors.bias + i);
#pragma GCC unroll 4
    for (int j = 0; j < count; ++j) {
      const int64_t at = i + j * pitch, next = at + count * pitch;
      stores.fetch(x + next);
      if (r) stores.fetch(r + next);
      Vec<T> z = normalised<T>(read(x + at, lanes) - mean, scale, bias);
      if (r) z += read(r + at, lanes);
      stores.write_to(y + at, activate<T>(z, act), lanes);
    }
  });
}

template <class S>
const char* launch_fprop(const void* params, const Launch& l) {
  using T = Compute<S>;
  constexpr int64_t VL = kLanes<T>;
  const BatchNormParams& p = *static_cast<const BatchNormParams*>(params);
  const int threads = useful_threads(p, l.threads);
  Pixels<const S> x = pixels<const S>(l, kX, p.x_n, p.x_h, p.x_w), r = pixels<const S>(l, kR, p.r_n, p.r_h, p.r_w);
  Pixels<S> y = pixels<S>(l, kY, p.y_n, p.y_h, p.y_w);
  const Rows rows = make_rows<T>(p.N, p.C, p.H, p.W, x, r, y);
  const Tasks tasks = make_tasks<T>(rows, max(1, min(threads, rows.count())), threads);
  Factors<T> factors;
  const auto carve = [&](Carver carver) {
    factors = Factors<T>::take(carver, round_up(rows.len, VL));
    return carver.used();
  };
  void* scratch = thread_scratch(carve(Carver(nullptr)));
  if (!scratch) return kNoMemory;
  carve(Carver(scratch));
  factors.fill(p, l, rows.len);

  const bool together = one_pitch(y, x, r) && rows_apart(y);
  with_results(rows, y, p.act, [&](auto stores, auto act) {
    parallel_for(threads, tasks.count(), [&](int64_t task) {
      const int64_t begin = tasks.begin(task, VL), end = tasks.end(task, VL);
      for_each_rows_back<kMapRows>(
          rows, tasks.first_row(task), tasks.last_row(task),
          [&](auto count, int64_t n, int64_t h, int64_t w, int64_t len) {
            normalise<decltype(count)::value>(x.at(n, h, w), r.data ? r.at(n, h, w) : nullptr, y.at(n, h, w), y.w,
                                              factors, begin, min(end, len), stores, act);
          },
          together);
      stores.end();
    });
  });
  return nullptr;
}

// ---- the gradient ---------------------------------------------------------------------------------------------------

// dz of one vector; `out` points to the result, or is null.
template <class S, class Lanes>
CNNFAST_INLINE Vec<Compute<S>> before_activation(const S* gradient, const S* out, Vec<Compute<S>> centred,
                                                 Vec<Compute<S>> scale, Vec<Compute<S>> bias, Activation act,
                                                 Lanes lanes) {
  using T = Compute<S>;
  const Vec<T> g = read(gradient, lanes);
  if (act == Activation::kNone) return g;
  return activate_gradient<T>(g, out ? read(out, lanes) : normalised<T>(centred, scale, bias), act);
}

// dz, kept in u where that is wanted, and its sums. Arguments as normalise's.
template <int count, class S, class Stores, class Act>
CNNFAST_INLINE void sum_gradient(const S* x, const S* g, const S* out, S* u, int64_t pitch, Factors<Compute<S>> factors,
                                 Sums<Compute<S>> sums, int64_t end, Stores stores, Act act) {
  using T = Compute<S>;
  for_each_vector<T>(sums.begin, end, [=](int64_t i, auto lanes) {
    const Vec<T> mean = load(factors.mean + i), invstd = load(factors.invstd + i);
    const Vec<T> scale = load(factors.scale + i), bias = load(factors.bias + i);
    Vec<T> db{}, dw{};
#pragma GCC unroll 4
    for (int j = 0; j < count; ++j) {
      const int64_t at = i + j * pitch, next = at + count * pitch;
      stores.fetch(x + next), stores.fetch(g + next);
      if (out) stores.fetch(out + next);
      const Vec<T> centred = read(x + at, lanes) - mean;
      const Vec<T> dz = before_activation(g + at, out ? out + at : nullptr, centred, scale, bias, act, lanes);
      db += dz;
      dw += dz * (centred * invstd);
      if (u) stores.write_to(u + at, dz, lanes);
    }
    accumulate(sums.first_part + i, db);
    accumulate(sums.second_part + i, dw);
  });
}

template <class S>
const char* launch_wgrad(const void* params, const Launch& l) {
  using T = Compute<S>;
  constexpr int64_t VL = kLanes<T>;
  const BatchNormParams& p = *static_cast<const BatchNormParams*>(params);
  const int threads = useful_threads(p, l.threads);
  Pixels<const S> x = pixels<const S>(l, kX, p.x_n, p.x_h, p.x_w), r = pixels<const S>(l, kR, p.r_n, p.r_h, p.r_w),
                  g = pixels<const S>(l, kY, p.y_n, p.y_h, p.y_w);
  Pixels<S> u = pixels<S>(l, kU, p.u_n, p.u_h, p.u_w);
  const Rows rows = make_rows<T>(p.N, p.C, p.H, p.W, x, r, g, u);
  const Tasks tasks = make_tasks<T>(rows, sum_chunks(rows), threads);
  const int64_t padded = round_up(rows.len, VL);
  Factors<T> factors;
  double* partial;
  T* parts;
  const auto carve = [&](Carver carver) {
    factors = Factors<T>::take(carver, padded);
    partial = carver.take<double>(tasks.chunks * 2 * padded);
    parts = carver.take<T>(tasks.chunks * 2 * padded);
    return carver.used();
  };
  void* scratch = thread_scratch(carve(Carver(nullptr)));
  if (!scratch) return kNoMemory;
  carve(Carver(scratch));
  factors.fill(p, l, rows.len);

  // two operands' rows side by side meet in a cache without harm, three's don't
  const bool together = one_pitch(x, g, r, u) && (!r.data || rows_apart(x));
  const Pixels<const S> streamed = u.data ? Pixels<const S>{u.data, u.n, u.h, u.w} : x;
  const auto pass = [&](auto stores, auto act) {
    parallel_for(threads, tasks.count(), [&](int64_t task) {
      Sums<T> sums = Sums<T>::take(partial, parts, tasks, task, padded);  // of dz, and of dz * xhat
      sums.template over<kGradientRows>(
          rows, tasks.first_row(task), tasks.last_row(task),
          [&](auto count, int64_t n, int64_t h, int64_t w, int64_t len) {
            sum_gradient<decltype(count)::value>(x.at(n, h, w), g.at(n, h, w), r.data ? r.at(n, h, w) : nullptr,
                                                 u.data ? u.at(n, h, w) : nullptr, x.w, factors, sums,
                                                 min(sums.end, len), stores, act);
          },
          together);
      stores.end();
    });
  };
  with_results(rows, streamed, p.act, pass, gradient_tensors(l));
  collect(partial, tasks.chunks, padded, p.C, rows.len);
  T *dw = static_cast<T*>(l.operands[kDw]), *db = static_cast<T*>(l.operands[kDb]);
#pragma GCC ivdep
  for (int64_t c = 0; c < p.C; ++c) db[c] = static_cast<T>(partial[c]), dw[c] = static_cast<T>(partial[padded + c]);
  return nullptr;
}

// What the sums' gradient takes off dz: db / count, and of xhat * dw / count what isn't xhat.
template <class T>
struct Means {
  T *gradient, *product;
};

// dx. Arguments as normalise's.
template <int count, class S, class Stores, class Act>
CNNFAST_INLINE void input_gradient(const S* x, const S* g, const S* out, S* t, int64_t pitch,
                                   Factors<Compute<S>> factors, Means<Compute<S>> means, bool training, int64_t begin,
                                   int64_t end, Stores stores, Act act) {
  using T = Compute<S>;
  const bool reads_x = training || (act != Activation::kNone && !out);
  for_each_vector<T>(begin, end, [=](int64_t i, auto lanes) {
    const Vec<T> mean = load(factors.mean + i), scale = load(factors.scale + i), bias = load(factors.bias + i);
    const Vec<T> db = load(means.gradient + i), dw = load(means.product + i);
#pragma GCC unroll 4
    for (int j = 0; j < count; ++j) {
      const int64_t at = i + j * pitch, next = at + count * pitch;
      if (reads_x) stores.fetch(x + next);
      stores.fetch(g + next);
      if (out) stores.fetch(out + next);
      const Vec<T> centred = reads_x ? read(x + at, lanes) - mean : Vec<T>{};
      Vec<T> dz = before_activation(g + at, out ? out + at : nullptr, centred, scale, bias, act, lanes);
      if (training) dz = dz - db - centred * dw;
      stores.write_to(t + at, dz * scale, lanes);
    }
  });
}

template <class S>
const char* launch_dgrad(const void* params, const Launch& l) {
  using T = Compute<S>;
  constexpr int64_t VL = kLanes<T>;
  const BatchNormParams& p = *static_cast<const BatchNormParams*>(params);
  const int threads = useful_threads(p, l.threads);
  Pixels<const S> x = pixels<const S>(l, kX, p.x_n, p.x_h, p.x_w), r = pixels<const S>(l, kR, p.r_n, p.r_h, p.r_w),
                  g = pixels<const S>(l, kY, p.y_n, p.y_h, p.y_w);
  Pixels<S> t = pixels<S>(l, kT, p.t_n, p.t_h, p.t_w);
  const Rows rows = make_rows<T>(p.N, p.C, p.H, p.W, x, r, g, t);
  const Tasks tasks = make_tasks<T>(rows, max(1, min(threads, rows.count())), threads);
  const int64_t padded = round_up(rows.len, VL);
  Factors<T> factors;
  Means<T> means;
  const auto carve = [&](Carver carver) {
    factors = Factors<T>::take(carver, padded);
    means = {carver.take<T>(padded), carver.take<T>(padded)};
    return carver.used();
  };
  void* scratch = thread_scratch(carve(Carver(nullptr)));
  if (!scratch) return kNoMemory;
  carve(Carver(scratch));
  factors.fill(p, l, rows.len);
  const T count_of_pixels = static_cast<T>(p.N * p.H * p.W);
  const T *sum = static_cast<const T*>(l.operands[kDb]), *product = static_cast<const T*>(l.operands[kDw]);
  const T* invstd = factors.invstd;
  if (p.training) {  // else the sums may be absent
    spread(means.gradient, p.C, rows.len, [=](int64_t c) { return sum[c] / count_of_pixels; });
    spread(means.product, p.C, rows.len, [=](int64_t c) { return product[c] / count_of_pixels * invstd[c]; });
  }
  const bool training = p.training, together = one_pitch(t, x, g, r) && rows_apart(t);

  const auto pass = [&](auto stores, auto act) {
    parallel_for(threads, tasks.count(), [&](int64_t task) {
      const int64_t begin = tasks.begin(task, VL), end = tasks.end(task, VL);
      for_each_rows_back<kMapRows>(
          rows, tasks.first_row(task), tasks.last_row(task),
          [&](auto count, int64_t n, int64_t h, int64_t w, int64_t len) {
            input_gradient<decltype(count)::value>(x.at(n, h, w), g.at(n, h, w), r.data ? r.at(n, h, w) : nullptr,
                                                   t.at(n, h, w), t.w, factors, means, training, begin, min(end, len),
                                                   stores, act);
          },
          together);
      stores.end();
    });
  };
  with_results(rows, t, p.act, pass, gradient_tensors(l));
  return nullptr;
}

// Both: what wgrad leaves is all that dgrad needs.
template <class S>
const char* launch_backward(const void* params, const Launch& l) {
  const char* error = launch_wgrad<S>(params, l);
  if (error || !l.operands[kU]) return error ? error : launch_dgrad<S>(params, l);
  BatchNormParams p = *static_cast<const BatchNormParams*>(params);
  void* operands[kU + 1];
  memcpy(operands, l.operands, sizeof operands);
  operands[kR] = nullptr, operands[kY] = l.operands[kU];  // dz is at hand, the activation behind it
  p.act = static_cast<int64_t>(Activation::kNone);
  p.y_n = p.u_n, p.y_h = p.u_h, p.y_w = p.u_w;
  return launch_dgrad<S>(&p, {operands, l.workspace, l.stream, l.threads});
}

}  // namespace

#define CNNFAST_BATCH_NORM(dtype, S)                                                         \
  CNNFAST_KERNEL("batch_norm.stats." dtype, BatchNormParams, launch_stats<S>, nullptr)       \
  CNNFAST_KERNEL("batch_norm.fprop." dtype, BatchNormParams, launch_fprop<S>, nullptr)       \
  CNNFAST_KERNEL("batch_norm.dgrad." dtype, BatchNormParams, launch_dgrad<S>, nullptr)       \
  CNNFAST_KERNEL("batch_norm.wgrad." dtype, BatchNormParams, launch_wgrad<S>, nullptr)       \
  CNNFAST_KERNEL("batch_norm.backward." dtype, BatchNormParams, launch_backward<S>, nullptr) \
  CNNFAST_KERNEL("batch_norm.backward_residual." dtype, BatchNormParams, launch_backward<S>, nullptr)
CNNFAST_BATCH_NORM("f32", float)
CNNFAST_BATCH_NORM("f64", double)
CNNFAST_BATCH_NORM("bf16", BFloat16)
CNNFAST_BATCH_NORM("f16", Float16)
#undef CNNFAST_BATCH_NORM

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
