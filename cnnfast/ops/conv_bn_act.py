"""The contract of conv_bn_act: a convolution whose results pass through batch norm's affine map, a residual and act.

    y[n,k,p,q] = act(scale[k] * conv2d(x, w, b)[n,k,p,q] + shift[k] + r[n,k,p,q])

Batch norm in evaluation is such a map, scale = weight / sqrt(var + eps), shift = bias - mean * scale; b, scale, shift
and r may each be absent. scale and shift are of the accumulator's dtype (float64 for float64, else float32): beside
16-bit activations nothing of them is lost. The kernels of conv2d serve, with an epilogue on their stores; where none
does, conv2d and batch_norm do, one after the other.

Derivatives are conv2d's, and of the epilogue itself: dz = g * act'(y), db' = scale * dz for the convolution,
dscale = sum of dz * conv2d(x, w, b), which is computed again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cnnfast import dispatch, settings
from cnnfast.dispatch import ACCUMULATORS, Meta, Role
from cnnfast.errors import DtypeError, ShapeError
from cnnfast.ops import _activation, _memory
from cnnfast.ops._operator import Operator, layouts, serve
from cnnfast.ops.add_act import add_act_dgrad
from cnnfast.ops.batch_norm import batch_norm
from cnnfast.ops.conv2d import B, W, X, Y, conv2d, conv2d_bgrad, conv2d_dgrad, conv2d_wgrad, flops, output_shape
from cnnfast.ops.conv2d import problem as conv2d_problem
from cnnfast.ops.conv2d import validate as validate_conv2d

SCALE = Role("scale", dtype="acc")
SHIFT = Role("shift", dtype="acc")
R = Role("r", ("r_n", "r_c", "r_h", "r_w"), batch_dim=0)
SIGNATURE = dispatch.register_signature(
    dispatch.Signature("conv_bn_act", (X, W, B, Y, SCALE, SHIFT, R), {"fprop": ("y",)})
)

_TAIL = "int[2] stride, int[4] padding, int[2] dilation, int groups, str activation, str precision, str backend, bool strict"


def validate(tensors: Sequence[Any], params: Sequence[Any]) -> None:
    """Raises where the convolution isn't one, or the operands of the epilogue don't fit it."""
    x, w, b, scale, shift, r = tensors
    validate_conv2d(x, w, b, *params[:4])
    k, dtype = w.shape[0], ACCUMULATORS.get(x.dtype, torch.float32)
    expected = tuple(output_shape(x.shape, w.shape, *params[:3]))

    def fail(what: str, error: type[Exception] = ShapeError) -> None:
        given = ", ".join(
            f"{name} {tuple(t.shape)} {t.dtype}" if t is not None else f"no {name}"
            for name, t in zip(("input", "weight", "bias", "scale", "shift", "residual"), tensors, strict=True)
        )
        raise error(f"conv_bn_act: expected {what}; got {given}")

    for name, t in (("scale", scale), ("shift", shift)):
        if t is None:
            continue
        if tuple(t.shape) != (k,):
            fail(f"a 1-D {name} with K = {k} elements")
        if t.dtype != dtype:
            fail(f"{name} to be {dtype}, the accumulator of {x.dtype}", DtypeError)
        if t.device != x.device:
            fail(f"{name} on {x.device}, not {t.device}")
    if r is not None:
        if tuple(r.shape) != expected:
            fail(f"a residual of the result's shape {expected}")
        if r.dtype != x.dtype:
            fail(f"a residual of the input's dtype {x.dtype}", DtypeError)
        if r.device != x.device:
            fail(f"the residual on {x.device}, not {r.device}")


def problem(
    x: Any, w: Any, y: Any, dtype: torch.dtype, device: torch.device, params: Sequence[Any],
    layouts: tuple[tuple[str, str], ...] = (), residual: bool = False,
) -> dispatch.Problem:  # fmt: skip
    """The problem of a call: conv2d's with an activation, and the bytes of a residual."""
    base = conv2d_problem("fprop", x, w, y, dtype, device, (*params[:4], params[5]), layouts)
    more = y[0] * y[1] * y[2] * y[3] * dtype.itemsize if residual else 0
    return dataclasses.replace(
        base,
        op="conv_bn_act",
        sizes=(*base.sizes, ("act", _activation.code("conv_bn_act", params[4], inference=True))),
        bytes=base.bytes + int(more),
    )


