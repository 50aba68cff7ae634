// The register tile of convolutions on pairs of bf16: MR pixels x NV vectors of output channels, vdpbf16ps.
//
//   acc[i][j] += dot(A(i, pair), B(pair, j))     pairs of input channels, over `ntaps` runs of `run` pairs each
//
// A is broadcast pair by pair, B is read as vectors, one packed row of NV vectors a step; a tap is only an offset of A,
// as in gemm_tile.h, whose form and addressing this has. 14 x 2 accumulators take 16 loads for 28 dot products, of
// which Zen 4 starts one a cycle. Sums are one chain in float: beside the rounding of operands and results to 8 bits
// its error is nothing.
//
// Finished sums leave through the epilogue without a detour: y = act(scale * sum + shift + r), act none or ReLU.
#pragma once
#include "../gemm_tile.h"
#include "../primitives/dot.h"

namespace cnnfast {
namespace CNNFAST_ISA {

constexpr int kDotVecs = 2, kDotRows = 14;

struct DotTileArgs {
  const char* a;
  int64_t a_row;        // bytes from pixel to pixel
  const int64_t* taps;  // offsets of A, in bytes
  int64_t ntaps, run;
  const BFloat16* b;  // [tap][pair][NV vectors of pairs]
  // What is read soon: two streams, of which a line is fetched at every step, the first's into L1, the second's into
  // L2.
  struct {
    const char* at;
    int64_t step;  // bytes; 0: nothing
  } next[2];
  const float *bias, *scale, *shift;  // NV vectors; sums start from the bias
  BFloat16* y;                        // rows y_row elements apart; null: sums are stored as they are
  int64_t y_row;
  const BFloat16* r;  // the residual, or null
  int64_t r_row;
  bool relu;
  float* sums;  // MR rows of NV vectors
};
using DotTileFn = void (*)(const DotTileArgs&);

template <int MR, int NV, int i>
CNNFAST_INLINE void dot_row(Vec<float> (&acc)[MR][NV], const BitsVec (&b)[NV], const char* row0, const char* row5,
                            int64_t d, int64_t d3, int64_t d5) {
  if constexpr (i < MR) {
    uint32_t pair;
    memcpy(&pair, row_address<i>(row0, row5, d, d3, d5), sizeof pair);
    const BitsVec a = pair - BitsVec{};
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) acc[i][j] = dot_pairs(acc[i][j], a, b[j]);
    dot_row<MR, NV, i + 1>(acc, b, row0, row5, d, d3, d5);
  }
}

template <int MR, int NV>
CNNFAST_INLINE void dot_step(Vec<float> (&acc)[MR][NV], const BFloat16* bp, const char*& row0, const char*& row5,
                             int64_t& d, int64_t& d3, int64_t& d5) {
  // Opaque at every step: otherwise the compiler turns the row addresses into a pointer each and spills them.
  asm("" : "+r"(row0), "+r"(row5), "+r"(d), "+r"(d3), "+r"(d5));
  BitsVec b[NV];
#pragma GCC unroll 2
  for (int j = 0; j < NV; ++j) memcpy(&b[j], bp + j * 2 * kLanes<float>, sizeof b[j]);
  dot_row<MR, NV, 0>(acc, b, row0, row5, d, d3, d5);
}

// Finished sums, where they are to go.
template <int MR, int NV>
CNNFAST_INLINE void dot_finish(Vec<float> (&acc)[MR][NV], const DotTileArgs& args) {
  constexpr int VL = kLanes<float>;
  if (!args.y) return store_rows<float, MR, NV>(args.sums, NV * VL, acc);
  const Vec<float> zero{};
#pragma GCC unroll 2
  for (int j = 0; j < NV; ++j) {
    const Vec<float> scale = load(args.scale + j * VL), shift = load(args.shift + j * VL);
#pragma GCC unroll 14
    for (int i = 0; i < MR; ++i) acc[i][j] = acc[i][j] * scale + shift;
  }
  if (args.r)
#pragma GCC unroll 14
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) acc[i][j] += load_wide(args.r + i * args.r_row + j * VL);
  if (args.relu)
#pragma GCC unroll 14
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) acc[i][j] = zero > acc[i][j] ? zero : acc[i][j];  // a NaN stays
#pragma GCC unroll 14
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) {
      const HalfVec h = narrow_flushing(acc[i][j]);
      memcpy(args.y + i * args.y_row + j * VL, &h, sizeof h);
    }
}

// Asks for the lines of the residual and of y, which else would be waited for at the end.
template <int MR>
CNNFAST_INLINE void fetch_results(const DotTileArgs& args) {
#pragma GCC unroll 14
  for (int i = 0; i < MR; ++i) __builtin_prefetch(args.y + i * args.y_row, 1);
  if (args.r)
#pragma GCC unroll 14
    for (int i = 0; i < MR; ++i) __builtin_prefetch(args.r + i * args.r_row);
}

template <int MR, int NV>
void dot_tile(const DotTileArgs& args) {
  constexpr int VL = kLanes<float>, kUnroll = 4, kRow = 2 * NV * VL;
  Vec<float> acc[MR][NV];
#pragma GCC unroll 2
  for (int j = 0; j < NV; ++j) {
    const Vec<float> bias = load(args.bias + j * VL);
#pragma GCC unroll 14
    for (int i = 0; i < MR; ++i) acc[i][j] = bias;
  }
  const BFloat16* bp = args.b;
  const char *next0 = args.next[0].at, *next1 = args.next[1].at;
  const int64_t step0 = args.next[0].step, step1 = args.next[1].step;
  if (args.y) fetch_results<MR>(args);
  int64_t d = args.a_row, d3 = 3 * d, d5 = 5 * d;
  for (int64_t t = 0; t < args.ntaps; ++t) {
    const char* row0 = args.a + args.taps[t];
    const char* row5 = row0 + d5;
    int64_t n = args.run;
    for (; n >= kUnroll; n -= kUnroll) {
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) {
        __builtin_prefetch(next0, 0, 3);
        __builtin_prefetch(next1, 0, 2);
        next0 += step0, next1 += step1;
        dot_step<MR, NV>(acc, bp + u * kRow, row0, row5, d, d3, d5);
        row0 += 4, row5 += 4;
      }
      bp += kUnroll * kRow;
    }
    for (; n > 0; --n) {
      __builtin_prefetch(next0, 0, 3);
      __builtin_prefetch(next1, 0, 2);
      next0 += step0, next1 += step1;
      dot_step<MR, NV>(acc, bp, row0, row5, d, d3, d5);
      row0 += 4, row5 += 4;
      bp += kRow;
    }
  }
  dot_finish<MR, NV>(acc, args);
}

#define CNNFAST_DOT_TILES(NV)                                                               \
  {nullptr,          dot_tile<1, NV>,  dot_tile<2, NV>,  dot_tile<3, NV>,  dot_tile<4, NV>, \
   dot_tile<5, NV>,  dot_tile<6, NV>,  dot_tile<7, NV>,  dot_tile<8, NV>,  dot_tile<9, NV>, \
   dot_tile<10, NV>, dot_tile<11, NV>, dot_tile<12, NV>, dot_tile<13, NV>, dot_tile<14, NV>}

// The tile of `rows` x `vecs`.
CNNFAST_INLINE DotTileFn dot_tile_function(int64_t rows, int64_t vecs) {
  static constexpr DotTileFn kTable[kDotVecs][kDotRows + 1] = {CNNFAST_DOT_TILES(1), CNNFAST_DOT_TILES(2)};
  return kTable[vecs - 1][rows];
}
#undef CNNFAST_DOT_TILES

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
