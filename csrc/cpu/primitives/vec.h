// SIMD for one source and every instruction set, by the compiler's vector extensions.
//
// The vector length follows from the flags the file is compiled with: 64 bytes with AVX-512, 32 with AVX2, 16 otherwise
// (SSE2, NEON, or scalar code where there is neither). Everything lives in a namespace that carries the ISA's name: the
// same inline function compiled for AVX-512 and for the portable path must stay two functions, or the linker would keep
// one of them for both. For the same reason kernel files use no STL.
//
// Storage types: float, double, BFloat16, Float16. The 16-bit ones are only loaded and stored; arithmetic is in float.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(CNNFAST_SIMDE)
#include "simde.h"
#elif defined(__AVX2__) || defined(__AVX512F__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own headers read an undefined vector on purpose (bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif

namespace cnnfast {
namespace CNNFAST_ISA {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

#define CNNFAST_INLINE inline __attribute__((always_inline))

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct VecTypes;
template <>
struct VecTypes<float> {
  typedef float Vec __attribute__((vector_size(kVecBytes)));
  typedef float Unaligned __attribute__((vector_size(kVecBytes), aligned(4), may_alias));
  typedef int32_t Index __attribute__((vector_size(kVecBytes)));
};
template <>
struct VecTypes<double> {
  typedef double Vec __attribute__((vector_size(kVecBytes)));
  typedef double Unaligned __attribute__((vector_size(kVecBytes), aligned(8), may_alias));
  typedef int64_t Index __attribute__((vector_size(kVecBytes)));
};
template <class T>
using Vec = typename VecTypes<T>::Vec;
template <class T>
using VecIndex = typename VecTypes<T>::Index;
template <class T>
constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(T));

// The type a storage type is computed in.
template <class S>
struct ComputeOf {
  using Type = float;
};
template <>
struct ComputeOf<double> {
  using Type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::Type;

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

CNNFAST_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
CNNFAST_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
CNNFAST_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
CNNFAST_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <class T>
CNNFAST_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecTypes<T>::Unaligned*>(p);
}
template <class T>
CNNFAST_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecTypes<T>::Unaligned*>(p) = v;
}
// x - 0 is x for every x, -0 and NaN included, so this is one broadcast.
template <class T>
CNNFAST_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

