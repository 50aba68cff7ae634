// The state of the block that runs, shared by the sources of the runtime and by nothing else.
#pragma once
#include <array>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"
#include "runtime.h"

namespace cnnfast::emulation {

constexpr uint32_t kWarp = 32;
constexpr uint32_t kMaxThreads = 1024;

struct AsyncCopy {
  unsigned char* shared;
  const unsigned char* global;
  int bytes, valid_bytes, line;
};

struct Thread {
  Fiber fiber;
  uint3 index{};
  uint32_t linear = 0, lane = 0, warp = 0;
  const char* waits_in = nullptr;  // null while it runs or is ready
  int line = 0;
  bool exited = false;
  uint32_t warp_epoch = 1;                           // __syncwarp calls seen, for the race check
  std::vector<std::vector<AsyncCopy>> async_groups;  // the last one is open
};

// A warp collective in progress. Several can be, with disjoint masks.
struct Gate {
  uint32_t mask = 0, arrived = 0;
  int operation = 0, line = 0;
  std::array<void*, kWarp> arguments;
};

struct Warp {
  std::array<Gate, 8> gates;
  uint32_t exists = 0, exited = 0;
};

struct Barrier {
  uint32_t arrived = 0;
  const char* file = nullptr;
  int line = 0;
  std::vector<uint32_t> waiting;
};

struct SharedVariable {
  const void* key;
  size_t offset;
};

struct Block {
  static constexpr size_t kArena = 256 * 1024;

  std::string kernel;
  uint3 index{};
  dim3 size, grid;
  uint64_t linear = 0;
  uint32_t threads = 0, alive = 0;
  std::vector<Thread> thread;
  std::vector<Warp> warp;
  Barrier barrier;
  uint32_t epoch = 1;  // block barriers passed, for the race check

  // Threads by priority: at[priority] = thread, priority[thread]; ready has a bit per priority.
  std::array<uint64_t, kMaxThreads / 64> ready;
  std::array<uint16_t, kMaxThreads> at, priority;

  Fiber main;
  std::string error;
  std::mt19937 random;
  void (*entry)(void*) = nullptr;
  void* arguments = nullptr;
  Stacks stacks;

  std::vector<unsigned char> arena = std::vector<unsigned char>(kArena + 1024);
  unsigned char* shared = nullptr;                             // the 1024-byte aligned start of the arena
  size_t dynamic_bytes = 0, shared_used = 0, shared_gaps = 0;  // used: with the gaps
  std::vector<SharedVariable> variables;
};

extern thread_local Block* current_block;
extern thread_local Thread* current_thread;

void make_ready(uint32_t thread);
void wait(const char* reason, int line);     // until somebody makes the current thread ready
[[noreturn]] void fail(const std::string&);  // ends the launch; called by the running thread

inline std::string at_line(int line) { return " (line " + std::to_string(line) + ")"; }

}  // namespace cnnfast::emulation
