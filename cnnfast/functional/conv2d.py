"""conv2d: torch.nn.functional.conv2d on cnnfast's kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from cnnfast import ops
from cnnfast.errors import ShapeError
from cnnfast.functional._arguments import (
    OPTIONAL_TYPES,
    PLAIN_TYPES,
    any_autocast,
    autocast,
    check_tensors,
    has_torch_function,
    integer,
    named_padding,
    not_ours,
    pair,
    plain,
    resolve_precision,
    scripting,
    torch_serves,
)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """A 2-D convolution (cross-correlation), as :func:`torch.nn.functional.conv2d`.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, bfloat16 or float16, any strides. channels_last is fastest.
        weight: (K, C/groups, R, S), of the input's dtype.
        bias: (K,) or None.
        stride, dilation: An int or a pair (height, width).
        padding: An int, a pair, ``"valid"``, or ``"same"`` (stride 1 only; an odd total puts the extra row or column
            below or to the right).
        groups: C and K are divided into that many independent convolutions.

    Returns:
        (N, K, P, Q) or (K, P, Q) with P = (H + 2*padding - dilation*(R-1) - 1) // stride + 1; channels_last where the
        input's or the weight's strides suggest it. NaN and Inf propagate as the sum has them; padding contributes nothing.

    Raises:
        ShapeError: (a ValueError and RuntimeError) shapes or values that torch rejects.
        DtypeError: (a TypeError and RuntimeError) dtypes that don't go together.
        NotImplementedError: nothing serves under ``strict()`` or a forced backend; lists every backend's reason.
    """
    if has_torch_function(input, weight, bias):
        return handle_torch_function(
            conv2d, (input, weight, bias), input, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups
        )  # fmt: skip
    if type(input) is not Tensor or type(weight) not in PLAIN_TYPES or type(bias) not in OPTIONAL_TYPES:
        check_tensors("conv2d", input=input, weight=weight, **({} if bias is None else {"bias": bias}))
    short = plain()
    if not short and scripting():
        return torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if any_autocast():
        input, weight, bias = autocast(input, weight, bias)  # type: ignore[assignment]
    stride, dilation = pair("conv2d", "stride", stride), pair("conv2d", "dilation", dilation)
    groups = integer("conv2d", "groups", groups)
    if type(padding) is str:
        pad = named_padding("conv2d", padding, weight, stride, dilation)
    else:
        h, w = pair("conv2d", "padding", padding)
        pad = (h, h, w, w)
    params = (stride, pad, dilation, groups, *resolve_precision(input.device))
    dims = input.dim()
    if dims == 4 and short:
        tensors = (input, weight, bias)
        run = ops.conv2d.find(tensors, params)
        if run is not None:
            return ops.conv2d.apply(run, tensors, params)
    if dims != 4 and dims != 3:
        raise ShapeError(f"conv2d: expected a 3-D (unbatched) or 4-D (batched) input, got shape {tuple(input.shape)}")
    reason = not_ours(input, weight)
    if reason:
        torch_args = (input, weight, bias, stride, padding, dilation, groups)
        return torch_serves("conv2d", reason, torch.nn.functional.conv2d, *torch_args)
    if dims == 3:
        return ops.conv2d(input.unsqueeze(0), weight, bias, *params).squeeze(0)
    return ops.conv2d(input, weight, bias, *params)
