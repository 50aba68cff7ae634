// Kernels that ask the emulator what it does: fragments, shuffles, and what it must refuse.
#include "../../csrc/cuda/primitives/async_copy.h"
#include "../../csrc/cuda/primitives/launch.h"
#include "../../csrc/cuda/primitives/matrix.h"
#include "../../csrc/emulation/traffic.h"
#include "planted.h"

namespace cnnfast::test {

using cuda::launch;

// One warp: registers in, registers out. a: [32][4], b: [32][2], d: [32][4].
template <bool bf16>
__global__ void mma(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = threadIdx.x;
  uint32_t fa[4], fb[2];
  float fd[4];
  for (int i = 0; i < 4; ++i) fa[i] = a[lane * 4 + i];
  for (int i = 0; i < 2; ++i) fb[i] = b[lane * 2 + i];
  for (int i = 0; i < 4; ++i) fd[i] = d[lane * 4 + i];
  if (bf16)
    cuda::mma_m16n8k16_bf16(fd, fa, fb);
  else
    cuda::mma_m16n8k16_f16(fd, fa, fb);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = fd[i];
}

// The same of mma.m16n8k8, of floats that are rounded to tf32 first.
__global__ void mma_tf32(const float* a, const float* b, float* d) {
  const int lane = threadIdx.x;
  uint32_t fa[4], fb[2];
  float fd[4];
  for (int i = 0; i < 4; ++i) fa[i] = cuda::round_tf32(a[lane * 4 + i]);
  for (int i = 0; i < 2; ++i) fb[i] = cuda::round_tf32(b[lane * 2 + i]);
  for (int i = 0; i < 4; ++i) fd[i] = d[lane * 4 + i];
  cuda::mma_m16n8k8_tf32(fd, fa, fb);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = fd[i];
}

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

// out: [4][32], sync up down xor.
__global__ void shuffles(const int* argument, int* out, int width) {
  const int lane = threadIdx.x, value = 100 + lane;
  out[lane] = __shfl_sync(~0u, value, argument[0], width);
  out[32 + lane] = __shfl_up_sync(~0u, value, argument[0], width);
  out[64 + lane] = __shfl_down_sync(~0u, value, argument[0], width);
  out[96 + lane] = __shfl_xor_sync(~0u, value, argument[0], width);
}

__global__ void ballots(int* out) {
  const int lane = threadIdx.x % 32;
  out[threadIdx.x] = lane < 8 ? __ballot_sync(0xffu, lane % 3 == 0) : __ballot_sync(~0xffu, lane > 20);
}

__global__ void early_exit(int* out) {
  if (threadIdx.x >= 40) return;  // since sm_70 the barrier then counts the others
  __syncthreads();
  if (threadIdx.x == 0) out[0] = 7;
}

__global__ void dynamic_shared(int* out, int elements) {
  CNNFAST_DYNAMIC_SHARED(int, values);
  for (int i = threadIdx.x; i < elements; i += blockDim.x) values[i] = i;
  __syncthreads();
  if (threadIdx.x == 0) out[0] = values[elements - 1] + static_cast<int>(reinterpret_cast<uintptr_t>(values) % 1024);
}

// A word, and a vector of four, for each lane at a distance of `stride` of them, in shared and in global memory.
struct alignas(16) Words {
  float v[4];
};

__global__ void strided_words(float* out, int stride) {
  CNNFAST_SHARED(float, values, [32 * 32]);
  values[threadIdx.x * stride] = 1.0f;
  out[threadIdx.x * stride] = values[threadIdx.x * stride];
}

__global__ void strided_vectors(Words* out, int stride) {
  CNNFAST_SHARED(Words, values, [32 * 32]);
  values[threadIdx.x * stride] = Words{{1, 2, 3, 4}};
  out[threadIdx.x * stride] = values[threadIdx.x * stride];
}

__global__ void same_word(float* out) {
  CNNFAST_SHARED(float, value, [1]);
  if (threadIdx.x == 0) value[0] = 2.0f;
  __syncwarp();
  out[threadIdx.x] = value[0];
}

// ---- what a GPU would not forgive
__global__ void divergent_barrier() {
  if (threadIdx.x < 40)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void missing_thread() {
  if (threadIdx.x % 32 < 16)
    __shfl_xor_sync(~0u, 1, 1);
  else
    __syncthreads();
}

__global__ void exited_lane() {
  if (threadIdx.x == 5) return;
  __shfl_xor_sync(~0u, 1, 1);
}

__global__ void not_in_mask() { __ballot_sync(0xffu, 1); }

__global__ void shuffle_from_outside() {
  if (threadIdx.x < 16) __shfl_sync(0xffffu, 1, 20);
}

__global__ void collectives_differ() {
  if (threadIdx.x < 16)
    __shfl_xor_sync(~0u, 1, 1);
  else
    __ballot_sync(~0u, 1);
}

__global__ void too_much_shared() {
  CNNFAST_SHARED(float, values, [60000]);
  values[threadIdx.x] = 0;
}

__global__ void misaligned_copy(const float* x) {
  CNNFAST_SHARED(float, values, [64]);
  cuda::copy_async_16(&values[1], x, true);
}

__global__ void copy_into_global(float* x) { cuda::copy_async_16(x, x, false); }

__global__ void nothing() {}

}  // namespace cnnfast::test

CNNFAST_TEST_API const char* run_probe(const char* name_, const void* in0, const void* in1, void* out, int size) {
  using namespace cnnfast::test;
  const std::string name = name_;
  const dim3 one(1, 1, 1), warp(32, 1, 1), two_warps(64, 1, 1);
  const auto words = static_cast<const uint32_t*>(in0);
  const auto integers = static_cast<int*>(out);
  return message_of([&] {
    if (name == "mma_bf16")
      launch<mma<true>>(one, warp, 0, nullptr, words, static_cast<const uint32_t*>(in1), static_cast<float*>(out));
    else if (name == "mma_f16")
      launch<mma<false>>(one, warp, 0, nullptr, words, static_cast<const uint32_t*>(in1), static_cast<float*>(out));
    else if (name == "mma_tf32")
      launch<mma_tf32>(one, warp, 0, nullptr, static_cast<const float*>(in0), static_cast<const float*>(in1),
                       static_cast<float*>(out));
    else if (name == "ldmatrix")
      launch<ldmatrix<false>>(one, warp, 0, nullptr, words, static_cast<uint32_t*>(out));
    else if (name == "ldmatrix_transposed")
      launch<ldmatrix<true>>(one, warp, 0, nullptr, words, static_cast<uint32_t*>(out));
    else if (name == "shuffles")
      launch<shuffles>(one, warp, 0, nullptr, static_cast<const int*>(in0), integers, size);
    else if (name == "ballots")
      launch<ballots>(one, two_warps, 0, nullptr, integers);
    else if (name == "early_exit")
      launch<early_exit>(one, two_warps, 0, nullptr, integers);
    else if (name == "dynamic_shared")
      launch<dynamic_shared, 1 << 20>(one, two_warps, size * sizeof(int), nullptr, integers, size);
    else if (name == "growing_shared") {
      launch<dynamic_shared>(one, two_warps, 100 * sizeof(int), nullptr, integers, 100);
      if (const char* error = launch<dynamic_shared>(one, two_warps, size * sizeof(int), nullptr, integers, size))
        throw std::runtime_error(error);
    } else if (name == "strided_words")
      launch<strided_words>(one, warp, 0, nullptr, static_cast<float*>(out), size);
    else if (name == "strided_vectors")
      launch<strided_vectors>(one, warp, 0, nullptr, static_cast<Words*>(out), size);
    else if (name == "same_word")
      launch<same_word>(one, warp, 0, nullptr, static_cast<float*>(out));
    else if (name == "divergent_barrier")
      launch<divergent_barrier>(dim3(2, 1, 1), two_warps, 0, nullptr);
    else if (name == "missing_thread")
      launch<missing_thread>(one, two_warps, 0, nullptr);
    else if (name == "exited_lane")
      launch<exited_lane>(one, warp, 0, nullptr);
    else if (name == "not_in_mask")
      launch<not_in_mask>(one, warp, 0, nullptr);
    else if (name == "shuffle_from_outside")
      launch<shuffle_from_outside>(one, warp, 0, nullptr);
    else if (name == "collectives_differ")
      launch<collectives_differ>(one, warp, 0, nullptr);
    else if (name == "too_much_shared")
      launch<too_much_shared>(one, warp, 0, nullptr);
    else if (name == "misaligned_copy")
      launch<misaligned_copy>(one, warp, 0, nullptr, static_cast<float*>(out));
    else if (name == "copy_into_global")
      launch<copy_into_global>(one, warp, 0, nullptr, static_cast<float*>(out));
    else if (name == "big_block")
      launch<nothing>(one, dim3(1025, 1, 1), 0, nullptr);
    else if (name == "big_grid")
      launch<nothing>(dim3(1, 65536, 1), warp, 0, nullptr);
    else if (name == "empty_grid")
      launch<nothing>(dim3(0, 1, 1), warp, 0, nullptr);
    else
      throw std::runtime_error("no probe " + name);
  });
}

CNNFAST_TEST_API void configure(int order, uint32_t seed, int lazy_async, int count_accesses) {
  auto& config = cnnfast::emulation::config();
  config.order = static_cast<cnnfast::emulation::Order>(order);
  config.seed = seed;
  config.lazy_async = lazy_async != 0;
  config.count_accesses = count_accesses != 0;
}

// A line for each place: kind, accesses, units, least, and the line of source; forgotten afterwards.
CNNFAST_TEST_API const char* accesses() {
  namespace traffic = cnnfast::emulation::traffic;
  constexpr const char* kinds[] = {"shared_read", "shared_write", "global_read", "global_write"};
  static thread_local std::string text;
  text.clear();
  for (const traffic::Count& c : traffic::counts())
    text += std::string(kinds[static_cast<int>(c.kind)]) + " " + std::to_string(c.accesses) + " " +
            std::to_string(c.units) + " " + std::to_string(c.least) + " " + c.where + "\n";
  traffic::reset();
  return text.c_str();
}

CNNFAST_TEST_API void register_range(const void* begin, uint64_t bytes, int writable) {
  cnnfast::emulation::register_range(begin, bytes, writable != 0);
}

CNNFAST_TEST_API void clear_ranges() { cnnfast::emulation::clear_ranges(); }
