"""The statistics of the Triton kernels where a plain sum of squares would fail: constants, huge values, outliers."""

from __future__ import annotations

import pytest
import torch
from support import process

from cnnfast import ops
from cnnfast.backends import triton

EPS = 1e-5
DEVICE = "cpu" if process.INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.interpreter if process.INTERPRETED else pytest.mark.gpu,
    pytest.mark.skipif(not (process.INTERPRETED or process.GPU) or bool(triton.ABSENT), reason="runs Triton kernels"),
]


def _stats(x: torch.Tensor, eps: float = EPS) -> list[torch.Tensor]:
    x = x.to(DEVICE, memory_format=torch.channels_last)
    return [t.cpu().double() for t in ops.batch_norm_stats(x, eps, "triton", True)]


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(3, 5, 7, 11), (4, 64, 9, 9), (2, 7, 1, 1)], ids=str)
@pytest.mark.parametrize("value", [7.3, -1e-3, 6e4])
def test_constant_channels(value: float, shape: tuple[int, ...]) -> None:
    """In one chunk and in several: the mean is the value, the variance 0."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.full(shape, value).to(dtype)
        mean, invstd, unbiased = _stats(x)
        assert torch.equal(mean, x[0, :, 0, 0].double())
        assert torch.equal(unbiased, torch.zeros_like(unbiased))
        torch.testing.assert_close(invstd, torch.full_like(invstd, EPS**-0.5), rtol=1e-7, atol=0)


@pytest.mark.parametrize("hw", [(5, 5), (25, 24)], ids=str)
def test_large_values_and_far_means(hw: tuple[int, int]) -> None:
    """Squares beyond float32, and means that are huge beside the deviation."""
    x = _randn(4, 24, *hw)
    for scaled, eps in ((x * 1e30, EPS), (x + 1e4, EPS), (x * 1e-15, 1e-35)):
        mean, invstd, unbiased = _stats(scaled, eps)
        wide = scaled.double()
        variance = wide.var((0, 2, 3), correction=0)
        deviation = variance.sqrt().max()
        torch.testing.assert_close(mean / deviation, wide.mean((0, 2, 3)) / deviation, rtol=2e-7, atol=1e-6)
        torch.testing.assert_close(invstd, (variance + eps).rsqrt(), rtol=1e-6, atol=0)
        expected = wide.var((0, 2, 3)).float().double()  # infinite beyond float32
        torch.testing.assert_close(unbiased, expected, rtol=1e-6, atol=0)


def test_an_outlier_first() -> None:
    """A chunk's origin is no single element: one far from all others costs no accuracy."""
    x = _randn(4, 24, 20, 20)
    x[0, :, 0, 0] = 1e6
    _, invstd, _ = _stats(x)
    expected = (x.double().var((0, 2, 3), correction=0) + EPS).rsqrt()
    torch.testing.assert_close(invstd, expected, rtol=1e-6, atol=0)
