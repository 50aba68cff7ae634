// Winograd's F(4 x 4, 3 x 3): conv2d_winograd.h with tiles of 4 x 4 outputs.
#include "conv2d_winograd.h"

namespace cnnfast::cuda {

CNNFAST_KERNEL("conv2d_winograd_f4x4.fprop.f32", Conv2dParams, (winograd::launch_correlate<4, Direction::fprop>),
               (winograd::workspace<4, Direction::fprop>))
CNNFAST_KERNEL("conv2d_winograd_f4x4.dgrad.f32", Conv2dParams, (winograd::launch_correlate<4, Direction::dgrad>),
               (winograd::workspace<4, Direction::dgrad>))

}  // namespace cnnfast::cuda
