// Parallel loops over OpenMP: the pool is torch's own, since libgomp is one library a process.
//
// A loop runs serially, without entering OpenMP, with one thread or one task, inside another parallel region, and in a
// forked child: after a fork libgomp's threads are gone and a parallel region would wait for them forever.
#pragma once
#include <cstdint>

namespace cnnfast {

using TaskFn = void (*)(const void* context, int64_t task);

// What denormal numbers are to the tasks. An x86 processor takes some 150 cycles for an operation on one, so that a
// convolution of them takes 100 times as long: sums of products flush them to zero. What is lost is below the smallest
// normal number (1.2e-38 in float and bfloat16, 2.2e-308 in double). The caller's mode comes back with the end of the
// loop, on every thread; other processors keep their mode.
enum class Denormals { kKeep, kFlush };

// Runs fn(context, 0 .. tasks-1), thread t taking one contiguous range. fn must not throw.
void run_tasks(int threads, int64_t tasks, TaskFn fn, const void* context, Denormals denormals);

namespace {
template <class F>
inline __attribute__((always_inline)) void parallel_for(int threads, int64_t tasks, const F& f,
                                                        Denormals denormals = Denormals::kKeep) {
  run_tasks(
      threads, tasks, [](const void* context, int64_t task) { (*static_cast<const F*>(context))(task); }, &f,
      denormals);
}
}  // namespace

}  // namespace cnnfast
