// The register tiles of gemm_tile.h: one function for each number of rows and vectors, compiled here for all kernels.
#include "gemm_tile.h"

namespace cnnfast {
namespace CNNFAST_ISA {
namespace {

template <class T, int MR, int NV, bool kRowsApart>
void tile(const TileArgs<T>& args) {
  constexpr int VL = kLanes<T>;
  constexpr int kUnroll = 4, kLineBytes = 64;
  Vec<T> acc[MR][NV];
#pragma GCC unroll 14
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) acc[i][j] = Vec<T>{};
  bool flushed = false;
  const T* bp = args.b;
  int64_t d = args.a_row, d3 = 3 * d, d5 = 5 * d;
  const int64_t step = kRowsApart ? sizeof(T) : args.a_step;
  const char* next = args.next;
  for (int64_t t = 0; t < args.ntaps; ++t) {
    const char* row0 = reinterpret_cast<const char*>(args.a) + args.taps[t].offset;
    const char* row5 = row0 + d5;
    int64_t n = args.taps[t].run;
    for (; n >= kUnroll; n -= kUnroll) {
      if constexpr (kRowsApart)
        if (next) {
          for (int u = 0; u < kUnroll; ++u) __builtin_prefetch(next + u * kLineBytes);
          next += kUnroll * kLineBytes;
        }
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) {
        tile_step<T, MR, NV, kRowsApart>(acc, kRowsApart ? bp + u * NV * VL : bp, row0, row5, d, d3, d5);
        row0 += step;
        row5 += step;
        if constexpr (!kRowsApart) bp += args.b_step;
      }
      if constexpr (kRowsApart) bp += kUnroll * NV * VL;
    }
    for (; n > 0; --n) {
      tile_step<T, MR, NV, kRowsApart>(acc, bp, row0, row5, d, d3, d5);
      row0 += step;
      row5 += step;
      bp += kRowsApart ? NV * VL : args.b_step;
    }
    if (args.taps[t].flush) {
      add_rows<T, MR, NV>(acc, flushed ? args.chains : nullptr, NV * VL);
      store_rows<T, MR, NV>(args.chains, NV * VL, acc);
      flushed = true;
#pragma GCC unroll 14
      for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) acc[i][j] = Vec<T>{};
    }
  }
  add_rows<T, MR, NV>(acc, flushed ? args.chains : nullptr, NV * VL);
  add_rows<T, MR, NV>(acc, args.init, args.init_row);
  if constexpr (kRowsApart)
    if (args.streams) {
#pragma GCC unroll 14
      for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) stream(args.out + i * args.out_row + j * VL, acc[i][j]);
      return;
    }
  store_rows<T, MR, NV>(args.out, args.out_row, acc);
}

template <class T, bool kRowsApart, int NV, int MR>
constexpr TileFn<T> tile_or_null() {
  if constexpr (MR <= kMaxTileRows[NV])
    return tile<T, MR, NV, kRowsApart>;
  else
    return nullptr;
}

#define CNNFAST_TILES(NV)                 \
  {nullptr,                               \
   tile_or_null<T, kRowsApart, NV, 1>(),  \
   tile_or_null<T, kRowsApart, NV, 2>(),  \
   tile_or_null<T, kRowsApart, NV, 3>(),  \
   tile_or_null<T, kRowsApart, NV, 4>(),  \
   tile_or_null<T, kRowsApart, NV, 5>(),  \
   tile_or_null<T, kRowsApart, NV, 6>(),  \
   tile_or_null<T, kRowsApart, NV, 7>(),  \
   tile_or_null<T, kRowsApart, NV, 8>(),  \
   tile_or_null<T, kRowsApart, NV, 9>(),  \
   tile_or_null<T, kRowsApart, NV, 10>(), \
   tile_or_null<T, kRowsApart, NV, 11>(), \
   tile_or_null<T, kRowsApart, NV, 12>(), \
   tile_or_null<T, kRowsApart, NV, 13>(), \
   tile_or_null<T, kRowsApart, NV, 14>()}

}  // namespace

template <class T, bool kRowsApart>
TileFn<T> tile_function(int64_t rows, int64_t vecs) {
  static constexpr TileFn<T> kTable[kMaxTileVecs][15] = {CNNFAST_TILES(1), CNNFAST_TILES(2)};
  return kTable[vecs - 1][rows];
}
#undef CNNFAST_TILES

template TileFn<float> tile_function<float, true>(int64_t, int64_t);
template TileFn<float> tile_function<float, false>(int64_t, int64_t);
template TileFn<double> tile_function<double, true>(int64_t, int64_t);
template TileFn<double> tile_function<double, false>(int64_t, int64_t);

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
