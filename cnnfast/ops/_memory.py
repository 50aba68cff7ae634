"""Which memory format a result has: torch's rule, in one place."""

from __future__ import annotations

from typing import Any

import torch
from torch._prims_common import suggest_memory_format

from cnnfast.dispatch import channels_last_strides, contiguous_strides


def prefers_channels_last(*tensors: Any) -> bool:
    """Whether torch gives a result of these operands in channels_last: where any operand's strides suggest it.

    With an empty operand it never does. (A symbolic size isn't asked: a size of 0 is always specialised.)
    """
    given = [t for t in tensors if t is not None]
    if any(type(n) is int and n == 0 for t in given for n in t.shape):
        return False
    return any(suggest_memory_format(t) == torch.channels_last for t in given)


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
