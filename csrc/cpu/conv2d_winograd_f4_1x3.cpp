// Winograd's F(4, 3) along rows or columns, for 1x3 and 3x1 filters: conv2d_winograd.h with tiles of 4 outputs.
#include "conv2d_winograd.h"

namespace cnnfast {
namespace CNNFAST_ISA {
namespace {
using Row = WinogradTile<Axis<1, 1>, Axis<4, 3>>;
using Column = WinogradTile<Axis<4, 3>, Axis<1, 1>>;
}  // namespace

CNNFAST_KERNEL("conv2d_winograd_f4_1x3.fprop.f32", Conv2dParams, (launch_fprop<float, Row, Column>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f4_1x3.fprop.f64", Conv2dParams, (launch_fprop<double, Row, Column>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f4_1x3.fprop.bf16", Conv2dParams, (launch_fprop<BFloat16, Row, Column>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f4_1x3.fprop.f16", Conv2dParams, (launch_fprop<Float16, Row, Column>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f4_1x3.fprop.f32.pack", Conv2dParams, (launch_pack<float, Row, Column>),
               (packed_bytes<float, Row, Column>))
CNNFAST_KERNEL("conv2d_winograd_f4_1x3.fprop.f64.pack", Conv2dParams, (launch_pack<double, Row, Column>),
               (packed_bytes<double, Row, Column>))
CNNFAST_KERNEL("conv2d_winograd_f4_1x3.fprop.bf16.pack", Conv2dParams, (launch_pack<BFloat16, Row, Column>),
               (packed_bytes<BFloat16, Row, Column>))
CNNFAST_KERNEL("conv2d_winograd_f4_1x3.fprop.f16.pack", Conv2dParams, (launch_pack<Float16, Row, Column>),
               (packed_bytes<Float16, Row, Column>))
CNNFAST_KERNEL("conv2d_winograd_f4_1x3.dgrad.f32", Conv2dParams, (launch_dgrad<float, Row, Column>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f4_1x3.dgrad.f64", Conv2dParams, (launch_dgrad<double, Row, Column>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f4_1x3.dgrad.bf16", Conv2dParams, (launch_dgrad<BFloat16, Row, Column>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f4_1x3.dgrad.f16", Conv2dParams, (launch_dgrad<Float16, Row, Column>), nullptr)

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
