"""What only the grouped kernels could get wrong: groups of 4 channels share products, so one bad value may not leave its own."""

from __future__ import annotations

import pytest
import torch
from support import oracle, process

from cnnfast import dispatch, ops

HERE = [
    pytest.param(i, id=f"{i.name}-{i.direction}", marks=process.marks(i))
    for i in dispatch.implementations("conv2d")
    if i.stem == "conv2d_grouped" and i.direction in ("fprop", "dgrad") and not process.not_here(i)
]


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (1, 2)], ids=str)
def test_bad_values_stay_in_their_group(implementation: dispatch.Implementation, stride: tuple[int, int]) -> None:
    """Where the products of two groups aren't finite, each result is the direct sum: infinities, NaNs, where they belong."""
    dtype, device = dispatch.TORCH_DTYPES[implementation.dtypes[0]], process.device(implementation)
    precision = "high" if implementation.name.endswith("tf32") else "fp32"
    geometry = (stride, (1, 1, 1, 1), (1, 1), 4)
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 16, 9, 8, generator=generator), torch.randn(16, 4, 3, 3, generator=generator)
    y = ops.conv2d(x, w, None, *geometry, "fp32", "cpu.conv2d_direct", True)
    forward = implementation.direction == "fprop"
    for place, value in (((0, 1, 4, 3), float("inf")), ((1, 6, 0, 2), float("nan")), ((1, 11, 2, 0), -float("inf"))):
        t = (x if forward else y).clone()
        t[place] = value
        t = t.to(dtype).contiguous(memory_format=torch.channels_last)

        def run(t: torch.Tensor, w: torch.Tensor, precision: str, backend: str) -> torch.Tensor:
            if forward:
                out: torch.Tensor = ops.conv2d(t, w, None, *geometry, precision, backend, True)
            else:
                out = ops.conv2d_dgrad(w, t, x.shape, True, *geometry, precision, backend, True)
            return out

        out = run(t.to(device), w.to(dtype).to(device), precision, implementation.name).cpu()
        expected = run(t.float(), w.to(dtype).float(), "fp32", "cpu.conv2d_direct")
        oracle.check_nonfinite(f"{implementation.name}, {value} at {place}", out, expected)
