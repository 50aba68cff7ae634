// Element types: what they accumulate in, and the one rounding on the way out.
#pragma once
#include <cmath>
#include <cstring>

#include "cuda.h"

namespace cnnfast::cuda {

template <class T>
struct Numeric {  // f32, f64
  using Accumulator = T;
  static __device__ __forceinline__ T widen(T v) { return v; }
  static __device__ __forceinline__ T narrow(T v) { return v; }
};

template <>
struct Numeric<__nv_bfloat16> {
  using Accumulator = float;
  static __device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
  static __device__ __forceinline__ __nv_bfloat16 narrow(float v) { return __float2bfloat16_rn(v); }
};

template <>
struct Numeric<__half> {
  using Accumulator = float;
  static __device__ __forceinline__ float widen(__half v) { return __half2float(v); }
  static __device__ __forceinline__ __half narrow(float v) { return __float2half_rn(v); }
};

template <class T>
using Accumulator = typename Numeric<T>::Accumulator;

__device__ __forceinline__ float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Neither infinite nor NaN.
__device__ __forceinline__ bool is_finite(float value) { return fabsf(value) <= 3.402823466e38f; }

// Rounds two values into neighbouring 16-bit elements, one 32-bit store.
template <class T>
__device__ __forceinline__ void store_pair(T* to, float low, float high) {
  struct alignas(4) Pair {
    T low, high;
  };
  *reinterpret_cast<Pair*>(to) = Pair{Numeric<T>::narrow(low), Numeric<T>::narrow(high)};
}

}  // namespace cnnfast::cuda
