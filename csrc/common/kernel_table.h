// The kernel table: what a native module offers, as data.
//
// A kernel file ends with its line(s) in the table. The entries are collected by the linker (an ELF section of
// pointers), so there is no list of kernels anywhere, no code that runs at load time (an AVX-512 translation unit must
// execute nothing on a machine without AVX-512), and the bindings name no operation.
#pragma once
#include <cstddef>
#include <cstdint>

#include "params.h"

namespace cnnfast {

constexpr int kMaxOperands = 16;

// Where a kernel that has an entry "<stem>.<direction>.<dtype>.pack" finds the weights as that entry left them in its
// workspace; null in a call that brings them as they come. The packed form depends on the parameters and nothing else,
// and the results are the same bits either way. A kernel that has ".unpack", too, reads the weights themselves only
// where they aren't all finite: they needn't be kept, for that entry writes them back, bit by bit, to their own
// operand.
constexpr int kPackedOperand = kMaxOperands - 1;

// What a launcher gets besides its parameter struct.
struct Launch {
  void* const* operands;  // kMaxOperands, in the order params.h documents for the operation; null where absent
  void* workspace;        // workspace(params) bytes, 256-byte aligned on a device, 64 on a CPU; null if 0
  void* stream;           // a cudaStream_t; null on a CPU
  int threads;            // the CPU thread budget (torch.get_num_threads()); 1 on a device
};

// Returns null, or the reason of a failure (a string with static lifetime). A launcher rejects nothing that its
// capability predicate in cnnfast/backends accepted: an error here is the driver's.
using LaunchFn = const char* (*)(const void* params, const Launch& launch);
using WorkspaceFn = int64_t (*)(const void* params);

struct Kernel {
  const char* name;  // "<stem>.<direction>.<dtype>", ".pack" or ".unpack" where it does that, and on a CPU ".<isa>"
  const StructInfo* params;
  LaunchFn launch;
  WorkspaceFn workspace;  // null: needs none
};

#define CNNFAST_CONCAT_(a, b) a##b
#define CNNFAST_CONCAT(a, b) CNNFAST_CONCAT_(a, b)
#define CNNFAST_STRINGIFY_(a) #a
#define CNNFAST_STRINGIFY(a) CNNFAST_STRINGIFY_(a)

// CNNFAST_KERNEL("conv2d_direct.fprop.f32", Conv2dParams, launch_fprop<float>, nullptr)
#ifdef CNNFAST_ISA
#define CNNFAST_KERNEL_SUFFIX "." CNNFAST_STRINGIFY(CNNFAST_ISA)
#else
#define CNNFAST_KERNEL_SUFFIX ""
#endif
#define CNNFAST_KERNEL(name, Params, launch, workspace) CNNFAST_KERNEL_AT(__COUNTER__, name, Params, launch, workspace)
#define CNNFAST_KERNEL_AT(id, name, Params, launch, workspace) \
  CNNFAST_KERNEL_DEFINE(id, name, Params, launch, workspace)
#define CNNFAST_KERNEL_DEFINE(id, name, Params, launch, workspace)                                                    \
  static const ::cnnfast::Kernel CNNFAST_CONCAT(cnnfast_kernel_, id) = {name CNNFAST_KERNEL_SUFFIX,                   \
                                                                        &::cnnfast::Params##Info, launch, workspace}; \
  __attribute__((section("cnnfast_kernels"), used)) static const ::cnnfast::Kernel* const CNNFAST_CONCAT(             \
      cnnfast_kernel_pointer_, id) = &CNNFAST_CONCAT(cnnfast_kernel_, id);

}  // namespace cnnfast
