"""The device code of batch_norm: statistics, result and gradient of tiles of pixels × channels; its launchers say the rest."""

from __future__ import annotations

import triton
import triton.language as tl

from ._activation import NONE, activate, activate_gradient
from ._common import narrow, pixel_offset, widen


@triton.jit
def _read(tensor, at, mask, BY_HAND: tl.constexpr):
    return widen(tl.load(tensor + at, mask=mask, other=0.0), BY_HAND).to(tl.float32)


@triton.jit
def _block(channels, BLOCK_C: tl.constexpr):
    """Which tile or chunk of pixels a program has, its channels, and which of them exist."""
    blocks_c = tl.cdiv(channels, BLOCK_C)
    channel = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    return tl.program_id(0) // blocks_c, channel, channel < channels


@triton.jit
def _chunk(split, chunk, pixels, INT64: tl.constexpr):
    """The first pixel of a chunk, and the one after its last."""
    first = split * chunk
    last = tl.minimum(first + chunk, pixels)
    if INT64:
        first = tl.cast(first, tl.int64)
        last = tl.cast(last, tl.int64)
    return first, last


@triton.jit
def _tile(tile, pixels, in_c, INT64: tl.constexpr, BLOCK_M: tl.constexpr):
    """The pixels of a tile, and which of its elements exist."""
    if INT64:
        tile = tl.cast(tile, tl.int64)
    pixel = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    return pixel, (pixel < pixels)[:, None] & in_c[None, :]


@triton.jit
def _at(pixel, channel, height, width, stride_n, stride_h, stride_w, DENSE: tl.constexpr):
    """Where the elements of a tile lie."""
    return pixel_offset(pixel, height, width, stride_n, stride_h, stride_w, DENSE)[:, None] + channel[None, :]


@triton.jit
def _epsilon(bits):
    return tl.cast(bits, tl.int64).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["pixels", "height", "width", "splits", "chunk"])
