"""``cnnfast.ConvTranspose2d``: ``torch.nn.ConvTranspose2d`` on cnnfast's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnnfast import functional
from cnnfast.nn._scripting import scripted


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` with the same constructor, parameters and meaning, on cnnfast's kernels."""

    _scripted = scripted(torch.nn.ConvTranspose2d.forward)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(N, C, P, Q) or (C, P, Q) to (N, K, H, W) or (K, H, W); ``output_size`` chooses among the possible (H, W)."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._scripted(input, output_size)
        else:
            return self._transposed(input, output_size)

    def _transposed(self, input: Tensor, output_size: Any) -> Tensor:
        if self.padding_mode != "zeros":
            raise ValueError("ConvTranspose2d: only padding_mode 'zeros' is supported")
        me: Any = self  # torch annotates its own attributes wrongly
        extra = me._output_padding(input, output_size, me.stride, me.padding, me.kernel_size, 2, me.dilation)
        return functional.conv_transpose2d(
            input, self.weight, self.bias, me.stride, me.padding, extra, self.groups, me.dilation
        )
