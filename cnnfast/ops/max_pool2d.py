"""The contract of max_pool2d: schema, validation, output shape and strides, derivatives.

    y[n,c,p,q] = max over r, s of x[n, c, p*stride_h - pad_h + r*dilation_h, q*stride_w - pad_w + s*dilation_w]

Taps outside the image don't take part; a window without any gives -inf. The first of equal elements is the maximum; a
window with NaNs gives NaN, its last NaN being the maximum (as in torch). Operators: :mod:`cnnfast.ops._maximum`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cnnfast import dispatch
from cnnfast.dispatch import DTYPES
from cnnfast.errors import ShapeError
from cnnfast.ops import _maximum
from cnnfast.ops._operator import capability

_GEOMETRY = "int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode"


def output_size(size: Any, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> Any:
    """floor or ceil of (size + 2*padding - dilation*(kernel-1) - 1) / stride, + 1; the last window starts inside."""
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    out = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    return out - 1 if ceil_mode and (out - 1) * stride >= size + padding else out


def output_shape(x: Any, params: Sequence[Any]) -> Any:
    """(N, C, P, Q) for an input of shape (N, C, H, W)."""
    kernel, stride, padding, dilation, ceil_mode = params[:5]
    return (
        x[0],
        x[1],
        output_size(x[2], kernel[0], stride[0], padding[0], dilation[0], ceil_mode),
        output_size(x[3], kernel[1], stride[1], padding[1], dilation[1], ceil_mode),
    )


def validate(x: Any, params: Sequence[Any]) -> None:
    """Raises what torch rejects."""
    kernel, stride, padding, dilation, ceil_mode = params[:5]

    def fail(expected: str) -> None:
        raise ShapeError(
            f"max_pool2d: {expected}; got input {tuple(x.shape)} {x.dtype}, kernel_size {tuple(kernel)}, stride "
            f"{tuple(stride)}, padding {tuple(padding)}, dilation {tuple(dilation)}, ceil_mode {ceil_mode}"
        )

    if x.dim() != 4 or 0 in x.shape[1:]:
        fail("expected a 4-D input (N, C, H, W), or 3-D without batch, that is empty at most in its batch")
    if min(kernel) <= 0:
        fail("expected a kernel size greater than zero")
    if min(stride) <= 0:
        fail("expected a stride greater than zero")
    if min(dilation) <= 0:
        fail("expected a dilation greater than zero")
    for axis in (0, 1):
        if not 0 <= padding[axis] <= kernel[axis] // 2:
            fail(f"expected 0 <= padding <= kernel_size // 2 = {kernel[axis] // 2}, not {padding[axis]}")
    shape = output_shape(x.shape, params)
    if shape[2] <= 0 or shape[3] <= 0:
        fail(f"the output would be empty: {shape[2]} x {shape[3]}")


def problem(
    direction: str, x: Any, dtype: torch.dtype, device: torch.device, params: Sequence[Any],
    layouts: tuple[tuple[str, str], ...] = (),
) -> dispatch.Problem:  # fmt: skip
    """The problem of a call, from the input's shape (N, C, H, W)."""
    kernel, stride, padding, dilation, _ = params[:5]
    y = output_shape(x, params)
    sizes = (
        ("N", x[0]), ("C", x[1]), ("H", x[2]), ("W", x[3]), ("R", kernel[0]), ("S", kernel[1]), ("P", y[2]), ("Q", y[3]),
        ("stride_h", stride[0]), ("stride_w", stride[1]), ("pad_h", padding[0]), ("pad_w", padding[1]),
        ("dilation_h", dilation[0]), ("dilation_w", dilation[1]),
    )  # fmt: skip
    return dispatch.Problem(
        op="max_pool2d", direction=direction, dtype=DTYPES[dtype], device=device.type, precision="ieee",
        sizes=tuple((k, int(v)) for k, v in sizes), layouts=layouts, capability=capability(device),
        bytes=_maximum.moved(direction, x, y, dtype),
    )  # fmt: skip


max_pool2d, max_pool2d_indices, max_pool2d_dgrad, max_pool2d_jvp, max_pool2d_recorded = _maximum.operators(
    "max_pool2d", _GEOMETRY, validate, output_shape, problem
)


def max_pool2d_records(x: Any, params: Sequence[Any], backend: str) -> bool:
    """Whether a call of x goes to ``max_pool2d_recorded``."""
    return _maximum.records("max_pool2d", x, backend, lambda: params[0][0] * params[0][1])