// acc += a * b, summed in acc's own register. Of AVX2's 16 a register tile takes all but one; GCC then sums where a was
// read, and moves and spills: 105 GFLOP/s of Zen 4's 117 became 113.
template <class T>
CNNFAST_INLINE void multiply_add(Vec<T>& acc, Vec<T> a, Vec<T> b) {
#if defined(__FMA__) && !defined(__AVX512F__)
  if constexpr (kSame<T, float>)
    asm("vfmadd231ps %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b));
  else
    asm("vfmadd231pd %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b));
#else
  acc += a * b;
#endif
}

// The larger of two, the NaN where one is (a where both are); of zeros either.
CNNFAST_INLINE Vec<float> maximum(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return _mm512_mask_max_ps(a, _mm512_cmp_ps_mask(a, a, _CMP_ORD_Q), a, b);  // b where either is NaN
#else
  return (b > a) | (b != b) ? b : a;
#endif
}
CNNFAST_INLINE Vec<double> maximum(Vec<double> a, Vec<double> b) {
#if defined(__AVX512F__)
  return _mm512_mask_max_pd(a, _mm512_cmp_pd_mask(a, a, _CMP_ORD_Q), a, b);
#else
  return (b > a) | (b != b) ? b : a;
#endif
}

constexpr int64_t kStreamBytes = 1 << 23;  // a tensor of more passes the caches by

// Stores past the caches to addresses that are a multiple of a vector: a result that wouldn't stay in them needn't be
// read before it is written. Such stores are ordered by stream_end() alone.
CNNFAST_INLINE void stream(float* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, v);
#else
  store(p, v);
#endif
}
CNNFAST_INLINE void stream(double* p, Vec<double> v) {
#if defined(__AVX512F__)
  _mm512_stream_pd(p, v);
#elif defined(__AVX2__)
  _mm256_stream_pd(p, v);
#else
  store(p, v);
#endif
}
CNNFAST_INLINE void stream_end() {
#if defined(__AVX2__) || defined(__AVX512F__)
  _mm_sfence();
#endif
}

// The first n of a vector's elements, 0 <= n <= lanes; the rest are zero. Nothing beyond them is read or written.
#if defined(__AVX2__) && !defined(__AVX512F__)
CNNFAST_INLINE __m256i first_floats(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
CNNFAST_INLINE __m256i first_doubles(int64_t n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
#endif
CNNFAST_INLINE Vec<float> load_partial(const float* p, int64_t n) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#elif defined(__AVX2__)
  return _mm256_maskload_ps(p, first_floats(n));
#else
  Vec<float> v{};
  memcpy(&v, p, static_cast<size_t>(n) * sizeof(float));
  return v;
#endif
}
CNNFAST_INLINE Vec<double> load_partial(const double* p, int64_t n) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p);
#elif defined(__AVX2__)
  return _mm256_maskload_pd(p, first_doubles(n));
#else
  Vec<double> v{};
  memcpy(&v, p, static_cast<size_t>(n) * sizeof(double));
  return v;
#endif
}
CNNFAST_INLINE void store_partial(float* p, Vec<float> v, int64_t n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(p, first_floats(n), v);
#else
  memcpy(p, &v, static_cast<size_t>(n) * sizeof(float));
#endif
}
CNNFAST_INLINE void store_partial(double* p, Vec<double> v, int64_t n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), v);
#elif defined(__AVX2__)
  _mm256_maskstore_pd(p, first_doubles(n), v);
#else
  memcpy(p, &v, static_cast<size_t>(n) * sizeof(double));
#endif
}

// Whether every element is zero (a NaN isn't).
CNNFAST_INLINE bool all_zero(Vec<float> v) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_EQ_OQ) == 0xffff;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_EQ_OQ)) == 0xff;
#else
  return (v[0] == 0) & (v[1] == 0) & (v[2] == 0) & (v[3] == 0);
#endif
}
CNNFAST_INLINE bool all_zero(Vec<double> v) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask(v, _mm512_setzero_pd(), _CMP_EQ_OQ) == 0xff;
#elif defined(__AVX2__)
  return _mm256_movemask_pd(_mm256_cmp_pd(v, _mm256_setzero_pd(), _CMP_EQ_OQ)) == 0xf;
#else
  return (v[0] == 0) & (v[1] == 0);
#endif
}

// Half a vector of 16-bit storage: as many elements as a float vector has lanes.
typedef uint16_t HalfVec __attribute__((vector_size(kVecBytes / 2)));
typedef uint16_t HalfVecUnaligned __attribute__((vector_size(kVecBytes / 2), aligned(2), may_alias));
typedef uint32_t BitsVec __attribute__((vector_size(kVecBytes)));

// bf16 is the upper half of a float. Of the general expressions GCC makes two to three times as many instructions, and
// passes that do little else took up to 1.7 times as long.
CNNFAST_INLINE Vec<float> widen(HalfVec h, BFloat16) {
#if defined(__AVX512F__)
  const __m512i twice = _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5,
                                         4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  return (Vec<float>)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, twice, _mm512_castsi256_si512((__m256i)h));
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
#else
  return (Vec<float>)(__builtin_convertvector(h, BitsVec) << 16);
#endif
}

// Round to nearest even; a NaN stays a NaN (quiet, its upper payload kept).
CNNFAST_INLINE HalfVec narrow(Vec<float> v, BFloat16) {
#if defined(__AVX512F__)
  const __m512i bits = (__m512i)v;
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(1 << 16));
  const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  rounded = _mm512_mask_add_epi32(rounded, odd, bits, _mm512_set1_epi32(0x8000));
  rounded = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
  const __m512i upper = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29, 27, 25, 23, 21, 19, 17,
                                         15, 13, 11, 9, 7, 5, 3, 1);
  return (HalfVec)_mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, rounded));
