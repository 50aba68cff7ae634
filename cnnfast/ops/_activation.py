"""The activations that fused operations end with, by name: their codes for kernels, and both ways in torch's terms."""

from __future__ import annotations

from typing import Any

import torch

ACTIVATIONS = ("none", "relu", "relu6", "leaky_relu")  # those whose result tells the derivative
INFERENCE = (
    *ACTIVATIONS,
    "silu",
    "hardswish",
    "sigmoid",
    "hardsigmoid",
)  # in the order of Activation in csrc/common/activation.h
LEAKY_SLOPE = 0.01


def code(op: str, activation: Any, inference: bool = False) -> int:
    """The number that a kernel knows an activation by; those of inference only on request."""
    known = INFERENCE if inference else ACTIVATIONS
    if activation not in known:
        raise ValueError(f"{op}: expected an activation out of {', '.join(known)}, got {activation!r}")
    return known.index(activation)


def forward(z: Any, activation: str) -> Any:
    """act(z) by torch's elementwise operators."""
    if activation == "none":
        return z
    if activation == "relu":
        return torch.relu(z)
    if activation == "relu6":
        return torch.clamp(z, 0, 6)
    if activation == "leaky_relu":
        return torch.nn.functional.leaky_relu(z, LEAKY_SLOPE)
    return getattr(torch.nn.functional, activation)(z)


def backward(g: Any, at: Any, activation: str) -> Any:
    """g * act'(z), linear in g; ``at`` is z or act(z), which tell the same. NaN passes, as in torch."""
    if activation == "none":
        return g
    if activation == "relu":
        return torch.where(at <= 0, 0.0, g)
    if activation == "relu6":
        return torch.where((at <= 0) | (at >= 6), 0.0, g)
    code("the gradient", activation)
    return torch.where(at > 0, g, g * LEAKY_SLOPE)
