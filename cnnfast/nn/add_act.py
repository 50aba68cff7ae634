"""``cnnfast.AddAct``: a sum and an activation in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from cnnfast import functional, ops
from cnnfast.nn._scripting import activated


class AddAct(torch.nn.Module):
    """``act(x + y)``, the end of a residual block, in one pass over memory forward and backward.

    Args:
        activation: ``"none"``, ``"relu"``, ``"relu6"`` or ``"leaky_relu"``.
    """

    def __init__(self, activation: str = "relu") -> None:
        super().__init__()
        ops.activation_code("AddAct", activation)
        self.activation = activation

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Two tensors that can be broadcast to each other."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return activated(x + y, self.activation)
        else:
            return functional.add_act(x, y, self.activation)

    def extra_repr(self) -> str:
        """The activation."""
        return self.activation
