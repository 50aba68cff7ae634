"""Device code of Winograd's convolutions: transforms of filters and tiles, the products, and the ways back.

What they compute together, and what lies where, is said by the launchers' file, _conv2d_winograd.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._activation import activate
from ._common import narrow, widen
from ._conv2d_winograd_transform import transform
from ._gemm import accumulate, on_map, tile_order, wide


@triton.jit
def _places(tile, tiles_h, tiles_w, M: tl.constexpr):
    """Image and first pixel of tiles, by their numbers."""
    line = tile // tiles_w
    image = line // tiles_h
    return image, (line - image * tiles_h) * M, (tile - line * tiles_w) * M


@triton.jit
def _block(columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The rows and columns of a program."""
    blocks = tl.cdiv(columns, BLOCK_C)
    row = tl.program_id(0) // blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    return row, tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def _turned(weight, w_r, w_s, TURNED: tl.constexpr):
    """Where the first tap lies, and the distances between them; TURNED: from the last to the first."""
    if TURNED:
        return weight + 2 * (w_r + w_s), -w_r, -w_s
    else:
        return weight, w_r, w_s


@triton.jit
def _transform_filters(
    weight, out, filters, channels, depth, w_k, w_c, w_r, w_s,
    TURNED: tl.constexpr, M: tl.constexpr, INT64: tl.constexpr, BY_HAND: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """U [product][filter][channel], zero beyond the last channel."""
    P: tl.constexpr = M + 2
    k, c = _block(depth, BLOCK_R, BLOCK_C)
    w_k, w_c, w_r = wide(INT64, w_k, w_c, w_r)
    w_s, _, _ = wide(INT64, w_s, 0, 0)
    weight, w_r, w_s = _turned(weight, w_r, w_s, TURNED)
    in_k = k < filters
    valid = in_k[:, None] & (c < channels)[None, :]
    at = weight + ((k * w_k)[:, None] + (c * w_c)[None, :])
    taps = ()
    for i in tl.static_range(9):
        value = tl.load(at + i // 3 * w_r + i % 3 * w_s, mask=valid, other=0.0)
        taps += (widen(value, BY_HAND).to(tl.float32),)
    results = transform(taps, "filters", M, 3, P)
    to = out + (k[:, None] * depth + c[None, :])
    for i in tl.static_range(P * P):
        value = narrow(results[i], out.dtype.element_ty, BY_HAND)
        tl.store(to + i * filters * depth, value, mask=in_k[:, None] & (c < depth)[None, :])


@triton.jit(do_not_specialize=["first", "tiles", "rows", "tiles_h", "tiles_w", "height", "width", "pad_h", "pad_w"])
def _transform_tiles(
    src, out, first, tiles, rows, tiles_h, tiles_w, height, width, channels, pitch, pad_h, pad_w, src_n, src_row, src_col,
    WHAT: tl.constexpr, M: tl.constexpr, INT64: tl.constexpr, BY_HAND: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """V [product][tile][channel] of WHAT, "inputs" or "gradients": rows tiles from the first, zero beyond the last."""
    P: tl.constexpr = M + 2
    BEFORE: tl.constexpr = P if WHAT == "inputs" else M
    row, c = _block(pitch, BLOCK_R, BLOCK_C)
    src_n, src_row, src_col = wide(INT64, src_n, src_row, src_col)
    image, h, w = _places(first + row, tiles_h, tiles_w, M)
    h -= pad_h
    w -= pad_w
    at = src + (image * src_n + h * src_row + w * src_col)[:, None] + c[None, :]
    present = first + row < tiles
    values = ()
    for a in tl.static_range(BEFORE):
        inside = present & on_map(h + a, height)
        for b in tl.static_range(BEFORE):
            valid = (inside & on_map(w + b, width))[:, None] & (c < channels)[None, :]
            value = tl.load(at + a * src_row + b * src_col, mask=valid, other=0.0)
            values += (widen(value, BY_HAND).to(tl.float32),)
    results = transform(values, WHAT, M, BEFORE, P)
    to = out + (row[:, None] * pitch + c[None, :])
    written = (row < rows)[:, None] & (c < pitch)[None, :]
    for i in tl.static_range(P * P):
        tl.store(to + i * rows * pitch, narrow(results[i], out.dtype.element_ty, BY_HAND), mask=written)


@triton.jit(do_not_specialize=["depth"])
def _multiply(
    a, b, out, rows, columns, depth, pitch, a_product, b_product, a_row, a_depth, b_column, b_depth,
    ADD: tl.constexpr, INPUT_PRECISION: tl.constexpr, BY_HAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out [product][row][column] = the sum over the depth of a and b of that product; ADD: on top of what lies there.

    BLOCK_K divides the depth, which the transforms fill up with zeros. 16 divides the rows, and so do vectors.
    """
    num_m = tl.cdiv(rows, BLOCK_M)
    num_n = tl.cdiv(columns, BLOCK_N)
    product = tl.program_id(0) // (num_m * num_n)
    tile_m, tile_n = tile_order(tl.program_id(0) % (num_m * num_n), num_m, num_n, GROUP_M)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    in_m = row < rows
    in_n = column < columns
    a_ptrs = a + product * a_product + (row[:, None] * a_row + lane[None, :] * a_depth)
    b_ptrs = b + product * b_product + (lane[:, None] * b_depth + column[None, :] * b_column)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(0, depth, BLOCK_K):
        one = tl.load(a_ptrs, mask=in_m[:, None], other=0.0)
        other = tl.load(b_ptrs, mask=in_n[None, :], other=0.0)
        acc = accumulate(one, other, acc, INPUT_PRECISION, BY_HAND)
        a_ptrs += BLOCK_K * a_depth
        b_ptrs += BLOCK_K * b_depth
    at = out + product * rows * pitch + (row[:, None] * pitch + column[None, :])
    inside = in_m[:, None] & in_n[None, :]
    if ADD:
        acc += tl.load(at, mask=inside, other=0.0)
    tl.store(at, acc, mask=inside)


@triton.jit
def _finish(
    value, channel, in_c, inside, bias, scale, shift, residual, beside, to, ACT: tl.constexpr, BY_HAND: tl.constexpr
):  # fmt: skip
    """Bias, scale, shift, residual (which lies beside) and activation of a pixel of tiles; stores it."""
    if bias is not None:
        value += widen(tl.load(bias + channel, mask=in_c, other=0.0), BY_HAND).to(tl.float32)[None, :]
    if scale is not None:
        value *= tl.load(scale + channel, mask=in_c, other=0.0)[None, :]
    if shift is not None:
        value += tl.load(shift + channel, mask=in_c, other=0.0)[None, :]
    if residual is not None:
        value += widen(tl.load(residual + beside, mask=inside, other=0.0), BY_HAND).to(tl.float32)
    tl.store(to, narrow(activate(value, ACT), to.dtype.element_ty, BY_HAND), mask=inside)


@triton.jit(do_not_specialize=["first", "tiles", "rows", "tiles_h", "tiles_w", "height", "width", "out_h", "out_w",
                               "pad_h", "pad_w"])  # fmt: skip
def _transform_outputs(
    products, src, weight, bias, scale, shift, residual, out,
    first, tiles, rows, tiles_h, tiles_w, height, width, out_h, out_w, channels, filters, pitch, pad_h, pad_w,
    src_n, src_row, src_col, w_k, w_c, w_r, w_s, out_n, out_row, out_col, res_n, res_row, res_col,
    ACT: tl.constexpr, TURNED: tl.constexpr, M: tl.constexpr, INT64: tl.constexpr, BY_HAND: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """M x M pixels of each tile and filter of its products; what isn't finite is summed directly."""
    P: tl.constexpr = M + 2
    row, k = _block(filters, BLOCK_R, BLOCK_C)
    in_k = k < filters
    in_row = (row < rows) & (first + row < tiles)
    at = products + (row[:, None] * pitch + k[None, :])
    values = ()
    for i in tl.static_range(P * P):
        values += (tl.load(at + i * rows * pitch, mask=in_row[:, None] & in_k[None, :], other=0.0),)
    results = transform(values, "outputs", M, P, M)

    src_n, src_row, src_col = wide(INT64, src_n, src_row, src_col)
    w_k, w_c, w_r = wide(INT64, w_k, w_c, w_r)
    w_s, _, _ = wide(INT64, w_s, 0, 0)
    weight, w_r, w_s = _turned(weight, w_r, w_s, TURNED)
    out_n, out_row, out_col = wide(INT64, out_n, out_row, out_col)
    res_n, res_row, res_col = wide(INT64, res_n, res_row, res_col)
    image, p, q = _places(first + row, tiles_h, tiles_w, M)
    to = out + (image * out_n + p * out_row + q * out_col)[:, None] + k[None, :]
    beside = (image * res_n + p * res_row + q * res_col)[:, None] + k[None, :]
    check = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)  # stays zero where everything is finite
    for i in tl.static_range(M * M):
        check += results[i] - results[i]
    bad = check != 0.0
    for i in tl.static_range(M * M):
        inside = (in_row & (p + i // M < out_h) & (q + i % M < out_w))[:, None] & in_k[None, :]
        _finish(
            results[i], k, in_k, inside & (check == 0.0), bias, scale, shift, residual,
            beside + i // M * res_row + i % M * res_col, to + i // M * out_row + i % M * out_col, ACT, BY_HAND,
        )  # fmt: skip
    if tl.sum(tl.sum(bad.to(tl.int32), axis=1), axis=0) > 0:
        for pixel in range(0, M * M):
            down = pixel // M
            right = pixel % M
            total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
            for d0 in range(0, 9 * channels, BLOCK_D):
                d = d0 + tl.arange(0, BLOCK_D)
                tap = d // channels
                c = d - tap * channels
                r = tap // 3
                s = tap - r * 3
                in_d = r < 3
                h = (p + down - pad_h)[:, None] + r[None, :]
                w = (q + right - pad_w)[:, None] + s[None, :]
                valid = on_map(h, height) & on_map(w, width) & in_row[:, None] & in_d[None, :]
                x_at = src + ((image * src_n)[:, None] + h * src_row + w * src_col + c[None, :])
                x = widen(tl.load(x_at, mask=valid, other=0.0), BY_HAND).to(tl.float32)
                w_at = weight + ((r * w_r + s * w_s + c * w_c)[:, None] + (k * w_k)[None, :])
                g = widen(tl.load(w_at, mask=in_d[:, None] & in_k[None, :], other=0.0), BY_HAND).to(tl.float32)
                # what lies in the padding has no part in the sum, whatever its weight
                total += tl.sum(tl.where(valid[:, :, None], x[:, :, None] * g[None, :, :], 0.0), axis=1)
            on = (in_row & (p + down < out_h) & (q + right < out_w))[:, None] & in_k[None, :] & bad
            _finish(
                total, k, in_k, on, bias, scale, shift, residual,
                beside + down * res_row + right * res_col, to + down * out_row + right * out_col, ACT, BY_HAND,
            )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "height", "width", "out_h", "out_w", "pad_h", "pad_w"])
def _transform_weights(
    products, src, grad, out,
    batch, height, width, out_h, out_w, channels, filters, rows, pitch, pad_h, pad_w,
    src_n, src_row, src_col, out_n, out_row, out_col, w_k, w_c, w_r, w_s,
    M: tl.constexpr, INT64: tl.constexpr, BY_HAND: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The 3 x 3 taps of each filter and channel of its products; what isn't finite is summed directly."""
    P: tl.constexpr = M + 2
    k, c = _block(channels, BLOCK_R, BLOCK_C)
    in_k = k < filters
    in_c = c < channels
    inside = in_k[:, None] & in_c[None, :]
    at = products + (k[:, None] * pitch + c[None, :])
    values = ()
    for i in tl.static_range(P * P):
        values += (tl.load(at + i * rows * pitch, mask=inside, other=0.0),)
    results = transform(values, "taps", M, P, 3)
    src_n, src_row, src_col = wide(INT64, src_n, src_row, src_col)
    out_n, out_row, out_col = wide(INT64, out_n, out_row, out_col)
    w_k, w_c, w_r = wide(INT64, w_k, w_c, w_r)
    w_s, _, _ = wide(INT64, w_s, 0, 0)
    to = out + ((k * w_k)[:, None] + (c * w_c)[None, :])
    check = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)  # stays zero where everything is finite
    for i in tl.static_range(9):
        check += results[i] - results[i]
    bad = check != 0.0
    for i in tl.static_range(9):
        value = narrow(results[i], out.dtype.element_ty, BY_HAND)
        tl.store(to + i // 3 * w_r + i % 3 * w_s, value, mask=inside & (check == 0.0))
    if tl.sum(tl.sum(bad.to(tl.int32), axis=1), axis=0) > 0:
        pixels = batch * out_h * out_w
        for tap in range(0, 9):
            total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
            for d0 in range(0, pixels, BLOCK_D):
                pixel = d0 + tl.arange(0, BLOCK_D)
                image = pixel // (out_h * out_w)
                rest = pixel - image * (out_h * out_w)
                p = rest // out_w
                q = rest - p * out_w
                h = p - pad_h + tap // 3
                w = q - pad_w + tap % 3
                valid = (pixel < pixels) & on_map(h, height) & on_map(w, width)
                g_at = grad + (image * out_n + p * out_row + q * out_col)[None, :] + k[:, None]
                g = widen(tl.load(g_at, mask=in_k[:, None] & valid[None, :], other=0.0), BY_HAND).to(tl.float32)
                x_at = src + (image * src_n + h * src_row + w * src_col)[:, None] + c[None, :]
                x = widen(tl.load(x_at, mask=valid[:, None] & in_c[None, :], other=0.0), BY_HAND).to(tl.float32)
                total += tl.sum(g[:, :, None] * x[None, :, :], axis=1)
            direct = narrow(total, out.dtype.element_ty, BY_HAND)
            tl.store(to + tap // 3 * w_r + tap % 3 * w_s, direct, mask=inside & bad)
