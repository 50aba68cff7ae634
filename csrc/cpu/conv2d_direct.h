// The plain loops, for kernels that hand over the rare case they can't do exactly.
#pragma once
#include "conv2d_view.h"
#include "epilogue.h"

namespace cnnfast {
namespace CNNFAST_ISA {

// Channels [k, end) of group g of output pixel `index` of any view: fprop's, or a dgrad class's.
template <class S>
void direct_pixel(const Conv2dView& v, const S* x, const S* w, const S* bias, S* y, int64_t index, int64_t g, int64_t k,
                  int64_t end, const Epilogue<S>* epilogue = nullptr);
template <class S>
void direct_fprop(const Conv2dParams& p, const S* x, const S* w, const S* bias, S* y, int threads,
                  const Epilogue<S>* epilogue = nullptr);
template <class S>
void direct_dgrad(const Conv2dParams& p, S* dx, const S* w, const S* g, int threads);
template <class S>
void direct_wgrad(const Conv2dParams& p, const S* x, S* dw, const S* g, int threads);

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
