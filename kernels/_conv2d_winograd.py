"""Winograd's F(M x M, 3 x 3) for 3x3 filters with stride and dilation 1: fprop, dgrad and wgrad; M = 4 or 2.

    y[tile, k] = act(scale[k] (b[k] + A' [ sum_c (G w[k,c] G') . (B' x[tile,c] B) ] A) + shift[k] + r[tile, k])
    w[k, c]    = G' [ sum_tile (A y[tile,k] A') . (B' x[tile,c] B) ] G          (_conv2d_winograd_transform.py)

A tile is M x M outputs of one image and the P x P inputs, P = M + 2, that they need. Its transformed inputs are multiplied
with the transformed weights element by element and summed over c: P*P independent matrix products of tiles x C by C x K, 36
for 16 outputs (M = 4) or 16 for 4 (M = 2) where the direct sum takes 9 an output: 4 times and 2.25 times fewer products.
dgrad is fprop of the gradient with turned taps and C, K exchanged; wgrad the formula's derivative by w.

    U [P*P][k][c]     filters, once a call          V [P*P][tile][c]    inputs     (Z [P*P][tile][k]: wgrad's gradients)
    Y [P*P][tile][k]  products of U and V           D [P*P][k][c]       of Z and V, added up from chunk to chunk

Mapping. The tiles go in chunks through three kernels: transform of the inputs, P*P products in one launch (tiles of
_tiles.py), transform of the results with the epilogue. What a chunk leaves in between stays in L2. In wgrad both operands
are transformed, the sums wait in D for the last chunk, and the last kernel turns them into weights. Transforming programs
have BLOCK_R tiles (or filters) × BLOCK_C channels, neighbouring threads neighbouring channels. Each chunk is summed apart
and added to the ones before it, always in the same order.

Where a result isn't finite (Inf or NaN among the operands spreads over the whole tile, large values may overflow in
between) the last kernel sums the pixels of that tile and filter, or the taps of that weight, directly: infinities and NaNs
come out where the direct kernel's do, and nowhere else.

Layout: activations NHWC with free pixel strides; weights with any strides. U, V and Z in the operands' dtype, rounded once
more than the direct sum's operands, which in bf16 F(4 x 4)'s accuracy doesn't bear. Accumulator: fp32, and Y and D in it.

After Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2016), whose non-fused form this is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ._common import (
    INTERPRETED,
    Conv2dProblem,
    by_hand,
    capability,
    ceil_div,
    conv2d_int64,
    launch,
    needs_int64,
    on_device,
    x_int64,
    y_int64,
)
from ._conv2d_winograd_kernels import (
    _multiply,
    _transform_filters,
    _transform_outputs,
    _transform_tiles,
    _transform_weights,
)
from ._tiles import INPUT_PRECISION, Config, config

# ---------------------------------------------------------------------------------------------------------------------
# Constants

CHUNK_BYTES = 32 * 2**20  # of what is transformed, and multiplied, at a time: an A100's L2 has 40 MiB, an H100's 50
DEPTH = 64  # a reduction is filled up to a multiple, but for one of a half
PITCH = 16  # rows that aren't reduced over are so many together
WARPS = 4
OUTPUT_WARPS = {4: 4, 2: 8}  # by M: with two results a thread the direct sums beside them spilled
# (rows, columns) of a transforming program: its P*P values and as many results are in registers, one a thread in F(4x4).
BLOCKS = {4: (4, 32), 2: (4, 64)}
DIRECT_BLOCK = 4  # products of a direct sum at a time
if INTERPRETED:  # which pays by the program and by the operation
    BLOCKS, DIRECT_BLOCK = dict.fromkeys(BLOCKS, (32, 64)), 64


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


@dataclass(frozen=True)
class View:
    """fprop, or dgrad as fprop: ``src`` is what is summed over, ``out`` the result; wgrad's out is the gradient it reads."""

    batch: int
    src: tuple[int, int, int, int, int, int]  # height, width, channels, strides
    out: tuple[int, int, int, int, int, int]
    pad: tuple[int, int]
    weight: tuple[int, int, int, int]  # strides of out's and src's channels, rows, columns
    turned: bool

    @classmethod
    def of(cls, p: Conv2dProblem, forward: bool) -> View:
        x = (p.H, p.W, p.C, p.x_n, p.x_h, p.x_w)
        y = (p.P, p.Q, p.K, p.y_n, p.y_h, p.y_w)
        pad = (p.pad_h, p.pad_w) if forward else (2 - p.pad_h, 2 - p.pad_w)
        k, c = (p.w_k, p.w_c) if forward else (p.w_c, p.w_k)
        return cls(p.N, x if forward else y, y if forward else x, pad, (k, c, p.w_r, p.w_s), not forward)

    def grid(self, m: int) -> tuple[int, int]:
        """Tiles of an image, down and across."""
        return ceil_div(self.out[0], m), ceil_div(self.out[1], m)

    def tiles(self, m: int) -> int:
        """Of the batch."""
        down, across = self.grid(m)
        return self.batch * down * across


