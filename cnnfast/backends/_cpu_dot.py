"""What the CPU's kernels on pairs of bf16 (AVX512-BF16) can serve, and what they are predicted to cost.

Cycles are those of cpu.py: of one core on which a vector of float multiply-adds takes half of one. There a dot product of
pairs takes as long, and does twice the work.
"""

from __future__ import annotations

from cnnfast.dispatch import Problem

_ROUNDED_ONCE = (
    1.0,
    "products of bf16 are exact in float, where they are summed; the result is rounded once, as torch's",
)
DOT_ERRORS = {
    "conv2d_grouped": _ROUNDED_ONCE,
    "conv2d_implicit_gemm": _ROUNDED_ONCE,
    "conv2d_winograd_f2x2": (
        3.0,
        "transformed inputs and weights are rounded to bf16 once more: 2 to 2.7 times the error of rounding the result alone",
    ),
}

_LANES = 16  # pairs of a vector, and sums
_FIXED = 2e-6


def _seconds(cycles: float) -> float:
    return _FIXED + cycles / 2.5e9


def dot_implicit_gemm_cost(p: Problem) -> float:
    """Dot products, and the packing of weights where they come as they are."""
    c, k = (p.K, p.C) if p.direction == "dgrad" else (p.C, p.K)
    c, k = c // p.G, k // p.G
    pixels = p.N * (p.H * p.W if p.direction == "dgrad" else p.P * p.Q)
    taps = p.flops / 2 / max(1, pixels * k * c * p.G)  # a pixel's, which in dgrad are fewer with strides
    windows = c < _LANES and p.R * p.S > 1  # whose pixels are copied once for every filter row
    pairs = (p.R * p.S * c + 1) // 2 / (p.R * p.S) if windows else -(-c // 2)
    vectors = p.G * -(-k // _LANES) * pairs
    copies = p.G * pixels * (20 + 5 * p.R) if windows else 0
    multiply, pack = pixels * taps * vectors / 2 + copies, 20 * p.R * p.S * vectors
    if not p.packed:
        return _seconds(multiply + pack)
    bytes = 64 * p.R * p.S * vectors
    return _seconds(max(multiply, 0.2 * bytes) if bytes > 2**20 else multiply)


def dot_winograd_cost(p: Problem) -> float:
    """F(2x2): 16 products of a tile, its transforms, and those of the weights, which are made in every call."""
    c, k, h, w = (p.K, p.C, p.H, p.W) if p.direction == "dgrad" else (p.C, p.K, p.P, p.Q)
    c, k = c // p.G, k // p.G
    tiles, vectors = p.N * -(-h // 2) * -(-w // 2), -(-k // _LANES)
    transforms = 40 * tiles * (-(-c // _LANES) + vectors)
    weights = (25 if p.packed else 45) * c * vectors
    return _seconds(p.G * (16 * tiles * -(-c // 2) * vectors / 2 + transforms + weights))


def dot_grouped(p: Problem, isa: str) -> list[str]:
    """Reasons against the grouped kernel."""
    c, k = p.C // p.G, p.K // p.G
    if c == k and c in (2, 4, 8):
        return []
    return [f"needs 2, 4 or 8 input and as many output channels a group, not {c} and {k}"]


def dot_grouped_cost(p: Problem) -> float:
    """A permutation and a dot product for 32 multiply-adds."""
    return _seconds(p.flops / 2 / (2 * _LANES) / 1.5)
