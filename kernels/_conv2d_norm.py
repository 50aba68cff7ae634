"""Device code of batch norms fused into a convolution: of what it reads, and the sums over what it writes.

A tile of results leaves one row of sums a channel in the workspace. Rows are merged in two steps, always in the same
order: _merge_tiles and _add_tiles make rows of many out of those of single tiles, batch_norm's kernels end with these.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._activation import activate
from ._batch_norm import _factors, _normalised
from ._common import narrow, widen

SMALL, LARGE = tl.constexpr(2.0**-64), tl.constexpr(2.0**64)


@triton.jit
def batch_normed(
    a, inside, channel, in_c, mean, invstd, gamma, beta, ACT: tl.constexpr, BY_HAND: tl.constexpr
):  # fmt: skip
    """act(batch norm) of a loaded tile of pixels × channels, rounded as batch_norm would have stored it; 0 outside."""
    mean, _, scale, bias = _factors(gamma, beta, mean, invstd, channel, in_c, 0, True)
    z = _normalised(widen(a, BY_HAND).to(tl.float32) - mean, scale, bias)
    return narrow(tl.where(inside, activate(z, ACT), 0.0), a.dtype, BY_HAND)


@triton.jit
def tile_statistics(value, in_m, at, tile, tiles, channels, in_n):
    """Stores a tile's origin, near its mean, the sum of the distances from it, and the root of the sum of their squares.

    A constant channel has its value as origin. Where a square overflows, distances are scaled: the root never overflows.
    """
    row = tl.arange(0, value.shape[0])
    begin = tl.sum(tl.where((row == 0)[:, None], value, 0.0), axis=0)
    samples = tl.maximum(tl.sum(in_m.to(tl.int32), axis=0), 1).to(tl.float32)
    origin = begin + tl.sum(tl.where(in_m[:, None], value - begin[None, :], 0.0), axis=0) / samples
    origin = tl.where(origin - origin == 0.0, origin, 0.0)  # neither Inf nor NaN
    distance = tl.where(in_m[:, None], value - origin[None, :], 0.0)
    root = tl.sqrt_rn(tl.sum(distance * distance, axis=0))
    if tl.sum((root - root != 0.0).to(tl.int32), axis=0) > 0:
        scaled = distance * SMALL
        root = tl.sqrt_rn(tl.sum(scaled * scaled, axis=0)) * LARGE
    at += tile * channels
    tl.store(at, origin, mask=in_n)
    tl.store(at + tiles * channels, tl.sum(distance, axis=0), mask=in_n)
    tl.store(at + 2 * tiles * channels, root, mask=in_n)


@triton.jit
def gradient_sums(dz, xhat, inside, at, tile, tiles, channels, in_n):
    """Stores a tile's sums of dz and of dz * xhat."""
    dz = tl.where(inside, dz, 0.0)
    at += tile * channels
    tl.store(at, tl.sum(dz, axis=0), mask=in_n)
    tl.store(at + tiles * channels, tl.sum(tl.where(inside, dz * xhat, 0.0), axis=0), mask=in_n)


@triton.jit(do_not_specialize=["pixels", "tiles", "chunk", "splits"])
def _merge_tiles(
    tile_sums, workspace, pixels, channels, tiles, chunk, splits, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The sums of BLOCK_S tiles of chunk pixels each, moved to one origin: what batch_norm's _merge_stats reads."""
    split = tl.program_id(0) % splits
    channel = tl.program_id(0) // splits * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = channel < channels
    tile = split * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = (tile < tiles)[:, None] & in_c[None, :]
    at = tile_sums + tile[:, None] * channels + channel[None, :]
    origin = tl.load(tile_sums + split * BLOCK_S * channels + channel, mask=in_c, other=0.0).to(tl.float64)
    distance = tl.load(at, mask=inside, other=0.0).to(tl.float64) - origin[None, :]
    distance = tl.where(inside, distance, 0.0)
    total = tl.load(at + tiles * channels, mask=inside, other=0.0).to(tl.float64)
    root = tl.load(at + 2 * tiles * channels, mask=inside, other=0.0).to(tl.float64)
    moved = tl.minimum(pixels - tile * chunk, chunk).to(tl.float64)[:, None] * distance
    out = workspace + split * channels + channel
    tl.store(out, origin, mask=in_c)
    tl.store(out + splits * channels, tl.sum(total + moved, axis=0), mask=in_c)
    tl.store(out + 2 * splits * channels, tl.sum(root * root + distance * (2.0 * total + moved), axis=0), mask=in_c)


@triton.jit(do_not_specialize=["tiles", "splits"])
def _add_tiles(tile_sums, workspace, channels, tiles, splits, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sums of BLOCK_S tiles: what batch_norm's _add_sums reads."""
    split = tl.program_id(0) % splits
    channel = tl.program_id(0) // splits * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = channel < channels
    tile = split * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = (tile < tiles)[:, None] & in_c[None, :]
    at = tile_sums + tile[:, None] * channels + channel[None, :]
    out = workspace + split * channels + channel
    biases = tl.load(at, mask=inside, other=0.0)
    weights = tl.load(at + tiles * channels, mask=inside, other=0.0)
    tl.store(out, tl.sum(biases, axis=0), mask=in_c)
    tl.store(out + splits * channels, tl.sum(weights, axis=0), mask=in_c)
