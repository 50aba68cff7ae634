"""batch_norm: torch.nn.functional.batch_norm on cnnfast's kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from cnnfast import dispatch, ops, settings
from cnnfast.errors import DtypeError, ShapeError
from cnnfast.functional._arguments import (
    check_tensors,
    has_torch_function,
    not_ours,
    plain,
    scripting,
    torch_serves,
)
from cnnfast.functional.add_act import add_act


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch normalisation, as :func:`torch.nn.functional.batch_norm`.

    Args:
        input: (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W); float32, float64, bfloat16 or float16. channels_last
            is fastest.
        running_mean, running_var: (C,); what evaluation normalises with, and training updates in place. None in
            training: they aren't kept.
        weight, bias: (C,) or None; of the input's dtype, like the running statistics, or all float32 beside 16-bit inputs.
        training: Normalise with the batch's own statistics: the biased variance; running_var gets the unbiased one.
        momentum: The share of the new value in the running averages.
        eps: Added to the variance.

    Returns:
        The input's shape and dtype. A channel that is constant gives exactly its bias. Sums are in float64 for every
        dtype, so that what the dtype can hold doesn't overflow when squared.

    Second derivatives and forward mode run on torch's elementwise operators: their formulas aren't worth kernels of
    their own.

    Raises:
        ShapeError: (a ValueError and RuntimeError) shapes or values that torch rejects.
        DtypeError: (a TypeError and RuntimeError) dtypes that don't go together.
        NotImplementedError: nothing serves under ``strict()`` or a forced backend; lists every backend's reason.
    """
    if has_torch_function(input, running_mean, running_var, weight, bias):
        return handle_torch_function(
            batch_norm, (input, running_mean, running_var, weight, bias), input, running_mean, running_var, weight=weight,
            bias=bias, training=training, momentum=momentum, eps=eps,
        )  # fmt: skip
    return _batch_norm(
        "batch_norm", input, weight, bias, running_mean, running_var, None, "none", training, momentum, eps
    )


