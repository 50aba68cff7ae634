// CUDA's language for a C++ compiler: what a .cu file needs beyond the primitives in csrc/cuda/primitives.
#pragma once
#include <cuda_bf16.h>  // both are written to compile without nvcc
#include <cuda_fp16.h>
#include <vector_types.h>

#include <cstdint>
#include <cstring>

#include "runtime.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static_assert(false, "use CNNFAST_SHARED or CNNFAST_DYNAMIC_SHARED")

#define threadIdx (::cnnfast::emulation::thread_index())
#define blockIdx (::cnnfast::emulation::block_index())
#define blockDim (::cnnfast::emulation::block_size())
#define gridDim (::cnnfast::emulation::grid_size())

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  ::cnnfast::emulation::block_barrier(file, line);
}

inline void __syncwarp(uint32_t mask = ~0u, int line = __builtin_LINE()) {
  ::cnnfast::emulation::warp_barrier(mask, line);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, int line = __builtin_LINE()) {
  return ::cnnfast::emulation::ballot(mask, predicate != 0, line);
}

namespace cnnfast::emulation {
template <class V>
V shuffle_value(uint32_t mask, V value, int source, int line) {
  static_assert(sizeof(V) <= 8, "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(mask, bits, source, line);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
// The first and last lane of this lane's segment of `width` lanes.
inline int first_lane(int width) { return lane_index() & ~(width - 1); }
inline int last_lane(int width) { return lane_index() | (width - 1); }
inline int lane_or_self(bool inside, int lane) { return inside ? lane : lane_index(); }
}  // namespace cnnfast::emulation

template <class V>
V __shfl_sync(uint32_t mask, V value, int source, int width = 32, int line = __builtin_LINE()) {
  using namespace ::cnnfast::emulation;
  return shuffle_value(mask, value, first_lane(width) | (source & (width - 1)), line);
}
template <class V>
V __shfl_up_sync(uint32_t mask, V value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  using namespace ::cnnfast::emulation;
  const int source = lane_index() - static_cast<int>(delta);
  return shuffle_value(mask, value, lane_or_self(source >= first_lane(width), source), line);
}
template <class V>
V __shfl_down_sync(uint32_t mask, V value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  using namespace ::cnnfast::emulation;
  const int source = lane_index() + static_cast<int>(delta);
  return shuffle_value(mask, value, lane_or_self(source <= last_lane(width), source), line);
}
template <class V>
V __shfl_xor_sync(uint32_t mask, V value, int lanes, int width = 32, int line = __builtin_LINE()) {
  using namespace ::cnnfast::emulation;
  const int source = lane_index() ^ lanes;
  return shuffle_value(mask, value, lane_or_self(source <= last_lane(width), source), line);
}
