"""adaptive_max_pool2d as torch has it: what is accepted and rejected, values and indices bit for bit, gradients."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import process
from support.memory import guarded_allocations

import cnnfast
from cnnfast import dispatch, settings
from cnnfast.backends import cpu
from cnnfast.functional import adaptive_max_pool2d

CL = torch.channels_last
RECORDS = dispatch.has_kernel("adaptive_max_pool2d", "f32", "cpu", settings.AUTO, "taps")
X = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))
LAST = X.to(memory_format=CL)

ACCEPTED: dict[str, tuple[torch.Tensor, Any]] = {
    "int": (X, 2),
    "pair": (X, (3, 2)),
    "list": (X, [3, 2]),
    "None and int": (X, (None, 3)),
    "None twice": (X, (None, None)),
    "more than there is": (X, (9, 11)),
    "unbatched": (X[0], 2),
    "unbatched, None": (X[0], (None, 2)),
    "empty batch": (X[:0], 2),
    "empty batch, channels_last": (LAST[:0], 2),
    "to nothing": (X, 0),
    "to no rows": (X, (0, 2)),
    "to no columns, channels_last": (LAST, (2, 0)),
    "half": (X.half(), 2),
    "bfloat16": (X.bfloat16(), 2),
}
REJECTED: dict[str, tuple[Any, Any]] = {
    "negative": (X, -1),
    "one of a pair negative": (X, (2, -1)),
    "one-element tuple": (X, (2,)),
    "three": (X, (2, 2, 2)),
    "float": (X, 2.0),
    "bool": (X, True),
    "None": (X, None),
    "string": (X, "a"),
    "2-D": (X[0, 0], 2),
    "2-D, to 1": (X[0, 0], 1),
    "5-D": (X[None], 2),
    "no channels": (X[:, :0], 2),
    "no rows": (X[:, :, :0], 2),
    "integers": (X.long(), 2),
    "complex": (X.to(torch.complex64), 2),
    "no tensor": ([1.0], 2),
}


@pytest.mark.parametrize("indices", [False, True])
@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str, indices: bool) -> None:
    x, size = ACCEPTED[name]
    ours, torchs = adaptive_max_pool2d(x, size, indices), F.adaptive_max_pool2d(x, size, indices)
    for a, b in zip(ours if indices else (ours,), torchs if indices else (torchs,), strict=True):
        assert torch.equal(a, b)
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())


@pytest.mark.parametrize("name", REJECTED)
def test_rejected(name: str) -> None:
    x, size = REJECTED[name]
    with pytest.raises((RuntimeError, TypeError, ValueError, AttributeError)):
        F.adaptive_max_pool2d(x, size)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        adaptive_max_pool2d(x, size)


def test_the_error_says_all() -> None:
    with pytest.raises(ValueError, match=r"adaptive_max_pool2d: .*at least zero.*\(2, 4, 6, 5\).*\(-1, 2\)"):
        adaptive_max_pool2d(X, (-1, 2))


def test_a_gradient_of_nothing_is_an_error_as_in_torch() -> None:
    for function in (adaptive_max_pool2d, F.adaptive_max_pool2d):
        x = X.clone().requires_grad_()
        with pytest.raises(RuntimeError, match="empty"):
            function(x, (0, 2)).sum().backward()


def test_the_gradient_operators_check_their_arguments() -> None:
    """Called directly, they may not read beyond their operands either."""
    ops, tail = torch.ops.cnnfast, ([3, 2], "auto", False)
    g, k = torch.randn(2, 4, 3, 2), torch.zeros(2, 4, 3, 2, dtype=torch.uint8)
    for call in (
        lambda: ops.adaptive_max_pool2d_dgrad(X, g[:, :3], None, *tail),
        lambda: ops.adaptive_max_pool2d_dgrad(X, g[:1], None, *tail),
        lambda: ops.adaptive_max_pool2d_dgrad(X, g.double(), None, *tail),
        lambda: ops.adaptive_max_pool2d_dgrad(X[0], g, None, *tail),
        lambda: ops.adaptive_max_pool2d_dgrad(X, g, k[:, :3], *tail),
        lambda: ops.adaptive_max_pool2d_dgrad(X, g, k[:1], *tail),
        lambda: ops.adaptive_max_pool2d_dgrad(X, g, k.long(), *tail),
        lambda: ops.adaptive_max_pool2d_jvp(X, g, *tail),
    ):
        with pytest.raises((ValueError, TypeError), match="adaptive_max_pool2d"):
            call()


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "sliced", "sliced nhwc", "expanded"])
def test_strides(layout: str) -> None:
    x = {
        "nchw": X,
        "nhwc": LAST,
        "sliced": torch.randn(2, 8, 6, 5)[:, ::2],
        "sliced nhwc": torch.randn(2, 8, 6, 5).to(memory_format=CL)[:, :4],
        "expanded": X[:1].expand(2, 4, 6, 5),
    }[layout]
    for size in (1, (3, 2), 8):
        ours, torchs = x.detach().requires_grad_(), x.detach().requires_grad_()
        a, b = adaptive_max_pool2d(ours, size), F.adaptive_max_pool2d(torchs, size)
        assert a.stride() == b.stride()
        (ga,), (gb,) = torch.autograd.grad(a.sum(), ours), torch.autograd.grad(b.sum(), torchs)
        assert ga.stride() == gb.stride()
        torch.testing.assert_close(ga, gb)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_special_values(dtype: torch.dtype) -> None:
    """NaN (the last of a window wins), infinities, signed zeros: values and indices are torch's."""
    special = torch.tensor([0.0, -0.0, 1.0, float("nan"), float("inf"), -float("inf"), 2.0])
    generator = torch.Generator().manual_seed(1)
    for shape in ((2, 17, 9, 8), (1, 1, 12, 12), (1, 64, 5, 5)):
        x = special[torch.randint(7, shape, generator=generator)].to(dtype)
        for format in (CL, torch.contiguous_format):
            t = x.contiguous(memory_format=format)
            for size in (1, 4, 11):
                (a, i), (b, j) = adaptive_max_pool2d(t, size, True), F.adaptive_max_pool2d(t, size, True)
                assert torch.equal(i, j)
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
                assert torch.equal(torch.signbit(a[~a.isnan()]), torch.signbit(b[~b.isnan()]))


