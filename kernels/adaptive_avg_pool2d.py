"""Adaptive average pooling: any size to any size.

    fprop  y[n, c, p, q] = the mean of x[n, c, h, w] over floor(p*H / P) <= h < ceil((p+1)*H / P), and w alike
    dgrad  x[n, c, h, w] = sum of y[n, c, p, q] / (the window's size) over the windows that cover (h, w)

Mapping, layout and accumulator: _windows.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from ._windows import Axis, gather


class AdaptiveAvgPool2dProblem(Protocol):
    """The fields of csrc/common/params.h. Strides count elements."""

    N: int
    C: int
    H: int
    W: int
    P: int
    Q: int
    x_n: int
    x_h: int
    x_w: int
    y_n: int
    y_h: int
    y_w: int


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


def fprop(p: AdaptiveAvgPool2dProblem, x: torch.Tensor, y: torch.Tensor) -> None:
    """Writes y, the averages."""
    h, w = Axis(p.H, p.P), Axis(p.W, p.Q)
    gather(h, w, p.N, p.C, x, (p.x_n, p.x_h, p.x_w), y, (p.y_n, p.y_h, p.y_w), gradient=False)


def dgrad(p: AdaptiveAvgPool2dProblem, x: torch.Tensor, y: torch.Tensor) -> None:
    """Writes x, the input's gradient, from y, the output's."""
    h, w = Axis(p.H, p.P), Axis(p.W, p.Q)
    gather(h, w, p.N, p.C, y, (p.y_n, p.y_h, p.y_w), x, (p.x_n, p.x_h, p.x_w), gradient=True)


# ---------------------------------------------------------------------------------------------------------------------
# Tables

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS: dict[str, Callable[..., None]] = {"fprop": fprop, "dgrad": dgrad}
