#include "parallel.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef CNNFAST_STD_THREADS
#include <thread>
#include <vector>
#endif
#include <pthread.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace cnnfast {
namespace {

bool in_forked_child = false;

// Registered when the module is loaded, so before any fork that could follow a parallel region of ours.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });

// The floating-point mode of one thread, for one loop.
class Mode {
 public:
  explicit Mode(Denormals denormals) {
#if defined(__x86_64__)
    saved_ = _mm_getcsr();
    constexpr unsigned kFlushToZero = 1u << 15, kDenormalsAreZero = 1u << 6;
    if (denormals == Denormals::kFlush) _mm_setcsr(saved_ | kFlushToZero | kDenormalsAreZero);
#else
    (void)denormals;
#endif
  }
  ~Mode() {
#if defined(__x86_64__)
    _mm_setcsr(saved_);
#endif
  }
  Mode(const Mode&) = delete;
  Mode& operator=(const Mode&) = delete;

 private:
  [[maybe_unused]] unsigned saved_ = 0;
};

}  // namespace

void run_tasks(int threads, int64_t tasks, TaskFn fn, const void* context, Denormals denormals) {
#ifdef _OPENMP
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads > 1 && !in_forked_child && !omp_in_parallel()) {
#pragma omp parallel num_threads(threads)
    {
      // The team may be smaller than asked for.
      const int64_t team = omp_get_num_threads();
      const int64_t me = omp_get_thread_num();
      const int64_t end = tasks * (me + 1) / team;
      const Mode mode(denormals);
      for (int64_t task = tasks * me / team; task < end; ++task) fn(context, task);
    }
    return;
  }
#elif defined(CNNFAST_STD_THREADS)
  // For the thread sanitizer, which sees through these but not through OpenMP's runtime.
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads > 1 && !in_forked_child) {
    std::vector<std::thread> team;
    for (int me = 0; me < threads; ++me)
      team.emplace_back([=] {
        const Mode mode(denormals);
        for (int64_t task = tasks * me / threads; task < tasks * (me + 1) / threads; ++task) fn(context, task);
      });
    for (std::thread& member : team) member.join();
    return;
  }
#else
  (void)threads;
#endif
  const Mode mode(denormals);
  for (int64_t task = 0; task < tasks; ++task) fn(context, task);
}

}  // namespace cnnfast
