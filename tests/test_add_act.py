"""How add_act rounds, which no tolerance tells: a sum of 16-bit floats is the nearest one, of two as near the even one."""

from __future__ import annotations

import pytest
import torch
from support import process

from cnnfast import dispatch, ops

KERNELS = [
    pytest.param(i, id=i.name, marks=process.marks(i))
    for i in dispatch.implementations("add_act")
    if i.direction == "fprop" and not process.not_here(i)
]
STEPS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half of what neighbours in [1, 2) differ by


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("dtype", STEPS, ids=["bf16", "f16"])
def test_rounding(implementation: dispatch.Implementation, dtype: torch.dtype) -> None:
    """Every number in [1, 2), and what lies between it and the next: a half, and a little less and more than that."""
    if not any(dispatch.TORCH_DTYPES[name] == dtype for name in implementation.dtypes):
        pytest.skip(f"{implementation.name} has no {dtype}")
    step = STEPS[dtype]
    x = torch.arange(1, 2, 2 * step, dtype=torch.float64).reshape(1, 8, 1, -1)
    for part in (1, 1 - 2.0**-5, 1 + 2.0**-5):
        for sign in (1, -1):
            a, b = (sign * x).to(dtype), torch.full_like(x, sign * part * step).to(dtype)
            a, b = (t.to(process.device(implementation), memory_format=torch.channels_last) for t in (a, b))
            ours = ops.add_act(a, b, "none", implementation.name, True)
            # a and b are exact in float64, and so is their sum
            assert torch.equal(ours, (a.double() + b.double()).to(dtype)), f"{implementation.name}, {sign * part} steps"
