#include "scratch.h"

#include <sys/mman.h>

namespace cnnfast {
namespace {

constexpr size_t kGranule = size_t{1} << 16;

// Mapped, not from the heap: a block that lives on in the middle of the heap would keep everything that was freed below
// it from joining what is free above, and the process would grow by a tensor.
struct Block {
  void* data = nullptr;
  size_t size = 0;
  void release() {
    if (data) munmap(data, size);
    data = nullptr;
    size = 0;
  }
  ~Block() { release(); }
};

thread_local Block block;

}  // namespace

void* thread_scratch(size_t bytes) {
  if (bytes > block.size || !block.data) {
    block.release();
    const size_t size = (bytes / kGranule + 1) * kGranule;
    void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) return nullptr;
    block.data = data;
    block.size = size;
  }
  return block.data;
}

}  // namespace cnnfast