def _depth(n: int) -> int:
    """A reduction's length with the zeros that fill it up."""
    return DEPTH // 2 if n <= DEPTH // 2 else ceil_div(n, DEPTH) * DEPTH


def _pitch(channels: int) -> int:
    return ceil_div(channels, PITCH) * PITCH


def _chunk(tiles: int, values: int) -> int:
    """Tiles at a time that have so many values together: a multiple of DEPTH."""
    fitting = CHUNK_BYTES // (4 * values) // DEPTH * DEPTH
    return min(max(DEPTH, fitting), max(1, ceil_div(tiles, DEPTH)) * DEPTH)


@dataclass(frozen=True)
class Plan:
    """How a workspace is divided: its parts' elements, and the tiles of a chunk."""

    parts: tuple[int, int, int]  # U, V, Y; or D, V, Z
    chunk: int

    @classmethod
    def correlate(cls, view: View, m: int) -> Plan:
        """Of fprop and dgrad."""
        products, depth, filters = (m + 2) ** 2, _depth(view.src[2]), view.out[2]
        chunk = _chunk(view.tiles(m), products * (depth + _pitch(filters)))
        return cls((products * filters * depth, products * chunk * depth, products * chunk * _pitch(filters)), chunk)

    @classmethod
    def wgrad(cls, view: View, m: int) -> Plan:
        """Of wgrad."""
        products, channels, filters = (m + 2) ** 2, _pitch(view.src[2]), _pitch(view.out[2])
        chunk = _chunk(view.tiles(m), products * (channels + filters))
        return cls((products * filters * channels, products * chunk * channels, products * chunk * filters), chunk)

    @property
    def bytes(self) -> int:
        """Of fp32; narrower operands need less."""
        return 4 * sum(self.parts)

    def divide(self, workspace: torch.Tensor | None, *dtypes: torch.dtype) -> list[torch.Tensor]:
        """The workspace's parts in these dtypes."""
        if workspace is None or workspace.numel() * workspace.element_size() < self.bytes:
            raise ValueError(f"a workspace of {self.bytes} bytes is needed")
        found, at = [], 0
        for elements, dtype in zip(self.parts, dtypes, strict=True):
            found.append(workspace.view(torch.uint8)[4 * at : 4 * (at + elements)].view(dtype))
            at += elements
        return found


def crowded(itemsize: int, wgrad: bool) -> bool:
    """Whether a product's sums leave too few registers in the widest tiles: wgrad adds them to as many; 16 bits have such."""
    return wgrad and itemsize == 2


def _tile(
    rows: int, columns: int, depth: int, m: int, p: Conv2dProblem, like: torch.Tensor, wgrad: bool = False
) -> Config:
    """Of the products."""
    size = like.element_size()
    tile = config(rows * (m + 2) ** 2, columns, depth, p.precision, size, True, capability(like), crowded(size, wgrad))
    block_k = tile.block_k
    while depth % block_k:
        block_k //= 2
    return Config(tile.block_m, tile.block_n, block_k, tile.num_warps, tile.num_stages, tile.group_m)


