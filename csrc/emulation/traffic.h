// How a warp's accesses fall into shared memory's banks and global memory's sectors, counted in the check variant when
// the configuration asks for it.
//
// Threads run one after the other here, so a warp's instruction is put together from them: the nth time that its lanes
// execute one since the last barrier counts as one access of the warp. The compiler splits vector accesses: pieces that
// follow each other in the program and in memory, within 16 aligned bytes, count as the one access that they are in the
// source, also where a few others lie between them. What nvcc really loads at a time is in the machine code
// (tests/test_cuda_static.py).
//
// Wavefronts of shared memory: 32 banks of 4 bytes; a warp's access goes by quarters where a lane has 16 bytes, by
// halves where it has 8; one more wavefront for each further word in the same bank. Sectors of global memory: 32 bytes.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace cnnfast::emulation::traffic {

enum class Kind { shared_read, shared_write, global_read, global_write };

// What was counted of one place in the source; `units` are wavefronts or sectors, `least` what the bytes need.
struct Count {
  std::string kernel;
  Kind kind;
  std::string where;
  uint64_t accesses, units, least;
};

std::vector<Count> counts();
void reset();

#ifdef CNNFAST_EMULATION_CHECK
void on_access(const void* address, size_t bytes, bool writes, uintptr_t where);
void on_wavefronts(uint64_t wavefronts, uint64_t least, uintptr_t where);  // of an instruction that reads shared memory
void flush();                                                              // at a barrier of the block, and at its end
#else
inline void on_access(const void*, size_t, bool, uintptr_t) {}
inline void on_wavefronts(uint64_t, uint64_t, uintptr_t) {}
inline void flush() {}
#endif

}  // namespace cnnfast::emulation::traffic
