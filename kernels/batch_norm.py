"""Batch normalisation with a residual and an activation: statistics, result, and both halves of the gradient.

    stats           m[c] = mean of x, v[c] = 1 / sqrt(mean of (x - m)^2 + eps), s[c] = sum of (x - m)^2 / (count - 1)
    fprop           y = act((x - m) * v * w + b + r)
    wgrad           dw[c] = sum of dz * xhat, db[c] = sum of dz     dz = dy * act', xhat = (x - m) * v
    dgrad           dx = w * v * dz, the statistics being constants
    backward        dw, db and dx; in training dx = w * v * (dz - (db + xhat * dw) / count)
    backward_residual  these and u = dz, which is then all that the second pass has to read beside x

Mapping. A program owns BLOCK_C channels, and of the pixels one tile of BLOCK_M where it maps, a chunk where it sums.
Each direction reads its operands once, backward twice (its sums come first). act' is taken from the result where there
was a residual; where there was none fprop's value is computed again from x by the same instructions. Chunks depend on
the sizes alone; each leaves its sums in the workspace, and a second kernel adds them in order: no atomics.

Accumulators: fp32, one a tile's element, added up in fp64. A chunk sums distances from its origin, the mean of its first
tile, and their squares: a constant channel has exactly its value as mean and no variance, and a large mean costs no
accuracy. Where a square overflows, the chunk is summed again in fp64. Chunks are merged in fp64.

Layout: NHWC with free pixel strides. Source: Chan, Golub, LeVeque, Algorithms for Computing the Sample Variance (1983).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import triton
import triton.language as tl

from ._activation import NONE, activate, activate_gradient
from ._common import (
    by_hand,
    ceil_div,
    launch,
    narrow,
    needs_int64,
    next_power_of_2,
    on_device,
    pixel_offset,
    pixel_stride,
    widen,
)

# ---------------------------------------------------------------------------------------------------------------------
# Constants

NUM_WARPS = 8
TILE_BYTES = 8192  # pixels × channels of an operand: two loads of 16 bytes a thread
ODD_ELEMENTS = 1024  # pixels × channels where no vector fits: each element then costs an address in registers
MIN_CHANNELS, MAX_CHANNELS = 4, 64  # BLOCK_C
FEW_PIXELS_CHANNELS = 256  # BLOCK_C at most where the pixels don't fill a tile
# Programs of a sum. They depend on the problem alone, never on the card, and so does the rounding.
SPLIT_PROGRAMS = 512
SPLIT_ELEMENTS = 4096  # pixels × channels of a chunk, or a multiple
COLLECT_SPLITS, COLLECT_ELEMENTS, COLLECT_WARPS = 64, 1024, 4  # chunks side by side; chunks × channels; warps


class BatchNormProblem(Protocol):
    """The fields of csrc/common/params.h. Strides count elements."""

    N: int
    C: int
    H: int
    W: int
    act: int
    training: int
    eps_bits: int


# ---------------------------------------------------------------------------------------------------------------------
# Device code


@triton.jit
def _read(tensor, at, mask, BY_HAND: tl.constexpr):
    return widen(tl.load(tensor + at, mask=mask, other=0.0), BY_HAND).to(tl.float32)


@triton.jit
def _epsilon(bits):
    return tl.cast(bits, tl.int64).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["pixels", "height", "width", "splits", "chunk"])
def _stats(
    x, workspace, pixels, channels, height, width, splits, chunk, x_n, x_h, x_w,
    DENSE: tl.constexpr, INT64: tl.constexpr, BY_HAND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks_c = tl.cdiv(channels, BLOCK_C)
    split = tl.program_id(0) // blocks_c
    channel = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = channel < channels
    first = split * chunk
    last = tl.minimum(first + chunk, pixels)
    if INT64:
        first = tl.cast(first, tl.int64)
        last = tl.cast(last, tl.int64)
    pixel = first + tl.arange(0, BLOCK_M)
    inside = (pixel < last)[:, None] & in_c[None, :]
    here = pixel_offset(first, height, width, x_n, x_h, x_w, DENSE)
    begin = _read(x, here + channel, in_c & (first < last), BY_HAND)
    at = pixel_offset(pixel, height, width, x_n, x_h, x_w, DENSE)[:, None] + channel[None, :]
    tile = tl.where(inside, _read(x, at, inside, BY_HAND) - begin[None, :], 0.0)
    samples = tl.maximum(tl.minimum(last - first, BLOCK_M), 1)
    origin = begin + tl.sum(tile, axis=0) / samples.to(tl.float32)
    origin = tl.where(origin - origin == 0.0, origin, 0.0)  # neither Inf nor NaN

    sums = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for m0 in range(first, last, BLOCK_M):
        pixel = m0 + tl.arange(0, BLOCK_M)
        inside = (pixel < last)[:, None] & in_c[None, :]
        at = pixel_offset(pixel, height, width, x_n, x_h, x_w, DENSE)[:, None] + channel[None, :]
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
            at = pixel_offset(pixel, height, width, x_n, x_h, x_w, DENSE)[:, None] + channel[None, :]
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
    blocks_c = tl.cdiv(channels, BLOCK_C)
    tile = tl.program_id(0) // blocks_c
    channel = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = channel < channels
    if INT64:
        tile = tl.cast(tile, tl.int64)
    pixel = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (pixel < pixels)[:, None] & in_c[None, :]
    at = pixel_offset(pixel, height, width, x_n, x_h, x_w, DENSE)[:, None] + channel[None, :]
    value = _read(x, at, inside, BY_HAND)
    if r is not None:
        at = pixel_offset(pixel, height, width, r_n, r_h, r_w, DENSE)[:, None] + channel[None, :]
        residual = _read(r, at, inside, BY_HAND)
    mean, _, scale, bias = _factors(w, b, m, v, channel, in_c, eps_bits, TRAINING)
    value = _normalised(value - mean, scale, bias)
    if r is not None:
        value += residual
    at = pixel_offset(pixel, height, width, y_n, y_h, y_w, DENSE)[:, None] + channel[None, :]
    tl.store(y + at, narrow(activate(value, ACT), y.dtype.element_ty, BY_HAND), mask=inside)


@triton.jit
def _before_activation(
    grad, r, centred, scale, bias, pixel, channel, inside, height, width, g_n, g_h, g_w, r_n, r_h, r_w,
    ACT: tl.constexpr, DENSE: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """dz of a tile; centred may be anything where act' comes from the result r or is 1."""
    at = pixel_offset(pixel, height, width, g_n, g_h, g_w, DENSE)[:, None] + channel[None, :]
    g = _read(grad, at, inside, BY_HAND)
    if ACT != NONE:
        if r is not None:
            at = pixel_offset(pixel, height, width, r_n, r_h, r_w, DENSE)[:, None] + channel[None, :]
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
    blocks_c = tl.cdiv(channels, BLOCK_C)
    split = tl.program_id(0) // blocks_c
    channel = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = channel < channels
    first = split * chunk
    last = tl.minimum(first + chunk, pixels)
    if INT64:
        first = tl.cast(first, tl.int64)
        last = tl.cast(last, tl.int64)
    mean, invstd, scale, bias = _factors(w, b, m, v, channel, in_c, eps_bits, TRAINING)
    biases = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    weights = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for m0 in range(first, last, BLOCK_M):
        pixel = m0 + tl.arange(0, BLOCK_M)
        inside = (pixel < last)[:, None] & in_c[None, :]
        at = pixel_offset(pixel, height, width, x_n, x_h, x_w, DENSE)[:, None] + channel[None, :]
        centred = _read(x, at, inside, BY_HAND) - mean
        dz = _before_activation(
            grad, r, centred, scale, bias, pixel, channel, inside, height, width, g_n, g_h, g_w, r_n, r_h, r_w,
            ACT, DENSE, BY_HAND,
        )  # fmt: skip
        biases += dz
        weights += dz * (centred * invstd)
        if u is not None:
            at = pixel_offset(pixel, height, width, u_n, u_h, u_w, DENSE)[:, None] + channel[None, :]
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
    blocks_c = tl.cdiv(channels, BLOCK_C)
    tile = tl.program_id(0) // blocks_c
    channel = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = channel < channels
    if INT64:
        tile = tl.cast(tile, tl.int64)
    pixel = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (pixel < pixels)[:, None] & in_c[None, :]
    mean, invstd, scale, bias = _factors(w, b, m, v, channel, in_c, eps_bits, TRAINING)
    centred = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    if TRAINING or (ACT != NONE and r is None):
        at = pixel_offset(pixel, height, width, x_n, x_h, x_w, DENSE)[:, None] + channel[None, :]
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
    at = pixel_offset(pixel, height, width, out_n, out_h, out_w, DENSE)[:, None] + channel[None, :]
    tl.store(out + at, narrow(dz * scale, out.dtype.element_ty, BY_HAND), mask=inside)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


