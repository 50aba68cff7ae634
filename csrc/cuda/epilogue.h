// What becomes of a sum before it is stored: y = act(scale[k] * sum + shift[k] + residual).
//
// scale and shift are vectors of the sums' own type; each operand may be absent. NaN passes through every activation,
// as in torch.
#pragma once
#include "../common/kernel_table.h"
#include "activation.h"
#include "primitives/numeric.h"

namespace cnnfast::cuda {

template <class T>
struct Epilogue {
  const Accumulator<T>*scale, *shift;  // null: 1, 0
  const T* residual;                   // null: 0
  Activation act;

  // Of a launch's operands after the convolution's own.
  Epilogue(const Conv2dParams& p, const Launch& run)
      : scale(static_cast<const Accumulator<T>*>(run.operands[4])),
        shift(static_cast<const Accumulator<T>*>(run.operands[5])),
        residual(static_cast<const T*>(run.operands[6])),
        act(static_cast<Activation>(p.act)) {}

  // Whether nothing becomes of it. The ten instructions of all the others take as long as a short product: kernels
  // write such sums in a loop of its own.
  __device__ __forceinline__ bool identity() const { return !scale && !shift && !residual && act == Activation::kNone; }
};

}  // namespace cnnfast::cuda
