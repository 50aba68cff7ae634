"""ATen: what serves where no kernel of ours does. Explicit, with its reason, and never counted as ours."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from cnnfast.dispatch import Backend, Implementation, Kernel, Problem

_ALL = ("f32", "f64", "bf16", "f16")


def _conv2d(problem: Problem, direction: str, operands: Sequence[Any]) -> Any:
    x, w, b, y = operands
    p = problem
    stride = [p.stride_h, p.stride_w]
    # two crashes of torch 2.14's bf16 and fp16 convolutions: a dilation along an axis of one tap, and weights that are
    # dense in neither memory format
    dilation = [p.dilation_h if p.R > 1 else 1, p.dilation_w if p.S > 1 else 1]
    if w is not None and not (w.is_contiguous() or w.is_contiguous(memory_format=torch.channels_last)):
        w = w.contiguous()
    # ATen takes symmetric padding only: pad to the larger side and cut the surplus
    below = (p.P - 1) * p.stride_h + p.dilation_h * (p.R - 1) + 1 - p.H - p.pad_h
    right = (p.Q - 1) * p.stride_w + p.dilation_w * (p.S - 1) + 1 - p.W - p.pad_w
    pad = (p.pad_w, max(right, 0), p.pad_h, max(below, 0))
    args = (stride, [0, 0], dilation, False, [0, 0], p.G)
    if direction == "fprop":
        return torch.ops.aten.convolution(torch.nn.functional.pad(x, pad), w, b, *args)
    if direction == "bgrad":
        return y.sum((0, 2, 3))
    height, width = p.H + pad[2] + pad[3], p.W + pad[0] + pad[1]
    if direction == "dgrad":
        like = y.new_empty((p.N, p.C, height, width))
        padded = torch.ops.aten.convolution_backward(y, like, w, None, *args, [True, False, False])[0]
        return padded[:, :, pad[2] : pad[2] + p.H, pad[0] : pad[0] + p.W]
    like = y.new_empty((p.K, p.C // p.G, p.R, p.S))
    padded = torch.nn.functional.pad(x, pad)
    return torch.ops.aten.convolution_backward(y, padded, like, None, *args, [False, True, False])[1]


def _conv_bn_act(problem: Problem, direction: str, operands: Sequence[Any]) -> Any:
    x, w, b, _, scale, shift, r = operands
    z = _conv2d(problem, direction, (x, w, b, None))
    if scale is not None or shift is not None:
        wide = z.to(torch.promote_types(z.dtype, torch.float32))
        wide = wide if scale is None else wide * scale.reshape(1, -1, 1, 1)
        z = (wide if shift is None else wide + shift.reshape(1, -1, 1, 1)).to(z.dtype)
    return _ACTIVATIONS[problem.act](z if r is None else z + r)


# by their codes: none, relu, relu6, leaky_relu, silu, hardswish, sigmoid, hardsigmoid
_ACTIVATIONS: tuple[Callable[[Any], Any], ...] = (
    lambda z: z, torch.relu, torch.nn.functional.relu6, torch.nn.functional.leaky_relu,
    torch.nn.functional.silu, torch.nn.functional.hardswish, torch.sigmoid, torch.nn.functional.hardsigmoid,
)  # fmt: skip


def _add_act(problem: Problem, direction: str, operands: Sequence[Any]) -> Any:
    x, r, y, g, _ = operands
    return _ACTIVATIONS[problem.act](x + r) if direction == "fprop" else _act_gradient(problem.act, g, y)


def _act_gradient(act: int, g: Any, at: Any) -> Any:
    if act == 0:
        return g
    if act == 3:
        return torch.where(at > 0, g, 0.01 * g)
    return torch.where((at <= 0) | (at >= 6) if act == 2 else at <= 0, 0.0, g)


_BATCH_NORM = ("stats", "fprop", "dgrad", "wgrad", "backward", "backward_residual")


def _batch_norm(problem: Problem, direction: str, operands: Sequence[Any]) -> Any:
    x, w, b, m, v, r, y = operands[:7]
    p = problem
    (eps,) = struct.unpack("=d", struct.pack("=q", p.eps_bits))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if direction == "stats":
        variance, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        count = p.N * p.H * p.W
        return mean, (variance + eps).rsqrt(), variance * (count / max(1, count - 1))

    def along(vector: Any, missing: float) -> Any:
        return missing if vector is None else vector.reshape(1, -1, 1, 1)

    invstd = along(v if p.training or v is None else (v + eps).rsqrt(), 1.0)
    xhat = (wide - along(m, 0.0)) * invstd
    z = xhat * along(w, 1.0) + along(b, 0.0)
    if direction == "fprop":
        return _ACTIVATIONS[p.act](z if r is None else z + r).to(x.dtype)
    dz = _act_gradient(p.act, y.to(wide.dtype), z if r is None else r)
    scale = invstd * along(w, 1.0)
    if direction == "dgrad":
        return (dz * scale).to(x.dtype)
    dw, db = (dz * xhat).sum((0, 2, 3)), dz.sum((0, 2, 3))
    if direction == "wgrad":
        return dw, db
    t = dz - (along(db, 0.0) + xhat * along(dw, 0.0)) / (p.N * p.H * p.W) if p.training else dz
    t = (t * scale).to(x.dtype)
    return (dw, db, t) if direction == "backward" else (dw, db, t, dz.to(x.dtype))


def _max_pool2d(problem: Problem, direction: str, operands: Sequence[Any]) -> Any:
    x, y, _, t, _ = operands  # taps and scatter are taken only where a kernel has them
    p = problem
    args = [[p.R, p.S], [p.stride_h, p.stride_w], [p.pad_h, p.pad_w], [p.dilation_h, p.dilation_w]]
    # which of the two output sizes was meant decides the rounding
    floor = tuple(torch.ops.aten.max_pool2d_with_indices(x[:, :1].to("meta"), *args)[0].shape[2:])
    ceil_mode = floor != (p.P, p.Q)
    values, indices = torch.ops.aten.max_pool2d_with_indices(x, *args, ceil_mode)
    if direction == "fprop":
        return values
    if direction == "indices":
        return values, indices
    if direction == "dgrad":
        return torch.ops.aten.max_pool2d_with_indices_backward(y, x, *args, ceil_mode, indices)
    return t.flatten(2).gather(2, indices.flatten(2)).reshape(values.shape)


def _avg_pool2d(problem: Problem, direction: str, operands: Sequence[Any]) -> Any:
    x, y = operands
    p = problem
    args = [[p.R, p.S], [p.stride_h, p.stride_w], [p.pad_h, p.pad_w]]
    shape = (p.N, p.C, p.H, p.W)
    # which of the two output sizes was meant decides the rounding
    ceil_mode = tuple(
        torch.ops.aten.avg_pool2d((y if x is None else x).new_empty(shape, device="meta"), *args).shape[2:]
    ) != (p.P, p.Q)
    rest = (ceil_mode, bool(p.count_include_pad), p.divisor_override or None)
    if direction == "fprop":
        return torch.ops.aten.avg_pool2d(x, *args, *rest)
    return torch.ops.aten.avg_pool2d_backward(y, y.new_empty(shape), *args, *rest)


def _adaptive_avg_pool2d(problem: Problem, direction: str, operands: Sequence[Any]) -> Any:
    x, y = operands
    p = problem
    if direction == "fprop":
        return torch.ops.aten.adaptive_avg_pool2d(x, [p.P, p.Q])
    return torch.ops.aten._adaptive_avg_pool2d_backward(y, y.new_empty((p.N, p.C, p.H, p.W)))


def _adaptive_max_pool2d(problem: Problem, direction: str, operands: Sequence[Any]) -> Any:
    x, y, _, t, _ = operands  # taps and scatter are taken only where a kernel has them
    values, indices = torch.ops.aten.adaptive_max_pool2d(x, [problem.P, problem.Q])
    if direction == "fprop":
        return values
    if direction == "indices":
        return values, indices
    if direction == "dgrad":
        return torch.ops.aten.adaptive_max_pool2d_backward(y, x, indices)
    return t.flatten(2).gather(2, indices.flatten(2)).reshape(values.shape)


def _implementation(op: str, direction: str, function: Callable[..., Any]) -> Implementation:
    def bind(problem: Problem, fields: Mapping[str, int]) -> Kernel:
        return lambda operands: function(problem, direction, operands)

    return Implementation(
        name=f"aten.{op}", op=op, backend="aten", stem=op, direction=direction, dtypes=_ALL,
        unsupported=lambda problem: [], bind=bind, returns=True, error_bound=(1.0, "torch itself"),
    )  # fmt: skip


BACKEND = Backend(
    name="aten",
    unavailable=lambda problem: [],
    implementations=[
        *(_implementation("conv2d", d, _conv2d) for d in ("fprop", "dgrad", "wgrad", "bgrad")),
        _implementation("conv_bn_act", "fprop", _conv_bn_act),
        *(_implementation("add_act", d, _add_act) for d in ("fprop", "dgrad")),
        *(_implementation("batch_norm", d, _batch_norm) for d in _BATCH_NORM),
        *(_implementation("max_pool2d", d, _max_pool2d) for d in ("fprop", "indices", "dgrad", "jvp")),
        *(_implementation("avg_pool2d", d, _avg_pool2d) for d in ("fprop", "dgrad")),
        *(
            _implementation("adaptive_max_pool2d", d, _adaptive_max_pool2d)
            for d in ("fprop", "indices", "dgrad", "jvp")
        ),
        *(_implementation("adaptive_avg_pool2d", d, _adaptive_avg_pool2d) for d in ("fprop", "dgrad")),
    ],
    status=lambda: f"torch {torch.__version__}",
)
