"""The contract of avg_pool2d: schema, validation, output shape and strides, derivatives.

    y[n,c,p,q] = sum over r, s of x[n, c, p*stride_h - pad_h + r, q*stride_w - pad_w + s] / divisor

Taps outside the image add nothing. The divisor is ``divisor_override``, or else counts the window's taps in the image
and, with ``count_include_pad``, in its padding; the taps beyond it that ``ceil_mode`` can give the last window never
count. Linear: fprop and dgrad are each other's derivative, see :mod:`cnnfast.ops._average`.
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
from cnnfast.ops.max_pool2d import output_size

_GEOMETRY = (
    "int[2] kernel, int[2] stride, int[2] padding, bool ceil_mode, bool count_include_pad, int? divisor_override"
)


def output_shape(x: Any, geometry: Sequence[Any]) -> Any:
    """(N, C, P, Q) for an input of shape (N, C, H, W)."""
    kernel, stride, padding, ceil_mode = geometry[:4]
    return (
        x[0],
        x[1],
        output_size(x[2], kernel[0], stride[0], padding[0], 1, ceil_mode),
        output_size(x[3], kernel[1], stride[1], padding[1], 1, ceil_mode),
    )


def validate(x: Any, dtype: torch.dtype, geometry: Sequence[Any]) -> None:
    """Raises what torch rejects of an input of this shape."""
    kernel, stride, padding, ceil_mode, count_include_pad, divisor_override = geometry

    def fail(expected: str) -> None:
        raise ShapeError(
            f"avg_pool2d: {expected}; got input {tuple(x)} {dtype}, kernel_size {tuple(kernel)}, stride "
            f"{tuple(stride)}, padding {tuple(padding)}, ceil_mode {ceil_mode}, count_include_pad "
            f"{count_include_pad}, divisor_override {divisor_override}"
        )

    if len(x) != 4 or 0 in x[1:]:
        fail("expected a 4-D input (N, C, H, W), or 3-D without batch, that is empty at most in its batch")
    if min(kernel) <= 0:
        fail("expected a kernel size greater than zero")
    if min(stride) <= 0:
        fail("expected a stride greater than zero")
    for axis in (0, 1):
        if not 0 <= padding[axis] <= kernel[axis] // 2:
            fail(f"expected 0 <= padding <= kernel_size // 2 = {kernel[axis] // 2}, not {padding[axis]}")
    if divisor_override == 0:
        fail("expected a divisor_override that isn't zero")
    shape = output_shape(x, geometry)
    if shape[2] <= 0 or shape[3] <= 0:
        fail(f"the output would be empty: {shape[2]} x {shape[3]}")


def problem(
    direction: str, x: Any, dtype: torch.dtype, device: torch.device, geometry: Sequence[Any],
    layouts: tuple[tuple[str, str], ...] = (),
) -> dispatch.Problem:  # fmt: skip
    """The problem of a call, from the input's shape (N, C, H, W)."""
    kernel, stride, padding, _, count_include_pad, divisor_override = geometry
    y = output_shape(x, geometry)
    sizes = (
        ("N", x[0]), ("C", x[1]), ("H", x[2]), ("W", x[3]), ("R", kernel[0]), ("S", kernel[1]), ("P", y[2]), ("Q", y[3]),
        ("stride_h", stride[0]), ("stride_w", stride[1]), ("pad_h", padding[0]), ("pad_w", padding[1]),
        ("count_include_pad", count_include_pad), ("divisor_override", divisor_override or 0),
    )  # fmt: skip
    return dispatch.Problem(
        op="avg_pool2d", direction=direction, dtype=DTYPES[dtype], device=device.type, precision="ieee",
        sizes=tuple((k, int(v)) for k, v in sizes), layouts=layouts, capability=capability(device),
        bytes=_average.moved(x, y, dtype),
    )  # fmt: skip


avg_pool2d, avg_pool2d_dgrad = _average.operators("avg_pool2d", _GEOMETRY, validate, output_shape, problem)
