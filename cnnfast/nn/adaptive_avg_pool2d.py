"""``cnnfast.AdaptiveAvgPool2d``: ``torch.nn.AdaptiveAvgPool2d`` on cnnfast's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnnfast import functional


class AdaptiveAvgPool2d(torch.nn.AdaptiveAvgPool2d):
    """``torch.nn.AdaptiveAvgPool2d`` with the same constructor and meaning, on cnnfast's kernels."""

    def forward(self, input: Tensor) -> Any:
        """(N, C, H, W) or (C, H, W) to (N, C, P, Q) or (C, P, Q)."""
        return functional.adaptive_avg_pool2d(input, self.output_size)
