"""Convolutions at stride 1 as products that tensor descriptors feed: sm_90's and sm_100's TMA, persistent programs.

    fprop  y[n, p, q, k] = act(scale[k] (b[k] + sum_{r,s,c} x[n, p + r d - pad, q + s d - pad, c] w[k, c, r, s])
                               + shift[k] + r[n, p, q, k])                                   d: dilation
    dgrad  x[n, h, w, c] =                      sum_{r,s,k} y[n, h - r d + pad, w - s d + pad, k] w[k, c, r, s]

Mapping. A tile is BLOCK_N channels of BLOCK_M places: TILE_H × TILE_W of the map of as many images as that makes. A tap moves
such a box as a whole, so that its source is one load of a descriptor [N, H, W, C] at [n, p + off + r step, q + off + s step, c]:
the hardware computes addresses, and fills with zeros what lies outside, before the first row as well as after the last. There is
no mask and no arithmetic of addresses. The result's descriptor drops what lies outside. 1×1 whose places lie at one distance is
a map of one row. As many programs as the card has multiprocessors go through the tiles in the order of _gemm.py, so that one
tile's loads begin while another's results are written.
The product is made the other way round, channels × places: Triton lets wgmma read its first operand from shared memory only
where it is a load as it stands, as the weights' is (of dimensions of one nothing remains), and a box of places isn't.
Accumulator: fp32, rounded once.

Places beyond the map are computed in vain; which box has the fewest tiles depends on map and batch. Of 128 places, per cent in
vain on maps of 7×7, 14×14, 28×28, 56×56: of one image 62, 23, 23, 12; of 32 images 12, 0, 0, 0; of 128 none.

Layout: activations NHWC, weights [r][s][k][c] in any order but for contiguous c; strides and addresses are multiples of 16 bytes.
16-bit floats, for whose products the tensor cores take either order of an operand.

After Triton's tutorial "Persistent Matmul", and NVIDIA's PTX manual, "Tensors" (cp.async.bulk.tensor, tiled mode; its im2col mode,
which cuDNN and CUTLASS take and tl has not, wraps places around rows and images, and so wastes none).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ._activation import activate
from ._common import Conv2dProblem, by_hand, capability, ceil_div, launch, narrow, on_device, widen
from ._gemm import accumulate, tile_order
from ._tiles import Config

# Whether the installed Triton has descriptors that the host makes.
SUPPORTED = importlib.util.find_spec("triton.tools.tensor_descriptor") is not None
STRIDE = 8  # elements of 16 bits: what TMA's strides are multiples of
BOXES = ((16, 16), (8, 8), (4, 4), (2, 2), (8, 1), (1, 1))  # rows and columns; eight rows for maps of seven
INTERPRETED_PROGRAMS = 3


@triton.jit(
    do_not_specialize=[
        "batch", "height", "width", "columns", "depth", "taps_r", "taps_s", "off_h", "off_w", "step_h", "step_w",
    ]
)  # fmt: skip
def _descriptor_gemm(
    src, weight, out, bias, scale, shift, residual,
    batch, height, width, columns, depth, taps_r, taps_s, off_h, off_w, step_h, step_w,
    ACT: tl.constexpr, TRANSPOSED: tl.constexpr, BY_HAND: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    IMAGES: tl.constexpr = BLOCK_M // (TILE_H * TILE_W)
    tiles_h = tl.cdiv(height, TILE_H)
    tiles_w = tl.cdiv(width, TILE_W)
    num_m = tl.cdiv(batch, IMAGES) * tiles_h * tiles_w
    num_n = tl.cdiv(columns, BLOCK_N)
    steps = taps_r * taps_s * tl.cdiv(depth, BLOCK_K)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        tile_m, tile_n = tile_order(tile, num_m, num_n, GROUP_M)
        n0 = tile_n * BLOCK_N
        image = tile_m // (tiles_h * tiles_w) * IMAGES
        row = tile_m // tiles_w % tiles_h * TILE_H
        col = tile_m % tiles_w * TILE_W
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        # One loop over taps and channels, so that loads are in flight across the change of the tap.
        r = 0
        s = 0
        k0 = 0
        for _ in tl.range(0, steps):
            a = src.load([image, row + off_h + r * step_h, col + off_w + s * step_w, k0])
            if TRANSPOSED:
                w = tl.trans(tl.reshape(weight.load([r, s, k0, n0]), (BLOCK_K, BLOCK_N)))
            else:
                w = tl.reshape(weight.load([r, s, n0, k0]), (BLOCK_N, BLOCK_K))
            acc = accumulate(w, tl.trans(tl.reshape(a, (BLOCK_M, BLOCK_K))), acc, "tf32", BY_HAND)
            k0 += BLOCK_K
            tap_done = k0 >= depth
            k0 = tl.where(tap_done, 0, k0)
            s = tl.where(tap_done, s + 1, s)
            row_done = s >= taps_s
            r = tl.where(row_done, r + 1, r)
            s = tl.where(row_done, 0, s)
        acc = tl.trans(acc)
        channel = n0 + tl.arange(0, BLOCK_N)
        in_n = channel < columns
        if bias is not None:
            acc += widen(tl.load(bias + channel, mask=in_n, other=0.0), BY_HAND).to(tl.float32)[None, :]
        if scale is not None:
            acc *= tl.load(scale + channel, mask=in_n, other=0.0)[None, :]
        if shift is not None:
            acc += tl.load(shift + channel, mask=in_n, other=0.0)[None, :]
        if residual is not None:
            other = tl.reshape(residual.load([image, row, col, n0]), (BLOCK_M, BLOCK_N))
            acc += widen(other, BY_HAND).to(tl.float32)
        result = narrow(activate(acc, ACT), out.dtype, BY_HAND)
        out.store([image, row, col, n0], tl.reshape(result, (IMAGES, TILE_H, TILE_W, BLOCK_N)))


def boxes(block_m: int) -> tuple[tuple[int, int, int], ...]:
    """Images, rows and columns of the boxes that a tile of so many places can be; the last is a row."""
    cut = [(min(rows, block_m // columns), columns) for rows, columns in BOXES]
    return (*((block_m // (rows * columns), rows, columns) for rows, columns in cut), (1, 1, block_m))


def tiles(box: tuple[int, int, int], batch: int, height: int, width: int) -> int:
    """How many boxes cover the maps of a batch."""
    return ceil_div(batch, box[0]) * ceil_div(height, box[1]) * ceil_div(width, box[2])


def box(block_m: int, batch: int, height: int, width: int) -> tuple[int, int, int]:
    """The box that wastes the fewest places; of equals the first, whose taps overlap the most."""
    return min(boxes(block_m), key=lambda one: tiles(one, batch, height, width))


def result_map(p: Conv2dProblem, transposed: bool, linear: bool) -> tuple[int, int, int]:
    """Batch, height and width of what tiles cover: of a plain product (linear) one row."""
    batch, height, width = (p.N, p.H, p.W) if transposed else (p.N, p.P, p.Q)
    return (1, 1, batch * height * width) if linear else (batch, height, width)


def describable(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether TMA takes a tensor: its dimensions, the last of which is contiguous. Dimensions of one have any stride."""
    outer = zip(sizes[:-1], strides[:-1], strict=True)
    whole = all(size == 1 or (stride > 0 and stride % STRIDE == 0) for size, stride in outer)
    return whole and strides[-1] == 1 and sizes[-1] % STRIDE == 0 and min(sizes) > 0


