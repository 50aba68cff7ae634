// The plain loops, for kernels that hand over the rare case they can't do exactly.
#pragma once
#include "epilogue.h"

namespace cnnfast {
namespace CNNFAST_ISA {

template <class S>
void direct_fprop(const Conv2dParams& p, const S* x, const S* w, const S* bias, S* y, int threads,
                  const Epilogue<S>* epilogue = nullptr);
template <class S>
void direct_dgrad(const Conv2dParams& p, S* dx, const S* w, const S* g, int threads);
template <class S>
void direct_wgrad(const Conv2dParams& p, const S* x, S* dw, const S* g, int threads);

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
