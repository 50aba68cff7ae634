"""Winograd's F(2 x 2, 3 x 3): _conv2d_winograd.py with tiles of 2 x 2 outputs, in fp32, bf16 and fp16."""

from __future__ import annotations

import torch

from ._conv2d_winograd import kernels, workspaces

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS, WORKSPACE = kernels(2), workspaces(2)
