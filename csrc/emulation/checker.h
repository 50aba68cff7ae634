// The check variant: kernels compiled with -fsanitize=thread call us, not libtsan, at every load and store.
//
// Found, each as an Error naming kernel, block, thread and address:
//   - two threads of a block touching a byte of shared memory, one of them writing, with no barrier between;
//   - reads of shared memory that nobody has written, or that a cp.async not yet waited for will write;
//   - accesses outside of the block's shared memory, the registered ranges and the thread's own stack;
//   - two threads of a launch writing a byte of global memory, or one reading what another wrote.
// Not found: races between lanes that a __syncwarp with a partial mask orders only in part, and accesses inside of a
// registered range but outside of the tensor in it (guard bands and strides are the tests' work).
//
// In the plain variant everything here does nothing.
#pragma once
#include <cstddef>

namespace cnnfast::emulation {
struct Block;
}

namespace cnnfast::emulation::checker {

enum Access { kRead, kWrite, kPendingWrite };

#ifdef CNNFAST_EMULATION_CHECK
void start_launch(Block& block);
void start_block(Block& block);
void clear_shared(size_t begin, size_t end);
void on_access(const void* address, size_t bytes, Access access);
#else
inline void start_launch(Block&) {}
inline void start_block(Block&) {}
inline void clear_shared(size_t, size_t) {}
inline void on_access(const void*, size_t, Access) {}
#endif

// Fails, in both variants, where an instruction that takes a shared address is given another one.
void require_shared(const void* address, size_t bytes, const char* instruction);

}  // namespace cnnfast::emulation::checker
