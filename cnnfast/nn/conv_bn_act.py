"""``cnnfast.ConvBNAct``: convolution, batch norm, residual and activation as one layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cnnfast import functional, ops
from cnnfast.nn.batch_norm import BatchNorm2d
from cnnfast.nn.conv2d import Conv2d


class ConvBNAct(torch.nn.Module):
    """``act(bn(conv(x)) + residual)``: in evaluation one kernel, in training the convolution and one fused pass.

    Its parts are the modules ``conv`` (without bias by default) and ``bn``, so that a ``state_dict`` holds what theirs
    would. The parameters are read at every call: nothing folded is kept, so no update can be missed.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: The convolution's. padding None
            keeps the size at stride 1: ``dilation * (kernel_size - 1) // 2``.
        activation: ``"none"``, ``"relu"``, ``"relu6"`` or ``"leaky_relu"``.
        eps, momentum: The batch norm's.
        device, dtype: Of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        activation: str = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        ops.activation_code("ConvBNAct", activation)
        if padding is None:
            kernel, step = _pair(kernel_size), _pair(dilation)
            padding = (step[0] * (kernel[0] - 1) // 2, step[1] * (kernel[1] - 1) // 2)
        self.conv = Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
        self.bn = BatchNorm2d(out_channels, eps=eps, momentum=momentum, device=device, dtype=dtype)
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(N, C, H, W), and a residual of the result's shape (N, K, P, Q), to (N, K, P, Q)."""
        conv, bn = self.conv, self.bn
        if bn.training or bn.running_mean is None or not _plain(conv, Conv2d) or not _plain(bn, BatchNorm2d):
            if isinstance(bn, BatchNorm2d) and not _hooked(bn):
                return bn.forward_act(conv(x), residual, self.activation)
            z = bn(conv(x))
            return (
                ops.activate(z, self.activation)
                if residual is None
                else functional.add_act(z, residual, self.activation)
            )
        return functional.conv_bn_act(
            x, conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias, residual, self.activation,
            conv.stride, conv.padding, conv.dilation, conv.groups, eps=bn.eps,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The activation."""
        return self.activation


def _pair(value: int | Sequence[int]) -> Sequence[int]:
    return (value, value) if isinstance(value, int) else value


def _hooked(module: torch.nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _plain(module: torch.nn.Module, cls: type) -> bool:
    """Whether a part may be passed over: exactly cnnfast's class, and nobody watches it."""
    return type(module) is cls and not _hooked(module) and getattr(module, "padding_mode", "zeros") == "zeros"
