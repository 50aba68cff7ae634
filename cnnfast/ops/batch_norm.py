"""The contract of batch_norm: statistics, the normalised result with a residual and an activation, and its gradient.

    y[n,c,h,w] = act((x[n,c,h,w] - m[c]) * v[c] * w[c] + b[c] + r[n,c,h,w])

In training m and v are x's own mean and 1 / sqrt(variance + eps), from ``batch_norm_stats``, and the derivative knows
that they depend on x: ``batch_norm`` takes them as operands but has no gradient for them. In evaluation they are constants,
v being the running variance itself. Operators change nothing in place; ``functional`` writes the running averages.

Roles: x, w, b, m, v, r as above, y (the result or its gradient), s (unbiased variance), dw, db, t (gradient of x), u (of r). All
vectors are of the accumulator's dtype: float64 for float64, else float32. Directions: stats x -> m, v, s; fprop -> y;
wgrad -> dw, db; dgrad -> t, in evaluation; backward -> dw, db, t; backward_residual -> dw, db, t, u. In the gradient's
directions r is the result, where there was a residual: kept, as the next layer keeps it anyway. Without a residual
nothing is kept but x.

A gradient that is itself to be differentiated, and forward mode, are composed of torch's elementwise operators and sums
over whole tensors: the formulas are rational in a dozen terms, whose fused kernels would serve nobody's training loop.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from cnnfast import dispatch
from cnnfast.dispatch import ACCUMULATORS, DTYPES, Meta, Role
from cnnfast.errors import DtypeError, ShapeError
from cnnfast.ops import _activation, _memory
from cnnfast.ops._operator import Operator, capability, layouts, serve, transforms_active


def _activations(name: str) -> Role:
    return Role(name, (f"{name}_n", None, f"{name}_h", f"{name}_w"), batch_dim=0)


def _vector(name: str) -> Role:
    return Role(name, dtype="acc")


SIGNATURE = dispatch.register_signature(
    dispatch.Signature(
        "batch_norm",
        (
            _activations("x"), *map(_vector, ("w", "b", "m", "v")), _activations("r"), _activations("y"),
            *map(_vector, ("s", "dw", "db")), _activations("t"), _activations("u"),
        ),
        {
            "stats": ("m", "v", "s"), "fprop": ("y",), "dgrad": ("t",), "wgrad": ("dw", "db"),
            "backward": ("dw", "db", "t"), "backward_residual": ("dw", "db", "t", "u"),
        },
    )
)  # fmt: skip

_DIMS = (0, 2, 3)
_TAIL = "str activation, bool training, float eps, str backend, bool strict"
_VECTORS = "Tensor x, Tensor? w, Tensor? b, Tensor? m, Tensor? v"


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums over tensors of this dtype, and the vectors, are in."""
    return ACCUMULATORS.get(dtype, torch.float32)


