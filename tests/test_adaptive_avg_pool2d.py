"""adaptive_avg_pool2d as torch has it: what is accepted and rejected, values, strides, gradients."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import process

import cnnfast
from cnnfast.functional import adaptive_avg_pool2d

CL = torch.channels_last
X = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))
LAST = X.to(memory_format=CL)

ACCEPTED: dict[str, tuple[torch.Tensor, Any]] = {
    "int": (X, 2),
    "pair": (X, (3, 2)),
    "list": (X, [3, 2]),
    "None and int": (X, (None, 3)),
    "int and None": (X, (3, None)),
    "None twice": (X, (None, None)),
    "more than there is": (X, (9, 11)),
    "unbatched": (X[0], 2),
    "unbatched, None": (X[0], (None, 2)),
    "unbatched to 1": (X[0], 1),
    "empty batch": (X[:0], 2),
    "empty batch, channels_last": (LAST[:0], 2),
    "empty batch to 1": (LAST[:0], 1),
    "to nothing": (X, 0),
    "to no rows": (X, (0, 2)),
    "to no columns, channels_last": (LAST, (2, 0)),
    "no channels": (X[:, :0], 2),
    "no channels to 1": (X[:, :0], 1),
    "no rows to 1": (X[:, :, :0], 1),
    "2-D to 1": (X[0, 0], 1),
    "5-D to 1": (X[None], 1),
    "complex to 1": (X.to(torch.complex64), 1),
    "half": (X.half(), 2),
    "bfloat16": (X.bfloat16(), 2),
}
REJECTED: dict[str, tuple[Any, Any]] = {
    "negative": (X, -1),
    "one of a pair negative": (X, (2, -1)),
    "one-element tuple": (X, (2,)),
    "three": (X, (2, 2, 2)),
    "float": (X, 2.0),
    "float in a pair": (X, (2.0, 2)),
    "bool": (X, True),
    "None": (X, None),
    "string": (X, "a"),
    "2-D": (X[0, 0], 2),
    "2-D, pair": (X[0, 0], (2, 2)),
    "2-D to a pair of 1": (X[0, 0], (1, 1)),
    "5-D": (X[None], 2),
    "no rows": (X[:, :, :0], 2),
    "integers": (X.long(), 2),
    "integers to 1": (X.long(), 1),
    "complex": (X.to(torch.complex64), 2),
    "no tensor": ([1.0], 2),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    x, size = ACCEPTED[name]
    ours, torchs = adaptive_avg_pool2d(x, size), F.adaptive_avg_pool2d(x, size)
    torch.testing.assert_close(ours, torchs, equal_nan=True)
    assert (ours.dtype, ours.stride()) == (torchs.dtype, torchs.stride())


@pytest.mark.parametrize("name", REJECTED)
def test_rejected(name: str) -> None:
    x, size = REJECTED[name]
    with pytest.raises((RuntimeError, TypeError, ValueError, AttributeError)):
        F.adaptive_avg_pool2d(x, size)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        adaptive_avg_pool2d(x, size)


def test_the_error_says_all() -> None:
    with pytest.raises(ValueError, match=r"adaptive_avg_pool2d: .*at least zero.*\(2, 4, 6, 5\).*\(-1, 2\)"):
        adaptive_avg_pool2d(X, (-1, 2))


def test_what_torch_serves_strict_names() -> None:
    for x, size, reason in ((X.cfloat(), 1, "dtype"), (X[None], 1, "the mean of an input"), (X[:, :0], 2, "channels")):
        with cnnfast.strict(), pytest.raises(NotImplementedError, match=reason):
            adaptive_avg_pool2d(x, size)


def test_a_gradient_of_nothing_is_an_error_as_in_torch() -> None:
    for function in (adaptive_avg_pool2d, F.adaptive_avg_pool2d):
        x = X.clone().requires_grad_()
        with pytest.raises(RuntimeError, match="empty"):
            function(x, (0, 2)).sum().backward()


def test_the_gradient_operator_checks_its_arguments() -> None:
    """Called directly, it may not read beyond its operand either."""
    g = torch.randn(2, 4, 3, 2)
    bad: tuple[tuple[Any, Any, Any], ...] = (
        (g, [2, 4, 6, 5], [3, 3]), (g[:, :3], [2, 4, 6, 5], [3, 2]), (g[0], [2, 4, 6, 5], [3, 2]),
        (g, [2, 4, 0, 5], [3, 2]), (g, [4, 6, 5], [3, 2]),
    )  # fmt: skip
    for gradient, size, output in bad:
        with pytest.raises(ValueError, match="adaptive_avg_pool2d"):
            torch.ops.cnnfast.adaptive_avg_pool2d_dgrad(gradient, size, False, output, "auto", False)


@pytest.mark.parametrize("size", [(3, 2), 1])
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "sliced", "sliced nhwc", "expanded"])
def test_strides(layout: str, size: Any) -> None:
    x = {
        "nchw": X,
        "nhwc": LAST,
        "sliced": torch.randn(2, 8, 6, 5)[:, ::2],
        "sliced nhwc": torch.randn(2, 8, 6, 5).to(memory_format=CL)[:, :4],
        "expanded": X[:1].expand(2, 4, 6, 5),
    }[layout]
    ours, torchs = x.detach().requires_grad_(), x.detach().requires_grad_()
    a, b = adaptive_avg_pool2d(ours, size), F.adaptive_avg_pool2d(torchs, size)
    assert a.stride() == b.stride()
    (ga,), (gb,) = torch.autograd.grad(a.sum(), ours), torch.autograd.grad(b.sum(), torchs)
    torch.testing.assert_close(ga, gb)
    if size == 1:  # torch spreads the gradient in NCHW, whatever the input was; ours lies as the input does
        assert ga.is_contiguous(memory_format=CL) == ("nhwc" in layout)
    else:
        assert ga.stride() == gb.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_special_values(dtype: torch.dtype) -> None:
    """NaN and infinities come out where torch's do."""
    special = torch.tensor([0.0, -0.0, 1.0, 2.0, -3.0, float("nan"), float("inf"), -float("inf")])
    generator = torch.Generator().manual_seed(1)
    for shape in ((2, 17, 9, 8), (1, 1, 12, 12), (1, 64, 5, 5)):
        x = special[torch.randint(8, shape, generator=generator)].to(dtype).to(memory_format=CL)
        for size in (4, 11):
            torch.testing.assert_close(adaptive_avg_pool2d(x, size), F.adaptive_avg_pool2d(x, size), equal_nan=True)


