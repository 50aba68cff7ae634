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

from ._batch_norm import _add_sums, _apply, _input_gradient, _merge_stats, _stats, _sums
from ._common import block_channels, by_hand, ceil_div, launch, needs_int64, on_device, pixel_stride

# ---------------------------------------------------------------------------------------------------------------------
# Constants

NUM_WARPS = 8
TILE_BYTES = 8192  # pixels × channels of an operand: two loads of 16 bytes a thread
ODD_ELEMENTS = 1024  # pixels × channels where no vector fits: each element then costs an address in registers
# Programs of a sum. They depend on the problem alone, never on the card, and so does the rounding.
SPLIT_PROGRAMS = 512
SPLIT_ELEMENTS = 4096  # pixels × channels of a chunk, or a multiple
COLLECT_SPLITS, COLLECT_ELEMENTS, COLLECT_WARPS = (4, 16, 64), 1024, 4  # chunks side by side; chunks × channels; warps


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
# Launchers


def _pixels(p: BatchNormProblem) -> int:
    return p.N * p.H * p.W


def block_c(p: BatchNormProblem) -> int:
    """Channels a program."""
    return block_channels(p.C)


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
    block_s = next((block for block in COLLECT_SPLITS if block >= splits), COLLECT_SPLITS[-1])
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
