"""The activations that fused kernels end with, by the numbers of csrc/common/activation.h, in fp32. NaN passes, as in torch."""

from __future__ import annotations

import triton
import triton.language as tl

NONE, RELU, RELU6, LEAKY_RELU = (tl.constexpr(number) for number in range(4))
LEAKY_SLOPE = tl.constexpr(0.01)


@triton.jit
def activate(value, ACT: tl.constexpr):
    """act(value)."""
    # The comparisons are false for a NaN, which therefore stays.
    if ACT == RELU:
        value = tl.where(value < 0.0, 0.0, value)
    if ACT == RELU6:
        value = tl.where(value < 0.0, 0.0, tl.where(value > 6.0, 6.0, value))
    if ACT == LEAKY_RELU:
        value = tl.where(value > 0.0, value, value * LEAKY_SLOPE)
    return value


@triton.jit
def activate_gradient(g, at, ACT: tl.constexpr):
    """g * act'(z); at is z or act(z), which tell the same."""
    if ACT == RELU:
        g = tl.where(at <= 0.0, 0.0, g)
    if ACT == RELU6:
        g = tl.where((at <= 0.0) | (at >= 6.0), 0.0, g)
    if ACT == LEAKY_RELU:
        g = tl.where(at > 0.0, g, g * LEAKY_SLOPE)
    return g
