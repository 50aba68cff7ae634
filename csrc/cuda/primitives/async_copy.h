// Asynchronous copies from global to shared memory. What a thread copied is visible to it after its wait, to the others
// after a barrier that follows that wait.
#pragma once
#include "cuda.h"

namespace cnnfast::cuda {

#ifdef __CUDACC__

// cp.async.cg.shared.global (sm_80): 16 bytes, past L1; where `valid` is false zeros are written and nothing is read
// (the address may then be any aligned one: CUTLASS's cp_async_zfill relies on it, too).
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(global), "r"(valid ? 16 : 0)
      : "memory");
}

// cp.async.commit_group (sm_80): closes the group of the copies issued since the last one.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// cp.async.wait_group (sm_80): until at most `pending` of the youngest groups are under way.
template <int pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

#else

inline void copy_async_16(void* shared, const void* global, bool valid, int line = __builtin_LINE()) {
  emulation::async_copy(shared, global, 16, valid ? 16 : 0, line);
}
inline void copy_async_commit() { emulation::async_commit(); }
template <int pending>
inline void copy_async_wait() {
  emulation::async_wait(pending);
}

#endif

}  // namespace cnnfast::cuda
