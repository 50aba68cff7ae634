"""``cnnfast.ConvTranspose2d``: ``torch.nn.ConvTranspose2d`` on cnnfast's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnnfast import functional


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` with the same constructor, parameters and meaning, on cnnfast's kernels."""

    def forward(self, input: Tensor, output_size: Any = None) -> Tensor:
        """(N, C, P, Q) or (C, P, Q) to (N, K, H, W) or (K, H, W); ``output_size`` chooses among the possible (H, W)."""
        if self.padding_mode != "zeros":
            raise ValueError("ConvTranspose2d: only padding_mode 'zeros' is supported")
        me: Any = self  # torch annotates its own attributes wrongly
        extra = me._output_padding(input, output_size, me.stride, me.padding, me.kernel_size, 2, me.dilation)
        return functional.conv_transpose2d(
            input, self.weight, self.bias, me.stride, me.padding, extra, self.groups, me.dilation
        )
