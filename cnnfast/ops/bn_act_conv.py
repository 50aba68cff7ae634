"""The contract of bn_act_conv: a convolution between two batch norms in training.

    y = conv2d(z, w, b),  z[n,c,h,w] = act((x[n,c,h,w] - xm[c]) * xv[c] * xw[c] + xb[c])
    ym = mean of y, yv = 1 / sqrt(variance of y + eps), ys = unbiased variance of y, a channel each

x is a convolution's result and xm, xv its own mean and 1 / standard deviation (xv with x_eps), as this operator returned
them for it (or batch_norm_stats); without them z is x. So a chain conv -> batch norm -> act -> conv -> ... keeps what its
convolutions write, and no normalised activation. The derivative knows that xm and xv depend on x; like batch_norm's, the
operator has no gradient for them, nor for the statistics of y: whoever normalises y by them (batch_norm, or the next
bn_act_conv) gives y the whole gradient.

Roles: x, w, b, y as conv2d's; xm, xv, xw, xb; ym, yv, ys; dw, db, t, the gradients of xw, xb, x. Directions: fprop ->
y, ym, yv, ys; wgrad -> w; dgrad -> dw, db, t. All vectors are of the accumulator's dtype. Where no kernel serves, or one is
predicted to take longer, batch_norm, conv2d and batch_norm_stats do, one after the other: the same values, for they round
where these would. z is then made again for the weight's gradient: a pass over memory, against keeping it.

A gradient that is itself to be differentiated, and forward mode, are composed likewise, of operators that have both.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from cnnfast import dispatch, settings
from cnnfast.dispatch import Meta, Role
from cnnfast.errors import DtypeError, ShapeError
from cnnfast.ops import _activation, _memory
from cnnfast.ops._operator import Operator, layouts, serve, transforms_active
from cnnfast.ops.batch_norm import (
    accumulator,
    batch_norm,
    batch_norm_backward,
    batch_norm_stats,
    composed_backward,
    tangent,
)
from cnnfast.ops.batch_norm import problem as norm_problem
from cnnfast.ops.batch_norm import validate as validate_norm
from cnnfast.ops.conv2d import B, W, X, Y, conv2d, conv2d_bgrad, conv2d_dgrad, conv2d_wgrad, flops, output_shape
from cnnfast.ops.conv2d import problem as conv2d_problem
from cnnfast.ops.conv2d import validate as validate_conv2d

_VECTORS = ("xm", "xv", "xw", "xb")
SIGNATURE = dispatch.register_signature(
    dispatch.Signature(
        "bn_act_conv",
        (
            X, W, B, Y, *(Role(name, dtype="acc") for name in (*_VECTORS, "ym", "yv", "ys")),
            Role("dw", dtype="acc"), Role("db", dtype="acc"), Role("t", ("t_n", None, "t_h", "t_w"), batch_dim=0),
        ),
        {"fprop": ("y", "ym", "yv", "ys"), "wgrad": ("w",), "dgrad": ("dw", "db", "t")},
        zeros=("act", "r_n", "r_c", "r_h", "r_w"),
    )
)  # fmt: skip

_TAIL = (
    "int[2] stride, int[4] padding, int[2] dilation, int groups, str activation, float x_eps, float eps, "
    "str precision, str backend, bool strict"
)
_NORM = "Tensor? xm, Tensor? xv, Tensor? xw, Tensor? xb"


def validate(tensors: Sequence[Any], params: Sequence[Any]) -> None:
    """Raises where the convolution isn't one, or the vectors don't fit x."""
    x, w, b, xm, xv, xw, xb = tensors
    stride, padding, dilation, groups = params[:4]
    validate_conv2d(x, w, b, stride, padding, dilation, groups, "bn_act_conv")
    _check_norm(x, xm, xv, xw, xb)


def _check_norm(x: Any, xm: Any, xv: Any, xw: Any, xb: Any) -> None:
    if (xm is None) != (xv is None) or (xm is None and (xw is not None or xb is not None)):
        raise ShapeError("bn_act_conv: expected both xm and xv, or none of the vectors")
    if xm is not None:
        validate_norm(x, {"xm": xm, "xv": xv, "xw": xw, "xb": xb}, {})


def problem(
    direction: str, x: Any, w: Any, y: Any, dtype: torch.dtype, device: torch.device, params: Sequence[Any],
    layouts: tuple[tuple[str, str], ...] = (), normed: bool = True,
) -> dispatch.Problem:  # fmt: skip
    """The problem of a call: conv2d's with the activation of x, and whether x is normalised."""
    stride, padding, dilation, groups, activation, _, eps, precision = params[:8]
    base = conv2d_problem(direction, x, w, y, dtype, device, (stride, padding, dilation, groups, precision), layouts)
    (eps_bits,) = struct.unpack("=q", struct.pack("=d", eps))
    more = 2 * x[0] * x[1] * x[2] * x[3] * dtype.itemsize if direction == "dgrad" else 0  # dz once more, and x
    return dataclasses.replace(
        base, op="bn_act_conv", bytes=base.bytes + int(more),
        sizes=(*base.sizes, ("x_act", _activation.code("bn_act_conv", activation)), ("eps_bits", eps_bits),
               ("normed", int(normed))),
    )  # fmt: skip


