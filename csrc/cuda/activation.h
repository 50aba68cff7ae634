// The activations that fused operations end with. NaN passes through each of them, as in torch.
#pragma once
#include <cmath>

#include "../common/activation.h"
#include "primitives/cuda.h"

namespace cnnfast::cuda {

// One formula for all, without branches: below `low` the slope is another, above `high` there is none. Where an
// activation has no such bound it is NaN, with which every comparison is false.
template <class Acc>
struct Activate {
  Acc low, high, slope;

  __host__ __device__ __forceinline__ explicit Activate(Activation act)
      : low(act == Activation::kNone ? Acc(NAN) : Acc(0)),
        high(act == Activation::kRelu6 ? Acc(6) : Acc(NAN)),
        slope(act == Activation::kLeakyRelu ? Acc(kLeakySlope) : Acc(0)) {}

  __device__ __forceinline__ Acc operator()(Acc v) const {
    v = v < low ? times_slope(v) : v;
    return v > high ? high : v;
  }
  // g * act'(z); `at` is z or act(z), which tell the same.
  __device__ __forceinline__ Acc gradient(Acc g, Acc at) const {
    return at <= low ? times_slope(g) : at >= high ? Acc(0) : g;
  }

 private:
  __device__ __forceinline__ Acc times_slope(Acc v) const { return slope == 0 ? Acc(0) : v * slope; }  // not inf * 0
};

}  // namespace cnnfast::cuda
