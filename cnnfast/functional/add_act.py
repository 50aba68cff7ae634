"""add_act: the sum of two tensors and an activation in one pass; torch has the two operations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from cnnfast import ops, settings
from cnnfast.functional._arguments import (
    check_tensors,
    has_torch_function,
    not_ours,
    plain,
    scripting,
    torch_serves,
)


def add_act(input: Tensor, other: Tensor, activation: str = "relu") -> Tensor:
    """``act(input + other)`` in one pass over memory, forward and backward: the end of a residual block.

    Args:
        input, other: Floating point tensors that can be broadcast to each other; any strides.
        activation: ``"none"``, ``"relu"``, ``"relu6"`` or ``"leaky_relu"`` (slope 0.01).

    Returns:
        The sum's shape, dtype and layout as ``input + other`` would have them. NaN propagates.
    """
    if has_torch_function(input, other):
        return handle_torch_function(add_act, (input, other), input, other, activation=activation)
    backend, _, strict = settings._state
    short = plain()
    if short:  # perhaps a kind of call that was checked before
        tensors, params = (input, other), (activation, backend, strict)
        run = ops.add_act.find(tensors, params)
        if run is not None:
            return ops.add_act.apply(run, tensors, params)
    check_tensors("add_act", input=input, other=other)
    ops.activation_code("add_act", activation)
    if not short and scripting():
        return ops.activate(input + other, activation)
    if input.dim() == 4 and input.shape == other.shape and input.dtype == other.dtype and not not_ours(input, other):
        return ops.add_act(input, other, activation, backend, strict)
    dtype = torch.result_type(input, other)
    a, b = torch.broadcast_tensors(input.to(dtype), other.to(dtype))  # type: ignore[no-untyped-call]
    reason = not_ours(a, b) or (f"{a.dim()} dimensions (ours: up to 4)" if a.dim() > 4 else "")
    if not reason and a.numel() == 0:
        reason = "an empty tensor"
    if reason:
        return torch_serves("add_act", reason, lambda: ops.activate(input + other, activation))
    shape, more = a.shape, (None,) * (4 - a.dim())
    return ops.add_act(a[more], b[more], activation, backend, strict).reshape(shape)
