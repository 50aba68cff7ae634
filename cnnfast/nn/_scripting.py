"""TorchScript compiles the source of ``forward``: a subset of Python that knows torch's operators only.

So there a module of ours does what torch's does: ``if torch.jit.is_scripting()`` with an ``else``, because the compiler leaves
out one of two branches.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor


def scripted(method: Any) -> Any:
    """A method of torch's by the name ``_scripted``, beside one that has taken its place: the compiler goes by names."""
    made = types.FunctionType(method.__code__, method.__globals__, "_scripted", method.__defaults__, method.__closure__)
    made.__annotations__ = method.__annotations__
    return made


def activated(x: Tensor, activation: str) -> Tensor:
    """An activation by its name, in what TorchScript knows."""
    if activation == "relu":
        return torch.relu(x)
    if activation == "relu6":
        return torch.nn.functional.relu6(x)
    if activation == "leaky_relu":
        return torch.nn.functional.leaky_relu(x)
    return x
