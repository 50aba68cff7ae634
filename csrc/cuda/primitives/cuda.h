// The CUDA language as kernel files use it, for nvcc and for the CPU emulation (csrc/emulation): the one place,
// together with the instruction wrappers beside it, that knows which of the two compiles.
//
//   CNNFAST_SHARED(float, tile, [16][64]);        static shared memory, 16-byte aligned
//   CNNFAST_DYNAMIC_SHARED(unsigned char, tiles); the launch's dynamic shared memory, a pointer, 1024-byte aligned
#pragma once
#include <cstdint>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define CNNFAST_SHARED(type, name, dimensions) __shared__ __align__(16) type name dimensions
#define CNNFAST_DYNAMIC_SHARED(type, name)                                  \
  extern __shared__ __align__(1024) unsigned char cnnfast_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(cnnfast_dynamic_shared)

#else

#include "../../emulation/cuda.h"

#define CNNFAST_SHARED(type, name, dimensions)                                          \
  static const char name##_key = 0;                                                     \
  using name##_type = type dimensions;                                                  \
  name##_type& name = *static_cast<name##_type*>(::cnnfast::emulation::shared_variable( \
      &name##_key, sizeof(name##_type), alignof(name##_type) > 16 ? alignof(name##_type) : 16))
#define CNNFAST_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(::cnnfast::emulation::dynamic_shared())

#endif
