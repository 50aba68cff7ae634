"""``cnnfast.ConvBNAct``: convolution, batch norm, residual and activation as one layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from cnnfast import dispatch, functional, ops, settings
from cnnfast.functional.conv_bn_act import Pending, conv_for_norm, normalised, trains_fused
from cnnfast.nn._scripting import activated
from cnnfast.nn.batch_norm import BatchNorm2d
from cnnfast.nn.conv2d import Conv2d

Result = TypeVar("Result")
Module = TypeVar("Module", bound=torch.nn.Module)
WATCHES = "_cnnfast_watches"  # an attribute of hooks that only want to know when a module runs, such as explain's


class ConvBNAct(torch.nn.Module):
    """``act(bn(conv(x)) + residual)``: in evaluation one kernel; in training the convolution, on a GPU with
    its result's statistics, and one fused pass.

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
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            y = self.bn(self.conv(x))
            return activated(y if residual is None else y + residual, self.activation)
        else:
            return conv_bn_act(self.conv, self.bn, x, residual, self.activation)

    def extra_repr(self) -> str:
        """The activation."""
        return self.activation


def conv_bn_act(
    conv: torch.nn.Module, bn: torch.nn.Module, x: Tensor | Pending, residual: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:  # fmt: skip
    """``act(bn(conv(x)) + residual)`` of two modules that somebody holds, fused as far as that changes nothing.

    A part is passed over only where it is exactly cnnfast's class and nobody watches it: one with hooks, a forward or a
    class of its own (a norm of another kind, a parametrized weight) is called as it is.

    Args:
        conv, bn: A convolution, and a norm of its result.
        x, residual: What the convolution takes, or what :func:`conv_bn_act_pending` left; a tensor of the result's shape, or
            None.
        activation: ``"none"``, ``"relu"``, ``"relu6"`` or ``"leaky_relu"``.
    """
    pending = _pending(conv, bn, x, residual, activation)
    if pending is not None:
        return _watched(bn, lambda: normalised(pending, residual))
    x = normalised(x)
    if not plain(bn, BatchNorm2d):
        if isinstance(bn, torch.nn.SyncBatchNorm):
            reason = "SyncBatchNorm's statistics are of all processes' batches, a convolution's of its own"
            settings.note(dispatch.Unserved("conv_bn_act", reason))
        z = bn(conv(x))
        return ops.activate(z, activation) if residual is None else functional.add_act(z, residual, activation)
    if bn.training or bn.running_mean is None or not plain(conv, Conv2d) or conv.padding_mode != "zeros":
        z = conv(x)
        return _watched(bn, lambda: bn.forward_act(z, residual, activation))
    return _watched(conv, lambda: functional.conv_bn_act(
        x, conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias, residual, activation,
        conv.stride, conv.padding, conv.dilation, conv.groups, eps=bn.eps,
    ))  # fmt: skip


def conv_bn_act_pending(
    conv: torch.nn.Module, bn: torch.nn.Module, x: Tensor | Pending, activation: str = "relu"
) -> Tensor | Pending:
    """:func:`conv_bn_act` of what only another ``conv_bn_act`` will read, which may then do this one's batch norm.

    In training on a GPU the convolution's result is returned with what normalises it; elsewhere the layer's result.
    """
    pending = _pending(conv, bn, x, None, activation)
    return conv_bn_act(conv, bn, x, None, activation) if pending is None else _watched(bn, lambda: pending)


def _pending(
    conv: torch.nn.Module, bn: torch.nn.Module, x: Tensor | Pending, residual: Tensor | None, activation: str
) -> Pending | None:
    """The convolution with its result's statistics; None where the two modules are to be run one after the other."""
    if not (bn.training and plain(bn, BatchNorm2d) and plain(conv, Conv2d) and conv.padding_mode == "zeros"):
        return None
    if not trains_fused(x, conv.weight, residual):
        return None
    taken = (conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    mean, var, momentum = bn.averages()
    norm = (mean, var, bn.weight, bn.bias)
    return _watched(conv, lambda: conv_for_norm(x, taken, norm, activation, momentum, bn.eps))


def plain(module: torch.nn.Module, cls: type[Module]) -> TypeGuard[Module]:
    """Whether a module may be passed over for what it computes: exactly this class, its own forward, no hooks."""
    if type(module) is not cls or "forward" in module.__dict__ or _has_any_global_hook():  # type: ignore[no-untyped-call]
        return False
    if module._backward_hooks or module._backward_pre_hooks:
        return False
    if not module._forward_hooks and not module._forward_pre_hooks:
        return True
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return all(getattr(hook, WATCHES, False) for hook in hooks)


def _watched(module: torch.nn.Module, run: Callable[[], Result]) -> Result:
    """Runs what stands for a plain module, with the hooks that watch it."""
    for hook in module._forward_pre_hooks.values():
        hook(module, ())
    y = run()
    for hook in module._forward_hooks.values():
        hook(module, (), y)
    return y


def _pair(value: int | Sequence[int]) -> Sequence[int]:
    return (value, value) if isinstance(value, int) else value
