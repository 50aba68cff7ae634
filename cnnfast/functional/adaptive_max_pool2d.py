"""adaptive_max_pool2d: torch.nn.functional.adaptive_max_pool2d on cnnfast's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from cnnfast import ops, settings
from cnnfast.errors import ShapeError
from cnnfast.functional._arguments import (
    adaptive_size,
    check_tensors,
    has_torch_function,
    not_ours,
    plain,
    scripting,
    torch_serves,
)

_torch_adaptive_max_pool2d: Any = torch.nn.functional.adaptive_max_pool2d


def adaptive_max_pool2d(
    input: Tensor, output_size: int | Sequence[int | None] | None, return_indices: bool = False
) -> Any:
    """A 2-D max pooling to a given size, as :func:`torch.nn.functional.adaptive_max_pool2d`.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, bfloat16 or float16, any strides. channels_last is fastest.
        output_size: (P, Q) or an int for both; None in a pair keeps the input's size.
        return_indices: Also return the offsets h*W + w of the maxima, int64.

    Returns:
        (N, C, P, Q) or (C, P, Q): the maxima over rows floor(p*H / P) .. ceil((p+1)*H / P) - 1, and columns alike; or
        that and the indices. The first of equal elements is the maximum; a window with a NaN gives NaN (its last one is
        the maximum).

    Raises:
        ShapeError: (a ValueError and RuntimeError) shapes or values that torch rejects.
        NotImplementedError: nothing serves under ``strict()`` or a forced backend; lists every backend's reason.
    """
    if has_torch_function(input):
        return handle_torch_function(
            adaptive_max_pool2d, (input,), input, output_size, return_indices=return_indices
        )  # fmt: skip
    if type(input) is not Tensor:
        check_tensors("adaptive_max_pool2d", input=input)
    short = plain()
    if not short and scripting():
        return _torch_adaptive_max_pool2d(input, output_size, return_indices)
    backend, _, strict = settings._state
    params, dims = (adaptive_size("adaptive_max_pool2d", input, output_size), backend, strict), input.dim()
    if dims == 4 and short and not return_indices:
        recorded = ops.adaptive_max_pool2d_records(input, params, backend)
        operator = ops.adaptive_max_pool2d_recorded if recorded else ops.adaptive_max_pool2d
        run = operator.find((input,), params)
        if run is not None:
            out = operator.apply(run, (input,), params)
            return out[0] if recorded else out
    if dims != 4 and dims != 3:
        raise ShapeError(
            f"adaptive_max_pool2d: expected a 3-D (unbatched) or 4-D (batched) input, got shape {tuple(input.shape)}"
        )
    reason = not_ours(input)
    if reason:
        return torch_serves(
            "adaptive_max_pool2d", reason, _torch_adaptive_max_pool2d, input, output_size, return_indices
        )
    x = input.unsqueeze(0) if dims == 3 else input
    if return_indices:
        y, indices = ops.adaptive_max_pool2d_indices(x, *params)
        return (y.squeeze(0), indices.squeeze(0)) if dims == 3 else (y, indices)
    if ops.adaptive_max_pool2d_records(x, params, backend):
        y, _ = ops.adaptive_max_pool2d_recorded(x, *params)
    else:
        y = ops.adaptive_max_pool2d(x, *params)
    return y.squeeze(0) if dims == 3 else y
