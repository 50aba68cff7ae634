"""The windows of a pooling along an axis, both ways round, and the sums over them.

A window covers a run of elements, an element is covered by a run of windows, and both grow with their index; windows
have one width and lie ``stride`` apart, or are adaptive: as many as asked for, which cover the axis. So a sum over the
elements of a window and one over the windows of an element are the same gather:

    average           y[n, p, q, c] = sum of x[n, h, w, c] over the elements of window (p, q), over its divisor
    its gradient      x[n, h, w, c] = sum of y[n, p, q, c] over the windows that cover (h, w), each over its divisor
    maximum's gradient  the same sum of the y[n, p, q, c] whose maximum, by its label, is (h, w)

Mapping. A program computes BLOCK_M results × BLOCK_C channels, an addend at a time where they are few and counted
(TAPS), else BLOCK_T side by side, which are summed at the end: a long sum is many short ones, and one large window
still has many threads.

Layout: NHWC with free pixel strides. Accumulator: fp32, rounded once at the store, in a fixed order; no atomics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ._common import INTERPRETED, block_channels, by_hand, ceil_div, launch, narrow, needs_int64, on_device, widen

# ---------------------------------------------------------------------------------------------------------------------
# Constants

NUM_WARPS = 4
# Results × addends × channels a program; the interpreter pays by the program and by the operation.
ELEMENTS = 16384 if INTERPRETED else 1024
UNROLLED = (1, 4, 9)  # up to so many addends have all their loads in flight; with labels, which double them, up to 4
SIDE_BY_SIDE = 16  # BLOCK_T where there are more
FEW = 8  # unrolled addends; more of them take half as many results again where no vector fits


# ---------------------------------------------------------------------------------------------------------------------
# Device code


@triton.jit
def elements(window, size, outputs, taps, stride, pad, ADAPTIVE: tl.constexpr):
    """The elements begin <= i < end of a window."""
    if ADAPTIVE:
        begin = window * size // outputs
        end = ((window + 1) * size + outputs - 1) // outputs
    else:
        begin = tl.maximum(window * stride - pad, 0)
        end = tl.minimum(window * stride - pad + taps, size)
    return begin, end


@triton.jit
def windows(element, size, outputs, taps, stride, pad, ADAPTIVE: tl.constexpr):
    """The windows begin <= p < end that cover an element."""
    if ADAPTIVE:
        begin = element * outputs // size
        end = ((element + 1) * outputs + size - 1) // size
    else:
        begin = tl.maximum(element + pad - taps + stride, 0) // stride
        end = tl.minimum((element + pad) // stride + 1, outputs)
    return begin, end


@triton.jit
def _divisor(window, size, outputs, taps, stride, pad, counted, ADAPTIVE: tl.constexpr):
    """The elements of a window, and those in as much of the padding as is counted, but never those beyond it."""
    if ADAPTIVE:
        begin, end = elements(window, size, outputs, taps, stride, pad, ADAPTIVE)
    else:
        begin = window * stride - pad
        end = tl.minimum(begin + taps, size + counted)
        begin = tl.maximum(begin, -counted)
    return (end - begin).to(tl.float32)


@triton.jit
def _divisors(
    i, j, size_h, size_w, outputs_h, outputs_w, taps_h, taps_w, stride_h, stride_w, pad_h, pad_w, counted_h, counted_w,
    override, ADAPTIVE: tl.constexpr,
):  # fmt: skip
    """What the sums of windows (i, j) are divided by."""
    divisor = _divisor(i, size_h, outputs_h, taps_h, stride_h, pad_h, counted_h, ADAPTIVE)
    divisor *= _divisor(j, size_w, outputs_w, taps_w, stride_w, pad_w, counted_w, ADAPTIVE)
    if not ADAPTIVE:
        divisor = tl.where(override != 0, override.to(tl.float32), divisor)
    return divisor


@triton.jit
def _addend(
    t, src, labels, base, labels_base, number, channel, in_m, in_c, most_h, most_w, begin_h, end_h, begin_w, end_w,
    out_h, out_w, src_h, src_w, taps_h, taps_w, stride_h, stride_w, pad_h, pad_w, counted_h, counted_w, override,
    src_row, src_col, labels_row, labels_col,
    GRADIENT: tl.constexpr, ADAPTIVE: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """The addends number t of some results, 0 where there are fewer."""
    r = t // most_w
    s = t - r * most_w
    a = begin_h[:, None] + r[None, :]
    b = begin_w[:, None] + s[None, :]
    valid = in_m[:, None] & (r < most_h)[None, :] & (a < end_h[:, None]) & (b < end_w[:, None])
    mask = valid[:, :, None] & in_c[None, None, :]
    at = (base[:, None] + a * src_row + b * src_col)[:, :, None] + channel[None, None, :]
    value = widen(tl.load(src + at, mask=mask, other=0.0), BY_HAND).to(tl.float32)
    if labels is not None:
        at = (labels_base[:, None] + a * labels_row + b * labels_col)[:, :, None] + channel[None, None, :]
        label = tl.load(labels + at, mask=mask, other=-1)
        value = tl.where(label == number[:, None, None], value, 0.0)
    elif GRADIENT:
        divisor = _divisors(
            a, b, out_h, out_w, src_h, src_w, taps_h, taps_w, stride_h, stride_w, pad_h, pad_w, counted_h, counted_w,
            override, ADAPTIVE,
        )  # fmt: skip
        value *= (1.0 / tl.where(valid, divisor, 1.0))[:, :, None]
    return value


@triton.jit(do_not_specialize=["batch", "out_h", "out_w", "src_h", "src_w", "taps_h", "taps_w", "stride_h", "stride_w",
                               "pad_h", "pad_w", "counted_h", "counted_w", "override", "most_h", "most_w"])  # fmt: skip
def _gather(
    src, labels, out, batch, channels, out_h, out_w, src_h, src_w, taps_h, taps_w, stride_h, stride_w, pad_h, pad_w,
    counted_h, counted_w, override, most_h, most_w, src_n, src_row, src_col, labels_n, labels_row, labels_col,
    out_n, out_row, out_col, GRADIENT: tl.constexpr, ADAPTIVE: tl.constexpr, TAPS: tl.constexpr,
    INT64: tl.constexpr, BY_HAND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    if INT64:
        src_n = tl.cast(src_n, tl.int64)
        src_row = tl.cast(src_row, tl.int64)
        src_col = tl.cast(src_col, tl.int64)
        labels_n = tl.cast(labels_n, tl.int64)
        labels_row = tl.cast(labels_row, tl.int64)
        labels_col = tl.cast(labels_col, tl.int64)
        out_n = tl.cast(out_n, tl.int64)
        out_row = tl.cast(out_row, tl.int64)
        out_col = tl.cast(out_col, tl.int64)
    blocks_c = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    channel = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    pixel = pid // blocks_c * BLOCK_M + tl.arange(0, BLOCK_M)
    in_c = channel < channels
    in_m = pixel < batch * out_h * out_w
    image = pixel // (out_h * out_w)
    number = pixel - image * (out_h * out_w)
    i = number // out_w
    j = number - i * out_w
    if GRADIENT:
        begin_h, end_h = windows(i, out_h, src_h, taps_h, stride_h, pad_h, ADAPTIVE)
        begin_w, end_w = windows(j, out_w, src_w, taps_w, stride_w, pad_w, ADAPTIVE)
    else:
        begin_h, end_h = elements(i, src_h, out_h, taps_h, stride_h, pad_h, ADAPTIVE)
        begin_w, end_w = elements(j, src_w, out_w, taps_w, stride_w, pad_w, ADAPTIVE)

    acc = tl.zeros((BLOCK_M, BLOCK_T, BLOCK_C), dtype=tl.float32)
    if TAPS:
        for t in tl.static_range(TAPS):
            acc += _addend(
                t + tl.arange(0, BLOCK_T), src, labels, image * src_n, image * labels_n, number, channel, in_m, in_c,
                most_h, most_w, begin_h, end_h, begin_w, end_w, out_h, out_w, src_h, src_w, taps_h, taps_w,
                stride_h, stride_w, pad_h, pad_w, counted_h, counted_w, override,
                src_row, src_col, labels_row, labels_col, GRADIENT, ADAPTIVE, BY_HAND,
            )  # fmt: skip
    else:
        for t in range(0, most_h * most_w, BLOCK_T):
            acc += _addend(
                t + tl.arange(0, BLOCK_T), src, labels, image * src_n, image * labels_n, number, channel, in_m, in_c,
                most_h, most_w, begin_h, end_h, begin_w, end_w, out_h, out_w, src_h, src_w, taps_h, taps_w,
                stride_h, stride_w, pad_h, pad_w, counted_h, counted_w, override,
                src_row, src_col, labels_row, labels_col, GRADIENT, ADAPTIVE, BY_HAND,
            )  # fmt: skip
    total = tl.sum(acc, axis=1)
    if not GRADIENT:
        divisor = _divisors(
            i, j, src_h, src_w, out_h, out_w, taps_h, taps_w, stride_h, stride_w, pad_h, pad_w, counted_h, counted_w,
            override, ADAPTIVE,
        )  # fmt: skip
        # total / divisor but for an ulp's fraction: a division by the reciprocal, whose remainder, exact in one fused
        # operation, corrects it. An infinity has no remainder. (Exact division calls a subroutine, and spills.)
        divisor = tl.where(in_m, divisor, 1.0)[:, None]
        inverse = tl.broadcast_to(1.0 / divisor, total.shape)
        near = total * inverse
        rest = tl.fma(near, tl.broadcast_to(-divisor, total.shape), total)
        total = tl.where(near - near == 0.0, tl.fma(rest, inverse, near), near)
    at = (image * out_n + i * out_row + j * out_col)[:, None] + channel[None, :]
    tl.store(out + at, narrow(total, out.dtype.element_ty, BY_HAND), mask=in_m[:, None] & in_c[None, :])


# ---------------------------------------------------------------------------------------------------------------------
# Launcher


@dataclass(frozen=True)
class Axis:
    """The windows of an axis of ``size`` elements; without taps they are adaptive."""

    size: int
    outputs: int
    taps: int = 0
    stride: int = 1
    pad: int = 0

    @property
    def most_elements(self) -> int:
        """Elements that a window can cover."""
        if self.taps:
            return min(self.taps, self.size)
        return min(ceil_div(self.size, self.outputs) + (self.size % self.outputs != 0), self.size)

    @property
    def most_windows(self) -> int:
        """Windows that can cover an element."""
        if self.taps:
            return min(ceil_div(self.taps, self.stride), self.outputs)
        return min(ceil_div(self.outputs, self.size) + (self.outputs % self.size != 0), self.outputs)


def fixed_axis(size: int, outputs: int, taps: int, stride: int, pad: int) -> Axis:
    """Windows of one width; a stride beyond the axis, which only a single window has, is brought within 32 bits."""
    return Axis(size, outputs, taps, min(stride, size + 2 * pad), pad)


def unrolled(labels: bool) -> tuple[int, ...]:
    """How many addends can be unrolled; those that a result hasn't are masked."""
    return tuple(count for count in UNROLLED if count <= 4 or not labels)


