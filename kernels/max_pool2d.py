"""Max pooling: fprop, indices, dgrad and jvp for every kernel size, stride, padding and dilation.

    fprop    y[n, c, p, q] = max_{r,s} x[n, c, h, w]      h = p*stride_h - pad_h + r*dilation_h, w likewise
    indices  also i[n, c, p, q] = h*W + w of the maximum
    jvp      y[n, c, p, q] = t[n, c, h, w]                at the maximum
    dgrad    t[n, c, h, w] = sum of y[n, c, p, q]         over the windows whose maximum is (h, w)

A window without elements passes its gradient to no pixel; everything else about the search: _maximum.py.

Mapping. fprop, indices and jvp are the search. dgrad has no indices to read and adds with no atomics: a program owns
BLOCK_M cells × BLOCK_C channels of t; a cell is ``tile_h*stride_h`` × ``tile_w*stride_w`` pixels, numbered by ``phase``.
The program visits the windows that touch its cells, p and q ascending, finds each one's maximum again in x, and adds
the gradient to the phase that holds it. A cell touches ``tile_h + (R-1)*dilation_h // stride_h`` windows in h, so larger
cells search less for a pixel, and add more.

Layout: NHWC with free pixel strides. Accumulator of dgrad: fp32, rounded once at the store, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import triton
import triton.language as tl

from ._common import VECTORS, block_channels, by_hand, ceil_div, launch, narrow, on_device, widen
from ._maximum import NUM_WARPS, Windows, int64, maximum, search, unrolled

# ---------------------------------------------------------------------------------------------------------------------
# Constants

GRADIENT_ELEMENTS = 512  # dgrad: windows × channels a program
GRADIENTS = 2048  # dgrad: pixels × channels a program
BLOCKS_PHASE = (4, 16)  # one phase alone would be for windows of one pixel, stride 1
TILES = (1, 2, 4, 8)

# dgrad's instructions, counted not measured: of a tap for one element and for one vector, of a phase, of a window.
TAP, TAP_VECTOR, PHASE, WINDOW = 4.5, 6.0, 2.0, 10.0


class MaxPool2dProblem(Protocol):
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
    dilation_h: int
    dilation_w: int
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
# Device code


@triton.jit(do_not_specialize=["batch", "out_h", "out_w", "height", "width", "taps_r", "taps_s", "stride_h", "stride_w",
                               "pad_h", "pad_w", "dilation_h", "dilation_w", "tile_h", "tile_w", "before_h", "before_w",
                               "windows_h", "windows_w", "rows", "cols", "first_a", "first_b", "cells_h", "cells_w"])  # fmt: skip
def _pool_gradient(
    x, grad, out,
    batch, channels, out_h, out_w, height, width, taps_r, taps_s,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    tile_h, tile_w, before_h, before_w, windows_h, windows_w, rows, cols, first_a, first_b, cells_h, cells_w,
    src_n, src_row, src_col, grad_n, grad_row, grad_col, out_n, out_row, out_col,
    TAPS: tl.constexpr, INT64: tl.constexpr, BY_HAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_PHASE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Cell (a, b) holds the pixels with h + pad_h = a * tile_h * stride_h + row, row < rows, and likewise in w. Window p
    # reaches it with the taps of row = (p - a * tile_h) * stride_h + r * dilation_h.
    if INT64:
        src_n = tl.cast(src_n, tl.int64)
        src_row = tl.cast(src_row, tl.int64)
        src_col = tl.cast(src_col, tl.int64)
        grad_n = tl.cast(grad_n, tl.int64)
        grad_row = tl.cast(grad_row, tl.int64)
        grad_col = tl.cast(grad_col, tl.int64)
        out_n = tl.cast(out_n, tl.int64)
        out_row = tl.cast(out_row, tl.int64)
        out_col = tl.cast(out_col, tl.int64)
    blocks_c = tl.cdiv(channels, BLOCK_C)
    blocks_phase = tl.cdiv(rows * cols, BLOCK_PHASE)
    pid = tl.program_id(0)
    channel = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    pid = pid // blocks_c
    phase = pid % blocks_phase * BLOCK_PHASE + tl.arange(0, BLOCK_PHASE)
    cell = pid // blocks_phase * BLOCK_M + tl.arange(0, BLOCK_M)
    in_c = channel < channels
    in_m = cell < batch * cells_h * cells_w
    image = cell // (cells_h * cells_w)
    rest = cell - image * (cells_h * cells_w)
    a = rest // cells_w
    b = rest - a * cells_w + first_b
    a += first_a

    acc = tl.zeros((BLOCK_M, BLOCK_PHASE, BLOCK_C), dtype=tl.float32)
    for window in range(0, windows_h * windows_w):
        at_h = window // windows_w
        at_w = window - at_h * windows_w - before_w
        at_h -= before_h
        p = a * tile_h + at_h
        q = b * tile_w + at_w
        in_w = in_m & (p >= 0) & (p < out_h) & (q >= 0) & (q < out_w)
        start_i = p * stride_h - pad_h
        start_j = q * stride_w - pad_w
        g_offset = image * grad_n + p * grad_row + q * grad_col
        g = tl.load(grad + (g_offset[:, None] + channel[None, :]), mask=in_w[:, None] & in_c[None, :], other=0.0)
        base = image * src_n + start_i * src_row + start_j * src_col
        _, code = maximum(
            x, base, channel, start_i, start_j, in_w, in_c, height, width, taps_r, taps_s, dilation_h, dilation_w,
            src_row, src_col, TAPS, BY_HAND,
        )  # fmt: skip
        row = at_h * stride_h + (code >> 16) * dilation_h
        col = at_w * stride_w + (code & 0xFFFF) * dilation_w
        hit = (code >= 0) & (row >= 0) & (row < rows) & (col >= 0) & (col < cols)
        target = tl.where(hit, row * cols + col, -1)
        g = widen(g, BY_HAND).to(tl.float32)
        acc += tl.where(target[:, None, :] == phase[None, :, None], g[:, None, :], 0.0)

    h = (a * (tile_h * stride_h) - pad_h)[:, None] + (phase // cols)[None, :]
    w = (b * (tile_w * stride_w) - pad_w)[:, None] + (phase % cols)[None, :]
    inside = in_m[:, None] & (phase < rows * cols)[None, :] & (h >= 0) & (h < height) & (w >= 0) & (w < width)
    offset = (image * out_n)[:, None] + h * out_row + w * out_col
    result = narrow(acc, out.dtype.element_ty, BY_HAND)
    tl.store(out + (offset[:, :, None] + channel[None, None, :]), result, mask=inside[:, :, None] & in_c[None, None, :])


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


class Axis(Windows):
    """One axis of a problem, with what cannot matter brought within 32 bits, and its cells."""

    def phases(self, tile: int) -> int:
        """Pixels of a cell; a map smaller than that has but one cell."""
        return min(tile * self.stride, self.size + self.pad)

    def cells(self, tile: int) -> tuple[int, int]:
        """The first cell, and how many."""
        first = self.pad // (tile * self.stride)
        return first, (self.size - 1 + self.pad) // (tile * self.stride) - first + 1

    def windows(self, tile: int) -> tuple[int, int]:
        """Of the windows that can touch a cell: how many begin before it, and how many in all."""
        first, cells = self.cells(tile)
        before = min((self.taps - 1) * self.dilation // self.stride, (first + cells - 1) * tile)
        return before, max(0, before + min(tile, self.out - first * tile))


def axes(p: MaxPool2dProblem) -> tuple[Axis, Axis]:
    """The two axes: a single tap has no dilation, a single window no stride."""

    def axis(size: int, out: int, taps: int, stride: int, pad: int, dilation: int) -> Axis:
        return Axis(size, out, taps, min(stride, size + 2 * pad), pad, dilation if taps > 1 else 1)

    return (
        axis(p.H, p.P, p.R, p.stride_h, p.pad_h, p.dilation_h),
        axis(p.W, p.Q, p.S, p.stride_w, p.pad_w, p.dilation_w),
    )


def block_cells(block_phase: int, block_c: int) -> int:
    """Cells a program: half as many where no vector fits, since each element then has an address in registers."""
    elements = min(GRADIENT_ELEMENTS, GRADIENTS // block_phase)
    return max(1, elements // (1 if block_c >= VECTORS else 2) // block_c)


def block_phase(phases: int) -> int:
    """Phases a program."""
    return next((block for block in BLOCKS_PHASE if block >= phases), BLOCKS_PHASE[-1])


def tile(h: Axis, w: Axis) -> tuple[int, int]:
    """Windows a cell, in h and in w: those that predict the fewest instructions for a pixel."""

    def cost(tile_h: int, tile_w: int) -> float:
        phases = h.phases(tile_h) * w.phases(tile_w)
        block = block_phase(phases)
        windows = h.windows(tile_h)[1] * w.windows(tile_w)[1] * ceil_div(phases, block)
        tap = TAP + TAP_VECTOR * 32 * NUM_WARPS / min(GRADIENT_ELEMENTS, GRADIENTS // block)
        return windows * (h.taps * w.taps * tap + block * PHASE + WINDOW) / phases

    return min(((a, b) for a in TILES for b in TILES), key=lambda tiles: cost(*tiles))


def fprop(
    p: MaxPool2dProblem, x: torch.Tensor, y: torch.Tensor, i: torch.Tensor | None = None, t: torch.Tensor | None = None,
    k: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Writes y, the maxima."""
    search(p, *axes(p), x, y, None, None)


