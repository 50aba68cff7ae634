// Tensor-core instructions. Fragments are as in the PTX ISA's tables for mma.m16n8k16: with group = lane / 4 and
// pair = lane % 4 * 2,
//   A (16x16): register i holds row group + 8*(i&1), columns pair + 8*(i>>1) and the next
//   B (16x8):  register i holds rows pair + 8*i and the next, column group
//   D (16x8):  element i is row group + 8*(i>>1), column pair + (i&1)
// and of mma.m16n8k8 in tf32, whose D is the same, with member = lane % 4,
//   A (16x8):  register i holds row group + 8*(i&1), column member + 4*(i>>1)
//   B (8x8):   register i holds row member + 4*i, column group
#pragma once
#include "cuda.h"

namespace cnnfast::cuda {

#ifdef __CUDACC__

// cvta.to.shared: a generic address as the 32-bit shared address that PTX wants.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ldmatrix.sync.aligned.m8n8.x4.shared.b16 (sm_75): four 8x8 matrices; lanes 8i..8i+7 give the row addresses of matrix
// i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 (sm_75): the same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 (sm_80): d += a b
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 (sm_80): d += a b
__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 (sm_80): d += a b; the low 13 bits of the operands are not read.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// cvt.rna.tf32.f32 (sm_80): the nearest tf32, ties away from zero, as the bits of a float.
__device__ __forceinline__ uint32_t round_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

#else

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, int line = __builtin_LINE()) {
  emulation::ldmatrix(r, row, 4, false, line);
}
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row, int line = __builtin_LINE()) {
  emulation::ldmatrix(r, row, 4, true, line);
}
inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              int line = __builtin_LINE()) {
  emulation::mma_m16n8k16(d, a, b, emulation::MmaType::bf16, line);
}
inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             int line = __builtin_LINE()) {
  emulation::mma_m16n8k16(d, a, b, emulation::MmaType::f16, line);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             int line = __builtin_LINE()) {
  emulation::mma_m16n8k8_tf32(d, a, b, line);
}
inline uint32_t round_tf32(float value) { return emulation::round_tf32(value); }

#endif

// d += a b in the operands' type.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                            const uint32_t (&b)[2]) {
  mma_m16n8k16_bf16(d, a, b);
}
template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_m16n8k16_f16(d, a, b);
}

}  // namespace cnnfast::cuda
