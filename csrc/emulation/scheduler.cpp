// Launches, the order in which threads run, and the block barrier.
#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>

#include "checker.h"
#include "state.h"
#include "traffic.h"

namespace cnnfast::emulation {

thread_local Block* current_block = nullptr;
thread_local Thread* current_thread = nullptr;

Config& config() {
  static Config value;
  return value;
}

Statistics& statistics() {
  static Statistics value{};
  return value;
}

uint3 thread_index() { return current_thread->index; }
uint3 block_index() { return current_block->index; }
dim3 block_size() { return current_block->size; }
dim3 grid_size() { return current_block->grid; }
int lane_index() { return static_cast<int>(current_thread->lane); }

namespace {

std::string coordinates(uint3 v) {
  return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}

std::string place(const Block& block) { return block.kernel + ", block " + coordinates(block.index); }

// Strict priorities. The random order draws new ones for each block and at each block barrier; half of the draws
// permute whole warps, half permute threads.
void draw_priorities(Block& block) {
  const uint32_t n = block.threads;
  const auto begin = block.at.begin(), end = begin + n;
  std::iota(begin, end, uint16_t{0});
  if (config().order == Order::descending) std::reverse(begin, end);
  if (config().order == Order::random) {
    if (block.random() & 1) {
      std::vector<uint16_t> warps((n + kWarp - 1) / kWarp);
      std::iota(warps.begin(), warps.end(), uint16_t{0});
      std::shuffle(warps.begin(), warps.end(), block.random);
      uint32_t next = 0;
      for (uint32_t w : warps)
        for (uint32_t t = w * kWarp; t < std::min(n, (w + 1) * kWarp); ++t) block.at[next++] = static_cast<uint16_t>(t);
    } else {
      std::shuffle(begin, end, block.random);
    }
  }
  for (uint32_t i = 0; i < n; ++i) block.priority[block.at[i]] = static_cast<uint16_t>(i);
}

// The best ready thread, taken out of the ready set; null if there is none.
Thread* take_ready(Block& block) {
  for (size_t word = 0; word < block.ready.size(); ++word) {
    if (!block.ready[word]) continue;
    const int bit = __builtin_ctzll(block.ready[word]);
    block.ready[word] &= block.ready[word] - 1;
    return &block.thread[block.at[word * 64 + bit]];
  }
  return nullptr;
}

std::string deadlock(const Block& block) {
  std::string text = place(block) + ": deadlock";
  int listed = 0;
  for (const Thread& thread : block.thread)
    if (thread.waits_in && listed++ < 6)
      text += "\n  thread " + coordinates(thread.index) + " waits in " + thread.waits_in + at_line(thread.line);
  return text + (listed > 6 ? "\n  ... " + std::to_string(listed) + " threads in all" : "");
}

// Leaves the current fiber; returns when it is chosen again.
void run_next(Fiber& from) {
  Block& block = *current_block;
  Thread* next = take_ready(block);
  if (!next && block.alive) block.error = deadlock(block);
  if (next == current_thread && next) return;
  current_thread = next;
  ++statistics().switches;
  switch_fiber(from, next ? next->fiber : block.main);
}

void release_barrier_if_complete(Block& block) {
  Barrier& barrier = block.barrier;
  if (!barrier.arrived || barrier.arrived < block.alive) return;
  ++statistics().barriers;
  ++block.epoch;
  traffic::flush();
  if (config().order == Order::random) draw_priorities(block);  // nobody is in the ready set now
  for (uint32_t t : barrier.waiting) make_ready(t);
  barrier.waiting.clear();
  barrier.arrived = 0;
}

void thread_main() {
  Block& block = *current_block;
  block.entry(block.arguments);
  Thread& thread = *current_thread;
  checker::end_thread();
  thread.exited = true;
  --block.alive;
  block.warp[thread.warp].exited |= 1u << thread.lane;
  release_barrier_if_complete(block);  // since sm_70 a thread that has exited no longer counts
  run_next(thread.fiber);
  __builtin_unreachable();
}

void start_block(Block& block, uint64_t linear) {
  block.linear = linear;
  block.index =
      uint3{static_cast<unsigned>(linear % block.grid.x), static_cast<unsigned>(linear / block.grid.x % block.grid.y),
            static_cast<unsigned>(linear / block.grid.x / block.grid.y)};
  std::memset(block.shared, 0xff, block.shared_used);  // NaN in every floating type, -1 as an integer
  checker::start_block(block);
  block.epoch = 1;
  block.alive = block.threads;
  block.ready.fill(0);
  draw_priorities(block);
  block.barrier.arrived = 0;
  block.barrier.waiting.clear();
  for (Warp& warp : block.warp) warp = Warp();
  for (Thread& thread : block.thread) {
    thread.waits_in = nullptr;
    thread.exited = false;
    thread.warp_epoch = 1;
    thread.async_groups.clear();
    block.warp[thread.warp].exists |= 1u << thread.lane;
    make_fiber(thread.fiber, block.stacks[thread.linear], Stacks::kBytes, thread.linear * 448 % 8192, thread_main);
    make_ready(thread.linear);
  }
}

void check_limits(const Block& block) {
  const dim3 g = block.grid, b = block.size;
  const std::string grid = coordinates({g.x, g.y, g.z}), size = coordinates({b.x, b.y, b.z});
  if (!g.x || !g.y || !g.z || g.x > (1u << 31) - 1 || g.y > 65535 || g.z > 65535)
    throw Error(block.kernel + ": invalid grid " + grid);
  if (!block.threads || block.threads > kMaxThreads || b.z > 64) throw Error(block.kernel + ": invalid block " + size);
  if (static_cast<int64_t>(block.dynamic_bytes) > config().max_shared)
    throw Error(block.kernel + ": too much dynamic shared memory");
}

Block& block_of_this_thread() {
  static thread_local std::unique_ptr<Block> block;
  if (!block) block = std::make_unique<Block>();
  return *block;
}

// "... [with auto kernel = f<int>; Args = {...}]" -> "f<int>"; anything else stays.
std::string kernel_name(const std::string& text) {
  const std::string key = "kernel = ";
  size_t begin = text.find(key);
  if (begin == std::string::npos) return text;
  begin += key.size();
  std::string name = text.substr(begin, text.find_first_of(";]", begin) - begin);
  for (const char* noise : {"cnnfast::", "{anonymous}::", "<unnamed>::", "(anonymous namespace)::"})
    for (size_t i; (i = name.find(noise)) != std::string::npos;) name.erase(i, std::strlen(noise));
  return name;
}

}  // namespace

void make_ready(uint32_t thread) {
  Block& block = *current_block;
  block.thread[thread].waits_in = nullptr;
  const uint32_t p = block.priority[thread];
  block.ready[p / 64] |= uint64_t{1} << (p % 64);
}

void wait(const char* reason, int line) {
  Thread& thread = *current_thread;
  thread.waits_in = reason;
  thread.line = line;
  run_next(thread.fiber);
}

void fail(const std::string& message) {
  Block& block = *current_block;
  block.error = place(block) + ", thread " + coordinates(current_thread->index) + ": " + message;
  Fiber abandoned;
  current_thread = nullptr;
  switch_fiber(abandoned, block.main);
  __builtin_unreachable();
}

void block_barrier(const char* file, int line) {
  Block& block = *current_block;
  Thread& thread = *current_thread;
  Barrier& barrier = block.barrier;
  if (!barrier.arrived) {
    barrier.file = file;
    barrier.line = line;
  } else if (barrier.line != line || std::strcmp(barrier.file, file) != 0) {
    fail("__syncthreads divergence: line " + std::to_string(line) + " meets line " + std::to_string(barrier.line));
  }
  ++barrier.arrived;
  barrier.waiting.push_back(thread.linear);
  thread.waits_in = "__syncthreads";
  thread.line = line;
  release_barrier_if_complete(block);  // the last one to arrive queues, too: the chosen order holds after a barrier
  run_next(thread.fiber);
}

void launch(const char* kernel, dim3 grid, dim3 size, size_t dynamic_shared, void (*entry)(void*), void* arguments) {
  static std::mutex one_launch_at_a_time;  // configuration, statistics and ranges are the process's
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);

