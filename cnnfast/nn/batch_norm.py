"""``cnnfast.BatchNorm2d``: ``torch.nn.BatchNorm2d`` on cnnfast's kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import has_torch_function_unary

from cnnfast import functional
from cnnfast.nn._scripting import scripted


class BatchNorm2d(torch.nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` with the same constructor, parameters, buffers, ``state_dict`` and meaning."""

    _scripted = scripted(torch.nn.BatchNorm2d.forward)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._scripted(input)
        else:
            return self.forward_act(input, None, "none")

    def forward_act(self, input: Tensor, residual: Tensor | None = None, activation: str = "relu") -> Tensor:
        """``act(self(input) + residual)`` in one pass over memory; see :func:`cnnfast.functional.batch_norm_act`."""
        if not has_torch_function_unary(input):  # a tracer's proxy has no dimensions to look at
            self._check_input_dim(input)
        batch = self.training or (self.running_mean is None and self.running_var is None)
        mean, var, momentum = self.averages()
        if residual is None and activation == "none":
            return functional.batch_norm(input, mean, var, self.weight, self.bias, batch, momentum, self.eps)
        return functional.batch_norm_act(
            input, self.weight, self.bias, mean, var, residual, activation, batch, momentum, self.eps
        )

    def averages(self) -> tuple[Tensor | None, Tensor | None, float]:
        """The running averages that a batch is normalised by, or in training is to update, and its share; counts it."""
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        if self.training and not self.track_running_stats:
            return None, None, momentum
        return self.running_mean, self.running_var, momentum