def test_gradients_in_half_precision_do_not_saturate() -> None:
    """Many small addends to one element: in fp16 their sum would stop at 2048."""
    x = torch.ones(1, 3, 1, 1, dtype=torch.float16).requires_grad_()
    y = adaptive_max_pool2d(x, 80)
    (g,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(g, torch.full_like(x, 6400))


def test_gradient_through_the_indices_call() -> None:
    x = X.clone().requires_grad_()
    y, i = adaptive_max_pool2d(x, (4, 3), return_indices=True)
    assert not i.requires_grad
    z, _ = F.adaptive_max_pool2d(x, (4, 3), return_indices=True)
    torch.testing.assert_close(torch.autograd.grad(y.sin().sum(), x), torch.autograd.grad(z.sin().sum(), x))


def test_one_byte_an_output_is_kept() -> None:
    """Training keeps x, and on the CPU which tap is the maximum: no index tensor, and nothing where nobody trains."""
    x = torch.randn(1, 8, 16, 16)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        adaptive_max_pool2d(x, 2)
        assert not saved
        x.requires_grad_()
        y = adaptive_max_pool2d(x, 2)
    assert saved.pop(0).data_ptr() == x.data_ptr()
    assert [(k.shape, k.dtype) for k in saved] == [(y.shape, torch.uint8)] * RECORDS


@pytest.mark.skipif(not RECORDS, reason="no backend here notes the taps")
def test_windows_of_many_taps_are_searched_again() -> None:
    """A byte numbers 255 taps: beyond them x is all that is kept."""
    x = torch.randn(1, 3, 40, 40).to(memory_format=CL).requires_grad_()
    for args, kept in (((2,), 1), ((3,), 2)):
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value] # noqa: B023
            y = adaptive_max_pool2d(x, *args)
        assert len(saved) == kept, args
        g = torch.randint(1, 4, y.shape).float()
        assert torch.equal(
            *(torch.autograd.grad(f(x, *args), x, g)[0] for f in (adaptive_max_pool2d, F.adaptive_max_pool2d))
        ), args


@pytest.mark.skipif(not RECORDS, reason="no backend here notes the taps")
@pytest.mark.parametrize("isa", cpu.isas())
def test_taps_from_anywhere_write_nothing_beside_the_gradient(isa: str) -> None:
    """Whatever the bytes say: a tap outside of the image is none."""
    generator = torch.Generator().manual_seed(0)
    for shape, size in (
        ((2, 40, 9, 8), (4, 3)),
        ((1, 20, 13, 13), (1, 2)),
        ((1, 3, 2, 3), (5, 7)),
        ((1, 35, 28, 28), (7, 7)),
    ):
        x = torch.randn(shape).to(memory_format=CL)
        y = F.adaptive_max_pool2d(x, size).fill_(1)
        k = torch.randint(256, y.shape, generator=generator, dtype=torch.uint8)
        with guarded_allocations() as allocations:
            t = torch.ops.cnnfast.adaptive_max_pool2d_dgrad(x, y, k, size, f"cpu.adaptive_max_pool2d.{isa}", True)
        allocations.check(f"{shape} {size}")
        assert bool((t >= 0).all())
        assert t.sum() <= y.numel()


def test_module() -> None:
    for size in (1, (2, None)):
        ours, torchs = cnnfast.AdaptiveMaxPool2d(size), torch.nn.AdaptiveMaxPool2d(size)
        assert repr(ours) == repr(torchs)
        assert torch.equal(ours(X), torchs(X))
        assert type(cnnfast.convert(torchs)) is cnnfast.AdaptiveMaxPool2d
    pair = cnnfast.AdaptiveMaxPool2d(2, return_indices=True)(X)
    assert torch.equal(pair[1], torch.nn.AdaptiveMaxPool2d(2, return_indices=True)(X)[1])


def test_fuzz() -> None:
    """Random valid and invalid calls: the same acceptance, values, indices, strides and gradients."""
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
            expected = F.adaptive_max_pool2d(torchs, size, return_indices=True)
        except (RuntimeError, TypeError, ValueError):
            with pytest.raises((RuntimeError, TypeError, ValueError)):
                adaptive_max_pool2d(ours, size, return_indices=True)
            continue
        accepted += 1
        results = adaptive_max_pool2d(ours, size, return_indices=True)
        for a, b in zip(results, expected, strict=True):
            assert torch.equal(a, b), (call, shape, size)
            assert a.stride() == b.stride(), (call, shape, size, a.stride(), b.stride())
        if 0 in shape or 0 in results[0].shape:
            continue
        ga, gb = torch.autograd.grad(results[0].sum(), ours)[0], torch.autograd.grad(expected[0].sum(), torchs)[0]
        torch.testing.assert_close(ga, gb, msg=str((call, shape, size)))
        assert ga.stride() == gb.stride(), (call, shape, size, ga.stride(), gb.stride())
    assert accepted > process.FUZZ_CALLS // 4
