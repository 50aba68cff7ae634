#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

namespace cnnfast::emulation {

#if defined(__x86_64__)

namespace {
// One call site for all switches, left by `ret`: the return predictor then hits (half the time of an indirect jump).
__attribute__((naked, noinline)) void swap_stacks(void** /*save: rdi*/, void* /*to: rsi*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
}  // namespace

void make_fiber(Fiber& fiber, char* stack, size_t bytes, size_t color, void (*entry)()) {
  constexpr uintptr_t line = 64;
  const uintptr_t top = (reinterpret_cast<uintptr_t>(stack + bytes) & ~(line - 1)) - line - (color & ~(line - 1));
  void** sp = reinterpret_cast<void**>(top);
  *--sp = nullptr;                         // entry's return address, never used; leaves rsp % 16 == 8 as the ABI wants
  *--sp = reinterpret_cast<void*>(entry);  // where swap_stacks returns to
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  fiber.stack_pointer = sp;
}

void switch_fiber(Fiber& from, Fiber& to) { swap_stacks(&from.stack_pointer, to.stack_pointer); }

#else

void make_fiber(Fiber& fiber, char* stack, size_t bytes, size_t, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#endif

Stacks::~Stacks() { release(); }

void Stacks::release() {
  if (memory_) munmap(memory_, count_ * kBytes);
  memory_ = nullptr;
  count_ = 0;
}

void Stacks::reserve(size_t count) {
  if (count <= count_) return;
  release();
  void* memory =
      mmap(nullptr, count * kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory);
  count_ = count;
  for (size_t i = 0; i < count; ++i) mprotect((*this)[i], 4096, PROT_NONE);
}

}  // namespace cnnfast::emulation