def _serve(
    direction: str, shapes: tuple[Any, Any, Any], inputs: Mapping[str, Any], outputs: Mapping[str, Meta], params: Any,
    composed: Callable[..., Any],
) -> Callable[..., Any]:  # fmt: skip
    """A kernel's run, or that of the operators which make the same."""
    backend = params[8]
    first = next(t for t in inputs.values() if t is not None)
    if backend.partition(".")[0] != "aten":  # of which torch has several, and so have we
        normed = inputs.get("xm") is not None
        p = problem(direction, *shapes, first.dtype, first.device, params, layouts(inputs), normed)
        try:
            fused = dispatch.select(p, backend, strict=True).implementation.cost(p)
            # a kernel that is asked for by its name serves, however long it takes
            apart = math.inf if "." in backend else _apart(p, shapes, first.dtype, first.device, params)
            if fused <= apart:
                return serve(p, inputs, outputs, backend, True)
            reason = f"predicted at {fused * 1e6:.0f} us, one after the other at {apart * 1e6:.0f}"
        except NotImplementedError as error:
            reason = str(error)
        note = f"batch_norm, conv2d and batch_norm_stats in its place: {reason}"
        settings.note(dispatch.Unserved("bn_act_conv", note))
    return functools.partial(composed, _Calls(), params)


class _Calls:
    """Calls of operators, the same ones with tensors of the same kinds every time: their kernels are found once."""

    def __init__(self) -> None:
        self._runs: dict[str, Callable[..., Any]] = {}

    def __call__(self, operator: Operator, tensors: Sequence[Any], params: tuple[Any, ...]) -> Any:
        run = self._runs.get(operator.name)
        if run is None:
            run = self._runs[operator.name] = operator.run(tensors, params)
        return run(*tensors)


def _apart(
    p: dispatch.Problem, shapes: tuple[Any, Any, Any], dtype: torch.dtype, device: torch.device, params: Any
) -> float:
    """Predicted seconds of the operators that make the same one after the other."""
    stride, padding, dilation, groups, activation, x_eps, eps, precision, backend = params[:9]
    x, _, y = shapes
    parts = [conv2d_problem(p.direction, *shapes, dtype, device, (stride, padding, dilation, groups, precision))]
    if p.direction == "fprop":
        parts.append(norm_problem("stats", y, dtype, device, ("none", True, eps), activations=1))
    if p.direction == "dgrad":
        parts.append(norm_problem("backward", x, dtype, device, (activation, True, x_eps), activations=3))
    elif p.normed:
        parts.append(norm_problem("fprop", x, dtype, device, (activation, True, x_eps)))
    parts = [dataclasses.replace(part, device=p.device, capability=p.capability) for part in parts]
    return sum(dispatch.predicted(part, backend) for part in parts)


