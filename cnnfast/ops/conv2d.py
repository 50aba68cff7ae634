"""The contract of conv2d: schema, validation, output shape and strides, derivatives, FLOPs.

    y[n,k,p,q] = b[k] + sum_{c,r,s} x[n, g*C/G + c, p*stride_h - pad_top + r*dilation_h,
                                         q*stride_w - pad_left + s*dilation_w] * w[k,c,r,s]
    P = (H + pad_top + pad_bottom - dilation_h*(R - 1) - 1) // stride_h + 1, Q likewise

A convolution is bilinear in x and w, so each of fprop, dgrad and wgrad has a derivative made of the other two; second
derivatives, forward mode and transposed convolution need no kernel of their own. Operators take normalised arguments:
stride and dilation as pairs, padding as (top, bottom, left, right), everything else by value.

Every operator ends with ``precision, backend, strict``: the settings as they were where the user called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from cnnfast import dispatch
from cnnfast.dispatch import DTYPES, Meta, Role
from cnnfast.errors import DtypeError, ShapeError
from cnnfast.ops import _memory
from cnnfast.ops._operator import Operator, capability, layouts, serve

X = Role("x", ("x_n", "x_c", "x_h", "x_w"), batch_dim=0)
W = Role("w", ("w_k", "w_c", "w_r", "w_s"))
B = Role("b")
Y = Role("y", ("y_n", "y_c", "y_h", "y_w"), batch_dim=0)
SIGNATURE = dispatch.register_signature(
    dispatch.Signature(
        "conv2d",
        (X, W, B, Y),
        {"fprop": ("y",), "dgrad": ("x",), "wgrad": ("w",), "bgrad": ("b",)},
        zeros=("act", "r_n", "r_c", "r_h", "r_w"),  # conv_bn_act's
    )
)

_TAIL = "int[2] stride, int[4] padding, int[2] dilation, int groups, str precision, str backend, bool strict"


# by the number of spatial dimensions: the axes, and what the padding, input and weight look like
_FORMS = {
    1: (("length",), "(left, right)", "a 3-D input (N, C, L), or 2-D without batch, and a 3-D weight (K, C/groups, S)"),
    2: (
        ("height", "width"), "(top, bottom, left, right)",
        "a 4-D input (N, C, H, W), or 3-D without batch, and a 4-D weight (K, C/groups, R, S)",
    ),
}  # fmt: skip


def validate(
    x: Any, w: Any, b: Any, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    op: str = "conv2d",
) -> None:  # fmt: skip
    """Raises what torch rejects, in one or two dimensions: operation, expectation with the arithmetic, what came."""
    axes, sides, form = _FORMS[len(stride)]

    def fail(expected: str, error: type[Exception] = ShapeError) -> None:
        bias = "none" if b is None else tuple(b.shape)
        raise error(
            f"{op}: {expected}; got input {tuple(x.shape)} {x.dtype}, weight {tuple(w.shape)} {w.dtype}, bias {bias}"
            f"{'' if b is None else f' {b.dtype}'}, stride {tuple(stride)}, padding {sides} {tuple(padding)}, "
            f"dilation {tuple(dilation)}, groups {groups}"
        )

    if x.dim() != len(axes) + 2 or w.dim() != len(axes) + 2:
        fail(f"expected {form}")
    if x.dtype != w.dtype or (b is not None and b.dtype != x.dtype):
        fail("expected input, weight and bias of one dtype", DtypeError)
    if x.device != w.device or (b is not None and b.device != x.device):
        fail(f"expected one device, got {x.device}, {w.device}{'' if b is None else f', {b.device}'}")
    if min(stride) <= 0:
        fail("non-positive stride is not supported")
    if min(padding) < 0:
        fail("negative padding is not supported")
    if min(dilation) <= 0:
        fail("non-positive dilation is not supported")
    if groups <= 0:
        fail("non-positive groups is not supported")
    (_, c, *image), (k, cg, *kernel) = x.shape, w.shape
    if k < groups or k % groups:
        fail(f"expected the weight's dimension 0, K = {k}, to be a positive multiple of groups = {groups}")
    if c != cg * groups:
        fail(f"expected weight.shape[1] * groups = {cg} * {groups} = {cg * groups} input channels, not {c}")
    if b is not None and tuple(b.shape) != (k,):
        fail(f"expected a 1-D bias with K = {k} elements")
    if 0 in kernel:
        fail(f"expected a kernel of at least {' x '.join('1' for _ in axes)}")
    if 0 in image:
        fail("only an empty batch is supported, not an empty image")
    for i, axis in enumerate(axes):
        size, (first, last), taps, step = image[i], padding[2 * i : 2 * i + 2], kernel[i], dilation[i]
        extent = step * (taps - 1) + 1
        if size + first + last < extent:
            fail(
                f"the kernel can't be larger than the padded input: {axis} {size} + {first} + {last} = "
                f"{size + first + last} < {step} * ({taps} - 1) + 1 = {extent}"
            )


def output_shape(x: Any, w: Any, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Any:
    """(N, K, P, Q) for an input of shape (N, C, H, W) and a weight (K, C/G, R, S)."""
    p = (x[2] + padding[0] + padding[1] - dilation[0] * (w[2] - 1) - 1) // stride[0] + 1
    q = (x[3] + padding[2] + padding[3] - dilation[1] * (w[3] - 1) - 1) // stride[1] + 1
    return (x[0], w[0], p, q)


def flops(x: Any, w: Any, y: Any) -> int:
    """Multiply-adds x 2 of the direct algorithm: 2 * N*P*Q * K * C/G * R*S."""
    return int(2 * y[0] * y[2] * y[3] * w[0] * w[1] * w[2] * w[3])


def problem(
    direction: str, x: Any, w: Any, y: Any, dtype: torch.dtype, device: torch.device, params: Sequence[Any],
    layouts: tuple[tuple[str, str], ...] = (),
) -> dispatch.Problem:  # fmt: skip
    """The problem of a call, from shapes alone: ``x`` (N, C, H, W), ``w`` (K, C/G, R, S), ``y`` (N, K, P, Q)."""
    stride, padding, dilation, groups, precision = params[:5]
    sizes = (
        ("N", x[0]), ("C", x[1]), ("H", x[2]), ("W", x[3]), ("K", w[0]), ("R", w[2]), ("S", w[3]),
        ("P", y[2]), ("Q", y[3]), ("G", groups), ("stride_h", stride[0]), ("stride_w", stride[1]),
        ("pad_h", padding[0]), ("pad_w", padding[2]), ("dilation_h", dilation[0]), ("dilation_w", dilation[1]),
    )  # fmt: skip
    numel = x[0] * x[1] * x[2] * x[3] + w[0] * w[1] * w[2] * w[3] + y[0] * y[1] * y[2] * y[3]
    return dispatch.Problem(
        op="conv2d", direction=direction, dtype=DTYPES[dtype], device=device.type, precision=precision,
        sizes=tuple((k, int(v)) for k, v in sizes), layouts=layouts, capability=capability(device),
        flops=flops(x, w, y) if direction != "bgrad" else numel, bytes=int(numel) * dtype.itemsize,
    )  # fmt: skip


def _bind(
    direction: str, shapes: tuple[Any, Any, Any], inputs: Mapping[str, Any], output: str, channels_last: bool,
    params: Sequence[Any],
) -> Callable[..., Any]:  # fmt: skip
    """Selects and binds; ``shapes`` are x's, w's and y's."""
    first = next(t for t in inputs.values() if t is not None)
    x, w, y = shapes
    shape = {"x": x, "w": w, "y": y, "b": (w[0],)}[output]
    out = Meta(tuple(shape), _memory.strides_of(shape, channels_last), first.dtype)
    p = problem(direction, x, w, y, first.dtype, first.device, params, layouts(inputs))
    return serve(p, inputs, {output: out}, params[5], params[6])


