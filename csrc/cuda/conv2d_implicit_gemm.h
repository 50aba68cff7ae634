// The product at the heart of the implicit-GEMM kernels: a block multiplies A (rows x depth) by B (depth x columns),
// both staged in shared memory by cp.async, on tensor cores (mma.sync).
//
// Shared memory holds kStages stages of both tiles, in vectors of 16 bytes. A tile lies either *along* the depth (a row
// of it is one row or column of the product, 64 bytes of depth) or *across* it (a row is one depth, all rows or columns
// side by side), as its tensor does in global memory; ldmatrix turns the latter on the way into registers. Vectors are
// swizzled so that the eight rows that one ldmatrix reads fall into different banks.
//
// One barrier a step: it says that the next stage is complete and that everybody has read the last one. Fragments are
// read one mma depth ahead of their use, so that the tensor cores needn't wait for them.
#pragma once
#include <type_traits>

#include "primitives/async_copy.h"
#include "primitives/cuda.h"
#include "primitives/matrix.h"
#include "primitives/numeric.h"

namespace cnnfast::cuda::implicit_gemm {

struct Vector {
  uint4 bits;
};

constexpr int kStages = 4;
constexpr int kRowVectors = 4;  // of a row along the depth

// A block's share of the product and how its warps divide it.
template <int kRows_, int kColumns_, int kWarpRows_, int kWarpColumns_, int kBlocks_>
struct Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kWarpRows = kWarpRows_, kWarpColumns = kWarpColumns_;
  static constexpr int kBlocks = kBlocks_;  // at once on a processor: bounds the registers
  static constexpr int kThreads = kRows / kWarpRows * (kColumns / kWarpColumns) * 32;
  static constexpr int kMmaRows = kWarpRows / 16, kMmaColumns = kWarpColumns / 8;
  static constexpr int kVectorsA = kRows * kRowVectors, kVectorsB = kColumns * kRowVectors;  // of a stage
  static_assert(kWarpColumns % 16 == 0 && kRows * kColumns / 4 <= kStages * (kVectorsA + kVectorsB),
                "the sums fit the stages");
};

// Where a vector lies in a tile along the depth, whose rows are 64 bytes ...
__device__ __forceinline__ int along(int row, int vector) {
  return row * kRowVectors + (vector ^ (row / 2 % kRowVectors));
}
// ... in one across it, whose rows have `width` vectors: the operands say that. kPad is what such a tile has more than
// one along the depth.

// 16-bit elements. ldmatrix reads eight rows across the depth at once, a vector of each.
template <class T>
struct Half {
  using Element = T;
  static constexpr int kVector = 8;                     // elements in 16 bytes
  static constexpr int kDepth = kRowVectors * kVector;  // of a stage
  static constexpr int kPad = 0;
  using Large = Tile<128, 128, 64, 64, 2>;
  using Middle = Tile<128, 64, 64, 32, 3>;
  using Small = Tile<64, 64, 32, 32, 4>;
  using ByElement = Tile<128, 64, 32, 32, 2>;

  template <int width>
  static __device__ __forceinline__ int across(int depth, int vector) {
    static_assert(width % 8 == 0, "rows of whole 128 bytes");
    return depth * width + (vector ^ depth % 8);
  }
};

// f32 elements, rounded to tf32 on the way into the tensor cores. ldmatrix transposes 16-bit elements only: plain loads
// read four rows across the depth at once, 32 bytes of each, which padding puts into different banks.
struct Tf32 {
  using Element = float;
  static constexpr int kVector = 4;
  static constexpr int kDepth = kRowVectors * kVector;
  static constexpr int kPad = 2 * kDepth;
  using Large = Tile<128, 128, 64, 32, 1>;
  using Middle = Tile<128, 64, 64, 32, 2>;
  using Small = Tile<64, 64, 32, 32, 3>;
  using ByElement = Tile<128, 64, 32, 32, 1>;

  template <int width>
  static __device__ __forceinline__ int across(int depth, int vector) {
    static_assert(width % 8 == 0, "rows of whole 128 bytes");
    return depth * (width + 2) + vector;
  }
};

// f32 elements, each the sum of two tf32 (the larger rounded, the smaller what is left of it, 22 bits in all); a
// product is three of tensor cores, without that of the smaller parts. The tensor cores' own sums are not rounded as
// IEEE's are: they go no further than one mma depth, and are then added to the total.
struct Tf32x3 : Tf32 {};

// A stage: A's tile, then B's.
template <class Math, class Tile>
constexpr int kOffsetB = Tile::kVectorsA + Math::kPad;
template <class Math, class Tile>
constexpr int kStageVectors = kOffsetB<Math, Tile> + Tile::kVectorsB + Math::kPad;
template <class Math, class Tile>
constexpr size_t kSharedBytes = kStages * kStageVectors<Math, Tile> * sizeof(Vector);

