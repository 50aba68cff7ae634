"""``cnnfast.Conv2d``: ``torch.nn.Conv2d`` on cnnfast's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from cnnfast import functional
from cnnfast.nn._scripting import scripted


class Conv2d(torch.nn.Conv2d):
    """``torch.nn.Conv2d`` with the same constructor, parameters, ``state_dict`` and meaning, on cnnfast's kernels.

    The weights are read at every call: nothing derived from them is kept, so no update can be missed.
    """

    _scripted = scripted(torch.nn.Conv2d._conv_forward)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros":
            padded = torch.nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return functional.conv2d(padded, weight, bias, self.stride, (0, 0), self.dilation, self.groups)
        return functional.conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) or (C, H, W) to (N, K, P, Q) or (K, P, Q)."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._scripted(input, self.weight, self.bias)
        else:
            return self._conv_forward(input, self.weight, self.bias)
