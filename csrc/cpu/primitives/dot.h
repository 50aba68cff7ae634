// Dot products of pairs of bf16, and what else kernels on pairs need: AVX512-BF16's instructions, each with its twin.
//
// A pair is 32 bits: two neighbouring bf16, the first in the low half. A vector holds kLanes<float> pairs.
#pragma once
#include "vec.h"

namespace cnnfast {
namespace CNNFAST_ISA {

CNNFAST_INLINE Vec<float> flush_denormals(Vec<float> v) {
  const BitsVec bits = (BitsVec)v;
  const BitsVec normal = (BitsVec)((bits & 0x7f800000u) != 0);
  return (Vec<float>)(bits & (normal | 0x80000000u));
}

// What vdpbf16ps computes, for any processor: sum + a.second * b.second, rounded to nearest even, and that
// + a.first * b.first, rounded again. Denormals count as 0, as operands and as results, whatever the thread's mode.
CNNFAST_INLINE Vec<float> dot_pairs_twin(Vec<float> sum, BitsVec a, BitsVec b) {
  const auto first = [](BitsVec v) { return flush_denormals((Vec<float>)(v << 16)); };
  const auto second = [](BitsVec v) { return flush_denormals((Vec<float>)(v & 0xffff0000u)); };
  sum = flush_denormals(flush_denormals(sum) + second(a) * second(b));
  return flush_denormals(sum + first(a) * first(b));
}
CNNFAST_INLINE Vec<float> dot_pairs(Vec<float> sum, BitsVec a, BitsVec b) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
  return dot_pairs_twin(sum, a, b);
#endif
}

// A vector of bf16 as they lie, and the first n of one, the rest zero; nothing beyond them is read.
constexpr int kHalves = kVecBytes / 2;
CNNFAST_INLINE BitsVec load_halves(const BFloat16* p) {
  BitsVec v;
  memcpy(&v, p, sizeof v);
  return v;
}
CNNFAST_INLINE BitsVec load_halves(const BFloat16* p, int64_t n) {
#if defined(__AVX512BW__)
  return (BitsVec)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p);
#else
  BitsVec v{};
  memcpy(&v, p, static_cast<size_t>(n) * sizeof(BFloat16));
  return v;
#endif
}
CNNFAST_INLINE void store_halves(BFloat16* p, BitsVec v) { memcpy(p, &v, sizeof v); }

// To bf16, round to nearest even; a NaN stays a NaN. AVX512-BF16's conversion makes zeros of denormals.
CNNFAST_INLINE HalfVec narrow_flushing(Vec<float> v) {
#if defined(__AVX512BF16__)
  return (HalfVec)_mm512_cvtneps_pbh(v);
#else
  return narrow(flush_denormals(v), BFloat16{});
#endif
}

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
