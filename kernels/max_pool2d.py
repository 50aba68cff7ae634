"""Max pooling: fprop, indices, dgrad and jvp for every kernel size, stride, padding and dilation.

    fprop    y[n, c, p, q] = max_{r,s} x[n, c, h, w]      h = p*stride_h - pad_h + r*dilation_h, w likewise
    indices  also i[n, c, p, q] = h*W + w of the maximum
    jvp      y[n, c, p, q] = t[n, c, h, w]                at the maximum
    dgrad    t[n, c, h, w] = sum of y[n, c, p, q]         over the windows whose maximum is (h, w)

The first of equal elements is the maximum, in a window with NaNs the last NaN. A window without elements gives -inf,
index 0, tangent 0, and passes its gradient to no pixel.

Mapping. fprop, indices and jvp are one kernel: BLOCK_M output pixels × BLOCK_C channels a program, tap after tap, all
channels in step; the winner is carried in x's own dtype, its bits unchanged, beside the tap it came from (r << 16 | s).
dgrad has no indices to read and adds with no atomics: a program owns BLOCK_M cells × BLOCK_C channels of t; a cell is
``tile_h*stride_h`` × ``tile_w*stride_w`` pixels, numbered by ``phase``. The program visits the windows that touch its
cells, p and q ascending, finds each one's maximum again in x, and adds the gradient to the phase that holds it. A cell
touches ``tile_h + (R-1)*dilation_h // stride_h`` windows in h, so larger cells search less for a pixel, and add more.

Layout: NHWC with free pixel strides. Accumulator of dgrad: fp32, rounded once at the store, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import triton
import triton.language as tl

from ._common import by_hand, ceil_div, launch, narrow, needs_int64, next_power_of_2, on_device, widen

# ---------------------------------------------------------------------------------------------------------------------
# Constants

NUM_WARPS = 4
UNROLLED = (2, 3)  # square windows of these sizes have all their loads in flight
MIN_CHANNELS, MAX_CHANNELS = 4, 64  # BLOCK_C
ELEMENTS = 1024  # windows × channels a program
GRADIENT_ELEMENTS = 512  # the same of dgrad
GRADIENTS = 2048  # dgrad: pixels × channels a program
BLOCKS_PHASE = (1, 4, 16)
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


@triton.jit
def _first_tap(start, dilation):
    """The first tap at or beyond pixel 0."""
    return tl.maximum((dilation - 1 - start) // dilation, 0)


@triton.jit
def _tap(x, offset, i, j, inside, height, width, r, s, best, code, BY_HAND: tl.constexpr):
    valid = ((i >= 0) & (i < height) & (j >= 0) & (j < width))[:, None] & inside
    value = tl.load(x + offset, mask=valid, other=float("-inf"))
    wide = widen(value, BY_HAND).to(tl.float32)
    better = (wide > widen(best, BY_HAND).to(tl.float32)) | (wide != wide)
    return tl.where(better, value, best), tl.where(better, r * 65536 + s, code)


@triton.jit
def _maximum(
    x, base, channel, start_i, start_j, in_m, in_c, height, width, taps_r, taps_s, dilation_h, dilation_w,
    src_row, src_col, TAPS: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """The maximum of each window and its tap, r << 16 | s, or -1 in a window without elements.

    Without anything above -inf the first element is the maximum: its tap is the start.
    """
    first_r = _first_tap(start_i, dilation_h)
    first_s = _first_tap(start_j, dilation_w)
    some_r = (first_r < taps_r) & (start_i + first_r * dilation_h < height)
    some_s = (first_s < taps_s) & (start_j + first_s * dilation_w < width)
    code = tl.where(in_m & some_r & some_s, first_r * 65536 + first_s, -1)
    inside = in_m[:, None] & in_c[None, :]
    code = tl.where(inside, code[:, None], -1)
    best = tl.full(code.shape, float("-inf"), tl.float32)
    best = narrow(best, x.dtype.element_ty, BY_HAND)
    offset = base[:, None] + channel[None, :]
    if TAPS:
        for r in tl.static_range(TAPS):
            i = start_i + r * dilation_h
            for s in tl.static_range(TAPS):
                j = start_j + s * dilation_w
                step = r * dilation_h * src_row + s * dilation_w * src_col
                best, code = _tap(x + step, offset, i, j, inside, height, width, r, s, best, code, BY_HAND)
    else:
        r = 0
        s = 0
        for _ in range(0, taps_r * taps_s):
            i = start_i + r * dilation_h
            j = start_j + s * dilation_w
            step = r * dilation_h * src_row + s * dilation_w * src_col
            best, code = _tap(x + step, offset, i, j, inside, height, width, r, s, best, code, BY_HAND)
            s += 1
            row_done = s == taps_s
            r = tl.where(row_done, r + 1, r)
            s = tl.where(row_done, 0, s)
    return best, code


@triton.jit(do_not_specialize=["batch", "out_h", "out_w", "height", "width", "taps_r", "taps_s", "stride_h", "stride_w",
                               "pad_h", "pad_w", "dilation_h", "dilation_w"])  # fmt: skip
def _pool(
    x, y, index, tangent,
    batch, channels, out_h, out_w, height, width, taps_r, taps_s,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    src_n, src_row, src_col, out_n, out_row, out_col, index_n, index_row, index_col, tan_n, tan_row, tan_col,
    INDEX: tl.constexpr, TANGENT: tl.constexpr, TAPS: tl.constexpr, INT64: tl.constexpr, BY_HAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    if INT64:
        src_n = tl.cast(src_n, tl.int64)
        src_row = tl.cast(src_row, tl.int64)
        src_col = tl.cast(src_col, tl.int64)
        out_n = tl.cast(out_n, tl.int64)
        out_row = tl.cast(out_row, tl.int64)
        out_col = tl.cast(out_col, tl.int64)
        index_n = tl.cast(index_n, tl.int64)
        index_row = tl.cast(index_row, tl.int64)
        index_col = tl.cast(index_col, tl.int64)
        tan_n = tl.cast(tan_n, tl.int64)
        tan_row = tl.cast(tan_row, tl.int64)
        tan_col = tl.cast(tan_col, tl.int64)
    blocks_c = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    channel = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    pixel = pid // blocks_c * BLOCK_M + tl.arange(0, BLOCK_M)
    in_c = channel < channels
    in_m = pixel < batch * out_h * out_w
    image = pixel // (out_h * out_w)
    rest = pixel - image * (out_h * out_w)
    p = rest // out_w
    q = rest - p * out_w
    start_i = p * stride_h - pad_h
    start_j = q * stride_w - pad_w
    base = image * src_n + start_i * src_row + start_j * src_col
    result, code = _maximum(
        x, base, channel, start_i, start_j, in_m, in_c, height, width, taps_r, taps_s, dilation_h, dilation_w,
        src_row, src_col, TAPS, BY_HAND,
    )  # fmt: skip
    inside = in_m[:, None] & in_c[None, :]
    i = start_i[:, None] + (code >> 16) * dilation_h
    j = start_j[:, None] + (code & 0xFFFF) * dilation_w
    if TANGENT:
        source = (image * tan_n)[:, None] + i * tan_row + j * tan_col + channel[None, :]
        result = tl.load(tangent + source, mask=code >= 0, other=0.0)
    target = image * out_n + p * out_row + q * out_col
    tl.store(y + (target[:, None] + channel[None, :]), result, mask=inside)
    if INDEX:
        target = image * index_n + p * index_row + q * index_col
        where = tl.where(code >= 0, i * width + j, 0).to(tl.int64)
        tl.store(index + (target[:, None] + channel[None, :]), where, mask=inside)


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
        _, code = _maximum(
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


@dataclass(frozen=True)
class Axis:
    """One axis of a problem, with what cannot matter brought within 32 bits."""

    size: int
    out: int
    taps: int
    stride: int
    pad: int
    dilation: int

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


def block_c(channels: int) -> int:
    """Channels a program."""
    return max(MIN_CHANNELS, min(MAX_CHANNELS, next_power_of_2(channels)))


def block_cells(block_phase: int, block_c: int) -> int:
    """Cells a program."""
    return max(1, min(GRADIENT_ELEMENTS, GRADIENTS // block_phase) // block_c)


def block_phase(phases: int) -> int:
    """Phases a program."""
    return next((block for block in BLOCKS_PHASE if block >= phases), BLOCKS_PHASE[-1])


def unrolled(p: MaxPool2dProblem) -> int:
    """The size of a square window that is unrolled, or 0."""
    return p.R if p.R == p.S and p.R in UNROLLED else 0


def tile(h: Axis, w: Axis) -> tuple[int, int]:
    """Windows a cell, in h and in w: those that predict the fewest instructions for a pixel."""

    def cost(tile_h: int, tile_w: int) -> float:
        phases = h.phases(tile_h) * w.phases(tile_w)
        block = block_phase(phases)
        windows = h.windows(tile_h)[1] * w.windows(tile_w)[1] * ceil_div(phases, block)
        tap = TAP + TAP_VECTOR * 32 * NUM_WARPS / min(GRADIENT_ELEMENTS, GRADIENTS // block)
        return windows * (h.taps * w.taps * tap + block * PHASE + WINDOW) / phases

    return min(((a, b) for a in TILES for b in TILES), key=lambda tiles: cost(*tiles))


def _int64(p: MaxPool2dProblem, h: Axis, w: Axis, *, i: bool = False, t: bool = False) -> bool:
    """Whether offsets pass 32 bits in x, y or the optional operands; windows begin and end beyond the map."""
    reach_h, reach_w = h.size + h.pad + h.taps * h.dilation, w.size + w.pad + w.taps * w.dilation
    return (
        needs_int64((p.N, p.x_n), (reach_h, p.x_h), (reach_w, p.x_w), (p.C, 1))
        or needs_int64((p.N, p.y_n), (h.out, p.y_h), (w.out, p.y_w), (p.C, 1))
        or (i and needs_int64((p.N, p.i_n), (h.out, p.i_h), (w.out, p.i_w), (p.C, 1)))
        or (t and needs_int64((p.N, p.t_n), (h.size, p.t_h), (w.size, p.t_w), (p.C, 1)))
    )


def _forward(
    p: MaxPool2dProblem, x: torch.Tensor, y: torch.Tensor, i: torch.Tensor | None, t: torch.Tensor | None
) -> None:
    pixels = p.N * p.P * p.Q
    if pixels == 0 or p.C == 0:
        return
    h, w = axes(p)
    channels = block_c(p.C)
    pixels_a_program = ELEMENTS // channels
    with on_device(x):
        launch(
            _pool, ceil_div(pixels, pixels_a_program) * ceil_div(p.C, channels),
            x, y, i, t,
            p.N, p.C, h.out, w.out, h.size, w.size, h.taps, w.taps,
            h.stride, w.stride, h.pad, w.pad, h.dilation, w.dilation,
            p.x_n, p.x_h, p.x_w, p.y_n, p.y_h, p.y_w,
            *((p.i_n, p.i_h, p.i_w) if i is not None else (0, 0, 0)),
            *((p.t_n, p.t_h, p.t_w) if t is not None else (0, 0, 0)),
            INDEX=i is not None, TANGENT=t is not None, TAPS=unrolled(p),
            INT64=_int64(p, h, w, i=i is not None, t=t is not None),
            BY_HAND=by_hand(x.dtype), BLOCK_M=pixels_a_program, BLOCK_C=channels, num_warps=NUM_WARPS,
        )  # fmt: skip


def fprop(
    p: MaxPool2dProblem, x: torch.Tensor, y: torch.Tensor, i: torch.Tensor | None = None, t: torch.Tensor | None = None
) -> None:
    """Writes y, the maxima."""
    _forward(p, x, y, None, None)


def indices(
    p: MaxPool2dProblem, x: torch.Tensor, y: torch.Tensor, i: torch.Tensor, t: torch.Tensor | None = None
) -> None:
    """Writes y, the maxima, and i, where they lie."""
    _forward(p, x, y, i, None)


def jvp(p: MaxPool2dProblem, x: torch.Tensor, y: torch.Tensor, i: torch.Tensor | None, t: torch.Tensor) -> None:
    """Writes y, the output's tangent, from x and t, the input's."""
    _forward(p, x, y, None, t)


def dgrad(
    p: MaxPool2dProblem, x: torch.Tensor, y: torch.Tensor, i: torch.Tensor | None = None, t: torch.Tensor | None = None
) -> None:
    """Writes t, the input's gradient, from x and y, the output's."""
    assert t is not None
    if p.N * p.C * p.H * p.W == 0:
        return
    h, w = axes(p)
    tile_h, tile_w = tile(h, w)
    rows, cols = h.phases(tile_h), w.phases(tile_w)
    (first_a, cells_h), (first_b, cells_w) = h.cells(tile_h), w.cells(tile_w)
    (before_h, windows_h), (before_w, windows_w) = h.windows(tile_h), w.windows(tile_w)
    channels, phases = block_c(p.C), block_phase(rows * cols)
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
            TAPS=unrolled(p), INT64=_int64(p, h, w, t=True), BY_HAND=by_hand(x.dtype),
            BLOCK_M=cells, BLOCK_PHASE=phases, BLOCK_C=channels, num_warps=NUM_WARPS,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Tables

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS: dict[str, Callable[..., None]] = {"fprop": fprop, "indices": indices, "dgrad": dgrad, "jvp": jvp}
