// The CPU execution of the SIMT model: what kernels (through cuda.h), launchers and tests see of it.
//
// One OS thread runs one block at a time; each CUDA thread of the block is a fiber. A fiber runs until it meets a
// barrier or a warp collective, then the best ready one runs: priorities are strict, so that one thread gets as far
// ahead of the others as the synchronisation in the kernel lets it. That is what makes a missing barrier show in the
// result.
//
// The runtime is compiled without instrumentation, the kernels are, in the check variant (see checker.h).
#pragma once
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace cnnfast::emulation {

// A launch that a GPU would refuse, hang on, or run with undefined results.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order { ascending, descending, random };  // which of the ready threads (and of the blocks) runs first

struct Config {
  Order order = Order::ascending;
  uint32_t seed = 0;                   // of the random order
  bool lazy_async = false;             // cp.async writes as late as its wait allows; otherwise when issued
  int64_t max_grid = (1LL << 31) - 1;  // what max_grid_x() says: a small one makes kernels loop over their tiles
  int64_t processors = 132;            // what processors() says: few make kernels choose large tiles
  int64_t max_shared = 227 * 1024;     // bytes a block
  bool count_accesses = false;         // banks and sectors (traffic.h); check variant only
};

// Counted since the last reset; all launches together.
struct Statistics {
  uint64_t launches, blocks, threads, switches, barriers, warp_operations, mma, ldmatrix;
  uint64_t ldmatrix_wavefronts;  // one per 8x8 matrix where the rows fall into different banks
  uint64_t async_copies;
  uint64_t shared_bytes;  // the largest block's
};

Config& config();
Statistics& statistics();

// Memory that kernels may touch. With none registered, global accesses go unchecked. Only the check variant looks.
void register_range(const void* begin, size_t bytes, bool writable);
void clear_ranges();
extern const bool checking;  // true in the check variant

// Runs every thread of the grid through entry(arguments). Throws Error.
void launch(const char* kernel, dim3 grid, dim3 block, size_t dynamic_shared, void (*entry)(void*), void* arguments);

// ---- what the running thread may ask and do (line: of the caller, for messages)
uint3 thread_index() __attribute__((const));  // constant for as long as one thread's code runs
uint3 block_index() __attribute__((const));
dim3 block_size() __attribute__((const));
dim3 grid_size() __attribute__((const));
int lane_index() __attribute__((const));

void* shared_variable(const void* key, size_t bytes, size_t alignment);
void* dynamic_shared();

void block_barrier(const char* file, int line);
void warp_barrier(uint32_t mask, int line);
uint64_t shuffle(uint32_t mask, uint64_t bits, int source_lane, int line);
uint32_t ballot(uint32_t mask, bool predicate, int line);

// result[i] receives this lane's pair of elements of 8x8 matrix i; row is this lane's row address (16 bytes).
void ldmatrix(uint32_t* result, const void* row, int matrices, bool transposed, int line);
enum class MmaType { bf16, f16 };
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, MmaType type, int line);
void mma_m16n8k8_tf32(float* d, const uint32_t* a, const uint32_t* b, int line);
uint32_t round_tf32(float value);

// Copies valid_bytes from global to shared memory and fills the rest of the 16 bytes with zeros.
void async_copy(void* shared, const void* global, int bytes, int valid_bytes, int line);
void async_commit();
void async_wait(int groups_still_pending);

}  // namespace cnnfast::emulation
