"""conv_bn_act: convolution, batch norm, residual and activation in one call; torch has the four operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from cnnfast import dispatch, ops, settings
from cnnfast.errors import ShapeError
from cnnfast.functional._arguments import (
    any_autocast,
    autocast,
    autocast_dtype,
    has_torch_function,
    integer,
    named_padding,
    not_ours,
    pair,
    plain,
    resolve_precision,
    scripting,
)
from cnnfast.functional.batch_norm import batch_norm_act, check_batch_norm, update, vector
from cnnfast.functional.conv2d import conv2d


def conv_bn_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "relu",
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``act(batch_norm(conv2d(input, weight, bias)) + residual)``.

    In evaluation it is one kernel: the convolution applies everything else to its results before they leave for memory.
    In training the convolution finds its results' statistics while it makes them, where a backend has a kernel for that;
    elsewhere, and where the gradient of bn_weight is asked for, it is :func:`conv2d` and :func:`batch_norm_act`.

    Args:
        input, weight, bias, stride, padding, dilation, groups: As :func:`conv2d` takes them; the input with its batch.
        running_mean, running_var, bn_weight, bn_bias, training, momentum, eps: As :func:`batch_norm` takes them.
        residual: A tensor of the result's shape and dtype, or None.
        activation: ``"none"``, ``"relu"``, ``"relu6"`` or ``"leaky_relu"`` (slope 0.01).

    Returns:
        (N, K, P, Q).
    """
    tensors = (input, weight, bias, running_mean, running_var, bn_weight, bn_bias, residual)
    if has_torch_function(*tensors):
        return handle_torch_function(
            conv_bn_act, tensors, *tensors, activation=activation, stride=stride, padding=padding, dilation=dilation,
            groups=groups, training=training, momentum=momentum, eps=eps,
        )  # fmt: skip
    vectors = (running_mean, running_var, bn_weight, bn_bias)
    if (
        not training
        and type(eps) is float
        and type(padding) is not str
        and not any_autocast()
        and plain()
        and _are_factors(input, weight, vectors)
    ):
        # a kind of call that was checked before
        geometry = _params(weight, stride, padding, dilation, groups)
        arguments = (*geometry, activation, *resolve_precision(input.device))
        operands = (input, weight, bias, *_factors(*vectors, eps), residual)
        run = ops.conv_bn_act.find(operands, arguments)
        if run is not None:
            return ops.conv_bn_act.apply(run, operands, arguments)
    ops.activation_code("conv_bn_act", activation)
    if input.dim() != 4:
        raise ShapeError(f"conv_bn_act: expected a 4-D input (N, C, H, W), got shape {tuple(input.shape)}")
    if training and trains_fused(input, weight, residual):
        conv = (weight, bias, stride, padding, dilation, groups)
        return normalised(conv_for_norm(input, conv, vectors, activation, momentum, eps), residual)
    fused = not (training or scripting() or not_ours(input, weight)) and running_mean is not None
    if bn_weight is not None and bn_weight.requires_grad and torch.is_grad_enabled():
        fused = False
    if any_autocast():
        input, weight, bias = autocast(input, weight, bias)  # type: ignore[assignment]
    if not fused or (residual is not None and residual.dtype != input.dtype):
        z = conv2d(input, weight, bias, stride, padding, dilation, groups)
        return batch_norm_act(
            z, bn_weight, bn_bias, running_mean, running_var, residual, activation, training, momentum, eps
        )
    named = {"weight": bn_weight, "bias": bn_bias, "running_mean": running_mean, "running_var": running_var}
    check_batch_norm("conv_bn_act", input, (1, weight.shape[0]), named, False, momentum, eps)
    wide = dispatch.ACCUMULATORS.get(input.dtype, torch.float32)
    mean, var, gamma, beta = (vector(t, wide) for t in vectors)
    scale, shift = _factors(mean, var, gamma, beta, eps)
    params = (*_params(weight, stride, padding, dilation, groups), activation)
    return ops.conv_bn_act(input, weight, bias, scale, shift, residual, *params, *resolve_precision(input.device))


def _are_factors(input: Tensor, weight: Tensor, vectors: Sequence[Tensor | None]) -> bool:
    """Whether batch norm's vectors can be folded as they are: there, one-dimensional, wide, bn_weight without gradient."""
    if vectors[0] is None or vectors[1] is None:
        return False
    wide, shape = dispatch.ACCUMULATORS.get(input.dtype, torch.float32), weight.shape[:1]
    if any(t is not None and (t.dtype != wide or t.shape != shape) for t in vectors):
        return False
    return vectors[2] is None or not (vectors[2].requires_grad and torch.is_grad_enabled())


