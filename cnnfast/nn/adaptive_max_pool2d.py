"""``cnnfast.AdaptiveMaxPool2d``: ``torch.nn.AdaptiveMaxPool2d`` on cnnfast's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from cnnfast import functional
from cnnfast.nn._scripting import scripted


class AdaptiveMaxPool2d(torch.nn.AdaptiveMaxPool2d):
    """``torch.nn.AdaptiveMaxPool2d`` with the same constructor and meaning, on cnnfast's kernels."""

    _scripted = scripted(torch.nn.AdaptiveMaxPool2d.forward)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) or (C, H, W) to (N, C, P, Q) or (C, P, Q); with ``return_indices`` also the int64 indices."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._scripted(input)
        else:
            return functional.adaptive_max_pool2d(input, self.output_size, self.return_indices)
