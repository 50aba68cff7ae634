"""1x1 convolutions at stride 1 as products that tensor descriptors feed: sm_90's and sm_100's TMA, persistent programs.

    fprop  y[m, k] = act(scale[k] (b[k] + sum_c x[m, c] w[k, c]) + shift[k] + r[m, k])        m = (n, h, w)
    dgrad  x[m, c] =        sum_k y[m, k] w[k, c]

Mapping. As many programs as the card has multiprocessors go through the tiles of BLOCK_M pixels × BLOCK_N channels in the
order of _gemm.py, so that one tile's loads begin while another's results are written. One thread asks for a whole block of
an operand; the hardware computes addresses, and fills with zeros what lies outside. Accumulator: fp32, rounded once.

Layout: pixels at one distance, contiguous channels, fprop's weight [k][c], dgrad's the same read the other way; addresses and
strides are multiples of 16 bytes. 16-bit floats, for whose products the tensor cores take either order of the weights.

After Triton's tutorial "Persistent Matmul", and NVIDIA's PTX manual, "Tensors" (cp.async.bulk.tensor).
"""

from __future__ import annotations

import importlib.util
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
INTERPRETED_PROGRAMS = 3


@triton.jit(do_not_specialize=["rows"])
def _descriptor_gemm(
    src, weight, out, bias, scale, shift, residual, rows, columns, depth, res_col,
    ACT: tl.constexpr, TRANSPOSED: tl.constexpr, BY_HAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    num_m = tl.cdiv(rows, BLOCK_M)
    num_n = tl.cdiv(columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        tile_m, tile_n = tile_order(tile, num_m, num_n, GROUP_M)
        m0 = tile_m * BLOCK_M
        n0 = tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k0 in tl.range(0, depth, BLOCK_K):
            a = src.load([m0, k0])
            if TRANSPOSED:
                b = weight.load([k0, n0])
            else:
                b = tl.trans(weight.load([n0, k0]))
            acc = accumulate(a, b, acc, "tf32", BY_HAND)
        channel = n0 + tl.arange(0, BLOCK_N)
        in_n = channel < columns
        if bias is not None:
            acc += widen(tl.load(bias + channel, mask=in_n, other=0.0), BY_HAND).to(tl.float32)[None, :]
        if scale is not None:
            acc *= tl.load(scale + channel, mask=in_n, other=0.0)[None, :]
        if shift is not None:
            acc += tl.load(shift + channel, mask=in_n, other=0.0)[None, :]
        if residual is not None:
            pixel = m0 + tl.arange(0, BLOCK_M)
            at = residual + (tl.cast(pixel, tl.int64) * res_col)[:, None] + channel[None, :]
            other = tl.load(at, mask=(pixel < rows)[:, None] & in_n[None, :], other=0.0)
            acc += widen(other, BY_HAND).to(tl.float32)
        out.store([m0, n0], narrow(activate(acc, ACT), out.dtype, BY_HAND))


def descriptor_product(
    p: Conv2dProblem, src: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, out: torch.Tensor, tile: Config,
    *, transposed: bool, scale: torch.Tensor | None, shift: torch.Tensor | None, r: torch.Tensor | None, act: int,
) -> None:  # fmt: skip
    """Launches fprop, from x to y, or transposed, dgrad from y to x."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    def matrix(base: torch.Tensor, rows: int, columns: int, stride: int, block: list[int]) -> Any:
        return TensorDescriptor(base, [rows, columns], [stride, 1], block)

    rows, x, y = p.N * p.P * p.Q, (p.C, p.x_w), (p.K, p.y_w)
    (depth, src_col), (columns, out_col) = (y, x) if transposed else (x, y)
    w_block = [tile.block_k, tile.block_n] if transposed else [tile.block_n, tile.block_k]
    tiles = ceil_div(rows, tile.block_m) * ceil_div(columns, tile.block_n)
    with on_device(src):
        launch(
            _descriptor_gemm, min(tiles, _programs(src)),
            matrix(src, rows, depth, src_col, [tile.block_m, tile.block_k]), matrix(w, p.K, p.C, p.w_k, w_block),
            matrix(out, rows, columns, out_col, [tile.block_m, tile.block_n]),
            b, scale, shift, r, rows, columns, depth, p.r_w if r is not None else 0,
            ACT=act, TRANSPOSED=transposed, BY_HAND=by_hand(src.dtype), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k, GROUP_M=tile.group_m, **tile.options(capability(src)),
        )  # fmt: skip


def _programs(tensor: torch.Tensor) -> int:
    """The multiprocessors of a tensor's card."""
    if not tensor.is_cuda:
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count