def descriptor_product(
    p: Conv2dProblem, src: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, out: torch.Tensor, tile: Config,
    *, transposed: bool, linear: bool, scale: torch.Tensor | None, shift: torch.Tensor | None, r: torch.Tensor | None, act: int,
) -> None:  # fmt: skip
    """Launches fprop, from x to y, or transposed, dgrad from y to x; linear: as a plain product."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    def descriptor(base: torch.Tensor, sizes: Sequence[int], strides: Sequence[int], block: Sequence[int]) -> Any:
        given = [stride if size > 1 else sizes[-1] for size, stride in zip(sizes[:-1], strides, strict=True)]
        return TensorDescriptor(base, list(sizes), [*given, 1], list(block))

    x_map, y_map = result_map(p, True, linear), result_map(p, False, linear)
    x, y = ((*x_map, p.C), (p.x_n, p.x_h, p.x_w)), ((*y_map, p.K), (p.y_n, p.y_h, p.y_w))
    (source, source_strides), (result, result_strides) = (y, x) if transposed else (x, y)
    block = box(tile.block_m, *result[:3])
    sign = -1 if transposed else 1
    w_block = [tile.block_k, tile.block_n] if transposed else [tile.block_n, tile.block_k]
    wide = [*block, tile.block_n]
    wanted = tiles(block, *result[:3]) * ceil_div(result[3], tile.block_n)
    with on_device(src):
        launch(
            _descriptor_gemm, min(wanted, _programs(src)),
            descriptor(src, source, source_strides, [*block, tile.block_k]),
            descriptor(w, (p.R, p.S, p.K, p.C), (p.w_r, p.w_s, p.w_k), [1, 1, *w_block]),
            descriptor(out, result, result_strides, wide), b, scale, shift,
            None if r is None else descriptor(r, result, (p.r_n, p.r_h, p.r_w), wide),
            *result, source[3], p.R, p.S, -sign * p.pad_h, -sign * p.pad_w, sign * p.dilation_h, sign * p.dilation_w,
            ACT=act, TRANSPOSED=transposed, BY_HAND=by_hand(src.dtype), TILE_H=block[1], TILE_W=block[2],
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
            **tile.options(capability(src)),
        )  # fmt: skip


def _programs(tensor: torch.Tensor) -> int:
    """The multiprocessors of a tensor's card."""
    if not tensor.is_cuda:
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count
