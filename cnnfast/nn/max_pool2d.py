"""``cnnfast.MaxPool2d``: ``torch.nn.MaxPool2d`` on cnnfast's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnnfast import functional


class MaxPool2d(torch.nn.MaxPool2d):
    """``torch.nn.MaxPool2d`` with the same constructor and meaning, on cnnfast's kernels."""

    def forward(self, input: Tensor) -> Any:
        """(N, C, H, W) or (C, H, W) to (N, C, P, Q) or (C, P, Q); with ``return_indices`` also the int64 indices."""
        return functional.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            ceil_mode=self.ceil_mode,
            return_indices=self.return_indices,
        )
