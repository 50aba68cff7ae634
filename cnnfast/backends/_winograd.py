"""What every backend's Winograd kernels ask of a convolution: pairs of whether something is wrong, and the reason to give."""

from __future__ import annotations

from collections.abc import Sequence

from cnnfast.dispatch import Problem

_Checks = list[tuple[bool, str]]
WGRAD_PIXELS = 1024  # that a weight gradient sums at least, where transforms round


def shape(p: Problem, filters: Sequence[tuple[int, int]] = ((3, 3),), stride: int = 1) -> _Checks:
    """A filter of one of these sizes, with that stride and dilation 1."""
    sizes = " or ".join(f"{r}x{s}" for r, s in filters)
    return [
        ((p.R, p.S) not in filters, f"needs a {sizes} filter, not {p.R}x{p.S}"),
        ((p.stride_h, p.stride_w) != (stride, stride), f"needs stride {stride}, not {p.stride_h}, {p.stride_w}"),
        ((p.dilation_h, p.dilation_w) != (1, 1), f"needs dilation 1, not {p.dilation_h}, {p.dilation_w}"),
    ]


def accuracy(p: Problem, summed: int, least: int) -> _Checks:
    """Where transforms round (F(4, 3) and its like in fp32): sums over ``least`` channels, of a weight gradient pixels.

    torch sums few products, and inputs too small for oneDNN, with hardly an error, which would be exceeded three times.
    """
    inputs, unit = p.N * p.C * p.H * p.W, "pixels" if p.direction == "wgrad" else "channels"
    few = p.direction != "wgrad" and inputs <= 20480
    return [
        (summed < least, f"needs sums over {least} {unit} to be as accurate as asked, not {summed}"),
        (few, f"needs more than 20480 inputs to be as accurate as asked, not {inputs}"),
    ]


def precision(p: Problem) -> _Checks:
    """Any mode but "ieee"."""
    return [(p.precision == "ieee", "precision ieee: multiplies sums of inputs by sums of weights, not each by each")]
