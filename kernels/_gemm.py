"""Device code of every matrix product: program order, accumulation, the type of offsets, and the edges of maps."""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import widen

NOWHERE = tl.constexpr(-(2**30))  # a row or column that no tap moves onto the map


@triton.jit
def tile_order(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """Program order: GROUP_M tiles down, then one tile right, so that both panels are reused from L2."""
    in_group = GROUP_M * num_n
    first = pid // in_group * GROUP_M
    height = tl.minimum(num_m - first, GROUP_M)
    return first + (pid % in_group) % height, (pid % in_group) // height


@triton.jit
def accumulate(a, b, acc, INPUT_PRECISION: tl.constexpr, BY_HAND: tl.constexpr):
    """acc + a b. In fp32 grade each block's products are summed apart, so that no chain of additions is long.

    The compiler would fold that addition into the product's own chain; of a product with imprecise sums it doesn't.
    """
    a = widen(a, BY_HAND)
    b = widen(b, BY_HAND)
    if INPUT_PRECISION == "tf32":
        return tl.dot(a, b, acc, input_precision=INPUT_PRECISION)
    else:
        return acc + tl.dot(a, b, input_precision=INPUT_PRECISION, max_num_imprecise_acc=1)


@triton.jit
def wide(INT64: tl.constexpr, a, b, c):
    """Three strides in the type that offsets need."""
    if INT64:
        return tl.cast(a, tl.int64), tl.cast(b, tl.int64), tl.cast(c, tl.int64)
    else:
        return a, b, c


@triton.jit
def on_map(position, size):
    """0 <= position < size in one comparison."""
    return position.to(tl.uint32, bitcast=True) < tl.cast(size, tl.uint32)
