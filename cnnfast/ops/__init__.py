"""The contracts: one module an operation. Adding an operation adds a module and its line here."""

from cnnfast.ops.conv2d import conv2d, conv2d_bgrad, conv2d_dgrad, conv2d_wgrad

__all__ = ["conv2d", "conv2d_bgrad", "conv2d_dgrad", "conv2d_wgrad"]
