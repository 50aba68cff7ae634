// The check variant: kernels compiled with -fsanitize=thread call us, not libtsan, at every load and store, and with
// -fsanitize=alignment,... call us, not libubsan, where C++ leaves the result undefined.
//
// Found, each as an Error naming kernel, block, thread, address and line of source:
//   - two threads of a block touching a byte of shared memory, one of them writing, with no barrier between;
//   - reads of shared memory that nobody has written, or that a cp.async not yet waited for will write;
//   - accesses outside of the block's shared memory (variables lie apart), the registered ranges and the thread's own
//     stack;
//   - reads of registered memory that is to be written and hasn't been;
//   - two threads of a launch touching a byte of global memory, one of them writing, unless they are of one block with
//   a
//     barrier between;
//   - addresses that are not as aligned as the type accessed, overflow of signed integers, shifts too far, indices
//     outside of an array;
//   - threads that end before asynchronous copies of theirs have landed.
// Not found: races between lanes that a __syncwarp with a partial mask orders only in part, and accesses inside of a
// registered range but outside of the tensor in it (guard bands and strides are the tests' work).
//
// In the plain variant everything here does nothing.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace cnnfast::emulation {
struct Block;
}

namespace cnnfast::emulation::checker {

enum Access { kRead, kWrite, kPendingWrite };

// Where in the source: the address of an instruction, or a number of line, which is smaller than any address.
using Where = uintptr_t;

#ifdef CNNFAST_EMULATION_CHECK
constexpr size_t kGap = 128;  // bytes between variables in shared memory; keeps the banks that they fall into
void start_launch(Block& block);
void start_block(Block& block);
void end_thread();
void clear_shared(size_t begin, size_t end);
void mark_gap(size_t begin, size_t end);
void on_access(const void* address, size_t bytes, Access access, Where where);
// "a.h:7" or "a.h:7, called from b.cu:9": of an instruction by addr2line, where the machine has it.
std::string source_line(Where where);
#else
constexpr size_t kGap = 0;
inline void start_launch(Block&) {}
inline void start_block(Block&) {}
inline void end_thread() {}
inline void clear_shared(size_t, size_t) {}
inline void mark_gap(size_t, size_t) {}
inline void on_access(const void*, size_t, Access, Where) {}
inline std::string source_line(Where where) { return "line " + std::to_string(where); }
#endif

// Fails, in both variants, where an instruction that takes a shared address is given another one.
void require_shared(const void* address, size_t bytes, const char* instruction);

}  // namespace cnnfast::emulation::checker
