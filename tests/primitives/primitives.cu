// A kernel for every wrapper of csrc/cuda/primitives, that shows what it does: run on the emulated GPU by make test, on
// a card, first of all, by make gpu. Operands in, results out, no arithmetic of its own.
#include <string>
#include <type_traits>

#include "../../csrc/cuda/primitives/async_copy.h"
#include "../../csrc/cuda/primitives/launch.h"
#include "../../csrc/cuda/primitives/matrix.h"
#include "../../csrc/cuda/primitives/numeric.h"

namespace cnnfast::test {

using cuda::launch;

// One warp: fragments in, fragments out. a: [32][4], b: [32][2], d: [32][4].
template <class T>
__global__ void mma(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = threadIdx.x;
  uint32_t fa[4], fb[2];
  float fd[4];
  for (int i = 0; i < 4; ++i) fa[i] = a[lane * 4 + i];
  for (int i = 0; i < 2; ++i) fb[i] = b[lane * 2 + i];
  for (int i = 0; i < 4; ++i) fd[i] = d[lane * 4 + i];
  if constexpr (std::is_same_v<T, float>)
    cuda::mma_m16n8k8_tf32(fd, fa, fb);
  else if constexpr (std::is_same_v<T, __half>)
    cuda::mma_m16n8k16_f16(fd, fa, fb);
  else
    cuda::mma_m16n8k16_bf16(fd, fa, fb);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = fd[i];
}

__global__ void round_tf32(const float* x, uint32_t* bits) { bits[threadIdx.x] = cuda::round_tf32(x[threadIdx.x]); }

// source: four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
template <bool transposed>
__global__ void ldmatrix(const uint32_t* source, uint32_t* registers) {
  CNNFAST_SHARED(uint32_t, rows, [32][4]);
  const int lane = threadIdx.x;
  for (int i = 0; i < 4; ++i) rows[lane][i] = source[lane * 4 + i];
  __syncthreads();
  uint32_t r[4];
  if (transposed)
    cuda::ldmatrix_x4_transposed(r, rows[lane]);
  else
    cuda::ldmatrix_x4(r, rows[lane]);
  for (int i = 0; i < 4; ++i) registers[lane * 4 + i] = r[i];
}

// Two groups of copies of 16 bytes a lane; where `valid` says 0 zeros arrive. The first group is awaited while the
// second may be under way. out: [2][32][4].
__global__ void copies(const int* valid, const uint32_t* source, uint32_t* out) {
  CNNFAST_SHARED(uint32_t, first, [32][4]);
  CNNFAST_SHARED(uint32_t, second, [32][4]);
  const int lane = threadIdx.x;
  cuda::copy_async_16(first[lane], source + lane * 4, valid[lane] != 0);
  cuda::copy_async_commit();
  cuda::copy_async_16(second[lane], source + (32 + lane) * 4, valid[32 + lane] != 0);
  cuda::copy_async_commit();
  cuda::copy_async_wait<1>();
  __syncthreads();
  const int other = 31 - lane;  // another thread's copy, visible after its wait and the barrier
  for (int i = 0; i < 4; ++i) out[other * 4 + i] = first[other][i];
  cuda::copy_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) out[(32 + other) * 4 + i] = second[other][i];
}

template <class T>
__global__ void widen(const T* x, float* y) {
  y[threadIdx.x] = cuda::Numeric<T>::widen(x[threadIdx.x]);
}

template <class T>
__global__ void narrow(const float* x, T* y) {
  y[threadIdx.x] = cuda::Numeric<T>::narrow(x[threadIdx.x]);
}

template <class T>
__global__ void store_pairs(const float* x, T* y) {
  cuda::store_pair(y + 2 * threadIdx.x, x[2 * threadIdx.x], x[2 * threadIdx.x + 1]);
}

__global__ void numbers(const uint32_t* bits, float* y) {
  const float value = cuda::float_of_bits(bits[threadIdx.x]);
  y[threadIdx.x] = cuda::is_finite(value) ? value : -1.0f;
}

__global__ void dynamic_shared(int* out, int elements) {
  CNNFAST_DYNAMIC_SHARED(int, values);
  for (int i = threadIdx.x; i < elements; i += blockDim.x) values[i] = i;
  __syncthreads();
  if (threadIdx.x == 0) {
    out[0] = values[elements - 1];
    out[1] = static_cast<int>(reinterpret_cast<uintptr_t>(values) % 16);
  }
}

}  // namespace cnnfast::test

// Null, or the reason of a failure. Addresses are the device's.
extern "C" __attribute__((visibility("default"))) const char* run_primitive(const char* name_, const void* in0,
                                                                            const void* in1, void* out, int size) {
  using namespace cnnfast::test;
  const std::string name = name_;
  const dim3 one(1, 1, 1), warp(32, 1, 1);
  const auto words = static_cast<const uint32_t*>(in0), more = static_cast<const uint32_t*>(in1);
  const auto floats = static_cast<const float*>(in0);
  const auto results = static_cast<float*>(out);
  const auto integers = static_cast<uint32_t*>(out);
  using bf16 = __nv_bfloat16;
  using half = __half;
  if (name == "mma_bf16") return launch<mma<bf16>>(one, warp, 0, nullptr, words, more, results);
  if (name == "mma_f16") return launch<mma<half>>(one, warp, 0, nullptr, words, more, results);
  if (name == "mma_tf32") return launch<mma<float>>(one, warp, 0, nullptr, words, more, results);
  if (name == "round_tf32") return launch<round_tf32>(one, warp, 0, nullptr, floats, integers);
  if (name == "ldmatrix") return launch<ldmatrix<false>>(one, warp, 0, nullptr, words, integers);
  if (name == "ldmatrix_transposed") return launch<ldmatrix<true>>(one, warp, 0, nullptr, words, integers);
  if (name == "copies") return launch<copies>(one, warp, 0, nullptr, static_cast<const int*>(in0), more, integers);
  if (name == "widen_bf16") return launch<widen<bf16>>(one, warp, 0, nullptr, static_cast<const bf16*>(in0), results);
  if (name == "widen_f16") return launch<widen<half>>(one, warp, 0, nullptr, static_cast<const half*>(in0), results);
  if (name == "narrow_bf16") return launch<narrow<bf16>>(one, warp, 0, nullptr, floats, static_cast<bf16*>(out));
  if (name == "narrow_f16") return launch<narrow<half>>(one, warp, 0, nullptr, floats, static_cast<half*>(out));
  if (name == "pairs_bf16") return launch<store_pairs<bf16>>(one, warp, 0, nullptr, floats, static_cast<bf16*>(out));
  if (name == "pairs_f16") return launch<store_pairs<half>>(one, warp, 0, nullptr, floats, static_cast<half*>(out));
  if (name == "numbers") return launch<numbers>(one, warp, 0, nullptr, words, results);
  if (name == "dynamic_shared")
    return launch<dynamic_shared, 20000 * sizeof(int)>(one, warp, size * sizeof(int), nullptr, static_cast<int*>(out),
                                                       size);
  return "no such primitive";
}
