"""Winograd's F(4 x 4, 3 x 3): _conv2d_winograd.py with tiles of 4 x 4 outputs, in fp32."""

from __future__ import annotations

import torch

from ._conv2d_winograd import kernels, workspaces

DTYPES = (torch.float32,)
KERNELS, WORKSPACE = kernels(4), workspaces(4)