template <class Tile>
struct Sums {
  float v[Tile::kMmaRows][Tile::kMmaColumns][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < Tile::kMmaRows; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kMmaColumns; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) v[i][j][e] = 0.0f;
  }
};

template <class Tile>
__device__ __forceinline__ int warp_row() {
  return static_cast<int>(threadIdx.x) / 32 % (Tile::kRows / Tile::kWarpRows) * Tile::kWarpRows;
}
template <class Tile>
__device__ __forceinline__ int warp_column() {
  return static_cast<int>(threadIdx.x) / 32 / (Tile::kRows / Tile::kWarpRows) * Tile::kWarpColumns;
}

// Where a thread reads its operands from a stage; worked out once. A step of 16 rows or of an mma depth then adds a
// constant or flips bits of it: the swizzle of a row only depends on its place among eight.
template <class Math, class Tile, bool kAcrossA, bool kAcrossB>
struct Reader {
  static constexpr bool kTransposesA = kAcrossA, kTransposesB = kAcrossB;
  static constexpr bool kByElement = sizeof(typename Math::Element) == 4;  // across the depth
  static constexpr int kB = kOffsetB<Math, Tile>;
  static constexpr int kWidthA = Tile::kRows / Math::kVector, kWidthB = Tile::kColumns / Math::kVector;
  unsigned from_a, from_b;  // in vectors; by element in elements

  __device__ __forceinline__ Reader() {
    const int lane = static_cast<int>(threadIdx.x) % 32, row = warp_row<Tile>(), column = warp_column<Tile>();
    // matrices of A: rows 0-7 and 8-15 of the first 16 bytes of depth, then of the next
    if constexpr (kAcrossA && kByElement)
      from_a = Math::template across<kWidthA>(lane % 4, (row + lane / 4) / 4) * 4 + lane / 4 % 4;
    else if constexpr (kAcrossA)
      from_a = Math::template across<kWidthA>(lane % 8 + lane / 16 * 8, row / 8 + lane / 8 % 2);
    else
      from_a = along(row + lane % 16, lane / 16);
    // matrices of B: both 16 bytes of depth of columns 0-7, then of columns 8-15
    if constexpr (kAcrossB && kByElement)
      from_b = Math::template across<kWidthB>(lane % 4, (column + lane / 4) / 4) * 4 + lane / 4 % 4;
    else if constexpr (kAcrossB)
      from_b = Math::template across<kWidthB>(lane % 16, column / 8 + lane / 16);
    else
      from_b = along(column + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }
  // Of rows i * 16 and columns j * 8 of the warp's, in mma depth k of the stage.
  __device__ __forceinline__ unsigned a(int i, int k) const {
    return kAcrossA ? (from_a ^ i * 2) + k * 16 * kWidthA : (from_a ^ k * 2) + i * 16 * kRowVectors;
  }
  __device__ __forceinline__ unsigned b(int j, int k) const {
    return kAcrossB ? (from_b ^ j) + k * 16 * kWidthB : (from_b ^ k * 2) + j * 8 * kRowVectors;
  }
  // By element, register e of the fragment.
  __device__ __forceinline__ unsigned a(int i, int k, int e) const {
    return from_a + i * 16 + e % 2 * 8 + Math::template across<kWidthA>(k * 8 + e / 2 * 4, 0) * 4;
  }
  __device__ __forceinline__ unsigned b(int j, int k, int e) const {
    return from_b + j * 8 + Math::template across<kWidthB>(k * 8 + e * 4, 0) * 4;
  }
};

// A warp's operands of one mma depth.
template <class Tile>
struct Fragments {
  uint32_t a[Tile::kMmaRows][4], b[Tile::kMmaColumns][2];

