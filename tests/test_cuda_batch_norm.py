"""What a GPU's statistics promise beyond the cases: exact constants, huge values, outliers, and chunks of every length."""

from __future__ import annotations

import pytest
import torch
from support import process

from cnnfast import dispatch, ops

EPS = 1e-5
KERNELS = [
    pytest.param(i, id=i.name, marks=process.marks(i))
    for i in dispatch.implementations("batch_norm")
    if i.direction == "stats" and i.backend == "cuda" and not process.INTERPRETED
]


def _stats(implementation: dispatch.Implementation, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Mean, 1 / sqrt(variance + eps) and unbiased variance, in float64 on the CPU."""
    given = x.to(process.device(implementation)).to(memory_format=torch.channels_last)
    return tuple(t.cpu().double() for t in ops.batch_norm_stats(given, EPS, implementation.name, True))


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [3, 8])
def test_a_constant_channel(implementation: dispatch.Implementation, dtype: torch.dtype, channels: int) -> None:
    x = torch.linspace(-3, 1e3, channels, dtype=torch.float64).to(dtype).reshape(1, -1, 1, 1).expand(3, -1, 50, 41)
    mean, invstd, unbiased = _stats(implementation, x)
    assert torch.equal(mean, x[0, :, 0, 0].double())
    assert torch.equal(unbiased, torch.zeros_like(unbiased))
    torch.testing.assert_close(invstd, torch.full_like(invstd, EPS**-0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("implementation", KERNELS)
def test_squares_beyond_float(implementation: dispatch.Implementation) -> None:
    """Beside them channels that are ordinary, constant, infinite."""
    x = torch.randn(3, 8, 25, 21, generator=torch.Generator().manual_seed(0))
    x[:, 1] *= 1e30
    x[:, 2] = 1e30
    x[:, 3] *= 1e25
    x[1, 4, 3, 3] = float("inf")
    mean, invstd, _ = _stats(implementation, x)
    wide = x.double()
    finite = [0, 1, 2, 3, 5, 6, 7]
    expected = (wide.var((0, 2, 3), correction=0) + EPS).rsqrt()
    torch.testing.assert_close(invstd[finite], expected[finite], rtol=1e-5, atol=0)
    error = (mean - wide.mean((0, 2, 3))).abs()[finite]
    assert bool((error <= 1e-6 * wide.abs().mean((0, 2, 3))[finite]).all())
    assert mean[4] == float("inf")
    assert invstd[4].isnan()


@pytest.mark.parametrize("implementation", KERNELS)
def test_one_channel_beyond_float(implementation: dispatch.Implementation) -> None:
    """Each of those that a block finishes together, and no other."""
    for channel in range(8):
        x = torch.randn(1, 8, 3, 3, generator=torch.Generator().manual_seed(0))
        x[:, channel] *= 1e30
        _, invstd, _ = _stats(implementation, x)
        expected = (x.double().var((0, 2, 3), correction=0) + EPS).rsqrt()
        torch.testing.assert_close(invstd, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("implementation", KERNELS)
def test_an_outlier_first(implementation: dispatch.Implementation) -> None:
    x = torch.randn(4, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    x[0, :, 0, 0] = 1e6
    mean, invstd, _ = _stats(implementation, x)
    wide = x.double()
    torch.testing.assert_close(mean, wide.mean((0, 2, 3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(invstd, wide.var((0, 2, 3), correction=0).rsqrt(), rtol=1e-5, atol=0)
