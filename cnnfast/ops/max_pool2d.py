"""The contract of max_pool2d: schema, validation, output shape and strides, derivatives.

    y[n,c,p,q] = max over r, s of x[n, c, p*stride_h - pad_h + r*dilation_h, q*stride_w - pad_w + s*dilation_w]

Taps outside the image don't take part; a window without any gives -inf. The first of equal elements is the maximum; a
window with NaNs gives NaN, its last NaN being the maximum (as in torch).

No index tensor is kept for the backward pass: dgrad and jvp find the maximum again in x, which the layer before
usually keeps anyway, so training costs no memory beyond it. Roles: x (values), y (result, or its gradient), i (int64
offsets h*W + w, only where the user asks for them), t (a gradient or a tangent of x). Directions: fprop x -> y; indices
x -> y, i; dgrad x, y -> t; jvp x, t -> y. dgrad and jvp are linear and each other's derivative.
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

X = Role("x", ("x_n", None, "x_h", "x_w"), batch_dim=0)
Y = Role("y", ("y_n", None, "y_h", "y_w"), batch_dim=0)
I = Role("i", ("i_n", None, "i_h", "i_w"), batch_dim=0, dtype="i64")  # noqa: E741
T = Role("t", ("t_n", None, "t_h", "t_w"), batch_dim=0)
SIGNATURE = dispatch.register_signature(
    dispatch.Signature(
        "max_pool2d", (X, Y, I, T), {"fprop": ("y",), "indices": ("y", "i"), "dgrad": ("t",), "jvp": ("y",)}
    )
)

_TAIL = "int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode, str backend, bool strict"


def output_size(size: Any, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> Any:
    """floor or ceil of (size + 2*padding - dilation*(kernel-1) - 1) / stride, + 1; the last window starts inside."""
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    out = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    return out - 1 if ceil_mode and (out - 1) * stride >= size + padding else out


def output_shape(x: Any, params: Sequence[Any]) -> Any:
    """(N, C, P, Q) for an input of shape (N, C, H, W)."""
    kernel, stride, padding, dilation, ceil_mode = params[:5]
    return (
        x[0],
        x[1],
        output_size(x[2], kernel[0], stride[0], padding[0], dilation[0], ceil_mode),
        output_size(x[3], kernel[1], stride[1], padding[1], dilation[1], ceil_mode),
    )


def validate(x: Any, params: Sequence[Any]) -> None:
    """Raises what torch rejects."""
    kernel, stride, padding, dilation, ceil_mode = params[:5]

    def fail(expected: str) -> None:
        raise ShapeError(
            f"max_pool2d: {expected}; got input {tuple(x.shape)} {x.dtype}, kernel_size {tuple(kernel)}, stride "
            f"{tuple(stride)}, padding {tuple(padding)}, dilation {tuple(dilation)}, ceil_mode {ceil_mode}"
        )

    if x.dim() != 4 or 0 in x.shape[1:]:
        fail("expected a 4-D input (N, C, H, W), or 3-D without batch, that is empty at most in its batch")
    if min(kernel) <= 0:
        fail("expected a kernel size greater than zero")
    if min(stride) <= 0:
        fail("expected a stride greater than zero")
    if min(dilation) <= 0:
        fail("expected a dilation greater than zero")
    for axis in (0, 1):
        if not 0 <= padding[axis] <= kernel[axis] // 2:
            fail(f"expected 0 <= padding <= kernel_size // 2 = {kernel[axis] // 2}, not {padding[axis]}")
    shape = output_shape(x.shape, params)
    if shape[2] <= 0 or shape[3] <= 0:
        fail(f"the output would be empty: {shape[2]} x {shape[3]}")


def problem(
    direction: str, x: Any, dtype: torch.dtype, device: torch.device, params: Sequence[Any],
    layouts: tuple[tuple[str, str], ...] = (),
) -> dispatch.Problem:  # fmt: skip
    """The problem of a call, from the input's shape (N, C, H, W)."""
    kernel, stride, padding, dilation, _ = params[:5]
    y = output_shape(x, params)
    sizes = (
        ("N", x[0]), ("C", x[1]), ("H", x[2]), ("W", x[3]), ("R", kernel[0]), ("S", kernel[1]), ("P", y[2]), ("Q", y[3]),
        ("stride_h", stride[0]), ("stride_w", stride[1]), ("pad_h", padding[0]), ("pad_w", padding[1]),
        ("dilation_h", dilation[0]), ("dilation_w", dilation[1]),
    )  # fmt: skip
    numel, out = x[0] * x[1] * x[2] * x[3], y[0] * y[1] * y[2] * y[3]
    moved = {"fprop": numel + out, "indices": numel + out, "dgrad": 2 * numel + out, "jvp": 2 * numel + out}[direction]
    bytes = moved * dtype.itemsize + (8 * out if direction == "indices" else 0)
    return dispatch.Problem(
        op="max_pool2d", direction=direction, dtype=DTYPES[dtype], device=device.type, precision="ieee",
        sizes=tuple((k, int(v)) for k, v in sizes), layouts=layouts, capability=capability(device), bytes=int(bytes),
    )  # fmt: skip


def _bind(
    direction: str, x: Any, inputs: Mapping[str, Any], outputs: Mapping[str, bool], params: Sequence[Any]
) -> Callable[..., Any]:
    """Selects and binds; ``outputs`` says for each role written whether it is channels_last."""
    p = problem(direction, x.shape, x.dtype, x.device, params, layouts(inputs))
    shapes = {"y": output_shape(x.shape, params), "i": output_shape(x.shape, params), "t": tuple(x.shape)}
    made = {
        name: Meta(shapes[name], _memory.strides_of(shapes[name], last), torch.int64 if name == "i" else x.dtype)
        for name, last in outputs.items()
    }
    return serve(p, inputs, made, params[5], params[6])