def block_pixels(taps: int, block_t: int, channels: int, vectors: bool) -> int:
    """BLOCK_M; without vectors each element has an address in registers, and one for each unrolled addend."""
    return max(1, ELEMENTS // (1 if vectors else 4 if taps > FEW else 2) // block_t // channels)


def gather(
    h: Axis, w: Axis, batch: int, channels: int, src: torch.Tensor, src_strides: tuple[int, int, int],
    out: torch.Tensor, out_strides: tuple[int, int, int], *, gradient: bool, padding: bool = False, override: int = 0,
    labels: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """The averages of src over windows; with ``gradient`` those of an average, or, with labels, of a maximum.

    Args:
        h, w: The windows of either axis.
        batch, channels: The sizes N and C.
        src, out: What is read and what is written, with the strides of n, h and w.
        gradient: src has a pixel a window and out one an element, not the other way round.
        padding: Divisors count the padding.
        override: The divisor, where it isn't 0.
        labels: int32, dense NHWC, a pixel a window: the number h * W + w of the element that its gradient goes to.
    """
    out_h, out_w, src_h, src_w = h.outputs, w.outputs, h.size, w.size
    most_h, most_w = h.most_elements, w.most_elements
    if gradient:
        out_h, out_w, src_h, src_w = src_h, src_w, out_h, out_w
        most_h, most_w = h.most_windows, w.most_windows
    pixels = batch * out_h * out_w
    if pixels == 0 or channels == 0:
        return
    label_strides = (src_h * src_w * channels, src_w * channels, channels) if labels is not None else (0, 0, 0)
    sources = (batch, src_h + most_h, src_w + most_w)  # addends that an element has fewer of lie beyond the end
    extents = ((sources, src_strides), (sources, label_strides), ((batch, out_h, out_w), out_strides))
    count = most_h * most_w
    taps = next((taps for taps in unrolled(labels is not None) if taps >= count), 0)
    block_t, block_c = 1 if taps else SIDE_BY_SIDE, block_channels(channels)
    wide = any(needs_int64(*zip(*extent, strict=True), (channels, 1)) for extent in extents)
    divisible = (channels, *src_strides, *out_strides, src.data_ptr(), out.data_ptr())
    block_m = block_pixels(taps, block_t, block_c, vectors=not wide and all(n % 16 == 0 for n in divisible))
    with on_device(out):
        launch(
            _gather, ceil_div(pixels, block_m) * ceil_div(channels, block_c),
            src, labels, out, batch, channels, out_h, out_w, src_h, src_w, h.taps, w.taps, h.stride, w.stride,
            h.pad, w.pad, h.pad * padding, w.pad * padding, override, most_h, most_w,
            *src_strides, *label_strides, *out_strides,
            GRADIENT=gradient, ADAPTIVE=h.taps == 0, TAPS=taps, INT64=wide, BY_HAND=by_hand(out.dtype),
            BLOCK_M=block_m, BLOCK_T=block_t, BLOCK_C=block_c, num_warps=NUM_WARPS,
        )  # fmt: skip
