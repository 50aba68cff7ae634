"""What the average poolings share: a linear operator and its transpose, which are each other's derivative.

fprop writes y from x, dgrad x from y; nothing is saved but x's shape. Roles: x, y, each the values or a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from cnnfast import dispatch
from cnnfast.dispatch import Meta, Role
from cnnfast.errors import ShapeError
from cnnfast.ops import _memory
from cnnfast.ops._operator import Operator, layouts, serve

X = Role("x", ("x_n", None, "x_h", "x_w"), batch_dim=0)
Y = Role("y", ("y_n", None, "y_h", "y_w"), batch_dim=0)


def operators(
    op: str,
    geometry: str,
    validate: Callable[..., None],
    output_shape: Callable[..., Any],
    problem: Callable[..., dispatch.Problem],
) -> tuple[Operator, Operator]:
    """The operators ``op`` and ``op_dgrad``.

    Args:
        op: The operation's name.
        geometry: The schema of what its windows are.
        validate: ``validate(shape of x, dtype, geometry)`` raises what torch rejects.
        output_shape: ``output_shape(shape of x, geometry)``, that of y.
        problem: ``problem(direction, shape of x, dtype, device, geometry, layouts)``.
    """
    dispatch.register_signature(dispatch.Signature(op, (X, Y), {"fprop": ("y",), "dgrad": ("x",)}))
    tail = f"{geometry}, str backend, bool strict"

    def bind(direction: str, x: Any, given: Any, channels_last: bool, params: Sequence[Any]) -> Callable[..., Any]:
        geometry, (backend, strict) = params[:-2], params[-2:]
        read, written = ("x", "y") if direction == "fprop" else ("y", "x")
        shape = tuple(output_shape(x, geometry)) if written == "y" else tuple(x)
        p = problem(direction, x, given.dtype, given.device, geometry, layouts({read: given}))
        made = Meta(shape, _memory.strides_of(shape, channels_last), given.dtype)
        return serve(p, {read: given}, {written: made}, backend, strict)

    # ---- fprop

    def resolve(tensors: Sequence[Any], params: tuple[Any, ...]) -> Callable[..., Any]:
        (x,) = tensors
        validate(x.shape, x.dtype, params[:-2])
        return bind("fprop", x.shape, x, _memory.prefers_channels_last(x), params)

    def fake(tensors: Sequence[Any], params: tuple[Any, ...]) -> Any:
        (x,) = tensors
        validate(x.shape, x.dtype, params[:-2])
        return _memory.empty(x, output_shape(x.shape, params[:-2]), _memory.prefers_channels_last(x))

    fprop: Operator = Operator(
        op,
        f"(Tensor x, {tail}) -> Tensor",
        tensors=1,
        resolve=resolve,
        fake=fake,
        backward=lambda needs, gradients, saved, params, metas: (
            None if gradients[0] is None else dgrad(gradients[0], metas[0].shape, metas[0].channels_last, *params),
        ),
        jvp=lambda tangents, tensors, params: fprop(tangents[0], *params),
        saves=lambda needs: (False,),
        fold=(0,),
        fold_params=lambda params, size: params,
    )

    # ---- dgrad

    def check(g: Any, params: Sequence[Any]) -> None:
        """It can be called directly, too: nothing may read out of bounds."""
        size, geometry = params[0], params[2:-2]
        validate(size, g.dtype, geometry)
        expected = tuple(output_shape(size, geometry))
        if tuple(g.shape) != expected or 0 in expected[1:]:
            raise ShapeError(
                f"{op}_dgrad: expected a gradient of shape {expected}, empty at most in its batch, for an input of "
                f"shape {tuple(size)}; got {tuple(g.shape)}"
            )

    def dgrad_resolve(tensors: Sequence[Any], params: tuple[Any, ...]) -> Callable[..., Any]:
        (g,) = tensors
        check(g, params)
        return bind("dgrad", params[0], g, params[1], params[2:])

    def dgrad_fake(tensors: Sequence[Any], params: tuple[Any, ...]) -> Any:
        check(tensors[0], params)
        return _memory.empty(tensors[0], params[0], params[1])

    dgrad: Operator = Operator(
        f"{op}_dgrad",
        f"(Tensor g, SymInt[] size, bool channels_last, {tail}) -> Tensor",
        tensors=1,
        resolve=dgrad_resolve,
        fake=dgrad_fake,
        backward=lambda needs, gradients, saved, params, metas: (
            None if gradients[0] is None else fprop(gradients[0], *params[2:]),
        ),
        jvp=lambda tangents, tensors, params: dgrad(tangents[0], *params),
        saves=lambda needs: (False,),
        fold=(0,),
        fold_params=lambda params, size: ((params[0][0] * size, *params[0][1:]), *params[1:]),
    )
    return fprop, dgrad


def moved(x: Any, y: Any, dtype: torch.dtype) -> int:
    """The bytes of both operands, each once."""
    return int((x[0] * x[1] * x[2] * x[3] + y[0] * y[1] * y[2] * y[3]) * dtype.itemsize)