#else
  const BitsVec bits = (BitsVec)v;
  const BitsVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const BitsVec quiet = (bits >> 16) | 0x40u;
#if defined(__AVX2__)
  const __m256i is_nan = (__m256i)_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q);
  const __m256i whole = _mm256_blendv_epi8((__m256i)rounded, (__m256i)quiet, is_nan);
  return (HalfVec)_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(whole, whole), 8));
#else
  const BitsVec is_nan = (BitsVec)((bits & 0x7fffffffu) > 0x7f800000u);
  return __builtin_convertvector((quiet & is_nan) | (rounded & ~is_nan), HalfVec);
#endif
#endif
}

// Without instructions for it a conversion is long: called, not inlined at every load and store.
#if defined(__AVX512F__) || defined(__F16C__)
#define CNNFAST_CONVERSION CNNFAST_INLINE
#else
#define CNNFAST_CONVERSION inline __attribute__((noinline))
#endif
CNNFAST_CONVERSION Vec<float> widen(HalfVec h, Float16) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return _mm256_cvtph_ps((__m128i)h);
#else
  // The exponent moves by 112 through a multiplication, which also normalises subnormals; Inf and NaN get theirs by
  // hand.
  BitsVec bits = __builtin_convertvector(h, BitsVec);
  BitsVec magnitude = (bits & 0x7fffu) << 13;
  BitsVec special = (BitsVec)(magnitude >= (0x7c00u << 13));
  Vec<float> scaled = (Vec<float>)magnitude * 0x1p112f;
  BitsVec out = ((BitsVec)scaled & ~special) | ((magnitude | 0x7f800000u) & special);
  return (Vec<float>)(out | ((bits & 0x8000u) << 16));
#endif
}

CNNFAST_CONVERSION HalfVec narrow(Vec<float> v, Float16) {
#if defined(__AVX512F__)
  return (HalfVec)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (HalfVec)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  BitsVec bits = (BitsVec)v;
  BitsVec sign = (bits >> 16) & 0x8000u;
  BitsVec x = bits & 0x7fffffffu;
  BitsVec normal = (x - (112u << 23) + 0xfffu + ((x >> 13) & 1u)) >> 13;
  // Adding 0.5 rounds to a multiple of 2^-24, the smallest subnormal; its count is left in the low bits.
  BitsVec subnormal = (BitsVec)((Vec<float>)x + 0.5f) - 0x3f000000u;
  BitsVec nan = 0x7e00u | ((x >> 13) & 0x3ffu);
  BitsVec is_subnormal = (BitsVec)(x < 0x38800000u);
  BitsVec is_inf = (BitsVec)(x >= 0x47800000u);
  BitsVec is_nan = (BitsVec)(x > 0x7f800000u);
  BitsVec out = (subnormal & is_subnormal) | (normal & ~is_subnormal);
  out = (0x7c00u & is_inf) | (out & ~is_inf);
  out = (nan & is_nan) | (out & ~is_nan);
  return __builtin_convertvector(out | sign, HalfVec);
#endif
}

