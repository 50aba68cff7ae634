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
// The lower half of a vector alone.
CNNFAST_INLINE BitsVec load_low_halves(const BFloat16* p) {
#if defined(__AVX512F__)
  return (BitsVec)_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  BitsVec v{};
  memcpy(&v, p, sizeof v / 2);
  return v;
#endif
}
CNNFAST_INLINE void store_low_halves(BFloat16* p, BitsVec v) { memcpy(p, &v, sizeof v / 2); }

// To bf16, round to nearest even; a NaN stays a NaN. AVX512-BF16's conversion makes zeros of denormals.
CNNFAST_INLINE HalfVec narrow_flushing(Vec<float> v) {
#if defined(__AVX512BF16__)
  return (HalfVec)_mm512_cvtneps_pbh(v);
#else
  return narrow(flush_denormals(v), BFloat16{});
#endif
}

// The same of two vectors, as pairs; and the way back.
CNNFAST_INLINE BitsVec narrow_pairs(Vec<float> first, Vec<float> second) {
#if defined(__AVX512BF16__)
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(second, first);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (BitsVec)_mm512_permutexvar_epi16(order, halves);
#else
  return __builtin_convertvector(narrow_flushing(first), BitsVec) |
         __builtin_convertvector(narrow_flushing(second), BitsVec) << 16;
#endif
}
CNNFAST_INLINE Vec<float> first_of(BitsVec pairs) { return (Vec<float>)(pairs << 16); }
CNNFAST_INLINE Vec<float> second_of(BitsVec pairs) { return (Vec<float>)(pairs & 0xffff0000u); }

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
