"""Device code of conv2d_implicit_gemm's wgrad and bgrad: sums over the pixels, in chunks that are added up in order."""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import narrow, widen
from ._conv2d_norm import batch_normed
from ._gemm import NOWHERE, accumulate, on_map, tile_order, wide


@triton.jit
def _coordinates(pixel, height, width):
    """Image, row and column of a pixel by its number."""
    image = pixel // (height * width)
    inside = pixel - image * (height * width)
    row = inside // width
    return image, row, inside - row * width


@triton.jit(do_not_specialize=["batch", "out_h", "out_w", "src_h", "src_w", "taps_r", "taps_s", "pad_h", "pad_w",
                               "splits", "chunk"])  # fmt: skip
def _wgrad_gemm(
    x, grad, mean, invstd, gamma, beta, out, workspace,
    batch, out_h, out_w, src_h, src_w, c_src, c_out, groups, taps_r, taps_s,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, each_src, each_out, splits, chunk,
    src_n, src_row, src_col, w_k, w_c, w_r, w_s, out_n, out_row, out_col,
    SPLIT: tl.constexpr, LINEAR: tl.constexpr, EVEN: tl.constexpr, DIAGONAL: tl.constexpr, PACKED: tl.constexpr, INT64: tl.constexpr,
    NORM_ACT: tl.constexpr, NORM_SOURCE: tl.constexpr, INPUT_PRECISION: tl.constexpr, BY_HAND: tl.constexpr,
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
    tile_m, tile_n = tile_order(pid % (num_m * num_n), num_m, num_n, GROUP_M)

    src_n, src_row, src_col = wide(INT64, src_n, src_row, src_col)
    out_n, out_row, out_col = wide(INT64, out_n, out_row, out_col)
    w_k, w_c, w_r = wide(INT64, w_k, w_c, w_r)
    w_s, _, _ = wide(INT64, w_s, 0, 0)

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
    # Rows and columns of x advance by BLOCK_K pixels with carries: a division a pixel costs more than its products.
    image, p, q = _coordinates(first + lane, out_h, out_w)
    images = BLOCK_K // (out_h * out_w)
    rows = BLOCK_K % (out_h * out_w) // out_w
    columns = BLOCK_K % out_w
    for m0 in range(first, last, BLOCK_K):
        pixel = m0 + lane
        in_k = pixel < last
        if LINEAR:
            x_pixel = pixel * src_col
            valid = in_k[:, None] & in_n[None, :]
        else:
            x_pixel = image * src_n + p * stride_h * src_row + q * stride_w * src_col
            i = tl.where(in_k, p * stride_h, NOWHERE)
            j = q * stride_w
            if PACKED:
                inside_map = on_map(i[:, None] + tap_i[None, :], src_h) & on_map(j[:, None] + tap_j[None, :], src_w)
                valid = inside_map & in_n[None, :]
            else:
                valid = (on_map(i + tap_i, src_h) & on_map(j + tap_j, src_w))[:, None] & in_n[None, :]
        if EVEN:
            g_pixel = pixel * out_col
        else:
            g_image, g_row, g_column = _coordinates(pixel, out_h, out_w)
            g_pixel = g_image * out_n + g_row * out_row + g_column * out_col
        a = tl.load(grad + (k[:, None] + g_pixel[None, :]), mask=in_m[:, None] & in_k[None, :], other=0.0)
        b = tl.load(x + (x_pixel[:, None] + x_column[None, :]), mask=valid, other=0.0)
        if NORM_SOURCE:
            b = batch_normed(b, valid, group * c_src + c, in_n, mean, invstd, gamma, beta, NORM_ACT, BY_HAND)
        acc = accumulate(a, b, acc, INPUT_PRECISION, BY_HAND)
        if not LINEAR:
            q += columns
            carry = q >= out_w
            q = tl.where(carry, q - out_w, q)
            p += rows + carry.to(tl.int32)
            carry = p >= out_h
            p = tl.where(carry, p - out_h, p)
            image += images + carry.to(tl.int32)

    inside_tile = in_m[:, None] & in_n[None, :]
    if DIAGONAL:
        # Several groups in a tile: what belongs together lies on its diagonal.
        inside_tile &= (k // each_out)[:, None] == (c // each_src)[None, :]
        c = c % each_src
        c_src = each_src
    if SPLIT:
        row = tl.cast((split * groups + group) * c_out + k, tl.int64)
        tl.store(
            workspace + (row[:, None] * (taps_r * taps_s * c_src) + (tap * c_src + c)[None, :]), acc, mask=inside_tile
        )
    else:
        target = ((group * c_out + k) * w_k)[:, None] + (r * w_r + s * w_s + c * w_c)[None, :]
        tl.store(out + target, narrow(acc, out.dtype.element_ty, BY_HAND), mask=inside_tile)


@triton.jit(do_not_specialize=["pixels", "out_h", "out_w", "splits", "chunk"])
def _bgrad_partial(
    grad, out, workspace, pixels, out_h, out_w, channels, splits, chunk, out_n, out_row, out_col,
    SPLIT: tl.constexpr, INT64: tl.constexpr, BY_HAND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0) % splits
    k = tl.program_id(0) // splits * BLOCK_N + tl.arange(0, BLOCK_N)
    out_n, out_row, out_col = wide(INT64, out_n, out_row, out_col)
    first = split * chunk
    last = tl.minimum(first + chunk, pixels)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for m0 in range(first, last, BLOCK_M):
        pixel = m0 + tl.arange(0, BLOCK_M)
        image, p, q = _coordinates(pixel, out_h, out_w)
        offset = image * out_n + p * out_row + q * out_col
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
    w_k, w_c, w_r = wide(INT64, w_k, w_c, w_r)
    w_s, _, _ = wide(INT64, w_s, 0, 0)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(splits):
        acc += tl.load(workspace + tl.cast(split, tl.int64) * total + element, mask=valid, other=0.0)
    target = row * w_k + (column - tap * c_src) * w_c + r * w_r + (tap - r * taps_s) * w_s
    tl.store(out + target, narrow(acc, out.dtype.element_ty, BY_HAND), mask=valid)
