"""``cnnfast.AvgPool2d``: ``torch.nn.AvgPool2d`` on cnnfast's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnnfast import functional


class AvgPool2d(torch.nn.AvgPool2d):
    """``torch.nn.AvgPool2d`` with the same constructor and meaning, on cnnfast's kernels."""

    def forward(self, input: Tensor) -> Any:
        """(N, C, H, W) or (C, H, W) to (N, C, P, Q) or (C, P, Q)."""
        return functional.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )
