// The gradient of maxima whose taps are known: t, gathered from y's gradient and the bytes k.
//
//   t[n,h,w,c] = sum of y[n,p,q,c] over the windows p, q that cover h, w and whose k[n,p,q,c] is the number of that tap
//
// Mapping: lanes are channels, up to 4 vectors of them a pixel, whose sums stay in registers, the 16-bit types' as
// float. Which windows cover a column, and as which tap, stands in a table; rows of t go one by one. So each element of
// t is written once, in order, past the caches where t wouldn't stay in them, and no sum is read back. A window is read
// once for each of its rows, from the caches. Where one window covers a pixel nothing is summed, nor converted.
//
// Floor: a map of N bytes in fp32, of which 3x3/2 leaves a quarter, moves 1.31 N (t, y, k), where the search moves 2.25
// N and reads its sums back. In the caches it is 4 operations a window and vector, of 2.25 windows a pixel.
//
// Layout: NHWC, any pixel strides.
#pragma once
#include "../common/kernel_table.h"
#include "max_pool2d_search.h"
#include "primitives/parallel.h"
#include "primitives/scratch.h"

namespace cnnfast {
namespace CNNFAST_ISA {
namespace {

constexpr int64_t kTapsWorthGather = 2;  // a lane: with more taps a window, lanes are added one by one (max_pool2d.h)

template <int width, class Pool>
bool gather_pays(const Pool& p) {
  return p.rows.most_taps() * p.columns.most_taps() <= kTapsWorthGather * max(width, 2);
}

// A window over an element of an axis: where it lies in y and in k, and what that adds to the number of the tap.
struct Cover {
  int64_t y, k, tap;
};

// Writes the windows over an element, in their order; returns the end.
template <class Axis>
Cover* find_covers(const Axis& axis, int64_t element, const Cover& steps, Cover* to) {
  const Span windows = axis.windows(element);
  for (int64_t window = windows.begin; window < windows.end; ++window) {
    const int64_t distance = element - axis.extent(window).begin;
    if (distance % axis.step == 0) *to++ = {window * steps.y, window * steps.k, distance / axis.step * steps.tap};
  }
  return to;
}

// The same where one window covers the pixel: nothing is summed, and 16-bit types stay what they are.
template <class S, int width, int vecs, bool streams>
CNNFAST_INLINE void select_pixel(int64_t tap, const S* y, const uint8_t* k, S* t) {
  using V = Lanes<int16_t, width>;
  const V here = V{} + static_cast<int16_t>(tap);
#pragma GCC unroll 4
  for (int v = 0; v < vecs; ++v) {
    const V gradient = read<int16_t, width>(y + v * width);
    const V part = read_taps<width, V>(k + v * width) == here ? gradient : V{};
    if constexpr (streams)
      stream(reinterpret_cast<float*>(t + v * width), (Vec<float>)part);
    else
      write<int16_t, width>(t + v * width, part);
  }
}

// vecs * width channels of one pixel.
template <class S, int width, int vecs, bool streams>
CNNFAST_INLINE void gather_pixel(const Cover* row, const Cover* rows_end, const Cover* columns,
                                 const Cover* columns_end, const S* y, const uint8_t* k, S* t) {
  using E = Compute<S>;
  using V = Lanes<E, width>;
  using L = Labels<E, width>;
  constexpr int wider = vecs % 2 == 0 ? 2 : 1;
  if constexpr (kIs16<S> && (wider == 2 || !streams))
    if (rows_end - row == 1 && columns_end - columns == 1)
      return select_pixel<S, wider * width, vecs / wider, streams>(row->tap + columns->tap, y + row->y + columns->y,
                                                                   k + row->k + columns->k, t);
  V sums[vecs] = {};
  for (; row < rows_end; ++row)
    for (const Cover* column = columns; column < columns_end; ++column) {
      const S* gradients = y + row->y + column->y;
      const uint8_t* taps = k + row->k + column->k;
      const L here = L{} + static_cast<Label<E>>(row->tap + column->tap);
#pragma GCC unroll 4
      for (int v = 0; v < vecs; ++v) {
        const V gradient = fetch<S, E, width>(gradients + v * width);
        sums[v] += read_taps<width, L>(taps + v * width) == here ? gradient : V{};
      }
    }
#pragma GCC unroll 4
  for (int v = 0; v < vecs; ++v) {
    if constexpr (streams)
      stream_narrow(t + v * width, sums[v]);
    else
      put<S, E, width>(t + v * width, sums[v]);
  }
}

// Rows begin .. end - 1 of all images' t, in some channels.
template <class S, int width, bool streams, class Pool>
bool gather_rows(const Pool& p, const Operands<S>& o, int64_t begin, int64_t end, const Span& channels) {
  Cover *columns = nullptr, *rows = nullptr;
  Cover** ends = nullptr;  // of each column's windows
  const auto carve = [&](Carver& parts) {
    columns = parts.take<Cover>(p.Q * p.columns.most_taps());
    ends = parts.take<Cover*>(p.W);
    rows = parts.take<Cover>(p.P);
  };
  Carver sizes(nullptr);
  carve(sizes);
  void* scratch = thread_scratch(sizes.used());
  if (!scratch) return false;
  Carver parts(scratch);
  carve(parts);
  Cover* last = columns;
  for (int64_t w = 0; w < p.W; ++w) ends[w] = last = find_covers(p.columns, w, {p.y_w, p.k_w, 1}, last);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / p.H, h = row % p.H;
    const Cover* const rows_end = find_covers(p.rows, h, {p.y_h, p.k_h, p.columns.most_taps()}, rows);
    const S* y = o.y + n * p.y_n;
    const uint8_t* k = o.k + n * p.k_n;
    S* t = o.t + n * p.t_n + h * p.t_h;
    const Cover* first = columns;
    for (int64_t w = 0; w < p.W; first = ends[w++], t += p.t_w)
      for_each_block<S, Direction::scatter, width>(channels.begin, channels.end, [&](auto count, int64_t c, int64_t) {
        gather_pixel<S, width, decltype(count)::value, streams>(rows, rows_end, first, ends[w], y + c, k + c, t + c);
      });
  }
  if constexpr (streams) stream_end();
  return true;
}

// Whether t goes past the caches: it is large, and its pixels are whole vectors.
template <class S, class Pool>
bool streams_whole(const Pool& p, const S* t) {
  const int64_t apart = reinterpret_cast<intptr_t>(t) | (p.t_w | p.t_h | p.t_n | p.C) * static_cast<int64_t>(sizeof(S));
  return p.N * p.H * p.W * p.C * static_cast<int64_t>(sizeof(S)) >= kStreamBytes && apart % kVecBytes == 0;
}

template <class S, int width, class Pool>
const char* gather(const Pool& p, const Operands<S>& o, int threads) {
  const int64_t rows = p.N * p.H, parts = rows < kRowsAThread * threads ? min(threads, p.C / width) : 1;
  const int64_t row_parts = min(rows, ceil_div(threads, parts));
  bool streams = false, no_memory = false;
  if constexpr (width == kLanes<Compute<S>>) streams = streams_whole(p, o.t);
  parallel_for(threads, parts * row_parts, [&](int64_t task) {
    const int64_t first = task % row_parts;
    const int64_t begin = rows * first / row_parts, end = rows * (first + 1) / row_parts;
    const Span channels = channels_of({0, p.C}, width, task / row_parts, parts);
    bool done = false;
    if constexpr (width == kLanes<Compute<S>>)
      if (streams) done = gather_rows<S, width, true>(p, o, begin, end, channels);
    if (!streams) done = gather_rows<S, width, false>(p, o, begin, end, channels);
    if (!done) __atomic_store_n(&no_memory, true, __ATOMIC_RELAXED);
  });
  return no_memory ? "out of memory" : nullptr;
}

}  // namespace
}  // namespace CNNFAST_ISA
}  // namespace cnnfast
