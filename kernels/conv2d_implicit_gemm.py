"""Convolution as an implicit matrix product: fprop, dgrad, wgrad and bgrad for every configuration.

    fprop  y[m, k]  = act(scale[k] (b[k] + sum_{r,s,c} x[pixel(m, r, s), c] w[k, c, r, s]) + shift[k] + r[m, k])
    dgrad  x[m, c]  =        sum_{r,s,k} y[pixel(m, r, s), k] w[k, c, r, s]        m = (n, h, w)
    wgrad  w[k, rsc] =       sum_m       y[m, k] x[pixel(m, r, s), c]              m = (n, p, q)
    bgrad  b[k]     =        sum_m       y[m, k]

fprop's m = (n, p, q). conv2d is fprop without scale, shift, r and act; conv_bn_act has them, each of which may be absent.

Mapping. fprop and dgrad are one kernel: both gather, for an output pixel and a tap, the source pixel
``i * mul + off + tap * step`` of each axis. dgrad splits its output into stride_h * stride_w phases; the taps that
reach a phase are ``first + j * every``, so no product with an inserted zero is computed and no output is added to
twice. A program computes BLOCK_M pixels × BLOCK_N channels of one group (and phase), over the taps and BLOCK_K
channels at a time; programs that share a weight panel or a pixel panel follow each other (GROUP_M). With few channels a
group (PACKED) the reduction runs over the flattened (r, s, c) instead. 1×1 at stride 1 is a plain product (LINEAR).
wgrad's reduction runs over the pixels; it is split into ``splits`` chunks where the result alone has too few tiles,
each chunk into a workspace of its own, summed in order: bitwise deterministic, no atomics.

Layout: activations NHWC with free pixel strides; weights with any strides, contiguous C (fprop, dgrad) being fast.
Accumulator: fp32, to which the epilogue is applied, rounded once at the store. What lies in the padding counts as
zero, so that a non-finite weight yields NaN where its tap falls into the padding, as it does in cuDNN.

After Chetlur et al., "cuDNN: Efficient Primitives for Deep Learning", 2014 (implicit GEMM), CUTLASS's implicit GEMM
documentation (strided dgrad), and Triton's matrix-multiplication tutorial (program order).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ._activation import activate
from ._common import (
    Conv2dProblem,
    by_hand,
    capability,
    ceil_div,
    launch,
    narrow,
    needs_int64,
    on_device,
    widen,
)
from ._tiles import INPUT_PRECISION, Config, config

# ---------------------------------------------------------------------------------------------------------------------
# Constants; the tiles are in _tiles.py

PACKED_CHANNELS = 16  # below this many channels a group, fprop and dgrad flatten the reduction

# Split reductions. They depend on the problem alone, never on the card, and so does the rounding.
SPLIT_PROGRAMS = 256  # programs wanted
SPLIT_PIXELS = 512  # pixels a program reduces at least
SPLIT_TILE = 64
BGRAD_BLOCK_M, BGRAD_BLOCK_N = 64, 64
REDUCE_BLOCK = 512


# ---------------------------------------------------------------------------------------------------------------------
# Device code


@triton.jit
def _tile(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """Program order: GROUP_M tiles down, then one tile right, so that both panels are reused from L2."""
    in_group = GROUP_M * num_n
    first = pid // in_group * GROUP_M
    height = tl.minimum(num_m - first, GROUP_M)
    return first + (pid % in_group) % height, (pid % in_group) // height


@triton.jit
def _accumulate(a, b, acc, INPUT_PRECISION: tl.constexpr, BY_HAND: tl.constexpr):
    """acc + a b. In fp32 grade each block's products are summed apart, so that no chain of additions is long.

    The compiler would fold that addition into the product's own chain; of a product with imprecise sums it doesn't.
    """
    a = widen(a, BY_HAND)
    b = widen(b, BY_HAND)
    if INPUT_PRECISION == "tf32":
        return tl.dot(a, b, acc, input_precision=INPUT_PRECISION)
    else:
        return acc + tl.dot(a, b, input_precision=INPUT_PRECISION, max_num_imprecise_acc=1)


@triton.jit
def _phase_taps(phase, taps, stride, pad, dilation, gcd, inverse):
    """The taps of one axis that reach the output pixels phase, phase + stride, …: first + j * every, j < count.

    ``(phase + pad - r * dilation) % stride == 0`` is a linear congruence: it has solutions iff gcd(stride, dilation)
    divides phase + pad, and then one in each ``stride / gcd`` taps. Also returns the source pixel of the first.
    """
    shift = phase + pad
    every = stride // gcd
    first = (shift // gcd) % every * inverse % every
    count = tl.where(shift % gcd == 0, tl.maximum(0, (taps - first + every - 1) // every), 0)
    return first, every, count, (shift - first * dilation) // stride


@triton.jit(do_not_specialize=["batch", "out_h", "out_w", "src_h", "src_w", "taps_r", "taps_s", "pad_h", "pad_w"])
def _gather_gemm(
    src, weight, bias, scale, shift, residual, out,
    batch, out_h, out_w, src_h, src_w, c_src, c_out, groups, taps_r, taps_s,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, gcd_h, gcd_w, inverse_h, inverse_w,
    src_n, src_row, src_col, w_group, w_src, w_out, w_r, w_s, out_n, out_row, out_col, res_n, res_row, res_col,
    ACT: tl.constexpr, TRANSPOSED: tl.constexpr, LINEAR: tl.constexpr, PACKED: tl.constexpr, EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, INT64: tl.constexpr, INPUT_PRECISION: tl.constexpr, BY_HAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Phases and groups vary fastest: neighbours read and write interleaved parts of the same cache lines.
    pid = tl.program_id(0)
    group = pid % groups
    pid = pid // groups
    if TRANSPOSED:
        num_phases = stride_h * stride_w
        phase = pid % num_phases
        pid = pid // num_phases
        phase_h = phase // stride_w
        phase_w = phase % stride_w
        out_step_h = stride_h
        out_step_w = stride_w
        first_r, every_r, count_r, off_h = _phase_taps(phase_h, taps_r, stride_h, pad_h, dilation_h, gcd_h, inverse_h)
        first_s, every_s, count_s, off_w = _phase_taps(phase_w, taps_s, stride_w, pad_w, dilation_w, gcd_w, inverse_w)
        mul_h = 1
        mul_w = 1
        step_h = -(every_r * dilation_h // stride_h)
        step_w = -(every_s * dilation_w // stride_w)
        rows = (out_h - phase_h + stride_h - 1) // stride_h
        cols = (out_w - phase_w + stride_w - 1) // stride_w
        num_m = tl.cdiv(batch * tl.cdiv(out_h, stride_h) * tl.cdiv(out_w, stride_w), BLOCK_M)
        weight += first_r * w_r + first_s * w_s
        w_r *= every_r
        w_s *= every_s
    else:
        phase_h = 0
        phase_w = 0
        out_step_h = 1
        out_step_w = 1
        count_r = taps_r
        count_s = taps_s
        mul_h = stride_h
        mul_w = stride_w
        off_h = -pad_h
        off_w = -pad_w
        step_h = dilation_h
        step_w = dilation_w
        rows = out_h
        cols = out_w
        num_m = tl.cdiv(batch * out_h * out_w, BLOCK_M)
    tile_m, tile_n = _tile(pid, num_m, tl.cdiv(c_out, BLOCK_N), GROUP_M)

    if INT64:
        src_n = tl.cast(src_n, tl.int64)
        src_row = tl.cast(src_row, tl.int64)
        src_col = tl.cast(src_col, tl.int64)
        out_n = tl.cast(out_n, tl.int64)
        out_row = tl.cast(out_row, tl.int64)
        out_col = tl.cast(out_col, tl.int64)
        res_n = tl.cast(res_n, tl.int64)
        res_row = tl.cast(res_row, tl.int64)
        res_col = tl.cast(res_col, tl.int64)
        w_group = tl.cast(w_group, tl.int64)
        w_src = tl.cast(w_src, tl.int64)
        w_out = tl.cast(w_out, tl.int64)
        w_r = tl.cast(w_r, tl.int64)
        w_s = tl.cast(w_s, tl.int64)

    pixel = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    in_m = pixel < batch * rows * cols
    in_n = channel < c_out
    if LINEAR:
        base = pixel * src_col
    else:
        # A phase can be empty (stride beyond the map): it divides by one then, under an all-false mask.
        image = pixel // tl.maximum(rows * cols, 1)
        rest = pixel - image * (rows * cols)
        row = rest // tl.maximum(cols, 1)
        col = rest - row * cols
        src_i = row * mul_h + off_h
        src_j = col * mul_w + off_w
        base = image * src_n + src_i * src_row + src_j * src_col
    src += group * c_src
    weight += group * w_group
    w_channel = channel * w_out

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if PACKED:
        depth = count_r * count_s * c_src
        for k0 in range(0, depth, BLOCK_K):
            k = k0 + lane
            tap = k // c_src
            c = k - tap * c_src
            r = tap // tl.maximum(count_s, 1)
            s = tap - r * count_s
            in_k = k < depth
            i = src_i[:, None] + (r * step_h)[None, :]
            j = src_j[:, None] + (s * step_w)[None, :]
            valid = (i >= 0) & (i < src_h) & (j >= 0) & (j < src_w) & in_m[:, None] & in_k[None, :]
            offset = r * step_h * src_row + s * step_w * src_col + c
            a = tl.load(src + (base[:, None] + offset[None, :]), mask=valid, other=0.0)
            w_offset = r * w_r + s * w_s + c * w_src
            b = tl.load(
                weight + (w_offset[:, None] + w_channel[None, :]), mask=in_k[:, None] & in_n[None, :], other=0.0
            )
            acc = _accumulate(a, b, acc, INPUT_PRECISION, BY_HAND)
    else:
        # One loop over taps and channels, so that loads are in flight across the change of the tap.
        blocks = tl.cdiv(c_src, BLOCK_K)
        c0 = 0
        r = 0
        s = 0
        for _ in range(0, count_r * count_s * blocks):
            if LINEAR:
                valid = in_m
                offset = c0
            else:
                i = src_i + r * step_h
                j = src_j + s * step_w
                valid = (i >= 0) & (i < src_h) & (j >= 0) & (j < src_w) & in_m
                offset = r * step_h * src_row + s * step_w * src_col + c0
            a_ptrs = src + offset + (base[:, None] + lane[None, :])
            b_ptrs = weight + (r * w_r + s * w_s + c0 * w_src) + ((lane * w_src)[:, None] + w_channel[None, :])
            if EVEN_K:
                a = tl.load(a_ptrs, mask=valid[:, None], other=0.0)
                b = tl.load(b_ptrs, mask=in_n[None, :], other=0.0)
            else:
                in_k = c0 + lane < c_src
                a = tl.load(a_ptrs, mask=valid[:, None] & in_k[None, :], other=0.0)
                b = tl.load(b_ptrs, mask=in_k[:, None] & in_n[None, :], other=0.0)
            acc = _accumulate(a, b, acc, INPUT_PRECISION, BY_HAND)
            c0 += BLOCK_K
            tap_done = c0 >= c_src
            c0 = tl.where(tap_done, 0, c0)
            s = tl.where(tap_done, s + 1, s)
            row_done = s >= count_s
            r = tl.where(row_done, r + 1, r)
            s = tl.where(row_done, 0, s)

    if HAS_BIAS:
        b = tl.load(bias + group * c_out + channel, mask=in_n, other=0.0)
        acc += widen(b, BY_HAND).to(tl.float32)[None, :]
    if scale is not None:
        acc *= tl.load(scale + group * c_out + channel, mask=in_n, other=0.0)[None, :]
    if shift is not None:
        acc += tl.load(shift + group * c_out + channel, mask=in_n, other=0.0)[None, :]
    inside = in_m[:, None] & in_n[None, :]
    if residual is not None:
        if LINEAR:
            source = pixel * res_col
        else:
            source = image * res_n + row * res_row + col * res_col
        r_ptrs = residual + group * c_out + (source[:, None] + channel[None, :])
        acc += widen(tl.load(r_ptrs, mask=inside, other=0.0), BY_HAND).to(tl.float32)
    acc = activate(acc, ACT)
    if LINEAR:
        target = pixel * out_col
    else:
        target = image * out_n + (row * out_step_h + phase_h) * out_row + (col * out_step_w + phase_w) * out_col
    result = narrow(acc, out.dtype.element_ty, BY_HAND)
    tl.store(out + group * c_out + (target[:, None] + channel[None, :]), result, mask=inside)


@triton.jit(do_not_specialize=["batch", "out_h", "out_w", "src_h", "src_w", "taps_r", "taps_s", "pad_h", "pad_w",
                               "splits", "chunk"])  # fmt: skip
def _wgrad_gemm(
    x, grad, out, workspace,
    batch, out_h, out_w, src_h, src_w, c_src, c_out, groups, taps_r, taps_s,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, splits, chunk,
    src_n, src_row, src_col, w_k, w_c, w_r, w_s, out_n, out_row, out_col,
    SPLIT: tl.constexpr, LINEAR: tl.constexpr, PACKED: tl.constexpr, INT64: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, BY_HAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # BLOCK_M output channels × BLOCK_N columns (r, s, c), over the pixels of one chunk, BLOCK_K at a time.
    pid = tl.program_id(0)
    group = pid % groups
    pid = pid // groups
    num_m = tl.cdiv(c_out, BLOCK_M)
    c_blocks = tl.cdiv(c_src, BLOCK_N)
    if PACKED:
        num_n = tl.cdiv(taps_r * taps_s * c_src, BLOCK_N)
    else:
        num_n = taps_r * taps_s * c_blocks
    split = pid // (num_m * num_n)
    tile_m, tile_n = _tile(pid % (num_m * num_n), num_m, num_n, GROUP_M)

    if INT64:
        src_n = tl.cast(src_n, tl.int64)
        src_row = tl.cast(src_row, tl.int64)
        src_col = tl.cast(src_col, tl.int64)
        out_n = tl.cast(out_n, tl.int64)
        out_row = tl.cast(out_row, tl.int64)
        out_col = tl.cast(out_col, tl.int64)
        w_k = tl.cast(w_k, tl.int64)
        w_c = tl.cast(w_c, tl.int64)
        w_r = tl.cast(w_r, tl.int64)
        w_s = tl.cast(w_s, tl.int64)

    k = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_K)
    if PACKED:
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = column < taps_r * taps_s * c_src
        tap = column // c_src
        c = column - tap * c_src
    else:
        tap = tile_n // c_blocks
        c = (tile_n - tap * c_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = c < c_src
    in_m = k < c_out
    r = tap // taps_s
    s = tap - r * taps_s
    tap_i = r * dilation_h - pad_h
    tap_j = s * dilation_w - pad_w
    x_column = tap_i * src_row + tap_j * src_col + c
    x += group * c_src
    grad += group * c_out

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first = split * chunk
    last = tl.minimum(first + chunk, batch * out_h * out_w)
    for m0 in range(first, last, BLOCK_K):
        pixel = m0 + lane
        in_k = pixel < last
        if LINEAR:
            x_pixel = pixel * src_col
            g_pixel = pixel * out_col
            valid = in_k[:, None] & in_n[None, :]
        else:
            image = pixel // (out_h * out_w)
            inside = pixel - image * (out_h * out_w)
            p = inside // out_w
            q = inside - p * out_w
            x_pixel = image * src_n + p * stride_h * src_row + q * stride_w * src_col
            g_pixel = image * out_n + p * out_row + q * out_col
            if PACKED:
                i = (p * stride_h)[:, None] + tap_i[None, :]
                j = (q * stride_w)[:, None] + tap_j[None, :]
                inside_map = (i >= 0) & (i < src_h) & (j >= 0) & (j < src_w)
                valid = inside_map & in_k[:, None] & in_n[None, :]
            else:
                i = p * stride_h + tap_i
                j = q * stride_w + tap_j
                valid = ((i >= 0) & (i < src_h) & (j >= 0) & (j < src_w) & in_k)[:, None] & in_n[None, :]
        a = tl.load(grad + (k[:, None] + g_pixel[None, :]), mask=in_m[:, None] & in_k[None, :], other=0.0)
        b = tl.load(x + (x_pixel[:, None] + x_column[None, :]), mask=valid, other=0.0)
        acc = _accumulate(a, b, acc, INPUT_PRECISION, BY_HAND)

    inside_tile = in_m[:, None] & in_n[None, :]
    if SPLIT:
        columns = taps_r * taps_s * c_src
        row = tl.cast((split * groups + group) * c_out + k, tl.int64)
        tl.store(workspace + (row[:, None] * columns + (tap * c_src + c)[None, :]), acc, mask=inside_tile)
    else:
        target = ((group * c_out + k) * w_k)[:, None] + (r * w_r + s * w_s + c * w_c)[None, :]
        tl.store(out + target, narrow(acc, out.dtype.element_ty, BY_HAND), mask=inside_tile)


@triton.jit(do_not_specialize=["pixels", "out_hw", "out_w", "splits", "chunk"])
def _bgrad_partial(
    grad, out, workspace, pixels, out_hw, out_w, channels, splits, chunk, out_n, out_row, out_col,
    SPLIT: tl.constexpr, INT64: tl.constexpr, BY_HAND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0) % splits
    k = tl.program_id(0) // splits * BLOCK_N + tl.arange(0, BLOCK_N)
    if INT64:
        out_n = tl.cast(out_n, tl.int64)
        out_row = tl.cast(out_row, tl.int64)
        out_col = tl.cast(out_col, tl.int64)
    first = split * chunk
    last = tl.minimum(first + chunk, pixels)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for m0 in range(first, last, BLOCK_M):
        pixel = m0 + tl.arange(0, BLOCK_M)
        image = pixel // out_hw
        inside = pixel - image * out_hw
        p = inside // out_w
        offset = image * out_n + p * out_row + (inside - p * out_w) * out_col
        valid = (pixel < last)[:, None] & (k < channels)[None, :]
        g = tl.load(grad + (offset[:, None] + k[None, :]), mask=valid, other=0.0)
        acc += widen(g, BY_HAND).to(tl.float32)
    total = tl.sum(acc, axis=0)
    if SPLIT:
        tl.store(workspace + split * channels + k, total, mask=k < channels)
    else:
        tl.store(out + k, narrow(total, out.dtype.element_ty, BY_HAND), mask=k < channels)


@triton.jit(do_not_specialize=["splits", "taps_s", "total"])
def _sum_splits(
    workspace, out, splits, total, columns, c_src, taps_s, w_k, w_c, w_r, w_s,
    INT64: tl.constexpr, BY_HAND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = the sum of the chunks, in order; total = rows × columns results, a column being (r, s, c)."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = element < total
    row = element // columns
    column = element - row * columns
    tap = column // c_src
    r = tap // taps_s
    if INT64:
        w_k = tl.cast(w_k, tl.int64)
        w_c = tl.cast(w_c, tl.int64)
        w_r = tl.cast(w_r, tl.int64)
        w_s = tl.cast(w_s, tl.int64)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(splits):
        acc += tl.load(workspace + tl.cast(split, tl.int64) * total + element, mask=valid, other=0.0)
    target = row * w_k + (column - tap * c_src) * w_c + r * w_r + (tap - r * taps_s) * w_s
    tl.store(out + target, narrow(acc, out.dtype.element_ty, BY_HAND), mask=valid)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


def _x_int64(p: Conv2dProblem) -> bool:
    # Rows and columns beyond the map are addressed before the mask hides them.
    reach_h = p.H + p.R * p.dilation_h + p.pad_h
    reach_w = p.W + p.S * p.dilation_w + p.pad_w
    return needs_int64((p.N, p.x_n), (reach_h, p.x_h), (reach_w, p.x_w), (p.C, 1))


def _y_int64(p: Conv2dProblem) -> bool:
    reach_h = p.P + p.R * p.dilation_h + p.pad_h
    reach_w = p.Q + p.S * p.dilation_w + p.pad_w
    return needs_int64((p.N, p.y_n), (reach_h, p.y_h), (reach_w, p.y_w), (p.K, 1))


def _int64(p: Conv2dProblem) -> bool:
    weights = needs_int64((p.K, p.w_k), (p.C // p.G, p.w_c), (p.R, p.w_r), (p.S, p.w_s))
    return _x_int64(p) or _y_int64(p) or weights


def _pointwise(p: Conv2dProblem) -> bool:
    """1×1 at stride 1 without padding, over pixels that lie at one distance: a plain matrix product."""
    same_map = p.R == p.S == p.stride_h == p.stride_w == 1 and p.pad_h == p.pad_w == 0 and (p.P, p.Q) == (p.H, p.W)
    even_x = (p.H == 1 or p.x_h == p.W * p.x_w) and (p.N == 1 or p.x_n == p.H * p.W * p.x_w)
    return same_map and even_x and _even(p, p.y_n, p.y_h, p.y_w)


def _even(p: Conv2dProblem, n: int, h: int, w: int) -> bool:
    """Whether the pixels of y, or of what lies over it, lie at one distance."""
    return (p.Q == 0 or p.P == 1 or h == p.Q * w) and (p.N == 1 or n == p.P * p.Q * w)


def _vectors(p: Conv2dProblem, *tensors: torch.Tensor, unit: int) -> bool:
    """Whether Triton sees that every operand is aligned: it looks for multiples of 16, and for w's unit stride."""
    strides = [p.x_n, p.x_h, p.x_w, p.y_n, p.y_h, p.y_w, p.C // p.G, p.K // p.G]
    strides += [stride for stride in (p.w_k, p.w_c, p.w_r, p.w_s) if stride != 1]
    return unit == 1 and all(s % 16 == 0 for s in strides) and all(t.data_ptr() % 16 == 0 for t in tensors)


def _input_precision(p: Conv2dProblem, dtype: torch.dtype) -> str:
    # 16-bit products are exact in fp32: one spelling for all modes, one compilation.
    return INPUT_PRECISION[p.precision] if dtype == torch.float32 else "tf32"


def _gather(
    p: Conv2dProblem, src: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, out: torch.Tensor,
    tile: Config | None, *, transposed: bool, scale: torch.Tensor | None = None, shift: torch.Tensor | None = None,
    r: torch.Tensor | None = None, act: int = 0,
) -> None:  # fmt: skip
    """Launches _gather_gemm: fprop from x to y, or transposed, dgrad from y to x."""
    x_side = (p.H, p.W, p.C // p.G, p.x_n, p.x_h, p.x_w)
    y_side = (p.P, p.Q, p.K // p.G, p.y_n, p.y_h, p.y_w)
    src_h, src_w, c_src, src_n, src_row, src_col = y_side if transposed else x_side
    out_h, out_w, c_out, out_n, out_row, out_col = x_side if transposed else y_side
    w_src, w_out = (p.w_k, p.w_c) if transposed else (p.w_c, p.w_k)
    phases = (p.stride_h, p.stride_w) if transposed else (1, 1)
    pixels = p.N * ceil_div(out_h, phases[0]) * ceil_div(out_w, phases[1])
    if pixels == 0 or c_out == 0:
        return
    launches = p.G * phases[0] * phases[1]
    res = (p.r_n, p.r_h, p.r_w) if r is not None else (0, 0, 0)
    linear = _pointwise(p) and (r is None or _even(p, *res))
    packed = not linear and c_src < PACKED_CHANNELS
    if tile is None:
        depth = c_src * p.R * p.S if packed else c_src
        vectors = not packed and _vectors(p, src, w, out, unit=w_out if transposed else w_src)
        itemsize, arch = src.element_size(), capability(src)
        tile = config(pixels * launches, c_out, depth, p.precision, itemsize, vectors, arch, r is not None)
    gcd_h, gcd_w = math.gcd(p.stride_h, p.dilation_h), math.gcd(p.stride_w, p.dilation_w)
    grid = ceil_div(pixels, tile.block_m) * ceil_div(c_out, tile.block_n) * launches
    with on_device(src):
        launch(
            _gather_gemm, grid,
            src, w, b, scale, shift, r, out,
            p.N, out_h, out_w, src_h, src_w, c_src, c_out, p.G, p.R, p.S,
            p.stride_h, p.stride_w, p.pad_h, p.pad_w, p.dilation_h, p.dilation_w, gcd_h, gcd_w,
            _inverse(p.dilation_h // gcd_h, p.stride_h // gcd_h), _inverse(p.dilation_w // gcd_w, p.stride_w // gcd_w),
            src_n, src_row, src_col, p.K // p.G * p.w_k, w_src, w_out, p.w_r, p.w_s, out_n, out_row, out_col,
            *res, ACT=act, TRANSPOSED=transposed and not linear, LINEAR=linear,
            PACKED=packed, EVEN_K=c_src % tile.block_k == 0 and not packed, HAS_BIAS=b is not None,
            INT64=_int64(p) or needs_int64((p.N, res[0]), (p.P, res[1]), (p.Q, res[2]), (p.K, 1)),
            INPUT_PRECISION=_input_precision(p, src.dtype), BY_HAND=by_hand(src.dtype),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip


def _inverse(a: int, modulus: int) -> int:
    return pow(a, -1, modulus) if modulus > 1 else 0


def fprop(
    p: Conv2dProblem, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, y: torch.Tensor,
    scale: torch.Tensor | None = None, shift: torch.Tensor | None = None, r: torch.Tensor | None = None,
    *, tile: Config | None = None,
) -> None:  # fmt: skip
    """Writes y: conv2d's, or with the operands after it conv_bn_act's."""
    _gather(p, x, w, b, y, tile, transposed=False, scale=scale, shift=shift, r=r, act=p.act)


def dgrad(
    p: Conv2dProblem, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, y: torch.Tensor,
    *, tile: Config | None = None,
) -> None:  # fmt: skip
    """Writes x, the input's gradient, from y, the output's."""
    _gather(p, y, w, None, x, tile, transposed=True)


def _wgrad_splits(p: Conv2dProblem) -> int:
    tiles = p.G * ceil_div(p.K // p.G, SPLIT_TILE) * ceil_div(p.R * p.S * (p.C // p.G), SPLIT_TILE)
    return max(1, min(SPLIT_PROGRAMS // max(1, tiles), p.N * p.P * p.Q // SPLIT_PIXELS))


def _bgrad_splits(p: Conv2dProblem) -> int:
    return max(1, min(SPLIT_PROGRAMS // ceil_div(p.K, BGRAD_BLOCK_N), p.N * p.P * p.Q // SPLIT_PIXELS))


def wgrad_workspace(p: Conv2dProblem) -> int:
    """Bytes that wgrad needs."""
    splits = _wgrad_splits(p)
    return 4 * splits * p.K * (p.C // p.G) * p.R * p.S if splits > 1 else 0


def bgrad_workspace(p: Conv2dProblem) -> int:
    """Bytes that bgrad needs."""
    splits = _bgrad_splits(p)
    return 4 * splits * p.K if splits > 1 else 0


def _chunks(workspace: torch.Tensor | None, size: int) -> torch.Tensor | None:
    """The workspace as fp32."""
    if size == 0:
        return None
    if workspace is None or workspace.numel() * workspace.element_size() < size:
        raise ValueError(f"a workspace of {size} bytes is needed")
    return workspace.view(torch.float32)


def wgrad(
    p: Conv2dProblem, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, y: torch.Tensor,
    *, workspace: torch.Tensor | None = None, tile: Config | None = None,
) -> None:  # fmt: skip
    """Writes w, the weight's gradient, from x and y, the output's gradient."""
    c_src, c_out, columns = p.C // p.G, p.K // p.G, p.R * p.S * (p.C // p.G)
    if p.K * columns == 0:
        return
    splits = _wgrad_splits(p)
    chunks = _chunks(workspace, wgrad_workspace(p))
    if tile is None:
        m, vectors = c_out * p.G * splits, _vectors(p, x, y, unit=1)
        tile = config(m, columns, 0, p.precision, x.element_size(), vectors, capability(x))
    packed = p.R * p.S > 1 and c_src % tile.block_n != 0  # a tile then crosses taps, and wastes no column
    num_n = ceil_div(columns, tile.block_n) if packed else p.R * p.S * ceil_div(c_src, tile.block_n)
    grid = ceil_div(c_out, tile.block_m) * num_n * p.G * splits
    with on_device(x):
        launch(
            _wgrad_gemm, grid,
            x, y, w, chunks,
            p.N, p.P, p.Q, p.H, p.W, c_src, c_out, p.G, p.R, p.S,
            p.stride_h, p.stride_w, p.pad_h, p.pad_w, p.dilation_h, p.dilation_w,
            splits, ceil_div(p.N * p.P * p.Q, splits),
            p.x_n, p.x_h, p.x_w, p.w_k, p.w_c, p.w_r, p.w_s, p.y_n, p.y_h, p.y_w,
            SPLIT=splits > 1, LINEAR=_pointwise(p), PACKED=packed, INT64=_int64(p),
            INPUT_PRECISION=_input_precision(p, x.dtype), BY_HAND=by_hand(x.dtype),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if splits > 1:
            total = p.K * columns
            launch(
                _sum_splits, ceil_div(total, REDUCE_BLOCK),
                chunks, w, splits, total, columns, c_src, p.S, p.w_k, p.w_c, p.w_r, p.w_s,
                INT64=_int64(p), BY_HAND=by_hand(w.dtype), BLOCK=REDUCE_BLOCK,
                num_warps=4,
            )  # fmt: skip


def bgrad(
    p: Conv2dProblem, x: torch.Tensor | None, w: torch.Tensor | None, b: torch.Tensor, y: torch.Tensor,
    *, workspace: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Writes b, the bias's gradient, from y, the output's gradient."""
    if p.K == 0:
        return
    splits = _bgrad_splits(p)
    chunks = _chunks(workspace, bgrad_workspace(p))
    pixels = p.N * p.P * p.Q
    with on_device(y):
        launch(
            _bgrad_partial, ceil_div(p.K, BGRAD_BLOCK_N) * splits,
            y, b, chunks, pixels, p.P * p.Q, p.Q, p.K, splits, ceil_div(pixels, splits), p.y_n, p.y_h, p.y_w,
            SPLIT=splits > 1, INT64=_y_int64(p), BY_HAND=by_hand(y.dtype),
            BLOCK_M=BGRAD_BLOCK_M, BLOCK_N=BGRAD_BLOCK_N, num_warps=4,
        )  # fmt: skip
        if splits > 1:
            launch(
                _sum_splits, ceil_div(p.K, REDUCE_BLOCK),
                chunks, b, splits, p.K, 1, 1, 1, 1, 0, 0, 0,
                INT64=False, BY_HAND=by_hand(b.dtype), BLOCK=REDUCE_BLOCK, num_warps=4,
            )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Tables

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS: dict[str, Callable[..., None]] = {"fprop": fprop, "dgrad": dgrad, "wgrad": wgrad, "bgrad": bgrad}
WORKSPACE: dict[str, Callable[[Conv2dProblem], int]] = {"wgrad": wgrad_workspace, "bgrad": bgrad_workspace}