def _product(
    p: Conv2dProblem, m: int, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, tile: Config, rows: int, columns: int, depth: int,
    a_strides: tuple[int, int, int], b_strides: tuple[int, int, int], add: bool,
) -> None:  # fmt: skip
    """Strides: of products, rows or columns, and of the depth."""
    programs = (m + 2) ** 2 * ceil_div(rows, tile.block_m) * ceil_div(columns, tile.block_n)
    launch(
        _multiply, programs,
        a, b, out, rows, columns, depth, _pitch(columns), a_strides[0], b_strides[0], *a_strides[1:], *b_strides[1:],
        ADD=add, INPUT_PRECISION=INPUT_PRECISION[p.precision] if a.dtype == torch.float32 else "tf32",
        BY_HAND=by_hand(a.dtype), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m, **tile.options(capability(a)),
    )  # fmt: skip


def _tiles(
    m: int, what: str, view: View, src: torch.Tensor, out: torch.Tensor, first: int, rows: int, pitch: int, int64: bool,
) -> None:  # fmt: skip
    """Transforms rows tiles from the first: what, "inputs" or "gradients"."""
    height, width, channels, *strides = view.src if what == "inputs" else view.out
    pad = view.pad if what == "inputs" else (0, 0)
    block_r, block_c = BLOCKS[m]
    if rows == 0:
        return
    launch(
        _transform_tiles, ceil_div(rows, block_r) * ceil_div(pitch, block_c),
        src, out, first, view.tiles(m), rows, *view.grid(m), height, width, channels, pitch, *pad, *strides,
        WHAT=what, M=m, INT64=int64, BY_HAND=by_hand(src.dtype), BLOCK_R=block_r, BLOCK_C=block_c, num_warps=WARPS,
    )  # fmt: skip


def _correlate(
    m: int, p: Conv2dProblem, view: View, src: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, out: torch.Tensor,
    scale: torch.Tensor | None, shift: torch.Tensor | None, r: torch.Tensor | None, workspace: torch.Tensor | None,
) -> None:  # fmt: skip
    tiles, (out_h, out_w, filters, *out_strides) = view.tiles(m), view.out
    height, width, channels, *src_strides = view.src
    if tiles * filters == 0:
        return
    plan, depth, (block_r, block_c) = Plan.correlate(view, m), _depth(channels), BLOCKS[m]
    u, v, y = plan.divide(workspace, src.dtype, src.dtype, torch.float32)
    res = (p.r_n, p.r_h, p.r_w) if r is not None else (0, 0, 0)
    x_wide, y_wide = x_int64(p), y_int64(p)
    int64 = conv2d_int64(p) or needs_int64((p.N, res[0]), (out_h, res[1]), (out_w, res[2]), (filters, 1))
    with on_device(src):
        launch(
            _transform_filters, ceil_div(filters, block_r) * ceil_div(depth, block_c),
            w, u, filters, channels, depth, *view.weight,
            TURNED=view.turned, M=m, INT64=conv2d_int64(p), BY_HAND=by_hand(w.dtype), BLOCK_R=block_r, BLOCK_C=block_c,
            num_warps=WARPS,
        )  # fmt: skip
        for first in range(0, tiles, plan.chunk):
            rows = min(plan.chunk, _pitch(tiles - first))
            _tiles(m, "inputs", view, src, v, first, rows, depth, y_wide if view.turned else x_wide)
            _product(
                p, m, v, u, y, _tile(rows, filters, depth, m, p, src), rows, filters, depth,
                (rows * depth, depth, 1), (filters * depth, depth, 1), False,
            )  # fmt: skip
            launch(
                _transform_outputs, ceil_div(rows, block_r) * ceil_div(filters, block_c),
                y, src, w, b, scale, shift, r, out,
                first, tiles, rows, *view.grid(m), height, width, out_h, out_w, channels, filters, _pitch(filters),
                *view.pad, *src_strides, *view.weight, *out_strides, *res,
                ACT=0 if view.turned else p.act, TURNED=view.turned, M=m, INT64=int64, BY_HAND=by_hand(src.dtype),
                BLOCK_R=block_r, BLOCK_C=block_c, BLOCK_D=DIRECT_BLOCK, num_warps=OUTPUT_WARPS[m],
            )  # fmt: skip


