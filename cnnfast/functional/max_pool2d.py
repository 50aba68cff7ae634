"""max_pool2d: torch.nn.functional.max_pool2d on cnnfast's kernels."""

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
    not_ours,
    pair,
    plain,
    scripting,
    torch_serves,
)

_torch_max_pool2d: Any = torch.nn.functional.max_pool2d  # its overloads take no bool that isn't a literal


def max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """A 2-D max pooling, as :func:`torch.nn.functional.max_pool2d`.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, bfloat16 or float16, any strides. channels_last is fastest.
        kernel_size, stride, padding, dilation: An int or a pair (height, width); stride defaults to kernel_size, padding
            is at most half of it.
        ceil_mode: Round the output size up; the last window still starts inside the image or its left padding.
        return_indices: Also return the offsets h*W + w of the maxima, int64.

    Returns:
        (N, C, P, Q) or (C, P, Q) with P = floor or ceil of (H + 2*padding - dilation*(kernel-1) - 1) / stride, + 1; or
        that and the indices. The first of equal elements is the maximum; a window with a NaN gives NaN (its last one
        is the maximum); a window that dilation leaves without any element gives -inf.

    Raises:
        ShapeError: (a ValueError and RuntimeError) shapes or values that torch rejects.
        NotImplementedError: nothing serves under ``strict()`` or a forced backend; lists every backend's reason.
    """
    if has_torch_function(input):
        return handle_torch_function(
            max_pool2d, (input,), input, kernel_size, stride=stride, padding=padding, dilation=dilation,
            ceil_mode=ceil_mode, return_indices=return_indices,
        )  # fmt: skip
    if type(input) is not Tensor:
        check_tensors("max_pool2d", input=input)
    short = plain()
    if not short and scripting():
        return _torch_max_pool2d(
            input, kernel_size, stride, padding, dilation, ceil_mode=ceil_mode, return_indices=return_indices
        )
    kernel = pair("max_pool2d", "kernel_size", kernel_size)
    if stride is None or (isinstance(stride, (tuple, list)) and len(stride) == 0):
        stride = kernel
    if type(ceil_mode) is not bool:
        raise TypeError(f"max_pool2d: expected ceil_mode to be a bool, got {ceil_mode!r}")
    dims = input.dim()
    if dims != 4 and dims != 3:
        raise ShapeError(
            f"max_pool2d: expected a 3-D (unbatched) or 4-D (batched) input, got shape {tuple(input.shape)}"
        )
    params = (
        kernel, pair("max_pool2d", "stride", stride), pair("max_pool2d", "padding", padding),
        pair("max_pool2d", "dilation", dilation), ceil_mode,
    )  # fmt: skip
    backend, _, strict = settings._state
    recorded = ops.max_pool2d_records(input, params, backend)
    if dims == 4 and short and not return_indices:
        operator = ops.max_pool2d_recorded if recorded else ops.max_pool2d
        run = operator.find((input,), (*params, backend, strict))
        if run is not None:
            out = operator.apply(run, (input,), (*params, backend, strict))
            return out[0] if recorded else out
    reason = not_ours(input)
    if reason:
        return torch_serves(
            "max_pool2d", reason, _torch_max_pool2d, input, *params[:4], ceil_mode=ceil_mode,
            return_indices=return_indices,
        )  # fmt: skip
    x = input.unsqueeze(0) if dims == 3 else input
    if return_indices:
        y, indices = ops.max_pool2d_indices(x, *params, backend, strict)
        return (y.squeeze(0), indices.squeeze(0)) if dims == 3 else (y, indices)
    if recorded:
        y, _ = ops.max_pool2d_recorded(x, *params, backend, strict)
    else:
        y = ops.max_pool2d(x, *params, backend, strict)
    return y.squeeze(0) if dims == 3 else y