# ---- fprop -----------------------------------------------------------------------------------------------------------


def _resolve(tensors: Sequence[Any], params: tuple[Any, ...]) -> Callable[..., Any]:
    x, w, b = tensors
    validate(x, w, b, *params[:4])
    y = output_shape(x.shape, w.shape, *params[:3])
    inputs = {"x": x, "w": w, "b": b}
    return _bind("fprop", (x.shape, w.shape, y), inputs, "y", _memory.prefers_channels_last(x, w), params)


def _fake(tensors: Sequence[Any], params: tuple[Any, ...]) -> Any:
    x, w, b = tensors
    validate(x, w, b, *params[:4])
    return _memory.empty(x, output_shape(x.shape, w.shape, *params[:3]), _memory.prefers_channels_last(x, w))


def _backward(needs: Sequence[bool], gradients: Sequence[Any], saved: Sequence[Any], params: Any, metas: Any) -> Any:
    g, (x, w, _), (mx, mw, _) = gradients[0], saved, metas
    if g is None:
        return None, None, None
    return (
        conv2d_dgrad(w, g, mx.shape, mx.channels_last or mw.channels_last, *params) if needs[0] else None,
        conv2d_wgrad(x, g, mw.shape, mw.channels_last, *params) if needs[1] else None,
        conv2d_bgrad(g, *params[4:]) if needs[2] else None,
    )


