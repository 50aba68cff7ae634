"""What the max poolings share: five operators on the same windows.

No index tensor is kept for the backward pass. Where a backend can note it, a call that records keeps one byte an output:
which tap of its window is the maximum. Elsewhere, and for derivatives of higher order, dgrad and jvp find the maximum
again in x, which the layer before usually keeps anyway. Roles: x (values), y (result, or its gradient), i (int64 offsets
h*W + w, only where the user asks for them), t (a gradient or a tangent of x), k (that byte, r*S + s for tap r, s of a
window of S columns, 255 where no tap is in the image). Directions: fprop x -> y; indices x -> y, i; dgrad x, y -> t; jvp
x, t -> y; taps x -> y, k; scatter y, k -> t, the same as dgrad. dgrad and jvp are linear and each other's derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from cnnfast import dispatch
from cnnfast.dispatch import Meta, Role
from cnnfast.errors import DtypeError, ShapeError
from cnnfast.ops import _memory
from cnnfast.ops._operator import Operator, layouts, serve

X = Role("x", ("x_n", None, "x_h", "x_w"), batch_dim=0)
Y = Role("y", ("y_n", None, "y_h", "y_w"), batch_dim=0)
I = Role("i", ("i_n", None, "i_h", "i_w"), batch_dim=0, dtype="i64")  # noqa: E741
T = Role("t", ("t_n", None, "t_h", "t_w"), batch_dim=0)
K = Role("k", ("k_n", None, "k_h", "k_w"), batch_dim=0, dtype="u8")
MOST_TAPS = 255  # that a byte numbers, beside the one that means none


class Operators(NamedTuple):
    """The operators ``op``, ``op_indices``, ``op_dgrad``, ``op_jvp`` and ``op_recorded``."""

    fprop: Operator
    indices: Operator
    dgrad: Operator
    jvp: Operator
    recorded: Operator


def operators(
    op: str,
    geometry: str,
    validate: Callable[..., None],
    output_shape: Callable[..., Any],
    problem: Callable[..., dispatch.Problem],
) -> Operators:
    """The operators of a pooling.

    Args:
        op: The operation's name.
        geometry: The schema of what its windows are.
        validate: ``validate(x, geometry)`` raises what torch rejects.
        output_shape: ``output_shape(shape of x, geometry)``, that of y.
        problem: ``problem(direction, shape of x, dtype, device, geometry, layouts)``.
    """
    dispatch.register_signature(
        dispatch.Signature(
            op, (X, Y, I, T, K),
            {"fprop": ("y",), "indices": ("y", "i"), "dgrad": ("t",), "jvp": ("y",), "taps": ("y", "k"), "scatter": ("t",)},
        )
    )  # fmt: skip
    tail = f"{geometry}, str backend, bool strict"

    def bind(
        direction: str, x: Any, inputs: Mapping[str, Any], outputs: Sequence[str], params: Sequence[Any]
    ) -> Callable[..., Any]:
        """Selects and binds; every result lies as torch would have it for x, k, which is ours alone, as kernels have it."""
        geometry, (backend, strict) = params[:-2], params[-2:]
        p = problem(direction, x.shape, x.dtype, x.device, geometry, layouts(inputs))
        y, last = tuple(output_shape(x.shape, geometry)), _memory.prefers_channels_last(x)
        shapes, dtypes = {"t": tuple(x.shape)}, {"i": torch.int64, "k": torch.uint8}
        made = {
            name: Meta(shape, _memory.strides_of(shape, last or name == "k"), dtypes.get(name, x.dtype))
            for name, shape in ((name, shapes.get(name, y)) for name in outputs)
        }
        return serve(p, inputs, made, backend, strict)

    def check(direction: str, x: Any, other: Any, expected: Any) -> None:
        """The operators of the backward pass can be called directly, too: nothing may read out of bounds."""
        if tuple(other.shape) != tuple(expected):
            raise ShapeError(
                f"{op}_{direction}: expected a tensor of shape {tuple(expected)}, got {tuple(other.shape)}"
            )
        if other.dtype != x.dtype or other.device != x.device:
            raise DtypeError(
                f"{op}_{direction}: expected one dtype and device, got {x.dtype} on {x.device} and {other.dtype} on "
                f"{other.device}"
            )

    # ---- fprop: y from x, and on request the indices

    def resolve(tensors: Sequence[Any], params: tuple[Any, ...]) -> Callable[..., Any]:
        (x,) = tensors
        validate(x, params[:-2])
        return bind("fprop", x, {"x": x}, ("y",), params)

    def fake(tensors: Sequence[Any], params: tuple[Any, ...]) -> Any:
        x = tensors[0]
        validate(x, params[:-2])
        return _memory.empty(x, output_shape(x.shape, params[:-2]), _memory.prefers_channels_last(x))

    def backward(needs: Sequence[bool], gradients: Sequence[Any], saved: Any, params: Any, metas: Any) -> Any:
        x, k = (*saved, None)[:2]
        return (None if gradients[0] is None else dgrad(x, gradients[0], k, *params),)

    fprop: Operator = Operator(
        op,
        f"(Tensor x, {tail}) -> Tensor",
        tensors=1,
        resolve=resolve,
        fake=fake,
        backward=backward,
        jvp=lambda tangents, tensors, params: jvp(tensors[0], tangents[0], *params),
        saves=lambda needs: (needs[0],),
        fold=(0,),
        fold_params=lambda params, size: params,
    )

    def indices_resolve(tensors: Sequence[Any], params: tuple[Any, ...]) -> Callable[..., Any]:
        (x,) = tensors
        validate(x, params[:-2])
        return bind("indices", x, {"x": x}, ("y", "i"), params)

    def indices_fake(tensors: Sequence[Any], params: tuple[Any, ...]) -> Any:
        y = fake(tensors, params)
        return y, torch.empty_like(y, dtype=torch.int64)

    indices: Operator = Operator(
        f"{op}_indices",
        f"(Tensor x, {tail}) -> (Tensor, Tensor)",
        tensors=1,
        resolve=indices_resolve,
        fake=indices_fake,
        backward=backward,
        jvp=lambda tangents, tensors, params: (jvp(tensors[0], tangents[0], *params), None),
        saves=lambda needs: (needs[0],),
        differentiable=(True, False),
    )

    # ---- recorded: y, and k for its gradient

    def recorded_resolve(tensors: Sequence[Any], params: tuple[Any, ...]) -> Callable[..., Any]:
        (x,) = tensors
        validate(x, params[:-2])
        return bind("taps", x, {"x": x}, ("y", "k"), params)

    def recorded_fake(tensors: Sequence[Any], params: tuple[Any, ...]) -> Any:
        y = fake(tensors, params)
        return y, _memory.empty(y, y.shape, True, torch.uint8)

    recorded: Operator = Operator(
        f"{op}_recorded",
        f"(Tensor x, {tail}) -> (Tensor, Tensor)",
        tensors=1,
        resolve=recorded_resolve,
        fake=recorded_fake,
        backward=backward,
        jvp=lambda tangents, tensors, params: (jvp(tensors[0], tangents[0], *params), None),
        saves=lambda needs: (needs[0],),
        fold=(0,),
        fold_params=lambda params, size: params,
        differentiable=(True, False),
        keeps=lambda tensors, params: (1,),
    )

    # ---- dgrad: the gradient of x, t, from y's gradient, and k where it was recorded. Linear in y's; its derivative is jvp.

    def dgrad_check(x: Any, g: Any, k: Any, params: Sequence[Any]) -> None:
        validate(x, params[:-2])
        y = output_shape(x.shape, params[:-2])
        check("dgrad", x, g, y)
        if 0 in y[1:]:
            raise ShapeError(f"{op}_dgrad: expected a gradient that is empty at most in its batch, got {tuple(y)}")
        if k is not None and (tuple(k.shape) != tuple(y) or k.dtype != torch.uint8 or k.device != x.device):
            raise ShapeError(
                f"{op}_dgrad: expected taps of shape {tuple(y)}, uint8 on {x.device}, got {tuple(k.shape)}, {k.dtype} on "
                f"{k.device}"
            )

    def dgrad_resolve(tensors: Sequence[Any], params: tuple[Any, ...]) -> Callable[..., Any]:
        x, g, k = tensors
        dgrad_check(x, g, k, params)
        if k is None:
            search = bind("dgrad", x, {"x": x, "y": g}, ("t",), params)
            return lambda x, g, k: search(x, g)
        scatter = bind("scatter", x, {"y": g, "k": k}, ("t",), params)
        return lambda x, g, k: scatter(g, k)

    def dgrad_fake(tensors: Sequence[Any], params: tuple[Any, ...]) -> Any:
        x, g, k = tensors
        dgrad_check(x, g, k, params)
        return _memory.empty(x, x.shape, _memory.prefers_channels_last(x))

    dgrad: Operator = Operator(
        f"{op}_dgrad",
        f"(Tensor x, Tensor g, Tensor? k, {tail}) -> Tensor",
        tensors=3,
        resolve=dgrad_resolve,
        fake=dgrad_fake,
        backward=lambda needs, gradients, saved, params, metas: (
            None,
            jvp(saved[0], gradients[0], *params) if needs[1] and gradients[0] is not None else None,
            None,
        ),
        jvp=lambda tangents, tensors, params: _along_second(dgrad, tangents, tensors, params),
        saves=lambda needs: (needs[1], False, False),
        fold=(0, 1, 2),
        fold_params=lambda params, size: params,
    )

    # ---- jvp: y's tangent, from x's tangent t. Linear in it; its derivative is dgrad.

    def jvp_resolve(tensors: Sequence[Any], params: tuple[Any, ...]) -> Callable[..., Any]:
        x, t = tensors
        validate(x, params[:-2])
        check("jvp", x, t, x.shape)
        return bind("jvp", x, {"x": x, "t": t}, ("y",), params)

    jvp: Operator = Operator(
        f"{op}_jvp",
        f"(Tensor x, Tensor t, {tail}) -> Tensor",
        tensors=2,
        resolve=jvp_resolve,
        fake=fake,
        backward=lambda needs, gradients, saved, params, metas: (
            None,
            dgrad(saved[0], gradients[0], None, *params) if needs[1] and gradients[0] is not None else None,
        ),
        jvp=lambda tangents, tensors, params: _along_second(jvp, tangents, tensors, params),
        saves=lambda needs: (needs[1], False),
        fold=(0, 1),
        fold_params=lambda params, size: params,
    )
    return Operators(fprop, indices, dgrad, jvp, recorded)


def _along_second(operator: Operator, tangents: Sequence[Any], tensors: Sequence[Any], params: tuple[Any, ...]) -> Any:
    """The tangent of an operator that is linear in its second tensor and piecewise constant in its first."""
    if tangents[1] is None:
        return torch.zeros_like(operator(*tensors, *params))
    return operator(tensors[0], tangents[1], *tensors[2:], *params)


def records(op: str, x: Any, backend: str, taps: Callable[[], Any]) -> bool:
    """Whether a call of x goes to ``op_recorded``: it needs a gradient, and a kernel notes windows of so many taps.

    It asks no sizes but ``taps()``, so that a compiled graph keeps those symbolic.
    """
    if not x.requires_grad or not torch.is_grad_enabled() or taps() > MOST_TAPS:
        return False
    return dispatch.has_kernel(op, dispatch.DTYPES.get(x.dtype, ""), x.device.type, backend, "taps")


def moved(direction: str, x: Any, y: Any, dtype: torch.dtype) -> int:
    """The bytes of the operands, each once."""
    numel, out = x[0] * x[1] * x[2] * x[3], y[0] * y[1] * y[2] * y[3]
    elements = 2 * numel + out if direction in ("dgrad", "jvp") else numel + out
    places = {"indices": 8, "taps": 1, "scatter": 1}.get(direction, 0)  # bytes
    return int(elements * dtype.itemsize + places * out)
