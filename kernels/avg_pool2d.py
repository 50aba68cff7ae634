"""Average pooling: every kernel size, stride, padding and divisor.

    fprop  y[n, c, p, q] = sum_{r,s} x[n, c, h, w] / divisor     h = p*stride_h - pad_h + r, w alike, inside the map
    dgrad  x[n, c, h, w] = sum of y[n, c, p, q] / divisor        over the windows that cover (h, w)

The divisor is the user's, or counts the window's taps inside the map, or also those in the padding, but never those
beyond it, which windows of ceil_mode have. Mapping, layout and accumulator: _windows.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from ._windows import Axis, fixed_axis, gather


class AvgPool2dProblem(Protocol):
    """The fields of csrc/common/params.h. Strides count elements."""

    N: int
    C: int
    H: int
    W: int
    R: int
    S: int
    P: int
    Q: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    count_include_pad: int
    divisor_override: int
    x_n: int
    x_h: int
    x_w: int
    y_n: int
    y_h: int
    y_w: int


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


def _axes(p: AvgPool2dProblem) -> tuple[Axis, Axis]:
    return fixed_axis(p.H, p.P, p.R, p.stride_h, p.pad_h), fixed_axis(p.W, p.Q, p.S, p.stride_w, p.pad_w)


def fprop(p: AvgPool2dProblem, x: torch.Tensor, y: torch.Tensor) -> None:
    """Writes y, the averages."""
    gather(
        *_axes(p), p.N, p.C, x, (p.x_n, p.x_h, p.x_w), y, (p.y_n, p.y_h, p.y_w),
        gradient=False, padding=bool(p.count_include_pad), override=p.divisor_override,
    )  # fmt: skip


def dgrad(p: AvgPool2dProblem, x: torch.Tensor, y: torch.Tensor) -> None:
    """Writes x, the input's gradient, from y, the output's."""
    gather(
        *_axes(p), p.N, p.C, y, (p.y_n, p.y_h, p.y_w), x, (p.x_n, p.x_h, p.x_w),
        gradient=True, padding=bool(p.count_include_pad), override=p.divisor_override,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Tables

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS: dict[str, Callable[..., None]] = {"fprop": fprop, "dgrad": dgrad}