def batch_norm_act(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None = None,
    activation: str = "relu",
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``act(batch_norm(input) + residual)`` in one pass over memory (and one for the statistics, in training).

    Args:
        input, weight, bias, running_mean, running_var, training, momentum, eps: As :func:`batch_norm` takes them.
        residual: A tensor of the input's shape, or None; fused where it has the input's dtype.
        activation: ``"none"``, ``"relu"``, ``"relu6"`` or ``"leaky_relu"`` (slope 0.01).

    Returns:
        The input's shape and dtype. For the gradient the input is kept and, where there are a residual and an
        activation, the result; without a residual the activation's slope is found from the input again.
    """
    if has_torch_function(input, weight, bias, running_mean, running_var, residual):
        return handle_torch_function(
            batch_norm_act, (input, weight, bias, running_mean, running_var, residual), input, weight, bias, running_mean,
            running_var, residual=residual, activation=activation, training=training, momentum=momentum, eps=eps,
        )  # fmt: skip
    ops.activation_code("batch_norm_act", activation)
    if residual is not None and residual.dtype != input.dtype:  # the sum is of the wider dtype
        return add_act(
            batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps), residual, activation
        )
    return _batch_norm(
        "batch_norm_act", input, weight, bias, running_mean, running_var, residual, activation, training, momentum, eps
    )


def _batch_norm(
    op: str, input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, residual: Tensor | None, activation: str, training: bool, momentum: float, eps: float,
) -> Tensor:  # fmt: skip
    backend, _, strict = settings._state
    params = (activation, training, eps, backend, strict)
    if type(training) is bool and type(eps) is float and plain():  # a kind of call that was checked before
        if not training:
            tensors = (input, weight, bias, running_mean, running_var, residual)
            run = ops.batch_norm.find(tensors, params) if running_mean is not None and running_var is not None else None
            if run is not None:
                return ops.batch_norm.apply(run, tensors, params)
        elif momentum is not None and (running_mean is None) == (running_var is None):
            find_statistics = ops.batch_norm_stats.find((input,), (eps, backend, strict))
            if find_statistics is not None and input.numel() > input.shape[1]:
                given = [t for t in (weight, bias, running_mean, running_var) if t is not None]
                wide = dispatch.ACCUMULATORS.get(input.dtype, torch.float32)
                if all(t.dtype == wide and t.shape == input.shape[1:2] for t in given):
                    mean, invstd, unbiased = find_statistics(input)
                    tensors = (input, weight, bias, mean, invstd, residual)
                    run = ops.batch_norm.find(tensors, params)
                    if run is not None:
                        update(running_mean, running_var, mean, unbiased, momentum)
                        return ops.batch_norm.apply(run, tensors, params)
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    check_tensors(op, input=input, **{k: t for k, t in (*vectors.items(), ("residual", residual)) if t is not None})
    if scripting():
        return _torch_batch_norm(
            input, weight, bias, running_mean, running_var, residual, activation, training, momentum, eps
        )
    if input.dim() < 2 and residual is None:
        torch_args = (input, weight, bias, running_mean, running_var, residual, activation, training, momentum, eps)
        return torch_serves(op, f"{input.dim()} dimensions (ours: 2 to 5)", _torch_batch_norm, *torch_args)
    reason = not_ours(input)
    try:
        check_batch_norm(op, input, tuple(input.shape), vectors, training, momentum, eps)
    except (ShapeError, DtypeError):
        if input.dim() < 2 or input.numel():
            raise
        reason = reason or "an empty input, of which torch checks no vectors"
    if residual is not None and residual.shape != input.shape:
        raise ShapeError(
            f"{op}: expected a residual of the input's shape {tuple(input.shape)}, got {tuple(residual.shape)}"
        )
    dims = input.dim()
    device = input.device.type
    if (
        not reason
        and backend == settings.AUTO
        and not strict
        and device != "meta"
        and not dispatch.served("batch_norm", device)
    ):
        reason = f"no kernel of ours on {device}"  # torch has one; ATen behind our operator would be several
    if not reason and (dims > 5 or input.shape[1] == 0):
        reason = "more than 5 dimensions" if dims > 5 else "no channels"
    if reason:
        return torch_serves(
            op, reason, _torch_batch_norm, input, weight, bias, running_mean, running_var, residual, activation, training,
            momentum, eps,
        )  # fmt: skip
    wide = dispatch.ACCUMULATORS.get(input.dtype, torch.float32)
    x = input if dims == 4 else _as_images(input)
    r = residual if residual is None or dims == 4 else _as_images(residual)
    w, b = vector(weight, wide), vector(bias, wide)
    training, eps = bool(training), float(eps)
    if not training:
        mean, var = vector(running_mean, wide), vector(running_var, wide)
    elif input.numel() == 0:  # there is nothing to normalise, and no statistics
        training, mean, var = False, None, None
    else:
        mean, var, unbiased = ops.batch_norm_stats(x.detach(), eps, backend, strict)
        update(running_mean, running_var, mean, unbiased, momentum)
    y = ops.batch_norm(x, w, b, mean, var, r, activation, training, eps, backend, strict)
    if dims == 4:
        return y
    return y.reshape(input.shape) if dims == 5 else y.reshape(input.shape).contiguous()


def update(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, unbiased: Tensor, momentum: float
) -> None:
    """Moves the running averages by a share of a batch's mean and unbiased variance; None are left alone."""
    if running_mean is None or running_var is None:
        return
    averages = [running_mean, running_var]
    found = [t.to(a.dtype) for t, a in zip((mean, unbiased), averages, strict=True)]
    with torch.no_grad():
        if plain():
            torch._foreach_lerp_(averages, found, momentum)  # one launch on a GPU
            return
        for average, t in zip(averages, found, strict=True):  # vmap has no rule for the other
            average.lerp_(t, momentum)


def _as_images(t: Tensor) -> Tensor:
    """(N, C), (N, C, L) or (N, C, D, H, W) as (N, C, H, W)."""
    return t[:, :, None, None] if t.dim() == 2 else t.unsqueeze(2) if t.dim() == 3 else t.flatten(2, 3)


def vector(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A per-channel operand in the dtype of sums, as one dimension."""
    if t is None or (t.dtype == dtype and t.dim() == 1):
        return t
    return t.to(dtype).reshape(-1)


def check_batch_norm(
    op: str, input: Tensor, shape: tuple[Any, ...], vectors: dict[str, Tensor | None], training: bool, momentum: Any,
    eps: Any,
) -> None:  # fmt: skip
    """Raises what torch rejects of an input of this shape."""

    def fail(expected: str, error: type[Exception] = ShapeError) -> None:
        listed = ", ".join(f"{k} {tuple(t.shape)} {t.dtype}" for k, t in vectors.items() if t is not None)
        raise error(f"{op}: {expected}; got input {shape} {input.dtype}, {listed or 'no vectors'}")

    for name, value in (("momentum", momentum), ("eps", eps)):
        if not isinstance(value, (int, float, torch.SymFloat)):
            raise TypeError(f"{op}: expected {name} to be a number, got {value!r}")
    if len(shape) < 2:
        fail("expected an input (N, C, ...) of at least 2 dimensions")
    mean, var = vectors["running_mean"], vectors["running_var"]
    if training:
        if eps <= 0:
            fail(f"expected a positive eps in training, not {eps}")
        if math.prod(shape) == shape[1] > 0:
            fail("expected more than 1 value per channel when training")
        if (mean is None) != (var is None):
            fail("expected both running_mean and running_var, or neither")
    elif mean is None or var is None:
        fail("expected running_mean and running_var where training is False")
    dtypes = set()
    for name, t in vectors.items():
        if t is None:
            continue
        dtypes.add(t.dtype)
        if t.numel() != shape[1]:
            fail(f"expected {name} to have C = {shape[1]} elements")
        if t.device != input.device:
            fail(f"expected {name} on {input.device}, not {t.device}", DtypeError)
    allowed = {input.dtype} if input.dtype not in (torch.bfloat16, torch.float16) else {input.dtype, torch.float32}
    if len(dtypes) > 1 or not dtypes <= allowed:
        fail(f"expected all vectors to be {' or all '.join(sorted(map(str, allowed)))}", DtypeError)


def _torch_batch_norm(
    input: Tensor, weight: Any, bias: Any, mean: Any, var: Any, residual: Any, activation: str, training: bool,
    momentum: float, eps: float,
) -> Tensor:  # fmt: skip
    z = torch.nn.functional.batch_norm(input, mean, var, weight, bias, training, momentum, eps)
    return ops.activate(z if residual is None else z + residual, activation)