def _check(direction: str, x: Any, other: Any, expected: Any) -> None:
    """The operators of the backward pass can be called directly, too: nothing may read out of bounds."""
    if tuple(other.shape) != tuple(expected):
        raise ShapeError(
            f"max_pool2d_{direction}: expected a tensor of shape {tuple(expected)}, got {tuple(other.shape)}"
        )
    if other.dtype != x.dtype or other.device != x.device:
        raise DtypeError(
            f"max_pool2d_{direction}: expected one dtype and device, got {x.dtype} on {x.device} and {other.dtype} on "
            f"{other.device}"
        )


# ---- fprop: y from x, and on request the indices ----------------------------------------------------------------------


def _resolve(tensors: Sequence[Any], params: tuple[Any, ...]) -> Callable[..., Any]:
    (x,) = tensors
    validate(x, params)
    return _bind("fprop", x, {"x": x}, {"y": _memory.prefers_channels_last(x)}, params)


def _fake(tensors: Sequence[Any], params: tuple[Any, ...]) -> Any:
    (x,) = tensors
    validate(x, params)
    return _memory.empty(x, output_shape(x.shape, params), _memory.prefers_channels_last(x))


def _backward(needs: Sequence[bool], gradients: Sequence[Any], saved: Any, params: Any, metas: Any) -> Any:
    return (None if gradients[0] is None else max_pool2d_dgrad(saved[0], gradients[0], *params),)


_COMMON: dict[str, Any] = {"fold": (0,), "fold_params": lambda params, size: params}

max_pool2d = Operator(
    "max_pool2d",
    f"(Tensor x, {_TAIL}) -> Tensor",
    tensors=1,
    resolve=_resolve,
    fake=_fake,
    backward=_backward,
    jvp=lambda tangents, tensors, params: max_pool2d_jvp(tensors[0], tangents[0], *params),
    saves=lambda needs: (needs[0],),
    **_COMMON,
)


def _indices_resolve(tensors: Sequence[Any], params: tuple[Any, ...]) -> Callable[..., Any]:
    (x,) = tensors
    validate(x, params)
    last = _memory.prefers_channels_last(x)
    return _bind("indices", x, {"x": x}, {"y": last, "i": last}, params)


def _indices_fake(tensors: Sequence[Any], params: tuple[Any, ...]) -> Any:
    y = _fake(tensors, params)
    return y, torch.empty_like(y, dtype=torch.int64)


max_pool2d_indices = Operator(
    "max_pool2d_indices",
    f"(Tensor x, {_TAIL}) -> (Tensor, Tensor)",
    tensors=1,
    resolve=_indices_resolve,
    fake=_indices_fake,
    backward=_backward,
    jvp=lambda tangents, tensors, params: (max_pool2d_jvp(tensors[0], tangents[0], *params), None),
    saves=lambda needs: (needs[0],),
    differentiable=(True, False),
)


# ---- dgrad: the gradient of x, t, from y's gradient. Linear in it; its derivative is jvp. ------------------------------


def _dgrad_resolve(tensors: Sequence[Any], params: tuple[Any, ...]) -> Callable[..., Any]:
    x, g = tensors
    validate(x, params)
    _check("dgrad", x, g, output_shape(x.shape, params))
    return _bind("dgrad", x, {"x": x, "y": g}, {"t": _memory.prefers_channels_last(x)}, params)


max_pool2d_dgrad: Operator = Operator(
    "max_pool2d_dgrad",
    f"(Tensor x, Tensor g, {_TAIL}) -> Tensor",
    tensors=2,
    resolve=_dgrad_resolve,
    fake=lambda tensors, params: _memory.empty(tensors[0], tensors[0].shape, _memory.prefers_channels_last(tensors[0])),
    backward=lambda needs, gradients, saved, params, metas: (
        None,
        max_pool2d_jvp(saved[0], gradients[0], *params) if needs[1] and gradients[0] is not None else None,
    ),
    jvp=lambda tangents, tensors, params: _along_second(max_pool2d_dgrad, tangents, tensors, params),
    saves=lambda needs: (needs[1], False),
    fold=(0, 1),
    fold_params=lambda params, size: params,
)


# ---- jvp: y's tangent, from x's tangent t. Linear in it; its derivative is dgrad. --------------------------------------


def _jvp_resolve(tensors: Sequence[Any], params: tuple[Any, ...]) -> Callable[..., Any]:
    x, t = tensors
    validate(x, params)
    _check("jvp", x, t, x.shape)
    return _bind("jvp", x, {"x": x, "t": t}, {"y": _memory.prefers_channels_last(x)}, params)


max_pool2d_jvp: Operator = Operator(
    "max_pool2d_jvp",
    f"(Tensor x, Tensor t, {_TAIL}) -> Tensor",
    tensors=2,
    resolve=_jvp_resolve,
    fake=lambda tensors, params: _fake(tensors[:1], params),
    backward=lambda needs, gradients, saved, params, metas: (
        None,
        max_pool2d_dgrad(saved[0], gradients[0], *params) if needs[1] and gradients[0] is not None else None,
    ),
    jvp=lambda tangents, tensors, params: _along_second(max_pool2d_jvp, tangents, tensors, params),
    saves=lambda needs: (needs[1], False),
    fold=(0, 1),
    fold_params=lambda params, size: params,
)


def _along_second(operator: Operator, tangents: Sequence[Any], tensors: Sequence[Any], params: tuple[Any, ...]) -> Any:
    """The tangent of an operator that is linear in its second tensor and piecewise constant in its first."""
    if tangents[1] is None:
        return torch.zeros_like(operator(*tensors, *params))
    return operator(tensors[0], tangents[1], *params)
