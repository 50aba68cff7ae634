"""Convolution between batch norms: it normalises what it reads, and its results' statistics leave with them.

    fprop  y = conv2d(z, w, b) with z = act((x - xm) xv xw + xb), or x itself;
           ym[k] = mean of y, yv[k] = 1 / sqrt(mean of (y - ym)^2 + eps), ys[k] = sum of (y - ym)^2 / (count - 1)
    wgrad  w = conv2d's from z and y, the result's gradient
    dgrad  dz = conv2d's from y, times act'; db[c] = sum of dz, dw[c] = sum of dz xhat, xhat = (x - xm) xv;
           t[m, c] = xw xv (dz - (db + xhat dw) / count)

Mapping. The products are conv2d_implicit_gemm's. fprop and wgrad normalise tiles between loading and multiplying, and
round them as batch_norm would have: z is never written, and the products are those of the unfused layers. fprop leaves
each tile's mean and squared distances, dgrad each tile's sums, in the workspace; two more kernels merge them in order
(_conv2d_norm.py, batch_norm), so that all is deterministic. dgrad's dz waits in t for its sums: a last pass, batch_norm's,
turns it into t where it lies. Statistics are of what was stored, after rounding.

Accumulator: fp32; merged in fp64 (statistics) and fp32 (dgrad's sums). Layout: conv2d_implicit_gemm's.

After cuDNN's fused scale-bias-ReLU-convolution-genstats and dgrad-dReLU-dBN patterns (cuDNN 8.8 release notes), and Chan,
Golub, LeVeque, Algorithms for Computing the Sample Variance (1983).
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Protocol

import torch

from . import batch_norm
from . import conv2d_implicit_gemm as conv2d
from ._batch_norm import _add_sums, _merge_stats
from ._common import Conv2dProblem, ceil_div, launch, on_device
from ._conv2d_norm import _add_tiles, _merge_tiles
from ._tiles import Config

# ---------------------------------------------------------------------------------------------------------------------
# Constants

MIN_BLOCK_M = 64  # no tile has fewer pixels: the workspace is for so many tiles


class BnActConvProblem(Conv2dProblem, Protocol):
    """conv2d's fields, the activation of x, the eps of y's variance, and t's strides."""

    x_act: int
    eps_bits: int
    t_n: int
    t_h: int
    t_w: int


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


def _pixels(p: BnActConvProblem) -> int:
    return p.N * p.P * p.Q


def _tiles(p: BnActConvProblem, block_m: int) -> int:
    return ceil_div(_pixels(p), block_m)


def _gradient_tiles(p: BnActConvProblem, block_m: int) -> int:
    phases = (p.stride_h, p.stride_w)
    return ceil_div(p.N * ceil_div(p.H, phases[0]) * ceil_div(p.W, phases[1]), block_m) * phases[0] * phases[1]


def _rows(tiles: int, values: int, channels: int) -> int:
    """Bytes of so many fp32 values a tile and channel, up to a multiple of 16."""
    return ceil_div(4 * values * tiles * channels, 16) * 16


def _splits(tiles: int) -> int:
    return ceil_div(tiles, batch_norm.collect_block(tiles)[0])


def fprop_workspace(p: BnActConvProblem) -> int:
    """Bytes that fprop needs."""
    tiles = _tiles(p, MIN_BLOCK_M)
    return _rows(tiles, 3, p.K) + 24 * _splits(tiles) * p.K


def dgrad_workspace(p: BnActConvProblem) -> int:
    """Bytes that dgrad needs."""
    tiles = _gradient_tiles(p, MIN_BLOCK_M)
    return _rows(tiles, 2, p.C) + 8 * _splits(tiles) * p.C


def _scratch(workspace: torch.Tensor | None, size: int) -> torch.Tensor:
    if workspace is None or workspace.numel() * workspace.element_size() < size:
        raise ValueError(f"a workspace of {size} bytes is needed")
    return workspace.view(torch.uint8)