def _jvp(tangents: Sequence[Any], tensors: Sequence[Any], params: tuple[Any, ...]) -> Any:
    (tx, tw, tb), (x, w, _) = tangents, tensors
    terms = []
    if tx is not None:
        terms.append(conv2d(tx, w, None, *params))
    if tw is not None:
        terms.append(conv2d(x, tw, None, *params))
    if tb is not None:
        shape = output_shape(x.shape, w.shape, *params[:3])
        terms.append(tb.reshape(1, -1, 1, 1).expand(shape))
    return sum(terms[1:], terms[0]) if terms else None


conv2d = Operator(
    "conv2d",
    f"(Tensor x, Tensor w, Tensor? b, {_TAIL}) -> Tensor",
    tensors=3,
    resolve=_resolve,
    fake=_fake,
    backward=_backward,
    jvp=_jvp,
    saves=lambda needs: (needs[1], needs[0], False),
    flops=lambda x, w, b, *args, out_shape=None, **kw: flops(x, w, out_shape),
    fold=(0,),
    fold_params=lambda params, size: params,
)


# ---- dgrad: dx from w and g = dL/dy. Linear in each: its derivatives are fprop and wgrad. ------------------------------


def _check_gradient(direction: str, g: Any, x: Any, w: Any, other: Any, params: Sequence[Any]) -> None:
    """The operators of the backward pass can be called directly, too: nothing may read out of bounds."""
    stride, padding, dilation, groups = params[:4]
    legal = min(stride) > 0 and min(padding) >= 0 and min(dilation) > 0 and groups > 0
    if not legal or len(x) != 4 or len(w) != 4 or w[0] % groups or x[1] != w[1] * groups:
        raise ShapeError(
            f"conv2d_{direction}: input {tuple(x)} and weight {tuple(w)} don't go together with stride {tuple(stride)}, "
            f"padding {tuple(padding)}, dilation {tuple(dilation)}, groups {groups}"
        )
    expected = tuple(output_shape(x, w, stride, padding, dilation))
    if tuple(g.shape) != expected:
        raise ShapeError(f"conv2d_{direction}: expected a gradient of shape {expected}, got {tuple(g.shape)}")
    if g.dtype != other.dtype or g.device != other.device:
        raise DtypeError(
            f"conv2d_{direction}: expected one dtype and device, got a gradient {g.dtype} on {g.device} and "
            f"{other.dtype} on {other.device}"
        )


def _dgrad_resolve(tensors: Sequence[Any], params: tuple[Any, ...]) -> Callable[..., Any]:
    (w, g), size, channels_last, rest = tensors, params[0], params[1], params[2:]
    _check_gradient("dgrad", g, size, w.shape, w, rest)
    return _bind("dgrad", (size, w.shape, g.shape), {"w": w, "y": g}, "x", channels_last, rest)


def _dgrad_fake(tensors: Sequence[Any], params: tuple[Any, ...]) -> Any:
    return _memory.empty(tensors[1], params[0], params[1])


def _dgrad_backward(needs: Sequence[bool], gradients: Sequence[Any], saved: Any, params: Any, metas: Any) -> Any:
    gg, (w, g), rest = gradients[0], saved, params[2:]
    if gg is None:
        return None, None
    return (
        conv2d_wgrad(gg, g, metas[0].shape, metas[0].channels_last, *rest) if needs[0] else None,
        conv2d(gg, w, None, *rest) if needs[1] else None,
    )


