"""Which memory format a result has: torch's rule, in one place."""

from __future__ import annotations

from typing import Any

import torch

from cnnfast.dispatch import channels_last_strides, contiguous_strides


def prefers_channels_last(*tensors: Any) -> bool:
    """Whether torch gives a result of these operands in channels_last: where any operand's strides suggest it.

    With an empty operand it never does.
    """
    given = [t for t in tensors if t is not None]
    if any(type(n) is int and n == 0 for t in given for n in t.shape):
        return False
    return any(_suggests_channels_last(t.shape, t.stride()) for t in given)


def _suggests_channels_last(sizes: Any, strides: Any) -> bool:
    """torch's ``suggest_memory_format`` for dense tensors: strides ordered as N, H, W, C, ambiguous ones excluded.

    (Its Python twin in ``torch._prims_common`` imports sympy: 30 MB and 0.3 s at the first call.)
    """
    if len(sizes) != 4 or strides[1] == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if sizes[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * (sizes[d] if sizes[d] > 1 else 1)
    return True


def strides_of(shape: Any, channels_last: bool) -> tuple[int, ...]:
    """Dense strides in either format."""
    return channels_last_strides(shape) if channels_last and len(shape) == 4 else contiguous_strides(shape)


def empty(like: Any, shape: Any, channels_last: bool, dtype: torch.dtype | None = None) -> Any:
    """An empty tensor on the device of ``like``: what a meta function returns."""
    return torch.empty(
        shape,
        dtype=dtype or like.dtype,
        device=like.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