def validate(x: Any, vectors: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Raises where vectors aren't (C,) of the accumulator's dtype, or activations aren't of x's shape and dtype."""

    def fail(expected: str, error: type[Exception] = ShapeError) -> None:
        given = {"input": x, **vectors, **others}
        listed = ", ".join(f"{k} {tuple(t.shape)} {t.dtype}" for k, t in given.items() if t is not None)
        raise error(f"batch_norm: {expected}; got {listed}")

    if x.dim() != 4:
        fail("expected a 4-D input (N, C, H, W)")
    if x.shape[1] == 0:
        fail("expected at least one channel")
    wide = accumulator(x.dtype)
    for name, t in vectors.items():
        if t is None:
            continue
        if tuple(t.shape) != (x.shape[1],):
            fail(f"expected {name} to have C = {x.shape[1]} elements")
        if t.dtype != wide:
            fail(f"expected {name} to be {wide}, the accumulator of {x.dtype}", DtypeError)
        if t.device != x.device:
            fail(f"expected {name} on {x.device}, not {t.device}", DtypeError)
    for name, t in others.items():
        if t is None:
            continue
        if t.shape != x.shape:
            fail(f"expected {name} to have the input's shape")
        if t.dtype != x.dtype or t.device != x.device:
            fail(f"expected {name} to be {x.dtype} on {x.device}, not {t.dtype} on {t.device}", DtypeError)


def problem(
    direction: str, x: Any, dtype: torch.dtype, device: torch.device, params: Sequence[Any],
    layouts: tuple[tuple[str, str], ...] = (), activations: int = 2,
) -> dispatch.Problem:  # fmt: skip
    """The problem of a call, from the shape (N, C, H, W); ``activations``: how many such tensors are read and written."""
    activation, training, eps = params[:3]
    (eps_bits,) = struct.unpack("=q", struct.pack("=d", eps))
    sizes = (
        ("N", x[0]), ("C", x[1]), ("H", x[2]), ("W", x[3]),
        ("act", _activation.code("batch_norm", activation, direction == "fprop")), ("training", training), ("eps_bits", eps_bits),
    )  # fmt: skip
    return dispatch.Problem(
        op="batch_norm", direction=direction, dtype=DTYPES[dtype], device=device.type, precision="ieee",
        sizes=tuple((k, int(v)) for k, v in sizes), layouts=layouts, capability=capability(device),
        bytes=int(activations * x[0] * x[1] * x[2] * x[3]) * dtype.itemsize,
    )  # fmt: skip


def _bind(
    direction: str, inputs: Mapping[str, Any], params: Sequence[Any], channels_last: bool = False
) -> Callable[..., Any]:
    x = inputs["x"]
    made = {}
    for name in SIGNATURE.outputs[direction]:
        if SIGNATURE.roles[_POSITION[name]].is_activation:
            made[name] = Meta(tuple(x.shape), _memory.strides_of(x.shape, channels_last), x.dtype)
        else:
            made[name] = Meta((x.shape[1],), (1,), accumulator(x.dtype))
    count = sum(t is not None and t.dim() == 4 for t in inputs.values()) + sum(len(m.shape) == 4 for m in made.values())
    p = problem(direction, x.shape, x.dtype, x.device, params, layouts(inputs), count)
    return serve(p, inputs, made, params[3], params[4])


_POSITION = {role.name: i for i, role in enumerate(SIGNATURE.roles)}


# ---- stats: m, v, s from x --------------------------------------------------------------------------------------------


def _stats_resolve(tensors: Sequence[Any], params: tuple[Any, ...]) -> Callable[..., Any]:
    (x,) = tensors
    validate(x, {}, {})
    return _bind("stats", {"x": x}, ("none", True, *params))


def _stats_fake(tensors: Sequence[Any], params: tuple[Any, ...]) -> Any:
    (x,) = tensors
    validate(x, {}, {})
    return tuple(x.new_empty((x.shape[1],), dtype=accumulator(x.dtype)) for _ in range(3))


batch_norm_stats = Operator(
    "batch_norm_stats",
    "(Tensor x, float eps, str backend, bool strict) -> (Tensor, Tensor, Tensor)",
    tensors=1,
    resolve=_stats_resolve,
    fake=_stats_fake,
    backward=lambda needs, gradients, saved, params, metas: (None,),
    jvp=lambda tangents, tensors, params: (None, None, None),
    saves=lambda needs: (False,),
    differentiable=(False, False, False),
)


# ---- fprop ------------------------------------------------------------------------------------------------------------


def _named(tensors: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    _, w, b, m, v, r = tensors[:6]
    return {"weight": w, "bias": b, "mean": m, "variance": v}, {"residual": r}


def _resolve(tensors: Sequence[Any], params: tuple[Any, ...]) -> Callable[..., Any]:
    x = tensors[0]
    validate(x, *_named(tensors))
    inputs = dict(zip(("x", "w", "b", "m", "v", "r"), tensors, strict=True))
    return _bind("fprop", inputs, params, _memory.prefers_channels_last(x))


def _fake(tensors: Sequence[Any], params: tuple[Any, ...]) -> Any:
    x = tensors[0]
    validate(x, *_named(tensors))
    _activation.code("batch_norm", params[0], inference=True)
    return _memory.empty(x, x.shape, _memory.prefers_channels_last(x))


def _keeps(tensors: Sequence[Any], params: tuple[Any, ...]) -> tuple[int, ...]:
    return (0,) if tensors[5] is not None and params[0] != "none" else ()


def _backward(needs: Sequence[bool], gradients: Sequence[Any], saved: Sequence[Any], params: Any, metas: Any) -> Any:
    g, (x, w, b, m, v, _), out = gradients[0], saved[:6], saved[6] if len(saved) > 6 else None
    if g is None:
        return (None,) * 6
    if torch.is_grad_enabled() or transforms_active():
        return composed_backward(needs, g, (x, w, b, m, v), out, params)
    need_x, need_w, need_b, need_r = needs[0], needs[1], needs[2], needs[5]
    operands = (x, w, b, m, v, out, g)
    dw = db = dx = u = None
    if need_r and params[0] != "none":
        dw, db, dx, u = batch_norm_backward_residual(*operands, *params)
    elif need_x and (params[1] or need_w or need_b):
        dw, db, dx = batch_norm_backward(*operands, *params)
    elif need_x:
        dx = batch_norm_dgrad(*operands, *params)
    elif need_w or need_b:
        dw, db = batch_norm_wgrad(*operands, *params)
    return (
        dx if need_x else None, dw if need_w else None, db if need_b else None, None, None,
        (g if u is None else u) if need_r else None,
    )  # fmt: skip


# ---- the same in torch's operators: what a second derivative, or a forward one, is made of -----------------------------


def _along(vector: Any) -> Any:
    return vector.reshape(1, -1, 1, 1)


def _normalised(operands: Sequence[Any], params: tuple[Any, ...]) -> tuple[Any, Any]:
    """(x - mean) * invstd and invstd, differentiable in x: in training the statistics are made from it again."""
    x, _, _, m, v = operands
    _, training, eps = params[:3]
    wide = x.to(accumulator(x.dtype))
    if training:
        centred = wide - wide.mean(_DIMS, keepdim=True)
        invstd = (centred.square().mean(_DIMS, keepdim=True) + eps).rsqrt()
        return centred * invstd, invstd
    invstd = wide.new_ones((1, 1, 1, 1)) if v is None else _along((v.detach() + eps).rsqrt())
    return (wide if m is None else wide - _along(m.detach())) * invstd, invstd


def _before(operands: Sequence[Any], xhat: Any, out: Any) -> Any:
    """What tells the activation's slope: the result where it was kept, else act's argument."""
    _, w, b = operands[:3]
    if out is not None:
        return out
    z = xhat if w is None else xhat * _along(w)
    return z if b is None else z + _along(b)


def composed_backward(needs: Sequence[bool], g: Any, operands: Sequence[Any], out: Any, params: tuple[Any, ...]) -> Any:
    """The gradients of (x, w, b, m, v, r), differentiable; operands are the first five, out the result if it was kept."""
    x, w = operands[:2]
    xhat, invstd = _normalised(operands, params)
    dz = _activation.backward(g.to(xhat.dtype), _before(operands, xhat, out), params[0])
    db, dw = dz.sum(_DIMS), (dz * xhat).sum(_DIMS)
    dx = dz
    if params[1]:
        count = x.numel() // x.shape[1]
        dx = dz - _along(db) / count - xhat * _along(dw) / count
    dx = dx * (invstd if w is None else invstd * _along(w))
    return (
        dx.to(x.dtype) if needs[0] else None, dw if needs[1] else None, db if needs[2] else None, None, None,
        dz.to(x.dtype) if needs[5] else None,
    )  # fmt: skip


def tangent(tangents: Sequence[Any], tensors: Sequence[Any], params: tuple[Any, ...]) -> Any:
    """The result's tangent, None where no operand has one."""
    (tx, tw, tb, _, _, tr), operands, out = tangents, tensors[:5], tensors[6] if len(tensors) > 6 else None
    x, w = operands[:2]
    xhat, invstd = _normalised(operands, params)
    terms = []
    if tx is not None:
        t = tx.to(xhat.dtype)
        if params[1]:
            t = t - t.mean(_DIMS, keepdim=True) - xhat * (t * xhat).mean(_DIMS, keepdim=True)
        terms.append(t * (invstd if w is None else invstd * _along(w)))
    if tw is not None:
        terms.append(xhat * _along(tw))
    if tb is not None:
        terms.append(_along(tb).expand(x.shape))
    if tr is not None:
        terms.append(tr.to(xhat.dtype))
    if not terms:
        return None
    return _activation.backward(sum(terms[1:], terms[0]), _before(operands, xhat, out), params[0]).to(x.dtype)


batch_norm = Operator(
    "batch_norm",
    f"({_VECTORS}, Tensor? r, {_TAIL}) -> Tensor",
    tensors=6,
    resolve=_resolve,
    fake=_fake,
    backward=_backward,
    jvp=tangent,
    saves=lambda needs: (True, True, True, True, True, False),
    keeps=_keeps,
)


# ---- the gradient: g is y's; out the result, where there was a residual ------------------------------------------------
#
# They are called where nobody differentiates further (see _backward); what they return has no derivative.


def _no_tangent(*args: Any) -> Any:
    raise NotImplementedError(
        "batch_norm: the raw operators of the gradient have no forward mode; batch_norm itself has"
    )


def _gradient_operator(direction: str, results: str) -> Operator:
    roles = ("x", "w", "b", "m", "v", "r", "y")

    def check(tensors: Sequence[Any], params: Sequence[Any]) -> Any:
        vectors, _ = _named(tensors)
        validate(tensors[0], vectors, {"result": tensors[5], "gradient": tensors[6]})
        if direction == "dgrad" and params[1]:
            raise ValueError(
                "batch_norm_dgrad: in training the input's gradient takes sums; batch_norm_backward makes both"
            )
        return tensors[0]

    def resolve(tensors: Sequence[Any], params: tuple[Any, ...]) -> Callable[..., Any]:
        x = check(tensors, params)
        inputs = dict(zip(roles, tensors, strict=True))
        return _bind(direction, inputs, params, _memory.prefers_channels_last(x))

    def fake(tensors: Sequence[Any], params: tuple[Any, ...]) -> Any:
        x = check(tensors, params)
        made = tuple(
            _memory.empty(x, x.shape, _memory.prefers_channels_last(x))
            if SIGNATURE.roles[_POSITION[name]].is_activation
            else x.new_empty((x.shape[1],), dtype=accumulator(x.dtype))
            for name in SIGNATURE.outputs[direction]
        )
        return made[0] if len(made) == 1 else made

    return Operator(
        f"batch_norm_{direction}",
        f"({_VECTORS}, Tensor? out, Tensor g, {_TAIL}) -> {results}",
        tensors=7,
        resolve=resolve,
        fake=fake,
        backward=lambda needs, *rest: (None,) * len(needs),
        jvp=_no_tangent,
        saves=lambda needs: (False,) * 7,
        differentiable=(False,) * len(SIGNATURE.outputs[direction]),
    )


batch_norm_dgrad = _gradient_operator("dgrad", "Tensor")
batch_norm_wgrad = _gradient_operator("wgrad", "(Tensor, Tensor)")
batch_norm_backward = _gradient_operator("backward", "(Tensor, Tensor, Tensor)")
batch_norm_backward_residual = _gradient_operator("backward_residual", "(Tensor, Tensor, Tensor, Tensor)")
