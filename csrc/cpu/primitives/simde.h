// The AVX-512 instructions that vec.h and dot.h use, as functions on AVX2: simde's, and our own where it has none. For
// tests on a processor that lacks the instructions (CNNFAST_SIMDE in csrc/CMakeLists.txt).
//
// What is missing here doesn't compile: GCC refuses its own function of that name without AVX-512's flags.
#pragma once
#include <immintrin.h>
#include <simde/x86/avx512.h>

// From here on kernels take the instructions for there.
#define __AVX512F__ 1
#define __AVX512BW__ 1

#define _mm512_add_epi32 simde_mm512_add_epi32
#define _mm512_castsi256_si512 simde_mm512_castsi256_si512
#define _mm512_castsi512_si256 simde_mm512_castsi512_si256
#undef _mm512_cmp_pd_mask
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_pd_mask simde_mm512_cmp_pd_mask
#define _mm512_cmp_ps_mask simde_mm512_cmp_ps_mask
#define _mm512_cvtph_ps simde_mm512_cvtph_ps
#define _mm512_mask_add_epi32 simde_mm512_mask_add_epi32
#define _mm512_mask_max_pd simde_mm512_mask_max_pd
#define _mm512_mask_max_ps simde_mm512_mask_max_ps
#define _mm512_mask_or_epi32 simde_mm512_mask_or_epi32
#define _mm512_maskz_permutexvar_epi16 simde_mm512_maskz_permutexvar_epi16
#define _mm512_permutexvar_epi16 simde_mm512_permutexvar_epi16
#define _mm512_set1_epi32 simde_mm512_set1_epi32
#define _mm512_set_epi16 simde_mm512_set_epi16
#define _mm512_setzero_pd simde_mm512_setzero_pd
#define _mm512_setzero_ps simde_mm512_setzero_ps
#define _mm512_test_epi32_mask simde_mm512_test_epi32_mask
#define _mm256_mask_storeu_epi16 twin_mm256_mask_storeu_epi16
#define _mm256_maskz_loadu_epi16 twin_mm256_maskz_loadu_epi16
#define _mm512_mask_storeu_pd twin_mm512_mask_storeu_pd
#define _mm512_mask_storeu_ps twin_mm512_mask_storeu_ps
#define _mm512_maskz_loadu_epi16 twin_mm512_maskz_loadu_epi16
#define _mm512_maskz_loadu_pd twin_mm512_maskz_loadu_pd
#define _mm512_maskz_loadu_ps twin_mm512_maskz_loadu_ps
#define _mm512_cvtepi32_epi8 twin_mm512_cvtepi32_epi8
#define _mm512_cvtepi64_epi8 twin_mm512_cvtepi64_epi8
#define _mm512_cvtepu8_epi32 twin_mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi64 twin_mm512_cvtepu8_epi64
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph twin_mm512_cvtps_ph
#define _mm512_stream_pd twin_mm512_stream_pd
#define _mm512_stream_ps twin_mm512_stream_ps

namespace cnnfast {
namespace CNNFAST_ISA {

// Element by element.
template <class To, class From>
static inline To convert_elements(From from) {
  To to{};
  for (size_t i = 0; i < sizeof(From) / sizeof from[0]; ++i) to[i] = static_cast<decltype(to[0] + 0)>(from[i]);
  return to;
}
typedef uint8_t TwinBytes16 __attribute__((vector_size(16)));
typedef uint8_t TwinBytes8 __attribute__((vector_size(8)));
typedef uint32_t TwinInts __attribute__((vector_size(64)));
typedef uint64_t TwinLongs __attribute__((vector_size(64)));

// The first elements, which is all that kernels mask: simde's read and write the whole vector.
template <class Vector, class Mask>
static inline Vector load_first(Mask mask, const void* p, size_t element) {
  Vector v{};
  memcpy(&v, p, static_cast<size_t>(__builtin_popcountll(mask)) * element);
  return v;
}
template <class Vector, class Mask>
static inline void store_first(void* p, Mask mask, Vector v, size_t element) {
  memcpy(p, &v, static_cast<size_t>(__builtin_popcountll(mask)) * element);
}
static inline __m256i twin_mm256_maskz_loadu_epi16(simde__mmask16 mask, const void* p) {
  return load_first<__m256i>(mask, p, 2);
}
static inline simde__m512i twin_mm512_maskz_loadu_epi16(simde__mmask32 mask, const void* p) {
  return load_first<simde__m512i>(mask, p, 2);
}
static inline simde__m512 twin_mm512_maskz_loadu_ps(simde__mmask16 mask, const void* p) {
  return load_first<simde__m512>(mask, p, 4);
}
static inline simde__m512d twin_mm512_maskz_loadu_pd(simde__mmask8 mask, const void* p) {
  return load_first<simde__m512d>(mask, p, 8);
}
static inline void twin_mm256_mask_storeu_epi16(void* p, simde__mmask16 mask, __m256i v) { store_first(p, mask, v, 2); }
static inline void twin_mm512_mask_storeu_ps(void* p, simde__mmask16 mask, simde__m512 v) {
  store_first(p, mask, v, 4);
}
static inline void twin_mm512_mask_storeu_pd(void* p, simde__mmask8 mask, simde__m512d v) {
  store_first(p, mask, v, 8);
}

static inline TwinInts twin_mm512_cvtepu8_epi32(__m128i bytes) {
  return convert_elements<TwinInts>((TwinBytes16)bytes);
}
static inline TwinLongs twin_mm512_cvtepu8_epi64(__m128i bytes) {
  TwinBytes8 low;
  memcpy(&low, &bytes, sizeof low);
  return convert_elements<TwinLongs>(low);
}
static inline __m128i twin_mm512_cvtepi32_epi8(TwinInts v) { return (__m128i)convert_elements<TwinBytes16>(v); }
static inline __m128i twin_mm512_cvtepi64_epi8(TwinLongs v) { return (__m128i)convert_elements<TwinBytes16>(v); }
static inline __m256i twin_mm512_cvtps_ph(simde__m512 v, int) {
  __m256 halves[2];
  memcpy(halves, &v, sizeof v);
  const __m128i low = _mm256_cvtps_ph(halves[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m128i high = _mm256_cvtps_ph(halves[1], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm256_set_m128i(high, low);
}
static inline void twin_mm512_stream_ps(float* p, simde__m512 v) { memcpy(p, &v, sizeof v); }
static inline void twin_mm512_stream_pd(double* p, simde__m512d v) { memcpy(p, &v, sizeof v); }

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