def indices(
    p: MaxPool2dProblem, x: torch.Tensor, y: torch.Tensor, i: torch.Tensor, t: torch.Tensor | None = None,
    k: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Writes y, the maxima, and i, where they lie."""
    search(p, *axes(p), x, y, i, None)


def jvp(
    p: MaxPool2dProblem, x: torch.Tensor, y: torch.Tensor, i: torch.Tensor | None, t: torch.Tensor,
    k: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Writes y, the output's tangent, from x and t, the input's."""
    search(p, *axes(p), x, y, None, t)


def dgrad(
    p: MaxPool2dProblem, x: torch.Tensor, y: torch.Tensor, i: torch.Tensor | None = None, t: torch.Tensor | None = None,
    k: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Writes t, the input's gradient, from x and y, the output's."""
    assert t is not None
    if p.N * p.C * p.H * p.W == 0:
        return
    h, w = axes(p)
    tile_h, tile_w = tile(h, w)
    rows, cols = h.phases(tile_h), w.phases(tile_w)
    (first_a, cells_h), (first_b, cells_w) = h.cells(tile_h), w.cells(tile_w)
    (before_h, windows_h), (before_w, windows_w) = h.windows(tile_h), w.windows(tile_w)
    channels, phases = block_channels(p.C), block_phase(rows * cols)
    cells = block_cells(phases, channels)
    grid = ceil_div(p.N * cells_h * cells_w, cells) * ceil_div(rows * cols, phases) * ceil_div(p.C, channels)
    with on_device(x):
        launch(
            _pool_gradient, grid,
            x, y, t,
            p.N, p.C, h.out, w.out, h.size, w.size, h.taps, w.taps,
            h.stride, w.stride, h.pad, w.pad, h.dilation, w.dilation,
            tile_h, tile_w, before_h, before_w, windows_h, windows_w, rows, cols, first_a, first_b, cells_h, cells_w,
            p.x_n, p.x_h, p.x_w, p.y_n, p.y_h, p.y_w, p.t_n, p.t_h, p.t_w,
            TAPS=unrolled(h, w), INT64=int64(p, h, w, t=True), BY_HAND=by_hand(x.dtype),
            BLOCK_M=cells, BLOCK_PHASE=phases, BLOCK_C=channels, num_warps=NUM_WARPS,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Tables

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS: dict[str, Callable[..., None]] = {"fprop": fprop, "indices": indices, "dgrad": dgrad, "jvp": jvp}