// Loads and stores of any storage type through its compute type.
CNNFAST_INLINE Vec<float> load_wide(const float* p) { return load(p); }
CNNFAST_INLINE Vec<double> load_wide(const double* p) { return load(p); }
CNNFAST_INLINE Vec<float> load_wide(const float* p, int64_t n) { return load_partial(p, n); }
CNNFAST_INLINE Vec<double> load_wide(const double* p, int64_t n) { return load_partial(p, n); }
template <class S>
CNNFAST_INLINE Vec<float> load_wide(const S* p) {
  return widen(*reinterpret_cast<const HalfVecUnaligned*>(p), S{});
}
template <class S>
CNNFAST_INLINE Vec<float> load_wide(const S* p, int64_t n) {
#if defined(__AVX512F__)
  const HalfVec h = (HalfVec)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
#else
  HalfVec h{};
  memcpy(&h, p, static_cast<size_t>(n) * sizeof(S));
#endif
  return widen(h, S{});
}
CNNFAST_INLINE void store_narrow(float* p, Vec<float> v) { store(p, v); }
CNNFAST_INLINE void store_narrow(double* p, Vec<double> v) { store(p, v); }
CNNFAST_INLINE void store_narrow(float* p, Vec<float> v, int64_t n) { store_partial(p, v, n); }
CNNFAST_INLINE void store_narrow(double* p, Vec<double> v, int64_t n) { store_partial(p, v, n); }
template <class S>
CNNFAST_INLINE void store_narrow(S* p, Vec<float> v) {
  *reinterpret_cast<HalfVecUnaligned*>(p) = narrow(v, S{});
}
template <class S>
CNNFAST_INLINE void store_narrow(S* p, Vec<float> v, int64_t n) {
  const HalfVec h = narrow(v, S{});
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), (__m256i)h);
#else
  memcpy(p, &h, static_cast<size_t>(n) * sizeof(S));
#endif
}

// A vector past the caches; p is a multiple of its storage.
CNNFAST_INLINE void stream_narrow(float* p, Vec<float> v) { stream(p, v); }
CNNFAST_INLINE void stream_narrow(double* p, Vec<double> v) { stream(p, v); }
template <class S>
CNNFAST_INLINE void stream_narrow(S* p, Vec<float> v) {
  const HalfVec h = narrow(v, S{});
#if defined(__AVX512F__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)h);
#elif defined(__AVX2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)h);
#else
  memcpy(p, &h, sizeof h);
#endif
}

// One element.
CNNFAST_INLINE float widen_one(float x) { return x; }
CNNFAST_INLINE double widen_one(double x) { return x; }
CNNFAST_INLINE float widen_one(BFloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}
CNNFAST_INLINE float widen_one(Float16 x) { return load_wide(&x, 1)[0]; }
CNNFAST_INLINE void narrow_one(float* p, float x) { *p = x; }
CNNFAST_INLINE void narrow_one(double* p, double x) { *p = x; }
template <class S>
CNNFAST_INLINE void narrow_one(S* p, float x) {
  store_narrow(p, broadcast(x), 1);
}

// Bytes in memory as the lanes of an integer vector, and the other way round. Size by size, where no instruction does
// it at once: GCC converts to four times the size element by element.
template <class E, int n>
struct VectorOf {
  typedef E Type __attribute__((vector_size(n * sizeof(E))));
};
template <class L>
CNNFAST_INLINE L load_bytes(const uint8_t* p) {
  constexpr int size = sizeof(L{}[0]), n = sizeof(L) / size;
#if defined(__AVX512F__)
  if constexpr (sizeof(L) == 64 && size == 4)
    return (L)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  if constexpr (sizeof(L) == 64 && size == 8)
    return (L)_mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(L) == 32 && size == 4)
    return (L)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#endif
  typename VectorOf<uint8_t, n>::Type bytes;
  memcpy(&bytes, p, n);
  const auto halves = __builtin_convertvector(bytes, typename VectorOf<uint16_t, n>::Type);
  if constexpr (size == 2) return (L)halves;
  const auto words = __builtin_convertvector(halves, typename VectorOf<uint32_t, n>::Type);
  return __builtin_convertvector(words, L);
}
template <class L>
CNNFAST_INLINE void store_bytes(uint8_t* p, L v) {
  constexpr int size = sizeof(L{}[0]), n = sizeof(L) / size;
#if defined(__AVX512F__)
  if constexpr (sizeof(L) == 64 && size == 4)
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)v));
  if constexpr (sizeof(L) == 64 && size == 8)
    return _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm512_cvtepi64_epi8((__m512i)v));
