"""avg_pool2d: torch.nn.functional.avg_pool2d on cnnfast's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from cnnfast import ops, settings
from cnnfast.errors import ShapeError
from cnnfast.functional._arguments import (
    check_tensors,
    has_torch_function,
    integer,
    not_ours,
    pair,
    plain,
    scripting,
    torch_serves,
)

_torch_avg_pool2d: Any = torch.nn.functional.avg_pool2d


def avg_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """A 2-D average pooling, as :func:`torch.nn.functional.avg_pool2d`.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, bfloat16 or float16, any strides. channels_last is fastest.
        kernel_size, stride, padding: An int or a pair (height, width); stride defaults to kernel_size, padding is at
            most half of it.
        ceil_mode: Round the output size up; the last window still starts inside the image or its left padding.
        count_include_pad: Padding counts in the divisor.
        divisor_override: What each sum is divided by, not zero; None: the number of taps.

    Returns:
        (N, C, P, Q) or (C, P, Q) with P = floor or ceil of (H + 2*padding - kernel) / stride, + 1. Accumulated in
        float32 (float64 for float64). NaN and Inf propagate as the sum has them.

    Raises:
        ShapeError: (a ValueError and RuntimeError) shapes or values that torch rejects.
        NotImplementedError: nothing serves under ``strict()`` or a forced backend; lists every backend's reason.
    """
    if has_torch_function(input):
        return handle_torch_function(
            avg_pool2d, (input,), input, kernel_size, stride=stride, padding=padding, ceil_mode=ceil_mode,
            count_include_pad=count_include_pad, divisor_override=divisor_override,
        )  # fmt: skip
    if type(input) is not Tensor:
        check_tensors("avg_pool2d", input=input)
    short = plain()
    if not short and scripting():
        return _torch_avg_pool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    kernel = pair("avg_pool2d", "kernel_size", kernel_size)
    if stride is None or (isinstance(stride, (tuple, list)) and len(stride) == 0):
        stride = kernel
    if type(ceil_mode) is not bool or type(count_include_pad) is not bool:
        raise TypeError(
            f"avg_pool2d: expected ceil_mode and count_include_pad to be bools, got {ceil_mode!r}, "
            f"{count_include_pad!r}"
        )
    backend, _, strict = settings._state
    params = (
        kernel, pair("avg_pool2d", "stride", stride), pair("avg_pool2d", "padding", padding), ceil_mode,
        count_include_pad,
        None if divisor_override is None else integer("avg_pool2d", "divisor_override", divisor_override), backend, strict,
    )  # fmt: skip
    dims = input.dim()
    if dims == 4 and short:
        run = ops.avg_pool2d.find((input,), params)
        if run is not None:
            return ops.avg_pool2d.apply(run, (input,), params)
    if dims != 4 and dims != 3:
        raise ShapeError(
            f"avg_pool2d: expected a 3-D (unbatched) or 4-D (batched) input, got shape {tuple(input.shape)}"
        )
    reason = not_ours(input)
    if reason:
        return torch_serves("avg_pool2d", reason, _torch_avg_pool2d, input, *params[:-2])
    if dims == 3:
        return ops.avg_pool2d(input.unsqueeze(0), *params).squeeze(0)
    return ops.avg_pool2d(input, *params)
