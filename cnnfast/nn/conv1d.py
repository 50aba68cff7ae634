"""``cnnfast.Conv1d``: ``torch.nn.Conv1d`` on cnnfast's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from cnnfast import functional
from cnnfast.nn._scripting import scripted


class Conv1d(torch.nn.Conv1d):
    """``torch.nn.Conv1d`` with the same constructor, parameters, ``state_dict`` and meaning, on cnnfast's kernels."""

    _scripted = scripted(torch.nn.Conv1d._conv_forward)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros":
            padded = torch.nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return functional.conv1d(padded, weight, bias, self.stride, (0,), self.dilation, self.groups)
        return functional.conv1d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, L) or (C, L) to (N, K, Q) or (K, Q)."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._scripted(input, self.weight, self.bias)
        else:
            return self._conv_forward(input, self.weight, self.bias)