def fprop(
    p: BnActConvProblem, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, y: torch.Tensor,
    xm: torch.Tensor | None, xv: torch.Tensor | None, xw: torch.Tensor | None, xb: torch.Tensor | None,
    ym: torch.Tensor, yv: torch.Tensor, ys: torch.Tensor, *rest: None, workspace: torch.Tensor | None = None,
    tile: Config | None = None,
) -> None:  # fmt: skip
    """Writes y, ym, yv and ys."""
    scratch = _scratch(workspace, fprop_workspace(p))
    sums = scratch.view(torch.float32)
    norm = conv2d.Norm(xm, xv, xw, xb, p.x_act, sums)
    block_m, tiles = conv2d.gather(p, x, w, b, y, tile, transposed=False, norm=norm)
    chunks, channels = batch_norm.collect_block(tiles)
    splits, merged = _splits(tiles), scratch[_rows(tiles, 3, p.K) :].view(torch.float64)
    with on_device(x):
        launch(
            _merge_tiles, splits * ceil_div(p.K, channels),
            sums, merged, _pixels(p), p.K, tiles, block_m, splits,
            BLOCK_S=chunks, BLOCK_C=channels, num_warps=batch_norm.COLLECT_WARPS,
        )  # fmt: skip
        rows, channels = batch_norm.collect_block(splits)
        launch(
            _merge_stats, ceil_div(p.K, channels),
            merged, ym, yv, ys, _pixels(p), p.K, splits, chunks * block_m, p.eps_bits,
            BLOCK_S=rows, BLOCK_C=channels, num_warps=batch_norm.COLLECT_WARPS,
        )  # fmt: skip


def wgrad(
    p: BnActConvProblem, x: torch.Tensor, w: torch.Tensor, b: None, y: torch.Tensor,
    xm: torch.Tensor, xv: torch.Tensor, xw: torch.Tensor | None, xb: torch.Tensor | None, *rest: None,
    workspace: torch.Tensor | None = None, tile: Config | None = None,
) -> None:  # fmt: skip
    """Writes w, the weight's gradient, from x and y, the output's gradient."""
    conv2d.wgrad(p, x, w, None, y, workspace=workspace, tile=tile, norm=conv2d.Norm(xm, xv, xw, xb, p.x_act))


def dgrad(
    p: BnActConvProblem, x: torch.Tensor, w: torch.Tensor, b: None, y: torch.Tensor,
    xm: torch.Tensor, xv: torch.Tensor, xw: torch.Tensor | None, xb: torch.Tensor | None,
    ym: None, yv: None, ys: None, dw: torch.Tensor, db: torch.Tensor, t: torch.Tensor,
    *, workspace: torch.Tensor | None = None, tile: Config | None = None,
) -> None:  # fmt: skip
    """Writes dw, db and t, the gradients of xw, xb and x, from y, the output's gradient."""
    scratch = _scratch(workspace, dgrad_workspace(p))
    sums = scratch.view(torch.float32)
    norm = conv2d.Norm(xm, xv, xw, xb, p.x_act, sums)
    _, tiles = conv2d.gather(gradient(p), y, w, None, t, tile, transposed=True, r=x, norm=norm)
    chunks, channels = batch_norm.collect_block(tiles)
    splits, merged = _splits(tiles), scratch[_rows(tiles, 2, p.C) :].view(torch.float32)
    with on_device(x):
        launch(
            _add_tiles, splits * ceil_div(p.C, channels),
            sums, merged, p.C, tiles, splits, BLOCK_S=chunks, BLOCK_C=channels, num_warps=batch_norm.COLLECT_WARPS,
        )  # fmt: skip
        rows, channels = batch_norm.collect_block(splits)
        launch(
            _add_sums, ceil_div(p.C, channels),
            merged, dw, db, p.C, splits, BLOCK_S=rows, BLOCK_C=channels, num_warps=batch_norm.COLLECT_WARPS,
        )  # fmt: skip
    last = _with(p, u_n=p.t_n, u_h=p.t_h, u_w=p.t_w, training=1, act=0)
    batch_norm.dgrad(last, x, xw, xb, xm, xv, None, None, None, dw, db, t, t)


def gradient(p: Any) -> Any:
    """dgrad's product as conv2d has it: it writes t, with x for its residual."""
    return _with(p, x_n=p.t_n, x_h=p.t_h, x_w=p.t_w, r_n=p.x_n, r_h=p.x_h, r_w=p.x_w)


def _with(p: Any, **fields: int) -> Any:
    return SimpleNamespace(**{**vars(p), **fields})


# ---------------------------------------------------------------------------------------------------------------------
# Tables

DTYPES = conv2d.DTYPES
KERNELS: dict[str, Callable[..., None]] = {"fprop": fprop, "dgrad": dgrad, "wgrad": wgrad}
WORKSPACE: dict[str, Callable[[BnActConvProblem], int]] = {
    "fprop": fprop_workspace, "dgrad": dgrad_workspace, "wgrad": conv2d.wgrad_workspace,
}  # fmt: skip
LAYOUTS = conv2d.LAYOUTS
