"""Adaptive max pooling: fprop, indices, dgrad and jvp, any size to any size.

    fprop    y[n, c, p, q] = max x[n, c, h, w]        over floor(p*H / P) <= h < ceil((p+1)*H / P), and w alike
    indices  also i[n, c, p, q] = h*W + w of the maximum
    jvp      y[n, c, p, q] = t[n, c, h, w]            at the maximum
    dgrad    t[n, c, h, w] = sum of y[n, c, p, q]     over the windows whose maximum is (h, w)

Mapping. fprop, indices and jvp are the search of _maximum.py. dgrad searches first, and leaves each window's h*W + w in
the workspace; then every pixel gathers from the windows that cover it and have its number (_windows.py): each window is
searched once, however many pixels it has, and nothing is added with atomics.

Layout: NHWC with free pixel strides. Accumulator of dgrad: fp32, rounded once at the store, in a fixed order.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Protocol

import torch

from ._maximum import Windows, search
from ._windows import Axis, gather


class AdaptiveMaxPool2dProblem(Protocol):
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
    i_n: int
    i_h: int
    i_w: int
    t_n: int
    t_h: int
    t_w: int


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


def _search(
    p: AdaptiveMaxPool2dProblem, x: torch.Tensor, y: torch.Tensor | None, i: torch.Tensor | None, t: torch.Tensor | None
) -> None:
    if p.N * p.C * p.P * p.Q == 0:
        return
    h = Windows(p.H, p.P, Axis(p.H, p.P).most_elements)
    w = Windows(p.W, p.Q, Axis(p.W, p.Q).most_elements)
    search(p, h, w, x, y, i, t, adaptive=True)


def fprop(
    p: AdaptiveMaxPool2dProblem, x: torch.Tensor, y: torch.Tensor, i: torch.Tensor | None = None,
    t: torch.Tensor | None = None, k: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Writes y, the maxima."""
    _search(p, x, y, None, None)


def indices(
    p: AdaptiveMaxPool2dProblem, x: torch.Tensor, y: torch.Tensor, i: torch.Tensor, t: torch.Tensor | None = None,
    k: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Writes y, the maxima, and i, where they lie."""
    _search(p, x, y, i, None)


def jvp(
    p: AdaptiveMaxPool2dProblem, x: torch.Tensor, y: torch.Tensor, i: torch.Tensor | None, t: torch.Tensor,
    k: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Writes y, the output's tangent, from x and t, the input's."""
    _search(p, x, y, None, t)


def dgrad_workspace(p: AdaptiveMaxPool2dProblem) -> int:
    """Bytes that dgrad needs."""
    return 4 * p.N * p.C * p.P * p.Q


def dgrad(
    p: AdaptiveMaxPool2dProblem, x: torch.Tensor, y: torch.Tensor, i: torch.Tensor | None = None,
    t: torch.Tensor | None = None, k: torch.Tensor | None = None, *, workspace: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Writes t, the input's gradient, from x and y, the output's."""
    assert t is not None
    if p.N * p.C * p.H * p.W == 0:
        return
    assert workspace is not None, f"a workspace of {dgrad_workspace(p)} bytes is needed"
    labels = workspace.view(torch.int32)
    dense = {"i_n": p.P * p.Q * p.C, "i_h": p.Q * p.C, "i_w": p.C}
    _search(types.SimpleNamespace(**{**vars(p), **dense}), x, None, labels, None)
    h, w = Axis(p.H, p.P), Axis(p.W, p.Q)
    gather(
        h, w, p.N, p.C, y, (p.y_n, p.y_h, p.y_w), t, (p.t_n, p.t_h, p.t_w), gradient=True, labels=labels
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Tables

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS: dict[str, Callable[..., None]] = {"fprop": fprop, "indices": indices, "dgrad": dgrad, "jvp": jvp}
WORKSPACE: dict[str, Callable[[AdaptiveMaxPool2dProblem], int]] = {"dgrad": dgrad_workspace}
