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

// exp(v) = 2^n * exp(r), n an integer and |r| <= ln(2)/2, by as many terms of exp's series as the type holds. Below the
// smallest normal number 0; to within a few units in the last place elsewhere.
template <class T>
CNNFAST_INLINE Vec<T> exponential(Vec<T> v) {
  constexpr bool kDouble = kSame<T, double>;
  constexpr int kMantissa = kDouble ? 52 : 23, kBias = kDouble ? 1023 : 127, kTerms = kDouble ? 13 : 7;
  constexpr T kLeast = T(kDouble ? -708.39 : -87.33), kMost = T(kDouble ? 709.78 : 88.72);
  constexpr T kRound = T(kDouble ? 6755399441055744.0 : 12582912.0);  // added, it leaves an integer in the last bits
  constexpr T kHigh = T(kDouble ? 6.93147180369123816490e-1 : 0.693359375);
  constexpr T kLow = T(kDouble ? 1.90821492927058770002e-10 : -2.12194440e-4);
  const Vec<T> least = broadcast(kLeast), most = broadcast(kMost), zero{};
  Vec<T> x = v < least ? least : v;
  x = x > most ? most : x;
  const Vec<T> rounded = x * T(1.44269504088896340736) + kRound, n = rounded - kRound;
  const Vec<T> r = x - n * kHigh - n * kLow;
  Vec<T> sum = broadcast(T(1));
#pragma GCC unroll 13
  for (int i = kTerms; i > 0; --i) sum = sum * r * (T(1) / T(i)) + T(1);
  // 2^n in two halves: n reaches one more than a number's exponent does
  VecIndex<T> power, anchor;
  const Vec<T> base = broadcast(kRound);
  memcpy(&power, &rounded, sizeof power);
  memcpy(&anchor, &base, sizeof anchor);
  power -= anchor;
  const VecIndex<T> half = power >> 1, first = (half + kBias) << kMantissa,
                    second = (power - half + kBias) << kMantissa;
  Vec<T> a, b;
  memcpy(&a, &first, sizeof a);
  memcpy(&b, &second, sizeof b);
  sum = sum * a * b;
  sum = v > most ? broadcast(T(__builtin_inf())) : sum;
  sum = v < least ? zero : sum;
  return v == v ? sum : v;
}

// Those of inference: a call beside the rest, as inlined into every kernel they would be most of its code.
template <class T>
__attribute__((noinline)) Vec<T> activate_smoothly(Vec<T> v, Activation act) {
  if (act == Activation::kSilu || act == Activation::kSigmoid) {
    const Vec<T> below = exponential<T>(-v) + T(1);
    return (act == Activation::kSilu ? v : broadcast(T(1))) / below;
  }
  const Vec<T> zero{}, six = zero + T(6);
  Vec<T> gate = v + T(3);
  gate = zero > gate ? zero : gate;
  gate = gate > six ? six : gate;
  return (act == Activation::kHardswish ? v * gate : gate) / T(6);
}

// The comparisons are false for a NaN, which therefore stays.
template <class T>
CNNFAST_INLINE Vec<T> activate(Vec<T> v, Activation act) {
  const Vec<T> zero{}, six = zero + T(6);
  if (act == Activation::kNone) return v;
  if (act == Activation::kLeakyRelu) return v > zero ? v : v * T(kLeakySlope);
  if (__builtin_expect(act > Activation::kLeakyRelu, 0)) return activate_smoothly<T>(v, act);
  v = zero > v ? zero : v;
  return act == Activation::kRelu ? v : v > six ? six : v;
}

// g * act'(z); `at` is z or act(z), which tell the same of those up to kLeakyRelu. A NaN there lets g pass, as in
// torch.
template <class T>
CNNFAST_INLINE Vec<T> activate_gradient(Vec<T> g, Vec<T> at, Activation act) {
  const Vec<T> zero{}, six = zero + T(6);
  if (act == Activation::kNone) return g;
  if (act == Activation::kLeakyRelu) return at > zero ? g : g * T(kLeakySlope);
  g = at <= zero ? zero : g;
  return act == Activation::kRelu ? g : at >= six ? zero : g;
}

// Calls f with the activation, known to the compiler where it is one of networks' most common: beside memory-bound
// loops the choice would count. (Not for double: networks aren't in it, and f is compiled each time.)
template <Activation value>
struct KnownActivation {
  constexpr operator Activation() const { return value; }
};
template <class T, class F>
CNNFAST_INLINE void with_activation(Activation act, const F& f) {
  if constexpr (!kSame<T, double>) {
    if (act == Activation::kNone) return f(KnownActivation<Activation::kNone>{});
    if (act == Activation::kRelu) return f(KnownActivation<Activation::kRelu>{});
  }
  f(act);
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

  // Those channels of one pixel; r points to its residual (or is null), r_c being 1. `streams`: past the caches.
  CNNFAST_INLINE void store(S* y, Vec<T> sum, const Factors& f, const S* r, int64_t lanes, bool streams) const {
    sum = sum * f.scale + f.shift;
    if (lanes >= kLanes<T>) {
      if (r) sum += load_wide(r);
      sum = activate<T>(sum, act);
      if (streams)
        stream_narrow(y, sum);
      else
        store_narrow(y, sum);
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
