// The tile that the direct convolution kernels compute with: a block of kThreads threads multiplies a[depth][row] by
// b[depth][column] from shared memory, each thread 4 x 4 of the kRows x kColumns results in registers.
#pragma once
#include "primitives/cuda.h"

namespace cnnfast::cuda::tile {

constexpr int kThreads = 128;
constexpr int kRows = 64;
constexpr int kColumns = 32;
constexpr int kDepth = 16;
constexpr int kPerThread = 4;  // rows, and columns
// Keeps rows of four aligned for vector loads; transposing stores then conflict two ways at most.
constexpr int kPad = 4;
static_assert(kThreads * kPerThread * kPerThread == kRows * kColumns, "one thread for each 4 x 4");

template <class Acc>
using SharedA = Acc[kDepth][kRows + kPad];
template <class Acc>
using SharedB = Acc[kDepth][kColumns + kPad];

__device__ __forceinline__ int first_row(int thread) { return thread / (kColumns / kPerThread) * kPerThread; }
__device__ __forceinline__ int first_column(int thread) { return thread % (kColumns / kPerThread) * kPerThread; }

template <class Acc>
struct alignas(16) Four {
  Acc v[kPerThread];
};

template <class Acc>
struct Results {
  Acc v[kPerThread][kPerThread];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) v[i][j] = 0;
  }

  __device__ __forceinline__ void add(const Results& other) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) v[i][j] += other.v[i][j];
  }

  // this += a^T b over the staged depth, in order.
  __device__ __forceinline__ void multiply(const SharedA<Acc>& a, const SharedB<Acc>& b, int row, int column) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const Four<Acc> rows = *reinterpret_cast<const Four<Acc>*>(&a[d][row]);
      const Four<Acc> columns = *reinterpret_cast<const Four<Acc>*>(&b[d][column]);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i)
#pragma unroll
        for (int j = 0; j < kPerThread; ++j) v[i][j] += rows.v[i] * columns.v[j];
    }
  }
};

}  // namespace cnnfast::cuda::tile
