// NHWC tensors as rows of neighbouring elements: what the memory-bound kernels walk over.
//
// A row is a pixel's channels. Where all operands are dense, rows are longer: whole pixels, so many that a row is a
// multiple of a vector and neither short nor long; then no vector is partial, whatever C is, and element i of a row is
// channel i % C. What is left at the end is one shorter row. Their number of pixels is odd, so that neighbours don't
// lie a power of two apart, in the same few lines of a cache.
#pragma once
#include "primitives/vec.h"

namespace cnnfast {
namespace CNNFAST_ISA {

constexpr int64_t kShortRow = 256, kLongRow = 4096;  // elements
constexpr int64_t kRowsFirst = 64;  // that are walked in ascending order where the last ones come first
constexpr int64_t kAlias = 4096;    // bytes

// An operand: null, or a pointer and what lies between images, image rows and pixels.
template <class S>
struct Pixels {
  S* data;
  int64_t n, h, w;

  CNNFAST_INLINE S* at(int64_t i, int64_t j, int64_t k) const { return data + i * n + j * h + k * w; }
};

struct Rows {
  int64_t N, H, W;  // rows in all: N * H * W
  int64_t len;      // elements of a row
  int64_t tail;     // elements of one more row, at W; 0: there is none

  int64_t count() const { return N * H * W + (tail > 0); }
  int64_t len_of(int64_t row) const { return tail > 0 && row == W ? tail : len; }
};

template <class S>
bool is_dense(const Pixels<S>& x, int64_t N, int64_t C, int64_t H, int64_t W) {
  return !x.data || ((W == 1 || x.w == C) && (H == 1 || x.h == W * C) && (N == 1 || x.n == H * W * C));
}

template <class S>
void make_flat(Pixels<S>& x, int64_t len) {
  x.n = x.h = 0, x.w = len;
}

// The rows of operands of one shape; their strides become those of the rows.
template <class T, class... Operands>
Rows make_rows(int64_t N, int64_t C, int64_t H, int64_t W, Operands&... operands) {
  if (!(is_dense(operands, N, C, H, W) && ...)) return {N, H, W, C, 0};
  int64_t pixels = 1;
  while (pixels * C % kLanes<T> && pixels * C <= kLongRow) pixels *= 2;
  if (pixels * C > kLongRow) pixels = 1;
  pixels *= ceil_div(kShortRow, pixels * C) | 1;
  const int64_t rows = N * H * W / pixels, len = pixels * C;
  (make_flat(operands, len), ...);
  return {1, 1, rows, len, (N * H * W - rows * pixels) * C};
}

template <int n>
struct Count {
  static constexpr int value = n;
};

// Calls f(how many rows, n, h, w of the first, their length) for the rows [begin, end): `most` neighbours, where such
// go together, or one. f stands here once for each: it is inlined, and compiled for many types.
template <int most, class F>
CNNFAST_INLINE void for_each_rows(const Rows& rows, int64_t begin, int64_t end, const F& f, bool together = true) {
  const int64_t whole = rows.N * rows.H * rows.W;
  for (int64_t row = begin; row < end;) {
    const bool tail = row >= whole;
    const int64_t w = tail ? rows.W : row % rows.W, h = tail ? 0 : row / rows.W % rows.H;
    const int64_t n = tail ? 0 : row / rows.W / rows.H, len = tail ? rows.tail : rows.len;
    const int64_t count = tail ? 1 : min(rows.W - w, min(end, whole) - row);
    int64_t i = 0;
    if (most > 1 && together)
      for (; i + most <= count; i += most) f(Count<most>{}, n, h, w + i, len);
    for (; i < count; ++i) f(Count<1>{}, n, h, w + i, len);
    row += count;
  }
}

// Whether neighbouring rows don't lie a multiple of kAlias apart, where many side by side would meet in the same lines
// of a cache.
template <class S>
CNNFAST_INLINE bool rows_apart(const Pixels<S>& x) {
  return x.w * static_cast<int64_t>(sizeof(S)) % kAlias != 0;
}

// Whether the rows of all operands, some of which may be absent, lie equally far apart: then one offset serves all.
template <class S, class... Others>
CNNFAST_INLINE bool one_pitch(const Pixels<S>& y, const Others&... others) {
  return ((!others.data || others.w == y.w) && ...);
}

// The same with the last rows first: what was read or written before, front to back, still lies in the caches from its
// end.
template <int most, class F>
CNNFAST_INLINE void for_each_rows_back(const Rows& rows, int64_t begin, int64_t end, const F& f, bool together = true) {
  while (end > begin) {
    const int64_t from = max(begin, end - kRowsFirst);
    for_each_rows<most>(rows, from, end, f, together);
    end = from;
  }
}

// Calls f(first element, lanes) for the elements [begin, end): Count<all lanes>, then int64_t where fewer are left.
template <class T, class F>
CNNFAST_INLINE void for_each_vector(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + kLanes<T> <= end; i += kLanes<T>) f(i, Count<kLanes<T>>{});
  if (i < end) f(i, end - i);
}
template <class S, int n>
CNNFAST_INLINE Vec<Compute<S>> read(const S* p, Count<n>) {
  return load_wide(p);
}
template <class S>
CNNFAST_INLINE Vec<Compute<S>> read(const S* p, int64_t n) {
  return load_wide(p, n);
}
template <class S, int n>
CNNFAST_INLINE void write(S* p, Vec<Compute<S>> v, Count<n>) {
  store_narrow(p, v);
}
template <class S>
CNNFAST_INLINE void write(S* p, Vec<Compute<S>> v, int64_t n) {
  store_narrow(p, v, n);
}

// How a pass meets its tensors: small ones stay in the caches, large ones stream by. What a large pass will read a few
// rows later it fetches: the processor's own prefetchers stop at each page, and rows are about a page long. Of what
// lies in the third cache anyway that would be the slower way.
struct Kept {
  template <class S, class Lanes>
  static CNNFAST_INLINE void write_to(S* p, Vec<Compute<S>> v, Lanes lanes) {
    write(p, v, lanes);
  }
  template <class S>
  static CNNFAST_INLINE void fetch(const S*) {}
  static CNNFAST_INLINE void end() {}
};
struct Streamed {
  template <class S, int n>
  static CNNFAST_INLINE void write_to(S* p, Vec<Compute<S>> v, Count<n>) {
    stream_narrow(p, v);
  }
  template <class S>
  static CNNFAST_INLINE void write_to(S* p, Vec<Compute<S>> v, int64_t n) {
    store_narrow(p, v, n);
  }
  template <class S>
  static CNNFAST_INLINE void fetch(const S* p) {
    __builtin_prefetch(p, 0, 2);
  }
  static CNNFAST_INLINE void end() { stream_end(); }
};

// More tensors than the usual three fill the caches sooner.
template <class S>
bool is_large(const Rows& rows, const Pixels<S>&, int64_t tensors = 3) {
  return tensors * rows.N * rows.H * rows.W * rows.len * static_cast<int64_t>(sizeof(S)) >= 3 * kStreamBytes;
}

// Calls f(Streamed) for large operands, else f(Kept): a pass that has no result.
template <class S, class F>
CNNFAST_INLINE void with_reads(const Rows& rows, const Pixels<S>& x, const F& f) {
  if (is_large(rows, x))
    f(Streamed{});
  else
    f(Kept{});
}

// Calls f(Streamed) for a large result whose rows are whole, aligned vectors, else f(Kept).
template <class S, class F>
CNNFAST_INLINE void with_stores(const Rows& rows, const Pixels<S>& y, const F& f, int64_t tensors = 3) {
  const bool whole = rows.N == 1 && rows.H == 1 && y.w == rows.len && rows.len % kLanes<Compute<S>> == 0;
  if (is_large(rows, y, tensors) && whole && reinterpret_cast<uintptr_t>(y.data) % kVecBytes == 0)
    f(Streamed{});
  else
    f(Kept{});
}

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
