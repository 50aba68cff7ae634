"""The contracts: one module an operation. Adding an operation adds a module and its line here."""

from cnnfast.ops import conv_transpose2d
from cnnfast.ops._activation import ACTIVATIONS, INFERENCE
from cnnfast.ops._activation import code as activation_code
from cnnfast.ops._activation import forward as activate
from cnnfast.ops._memory import prefers_channels_last
from cnnfast.ops.adaptive_avg_pool2d import adaptive_avg_pool2d, adaptive_avg_pool2d_dgrad
from cnnfast.ops.adaptive_max_pool2d import (
    adaptive_max_pool2d,
    adaptive_max_pool2d_dgrad,
    adaptive_max_pool2d_indices,
    adaptive_max_pool2d_jvp,
    adaptive_max_pool2d_recorded,
    adaptive_max_pool2d_records,
)
from cnnfast.ops.add_act import add_act, add_act_dgrad
from cnnfast.ops.avg_pool2d import avg_pool2d, avg_pool2d_dgrad
from cnnfast.ops.batch_norm import (
    batch_norm,
    batch_norm_backward,
    batch_norm_backward_residual,
    batch_norm_dgrad,
    batch_norm_stats,
    batch_norm_wgrad,
)
from cnnfast.ops.bn_act_conv import bn_act_conv, bn_act_conv_dgrad, bn_act_conv_wgrad
from cnnfast.ops.conv2d import conv2d, conv2d_bgrad, conv2d_dgrad, conv2d_wgrad
from cnnfast.ops.conv2d import validate as validate_conv
from cnnfast.ops.conv_bn_act import conv_bn_act
from cnnfast.ops.max_pool2d import (
    max_pool2d,
    max_pool2d_dgrad,
    max_pool2d_indices,
    max_pool2d_jvp,
    max_pool2d_recorded,
    max_pool2d_records,
)

__all__ = [
    "ACTIVATIONS",
    "INFERENCE",
    "activate",
    "activation_code",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool2d_dgrad",
    "adaptive_max_pool2d",
    "adaptive_max_pool2d_dgrad",
    "adaptive_max_pool2d_indices",
    "adaptive_max_pool2d_jvp",
    "adaptive_max_pool2d_recorded",
    "adaptive_max_pool2d_records",
    "add_act",
    "add_act_dgrad",
    "avg_pool2d",
    "avg_pool2d_dgrad",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_backward_residual",
    "batch_norm_dgrad",
    "batch_norm_stats",
    "batch_norm_wgrad",
    "bn_act_conv",
    "bn_act_conv_dgrad",
    "bn_act_conv_wgrad",
    "conv2d",
    "conv2d_bgrad",
    "conv2d_dgrad",
    "conv2d_wgrad",
    "conv_bn_act",
    "conv_transpose2d",
    "max_pool2d",
    "max_pool2d_dgrad",
    "max_pool2d_indices",
    "max_pool2d_jvp",
    "max_pool2d_recorded",
    "max_pool2d_records",
    "prefers_channels_last",
    "validate_conv",
]
