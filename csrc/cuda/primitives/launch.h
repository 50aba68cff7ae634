// Launching, for launchers: no synchronisation, no allocation, every launch checked.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>

#include "cuda.h"

namespace cnnfast::cuda {

#ifdef __CUDACC__

// Lets a kernel have that much dynamic shared memory, and asks for as many of its blocks on a multiprocessor as fit:
// the driver's own choice leaves more to L1. Once for each kernel and device.
template <auto kernel>
cudaError_t prepare(size_t shared_bytes) {
  static std::atomic<uint64_t> prepared{0};  // devices, a bit for each
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const uint64_t bit = uint64_t{1} << (device & 63);
  if (error != cudaSuccess || prepared.load(std::memory_order_relaxed) & bit) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error == cudaSuccess)
    error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess) prepared.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

// launch<kernel<float>>(grid, block, dynamic shared bytes, stream, arguments...): null, or the driver's reason. The
// bytes are the same in every launch of a kernel, or `most_shared` at most.
template <auto kernel, size_t most_shared = 0, class... Args>
const char* launch(dim3 grid, dim3 block, size_t shared_bytes, void* stream, const Args&... arguments) {
  cudaError_t error = shared_bytes ? prepare<kernel>(most_shared ? most_shared : shared_bytes) : cudaSuccess;
  if (error == cudaSuccess) {
    kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// The largest gridDim.x.
inline int64_t max_grid_x() { return (int64_t{1} << 31) - 1; }

// The multiprocessors of the current device.
inline int64_t processors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return std::max(count, 1);
}

// The shared memory of one, in bytes.
inline int64_t shared_bytes_of_a_processor() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) == cudaSuccess)
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  return bytes;
}

#else

template <auto kernel, size_t most_shared = 0, class... Args>
const char* launch(dim3 grid, dim3 block, size_t shared_bytes, void*, const Args&... arguments) {
  static std::atomic<size_t> prepared{most_shared};  // on a device the first launch that has any asks for it
  size_t unprepared = 0;
  prepared.compare_exchange_strong(unprepared, shared_bytes);
  if (shared_bytes > prepared) return "more dynamic shared memory than the kernel asked for";
  auto body = [&]() __attribute__((no_sanitize_thread)) { kernel(arguments...); };
  emulation::launch(
      __PRETTY_FUNCTION__, grid, block, shared_bytes,
      [](void* f) __attribute__((no_sanitize_thread)) { (*static_cast<decltype(body)*>(f))(); }, &body);
  return nullptr;
}

inline int64_t max_grid_x() { return emulation::config().max_grid; }
inline int64_t processors() { return emulation::config().processors; }
inline int64_t shared_bytes_of_a_processor() { return emulation::config().max_shared + 1024; }

#endif

// Blocks for that many tiles; a kernel loops `for (tile = blockIdx.x; tile < tiles; tile += gridDim.x)`.
inline dim3 grid_for(int64_t tiles) { return dim3(static_cast<unsigned>(std::min(tiles, max_grid_x())), 1, 1); }

}  // namespace cnnfast::cuda
