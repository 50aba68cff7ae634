"""A Triton kernel with planted bugs, for the check of masks: see test_triton_static.py. Nothing launches it."""

import triton
import triton.language as tl


@triton.jit
def _read(x, at, mask):
    return tl.load(x + at, mask=mask, other=0.0)


@triton.jit
def copy(x, y, rows, columns, stride, BUG: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """y = x, a tile a program, then the tiles below it."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    other = tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * stride + column[None, :]
    if BUG == "no_mask":
        value = tl.load(x + at)
    elif BUG == "half_a_mask":
        value = tl.load(x + at, mask=(row < rows)[:, None], other=0.0)
    elif BUG == "mask_of_another_range":
        value = tl.load(x + at, mask=(row < rows)[:, None] & (other < columns)[None, :], other=0.0)
    elif BUG == "always_true":
        value = tl.load(x + at, mask=tl.full((BLOCK_M, BLOCK_N), True, tl.int1), other=0.0)
    elif BUG == "through_a_helper":
        value = _read(x, at, (column < columns)[None, :])
    else:
        value = _read(x, at, inside)
    for i in range(1, rows):
        moved = at + i * BLOCK_M * stride
        if BUG == "in_a_loop":
            value += tl.load(x + moved, mask=(column < columns)[None, :], other=0.0)
        else:
            value += tl.load(x + moved, mask=inside & (row + i * BLOCK_M < rows)[:, None], other=0.0)
    if BUG == "store":
        tl.store(y + at, value)
    else:
        tl.store(y + at, value, mask=inside)
