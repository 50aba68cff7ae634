"""The contract of adaptive_avg_pool2d: schema, validation, output shape and strides, derivatives.

    y[n,c,p,q] = the mean of x[n,c,h,w] over floor(p*H / P) <= h < ceil((p+1)*H / P), and w alike

Linear: fprop and dgrad are each other's derivative, see :mod:`cnnfast.ops._average`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cnnfast import dispatch
from cnnfast.dispatch import DTYPES
from cnnfast.errors import ShapeError
from cnnfast.ops import _average
from cnnfast.ops._operator import capability


def output_shape(x: Any, geometry: Sequence[Any]) -> Any:
    """(N, C, P, Q) for an input of shape (N, C, H, W)."""
    (size,) = geometry
    return (x[0], x[1], size[0], size[1])


def validate(x: Any, dtype: torch.dtype, geometry: Sequence[Any]) -> None:
    """Raises what torch rejects of an input of this shape."""
    check("adaptive_avg_pool2d", x, dtype, geometry[0])


def check(op: str, x: Any, dtype: torch.dtype, size: Sequence[Any]) -> None:
    """Raises what torch's adaptive poolings reject: an input of shape ``x`` to the output size ``size``."""

    def fail(expected: str) -> None:
        raise ShapeError(f"{op}: {expected}; got input {tuple(x)} {dtype}, output_size {tuple(size)}")

    if len(x) != 4 or 0 in x[1:]:
        fail("expected a 4-D input (N, C, H, W), or 3-D without batch, that is empty at most in its batch")
    if len(size) != 2 or any(n < 0 for n in size):  # min() would compare symbolic sizes with each other
        fail("expected an output size of two integers, each at least zero")


def sizes_of(x: Any, size: Sequence[Any]) -> tuple[tuple[str, int], ...]:
    """The sizes of an adaptive pooling's problem."""
    named = zip("NCHWPQ", (*x, *size), strict=True)
    return tuple((k, int(v)) for k, v in named)


def problem(
    direction: str, x: Any, dtype: torch.dtype, device: torch.device, geometry: Sequence[Any],
    layouts: tuple[tuple[str, str], ...] = (),
) -> dispatch.Problem:  # fmt: skip
    """The problem of a call, from the input's shape (N, C, H, W)."""
    return dispatch.Problem(
        op="adaptive_avg_pool2d", direction=direction, dtype=DTYPES[dtype], device=device.type, precision="ieee",
        sizes=sizes_of(x, geometry[0]), layouts=layouts, capability=capability(device),
        bytes=_average.moved(x, output_shape(x, geometry), dtype),
    )  # fmt: skip


adaptive_avg_pool2d, adaptive_avg_pool2d_dgrad = _average.operators(
    "adaptive_avg_pool2d", "SymInt[2] output_size", validate, output_shape, problem
)
