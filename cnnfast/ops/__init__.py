"""The contracts: one module an operation. Adding an operation adds a module and its line here."""

from cnnfast.ops._activation import ACTIVATIONS
from cnnfast.ops._activation import code as activation_code
from cnnfast.ops._activation import forward as activate
from cnnfast.ops.add_act import add_act, add_act_dgrad
from cnnfast.ops.batch_norm import (
    batch_norm,
    batch_norm_backward,
    batch_norm_backward_residual,
    batch_norm_dgrad,
    batch_norm_stats,
    batch_norm_wgrad,
)
from cnnfast.ops.conv2d import conv2d, conv2d_bgrad, conv2d_dgrad, conv2d_wgrad
from cnnfast.ops.conv_bn_act import conv_bn_act
from cnnfast.ops.max_pool2d import max_pool2d, max_pool2d_dgrad, max_pool2d_indices, max_pool2d_jvp

__all__ = [
    "ACTIVATIONS",
    "activate",
    "activation_code",
    "add_act",
    "add_act_dgrad",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_backward_residual",
    "batch_norm_dgrad",
    "batch_norm_stats",
    "batch_norm_wgrad",
    "conv2d",
    "conv2d_bgrad",
    "conv2d_dgrad",
    "conv2d_wgrad",
    "conv_bn_act",
    "max_pool2d",
    "max_pool2d_dgrad",
    "max_pool2d_indices",
    "max_pool2d_jvp",
]