def _resolve(tensors: Sequence[Any], params: tuple[Any, ...]) -> Callable[..., Any]:
    x, w, b, scale, shift, r = tensors
    validate(tensors, params)
    y = tuple(output_shape(x.shape, w.shape, *params[:3]))
    inputs = {"x": x, "w": w, "b": b, "scale": scale, "shift": shift, "r": r}
    p = problem(x.shape, w.shape, y, x.dtype, x.device, params, layouts(inputs), r is not None)
    out = Meta(y, _memory.strides_of(y, _memory.prefers_channels_last(x, w)), x.dtype)
    backend, strict = params[6:]
    if backend.partition(".")[0] == "aten":
        return serve(p, inputs, {"y": out}, backend, strict)
    try:
        return serve(p, inputs, {"y": out}, backend, True)  # a convolution of ours in two steps goes before ATen's
    except NotImplementedError as error:
        settings.note(dispatch.Unserved("conv_bn_act", f"conv2d and batch_norm in its place: {error}"))
        return functools.partial(_in_two_steps, params)


def _in_two_steps(params: tuple[Any, ...], x: Any, w: Any, b: Any, scale: Any, shift: Any, r: Any) -> Any:
    z = conv2d(x, w, b, *_conv(params))
    return batch_norm(z, scale, shift, None, None, r, params[4], False, 0.0, *params[6:])


def _fake(tensors: Sequence[Any], params: tuple[Any, ...]) -> Any:
    x, w = tensors[:2]
    validate(tensors, params)
    return _memory.empty(x, output_shape(x.shape, w.shape, *params[:3]), _memory.prefers_channels_last(x, w))


def _conv(params: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of the convolution alone."""
    return (*params[:4], *params[5:])


def _along_channels(vector: Any, like: Any) -> Any:
    return vector.reshape(1, -1, 1, 1).to(like.dtype)


def _backward(needs: Sequence[bool], gradients: Sequence[Any], saved: Sequence[Any], params: Any, metas: Any) -> Any:
    g, (x, w, b, scale, *_), (mx, mw, *_) = gradients[0], saved, metas
    y = saved[6] if len(saved) > 6 else None
    if g is None:
        return (None,) * 6
    args = _conv(params)
    wide = ACCUMULATORS.get(g.dtype, torch.float32)
    dz = g if y is None else add_act_dgrad(y, g, params[4], *params[6:])
    scaled = dz if scale is None else dz * _along_channels(scale, dz)
    dscale = dshift = None
    if needs[3]:
        dscale = (dz.to(wide) * conv2d(x, w, b, *args).to(wide)).sum((0, 2, 3))
    if needs[4]:
        dshift = dz.sum((0, 2, 3), dtype=wide)
    return (
        conv2d_dgrad(w, scaled, mx.shape, mx.channels_last or mw.channels_last, *args) if needs[0] else None,
        conv2d_wgrad(x, scaled, mw.shape, mw.channels_last, *args) if needs[1] else None,
        conv2d_bgrad(scaled, *args[4:]) if needs[2] else None,
        dscale,
        dshift,
        dz if needs[5] else None,
    )


def _jvp(tangents: Sequence[Any], tensors: Sequence[Any], params: tuple[Any, ...]) -> Any:
    (tx, tw, tb, tscale, tshift, tr), (x, w, b, scale, *_) = tangents, tensors
    args, shape = _conv(params), output_shape(x.shape, w.shape, *params[:3])
    terms = []
    if tx is not None:
        terms.append(conv2d(tx, w, tb, *args))
    elif tb is not None:
        terms.append(_along_channels(tb, x).expand(shape))
    if tw is not None:
        terms.append(conv2d(x, tw, None, *args))
    if scale is not None:
        terms = [t * _along_channels(scale, t) for t in terms]
    if tscale is not None:
        terms.append(conv2d(x, w, b, *args) * _along_channels(tscale, x))
    if tshift is not None:
        terms.append(_along_channels(tshift, x).expand(shape))
    if tr is not None:
        terms.append(tr)
    if not terms:
        return None
    total = sum(terms[1:], terms[0])
    return total if params[4] == "none" else add_act_dgrad(tensors[6], total, params[4], *params[6:])


conv_bn_act = Operator(
    "conv_bn_act",
    f"(Tensor x, Tensor w, Tensor? b, Tensor? scale, Tensor? shift, Tensor? r, {_TAIL}) -> Tensor",
    tensors=6,
    resolve=_resolve,
    fake=_fake,
    backward=_backward,
    jvp=_jvp,
    saves=lambda needs: (
        needs[1] or needs[3],
        needs[0] or needs[3],
        needs[3],
        any(needs[:3]),
        False,
        False,
    ),
    flops=lambda x, w, *args, out_shape=None, **kw: flops(x, w, out_shape),
    keeps=lambda tensors, params: () if params[4] == "none" else (0,),
    fold=(0, 5),
    fold_params=lambda params, size: params,
)