  template <class Reader>
  __device__ __forceinline__ void load(const Reader& reader, const Vector* stage, int k) {
    const uint32_t *elements_a = reinterpret_cast<const uint32_t*>(stage), *elements_b = elements_a + Reader::kB * 4;
#pragma unroll
    for (int i = 0; i < Tile::kMmaRows; ++i) {
      if constexpr (Reader::kTransposesA && Reader::kByElement) {
#pragma unroll
        for (int e = 0; e < 4; ++e) a[i][e] = elements_a[reader.a(i, k, e)];
      } else if constexpr (Reader::kTransposesA) {
        ldmatrix_x4_transposed(a[i], stage + reader.a(i, k));
      } else {
        ldmatrix_x4(a[i], stage + reader.a(i, k));
      }
    }
#pragma unroll
    for (int j = 0; j < Tile::kMmaColumns; j += 2) {
      uint32_t pair[4];
      if constexpr (Reader::kTransposesB && Reader::kByElement) {
#pragma unroll
        for (int e = 0; e < 4; ++e) pair[e] = elements_b[reader.b(j + e / 2, k, e % 2)];
      } else if constexpr (Reader::kTransposesB) {
        ldmatrix_x4_transposed(pair, stage + Reader::kB + reader.b(j, k));
      } else {
        ldmatrix_x4(pair, stage + Reader::kB + reader.b(j, k));
      }
      b[j][0] = pair[0];
      b[j][1] = pair[1];
      b[j + 1][0] = pair[2];
      b[j + 1][1] = pair[3];
    }
  }
};

template <class T, class Tile>
__device__ __forceinline__ void multiply(Half<T>, Sums<Tile>& sums, const Fragments<Tile>& f) {
#pragma unroll
  for (int i = 0; i < Tile::kMmaRows; ++i)
#pragma unroll
    for (int j = 0; j < Tile::kMmaColumns; ++j) mma_m16n8k16<T>(sums.v[i][j], f.a[i], f.b[j]);
}

// f32 values as tf32, and what is left of them (NaN where the value isn't finite).
template <int count>
__device__ __forceinline__ void split_tf32(const uint32_t (&values)[count], uint32_t (&large)[count],
                                           uint32_t (&small)[count]) {
#pragma unroll
  for (int e = 0; e < count; ++e) {
    large[e] = round_tf32(float_of_bits(values[e]));
    small[e] = round_tf32(float_of_bits(values[e]) - float_of_bits(large[e]));
  }
}

template <class Tile>
__device__ __forceinline__ void multiply(Tf32, Sums<Tile>& sums, const Fragments<Tile>& f) {
  uint32_t b[Tile::kMmaColumns][2];
#pragma unroll
  for (int j = 0; j < Tile::kMmaColumns; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) b[j][e] = round_tf32(float_of_bits(f.b[j][e]));
#pragma unroll
  for (int i = 0; i < Tile::kMmaRows; ++i) {
    uint32_t a[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) a[e] = round_tf32(float_of_bits(f.a[i][e]));
#pragma unroll
    for (int j = 0; j < Tile::kMmaColumns; ++j) mma_m16n8k8_tf32(sums.v[i][j], a, b[j]);
  }
}

// An infinite or NaN operand has no smaller part: products with that (inf - inf, inf * 0) come to nothing finite, and
// are dropped, so that the product of the larger parts alone says what the result is.
template <class Tile>
__device__ __forceinline__ void multiply(Tf32x3, Sums<Tile>& sums, const Fragments<Tile>& f) {
  uint32_t b[Tile::kMmaColumns][2], small_b[Tile::kMmaColumns][2];
#pragma unroll
  for (int j = 0; j < Tile::kMmaColumns; ++j) split_tf32(f.b[j], b[j], small_b[j]);
#pragma unroll
  for (int i = 0; i < Tile::kMmaRows; ++i) {
    uint32_t a[4], small_a[4];
    split_tf32(f.a[i], a, small_a);
    float term[Tile::kMmaColumns][4];
#pragma unroll
    for (int j = 0; j < Tile::kMmaColumns; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) term[j][e] = 0.0f;
      mma_m16n8k8_tf32(term[j], small_a, b[j]);
    }
#pragma unroll
    for (int j = 0; j < Tile::kMmaColumns; ++j) mma_m16n8k8_tf32(term[j], a, small_b[j]);
#pragma unroll
    for (int j = 0; j < Tile::kMmaColumns; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) term[j][e] = is_finite(term[j][e]) ? term[j][e] : 0.0f;
      mma_m16n8k8_tf32(term[j], a, b[j]);
    }
#pragma unroll
    for (int j = 0; j < Tile::kMmaColumns; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums.v[i][j][e] += term[j][e];
  }
}

