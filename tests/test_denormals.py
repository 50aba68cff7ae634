"""Convolutions flush denormal numbers on the CPU, and leave the caller's floating-point mode as it was."""

from __future__ import annotations

import pytest
import torch
from support import process

from cnnfast import dispatch, ops, settings

pytestmark = pytest.mark.skipif(process.EMULATED or process.INTERPRETED, reason="the CPU's kernels: the plain process")

TINY = {torch.float32: 1e-39, torch.float64: 1e-310, torch.bfloat16: 1e-39, torch.float16: 1e-6}
KERNELS = sorted({i.name for i in dispatch.implementations("conv2d") if i.backend == "cpu"})


def _keeps_denormals() -> bool:
    """Whether this thread and torch's pool still compute with denormals."""
    x = torch.full((1 << 20,), 1e-39)  # large enough for several threads
    return bool(((x + x) > 1.5e-39).all()) and float(torch.tensor(1e-39) * 2) > 0


@pytest.mark.parametrize("dtype", TINY, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_denormals(kernel: str, dtype: torch.dtype) -> None:
    """Denormal operands count as themselves or as 0, normal results come out right, and the mode is restored."""
    torch.manual_seed(0)
    x = torch.rand(2, 32, 30, 30).to(dtype).contiguous(memory_format=torch.channels_last)
    w = (torch.rand(32, 4, 3, 3, dtype=torch.float64) * TINY[dtype]).to(dtype)
    big = torch.full((1,), 1.0, dtype=dtype)
    w[::2] = big / 36
    args = ((1, 1), (1, 1, 1, 1), (1, 1), 8, "fp32")
    ref = torch.nn.functional.conv2d(x.double(), w.double(), None, 1, 1, 1, 8)
    for direction in ("fprop", "dgrad", "wgrad"):
        own = [i for i in dispatch.implementations("conv2d") if (i.name, i.direction) == (kernel, direction)]
        forced = kernel if own and dtype in (dispatch.TORCH_DTYPES[d] for d in own[0].dtypes) else ""
        if not forced:
            continue
        with settings.backend(forced):
            backend, _, strict = settings.state()
            try:
                if direction == "fprop":
                    y = ops.conv2d(x, w, None, *args, backend, strict)
                elif direction == "dgrad":
                    y = ops.conv2d_dgrad(w, x, x.shape, True, *args, backend, strict)
                else:
                    y = ops.conv2d_wgrad(x, x, w.shape, False, *args, backend, strict)
            except NotImplementedError as error:
                pytest.skip(str(error).splitlines()[0])
        assert _keeps_denormals(), f"{kernel} {direction}: the floating-point mode isn't what it was"
        if direction == "fprop":
            error = (y.double() - ref).abs()
            unit = torch.finfo(dtype).eps
            assert bool((error[:, ::2] <= 4 * unit * ref[:, ::2].abs()).all()), f"{kernel}: normal results are off"
            if dtype == torch.float16:  # whose denormals are normal floats
                assert bool((error <= 2 * unit * ref.abs() + 6e-8).all()), f"{kernel}: fp16 denormals are lost"
            else:
                assert bool((error[:, 1::2] <= 100 * TINY[dtype]).all()), f"{kernel}: denormal results are off"
        assert bool(y.isfinite().all())
