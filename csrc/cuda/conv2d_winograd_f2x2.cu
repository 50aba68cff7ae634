// Winograd's F(2 x 2, 3 x 3): conv2d_winograd.h with tiles of 2 x 2 outputs, and conv2d_winograd_half.h.
#include "conv2d_winograd.h"
#include "conv2d_winograd_half.h"

namespace cnnfast::cuda {

CNNFAST_KERNEL("conv2d_winograd_f2x2.fprop.f32", Conv2dParams, (winograd::launch_correlate<2, Direction::fprop>),
               (winograd::workspace<2, Direction::fprop>))
CNNFAST_KERNEL("conv2d_winograd_f2x2.fprop.bf16.mma", Conv2dParams,
               (winograd::launch_half<__nv_bfloat16, Direction::fprop>), winograd::workspace_half<Direction::fprop>)
CNNFAST_KERNEL("conv2d_winograd_f2x2.fprop.f16.mma", Conv2dParams, (winograd::launch_half<__half, Direction::fprop>),
               winograd::workspace_half<Direction::fprop>)
CNNFAST_KERNEL("conv2d_winograd_f2x2.dgrad.f32", Conv2dParams, (winograd::launch_correlate<2, Direction::dgrad>),
               (winograd::workspace<2, Direction::dgrad>))
CNNFAST_KERNEL("conv2d_winograd_f2x2.dgrad.bf16.mma", Conv2dParams,
               (winograd::launch_half<__nv_bfloat16, Direction::dgrad>), winograd::workspace_half<Direction::dgrad>)
CNNFAST_KERNEL("conv2d_winograd_f2x2.dgrad.f16.mma", Conv2dParams, (winograd::launch_half<__half, Direction::dgrad>),
               winograd::workspace_half<Direction::dgrad>)

}  // namespace cnnfast::cuda