// sums += A B over `steps` stages. stage_next(tile_a, tile_b) issues this thread's copies of the next stage. The shared
// memory is free afterwards.
template <class Math, class Tile, bool kAcrossA, bool kAcrossB, class StageNext>
__device__ __forceinline__ void accumulate(Sums<Tile>& sums, Vector* shared, int steps, StageNext stage_next) {
  constexpr int kStep = kStageVectors<Math, Tile>, kB = kOffsetB<Math, Tile>;
  if (steps == 0) return;
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) stage_next(shared + stage * kStep, shared + stage * kStep + kB);
    copy_async_commit();
  }
  copy_async_wait<kStages - 2>();
  __syncthreads();  // the first stage is complete
  const Reader<Math, Tile, kAcrossA, kAcrossB> reader;
  // Operands are read while those before them are multiplied, unless both of them and their splits need the registers.
  constexpr bool kAhead = !(std::is_same_v<Math, Tf32x3> && kAcrossA && kAcrossB);
  Fragments<Tile> fragments[2];
  if (kAhead) fragments[0].load(reader, shared, 0);
  int stage = 0, free_stage = kStages - 1;
  for (int step = 0; step < steps; ++step) {
    const Vector* current = shared + stage * kStep;
    fragments[kAhead].load(reader, current, kAhead);
    if (step + kStages - 1 < steps) {
      Vector* next = shared + free_stage * kStep;
      stage_next(next, next + kB);
    }
    copy_async_commit();  // perhaps an empty group: the count of groups stays that of the steps
    multiply(Math{}, sums, fragments[0]);
    if constexpr (!kAhead) {
      fragments[1].load(reader, current, 1);
      multiply(Math{}, sums, fragments[1]);
    }
    copy_async_wait<kStages - 2>();
    __syncthreads();  // the next stage is complete, and everybody has read this one
    free_stage = stage;
    stage = stage + 1 == kStages ? 0 : stage + 1;
    if constexpr (kAhead) {
      if (step + 1 < steps) fragments[0].load(reader, shared + stage * kStep, 0);
      multiply(Math{}, sums, fragments[1]);
    }
  }
}

// Four neighbouring results.
struct alignas(16) Four {
  float v[4];
};

// The sums on their way through shared memory, from where the tensor cores leave them to threads that have four
// neighbouring columns each, from `first_column<Tile>()`, of rows kRowsAtOnce apart. A row is swizzled in vectors so
// that neither side has bank conflicts.
template <class Tile>
struct Staged {
  static constexpr unsigned kWidth = Tile::kColumns / 4, kRowsAtOnce = Tile::kThreads / kWidth;
  Four* vectors;

  static __device__ __forceinline__ unsigned at(unsigned row, unsigned vector) {
    return row * kWidth + (vector ^ row % 4 * 2);
  }
  // For others to read after a barrier.
  __device__ __forceinline__ void put(const Sums<Tile>& sums) const {
    struct alignas(8) Two {
      float v[2];
    };
    const unsigned lane = threadIdx.x % 32;
    const unsigned to = at(warp_row<Tile>() + lane / 4, warp_column<Tile>() / 4 + lane % 4 / 2);
#pragma unroll
    for (int i = 0; i < Tile::kMmaRows; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < Tile::kMmaColumns; ++j)
          *reinterpret_cast<Two*>(vectors[(to ^ j * 2) + (i * 16 + half * 8) * kWidth].v + lane % 2 * 2) =
              Two{sums.v[i][j][half * 2], sums.v[i][j][half * 2 + 1]};
  }
  __device__ __forceinline__ Four get(unsigned row) const { return vectors[at(row, threadIdx.x % kWidth)]; }
};
template <class Tile>
__device__ __forceinline__ int first_column() {
  return static_cast<int>(threadIdx.x) % (Tile::kColumns / 4) * 4;
}
// Hands each thread the columns of its rows, one after the other: take(row, sums).
template <class Tile, class Take>
__device__ __forceinline__ void results(const Sums<Tile>& sums, Vector* shared, Take take) {
  using Staged = Staged<Tile>;
  const Staged staged{reinterpret_cast<Four*>(shared)};
  staged.put(sums);
  __syncthreads();
#pragma unroll 4
  for (unsigned i = 0; i < Tile::kRows / Staged::kRowsAtOnce; ++i) {
    const unsigned row = threadIdx.x / Staged::kWidth + i * Staged::kRowsAtOnce;
    take(static_cast<int>(row), staged.get(row));
  }
}

// Four neighbouring elements as one access.
template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T v[4];
};
template <class T>
__device__ __forceinline__ Four load_four(const T* from) {
  const Quad<T> q = *reinterpret_cast<const Quad<T>*>(from);
  Four out;
#pragma unroll
  for (int e = 0; e < 4; ++e) out.v[e] = Numeric<T>::widen(q.v[e]);
  return out;
}
// The first `count` of them, 0 for the others.
template <class T>
__device__ __forceinline__ Four load_some(const T* from, int count) {
  Four out{};
#pragma unroll
  for (int e = 0; e < 4; ++e)
    if (e < count) out.v[e] = Numeric<T>::widen(from[e]);
  return out;
}
template <class T>
__device__ __forceinline__ void store_some(T* to, const Four& values, int count) {
#pragma unroll
  for (int e = 0; e < 4; ++e)
    if (e < count) to[e] = Numeric<T>::narrow(values.v[e]);
}
template <class T>
__device__ __forceinline__ void store_four(T* to, const Four& values) {
  Quad<T> q;
#pragma unroll
  for (int e = 0; e < 4; ++e) q.v[e] = Numeric<T>::narrow(values.v[e]);
  *reinterpret_cast<Quad<T>*>(to) = q;
}

}  // namespace cnnfast::cuda::implicit_gemm
