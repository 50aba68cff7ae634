// Winograd's F(4 x 4, 3 x 3): conv2d_winograd.h with tiles of 4 x 4 outputs.
#include "conv2d_winograd.h"
#include "conv2d_winograd_wgrad.h"

namespace cnnfast {
namespace CNNFAST_ISA {
namespace {
using Tile = SquareTile<4>;
}

CNNFAST_KERNEL("conv2d_winograd_f4x4.fprop.f32", Conv2dParams, (launch_fprop<float, Tile>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f4x4.fprop.f64", Conv2dParams, (launch_fprop<double, Tile>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f4x4.fprop.bf16", Conv2dParams, (launch_fprop<BFloat16, Tile>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f4x4.fprop.f16", Conv2dParams, (launch_fprop<Float16, Tile>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f4x4.fprop.f32.pack", Conv2dParams, (launch_pack<float, Tile>),
               (packed_bytes<float, Tile>))
CNNFAST_KERNEL("conv2d_winograd_f4x4.fprop.f64.pack", Conv2dParams, (launch_pack<double, Tile>),
               (packed_bytes<double, Tile>))
CNNFAST_KERNEL("conv2d_winograd_f4x4.fprop.bf16.pack", Conv2dParams, (launch_pack<BFloat16, Tile>),
               (packed_bytes<BFloat16, Tile>))
CNNFAST_KERNEL("conv2d_winograd_f4x4.fprop.f16.pack", Conv2dParams, (launch_pack<Float16, Tile>),
               (packed_bytes<Float16, Tile>))
CNNFAST_KERNEL("conv2d_winograd_f4x4.dgrad.f32", Conv2dParams, (launch_dgrad<float, Tile>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f4x4.dgrad.f64", Conv2dParams, (launch_dgrad<double, Tile>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f4x4.dgrad.bf16", Conv2dParams, (launch_dgrad<BFloat16, Tile>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f4x4.dgrad.f16", Conv2dParams, (launch_dgrad<Float16, Tile>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f4x4.wgrad.f32", Conv2dParams, (launch_wgrad<float, 4>), (wgrad_workspace<float, 4>))
CNNFAST_KERNEL("conv2d_winograd_f4x4.wgrad.f64", Conv2dParams, (launch_wgrad<double, 4>), (wgrad_workspace<double, 4>))
CNNFAST_KERNEL("conv2d_winograd_f4x4.wgrad.bf16", Conv2dParams, (launch_wgrad<BFloat16, 4>),
               (wgrad_workspace<BFloat16, 4>))
CNNFAST_KERNEL("conv2d_winograd_f4x4.wgrad.f16", Conv2dParams, (launch_wgrad<Float16, 4>),
               (wgrad_workspace<Float16, 4>))

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