#endif
  typename VectorOf<uint16_t, n>::Type halves;
  if constexpr (size == 8)
    halves = __builtin_convertvector(__builtin_convertvector(v, typename VectorOf<uint32_t, n>::Type),
                                     typename VectorOf<uint16_t, n>::Type);
  else
    halves = __builtin_convertvector(v, typename VectorOf<uint16_t, n>::Type);
  const auto bytes = __builtin_convertvector(halves, typename VectorOf<uint8_t, n>::Type);
  memcpy(p, &bytes, n);
}

// {a0 b0 a1 b1 ...} of the lower and of the upper halves.
template <class T>
CNNFAST_INLINE Vec<T> interleave_low(Vec<T> a, Vec<T> b) {
  using I = VecIndex<T>;
  if constexpr (kLanes<T> == 16)
    return __builtin_shuffle(a, b, I{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
  else if constexpr (kLanes<T> == 8)
    return __builtin_shuffle(a, b, I{0, 8, 1, 9, 2, 10, 3, 11});
  else if constexpr (kLanes<T> == 4)
    return __builtin_shuffle(a, b, I{0, 4, 1, 5});
  else
    return __builtin_shuffle(a, b, I{0, 2});
}
template <class T>
CNNFAST_INLINE Vec<T> interleave_high(Vec<T> a, Vec<T> b) {
  using I = VecIndex<T>;
  if constexpr (kLanes<T> == 16)
    return __builtin_shuffle(a, b, I{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
  else if constexpr (kLanes<T> == 8)
    return __builtin_shuffle(a, b, I{4, 12, 5, 13, 6, 14, 7, 15});
  else if constexpr (kLanes<T> == 4)
    return __builtin_shuffle(a, b, I{2, 6, 3, 7});
  else
    return __builtin_shuffle(a, b, I{1, 3});
}

// v[i][j] <-> v[j][i], in place. Interleaving vector i with vector i + n/2 rotates the bits of the element's address by
// one; log2(n) such rounds exchange row and column.
template <class T>
CNNFAST_INLINE void transpose(Vec<T>* v) {
  constexpr int n = kLanes<T>;
#pragma GCC unroll 4
  for (int round = 1; round < n; round *= 2) {
    Vec<T> u[n];
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) {
      u[2 * i] = interleave_low<T>(v[i], v[i + n / 2]);
      u[2 * i + 1] = interleave_high<T>(v[i], v[i + n / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) v[i] = u[i];
  }
}

// Lane l gets the value of lane q of l's group of kGroup lanes.
#define CNNFAST_LANE(l) (l) / kGroup* kGroup + kLane
template <class T, int kGroup, int kLane>
CNNFAST_INLINE Vec<T> broadcast_in_group(Vec<T> v) {
  using I = VecIndex<T>;
  if constexpr (kGroup == 1)
    return v;
  else if constexpr (kLanes<T> == 16)
    return __builtin_shuffle(
        v, I{CNNFAST_LANE(0), CNNFAST_LANE(1), CNNFAST_LANE(2), CNNFAST_LANE(3), CNNFAST_LANE(4), CNNFAST_LANE(5),
             CNNFAST_LANE(6), CNNFAST_LANE(7), CNNFAST_LANE(8), CNNFAST_LANE(9), CNNFAST_LANE(10), CNNFAST_LANE(11),
             CNNFAST_LANE(12), CNNFAST_LANE(13), CNNFAST_LANE(14), CNNFAST_LANE(15)});
  else if constexpr (kLanes<T> == 8)
    return __builtin_shuffle(v, I{CNNFAST_LANE(0), CNNFAST_LANE(1), CNNFAST_LANE(2), CNNFAST_LANE(3), CNNFAST_LANE(4),
                                  CNNFAST_LANE(5), CNNFAST_LANE(6), CNNFAST_LANE(7)});
  else if constexpr (kLanes<T> == 4)
    return __builtin_shuffle(v, I{CNNFAST_LANE(0), CNNFAST_LANE(1), CNNFAST_LANE(2), CNNFAST_LANE(3)});
  else
    return __builtin_shuffle(v, I{CNNFAST_LANE(0), CNNFAST_LANE(1)});
}
#undef CNNFAST_LANE

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