def fprop(
    m: int, p: Conv2dProblem, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, y: torch.Tensor,
    scale: torch.Tensor | None = None, shift: torch.Tensor | None = None, r: torch.Tensor | None = None,
    *, workspace: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Writes y: conv2d's, or with the operands after it conv_bn_act's."""
    _correlate(m, p, View.of(p, True), x, w, b, y, scale, shift, r, workspace)


def dgrad(
    m: int, p: Conv2dProblem, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, y: torch.Tensor,
    *, workspace: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Writes x, the input's gradient, from y, the output's."""
    _correlate(m, p, View.of(p, False), y, w, None, x, None, None, None, workspace)


def wgrad(
    m: int, p: Conv2dProblem, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, y: torch.Tensor,
    *, workspace: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Writes w, the weight's gradient, from x and y, the output's gradient."""
    view = View.of(p, True)
    (height, width, channels, *src_strides), (out_h, out_w, filters, *out_strides) = view.src, view.out
    if channels * filters == 0:
        return
    plan, (block_r, block_c) = Plan.wgrad(view, m), BLOCKS[m]
    d, v, z = plan.divide(workspace, torch.float32, x.dtype, x.dtype)
    pitches = _pitch(channels), _pitch(filters)
    with on_device(x):
        for first in range(0, max(1, view.tiles(m)), plan.chunk):  # no tile: a sum of nothing
            rows = min(plan.chunk, ceil_div(view.tiles(m) - first, DEPTH) * DEPTH)
            _tiles(m, "inputs", view, x, v, first, rows, pitches[0], x_int64(p))
            _tiles(m, "gradients", view, y, z, first, rows, pitches[1], y_int64(p))
            _product(
                p, m, z, v, d, _tile(filters, channels, rows, m, p, x, True), pitches[1], pitches[0], rows,
                (rows * pitches[1], 1, pitches[1]), (rows * pitches[0], 1, pitches[0]), first > 0,
            )  # fmt: skip
        launch(
            _transform_weights, ceil_div(filters, block_r) * ceil_div(channels, block_c),
            d, x, y, w,
            view.batch, height, width, out_h, out_w, channels, filters, *reversed(pitches), *view.pad,
            *src_strides, *out_strides, *view.weight,
            M=m, INT64=conv2d_int64(p), BY_HAND=by_hand(x.dtype), BLOCK_R=block_r, BLOCK_C=block_c, BLOCK_D=DIRECT_BLOCK,
            num_warps=WARPS,
        )  # fmt: skip


def correlate_workspace(m: int, forward: bool, p: Conv2dProblem) -> int:
    """Bytes that fprop or dgrad needs."""
    view = View.of(p, forward)
    return Plan.correlate(view, m).bytes if view.tiles(m) * view.out[2] else 0


def wgrad_workspace(m: int, p: Conv2dProblem) -> int:
    """Bytes that wgrad needs."""
    view = View.of(p, True)
    return Plan.wgrad(view, m).bytes if view.src[2] * view.out[2] else 0


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def kernels(m: int) -> dict[str, Callable[..., None]]:
    """The launchers of F(m x m, 3 x 3)."""
    return {"fprop": partial(fprop, m), "dgrad": partial(dgrad, m), "wgrad": partial(wgrad, m)}


def workspaces(m: int) -> dict[str, Callable[[Conv2dProblem], int]]:
    """And the bytes that each needs."""
    return {
        "fprop": partial(correlate_workspace, m, True),
        "dgrad": partial(correlate_workspace, m, False),
        "wgrad": partial(wgrad_workspace, m),
    }
