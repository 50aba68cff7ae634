"""Sum and activation in one pass, and its gradient, in any layout.

    fprop  y = act(x + r)
    dgrad  t = g * act'           which the result y tells

Mapping. A program maps BLOCK_M rows × BLOCK_N elements of them. Operands that lie alike without gaps are one row of
elements, whatever the order of their dimensions; else a row runs over the dimension that is contiguous in the result,
channels or columns, and the three others number the rows.

Layout: any. Sums are in fp32, rounded once at the store.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import triton
import triton.language as tl

from ._activation import activate, activate_gradient
from ._common import INTERPRETED, block_channels, by_hand, ceil_div, launch, narrow, needs_int64, on_device, widen

# ---------------------------------------------------------------------------------------------------------------------
# Constants

NUM_WARPS = 4
# A program: 16 bytes of 16-bit elements a thread; the interpreter pays by the program.
ELEMENTS = 8192 if INTERPRETED else 1024
MIXED_BLOCK = 32  # BLOCK_N where operands run over different dimensions: a tile whose sides are alike


class AddActProblem(Protocol):
    """The fields of csrc/common/params.h. Strides count elements."""

    N: int
    C: int
    H: int
    W: int
    act: int


# ---------------------------------------------------------------------------------------------------------------------
# Device code


@triton.jit
def _offset(row, column, size_1, size_2, stride_0, stride_1, stride_2, stride_3, ONE_ROW: tl.constexpr):
    if ONE_ROW:
        return column[None, :] * stride_3
    first = row // (size_1 * size_2)
    rest = row - first * (size_1 * size_2)
    second = rest // size_2
    base = first * stride_0 + second * stride_1 + (rest - second * size_2) * stride_2
    return base[:, None] + (column * stride_3)[None, :]


@triton.jit(do_not_specialize=["rows", "size_1", "size_2"])
def _map(
    a, b, out, rows, columns, size_1, size_2,
    a_0, a_1, a_2, a_3, b_0, b_1, b_2, b_3, out_0, out_1, out_2, out_3,
    GRADIENT: tl.constexpr, ACT: tl.constexpr, ONE_ROW: tl.constexpr, INT64: tl.constexpr, BY_HAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks_n = tl.cdiv(columns, BLOCK_N)
    pid = tl.program_id(0)
    tile_m = pid // blocks_n
    tile_n = pid - tile_m * blocks_n
    if INT64:
        tile_m = tl.cast(tile_m, tl.int64)
        tile_n = tl.cast(tile_n, tl.int64)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    a_at = _offset(row, column, size_1, size_2, a_0, a_1, a_2, a_3, ONE_ROW)
    b_at = _offset(row, column, size_1, size_2, b_0, b_1, b_2, b_3, ONE_ROW)
    left = widen(tl.load(a + a_at, mask=inside, other=0.0), BY_HAND).to(tl.float32)
    right = widen(tl.load(b + b_at, mask=inside, other=0.0), BY_HAND).to(tl.float32)
    if GRADIENT:
        result = activate_gradient(left, right, ACT)
    else:
        result = activate(left + right, ACT)
    out_at = _offset(row, column, size_1, size_2, out_0, out_1, out_2, out_3, ONE_ROW)
    tl.store(out + out_at, narrow(result, out.dtype.element_ty, BY_HAND), mask=inside)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


def _without_gaps(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor's elements fill its memory, in any order of dimensions."""
    elements = 1
    for stride, size in sorted((stride, size) for size, stride in zip(sizes, strides, strict=True) if size != 1):
        if stride != elements:
            return False
        elements *= size
    return True


def _launch(p: AddActProblem, names: str, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, gradient: bool) -> None:
    sizes = [p.N, p.C, p.H, p.W]
    # A dimension of one element has no stride that matters.
    strides = [
        [getattr(p, f"{name}_{axis}") if size != 1 else 0 for axis, size in zip("nchw", sizes, strict=True)]
        for name in names
    ]
    total = math.prod(sizes)
    if total == 0:
        return
    one_row = strides[0] == strides[1] == strides[2] and _without_gaps(sizes, strides[0])
    if one_row:
        sizes, strides, block_n = [1, 1, 1, total], [[0, 0, 0, 1]] * 3, ELEMENTS
    else:
        inner = 3 if strides[2][3] == 1 else 1
        order = [axis for axis in range(4) if axis != inner] + [inner]
        sizes = [sizes[axis] for axis in order]
        strides = [[s[axis] for axis in order] for s in strides]
        alike = all(s[3] in (0, 1) for s in strides)
        block_n = block_channels(sizes[3]) if alike else MIXED_BLOCK
    rows, block_m = total // sizes[3], ELEMENTS // block_n
    with on_device(out):
        launch(
            _map, ceil_div(rows, block_m) * ceil_div(sizes[3], block_n),
            a, b, out, rows, sizes[3], sizes[1], sizes[2], *strides[0], *strides[1], *strides[2],
            GRADIENT=gradient, ACT=p.act, ONE_ROW=one_row,
            INT64=any(needs_int64(*zip(sizes, s, strict=True)) for s in strides),
            BY_HAND=by_hand(out.dtype), BLOCK_M=block_m, BLOCK_N=block_n, num_warps=NUM_WARPS,
        )  # fmt: skip


def fprop(
    p: AddActProblem, x: torch.Tensor, r: torch.Tensor, y: torch.Tensor,
    g: torch.Tensor | None = None, t: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Writes y, the activated sum of x and r."""
    _launch(p, "xry", x, r, y, gradient=False)


def dgrad(
    p: AddActProblem, x: torch.Tensor | None, r: torch.Tensor | None, y: torch.Tensor, g: torch.Tensor, t: torch.Tensor
) -> None:
    """Writes t, the gradient of both terms, from y, the result, and g, its gradient."""
    _launch(p, "gyt", g, y, t, gradient=True)


# ---------------------------------------------------------------------------------------------------------------------
# Tables

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS: dict[str, Callable[..., None]] = {"fprop": fprop, "dgrad": dgrad}
LAYOUTS: dict[str, dict[str, str]] = dict.fromkeys(KERNELS, dict.fromkeys("xrygt", "any"))
