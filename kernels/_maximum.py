"""The search for the maximum of a window: what max_pool2d and adaptive_max_pool2d share.

The first of equal elements is the maximum, in a window with NaNs the last NaN. A window without elements gives -inf,
index 0, tangent 0. Mapping: BLOCK_M windows × BLOCK_C channels a program, tap after tap, all channels in step; the
winner is carried in x's own dtype, its bits unchanged, beside the tap it came from (r << 16 | s).

Layout: NHWC with free pixel strides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ._common import INTERPRETED, block_channels, by_hand, ceil_div, launch, narrow, needs_int64, on_device, widen
from ._windows import elements

# ---------------------------------------------------------------------------------------------------------------------
# Constants

NUM_WARPS = 4
UNROLLED = (2, 3)  # square windows of these sizes have all their loads in flight
# Windows × channels a program; the interpreter pays by the program.
ELEMENTS = 8192 if INTERPRETED else 1024


# ---------------------------------------------------------------------------------------------------------------------
# Device code


@triton.jit
def _first_tap(start, dilation):
    """The first tap at or beyond pixel 0."""
    return tl.maximum((dilation - 1 - start) // dilation, 0)


@triton.jit
def _tap(x, offset, i, j, inside, end_i, end_j, r, s, best, code, BY_HAND: tl.constexpr):
    valid = ((i >= 0) & (i < end_i) & (j >= 0) & (j < end_j))[:, None] & inside
    value = tl.load(x + offset, mask=valid, other=float("-inf"))
    wide = widen(value, BY_HAND).to(tl.float32)
    better = (wide > widen(best, BY_HAND).to(tl.float32)) | (wide != wide)
    return tl.where(better, value, best), tl.where(better, r * 65536 + s, code)


@triton.jit
def maximum(
    x, base, channel, start_i, start_j, in_m, in_c, end_i, end_j, taps_r, taps_s, dilation_h, dilation_w,
    src_row, src_col, TAPS: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """The maximum of each window and its tap, r << 16 | s, or -1 in a window without elements.

    A window ends after its taps or before (end_i, end_j). Without anything above -inf the first element is the maximum:
    its tap is the start.
    """
    first_r = _first_tap(start_i, dilation_h)
    first_s = _first_tap(start_j, dilation_w)
    some_r = (first_r < taps_r) & (start_i + first_r * dilation_h < end_i)
    some_s = (first_s < taps_s) & (start_j + first_s * dilation_w < end_j)
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
                best, code = _tap(x + step, offset, i, j, inside, end_i, end_j, r, s, best, code, BY_HAND)
    else:
        r = 0
        s = 0
        for _ in range(0, taps_r * taps_s):
            i = start_i + r * dilation_h
            j = start_j + s * dilation_w
            step = r * dilation_h * src_row + s * dilation_w * src_col
            best, code = _tap(x + step, offset, i, j, inside, end_i, end_j, r, s, best, code, BY_HAND)
            s += 1
            row_done = s == taps_s
            r = tl.where(row_done, r + 1, r)
            s = tl.where(row_done, 0, s)
    return best, code


@triton.jit(do_not_specialize=["batch", "out_h", "out_w", "height", "width", "taps_r", "taps_s", "stride_h", "stride_w",
                               "pad_h", "pad_w", "dilation_h", "dilation_w"])  # fmt: skip
def _search(
    x, y, index, tangent,
    batch, channels, out_h, out_w, height, width, taps_r, taps_s,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    src_n, src_row, src_col, out_n, out_row, out_col, index_n, index_row, index_col, tan_n, tan_row, tan_col,
    ADAPTIVE: tl.constexpr, TAPS: tl.constexpr, INT64: tl.constexpr, BY_HAND: tl.constexpr,
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
    if ADAPTIVE:
        start_i, end_i = elements(p, height, out_h, taps_r, stride_h, pad_h, ADAPTIVE)
        start_j, end_j = elements(q, width, out_w, taps_s, stride_w, pad_w, ADAPTIVE)
    else:
        start_i = p * stride_h - pad_h
        start_j = q * stride_w - pad_w
        end_i = height
        end_j = width
    base = image * src_n + start_i * src_row + start_j * src_col
    result, code = maximum(
        x, base, channel, start_i, start_j, in_m, in_c, end_i, end_j, taps_r, taps_s, dilation_h, dilation_w,
        src_row, src_col, TAPS, BY_HAND,
    )  # fmt: skip
    inside = in_m[:, None] & in_c[None, :]
    i = start_i[:, None] + (code >> 16) * dilation_h
    j = start_j[:, None] + (code & 0xFFFF) * dilation_w
    if tangent is not None:
        source = (image * tan_n)[:, None] + i * tan_row + j * tan_col + channel[None, :]
        result = tl.load(tangent + source, mask=code >= 0, other=0.0)
    if y is not None:
        target = image * out_n + p * out_row + q * out_col
        tl.store(y + (target[:, None] + channel[None, :]), result, mask=inside)
    if index is not None:
        target = image * index_n + p * index_row + q * index_col
        where = tl.where(code >= 0, i * width + j, 0).to(index.dtype.element_ty)
        tl.store(index + (target[:, None] + channel[None, :]), where, mask=inside)


# ---------------------------------------------------------------------------------------------------------------------
# Launcher


@dataclass(frozen=True)
class Windows:
    """The windows of an axis; adaptive ones have so many taps at most."""

    size: int
    out: int
    taps: int
    stride: int = 1
    pad: int = 0
    dilation: int = 1


def unrolled(h: Windows, w: Windows) -> int:
    """The size of a square window that is unrolled, or 0."""
    return h.taps if h.taps == w.taps and h.taps in UNROLLED else 0


def warps(itemsize: int, adaptive: bool, index: bool) -> int:
    """More where 64-bit labels stand beside 32-bit values and windows of their own sizes: the unrolled search spilled."""
    return 2 * NUM_WARPS if itemsize == 4 and adaptive and index else NUM_WARPS


def int64(p: Any, h: Windows, w: Windows, *, i: bool = False, t: bool = False) -> bool:
    """Whether offsets pass 32 bits in x, y or the optional operands; windows begin and end beyond the map."""
    reach_h, reach_w = h.size + h.pad + h.taps * h.dilation, w.size + w.pad + w.taps * w.dilation
    return (
        needs_int64((p.N, p.x_n), (reach_h, p.x_h), (reach_w, p.x_w), (p.C, 1))
        or needs_int64((p.N, p.y_n), (h.out, p.y_h), (w.out, p.y_w), (p.C, 1))
        or (i and needs_int64((p.N, p.i_n), (h.out, p.i_h), (w.out, p.i_w), (p.C, 1)))
        or (t and needs_int64((p.N, p.t_n), (h.size, p.t_h), (w.size, p.t_w), (p.C, 1)))
    )


def search(
    p: Any, h: Windows, w: Windows, x: torch.Tensor, y: torch.Tensor | None, i: torch.Tensor | None,
    t: torch.Tensor | None, *, adaptive: bool = False,
) -> None:  # fmt: skip
    """Writes to y the maxima of x, or where t is given what lies there in t; to i where they lie, h * W + w.

    ``p`` holds sizes and strides, by the names of csrc/common/params.h.
    """
    pixels = p.N * p.P * p.Q
    if pixels == 0 or p.C == 0:
        return
    channels = block_channels(p.C)
    block_m = ELEMENTS // channels
    with on_device(x):
        launch(
            _search, ceil_div(pixels, block_m) * ceil_div(p.C, channels),
            x, y, i, t,
            p.N, p.C, h.out, w.out, h.size, w.size, h.taps, w.taps,
            h.stride, w.stride, h.pad, w.pad, h.dilation, w.dilation,
            p.x_n, p.x_h, p.x_w, p.y_n, p.y_h, p.y_w,
            *((p.i_n, p.i_h, p.i_w) if i is not None else (0, 0, 0)),
            *((p.t_n, p.t_h, p.t_w) if t is not None else (0, 0, 0)),
            ADAPTIVE=adaptive, TAPS=unrolled(h, w), INT64=int64(p, h, w, i=i is not None, t=t is not None),
            BY_HAND=by_hand(x.dtype), BLOCK_M=block_m, BLOCK_C=channels,
            num_warps=warps(x.element_size(), adaptive, i is not None),
        )  # fmt: skip
