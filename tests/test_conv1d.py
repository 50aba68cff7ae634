"""functional.conv1d and Conv1d take, reject and give what torch's do."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from support import process
from support.verdict import check_convolution, same, with_gradients

import cnnfast
from cnnfast import functional

pytestmark = pytest.mark.skipif(
    process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it"
)

OURS, TORCHS = functional.conv1d, torch.nn.functional.conv1d
X, W, B = torch.randn(2, 4, 9), torch.randn(6, 4, 3), torch.randn(6)

VALID: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "plain": ((X, W, B), {}),
    "unbatched": ((X[0], W, B), {"padding": 1}),
    "sequences of one": ((X, W), {"stride": [2], "padding": (1,), "dilation": torch.Size([2])}),
    "same, even kernel": ((X, torch.randn(6, 4, 2)), {"padding": "same"}),
    "valid": ((X, W), {"padding": "valid", "stride": 2}),
    "grouped": ((X, torch.randn(6, 2, 3)), {"groups": 2}),
    "depthwise": ((X, torch.randn(8, 1, 3)), {"groups": 4}),
    "batch 0": ((X[:0], W, B), {}),
    "length 1": ((X[..., :1], torch.randn(6, 4, 1)), {}),
    "channels side by side": ((torch.randn(2, 9, 4).transpose(1, 2), W), {}),
    "channels side by side, unbatched": ((torch.randn(9, 4).t(), W), {}),
    "weight's channels side by side": ((X, torch.randn(6, 3, 4).transpose(1, 2)), {}),
    "every second element": ((torch.randn(2, 4, 18)[..., ::2], W), {}),
    "expanded": ((torch.randn(1, 1, 9).expand(2, 4, 9), W), {}),
    "one channel": ((X[:, :1], torch.randn(6, 1, 3)), {}),
    "integers, by torch": ((X.long(), W.long()), {}),
    "meta": ((X.to("meta"), W.to("meta")), {"stride": 2}),
}

INVALID: dict[str, tuple[tuple[Any, ...], dict[str, Any], tuple[str, ...]]] = {
    "4-D input": ((X[None], W), {}, ("3-D", "(1, 2, 4, 9)")),
    "1-D input": ((X[0, 0], W), {}, ("3-D", "(9,)")),
    "2-D weight": ((X, W[0]), {}, ("3-D weight", "(4, 3)")),
    "channels differ": ((X, torch.randn(6, 5, 3)), {}, ("5 * 1 = 5", "not 4")),
    "stride of two": ((X, W), {"stride": (1, 2)}, ("sequence of 1", "(1, 2)")),
    "stride 0": ((X, W), {"stride": 0}, ("stride", "(0,)")),
    "padding negative": ((X, W), {"padding": -1}, ("padding",)),
    "kernel too long": ((X, torch.randn(6, 4, 10)), {}, ("length 9 + 0 + 0 = 9 < 1 * (10 - 1) + 1 = 10",)),
    "empty signal": ((X[..., :0], W), {}, ("(2, 4, 0)",)),
    "same with stride": ((X, W), {"padding": "same", "stride": 2}, ("same",)),
    "bias": ((X, W, torch.randn(5)), {}, ("bias", "(5,)")),
    "dtypes": ((X, W.double()), {}, ("dtype", "torch.float64")),
    "groups": ((X, W), {"groups": 3}, ("groups",)),
    "a list": (([1.0], W), {}, ("Tensor", "list")),
}


@pytest.mark.parametrize("name", VALID)
def test_accepts_what_torch_accepts(name: str) -> None:
    args, kwargs = VALID[name]
    if name == "meta":
        ours, theirs = OURS(*args, **kwargs), TORCHS(*args, **kwargs)
        assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
        return
    result = same(OURS, TORCHS, args, kwargs)
    assert isinstance(result, torch.Tensor), result


@pytest.mark.parametrize("name", INVALID)
def test_rejects_what_torch_rejects(name: str) -> None:
    args, kwargs, words = INVALID[name]
    error = same(OURS, TORCHS, args, kwargs)
    assert isinstance(error, Exception)
    assert str(error).startswith("conv1d: ")
    assert all(word in str(error) for word in words), error


def test_fuzz() -> None:
    """Random calls: torch's verdict, shape and strides, float64's values; of the gradients, too."""
    count, accepted = process.FUZZ_CALLS, 0
    for number in range(count):
        seed = process.SEED * count + number
        r, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        groups = r.choice([1, 1, 2, 3])
        x = torch.randn(r.choice([1, 2, 3]), groups * r.choice([1, 2, 5]), r.choice([1, 4, 9, 16]), generator=generator)
        w = torch.randn(groups * r.choice([1, 2, 4]), x.shape[1] // groups, r.choice([1, 2, 3, 5]), generator=generator)
        b = torch.randn(len(w), generator=generator) if r.random() < 0.5 else None
        x = x[0] if r.random() < 0.2 else x
        kwargs = {
            "stride": r.choice([1, 2, 3, 20]), "padding": r.choice([0, 1, 4, "same", "valid", -1]),
            "dilation": r.choice([1, 2, 3, 0]), "groups": groups,
        }  # fmt: skip

        def g(y: torch.Tensor, seed: int = seed) -> torch.Tensor:
            return torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))

        ours, theirs = (with_gradients(f, (x, w, b), kwargs, g) for f in (OURS, TORCHS))
        call = f"call {number} of CNNFAST_TEST_SEED={process.SEED}: {tuple(x.shape)} {tuple(w.shape)} {kwargs}"
        if isinstance(theirs, Exception):
            assert isinstance(ours, ValueError), f"{call}: torch rejects ({theirs}), cnnfast: {ours!r}"
            continue
        assert not isinstance(ours, Exception), f"{call}: torch accepts, cnnfast raises {ours!r}"
        accepted += 1
        for a, e in zip(ours, theirs, strict=True):
            # torch's "same" with an even kernel is a slice: only strides that are ever used count
            assert all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), e.stride(), strict=True)), call
        check_convolution(call, TORCHS, ours, (x, w, b), kwargs, g(ours[0]))
    assert accepted > count // 4


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_module(mode: str) -> None:
    theirs = torch.nn.Conv1d(4, 6, 3, stride=2, padding=1, padding_mode=mode)
    ours = cnnfast.Conv1d(4, 6, 3, stride=2, padding=1, padding_mode=mode)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(X), theirs(X))
    converted = cnnfast.convert(torch.nn.Sequential(theirs))
    assert type(converted[0]) is cnnfast.Conv1d
    torch.testing.assert_close(converted(X), theirs(X))
    with cnnfast.strict():
        ours(X)
