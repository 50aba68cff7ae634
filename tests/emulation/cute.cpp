// Prints CuTe's own layouts of the fragments that the emulation emulates, as JSON: for each lane of a warp, where the
// elements lie that it holds. tests/test_emulation_cute.py compiles it where CUTLASS's headers are, and holds
// cute.json, which it wrote, against the emulator's. No device code.
#include <cstdio>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/layout.hpp>

using namespace cute;

namespace {

bool first = true;

// position(lane, value): row and column, of a matrix with so many rows; both are in the linear number that CuTe has.
template <class Layout>
void print_fragment(const char* name, Layout layout, int values, int rows) {
  std::printf("%s\"%s\": [", first ? "{" : ",\n ", name);
  first = false;
  for (int lane = 0; lane < 32; ++lane) {
    std::printf("%s[", lane ? ", " : "");
    for (int v = 0; v < values; ++v) {
      const int linear = static_cast<int>(layout(lane, v));
      std::printf("%s[%d, %d]", v ? ", " : "", linear % rows, linear / rows);
    }
    std::printf("]");
  }
  std::printf("]");
}

// ldmatrix: which 16-bit element of the four matrices of 64 each of a lane's eight is. CuTe counts bits.
template <class Traits>
void print_copy(const char* name) {
  typename Traits::DstLayout layout;
  std::printf(",\n \"%s\": [", name);
  for (int lane = 0; lane < 32; ++lane) {
    std::printf("%s[", lane ? ", " : "");
    for (int v = 0; v < 8; ++v) std::printf("%s%d", v ? ", " : "", static_cast<int>(layout(lane, v * 16)) / 16);
    std::printf("]");
  }
  std::printf("]");
}

template <class Traits>
void print_mma(const char* a, const char* b, const char* c, int values_a, int values_b) {
  print_fragment(a, typename Traits::ALayout{}, values_a, 16);  // m, k
  print_fragment(b, typename Traits::BLayout{}, values_b, 8);   // n, k
  print_fragment(c, typename Traits::CLayout{}, 4, 16);         // m, n
}

}  // namespace

int main() {
  print_mma<MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>>("bf16 a", "bf16 b", "bf16 c", 8, 4);
  print_mma<MMA_Traits<SM80_16x8x16_F32F16F16F32_TN>>("f16 a", "f16 b", "f16 c", 8, 4);
  print_mma<MMA_Traits<SM80_16x8x8_F32TF32TF32F32_TN>>("tf32 a", "tf32 b", "tf32 c", 4, 2);
  print_copy<Copy_Traits<SM75_U32x4_LDSM_N>>("ldmatrix");
  print_copy<Copy_Traits<SM75_U16x8_LDSM_T>>("ldmatrix_transposed");
  std::printf("}\n");
}
