"""The contract of add_act: y = act(x + r) in one pass.

Roles: x, r (the terms), y (the result), g (its gradient), t (the gradient of both terms). Directions: fprop x, r -> y;
dgrad y, g -> t = g * act', which the result tells, so that training keeps nothing but the result. dgrad is linear in g
and its own transpose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from cnnfast import dispatch
from cnnfast.dispatch import DTYPES, Meta, Role
from cnnfast.errors import DtypeError, ShapeError
from cnnfast.ops import _activation
from cnnfast.ops._operator import Operator, capability, layouts, serve

_NAMES = ("x", "r", "y", "g", "t")
SIGNATURE = dispatch.register_signature(
    dispatch.Signature(
        "add_act",
        tuple(Role(n, (f"{n}_n", f"{n}_c", f"{n}_h", f"{n}_w"), batch_dim=0) for n in _NAMES),
        {"fprop": ("y",), "dgrad": ("t",)},
    )
)

_TAIL = "str activation, str backend, bool strict"


def validate(a: Any, b: Any, what: str = "add_act: expected terms") -> None:
    """Raises where the two tensors don't lie over each other."""
    given = f"got {tuple(a.shape)} {a.dtype} on {a.device} and {tuple(b.shape)} {b.dtype} on {b.device}"
    if a.dim() != 4 or a.shape != b.shape:
        raise ShapeError(f"{what} of one 4-D shape; {given}")
    if a.dtype != b.dtype or a.device != b.device:
        raise DtypeError(f"{what} of one dtype and device; {given}")


def problem(
    direction: str, x: Any, dtype: torch.dtype, device: torch.device, activation: str,
    layouts: tuple[tuple[str, str], ...] = (),
) -> dispatch.Problem:  # fmt: skip
    """The problem of a call, from the shape (N, C, H, W)."""
    act = _activation.code("add_act", activation, inference=direction == "fprop")
    sizes = (("N", x[0]), ("C", x[1]), ("H", x[2]), ("W", x[3]), ("act", act))
    return dispatch.Problem(
        op="add_act", direction=direction, dtype=DTYPES[dtype], device=device.type, precision="ieee",
        sizes=tuple((k, int(v)) for k, v in sizes), layouts=layouts, capability=capability(device),
        bytes=int(3 * x[0] * x[1] * x[2] * x[3]) * dtype.itemsize,
    )  # fmt: skip


def _meta(t: Any) -> Any:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _bind(direction: str, names: str, tensors: Sequence[Any], out: str, params: Sequence[Any]) -> Callable[..., Any]:
    a, b = tensors
    activation, backend, strict = params
    inputs = dict(zip(names, tensors, strict=True))
    strides = tuple((_meta(a) + _meta(b)).stride())  # a sum has the layout that torch gives to sums
    p = problem(direction, a.shape, a.dtype, a.device, activation, layouts(inputs))
    return serve(p, inputs, {out: Meta(tuple(a.shape), strides, a.dtype)}, backend, strict)


def _resolve(tensors: Sequence[Any], params: tuple[Any, ...]) -> Callable[..., Any]:
    validate(*tensors)
    return _bind("fprop", "xr", tensors, "y", params)


def _fake(tensors: Sequence[Any], params: tuple[Any, ...]) -> Any:
    validate(*tensors)
    _activation.code("add_act", params[0], inference=True)
    return torch.add(*tensors)


def _backward(needs: Sequence[bool], gradients: Sequence[Any], saved: Any, params: Any, metas: Any) -> Any:
    g = gradients[0]
    if g is None:
        return None, None
    t = g if params[0] == "none" else add_act_dgrad(saved[2], g, *params)
    return t if needs[0] else None, t if needs[1] else None


def _jvp(tangents: Sequence[Any], tensors: Sequence[Any], params: tuple[Any, ...]) -> Any:
    given = [t for t in tangents if t is not None]
    if not given:
        return None
    total = sum(given[1:], given[0])
    return total if params[0] == "none" else add_act_dgrad(tensors[2], total, *params)


add_act = Operator(
    "add_act",
    f"(Tensor x, Tensor r, {_TAIL}) -> Tensor",
    tensors=2,
    resolve=_resolve,
    fake=_fake,
    backward=_backward,
    jvp=_jvp,
    saves=lambda needs: (False, False),
    keeps=lambda tensors, params: () if params[0] == "none" else (0,),
    fold=(0, 1),
    fold_params=lambda params, size: params,
)


# ---- dgrad: t = g * act'(y). Linear in g, and its own derivative; piecewise constant in y. -----------------------------


_DGRAD = "add_act_dgrad: expected a result and a gradient"


def _dgrad_resolve(tensors: Sequence[Any], params: tuple[Any, ...]) -> Callable[..., Any]:
    y, g = tensors
    validate(y, g, _DGRAD)
    return _bind("dgrad", "yg", tensors, "t", params)


def _dgrad_fake(tensors: Sequence[Any], params: tuple[Any, ...]) -> Any:
    y, g = tensors
    validate(y, g, _DGRAD)
    return torch.add(y, g)


def _again(tensors: Sequence[Any], g: Any, params: tuple[Any, ...]) -> Any:
    return None if g is None else add_act_dgrad(tensors[0], g, *params)


def _dgrad_jvp(tangents: Sequence[Any], tensors: Sequence[Any], params: tuple[Any, ...]) -> Any:
    if tangents[1] is None:
        return torch.zeros_like(add_act_dgrad(*tensors, *params))
    return _again(tensors, tangents[1], params)


add_act_dgrad: Operator = Operator(
    "add_act_dgrad",
    f"(Tensor y, Tensor g, {_TAIL}) -> Tensor",
    tensors=2,
    resolve=_dgrad_resolve,
    fake=_dgrad_fake,
    backward=lambda needs, gradients, saved, params, metas: (
        None,
        _again(saved, gradients[0], params) if needs[1] else None,
    ),
    jvp=_dgrad_jvp,
    saves=lambda needs: (needs[1], False),
    fold=(0, 1),
    fold_params=lambda params, size: params,
)
