// The register tile of every implicit GEMM: MR x NV accumulators that never leave the registers.
//
//   acc[i][j] += A(i, k) * B(k, j)     i < MR rows, j < NV vectors, k over `taps` runs of `run` steps each
//
// A is broadcast element by element, B is read as vectors, one packed row of NV vectors a step. A tap is only an offset
// of A (one filter tap, one input row, ...), so that one tile serves any kernel size, stride and dilation. Two ways
// to walk A: kRowsApart (fprop, dgrad): a row is a pixel, rows are `a_row` bytes apart and a step is one element;
// otherwise (wgrad): a row is a channel, rows are adjacent and a step is `a_step` bytes, one pixel.
//
// A single chain of additions loses accuracy with its length, so a chain is at most about kChain steps long: then the
// accumulators are added to a copy in L1 and start again from zero, which costs some 2 %. The blocked sum's error is
// that of good BLAS libraries.
//
// 14 x 2 accumulators of AVX-512 need 16 loads for 28 FMAs and 31 of the 32 registers; 6 x 2 of AVX2 need 8 for 12 and
// 15 of 16. Both run at the FMA units' speed with B coming from L2.
#pragma once
#include "primitives/vec.h"

namespace cnnfast {
namespace CNNFAST_ISA {

// The most vectors a tile is wide, and the most rows it has at each width.
constexpr int kMaxTileVecs = 2;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMaxTileRows[kMaxTileVecs + 1] = {0, 14, 14};
#else
constexpr int kMaxTileRows[kMaxTileVecs + 1] = {0, 12, 6};
#endif
constexpr int kMostTileRows = kMaxTileRows[1] > kMaxTileRows[2] ? kMaxTileRows[1] : kMaxTileRows[2];

constexpr int64_t kChain = 128;

struct Tap {
  int64_t offset;  // of A, in bytes
  int32_t run;     // steps
  int32_t flush;   // a chain ends after this tap
};

// Lists taps, cutting long runs and marking where chains end.
class TapList {
 public:
  // How many entries `count` runs of `run` steps take at most.
  static int64_t capacity(int64_t count, int64_t run, int64_t chain = kChain) {
    return count * (ceil_div(run, chain) + 1) + 1;
  }

  explicit TapList(Tap* taps, int64_t chain = kChain) : taps_(taps), longest_(chain) {}
  // A run of `run` steps that are `step` bytes apart.
  void add(int64_t offset, int64_t run, int64_t step) {
    const int64_t piece = round_up(ceil_div(run, ceil_div(run, longest_)), 4);
    for (int64_t i = 0; i < run; i += piece) {
      const int64_t n = min(piece, run - i);
      if (chain_ && chain_ + n > longest_) taps_[count_ - 1].flush = 1, chain_ = 0;
      taps_[count_++] = {offset + i * step, static_cast<int32_t>(n), 0};
      chain_ += n;
    }
  }
  int64_t size() const { return count_; }

 private:
  Tap* taps_;
  int64_t longest_, count_ = 0, chain_ = 0;
};

template <class T>
struct TileArgs {
  const T* a;
  int64_t a_row, a_step;  // bytes; see above which one is used
  const Tap* taps;
  int64_t ntaps;
  const T* b;      // as many rows of NV vectors as the taps have steps
  int64_t b_step;  // elements between them (wgrad; the packed rows of fprop and dgrad lie beside each other)
  const T* init;   // added at the end: rows of NV vectors, `init_row` elements apart
  int64_t init_row;
  T* chains;  // room for MR rows of NV vectors
  T* out;     // rows `out_row` elements apart
  int64_t out_row;
  // kRowsApart: what is asked for on the way, a line a step, if anything: the A of the tile that comes next. What comes
  // from memory in MR places at once is beyond what processors fetch ahead by themselves.
  const char* next = nullptr;
  bool streams = false;  // kRowsApart: past the caches to `out`, whose rows are aligned vectors
};

template <class T>
using TileFn = void (*)(const TileArgs<T>&);

// Address of row i from row 0 and row 5 with the row distance, 3 and 5 times it: x86's scaled addressing reaches 14
// rows from five registers.
template <int i>
CNNFAST_INLINE const char* row_address(const char* row0, const char* row5, int64_t d, int64_t d3, int64_t d5) {
  static_assert(i < 14);
  if constexpr (i == 0) return row0;
  if constexpr (i == 1) return row0 + d;
  if constexpr (i == 2) return row0 + d * 2;
  if constexpr (i == 3) return row0 + d3;
  if constexpr (i == 4) return row0 + d * 4;
  if constexpr (i == 5) return row0 + d5;
  if constexpr (i == 6) return row0 + d3 * 2;
  if constexpr (i == 7) return row5 + d * 2;
  if constexpr (i == 8) return row0 + d * 8;
  if constexpr (i == 9) return row5 + d * 4;
  if constexpr (i == 10) return row0 + d5 * 2;
  if constexpr (i == 11) return row5 + d3 * 2;
  if constexpr (i == 12) return row0 + d3 * 4;
  return row5 + d * 8;
}

template <class T, int MR, int NV, bool kRowsApart, int i>
CNNFAST_INLINE void tile_row(Vec<T> (&acc)[MR][NV], const Vec<T> (&b)[NV], const char* row0, const char* row5,
                             int64_t d, int64_t d3, int64_t d5) {
  if constexpr (i < MR) {
    const char* p;
    if constexpr (kRowsApart)
      p = row_address<i>(row0, row5, d, d3, d5);
    else
      p = row0 + i * sizeof(T);
    const Vec<T> a = broadcast(*reinterpret_cast<const T*>(p));
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) multiply_add<T>(acc[i][j], a, b[j]);
    tile_row<T, MR, NV, kRowsApart, i + 1>(acc, b, row0, row5, d, d3, d5);
  }
}

template <class T, int MR, int NV, bool kRowsApart>
CNNFAST_INLINE void tile_step(Vec<T> (&acc)[MR][NV], const T* bp, const char*& row0, const char*& row5, int64_t& d,
                              int64_t& d3, int64_t& d5) {
  // Opaque at every step: otherwise the compiler turns the row addresses into a pointer each and spills them.
  if constexpr (kRowsApart)
    asm("" : "+r"(row0), "+r"(row5), "+r"(d), "+r"(d3), "+r"(d5));
  else
    asm("" : "+r"(row0));
  Vec<T> b[NV];
#pragma GCC unroll 2
  for (int j = 0; j < NV; ++j) b[j] = load(bp + j * kLanes<T>);
  tile_row<T, MR, NV, kRowsApart, 0>(acc, b, row0, row5, d, d3, d5);
}

template <class T, int MR, int NV>
CNNFAST_INLINE void add_rows(Vec<T> (&acc)[MR][NV], const T* rows, int64_t distance) {
  if (!rows) return;
#pragma GCC unroll 14
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) acc[i][j] += load(rows + i * distance + j * kLanes<T>);
}

template <class T, int MR, int NV>
CNNFAST_INLINE void store_rows(T* rows, int64_t distance, const Vec<T> (&acc)[MR][NV]) {
#pragma GCC unroll 14
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) store(rows + i * distance + j * kLanes<T>, acc[i][j]);
}

// The tile of `rows` x `vecs`. All of them are compiled once for each ISA, in conv2d_gemm_tile.cpp.
template <class T, bool kRowsApart>
TileFn<T> tile_function(int64_t rows, int64_t vecs);

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
