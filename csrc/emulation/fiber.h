// Fibers: a stack and a place to continue. On x86-64 a switch saves the six callee-saved registers (about 15 ns);
// elsewhere ucontext does (slower: it makes system calls).
#pragma once
#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace cnnfast::emulation {

struct Fiber {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

// Prepares a fiber that starts in entry(), which never returns, on the given stack. color moves the first stack lines
// so that the stacks of a block don't all fall into the same cache sets.
void make_fiber(Fiber& fiber, char* stack, size_t bytes, size_t color, void (*entry)());
void switch_fiber(Fiber& from, Fiber& to);

// Stacks for n fibers, a guard page below each; memory is touched only as it is used.
class Stacks {
 public:
  static constexpr size_t kBytes = 64 * 1024;
  ~Stacks();
  void reserve(size_t count);
  char* operator[](size_t i) const { return memory_ + i * kBytes; }
  bool contains(const void* p) const {
    return static_cast<size_t>(static_cast<const char*>(p) - memory_) < count_ * kBytes;
  }

 private:
  void release();
  char* memory_ = nullptr;
  size_t count_ = 0;
};

}  // namespace cnnfast::emulation
