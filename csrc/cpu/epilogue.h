// What becomes of a sum before it is stored: y = act(scale[k] * sum + shift[k] + residual).
//
// scale and shift are vectors of the sums' own type, so that batch norm's statistics lose nothing beside 16-bit
// activations; each operand may be absent. NaN passes through every activation, as in torch.
#pragma once
#include "../common/activation.h"
#include "../common/kernel_table.h"
#include "primitives/vec.h"

namespace cnnfast {
namespace CNNFAST_ISA {

// The comparisons are false for a NaN, which therefore stays.
template <class T>
CNNFAST_INLINE Vec<T> activate(Vec<T> v, Activation act) {
  const Vec<T> zero{}, six = zero + T(6);
  if (act == Activation::kNone) return v;
  if (act == Activation::kLeakyRelu) return v > zero ? v : v * T(kLeakySlope);
  v = zero > v ? zero : v;
  return act == Activation::kRelu ? v : v > six ? six : v;
}

// g * act'(z); `at` is z or act(z), which tell the same. A NaN there lets g pass, as in torch.
template <class T>
CNNFAST_INLINE Vec<T> activate_gradient(Vec<T> g, Vec<T> at, Activation act) {
  const Vec<T> zero{}, six = zero + T(6);
  if (act == Activation::kNone) return g;
  if (act == Activation::kLeakyRelu) return at > zero ? g : g * T(kLeakySlope);
  g = at <= zero ? zero : g;
  return act == Activation::kRelu ? g : at >= six ? zero : g;
}

template <class S>
struct Epilogue {
  using T = Compute<S>;
  const T *scale, *shift;  // null: 1, 0
  const S* residual;       // null: 0
  int64_t r_n, r_c, r_h, r_w;
  Activation act;

  // Of a launch's operands after the convolution's own.
  Epilogue(const Conv2dParams& p, const Launch& l)
      : scale(static_cast<const T*>(l.operands[4])),
        shift(static_cast<const T*>(l.operands[5])),
        residual(static_cast<const S*>(l.operands[6])),
        r_n(p.r_n),
        r_c(p.r_c),
        r_h(p.r_h),
        r_w(p.r_w),
        act(static_cast<Activation>(p.act)) {}

  // Itself, or null where it changes nothing: then kernels store their sums as they are.
  const Epilogue* or_null() const { return scale || shift || residual || act != Activation::kNone ? this : nullptr; }

  CNNFAST_INLINE const S* residual_at(int64_t n, int64_t p, int64_t q) const {
    return residual ? residual + n * r_n + p * r_h + q * r_w : nullptr;
  }

  // scale and shift of channels k .. k + lanes - 1, 1 and 0 where there are none: read once for several pixels.
  struct Factors {
    Vec<T> scale, shift;
  };
  CNNFAST_INLINE Factors factors(int64_t k, int64_t lanes) const {
    lanes = min(lanes, kLanes<T>);
    return {scale ? load_partial(scale + k, lanes) : broadcast(T(1)),
            shift ? load_partial(shift + k, lanes) : Vec<T>{}};
  }

  // Those channels of one pixel; r points to its residual (or is null), r_c being 1.
  CNNFAST_INLINE void store(S* y, Vec<T> sum, const Factors& f, const S* r, int64_t lanes) const {
    sum = sum * f.scale + f.shift;
    if (lanes >= kLanes<T>) {
      if (r) sum += load_wide(r);
      store_narrow(y, activate<T>(sum, act));
    } else {
      if (r) sum += load_wide(r, lanes);
      store_narrow(y, activate<T>(sum, act), lanes);
    }
  }

  // One channel, whatever r_c is.
  CNNFAST_INLINE T apply(T sum, const S* r, int64_t k) const {
    if (scale) sum *= scale[k];
    if (shift) sum += shift[k];
    if (r) sum += widen_one(r[k * r_c]);
    return activate<T>(broadcast(sum), act)[0];
  }
};

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