  Block& block = block_of_this_thread();
  block.kernel = kernel_name(kernel);
  block.grid = grid;
  block.size = size;
  block.threads = size.x * size.y * size.z;
  block.dynamic_bytes = block.shared_used = dynamic_shared;
  block.shared_gaps = 0;
  block.entry = entry;
  block.arguments = arguments;
  block.error.clear();
  block.variables.clear();
  check_limits(block);

  block.stacks.reserve(block.threads);
  block.shared =
      reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(block.arena.data()) + 1023) & ~uintptr_t{1023});
  block.thread.assign(block.threads, Thread());
  block.warp.assign((block.threads + kWarp - 1) / kWarp, Warp());
  for (uint32_t t = 0; t < block.threads; ++t) {
    Thread& thread = block.thread[t];
    thread.index = uint3{t % size.x, t / size.x % size.y, t / (size.x * size.y)};
    thread.linear = t;
    thread.lane = t % kWarp;
    thread.warp = t / kWarp;
  }
  block.random.seed(config().seed);
  checker::start_launch(block);

  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<uint32_t> shuffled;
  if (config().order == Order::random && blocks < (1u << 24)) {
    shuffled.resize(blocks);
    std::iota(shuffled.begin(), shuffled.end(), 0u);
    std::shuffle(shuffled.begin(), shuffled.end(), block.random);
  }
  ++statistics().launches;
  current_block = &block;
  for (uint64_t i = 0; i < blocks && block.error.empty(); ++i) {
    start_block(block, config().order == Order::descending ? blocks - 1 - i : shuffled.empty() ? i : shuffled[i]);
    run_next(block.main);
    traffic::flush();
    ++statistics().blocks;
    statistics().threads += block.threads;
  }
  current_block = nullptr;
  current_thread = nullptr;
  statistics().shared_bytes = std::max<uint64_t>(statistics().shared_bytes, block.shared_used - block.shared_gaps);
  if (!block.error.empty()) throw Error(block.error);
}

// ---- shared memory

void* shared_variable(const void* key, size_t bytes, size_t alignment) {
  Block& block = *current_block;
  for (const SharedVariable& variable : block.variables)
    if (variable.key == key) return block.shared + variable.offset;
  const size_t begin = block.shared_used + checker::kGap;
  const size_t offset = (begin + alignment - 1) / alignment * alignment;
  block.shared_gaps += checker::kGap;
  const size_t needed = offset + bytes - block.shared_gaps;
  if (static_cast<int64_t>(needed) > config().max_shared)
    fail("needs " + std::to_string(needed) + " bytes of shared memory, a block has " +
         std::to_string(config().max_shared));
  std::memset(block.shared + block.shared_used, 0xff, offset + bytes - block.shared_used);
  checker::clear_shared(block.shared_used, offset + bytes);
  checker::mark_gap(block.shared_used, offset);
  block.shared_used = offset + bytes;
  block.variables.push_back({key, offset});
  return block.shared + offset;
}

void* dynamic_shared() { return current_block->shared; }

}  // namespace cnnfast::emulation
