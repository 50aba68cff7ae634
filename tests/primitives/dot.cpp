// csrc/cpu/primitives/dot.h as functions over arrays of whole vectors, for tests/test_cpu_primitives.py.
#include "../../csrc/cpu/primitives/dot.h"

using namespace cnnfast::CNNFAST_ISA;

namespace {
BitsVec pairs(const uint32_t* p) {
  BitsVec v;
  memcpy(&v, p, sizeof v);
  return v;
}
}  // namespace

extern "C" {
int lanes() { return kLanes<float>; }

void dot(float* out, const float* sum, const uint32_t* a, const uint32_t* b, int n) {
  for (int i = 0; i < n; i += kLanes<float>) store(out + i, dot_pairs(load(sum + i), pairs(a + i), pairs(b + i)));
}
void dot_twin(float* out, const float* sum, const uint32_t* a, const uint32_t* b, int n) {
  for (int i = 0; i < n; i += kLanes<float>) store(out + i, dot_pairs_twin(load(sum + i), pairs(a + i), pairs(b + i)));
}
void narrowed(uint16_t* out, const float* in, int n) {
  for (int i = 0; i < n; i += kLanes<float>) {
    const HalfVec h = narrow_flushing(load(in + i));
    memcpy(out + i, &h, sizeof h);
  }
}
void narrowed_pairs(uint32_t* out, const float* first, const float* second, int n) {
  for (int i = 0; i < n; i += kLanes<float>) {
    const BitsVec v = narrow_pairs(load(first + i), load(second + i));
    memcpy(out + i, &v, sizeof v);
  }
}
// The first `count` of a vector of bf16, and zeros.
void partial(uint16_t* out, const uint16_t* in, int count) {
  store_halves(reinterpret_cast<BFloat16*>(out), load_halves(reinterpret_cast<const BFloat16*>(in), count));
}
}