def test_gradients_in_half_precision_do_not_saturate() -> None:
    """Many small addends to one element: in fp16 their sum would stop at 2048."""
    x = torch.ones(1, 3, 1, 1, dtype=torch.float16).requires_grad_()
    y = adaptive_avg_pool2d(x, 80)
    (g,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(g, torch.full_like(x, 6400))


def test_nothing_is_kept_for_backward() -> None:
    x = torch.randn(1, 8, 16, 16).requires_grad_()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        adaptive_avg_pool2d(x, 2)
    assert saved == []


def test_module() -> None:
    for size in (1, (2, None)):
        ours, torchs = cnnfast.AdaptiveAvgPool2d(size), torch.nn.AdaptiveAvgPool2d(size)
        assert repr(ours) == repr(torchs)
        torch.testing.assert_close(ours(X), torchs(X))
        assert type(cnnfast.convert(torchs)) is cnnfast.AdaptiveAvgPool2d


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
        size = chance.choice(
            [chance.randint(0, 12), (chance.randint(-1, 9), chance.choice([None, chance.randint(1, 9)]))]
        )
        ours, torchs = x.detach().requires_grad_(), x.detach().requires_grad_()
        try:
            b = F.adaptive_avg_pool2d(torchs, size)
        except (RuntimeError, TypeError, ValueError):
            with pytest.raises((RuntimeError, TypeError, ValueError)):
                adaptive_avg_pool2d(ours, size)
            continue
        accepted += 1
        a = adaptive_avg_pool2d(ours, size)
        torch.testing.assert_close(a, b, msg=str((call, shape, size)))
        assert a.stride() == b.stride(), (call, shape, size, a.stride(), b.stride())
        if 0 in b.shape[1:]:
            continue
        (ga,), (gb,) = torch.autograd.grad(a.sum(), ours), torch.autograd.grad(b.sum(), torchs)
        loose = {} if x.dtype.itemsize > 2 else {"rtol": 0.05, "atol": 0.02}  # torch adds up in 16 bits, we don't
        torch.testing.assert_close(ga, gb, **loose, msg=str((call, shape, size)))
        if tuple(b.shape[2:]) != (1, 1):
            assert ga.stride() == gb.stride(), (call, shape, size, ga.stride(), gb.stride())
    assert accepted > process.FUZZ_CALLS // 4
