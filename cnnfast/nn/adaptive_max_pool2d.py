"""``cnnfast.AdaptiveMaxPool2d``: ``torch.nn.AdaptiveMaxPool2d`` on cnnfast's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnnfast import functional


class AdaptiveMaxPool2d(torch.nn.AdaptiveMaxPool2d):
    """``torch.nn.AdaptiveMaxPool2d`` with the same constructor and meaning, on cnnfast's kernels."""

    def forward(self, input: Tensor) -> Any:
        """(N, C, H, W) or (C, H, W) to (N, C, P, Q) or (C, P, Q); with ``return_indices`` also the int64 indices."""
        return functional.adaptive_max_pool2d(input, self.output_size, self.return_indices)
