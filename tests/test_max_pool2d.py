"""max_pool2d as torch has it: what is accepted and rejected, values and indices bit for bit, strides, gradients."""

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
from cnnfast.functional import max_pool2d

CL = torch.channels_last
RECORDS = dispatch.has_kernel("max_pool2d", "f32", "cpu", settings.AUTO, "taps")
X = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))

ACCEPTED: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "int": ((X, 2), {}),
    "pairs": ((X, (3, 2), (1, 2), (1, 0), (1, 2)), {}),
    "stride None": ((X, 2, None), {}),
    "stride ()": ((X, 2, ()), {}),
    "stride []": ((X, 2, []), {}),
    "one-element tuple": ((X, (2,)), {}),
    "ceil": ((X, 3, 2, 1), {"ceil_mode": True}),
    "ceil, last window in the padding": ((X, 2, 3, 1), {"ceil_mode": True}),
    "unbatched": ((X[0], 2), {}),
    "empty batch": ((X[:0], 2), {}),
    "dilation": ((X, 2, 1, 1, 3), {}),
    "integers": ((X.mul(10).long(), 2), {}),
    "uint8": ((X.abs().mul(10).to(torch.uint8), 2), {}),
    "half": ((X.half(), 2), {}),
    "bfloat16": ((X.bfloat16(), 2), {}),
}
REJECTED: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "padding over half": ((X, 3, 1, 2), {}),
    "padding over half of an undilated kernel": ((X, 2, 1, 2, 3), {}),
    "stride 0": ((X, 2, 0), {}),
    "kernel 0": ((X, 0), {}),
    "kernel negative": ((X, -1), {}),
    "padding negative": ((X, 2, 2, -1), {}),
    "dilation 0": ((X, 2, 2, 0, 0), {}),
    "window larger than the map": ((X, 7), {}),
    "2-D": ((X[0, 0], 2), {}),
    "5-D": ((X[None], 2), {}),
    "no channels": ((X[:, :0], 2), {}),
    "no rows": ((X[:, :, :0], 2, 2, 1), {}),
    "three kernel sizes": ((X, (2, 2, 2)), {}),
    "float kernel": ((X, 2.0), {}),
    "integer ceil_mode": ((X, 2), {"ceil_mode": 1}),
    "string stride": ((X, 2, "a"), {}),
    "bool": ((X > 0, 2), {}),
    "complex": ((X.to(torch.complex64), 2), {}),
    "no tensor": (([1.0], 2), {}),
}


@pytest.mark.parametrize("indices", [False, True])
@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str, indices: bool) -> None:
    args, kwargs = ACCEPTED[name]
    ours = max_pool2d(*args, **kwargs, return_indices=indices)
    torchs = F.max_pool2d(*args, **kwargs, return_indices=indices)
    for a, b in zip(ours if indices else (ours,), torchs if indices else (torchs,), strict=True):
        assert torch.equal(a, b)
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())


@pytest.mark.parametrize("name", REJECTED)
def test_rejected(name: str) -> None:
    args, kwargs = REJECTED[name]
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        F.max_pool2d(*args, **kwargs)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        max_pool2d(*args, **kwargs)


def test_the_error_says_all() -> None:
    with pytest.raises(ValueError, match=r"max_pool2d: .*kernel_size // 2 = 1, not 2.*\(2, 4, 6, 5\)"):
        max_pool2d(X, 3, 1, 2)


