// Winograd's F(2 x 2, 5 x 5): conv2d_winograd.h with tiles of 2 x 2 outputs.
#include "conv2d_winograd.h"

namespace cnnfast {
namespace CNNFAST_ISA {
namespace {
using Tile = SquareTile<2, 5>;
}  // namespace

CNNFAST_KERNEL("conv2d_winograd_f2x2_5x5.fprop.f32", Conv2dParams, (launch_fprop<float, Tile>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f2x2_5x5.fprop.f64", Conv2dParams, (launch_fprop<double, Tile>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f2x2_5x5.fprop.bf16", Conv2dParams, (launch_fprop<BFloat16, Tile>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f2x2_5x5.fprop.f16", Conv2dParams, (launch_fprop<Float16, Tile>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f2x2_5x5.fprop.f32.pack", Conv2dParams, (launch_pack<float, Tile>),
               (packed_bytes<float, Tile>))
CNNFAST_KERNEL("conv2d_winograd_f2x2_5x5.fprop.f64.pack", Conv2dParams, (launch_pack<double, Tile>),
               (packed_bytes<double, Tile>))
CNNFAST_KERNEL("conv2d_winograd_f2x2_5x5.fprop.bf16.pack", Conv2dParams, (launch_pack<BFloat16, Tile>),
               (packed_bytes<BFloat16, Tile>))
CNNFAST_KERNEL("conv2d_winograd_f2x2_5x5.fprop.f16.pack", Conv2dParams, (launch_pack<Float16, Tile>),
               (packed_bytes<Float16, Tile>))
CNNFAST_KERNEL("conv2d_winograd_f2x2_5x5.dgrad.f32", Conv2dParams, (launch_dgrad<float, Tile>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f2x2_5x5.dgrad.f64", Conv2dParams, (launch_dgrad<double, Tile>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f2x2_5x5.dgrad.bf16", Conv2dParams, (launch_dgrad<BFloat16, Tile>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f2x2_5x5.dgrad.f16", Conv2dParams, (launch_dgrad<Float16, Tile>), nullptr)

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