def _pixels(p: BatchNormProblem) -> int:
    return p.N * p.H * p.W


def block_c(p: BatchNormProblem) -> int:
    """Channels a program."""
    most = max(MAX_CHANNELS, min(FEW_PIXELS_CHANNELS, SPLIT_ELEMENTS // next_power_of_2(_pixels(p))))
    return max(MIN_CHANNELS, min(most, next_power_of_2(p.C)))


def tile_elements(itemsize: int, vectors: bool) -> int:
    """Pixels × channels of a tile."""
    return TILE_BYTES // itemsize if vectors else ODD_ELEMENTS


def _splits(p: BatchNormProblem) -> tuple[int, int]:
    """The chunks of a sum, none of them empty but where there is no pixel, and the pixels of one."""
    block_m = SPLIT_ELEMENTS // block_c(p)
    tiles = ceil_div(_pixels(p), block_m)
    wanted = max(1, min(tiles, SPLIT_PROGRAMS // ceil_div(p.C, block_c(p))))
    chunk = max(1, ceil_div(tiles, wanted)) * block_m
    return max(1, ceil_div(_pixels(p), chunk)), chunk


def collect_block(splits: int) -> tuple[int, int]:
    """Chunks and channels of a program that adds them up."""
    block_s = min(COLLECT_SPLITS, next_power_of_2(splits))
    return block_s, COLLECT_ELEMENTS // block_s


def stats_workspace(p: BatchNormProblem) -> int:
    """Bytes that stats needs."""
    splits, _ = _splits(p)
    return 24 * splits * p.C


def sums_workspace(p: BatchNormProblem) -> int:
    """Bytes that wgrad and backward need."""
    splits, _ = _splits(p)
    return 8 * splits * p.C if splits > 1 else 0


def _geometry(p: BatchNormProblem, **operands: torch.Tensor | None) -> tuple[list[int], dict[str, Any]]:
    """The pixel strides of operands by name, and the constants of a launch that follow from them and the channels."""
    sizes, channels = (p.N, p.H, p.W), block_c(p)
    names = ["" if tensor is None else name for name, tensor in operands.items()]
    given = [tuple(getattr(p, f"{name}_{axis}") for axis in "nhw") if name else (0, 0, 0) for name in names]
    distances = [pixel_stride(sizes, strides) if name else 0 for name, strides in zip(names, given, strict=True)]
    dense = all(distance is not None for distance in distances)
    if dense:
        sizes, given = (1, 1, _pixels(p)), [(0, 0, distance or 0) for distance in distances]
    int64 = any(needs_int64(*zip(sizes, strides, strict=True), (p.C, 1)) for strides in given)
    tensors = [tensor for tensor in operands.values() if tensor is not None]
    aligned, itemsize = all(tensor.data_ptr() % 16 == 0 for tensor in tensors), tensors[0].element_size()
    vectors = dense and aligned and not int64 and all(n % 16 == 0 for n in (p.C, *(strides[2] for strides in given)))
    block_m = tile_elements(itemsize, vectors) // channels
    constants = {"DENSE": dense, "INT64": int64, "BLOCK_M": block_m, "BLOCK_C": channels, "num_warps": NUM_WARPS}
    return [stride for strides in given for stride in strides], constants


def _map_programs(p: BatchNormProblem, constants: dict[str, Any]) -> int:
    return ceil_div(_pixels(p), constants["BLOCK_M"]) * ceil_div(p.C, constants["BLOCK_C"])


def _scratch(workspace: torch.Tensor | None, size: int, dtype: torch.dtype) -> torch.Tensor | None:
    if size == 0:
        return None
    if workspace is None or workspace.numel() * workspace.element_size() < size:
        raise ValueError(f"a workspace of {size} bytes is needed")
    return workspace.view(dtype)


def stats(
    p: BatchNormProblem, x: torch.Tensor, w: None, b: None, m: torch.Tensor, v: torch.Tensor, r: None, y: None,
    s: torch.Tensor, *rest: None, workspace: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Writes m, v and s, the statistics of x."""
    splits, chunk = _splits(p)
    scratch = _scratch(workspace, stats_workspace(p), torch.float64)
    strides, constants = _geometry(p, x=x)
    with on_device(x):
        launch(
            _stats,
            splits * ceil_div(p.C, block_c(p)),
            x,
            scratch,
            _pixels(p),
            p.C,
            p.H,
            p.W,
            splits,
            chunk,
            *strides,
            BY_HAND=by_hand(x.dtype),
            **constants,
        )
        chunks, channels = collect_block(splits)
        launch(
            _merge_stats, ceil_div(p.C, channels),
            scratch, m, v, s, _pixels(p), p.C, splits, chunk, p.eps_bits,
            BLOCK_S=chunks, BLOCK_C=channels, num_warps=COLLECT_WARPS,
        )  # fmt: skip


def fprop(
    p: BatchNormProblem, x: torch.Tensor, w: torch.Tensor | None, b: torch.Tensor | None, m: torch.Tensor | None,
    v: torch.Tensor | None, r: torch.Tensor | None, y: torch.Tensor, *rest: None,
) -> None:  # fmt: skip
    """Writes y."""
    if _pixels(p) == 0:
        return
    strides, constants = _geometry(p, x=x, r=r, y=y)
    with on_device(x):
        launch(
            _apply, _map_programs(p, constants),
            x, w, b, m, v, r, y, _pixels(p), p.C, p.H, p.W, p.eps_bits, *strides,
            ACT=p.act, TRAINING=bool(p.training), BY_HAND=by_hand(x.dtype), **constants,
        )  # fmt: skip


def wgrad(
    p: BatchNormProblem, x: torch.Tensor, w: torch.Tensor | None, b: torch.Tensor | None, m: torch.Tensor | None,
    v: torch.Tensor | None, r: torch.Tensor | None, y: torch.Tensor, s: None, dw: torch.Tensor, db: torch.Tensor,
    t: torch.Tensor | None = None, u: torch.Tensor | None = None, *, workspace: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Writes dw and db, and dz to u where it is given, from y, the result's gradient; r is the result, or None."""
    splits, chunk = _splits(p)
    scratch = _scratch(workspace, sums_workspace(p), torch.float32)
    strides, constants = _geometry(p, x=x, r=r, y=y, u=u)
    with on_device(x):
        launch(
            _sums, splits * ceil_div(p.C, block_c(p)),
            x, w, b, m, v, r, y, dw, db, u, scratch, _pixels(p), p.C, p.H, p.W, splits, chunk, p.eps_bits, *strides,
            ACT=p.act, TRAINING=bool(p.training), BY_HAND=by_hand(x.dtype), **constants,
        )  # fmt: skip
        if splits > 1:
            chunks, channels = collect_block(splits)
            launch(
                _add_sums,
                ceil_div(p.C, channels),
                scratch,
                dw,
                db,
                p.C,
                splits,
                BLOCK_S=chunks,
                BLOCK_C=channels,
                num_warps=COLLECT_WARPS,
            )


def dgrad(
    p: BatchNormProblem, x: torch.Tensor, w: torch.Tensor | None, b: torch.Tensor | None, m: torch.Tensor | None,
    v: torch.Tensor | None, r: torch.Tensor | None, y: torch.Tensor, s: None, dw: torch.Tensor | None,
    db: torch.Tensor | None, t: torch.Tensor, u: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Writes t, the input's gradient, from y, the result's, and in training from dw and db.

    Where u, which is dz, is given, the activation is behind it and neither y nor r is read.
    """
    if _pixels(p) == 0:
        return
    if u is not None:
        grad, r, act = u, None, 0
        strides, constants = _geometry(p, x=x, r=None, u=u, t=t)
    else:
        grad, act = y, p.act
        strides, constants = _geometry(p, x=x, r=r, y=y, t=t)
    with on_device(x):
        launch(
            _input_gradient, _map_programs(p, constants),
            x, w, b, m, v, r, grad, dw, db, t, _pixels(p), p.C, p.H, p.W, p.eps_bits, *strides,
            ACT=act, TRAINING=bool(p.training), BY_HAND=by_hand(x.dtype), **constants,
        )  # fmt: skip


def backward(p: BatchNormProblem, *operands: Any, workspace: torch.Tensor | None = None) -> None:
    """Writes dw, db and t, and with a residual u: what wgrad leaves is all that dgrad needs."""
    wgrad(p, *operands, workspace=workspace)
    dgrad(p, *operands)


# ---------------------------------------------------------------------------------------------------------------------
# Tables

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS: dict[str, Callable[..., None]] = {
    "stats": stats, "fprop": fprop, "dgrad": dgrad, "wgrad": wgrad, "backward": backward, "backward_residual": backward,
}  # fmt: skip
WORKSPACE: dict[str, Callable[[BatchNormProblem], int]] = {
    "stats": stats_workspace, **dict.fromkeys(("wgrad", "backward", "backward_residual"), sums_workspace),
}  # fmt: skip
