// Packs: neighbouring elements that one instruction moves, 16 bytes at most.
#pragma once
#include <cstdint>

#include "primitives/cuda.h"

namespace cnnfast::cuda {

constexpr int kPackBytes = 16;
template <class T>
constexpr int kPackWidth = kPackBytes / static_cast<int>(sizeof(T));

template <class T, int width>
struct alignas(width * sizeof(T) < kPackBytes ? width * sizeof(T) : kPackBytes) Pack {
  T v[width];
};

__host__ __device__ __forceinline__ int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T, int width>
__device__ __forceinline__ Pack<T, width> load(const T* from) {
  return *reinterpret_cast<const Pack<T, width>*>(from);
}

// The i-th pack of a pixel. (With an index in elements, i * width, the compiler would write them one by one.)
template <class T, int width>
__device__ __forceinline__ Pack<T, width>& pack_of(T* pixel, int64_t i) {
  return reinterpret_cast<Pack<T, width>*>(pixel)[i];
}

// The i-th `width` numbers of a vector, wherever it begins; `missing` where there is none.
template <class T, int width>
__device__ __forceinline__ Pack<T, width> vector_of(const T* __restrict__ vector, int64_t i, T missing) {
  Pack<T, width> result;
  if (vector && reinterpret_cast<uintptr_t>(vector) % alignof(Pack<T, width>) == 0) {
    result = reinterpret_cast<const Pack<T, width>*>(vector)[i];
  } else {
#pragma unroll
    for (int e = 0; e < width; ++e) result.v[e] = vector ? vector[i * width + e] : missing;
  }
  return result;
}

// Whether an operand, which may be absent, can be moved `width` elements at a time; strides: or-ed together.
inline bool takes_packs(const void* operand, int64_t strides, int width, int64_t element_bytes) {
  return !operand || (strides % width == 0 && reinterpret_cast<uintptr_t>(operand) % (width * element_bytes) == 0);
}

}  // namespace cnnfast::cuda
