"""The contract of conv_transpose2d: the data gradient of a convolution, as an operation of its own.

    y[n,k,h,w] = b[k] + sum over c,p,q,r,s with h = p*stride_h - pad_h + r*dilation_h, w likewise, of x[n,c,p,q] * weight[c,k,r,s]
    H = (P - 1)*stride_h - 2*pad_h + dilation_h*(R - 1) + output_padding_h + 1, W likewise

With the weight of a convolution from y's K channels to x's C this is conv2d_dgrad, whose kernels and derivatives serve;
here is only what differs: arguments, validation and the size of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cnnfast.errors import DtypeError, ShapeError


def validate(
    x: Any, w: Any, b: Any, stride: Sequence[int], padding: Sequence[int], output_padding: Sequence[int], groups: int,
    dilation: Sequence[int],
) -> None:  # fmt: skip
    """Raises what torch rejects: x (N, C, P, Q), w (C, K/G, R, S), b (K,)."""

    def fail(expected: str, error: type[Exception] = ShapeError) -> None:
        bias = "none" if b is None else f"{tuple(b.shape)} {b.dtype}"
        raise error(
            f"conv_transpose2d: {expected}; got input {tuple(x.shape)} {x.dtype}, weight {tuple(w.shape)} {w.dtype}, "
            f"bias {bias}, stride {tuple(stride)}, padding {tuple(padding)}, output_padding {tuple(output_padding)}, "
            f"groups {groups}, dilation {tuple(dilation)}"
        )

    if x.dim() != 4 or w.dim() != 4:
        fail("expected a 4-D input (N, C, H, W), or 3-D without batch, and a 4-D weight (C, K/groups, R, S)")
    if x.dtype != w.dtype or (b is not None and b.dtype != x.dtype):
        fail("expected input, weight and bias of one dtype", DtypeError)
    if x.device != w.device or (b is not None and b.device != x.device):
        fail(f"expected one device, got {x.device}, {w.device}{'' if b is None else f', {b.device}'}")
    if min(stride) <= 0:
        fail("non-positive stride is not supported")
    if min(padding) < 0:
        fail("negative padding is not supported")
    if min(output_padding) < 0:
        fail("negative output_padding is not supported")
    if min(dilation) <= 0:
        fail("non-positive dilation is not supported")
    if groups <= 0:
        fail("non-positive groups is not supported")
    (_, c, *image), (wc, kg, *kernel) = x.shape, w.shape
    if wc < groups or wc % groups:
        fail(f"expected the weight's dimension 0, C = {wc}, to be a positive multiple of groups = {groups}")
    if c != wc:
        fail(f"expected weight.shape[0] = {wc} input channels, not {c}")
    if b is not None and tuple(b.shape) != (kg * groups,):
        fail(f"expected a 1-D bias with weight.shape[1] * groups = {kg} * {groups} = {kg * groups} elements")
    if 0 in kernel:
        fail("expected a kernel of at least 1 x 1")
    if 0 in image:
        fail("only an empty batch is supported, not an empty image")
    for axis, extra, step, gap in zip(("height", "width"), output_padding, stride, dilation, strict=True):
        if extra >= step and extra >= gap:
            fail(f"output padding must be smaller than either stride or dilation: {axis} {extra} >= {step} and {gap}")
    size = output_size(image, kernel, stride, padding, output_padding, dilation)
    for axis, n, out, i in zip(("height", "width"), image, size, (0, 1), strict=True):
        if out < 0:
            fail(
                f"the result would be of negative size: {axis} ({n} - 1)*{stride[i]} - 2*{padding[i]} + {dilation[i]}*({kernel[i]} - 1)"
                f" + {output_padding[i]} + 1 = {out}"
            )


def output_size(
    image: Sequence[Any], kernel: Sequence[Any], stride: Sequence[int], padding: Sequence[int],
    output_padding: Sequence[int], dilation: Sequence[int],
) -> tuple[Any, Any]:  # fmt: skip
    """(H, W) of the result for an input of (P, Q) pixels."""
    h, w = (
        (n - 1) * s - 2 * p + d * (k - 1) + extra + 1
        for n, k, s, p, extra, d in zip(image, kernel, stride, padding, output_padding, dilation, strict=True)
    )
    return h, w


def as_dgrad(
    size: Sequence[Any], stride: Sequence[int], padding: Sequence[int], output_padding: Sequence[int]
) -> tuple[tuple[Any, Any], tuple[int, int, int, int], tuple[int, int]]:
    """The data gradient that computes a result of ``size`` (H, W): its size, its padding, and rows and columns to add.

    A convolution of stride s ignores up to s - 1 last rows, so output padding below the stride needs nothing. More (a
    dilation allows it) takes rows back that the padding had cut off, and what goes beyond them is zero.
    """
    sides: list[int] = []
    beyond = []
    for s, p, extra in zip(stride, padding, output_padding, strict=True):
        taken = 0 if extra < s else min(extra, p)
        sides += (p, p - taken)
        beyond.append(0 if extra < s else extra - taken)
    top, bottom, left, right = sides
    return (size[0] - beyond[0], size[1] - beyond[1]), (top, bottom, left, right), (beyond[0], beyond[1])
