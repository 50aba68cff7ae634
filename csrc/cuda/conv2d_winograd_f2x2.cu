// Winograd's F(2 x 2, 3 x 3): conv2d_winograd.h with tiles of 2 x 2 outputs.
#include "conv2d_winograd.h"

namespace cnnfast::cuda {

CNNFAST_KERNEL("conv2d_winograd_f2x2.fprop.f32", Conv2dParams, (winograd::launch_correlate<2, Direction::fprop>),
               (winograd::workspace<2, Direction::fprop>))
CNNFAST_KERNEL("conv2d_winograd_f2x2.dgrad.f32", Conv2dParams, (winograd::launch_correlate<2, Direction::dgrad>),
               (winograd::workspace<2, Direction::dgrad>))

}  // namespace cnnfast::cuda