def _factors(
    mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Batch norm as scale and shift."""
    assert mean is not None
    assert var is not None
    scale = torch.add(var, eps).rsqrt_()
    if gamma is not None:
        scale = scale * gamma
    return scale, -mean * scale if beta is None else torch.addcmul(beta, mean, scale, value=-1)


def _params(weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: Any) -> tuple[Any, ...]:
    """A convolution's arguments as operators take them."""
    stride, dilation = pair("conv_bn_act", "stride", stride), pair("conv_bn_act", "dilation", dilation)
    if isinstance(padding, str):
        pad = named_padding("conv_bn_act", padding, weight, stride, dilation)
    else:
        h, w = pair("conv_bn_act", "padding", padding)
        pad = (h, h, w, w)
    return stride, pad, dilation, integer("conv_bn_act", "groups", groups)


# ---- training: a convolution with its results' statistics, and what is left of its batch norm for the next one ---------


class Pending(NamedTuple):
    """A convolution's result before its batch norm and activation, which the next convolution may do while it reads."""

    z: Tensor
    mean: Tensor
    invstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    activation: str
    eps: float


def trains_fused(input: Tensor | Pending, weight: Tensor, residual: Tensor | None) -> bool:
    """Whether these go to :func:`conv_for_norm` and :func:`normalised`: where a backend has a kernel for them."""
    x = input.z if isinstance(input, Pending) else input
    if has_torch_function(x, weight) or scripting() or not_ours(x, weight) or x.dim() != 4 or x.numel() == 0:
        return False
    dtype = autocast_dtype(x)
    if autocast_dtype(weight) != dtype or (residual is not None and residual.dtype != dtype):
        return False
    return dispatch.has_kernel("bn_act_conv", dispatch.DTYPES[dtype], x.device.type, settings._state[0])


def _takes_pending(x: Tensor) -> bool:
    """Whether a convolution had rather be given x as it is, to normalise it: its gradients then keep nothing else."""
    return dispatch.has_kernel("bn_act_conv", dispatch.DTYPES[x.dtype], x.device.type, settings._state[0], "wgrad")


def conv_for_norm(
    input: Tensor | Pending, conv: tuple[Any, ...], norm: tuple[Tensor | None, ...], activation: str, momentum: float,
    eps: float,
) -> Pending:  # fmt: skip
    """A convolution in training with what its batch norm needs, which it finds while it writes its result.

    Args:
        input: A tensor, or what a convolution before left to be normalised.
        conv: weight, bias, stride, padding, dilation, groups, as :func:`conv_bn_act` takes them.
        norm: running_mean, running_var, both of which it updates, or None; bn_weight, bn_bias.
        activation, momentum, eps: Of the batch norm.
    """
    weight, bias, *geometry = conv
    if isinstance(input, Pending) and not _takes_pending(input.z):
        input = normalised(input)
    x, before = (input.z, input) if isinstance(input, Pending) else (input, None)
    if any_autocast():
        x, weight, bias = autocast(x, weight, bias)  # type: ignore[assignment]
    vectors = before[1:5] if before else (None,) * 4
    act = (before.activation, before.eps) if before else ("none", 0.0)
    params = (*_params(weight, *geometry), *act, float(eps), *resolve_precision(x.device))
    z, mean, invstd, unbiased = ops.bn_act_conv(x, weight, bias, *vectors, *params)
    named = dict(zip(("running_mean", "running_var", "weight", "bias"), norm, strict=True))
    check_batch_norm("conv_bn_act", z, tuple(z.shape), named, True, momentum, eps)
    running_mean, running_var, bn_weight, bn_bias = norm
    update(running_mean, running_var, mean, unbiased, momentum)
    wide = dispatch.ACCUMULATORS.get(z.dtype, torch.float32)
    return Pending(z, mean, invstd, vector(bn_weight, wide), vector(bn_bias, wide), activation, float(eps))


def normalised(pending: Tensor | Pending, residual: Tensor | None = None) -> Tensor:
    """What a convolution left, normalised, with a residual added, and activated; a tensor is taken to be that."""
    if not isinstance(pending, Pending):
        return pending
    z, mean, invstd, weight, bias, activation, eps = pending
    if residual is not None and residual.shape != z.shape:
        raise ShapeError(
            f"conv_bn_act: expected a residual of the result's shape {tuple(z.shape)}, got {tuple(residual.shape)}"
        )
    backend, _, strict = settings._state
    return ops.batch_norm(z, weight, bias, mean, invstd, residual, activation, True, eps, backend, strict)
