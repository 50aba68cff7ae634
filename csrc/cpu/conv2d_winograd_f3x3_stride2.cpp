// Winograd's way with 3x3 filters of stride 2: conv2d_winograd.h with tiles of 3 x 3 outputs.
#include "conv2d_winograd.h"

namespace cnnfast {
namespace CNNFAST_ISA {
namespace {
using Tile = WinogradTile<StridedAxis, StridedAxis>;
}  // namespace

CNNFAST_KERNEL("conv2d_winograd_f3x3_stride2.fprop.f32", Conv2dParams, (launch_fprop<float, Tile>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f3x3_stride2.fprop.f64", Conv2dParams, (launch_fprop<double, Tile>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f3x3_stride2.fprop.bf16", Conv2dParams, (launch_fprop<BFloat16, Tile>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f3x3_stride2.fprop.f16", Conv2dParams, (launch_fprop<Float16, Tile>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f3x3_stride2.fprop.f32.pack", Conv2dParams, (launch_pack<float, Tile>),
               (packed_bytes<float, Tile>))
CNNFAST_KERNEL("conv2d_winograd_f3x3_stride2.fprop.f64.pack", Conv2dParams, (launch_pack<double, Tile>),
               (packed_bytes<double, Tile>))
CNNFAST_KERNEL("conv2d_winograd_f3x3_stride2.fprop.bf16.pack", Conv2dParams, (launch_pack<BFloat16, Tile>),
               (packed_bytes<BFloat16, Tile>))
CNNFAST_KERNEL("conv2d_winograd_f3x3_stride2.fprop.f16.pack", Conv2dParams, (launch_pack<Float16, Tile>),
               (packed_bytes<Float16, Tile>))

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
