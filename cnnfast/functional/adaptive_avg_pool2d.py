"""adaptive_avg_pool2d: torch.nn.functional.adaptive_avg_pool2d on cnnfast's kernels."""

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

_torch_adaptive_avg_pool2d: Any = torch.nn.functional.adaptive_avg_pool2d


def adaptive_avg_pool2d(input: Tensor, output_size: int | Sequence[int | None] | None) -> Any:
    """A 2-D average pooling to a given size, as :func:`torch.nn.functional.adaptive_avg_pool2d`.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, bfloat16 or float16, any strides. channels_last is fastest.
        output_size: (P, Q) or an int for both; None in a pair keeps the input's size.

    Returns:
        (N, C, P, Q) or (C, P, Q): the means over rows floor(p*H / P) .. ceil((p+1)*H / P) - 1, and columns alike.
        Accumulated in float32 (float64 for float64). NaN and Inf propagate as the sum has them.

    Raises:
        ShapeError: (a ValueError and RuntimeError) shapes or values that torch rejects.
        NotImplementedError: nothing serves under ``strict()`` or a forced backend; lists every backend's reason.
    """
    if has_torch_function(input):
        return handle_torch_function(adaptive_avg_pool2d, (input,), input, output_size)
    if type(input) is not Tensor:
        check_tensors("adaptive_avg_pool2d", input=input)
    short = plain()
    if not short and scripting():
        return _torch_adaptive_avg_pool2d(input, output_size)
    size = adaptive_size("adaptive_avg_pool2d", input, output_size)
    backend, _, strict = settings._state
    params, dims = (size, backend, strict), input.dim()
    if dims == 4 and short:
        run = ops.adaptive_avg_pool2d.find((input,), params)
        if run is not None:
            return ops.adaptive_avg_pool2d.apply(run, (input,), params)
    reason = not_ours(input)
    if not reason and size == (1, 1) and (dims not in (3, 4) or 0 in input.shape[-3:]):
        reason = f"the mean of an input of shape {tuple(input.shape)} (ours: 3-D and 4-D, empty at most in the batch)"
    elif not reason and dims in (3, 4) and input.shape[-3] == 0:
        reason = "no channels"
    if reason:
        return torch_serves("adaptive_avg_pool2d", reason, _torch_adaptive_avg_pool2d, input, output_size)
    if dims != 4 and dims != 3:
        raise ShapeError(
            f"adaptive_avg_pool2d: expected a 3-D (unbatched) or 4-D (batched) input, got shape {tuple(input.shape)}"
        )
    if dims == 3:
        return ops.adaptive_avg_pool2d(input.unsqueeze(0), *params).squeeze(0)
    return ops.adaptive_avg_pool2d(input, *params)
