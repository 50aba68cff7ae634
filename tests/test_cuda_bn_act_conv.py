"""What a convolution's own statistics promise beyond the cases, and where they are worth more than a pass of their own."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch
from support import process

from cnnfast import dispatch, ops, settings
from cnnfast.backends import cuda
from cnnfast.ops.bn_act_conv import _apart, problem

bn_act_conv = sys.modules["cnnfast.ops.bn_act_conv"]  # the module: ops has the operator under its name

EPS = 1e-5
IMPLEMENTATIONS = [
    i
    for i in dispatch.implementations("bn_act_conv")
    if i.direction == "fprop" and i.backend == "cuda" and not process.INTERPRETED
]
KERNELS = [
    pytest.param(i, dtype, id=f"{i.name}-{name}", marks=process.marks(i))
    for i in IMPLEMENTATIONS
    for name, dtype in dispatch.TORCH_DTYPES.items()
    if name in i.dtypes
]
POINTWISE: tuple[Any, ...] = ((1, 1), (0, 0, 0, 0), (1, 1), 1)


def _run(
    implementation: dispatch.Implementation, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """y, and its mean, 1 / sqrt(variance + eps) and unbiased variance in float64, on the CPU."""
    given = (None if t is None else t.to(process.device(implementation), x.dtype) for t in (x, w, b))
    precision = "high" if implementation.name.endswith("tf32") else "fp32"
    rest = ("none", EPS, EPS, precision, implementation.name, True)
    y, *statistics = ops.bn_act_conv(*given, None, None, None, None, *POINTWISE, *rest)
    return y.cpu(), *(t.cpu().double() for t in statistics)


def _diagonal(values: torch.Tensor) -> torch.Tensor:
    return torch.diag(values).reshape(len(values), len(values), 1, 1)


def _hold(y: torch.Tensor, mean: torch.Tensor, invstd: torch.Tensor, unbiased: torch.Tensor) -> None:
    """Statistics as those of y in float64: sums of 64 values are float32's, their means told from the first."""
    wide = y.double()
    torch.testing.assert_close(mean, wide.mean((0, 2, 3)), rtol=2.0**-23, atol=float(wide.std()) * 1e-6)
    torch.testing.assert_close(unbiased, wide.var((0, 2, 3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(invstd, (wide.var((0, 2, 3), correction=0) + EPS).rsqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("implementation", "dtype"), KERNELS)
def test_a_constant_channel(implementation: dispatch.Implementation, dtype: torch.dtype) -> None:
    """With more tiles than are joined at once."""
    x, b = torch.randn(3, 8, 50, 41).to(dtype), torch.linspace(-3, 1e3, 16).to(dtype)
    y, mean, invstd, unbiased = _run(implementation, x, torch.zeros(16, 8, 1, 1), b)
    assert torch.equal(y, b.reshape(1, -1, 1, 1).expand_as(y))
    assert torch.equal(mean, b.double())
    assert torch.equal(unbiased, torch.zeros_like(unbiased))
    torch.testing.assert_close(invstd, torch.full_like(invstd, EPS**-0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("implementation", "dtype"), KERNELS)
def test_squares_beyond_float(implementation: dispatch.Implementation, dtype: torch.dtype) -> None:
    """Beside them channels that are ordinary and constant; as batch norm's kernel has the same y's."""
    if dtype == torch.float16:
        pytest.skip("has no such numbers")
    x = torch.randn(2, 8, 15, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[:, 2] = 1
    w = _diagonal(torch.tensor([1, 1e30, 1e30, 1e25, 1e-3, 1, 1, 1]))
    y, *statistics = _run(implementation, x, w)
    wide = y.double()
    _hold(y[:, :1], *(s[:1] for s in statistics))
    expected = (wide.var((0, 2, 3), correction=0) + EPS).rsqrt()
    torch.testing.assert_close(statistics[1], expected, rtol=1e-5, atol=0)
    assert statistics[0][2] == wide[0, 2, 0, 0]
    assert statistics[2][2] == 0


@pytest.mark.parametrize(("implementation", "dtype"), KERNELS)
def test_a_mean_far_from_zero(implementation: dispatch.Implementation, dtype: torch.dtype) -> None:
    """And, first of all, a value that isn't near it."""
    x = torch.randn(3, 16, 19, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, :, 0, 0] = 1e3
    far = 3e4 if dtype == torch.float32 else 300.0
    _hold(*_run(implementation, x, _diagonal(torch.ones(16)), torch.full((16,), far)))


@pytest.mark.skipif(not process.EMULATED, reason="tells the emulated GPU how many processors it has")
@pytest.mark.parametrize(("implementation", "dtype"), KERNELS)
def test_any_tile_gives_the_same_bits(implementation: dispatch.Implementation, dtype: torch.dtype) -> None:
    """As many processors as choose each tile; the values are conv2d's, bit by bit."""
    assert cuda.MODULE is not None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 32, 13, 31, generator=generator).to(dtype)
    for filters in (64, 136):
        w, b = (torch.randn(filters, *s, generator=generator) for s in ((32, 1, 1), ()))
        results = []
        for processors in (1, 3, 132):
            cuda.MODULE.configure(processors=processors)
            ops.bn_act_conv._runs.clear()
            results.append(_run(implementation, x, w, b))
        cuda.MODULE.configure()
        for others in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))
        conv = implementation.name.replace("bn_act_conv", "conv2d")
        precision = "high" if implementation.name.endswith("tf32") else "fp32"
        alone = ops.conv2d(x, w.to(dtype), b.to(dtype), *POINTWISE, precision, conv, True)
        assert torch.equal(results[0][0], alone)
        _hold(*results[0])


def _problem(variant: str, n: int, c: int, h: int, k: int, r: int, groups: int = 1) -> tuple[dispatch.Problem, bool]:
    """A convolution on an H100 that leaves the map as large as it was, and whether its parts one by one are faster there."""
    dtype = torch.float32 if variant else torch.bfloat16
    shapes = (n, c, h, h), (k, c // groups, r, r), (n, k, h, h)
    params = ((1, 1), (r // 2,) * 4, (1, 1), groups, "none", EPS, EPS, "fp32", "cuda")
    p = problem("fprop", *shapes, dtype, torch.device("cpu"), params, normed=False)
    p = dataclasses.replace(p, device="cpu" if process.EMULATED else "cuda", capability=(9, 0))
    (found,) = (i for i in IMPLEMENTATIONS if i.name == f"cuda.bn_act_conv_implicit_gemm{variant}")
    return p, _apart(p, shapes, dtype, torch.device("cpu"), params) < found.cost(p)


def _reasons(variant: str, *sizes: int) -> list[str]:
    (found,) = (i for i in IMPLEMENTATIONS if i.name == f"cuda.bn_act_conv_implicit_gemm{variant}")
    return dispatch.reasons_against(found, _problem(variant, *sizes)[0])


@pytest.mark.skipif(not IMPLEMENTATIONS, reason="no CUDA kernels on this machine")
@process.mark_of_this_process
def test_serves_where_it_saves_a_pass() -> None:
    """Where an H200 had it faster than conv2d and a pass over the result, among CUDA C++'s kernels; and where it hadn't."""
    for layer in ((256, 14, 256, 3), (512, 28, 128, 1), (1024, 14, 256, 1), (512, 7, 512, 3)):
        c, h, k, r = layer
        assert not _reasons("", 128, c, h, k, r), layer
        assert not _problem("", 128, c, h, k, r)[1], layer
    assert not _problem(".tf32x3", 32, 64, 56, 256, 1)[1]
    assert _problem("", 32, 128, 56, 128, 3, 8)[1], "grouped convolutions have better kernels"
    (few,) = _reasons("", 1, 512, 7, 512, 3)
    assert "cuts their depth" in few
    (stem,) = _reasons("", 32, 3, 56, 64, 3)
    assert "multiples of 8" in stem


@pytest.mark.skipif(not process.EMULATED, reason="needs a kernel of ours that isn't asked for by name")
@pytest.mark.emulated
def test_parts_serve_where_they_are_predicted_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the observer is told the reason; a kernel that is asked for by its name serves all the same."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, generator=generator).bfloat16() for s in ((2, 16, 9, 7), (24, 16, 1, 1)))
    x, w = (t.to(memory_format=torch.channels_last) for t in (x, w))

    def run(backend: str) -> tuple[list[str], tuple[torch.Tensor, ...]]:
        with settings.observe() as seen:
            results = ops.bn_act_conv(x, w, *(None,) * 5, *POINTWISE, "none", EPS, EPS, "fp32", backend, True)
        events = [e for e in seen if isinstance(e, dispatch.Event)]
        if not any(e.selection.problem.op == "bn_act_conv" for e in events):
            (unserved,) = (e for e in seen if isinstance(e, dispatch.Unserved))
            assert "one after the other at 0" in unserved.reason
        return [f"{e.selection.problem.op} {e.selection.problem.direction}" for e in events], results

    monkeypatch.setattr(bn_act_conv, "_apart", lambda *args: 1.0)
    served, fused = run("cuda")
    assert served == ["bn_act_conv fprop"]
    monkeypatch.setattr(bn_act_conv, "_apart", lambda *args: 0.0)
    served, apart = run("cuda")
    assert served == ["conv2d fprop", "batch_norm stats"]
    assert torch.equal(fused[0], apart[0])
    for a, b in zip(fused[1:], apart[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert run("cuda.bn_act_conv_implicit_gemm")[0] == ["bn_act_conv fprop"]
