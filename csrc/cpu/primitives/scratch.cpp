#include "scratch.h"

#include <cstdlib>

namespace cnnfast {
namespace {

constexpr size_t kPage = 4096;

struct Block {
  void* data = nullptr;
  size_t size = 0;
  ~Block() { std::free(data); }
};

thread_local Block block;

}  // namespace

void* thread_scratch(size_t bytes) {
  if (bytes > block.size || !block.data) {
    std::free(block.data);
    block.size = (bytes + kPage) / kPage * kPage;
    block.data = std::aligned_alloc(kPage, block.size);
    if (!block.data) block.size = 0;
  }
  return block.data;
}

}  // namespace cnnfast
