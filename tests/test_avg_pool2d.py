"""avg_pool2d as torch has it: what is accepted and rejected, values, strides, gradients."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import process

import cnnfast
from cnnfast.functional import avg_pool2d

CL = torch.channels_last
X = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))

ACCEPTED: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "int": ((X, 2), {}),
    "pairs": ((X, (3, 2), (1, 2), (1, 0)), {}),
    "stride None": ((X, 2, None), {}),
    "stride ()": ((X, 2, ()), {}),
    "stride []": ((X, 2, []), {}),
    "one-element tuple": ((X, (2,)), {}),
    "ceil": ((X, 3, 2, 1), {"ceil_mode": True}),
    "ceil, last window in the padding": ((X, 2, 3, 1), {"ceil_mode": True}),
    "without padding's count": ((X, 3, 2, 1), {"count_include_pad": False}),
    "by position": ((X, 3, 2, 1, True, False, 4), {}),
    "divisor": ((X, 3, 2, 1), {"divisor_override": 7}),
    "negative divisor": ((X, 3, 2, 1), {"divisor_override": -2}),
    "divisor None": ((X, 3, 2, 1), {"divisor_override": None}),
    "unbatched": ((X[0], 2), {}),
    "empty batch": ((X[:0], 2), {}),
    "empty batch, channels_last": ((X.to(memory_format=CL)[:0], 2), {}),
    "integers": ((X.mul(10).long(), 2), {}),
    "half": ((X.half(), 2), {}),
    "bfloat16": ((X.bfloat16(), 2), {}),
}
REJECTED: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "padding over half": ((X, 3, 1, 2), {}),
    "stride 0": ((X, 2, 0), {}),
    "kernel 0": ((X, 0), {}),
    "kernel negative": ((X, -1), {}),
    "padding negative": ((X, 2, 2, -1), {}),
    "window larger than the map": ((X, 7), {}),
    "2-D": ((X[0, 0], 2), {}),
    "5-D": ((X[None], 2), {}),
    "no channels": ((X[:, :0], 2), {}),
    "no rows": ((X[:, :, :0], 2, 2, 1), {}),
    "three kernel sizes": ((X, (2, 2, 2)), {}),
    "float kernel": ((X, 2.0), {}),
    "integer ceil_mode": ((X, 2), {"ceil_mode": 1}),
    "integer count_include_pad": ((X, 2), {"count_include_pad": 1}),
    "divisor 0": ((X, 2), {"divisor_override": 0}),
    "float divisor": ((X, 2), {"divisor_override": 2.0}),
    "bool divisor": ((X, 2), {"divisor_override": True}),
    "string stride": ((X, 2, "a"), {}),
    "bool": ((X > 0, 2), {}),
    "uint8": ((X.to(torch.uint8), 2), {}),
    "complex": ((X.to(torch.complex64), 2), {}),
    "no tensor": (([1.0], 2), {}),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    args, kwargs = ACCEPTED[name]
    ours, torchs = avg_pool2d(*args, **kwargs), F.avg_pool2d(*args, **kwargs)
    torch.testing.assert_close(ours, torchs)
    assert (ours.dtype, ours.stride()) == (torchs.dtype, torchs.stride())


@pytest.mark.parametrize("name", REJECTED)
def test_rejected(name: str) -> None:
    args, kwargs = REJECTED[name]
    with pytest.raises((RuntimeError, TypeError, ValueError, IndexError)):
        F.avg_pool2d(*args, **kwargs)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        avg_pool2d(*args, **kwargs)


def test_the_error_says_all() -> None:
    with pytest.raises(ValueError, match=r"avg_pool2d: .*kernel_size // 2 = 1, not 2.*\(2, 4, 6, 5\)"):
        avg_pool2d(X, 3, 1, 2)


def test_integers_go_to_torch_and_strict_says_why() -> None:
    with cnnfast.strict(), pytest.raises(NotImplementedError, match=r"dtype torch\.int64"):
        avg_pool2d(X.long(), 2)


def test_the_gradient_operator_checks_its_arguments() -> None:
    """Called directly, it may not read beyond its operand either."""
    tail = ([2, 2], [2, 2], [0, 0], False, True, None, "auto", False)
    g = torch.randn(2, 4, 3, 2)
    for bad, size in ((g, [2, 4, 9, 5]), (g[:, :3], [2, 4, 6, 5]), (g[0], [2, 4, 6, 5]), (g, [2, 4, 6])):
        with pytest.raises(ValueError, match="avg_pool2d"):
            torch.ops.cnnfast.avg_pool2d_dgrad(bad, size, False, *tail)


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "sliced", "sliced nhwc", "expanded"])
def test_strides(layout: str) -> None:
    x = {
        "nchw": X,
        "nhwc": X.to(memory_format=CL),
        "sliced": torch.randn(2, 8, 6, 5)[:, ::2],
        "sliced nhwc": torch.randn(2, 8, 6, 5).to(memory_format=CL)[:, :4],
        "expanded": X[:1].expand(2, 4, 6, 5),
    }[layout]
    ours, torchs = x.detach().requires_grad_(), x.detach().requires_grad_()
    a, b = avg_pool2d(ours, 2), F.avg_pool2d(torchs, 2)
    assert a.stride() == b.stride()
    (ga,), (gb,) = torch.autograd.grad(a.sum(), ours), torch.autograd.grad(b.sum(), torchs)
    assert ga.stride() == gb.stride()
    torch.testing.assert_close(ga, gb)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [3, 40])
def test_exact_sums_give_torchs_quotients(dtype: torch.dtype, channels: int) -> None:
    """Integers add up exactly, so every quotient is the correctly rounded one, for every divisor."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-1000, 1000, (1, channels, 16, 15), generator=generator).to(dtype).to(memory_format=CL)
    for divisor in (None, 1, 3, 7, 10, 41, 49, 83, -9, 2**40 + 1):
        for kernel in ((1, 1), (3, 3), (2, 5), (7, 7)):
            assert torch.equal(
                avg_pool2d(x, kernel, 1, 0, divisor_override=divisor),
                F.avg_pool2d(x, kernel, 1, 0, divisor_override=divisor),
            ), (divisor, kernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_special_values(dtype: torch.dtype) -> None:
    """NaN and infinities come out where torch's do, with and without a vector full of channels, and at the edge of range."""
    special = torch.tensor([0.0, -0.0, 1.0, 2.0, -3.0, float("nan"), float("inf"), -float("inf")])
    generator = torch.Generator().manual_seed(1)
    for shape in ((2, 17, 9, 8), (1, 1, 12, 12), (1, 64, 5, 5)):
        x = special[torch.randint(8, shape, generator=generator)].to(dtype).to(memory_format=CL)
        torch.testing.assert_close(avg_pool2d(x, 2, 1, 1), F.avg_pool2d(x, 2, 1, 1), equal_nan=True)
        large = torch.full(shape, torch.finfo(dtype).max, dtype=dtype).to(memory_format=CL)
        ours, torchs = large.clone().requires_grad_(), large.clone().requires_grad_()
        a, b = avg_pool2d(ours, 3, 1, 1), F.avg_pool2d(torchs, 3, 1, 1)
        if dtype in (torch.float32, torch.float64):
            assert torch.equal(a, b)
        # a gradient at the edge of range is divided before it is added up
        g = torch.full_like(a, torch.finfo(dtype).max / 16)
        (ga,), (gb,) = torch.autograd.grad(a, ours, g), torch.autograd.grad(b, torchs, g)
        torch.testing.assert_close(ga, gb, **tolerance(dtype))


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """torch adds 16-bit gradients up in 16 bits, we don't."""
    return {} if dtype.itemsize > 2 else {"rtol": 0.02, "atol": 0.02}


def test_nothing_is_kept_for_backward() -> None:
    x = torch.randn(1, 8, 16, 16).requires_grad_()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        avg_pool2d(x, 2)
    assert saved == []


def test_module() -> None:
    args: tuple[Any, ...] = (3, 2, 1, True, False)
    ours, torchs = cnnfast.AvgPool2d(*args), torch.nn.AvgPool2d(*args)
    assert repr(ours) == repr(torchs)
    torch.testing.assert_close(ours(X), torchs(X))
    assert type(cnnfast.convert(torchs)) is cnnfast.AvgPool2d


def test_fuzz() -> None:
    """Random valid and invalid calls: the same acceptance, values, strides and gradients."""
    chance = random.Random(process.SEED)
    torch.manual_seed(process.SEED)
    accepted = 0
    for call in range(process.FUZZ_CALLS):
        shape = [chance.choice([0, 1, 2, 3]), chance.choice([1, 3, 8, 17]), chance.randint(1, 9), chance.randint(1, 9)]
        x = torch.randn(shape).to(chance.choice([torch.float32, torch.bfloat16, torch.float64, torch.float16]))
        x = x if chance.random() < 0.5 else x.to(memory_format=CL)
        x = x[..., ::2] if chance.random() < 0.2 else x

        def pair(low: int, high: int) -> Any:
            return chance.randint(low, high) if chance.random() < 0.5 else (chance.randint(low, high),) * 2

        args = (
            pair(1, 4), chance.choice([None, pair(0, 3)]), pair(0, 2), chance.random() < 0.4, chance.random() < 0.5,
            chance.choice([None, None, 3, -2]),
        )  # fmt: skip
        ours, torchs = x.detach().requires_grad_(), x.detach().requires_grad_()
        try:
            b = F.avg_pool2d(torchs, *args)
        except (RuntimeError, TypeError, ValueError):
            with pytest.raises((RuntimeError, TypeError, ValueError)):
                avg_pool2d(ours, *args)
            continue
        accepted += 1
        a = avg_pool2d(ours, *args)
        torch.testing.assert_close(a, b, msg=str((call, shape, args)))
        assert a.stride() == b.stride(), (call, shape, args, a.stride(), b.stride())
        (ga,), (gb,) = torch.autograd.grad(a.sum(), ours), torch.autograd.grad(b.sum(), torchs)
        torch.testing.assert_close(ga, gb, **tolerance(x.dtype), msg=str((call, shape, args)))
        assert ga.stride() == gb.stride(), (call, shape, args, ga.stride(), gb.stride())
    assert accepted > process.FUZZ_CALLS // 4
