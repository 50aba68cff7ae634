"""conv1d: torch.nn.functional.conv1d as a conv2d of height one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from cnnfast import ops
from cnnfast.errors import ShapeError
from cnnfast.functional._arguments import (
    any_autocast,
    autocast,
    check_tensors,
    has_torch_function,
    integer,
    named_padding,
    not_ours,
    resolve_precision,
    scripting,
    single,
    torch_serves,
)


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """A 1-D convolution (cross-correlation), as :func:`torch.nn.functional.conv1d`.

    Args:
        input: (N, C, L) or (C, L); float32, float64, bfloat16 or float16, any strides.
        weight: (K, C/groups, S), of the input's dtype.
        bias: (K,) or None.
        stride, dilation: An int or a sequence of one.
        padding: An int, a sequence of one, ``"valid"``, or ``"same"`` (stride 1 only; an odd total puts the extra
            element to the right).
        groups: C and K are divided into that many independent convolutions.

    Returns:
        (N, K, Q) or (K, Q) with Q = (L + 2*padding - dilation*(S-1) - 1) // stride + 1. NaN and Inf propagate as in
        :func:`cnnfast.functional.conv2d`.

    Raises:
        ShapeError, DtypeError, NotImplementedError: as :func:`cnnfast.functional.conv2d`.
    """
    if has_torch_function(input, weight, bias):
        return handle_torch_function(
            conv1d, (input, weight, bias), input, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups
        )  # fmt: skip
    check_tensors("conv1d", input=input, weight=weight, **({} if bias is None else {"bias": bias}))
    if scripting():
        return torch.nn.functional.conv1d(input, weight, bias, stride, padding, dilation, groups)
    if any_autocast():
        input, weight, bias = autocast(input, weight, bias)  # type: ignore[assignment]
    stride, dilation = single("conv1d", "stride", stride), single("conv1d", "dilation", dilation)
    groups = integer("conv1d", "groups", groups)
    pad: tuple[int, ...]
    if type(padding) is str:
        pad = named_padding("conv1d", padding, weight, stride, dilation)
    else:
        pad = single("conv1d", "padding", padding) * 2
    if input.dim() not in (2, 3):
        raise ShapeError(f"conv1d: expected a 2-D (unbatched) or 3-D (batched) input, got shape {tuple(input.shape)}")
    reason = not_ours(input, weight)
    if reason:
        torch_args = (input, weight, bias, stride, padding, dilation, groups)
        return torch_serves("conv1d", reason, torch.nn.functional.conv1d, *torch_args)
    x = input if input.dim() == 3 else input.unsqueeze(0)
    ops.validate_conv(x, weight, bias, stride, pad, dilation, groups, op="conv1d")
    # as torch: an input whose channels lie side by side doesn't make the result so, only such a weight does
    x = x.contiguous().unsqueeze(2)
    y = ops.conv2d(
        x, weight.unsqueeze(2), bias, (1, *stride), (0, 0, *pad), (1, *dilation), groups,
        *resolve_precision(input.device),
    ).squeeze(2)  # fmt: skip
    return y if input.dim() == 3 else y.squeeze(0)