def _conv(params: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of the convolution alone."""
    return (*params[:4], *params[7:])


def _norm(params: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of x's batch norm alone."""
    return (params[4], True, params[5], *params[8:])


def _normed(params: Sequence[Any], x: Any, xm: Any, xv: Any, xw: Any, xb: Any) -> Any:
    """z."""
    return x if xm is None else batch_norm(x, xw, xb, xm, xv, None, *_norm(params))


# ---- fprop -----------------------------------------------------------------------------------------------------------


def _resolve(tensors: Sequence[Any], params: tuple[Any, ...]) -> Callable[..., Any]:
    x, w = tensors[:2]
    validate(tensors, params)
    y = tuple(output_shape(x.shape, w.shape, *params[:3]))
    inputs = dict(zip(("x", "w", "b", *_VECTORS), tensors, strict=True))
    vector = Meta((w.shape[0],), (1,), accumulator(x.dtype))
    outputs = {
        "y": Meta(y, _memory.strides_of(y, _memory.prefers_channels_last(x, w)), x.dtype),
        **dict.fromkeys(("ym", "yv", "ys"), vector),
    }
    return _serve("fprop", (x.shape, w.shape, y), inputs, outputs, params, _composed)


def _composed(call: _Calls, params: tuple[Any, ...], x: Any, w: Any, b: Any, *vectors: Any) -> Any:
    y = call(conv2d, (_made(call, params, x, *vectors), w, b), _conv(params))
    return (y, *call(batch_norm_stats, (y,), (params[6], *params[8:])))


def _made(call: _Calls, params: tuple[Any, ...], x: Any, xm: Any, xv: Any, xw: Any, xb: Any) -> Any:
    """z as :func:`_normed` has it, without a derivative."""
    return x if xm is None else call(batch_norm, (x, xw, xb, xm, xv, None), _norm(params))


def _fake(tensors: Sequence[Any], params: tuple[Any, ...]) -> Any:
    x, w = tensors[:2]
    validate(tensors, params)
    y = _memory.empty(x, output_shape(x.shape, w.shape, *params[:3]), _memory.prefers_channels_last(x, w))
    return (y, *(x.new_empty((w.shape[0],), dtype=accumulator(x.dtype)) for _ in range(3)))


def _backward(needs: Sequence[bool], gradients: Sequence[Any], saved: Sequence[Any], params: Any, metas: Any) -> Any:
    g, (x, w, _, *vectors), (mx, mw, *_) = gradients[0], saved, metas
    if g is None:
        return (None,) * 7
    args = _conv(params)
    bias = conv2d_bgrad(g, *args[4:]) if needs[2] else None
    dgrad_args, wgrad_args = (mx.shape, mx.channels_last or mw.channels_last), (mw.shape, mw.channels_last)
    dx = dw = dxw = dxb = None
    if vectors[0] is None:
        dx = conv2d_dgrad(w, g, *dgrad_args, *args) if needs[0] else None
        dw = conv2d_wgrad(x, g, *wgrad_args, *args) if needs[1] else None
    elif torch.is_grad_enabled() or transforms_active():
        dw = conv2d_wgrad(_normed(params, x, *vectors), g, *wgrad_args, *args) if needs[1] else None
        if needs[0] or needs[5] or needs[6]:
            dz = conv2d_dgrad(w, g, *dgrad_args, *args)
            wanted = (needs[0], needs[5], needs[6], False, False, False)
            xm, xv, xw, xb = vectors
            dx, dxw, dxb, *_ = composed_backward(wanted, dz, (x, xw, xb, xm, xv), None, _norm(params))
    else:
        dw = bn_act_conv_wgrad(x, g, *vectors, *wgrad_args, *params) if needs[1] else None
        if needs[0] or needs[5] or needs[6]:
            dxw, dxb, dx = bn_act_conv_dgrad(x, w, g, *vectors, *params)
    return (
        dx if needs[0] else None, dw, bias, None, None, dxw if needs[5] else None, dxb if needs[6] else None,
    )  # fmt: skip


def _jvp(tangents: Sequence[Any], tensors: Sequence[Any], params: tuple[Any, ...]) -> Any:
    (tx, tw, tb, _, _, txw, txb), (x, w, _, *vectors) = tangents, tensors
    tz, args = tx, _conv(params)
    if vectors[0] is not None:
        xm, xv, xw, xb = vectors
        tz = tangent((tx, txw, txb, None, None, None), (x, xw, xb, xm, xv, None), _norm(params))
    terms = []
    if tz is not None:
        terms.append(conv2d(tz, w, tb, *args))
    elif tb is not None:
        terms.append(tb.reshape(1, -1, 1, 1).expand(output_shape(x.shape, w.shape, *params[:3])))
    if tw is not None:
        terms.append(conv2d(_normed(params, x, *vectors), tw, None, *args))
    return (sum(terms[1:], terms[0]) if terms else None, None, None, None)


bn_act_conv = Operator(
    "bn_act_conv",
    f"(Tensor x, Tensor w, Tensor? b, {_NORM}, {_TAIL}) -> (Tensor, Tensor, Tensor, Tensor)",
    tensors=7,
    resolve=_resolve,
    fake=_fake,
    backward=_backward,
    jvp=_jvp,
    saves=lambda needs: (True, True, False, True, True, True, True),
    flops=lambda x, w, *args, out_shape=None, **kw: flops(x, w, out_shape[0]),
    differentiable=(True, False, False, False),
)


# ---- the gradients ---------------------------------------------------------------------------------------------------
#
# They are called where nobody differentiates further (see _backward); what they return has no derivative.


def _no_tangent(*args: Any) -> Any:
    raise NotImplementedError(
        "bn_act_conv: the raw operators of the gradient have no forward mode; bn_act_conv itself has"
    )


def _check_gradient(direction: str, x: Any, w: Any, g: Any, vectors: Sequence[Any], params: Sequence[Any]) -> None:
    expected = tuple(output_shape(x.shape, w, *params[:3]))
    if tuple(g.shape) != expected or g.dtype != x.dtype or g.device != x.device or vectors[0] is None:
        raise (ShapeError if tuple(g.shape) != expected else DtypeError)(
            f"bn_act_conv_{direction}: expected a gradient {expected} {x.dtype} on {x.device} and x's statistics, "
            f"got {tuple(g.shape)} {g.dtype} on {g.device}"
        )
    _check_norm(x, *vectors)


def _wgrad_resolve(tensors: Sequence[Any], params: tuple[Any, ...]) -> Callable[..., Any]:
    (x, g, *vectors), size, channels_last, rest = tensors, params[0], params[1], params[2:]
    _check_gradient("wgrad", x, size, g, vectors, rest)
    out = Meta(tuple(size), _memory.strides_of(size, channels_last), x.dtype)
    inputs = dict(zip(("x", "y", *_VECTORS), tensors, strict=True))

    def composed(call: _Calls, params: tuple[Any, ...], x: Any, g: Any, *vectors: Any) -> Any:
        z = _made(call, params, x, *vectors)
        return call(conv2d_wgrad, (z, g), (tuple(size), channels_last, *_conv(params)))

    return _serve("wgrad", (x.shape, size, g.shape), inputs, {"w": out}, rest, composed)


bn_act_conv_wgrad = Operator(
    "bn_act_conv_wgrad",
    f"(Tensor x, Tensor g, {_NORM}, SymInt[] size, bool channels_last, {_TAIL}) -> Tensor",
    tensors=6,
    resolve=_wgrad_resolve,
    fake=lambda tensors, params: _memory.empty(tensors[1], params[0], params[1]),
    backward=lambda needs, *rest: (None,) * len(needs),
    jvp=_no_tangent,
    saves=lambda needs: (False,) * 6,
    flops=lambda x, g, *args, out_shape=None, **kw: flops(x, out_shape, g),
    differentiable=(False,),
)


def _dgrad_resolve(tensors: Sequence[Any], params: tuple[Any, ...]) -> Callable[..., Any]:
    x, w, g, *vectors = tensors
    _check_gradient("dgrad", x, w.shape, g, vectors, params)
    inputs = dict(zip(("x", "w", "y", *_VECTORS), tensors, strict=True))
    vector = Meta((x.shape[1],), (1,), accumulator(x.dtype))
    out = Meta(tuple(x.shape), _memory.strides_of(x.shape, _memory.prefers_channels_last(x)), x.dtype)
    outputs = {"dw": vector, "db": vector, "t": out}
    return _serve("dgrad", (x.shape, w.shape, g.shape), inputs, outputs, params, _composed_dgrad)


def _composed_dgrad(
    call: _Calls, params: tuple[Any, ...], x: Any, w: Any, g: Any, xm: Any, xv: Any, xw: Any, xb: Any
) -> Any:  # fmt: skip
    like = (tuple(x.shape), _memory.prefers_channels_last(x))
    dz = call(conv2d_dgrad, (w, g), (*like, *_conv(params)))
    return call(batch_norm_backward, (x, xw, xb, xm, xv, None, dz), _norm(params))


def _dgrad_fake(tensors: Sequence[Any], params: tuple[Any, ...]) -> Any:
    x = tensors[0]
    vectors = (x.new_empty((x.shape[1],), dtype=accumulator(x.dtype)) for _ in range(2))
    return (*vectors, _memory.empty(x, x.shape, _memory.prefers_channels_last(x)))


bn_act_conv_dgrad = Operator(
    "bn_act_conv_dgrad",
    f"(Tensor x, Tensor w, Tensor g, {_NORM}, {_TAIL}) -> (Tensor, Tensor, Tensor)",
    tensors=7,
    resolve=_dgrad_resolve,
    fake=_dgrad_fake,
    backward=lambda needs, *rest: (None,) * len(needs),
    jvp=_no_tangent,
    saves=lambda needs: (False,) * 7,
    flops=lambda x, w, g, *args, out_shape=None, **kw: flops(x, w, g),
    differentiable=(False, False, False),
)
