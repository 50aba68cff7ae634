"""conv_transpose2d: torch.nn.functional.conv_transpose2d on the kernels of conv2d's data gradient."""

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
    not_ours,
    pair,
    resolve_precision,
    scripting,
    torch_serves,
)
from cnnfast.ops import conv_transpose2d as contract


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """A 2-D transposed convolution, as :func:`torch.nn.functional.conv_transpose2d`.

    Args:
        input: (N, C, P, Q) or (C, P, Q); float32, float64, bfloat16 or float16, any strides. channels_last is fastest.
        weight: (C, K/groups, R, S), of the input's dtype.
        bias: (K,) or None; added in a second pass over the result.
        stride, padding, dilation: An int or a pair (height, width); those of the convolution this is the gradient of.
        output_padding: Rows and columns added below and to the right: an int or a pair, smaller than stride or dilation.
        groups: C and K are divided into that many independent convolutions.

    Returns:
        (N, K, H, W) or (K, H, W) with H = (P - 1)*stride - 2*padding + dilation*(R - 1) + output_padding + 1.

    Raises:
        ShapeError, DtypeError, NotImplementedError: as :func:`cnnfast.functional.conv2d`.
    """
    if has_torch_function(input, weight, bias):
        return handle_torch_function(
            conv_transpose2d, (input, weight, bias), input, weight, bias, stride=stride, padding=padding,
            output_padding=output_padding, groups=groups, dilation=dilation,
        )  # fmt: skip
    check_tensors("conv_transpose2d", input=input, weight=weight, **({} if bias is None else {"bias": bias}))
    if scripting():
        return torch.nn.functional.conv_transpose2d(
            input, weight, bias, stride, padding, output_padding, groups, dilation
        )
    if any_autocast():
        input, weight, bias = autocast(input, weight, bias)  # type: ignore[assignment]
    stride, padding, output_padding, dilation = (
        pair("conv_transpose2d", name, value)
        for name, value in (
            ("stride", stride), ("padding", padding), ("output_padding", output_padding), ("dilation", dilation),
        )
    )  # fmt: skip
    groups = integer("conv_transpose2d", "groups", groups)
    if input.dim() not in (3, 4):
        raise ShapeError(
            f"conv_transpose2d: expected a 3-D (unbatched) or 4-D (batched) input, got shape {tuple(input.shape)}"
        )
    torch_args = (input, weight, bias, stride, padding, output_padding, groups, dilation)
    reason = not_ours(input, weight)
    if reason:
        return torch_serves("conv_transpose2d", reason, torch.nn.functional.conv_transpose2d, *torch_args)
    x = input if input.dim() == 4 else input.unsqueeze(0)
    contract.validate(x, weight, bias, stride, padding, output_padding, groups, dilation)
    size = contract.output_size(x.shape[2:], weight.shape[2:], stride, padding, output_padding, dilation)
    inner, sides, beyond = contract.as_dgrad(size, stride, padding, output_padding)
    if min(*size, *inner) <= 0:
        reason = "a result that is empty but for output padding"
        return torch_serves("conv_transpose2d", reason, torch.nn.functional.conv_transpose2d, *torch_args)
    y = ops.conv2d_dgrad(
        weight, x, (x.shape[0], weight.shape[1] * groups, *inner), ops.prefers_channels_last(x, weight), stride, sides,
        dilation, groups, *resolve_precision(input.device),
    )  # fmt: skip
    if any(beyond):
        y = torch.nn.functional.pad(y, (0, beyond[1], 0, beyond[0]))
    if bias is not None:
        y = y + bias.view(-1, 1, 1)
    return y if input.dim() == 4 else y.squeeze(0)