def test_integers_go_to_torch_and_strict_says_why() -> None:
    with cnnfast.strict(), pytest.raises(NotImplementedError, match=r"dtype torch\.int64"):
        max_pool2d(X.long(), 2)


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
    a, b = max_pool2d(ours, 2), F.max_pool2d(torchs, 2)
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
            (a, i), (b, j) = max_pool2d(t, 3, 2, 1, return_indices=True), F.max_pool2d(t, 3, 2, 1, return_indices=True)
            assert torch.equal(i, j)
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(torch.signbit(a[~a.isnan()]), torch.signbit(b[~b.isnan()]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_gradients_go_to_the_element_that_torch_chooses(dtype: torch.dtype) -> None:
    """Among equal elements, signed zeros, NaNs and infinities, whichever way a window is searched."""
    special = torch.tensor([0.0, -0.0, 1.0, float("nan"), -float("inf"), 1.0])
    generator = torch.Generator().manual_seed(1)
    for shape in ((2, 3, 14, 13), (1, 1, 12, 12), (1, 40, 13, 12), (1, 17, 9, 9)):
        x = special[torch.randint(6, shape, generator=generator)].to(dtype).to(memory_format=CL)
        for args in ((3, 2, 1), (9, 1, 4), (2, 1, 1, 2), (8, 1, 4, 2), (5, 3, 2)):
            if max(args[0] - 2, 1) * (args[3] if len(args) > 3 else 1) > shape[3]:
                continue
            ours, torchs = x.clone().requires_grad_(), x.clone().requires_grad_()
            a, b = max_pool2d(ours, *args), F.max_pool2d(torchs, *args)
            g = torch.randint(1, 4, a.shape, generator=generator).to(dtype)  # whose sums are exact
            assert torch.equal(torch.autograd.grad(a, ours, g)[0], torch.autograd.grad(b, torchs, g)[0]), (shape, args)


def test_windows_without_elements() -> None:
    """Dilation can leave a window nothing but padding: -inf, as in torch, and no gradient for anybody."""
    x = torch.ones(1, 3, 2, 2).requires_grad_()
    y = max_pool2d(x, 2, 1, 1, 3)
    assert torch.equal(y, F.max_pool2d(x, 2, 1, 1, 3))
    assert bool(y.isneginf().all())
    (g,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(g, torch.zeros_like(x))


def test_one_byte_an_output_is_kept() -> None:
    """Training keeps x, and on the CPU which tap is the maximum: no index tensor, and nothing where nobody trains."""
    x = torch.randn(1, 8, 16, 16)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        max_pool2d(x, 2)
        assert not saved
        x.requires_grad_()
        y = max_pool2d(x, 2)
    assert saved.pop(0).data_ptr() == x.data_ptr()
    assert [(k.shape, k.dtype) for k in saved] == [(y.shape, torch.uint8)] * RECORDS


@pytest.mark.skipif(not RECORDS, reason="no backend here notes the taps")
def test_windows_of_many_taps_are_searched_again() -> None:
    """A byte numbers 255 taps: beyond them x is all that is kept."""
    x = torch.randn(1, 3, 40, 40).to(memory_format=CL).requires_grad_()
    for args, kept in (((17, 3, 8), 1), ((15, 3, 7), 2), ((16, 3, 8), 1), ((5, 3, 0, 2), 2)):
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value] # noqa: B023
            y = max_pool2d(x, *args)
        assert len(saved) == kept, args
        g = torch.randint(1, 4, y.shape).float()
        assert torch.equal(*(torch.autograd.grad(f(x, *args), x, g)[0] for f in (max_pool2d, F.max_pool2d))), args


@pytest.mark.skipif(not RECORDS, reason="no backend here notes the taps")
@pytest.mark.parametrize("isa", cpu.isas())
def test_taps_from_anywhere_write_nothing_beside_the_gradient(isa: str) -> None:
    """Whatever the bytes say: a tap outside of the image is none."""
    generator = torch.Generator().manual_seed(0)
    for shape, args in (
        ((2, 40, 9, 8), (3, 2, 1, 1)),
        ((1, 20, 13, 13), (9, 1, 4, 1)),
        ((1, 3, 9, 9), (4, 1, 2, 2)),
        ((1, 35, 7, 9), (2, 2, 0, 1)),
    ):
        x = torch.randn(shape).to(memory_format=CL)
        (kernel, stride, padding, dilation) = ((n, n) for n in args)
        y = F.max_pool2d(x, *args).fill_(1)
        k = torch.randint(256, y.shape, generator=generator, dtype=torch.uint8)
        with guarded_allocations() as allocations:
            t = torch.ops.cnnfast.max_pool2d_dgrad(
                x, y, k, kernel, stride, padding, dilation, False, f"cpu.max_pool2d.{isa}", True
            )
        allocations.check(f"{shape} {args}")
        assert bool((t >= 0).all())
        assert t.sum() <= y.numel()


def test_unpool_takes_the_indices() -> None:
    y, i = max_pool2d(X, 2, return_indices=True)
    b, j = F.max_pool2d(X, 2, return_indices=True)
    size = list(X.shape)
    assert torch.equal(F.max_unpool2d(y, i, 2, output_size=size), F.max_unpool2d(b, j, 2, output_size=size))


def test_module() -> None:
    ours, torchs = cnnfast.MaxPool2d(3, 2, 1, ceil_mode=True), torch.nn.MaxPool2d(3, 2, 1, ceil_mode=True)
    assert repr(ours) == repr(torchs)
    assert torch.equal(ours(X), torchs(X))
    pair = cnnfast.MaxPool2d(2, return_indices=True)(X)
    assert torch.equal(pair[1], torch.nn.MaxPool2d(2, return_indices=True)(X)[1])


def test_fuzz() -> None:
    """Random valid and invalid calls: the same acceptance, values, indices and strides."""
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

        args = (pair(1, 4), chance.choice([None, pair(0, 3)]), pair(0, 2), pair(1, 2), chance.random() < 0.4)
        try:
            expected = F.max_pool2d(x, *args, return_indices=True)
        except (RuntimeError, TypeError, ValueError):
            with pytest.raises((RuntimeError, TypeError, ValueError)):
                max_pool2d(x, *args, return_indices=True)
            continue
        accepted += 1
        for a, b in zip(max_pool2d(x, *args, return_indices=True), expected, strict=True):
            assert torch.equal(a, b), (call, shape, args)
            assert a.stride() == b.stride(), (call, shape, args, a.stride(), b.stride())
    assert accepted > process.FUZZ_CALLS // 4