def _stats(
    x, workspace, pixels, channels, height, width, splits, chunk, x_n, x_h, x_w,
    DENSE: tl.constexpr, INT64: tl.constexpr, BY_HAND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    split, channel, in_c = _block(channels, BLOCK_C)
    first, last = _chunk(split, chunk, pixels, INT64)
    pixel = first + tl.arange(0, BLOCK_M)
    inside = (pixel < last)[:, None] & in_c[None, :]
    here = pixel_offset(first, height, width, x_n, x_h, x_w, DENSE)
    begin = _read(x, here + channel, in_c & (first < last), BY_HAND)
    at = _at(pixel, channel, height, width, x_n, x_h, x_w, DENSE)
    tile = tl.where(inside, _read(x, at, inside, BY_HAND) - begin[None, :], 0.0)
    samples = tl.maximum(tl.minimum(last - first, BLOCK_M), 1)
    origin = begin + tl.sum(tile, axis=0) / samples.to(tl.float32)
    origin = tl.where(origin - origin == 0.0, origin, 0.0)  # neither Inf nor NaN

    sums = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for m0 in range(first, last, BLOCK_M):
        pixel = m0 + tl.arange(0, BLOCK_M)
        inside = (pixel < last)[:, None] & in_c[None, :]
        at = _at(pixel, channel, height, width, x_n, x_h, x_w, DENSE)
        distance = tl.where(inside, _read(x, at, inside, BY_HAND) - origin[None, :], 0.0)
        sums += distance
        squares += distance * distance
    total = tl.sum(sums.to(tl.float64), axis=0)
    square = tl.sum(squares.to(tl.float64), axis=0)
    if tl.sum((square - square != 0.0).to(tl.int32), axis=0) > 0:
        total = tl.zeros((BLOCK_C,), dtype=tl.float64)
        square = tl.zeros((BLOCK_C,), dtype=tl.float64)
        for m0 in range(first, last, BLOCK_M):
            pixel = m0 + tl.arange(0, BLOCK_M)
            inside = (pixel < last)[:, None] & in_c[None, :]
            at = _at(pixel, channel, height, width, x_n, x_h, x_w, DENSE)
            exact = _read(x, at, inside, BY_HAND).to(tl.float64) - origin.to(tl.float64)[None, :]
            exact = tl.where(inside, exact, 0.0)
            total += tl.sum(exact, axis=0)
            square += tl.sum(exact * exact, axis=0)

    at = workspace + split * channels + channel
    tl.store(at, origin.to(tl.float64), mask=in_c)
    tl.store(at + splits * channels, total, mask=in_c)
    tl.store(at + 2 * splits * channels, square, mask=in_c)


@triton.jit(do_not_specialize=["pixels", "splits", "chunk", "eps_bits"])
def _merge_stats(
    workspace, m, v, s, pixels, channels, splits, chunk, eps_bits, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):
    """m, v and s from the chunks' sums, moved to the first chunk's origin."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = channel < channels
    origin = tl.load(workspace + channel, mask=in_c, other=0.0)
    sums = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float64)
    squares = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float64)
    for s0 in range(0, splits, BLOCK_S):
        split = s0 + tl.arange(0, BLOCK_S)
        inside = (split < splits)[:, None] & in_c[None, :]
        at = workspace + split[:, None] * channels + channel[None, :]
        distance = tl.where(inside, tl.load(at, mask=inside, other=0.0) - origin[None, :], 0.0)
        total = tl.load(at + splits * channels, mask=inside, other=0.0)
        square = tl.load(at + 2 * splits * channels, mask=inside, other=0.0)
        moved = tl.minimum(pixels - split * chunk, chunk).to(tl.float64)[:, None] * distance
        sums += total + moved
        squares += square + distance * (2.0 * total + moved)
    total = tl.sum(sums, axis=0)
    count = tl.maximum(pixels, 1).to(tl.float64)
    shift = total / count
    moment = tl.sum(squares, axis=0) - total * shift
    moment = tl.where(moment < 0.0, 0.0, moment)  # a NaN stays
    invstd = 1.0 / tl.sqrt(moment / count + _epsilon(eps_bits))
    tl.store(m + channel, (origin + shift).to(tl.float32), mask=in_c)
    tl.store(v + channel, invstd.to(tl.float32), mask=in_c)
    tl.store(s + channel, (moment / tl.maximum(pixels - 1, 1).to(tl.float64)).to(tl.float32), mask=in_c)


@triton.jit
def _factors(w, b, m, v, channel, in_c, eps_bits, TRAINING: tl.constexpr):
    """Mean, 1 / standard deviation, that times the weight, and the bias of some channels."""
    mean = tl.zeros(channel.shape, dtype=tl.float32)
    invstd = mean + 1.0
    bias = mean
    if m is not None:
        mean = tl.load(m + channel, mask=in_c, other=0.0)
    if v is not None:
        given = tl.load(v + channel, mask=in_c, other=1.0)
        if TRAINING:
            invstd = given
        else:
            invstd = tl.div_rn(invstd, tl.sqrt_rn(given + _epsilon(eps_bits).to(tl.float32)))
    scale = invstd
    if w is not None:
        scale = invstd * tl.load(w + channel, mask=in_c, other=0.0)
    if b is not None:
        bias = tl.load(b + channel, mask=in_c, other=0.0)
    return mean[None, :], invstd[None, :], scale[None, :], bias[None, :]


@triton.jit
def _normalised(centred, scale, bias):
    # The same instruction in every direction: the gradient finds the very value that fprop's activation saw.
    return tl.fma(centred, tl.broadcast_to(scale, centred.shape), tl.broadcast_to(bias, centred.shape))


@triton.jit(do_not_specialize=["pixels", "height", "width", "eps_bits"])
def _apply(
    x, w, b, m, v, r, y, pixels, channels, height, width, eps_bits,
    x_n, x_h, x_w, r_n, r_h, r_w, y_n, y_h, y_w,
    ACT: tl.constexpr, TRAINING: tl.constexpr, DENSE: tl.constexpr, INT64: tl.constexpr, BY_HAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tile, channel, in_c = _block(channels, BLOCK_C)
    pixel, inside = _tile(tile, pixels, in_c, INT64, BLOCK_M)
    at = _at(pixel, channel, height, width, x_n, x_h, x_w, DENSE)
    value = _read(x, at, inside, BY_HAND)
    if r is not None:
        at = _at(pixel, channel, height, width, r_n, r_h, r_w, DENSE)
        residual = _read(r, at, inside, BY_HAND)
    mean, _, scale, bias = _factors(w, b, m, v, channel, in_c, eps_bits, TRAINING)
    value = _normalised(value - mean, scale, bias)
    if r is not None:
        value += residual
    at = _at(pixel, channel, height, width, y_n, y_h, y_w, DENSE)
    tl.store(y + at, narrow(activate(value, ACT), y.dtype.element_ty, BY_HAND), mask=inside)


@triton.jit
def _before_activation(
    grad, r, centred, scale, bias, pixel, channel, inside, height, width, g_n, g_h, g_w, r_n, r_h, r_w,
    ACT: tl.constexpr, DENSE: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """dz of a tile; centred may be anything where act' comes from the result r or is 1."""
    at = _at(pixel, channel, height, width, g_n, g_h, g_w, DENSE)
    g = _read(grad, at, inside, BY_HAND)
    if ACT != NONE:
        if r is not None:
            at = _at(pixel, channel, height, width, r_n, r_h, r_w, DENSE)
            g = activate_gradient(g, _read(r, at, inside, BY_HAND), ACT)
        else:
            g = activate_gradient(g, _normalised(centred, scale, bias), ACT)
    return g


@triton.jit(do_not_specialize=["pixels", "height", "width", "splits", "chunk", "eps_bits"])
def _sums(
    x, w, b, m, v, r, grad, dw, db, u, workspace, pixels, channels, height, width, splits, chunk, eps_bits,
    x_n, x_h, x_w, r_n, r_h, r_w, g_n, g_h, g_w, u_n, u_h, u_w,
    ACT: tl.constexpr, TRAINING: tl.constexpr, DENSE: tl.constexpr, INT64: tl.constexpr, BY_HAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    split, channel, in_c = _block(channels, BLOCK_C)
    first, last = _chunk(split, chunk, pixels, INT64)
    mean, invstd, scale, bias = _factors(w, b, m, v, channel, in_c, eps_bits, TRAINING)
    biases = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    weights = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for m0 in range(first, last, BLOCK_M):
        pixel = m0 + tl.arange(0, BLOCK_M)
        inside = (pixel < last)[:, None] & in_c[None, :]
        at = _at(pixel, channel, height, width, x_n, x_h, x_w, DENSE)
        centred = _read(x, at, inside, BY_HAND) - mean
        dz = _before_activation(
            grad, r, centred, scale, bias, pixel, channel, inside, height, width, g_n, g_h, g_w, r_n, r_h, r_w,
            ACT, DENSE, BY_HAND,
        )  # fmt: skip
        biases += dz
        weights += dz * (centred * invstd)
        if u is not None:
            at = _at(pixel, channel, height, width, u_n, u_h, u_w, DENSE)
            tl.store(u + at, narrow(dz, u.dtype.element_ty, BY_HAND), mask=inside)
    bias_sum = tl.sum(biases.to(tl.float64), axis=0).to(tl.float32)
    weight_sum = tl.sum(weights.to(tl.float64), axis=0).to(tl.float32)
    if workspace is not None:
        tl.store(workspace + split * channels + channel, bias_sum, mask=in_c)
        tl.store(workspace + (splits + split) * channels + channel, weight_sum, mask=in_c)
    else:
        tl.store(db + channel, bias_sum, mask=in_c)
        tl.store(dw + channel, weight_sum, mask=in_c)


@triton.jit(do_not_specialize=["splits"])
def _add_sums(workspace, dw, db, channels, splits, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """The chunks' sums, added up in order."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = channel < channels
    biases = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float32)
    weights = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float32)
    for s0 in range(0, splits, BLOCK_S):
        split = s0 + tl.arange(0, BLOCK_S)
        inside = (split < splits)[:, None] & in_c[None, :]
        at = split[:, None] * channels + channel[None, :]
        biases += tl.load(workspace + at, mask=inside, other=0.0)
        weights += tl.load(workspace + splits * channels + at, mask=inside, other=0.0)
    tl.store(db + channel, tl.sum(biases, axis=0), mask=in_c)
    tl.store(dw + channel, tl.sum(weights, axis=0), mask=in_c)


@triton.jit(do_not_specialize=["pixels", "height", "width", "eps_bits"])
def _input_gradient(
    x, w, b, m, v, r, grad, dw, db, out, pixels, channels, height, width, eps_bits,
    x_n, x_h, x_w, r_n, r_h, r_w, g_n, g_h, g_w, out_n, out_h, out_w,
    ACT: tl.constexpr, TRAINING: tl.constexpr, DENSE: tl.constexpr, INT64: tl.constexpr, BY_HAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tile, channel, in_c = _block(channels, BLOCK_C)
    pixel, inside = _tile(tile, pixels, in_c, INT64, BLOCK_M)
    mean, invstd, scale, bias = _factors(w, b, m, v, channel, in_c, eps_bits, TRAINING)
    centred = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    if TRAINING or (ACT != NONE and r is None):
        at = _at(pixel, channel, height, width, x_n, x_h, x_w, DENSE)
        centred = _read(x, at, inside, BY_HAND) - mean
    dz = _before_activation(
        grad, r, centred, scale, bias, pixel, channel, inside, height, width, g_n, g_h, g_w, r_n, r_h, r_w,
        ACT, DENSE, BY_HAND,
    )  # fmt: skip
    if TRAINING:
        count = tl.zeros((BLOCK_C,), dtype=tl.float32) + pixels.to(tl.float32)
        mean_gradient = tl.div_rn(tl.load(db + channel, mask=in_c, other=0.0), count)
        mean_product = tl.div_rn(tl.load(dw + channel, mask=in_c, other=0.0), count)
        dz = dz - mean_gradient[None, :] - centred * invstd * mean_product[None, :]
    at = _at(pixel, channel, height, width, out_n, out_h, out_w, DENSE)
    tl.store(out + at, narrow(dz * scale, out.dtype.element_ty, BY_HAND), mask=inside)
