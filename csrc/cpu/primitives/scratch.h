// Scratch memory of a thread: one block, grown when needed, kept for the next call, freed with the thread.
//
// Kernels block their work so that a thread needs at most about 4 MiB; the contents never outlive a call.
#pragma once
#include <cstddef>
#include <cstdint>

namespace cnnfast {

// At least `bytes` bytes, page-aligned; null where memory is out. The next call of the same thread may move it.
void* thread_scratch(size_t bytes);

// Carves a block into aligned parts: once to add up the sizes (base 0), once to get the addresses.
class Carver {
 public:
  explicit Carver(void* base) : next_(reinterpret_cast<uintptr_t>(base)) {}
  template <class T>
  __attribute__((always_inline)) T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(next_);
    next_ += (static_cast<uintptr_t>(count) * sizeof(T) + 63) / 64 * 64;
    return part;
  }
  __attribute__((always_inline)) size_t used() const { return next_; }

 private:
  uintptr_t next_;
};

}  // namespace cnnfast
