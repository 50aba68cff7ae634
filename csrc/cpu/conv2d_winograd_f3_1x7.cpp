// Winograd's F(3, 4) along rows or columns, for 1x7 and 7x1 filters in segments of 4 and 3 taps: conv2d_winograd.h with
// tiles of 3 outputs.
#include "conv2d_winograd.h"

namespace cnnfast {
namespace CNNFAST_ISA {
namespace {
using Row = WinogradTile<Axis<1, 1>, Axis<3, 4, 7>>;
using Column = WinogradTile<Axis<3, 4, 7>, Axis<1, 1>>;
}  // namespace

CNNFAST_KERNEL("conv2d_winograd_f3_1x7.fprop.f32", Conv2dParams, (launch_fprop<float, Row, Column>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f3_1x7.fprop.f64", Conv2dParams, (launch_fprop<double, Row, Column>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f3_1x7.fprop.bf16", Conv2dParams, (launch_fprop<BFloat16, Row, Column>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f3_1x7.fprop.f16", Conv2dParams, (launch_fprop<Float16, Row, Column>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f3_1x7.fprop.f32.pack", Conv2dParams, (launch_pack<float, Row, Column>),
               (packed_bytes<float, Row, Column>))
CNNFAST_KERNEL("conv2d_winograd_f3_1x7.fprop.f64.pack", Conv2dParams, (launch_pack<double, Row, Column>),
               (packed_bytes<double, Row, Column>))
CNNFAST_KERNEL("conv2d_winograd_f3_1x7.fprop.bf16.pack", Conv2dParams, (launch_pack<BFloat16, Row, Column>),
               (packed_bytes<BFloat16, Row, Column>))
CNNFAST_KERNEL("conv2d_winograd_f3_1x7.fprop.f16.pack", Conv2dParams, (launch_pack<Float16, Row, Column>),
               (packed_bytes<Float16, Row, Column>))
CNNFAST_KERNEL("conv2d_winograd_f3_1x7.dgrad.f32", Conv2dParams, (launch_dgrad<float, Row, Column>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f3_1x7.dgrad.f64", Conv2dParams, (launch_dgrad<double, Row, Column>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f3_1x7.dgrad.bf16", Conv2dParams, (launch_dgrad<BFloat16, Row, Column>), nullptr)
CNNFAST_KERNEL("conv2d_winograd_f3_1x7.dgrad.f16", Conv2dParams, (launch_dgrad<Float16, Row, Column>), nullptr)

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
