// Parallel loops over OpenMP: the pool is torch's own, since libgomp is one library a process.
//
// A loop runs serially, without entering OpenMP, with one thread or one task, inside another parallel region, and in a
// forked child: after a fork libgomp's threads are gone and a parallel region would wait for them forever.
#pragma once
#include <cstdint>

namespace cnnfast {

using TaskFn = void (*)(const void* context, int64_t task);

// Runs fn(context, 0 .. tasks-1), thread t taking one contiguous range. fn must not throw.
void run_tasks(int threads, int64_t tasks, TaskFn fn, const void* context);

namespace {
template <class F>
inline __attribute__((always_inline)) void parallel_for(int threads, int64_t tasks, const F& f) {
  run_tasks(threads, tasks, [](const void* context, int64_t task) { (*static_cast<const F*>(context))(task); }, &f);
}
}  // namespace

}  // namespace cnnfast