conv2d_dgrad: Operator = Operator(
    "conv2d_dgrad",
    f"(Tensor w, Tensor g, SymInt[] size, bool channels_last, {_TAIL}) -> Tensor",
    tensors=2,
    resolve=_dgrad_resolve,
    fake=_dgrad_fake,
    backward=_dgrad_backward,
    jvp=lambda tangents, tensors, params: _bilinear(conv2d_dgrad, tangents, tensors, params),
    saves=lambda needs: (needs[1], needs[0]),
    flops=lambda w, g, *args, out_shape=None, **kw: flops(out_shape, w, g),
    fold=(1,),
    fold_params=lambda params, size: ((params[0][0] * size, *params[0][1:]), *params[1:]),
)


# ---- wgrad: dw from x and g. Linear in each: its derivatives are dgrad and fprop. -------------------------------------


def _wgrad_resolve(tensors: Sequence[Any], params: tuple[Any, ...]) -> Callable[..., Any]:
    (x, g), size, channels_last, rest = tensors, params[0], params[1], params[2:]
    _check_gradient("wgrad", g, x.shape, size, x, rest)
    return _bind("wgrad", (x.shape, size, g.shape), {"x": x, "y": g}, "w", channels_last, rest)


def _wgrad_backward(needs: Sequence[bool], gradients: Sequence[Any], saved: Any, params: Any, metas: Any) -> Any:
    gg, (x, g), rest = gradients[0], saved, params[2:]
    if gg is None:
        return None, None
    return (
        conv2d_dgrad(gg, g, metas[0].shape, metas[0].channels_last, *rest) if needs[0] else None,
        conv2d(x, gg, None, *rest) if needs[1] else None,
    )


conv2d_wgrad: Operator = Operator(
    "conv2d_wgrad",
    f"(Tensor x, Tensor g, SymInt[] size, bool channels_last, {_TAIL}) -> Tensor",
    tensors=2,
    resolve=_wgrad_resolve,
    fake=lambda tensors, params: _memory.empty(tensors[1], params[0], params[1]),
    backward=_wgrad_backward,
    jvp=lambda tangents, tensors, params: _bilinear(conv2d_wgrad, tangents, tensors, params),
    saves=lambda needs: (needs[1], needs[0]),
    flops=lambda x, g, *args, out_shape=None, **kw: flops(x, out_shape, g),
)


def _bilinear(operator: Operator, tangents: Sequence[Any], tensors: Sequence[Any], params: tuple[Any, ...]) -> Any:
    (ta, tb), (a, b) = tangents, tensors
    terms = []
    if ta is not None:
        terms.append(operator(ta, b, *params))
    if tb is not None:
        terms.append(operator(a, tb, *params))
    return sum(terms[1:], terms[0]) if terms else None


# ---- bgrad: db[k] = sum over n, p, q of g. Linear: its derivative spreads db over g's shape. --------------------------


def _bgrad_resolve(tensors: Sequence[Any], params: tuple[Any, ...]) -> Callable[..., Any]:
    (g,) = tensors
    if g.dim() != 4:
        raise ShapeError(f"conv2d_bgrad: expected a 4-D gradient (N, K, P, Q), got {tuple(g.shape)}")
    n, k, p, q = g.shape
    # only g's sizes matter; the rest of the problem is a 1x1 convolution of that size
    rest = ((1, 1), (0, 0, 0, 0), (1, 1), 1, *params)
    return _bind("bgrad", ((n, 1, p, q), (k, 1, 1, 1), g.shape), {"y": g}, "b", False, rest)


conv2d_bgrad: Operator = Operator(
    "conv2d_bgrad",
    "(Tensor g, str precision, str backend, bool strict) -> Tensor",
    tensors=1,
    resolve=_bgrad_resolve,
    fake=lambda tensors, params: _memory.empty(tensors[0], (tensors[0].shape[1],), False),
    backward=lambda needs, gradients, saved, params, metas: (
        None if gradients[0] is None else gradients[0].reshape(1, -1, 1, 1).expand(metas[0].shape),
    ),
    jvp=lambda tangents, tensors, params: conv2d_bgrad(tangents[0], *params),
    saves=lambda needs: (False,),
)
