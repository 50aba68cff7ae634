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
channels at a time; programs that share a weight panel or a pixel panel follow each other (GROUP_M). Groups of few channels share a
tile, whose weights lie on its diagonal (DIAGONAL); few channels that can't, stems for one, flatten the reduction (PACKED),
which then runs over (r, s, c). 1×1 at stride 1 is a plain product (LINEAR). For stride 1 there also are persistent programs
that tensor descriptors feed (_conv2d_descriptor.py).
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
from dataclasses import replace
from typing import NamedTuple

import torch

from ._common import (
    Conv2dProblem,
    by_hand,
    capability,
    ceil_div,
    conv2d_int64,
    launch,
    needs_int64,
    next_power_of_2,
    on_device,
    y_int64,
)
from ._conv2d_descriptor import descriptor_product
from ._conv2d_gather import _gather_gemm
from ._conv2d_wgrad import _bgrad_partial, _sum_splits, _wgrad_gemm
from ._tiles import INPUT_PRECISION, Config, config

# ---------------------------------------------------------------------------------------------------------------------
# Constants; the tiles are in _tiles.py

# By the bytes of an element: groups of so few channels that several fit into this share a tile, its diagonal the weights.
TOGETHER_CHANNELS = {2: 32, 4: 16}
TOGETHER_WARPS = {"tf32": 8, "tf32x3": 8, "ieee": 4}  # by how products are made; more where they spilled
PACKED_CHANNELS = 16  # below this many channels a group, fprop and dgrad flatten the reduction

# Split reductions. They depend on the problem alone, never on the card, and so does the rounding.
SPLIT_PROGRAMS = 256  # programs wanted
SPLIT_PIXELS = 512  # pixels a program reduces at least
SPLIT_TILE = 64
BGRAD_BLOCK_M, BGRAD_BLOCK_N = 64, 64
REDUCE_BLOCK = 512


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


class Norm(NamedTuple):
    """A batch norm and activation fused into the product: of what it reads, or, in dgrad, the gradient through them."""

    mean: torch.Tensor | None = None
    invstd: torch.Tensor | None = None
    gamma: torch.Tensor | None = None
    beta: torch.Tensor | None = None
    act: int = 0
    sums: torch.Tensor | None = None  # where each tile leaves its sums: statistics, or in dgrad those of the gradient

    @property
    def operands(self) -> tuple[torch.Tensor | None, ...]:
        """The vectors as kernels take them."""
        return self[:4]

    @property
    def present(self) -> bool:
        """Whether there is one; a convolution may want statistics alone."""
        return self.mean is not None


NO_NORM = Norm()


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


def _together(p: Conv2dProblem, itemsize: int) -> int:
    """Groups that share a tile: as many as fill it and divide their number."""
    fitting = TOGETHER_CHANNELS[itemsize] // max(p.C // p.G, p.K // p.G, 1)
    return max((n for n in range(1, min(p.G, fitting) + 1) if p.G % n == 0), default=1)


def _input_precision(p: Conv2dProblem, dtype: torch.dtype) -> str:
    # 16-bit products are exact in fp32: one spelling for all modes, one compilation.
    return INPUT_PRECISION[p.precision] if dtype == torch.float32 else "tf32"


def gather(
    p: Conv2dProblem, src: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, out: torch.Tensor,
    tile: Config | None, *, transposed: bool, scale: torch.Tensor | None = None, shift: torch.Tensor | None = None,
    r: torch.Tensor | None = None, act: int = 0, norm: Norm = NO_NORM,
) -> tuple[int, int]:  # fmt: skip
    """Launches _gather_gemm: fprop from x to y, or transposed, dgrad from y to x; returns BLOCK_M and the tiles of pixels."""
    together = _together(p, src.element_size())
    groups, how = p.G // together, _input_precision(p, src.dtype)
    x_side = (p.H, p.W, p.C // groups, p.x_n, p.x_h, p.x_w)
    y_side = (p.P, p.Q, p.K // groups, p.y_n, p.y_h, p.y_w)
    src_h, src_w, c_src, src_n, src_row, src_col = y_side if transposed else x_side
    out_h, out_w, c_out, out_n, out_row, out_col = x_side if transposed else y_side
    w_src, w_out = (p.w_k, p.w_c) if transposed else (p.w_c, p.w_k)
    phases = (p.stride_h, p.stride_w) if transposed else (1, 1)
    pixels = p.N * ceil_div(out_h, phases[0]) * ceil_div(out_w, phases[1])
    if pixels == 0 or c_out == 0:
        return 1, 0
    launches = groups * phases[0] * phases[1]
    res = (p.r_n, p.r_h, p.r_w) if r is not None else (0, 0, 0)
    linear = _pointwise(p) and (r is None or _even(p, *res))
    packed = not linear and c_src < PACKED_CHANNELS and together == 1
    if tile is None:
        depth = c_src * p.R * p.S if packed else c_src
        vectors = not packed and together == 1 and _vectors(p, src, w, out, unit=w_out if transposed else w_src)
        itemsize, arch = src.element_size(), capability(src)
        tile = config(
            pixels * launches,
            c_out,
            depth,
            p.precision,
            itemsize,
            vectors,
            arch,
            r is not None or norm.sums is not None,
            norm.present and not transposed,
        )
    if tile.persistent:
        descriptor_product(
            p, src, w, b, out, tile, transposed=transposed, linear=linear, scale=scale, shift=shift, r=r, act=act
        )
        return tile.block_m, ceil_div(pixels, tile.block_m)
    if together > 1:
        # a product that may be repeated holds more in registers
        tile = replace(tile, block_k=max(tile.block_k, next_power_of_2(c_src)), num_warps=TOGETHER_WARPS[how])
    gcd_h, gcd_w = math.gcd(p.stride_h, p.dilation_h), math.gcd(p.stride_w, p.dilation_w)
    # Weights know the input channels of a group alone: these begin anew with each group of a tile.
    wraps = (c_src, c_out // together) if transposed else (c_src // together, c_out)
    grid = ceil_div(pixels, tile.block_m) * ceil_div(c_out, tile.block_n) * launches
    with on_device(src):
        launch(
            _gather_gemm, grid,
            src, w, b, scale, shift, r, *norm.operands, norm.sums, out,
            p.N, out_h, out_w, src_h, src_w, c_src, c_out, groups, p.R, p.S,
            p.stride_h, p.stride_w, p.pad_h, p.pad_w, p.dilation_h, p.dilation_w, gcd_h, gcd_w,
            _inverse(p.dilation_h // gcd_h, p.stride_h // gcd_h), _inverse(p.dilation_w // gcd_w, p.stride_w // gcd_w),
            c_src // together, c_out // together, *wraps,
            src_n, src_row, src_col, p.K // groups * p.w_k, w_src, w_out, p.w_r, p.w_s, out_n, out_row, out_col,
            *res, ACT=act, NORM_ACT=norm.act, NORM_SOURCE=norm.present and not transposed,
            NORM_RESULT=norm.present and transposed, TRANSPOSED=transposed and not linear, LINEAR=linear,
            PACKED=packed, EVEN_K=c_src % tile.block_k == 0 and not packed and together == 1,
            DIAGONAL=together > 1, HAS_BIAS=b is not None,
            INT64=conv2d_int64(p) or needs_int64((p.N, res[0]), (out_h, res[1]), (out_w, res[2]), (c_out * groups, 1)),
            INPUT_PRECISION=how, BY_HAND=by_hand(src.dtype),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
            **tile.options(capability(src)),
        )  # fmt: skip
    return tile.block_m, ceil_div(pixels, tile.block_m) * phases[0] * phases[1]


def _inverse(a: int, modulus: int) -> int:
    return pow(a, -1, modulus) if modulus > 1 else 0


def fprop(
    p: Conv2dProblem, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, y: torch.Tensor,
    scale: torch.Tensor | None = None, shift: torch.Tensor | None = None, r: torch.Tensor | None = None,
    *, tile: Config | None = None,
) -> None:  # fmt: skip
    """Writes y: conv2d's, or with the operands after it conv_bn_act's."""
    gather(p, x, w, b, y, tile, transposed=False, scale=scale, shift=shift, r=r, act=p.act)


def dgrad(
    p: Conv2dProblem, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, y: torch.Tensor,
    *, tile: Config | None = None,
) -> None:  # fmt: skip
    """Writes x, the input's gradient, from y, the output's."""
    gather(p, y, w, None, x, tile, transposed=True)


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
    *, workspace: torch.Tensor | None = None, tile: Config | None = None, norm: Norm = NO_NORM,
) -> None:  # fmt: skip
    """Writes w, the weight's gradient, from x and y, the output's gradient."""
    together = _together(p, x.element_size())
    groups = p.G // together
    c_src, c_out, columns = p.C // groups, p.K // groups, p.R * p.S * (p.C // p.G)
    if p.K * columns == 0:
        return
    splits = _wgrad_splits(p)
    chunks = _chunks(workspace, wgrad_workspace(p))
    if tile is None:
        m, n = p.K * splits, c_src if together > 1 else columns
        vectors = together == 1 and _vectors(p, x, y, unit=1)
        tile = config(m, n, 0, p.precision, x.element_size(), vectors, capability(x), norm.present, norm.present)
    packed = (
        p.R * p.S > 1 and c_src % tile.block_n != 0 and together == 1
    )  # a tile then crosses taps, and wastes no column
    num_n = ceil_div(columns, tile.block_n) if packed else p.R * p.S * ceil_div(c_src, tile.block_n)
    grid = ceil_div(c_out, tile.block_m) * num_n * groups * splits
    with on_device(x):
        launch(
            _wgrad_gemm, grid,
            x, y, *norm.operands, w, chunks,
            p.N, p.P, p.Q, p.H, p.W, c_src, c_out, groups, p.R, p.S,
            p.stride_h, p.stride_w, p.pad_h, p.pad_w, p.dilation_h, p.dilation_w,
            c_src // together, c_out // together, splits, ceil_div(p.N * p.P * p.Q, splits),
            p.x_n, p.x_h, p.x_w, p.w_k, p.w_c, p.w_r, p.w_s, p.y_n, p.y_h, p.y_w,
            SPLIT=splits > 1, LINEAR=_pointwise(p), EVEN=_even(p, p.y_n, p.y_h, p.y_w),
            DIAGONAL=together > 1, PACKED=packed, INT64=conv2d_int64(p),
            NORM_ACT=norm.act, NORM_SOURCE=norm.present,
            INPUT_PRECISION=_input_precision(p, x.dtype), BY_HAND=by_hand(x.dtype),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
            **tile.options(capability(x)),
        )  # fmt: skip
        if splits > 1:
            total = p.K * columns
            launch(
                _sum_splits, ceil_div(total, REDUCE_BLOCK),
                chunks, w, splits, total, columns, p.C // p.G, p.S, p.w_k, p.w_c, p.w_r, p.w_s,
                INT64=conv2d_int64(p), BY_HAND=by_hand(w.dtype), BLOCK=REDUCE_BLOCK,
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
            y, b, chunks, pixels, p.P, p.Q, p.K, splits, ceil_div(pixels, splits), p.y_n, p.y_h, p.y_w,
            SPLIT=splits > 1, INT64=y_int64(p), BY_HAND=by_hand(y.dtype),
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
# Weights whose channels lie R·S elements apart would be loaded one by one: a copy of them takes a few microseconds.
LAYOUTS: dict[str, dict[str, str]] = {"fprop": {"w": "nhwc"}, "dgrad": {"w": "nhwc"}}
