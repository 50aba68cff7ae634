"""functional.conv_transpose2d and ConvTranspose2d take, reject and give what torch's do."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from support import process
from support.verdict import check_convolution, outcome, same, with_gradients

import cnnfast
from cnnfast import functional

pytestmark = pytest.mark.skipif(
    process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it"
)

OURS, TORCHS = functional.conv_transpose2d, torch.nn.functional.conv_transpose2d
CL = torch.channels_last
X, W, B = torch.randn(2, 4, 5, 6), torch.randn(4, 3, 3, 3), torch.randn(3)

VALID: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "plain": ((X, W, B), {}),
    "channels_last": ((X.to(memory_format=CL), W, B), {"stride": 2}),
    "channels_last weight": ((X, W.to(memory_format=CL)), {"stride": 2}),
    "unbatched": ((X[0], W, B), {"padding": 1}),
    "grouped": ((X, W, torch.randn(6)), {"groups": 2}),
    "depthwise": ((X, torch.randn(4, 1, 3, 3)), {"groups": 4, "stride": 2}),
    "output padding below the stride": ((X, W), {"stride": (3, 2), "output_padding": (2, 1)}),
    "output padding below the dilation": ((X, W, B), {"dilation": 3, "output_padding": 2}),
    "output padding that takes cut rows back": ((X, W), {"dilation": 3, "output_padding": 2, "padding": 3}),
    "output padding beyond the padding": ((X, W), {"dilation": (3, 1), "output_padding": (2, 0), "padding": (1, 0)}),
    "stride beyond the kernel": ((X, W), {"stride": 5, "output_padding": 4}),
    "padding leaves one row": ((X, W), {"padding": (3, 0)}),
    "no rows, by torch": ((X[:, :, :1], torch.randn(4, 3, 2, 3)), {"padding": (1, 0)}),
    "batch 0": ((X[:0], W, B), {}),
    "sliced": ((torch.randn(2, 8, 5, 6)[:, ::2], W), {}),
    "expanded": ((torch.randn(1, 1, 1, 1).expand(2, 4, 5, 6), W), {"padding": 1}),
    "even kernel": ((X, torch.randn(4, 3, 4, 2)), {"stride": 2, "padding": 1}),
    "integers, by torch": ((X.long(), W.long()), {}),
}

INVALID: dict[str, tuple[tuple[Any, ...], dict[str, Any], tuple[str, ...]]] = {
    "2-D input": ((X[0, 0], W), {}, ("4-D", "(5, 6)")),
    "3-D weight": ((X, W[0]), {}, ("4-D weight", "(3, 3, 3)")),
    "channels differ": ((X, torch.randn(5, 3, 3, 3)), {}, ("5 input channels", "not 4")),
    "groups": ((X, W), {"groups": 3}, ("groups = 3",)),
    "groups 0": ((X, W), {"groups": 0}, ("groups",)),
    "bias": ((X, W, torch.randn(5)), {"groups": 2}, ("3 * 2 = 6", "(5,)")),
    "dtypes": ((X, W.double()), {}, ("dtype", "torch.float64")),
    "stride 0": ((X, W), {"stride": 0}, ("stride",)),
    "padding negative": ((X, W), {"padding": -1}, ("padding",)),
    "dilation 0": ((X, W), {"dilation": 0}, ("dilation",)),
    "output padding negative": ((X, W), {"output_padding": -1, "stride": 2}, ("output_padding",)),
    "output padding too large": ((X, W), {"output_padding": 1}, ("output padding must be smaller", "1 >= 1 and 1")),
    "an empty result": ((X, W), {"padding": 4}, ("(5 - 1)*1 - 2*4 + 1*(3 - 1) + 0 + 1 = -1",)),
    "an empty image": ((X[:, :, :0], W), {}, ("(2, 4, 0, 6)",)),
    "padding same": ((X, W), {"padding": "same"}, ("padding", "'same'")),
    "a list": (([1.0], W), {}, ("Tensor", "list")),
}


@pytest.mark.parametrize("name", VALID)
def test_accepts_what_torch_accepts(name: str) -> None:
    result = same(OURS, TORCHS, *VALID[name])
    assert isinstance(result, torch.Tensor), result


@pytest.mark.parametrize("name", INVALID)
def test_rejects_what_torch_rejects(name: str) -> None:
    args, kwargs, words = INVALID[name]
    error = same(OURS, TORCHS, args, kwargs)
    assert isinstance(error, Exception)
    assert str(error).startswith("conv_transpose2d: ")
    assert all(word in str(error) for word in words), error


def test_fuzz() -> None:
    """Random calls: torch's verdict, shape and strides, float64's values; of the gradients, too."""
    count, accepted = process.FUZZ_CALLS, 0
    for number in range(count):
        seed = process.SEED * count + number
        r, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        groups = r.choice([1, 1, 2, 3])
        c = groups * r.choice([1, 2, 5])
        x = torch.randn(r.choice([1, 2]), c, r.choice([1, 3, 6]), r.choice([1, 4, 7]), generator=generator)
        w = torch.randn(c, r.choice([1, 2, 4]), r.choice([1, 2, 3]), r.choice([1, 3, 5]), generator=generator)
        b = torch.randn(w.shape[1] * groups, generator=generator) if r.random() < 0.5 else None
        x = x.to(memory_format=CL) if r.random() < 0.3 else x
        stride, padding, dilation, extra = (
            (r.choice(options), r.choice(options)) for options in ([1, 2, 3], [0, 0, 1, 2], [1, 1, 2, 3], [0, 0, 1, 2])
        )
        kwargs = {
            "stride": stride, "padding": padding, "dilation": dilation, "output_padding": extra, "groups": groups,
        }  # fmt: skip

        def g(y: torch.Tensor, seed: int = seed) -> torch.Tensor:
            return torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))

        ours, theirs = (with_gradients(f, (x, w, b), kwargs, g) for f in (OURS, TORCHS))
        call = f"call {number} of CNNFAST_TEST_SEED={process.SEED}: {tuple(x.shape)} {tuple(w.shape)} {kwargs}"
        if isinstance(theirs, Exception):
            assert isinstance(ours, (ValueError, RuntimeError)), f"{call}: torch rejects ({theirs}), cnnfast: {ours!r}"
            continue
        assert not isinstance(ours, Exception), f"{call}: torch accepts, cnnfast raises {ours!r}"
        accepted += 1
        for i, (a, e) in enumerate(zip(ours, theirs, strict=True)):
            # torch computes some grouped ones group by group and concatenates them in the layout that cat() finds
            assert i or groups > 1 or a.stride() == e.stride(), call
        check_convolution(call, TORCHS, ours, (x, w, b), kwargs, g(ours[0]))
    assert accepted > count // 4


@pytest.mark.parametrize("output_size", [None, (11, 13), [2, 3, 12, 14]])
def test_module(output_size: Any) -> None:
    theirs = torch.nn.ConvTranspose2d(4, 3, 3, stride=2)
    ours = cnnfast.ConvTranspose2d(4, 3, 3, stride=2)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(X, output_size), theirs(X, output_size))
    converted = cnnfast.convert(torch.nn.Sequential(theirs))
    assert type(converted[0]) is cnnfast.ConvTranspose2d
    torch.testing.assert_close(converted(X), theirs(X))
    with cnnfast.strict():
        ours(X)
    assert str(outcome(ours, (X, (20, 20)), {})) == str(outcome(theirs, (X, (20, 20)), {}))


def test_second_derivatives_with_output_padding() -> None:
    """torch 2.14's own third derivative fails here."""
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, 2, 3, 2), (2, 2, 3, 2), (2,))]

    def function(*t: torch.Tensor) -> torch.Tensor:
        return OURS(*t, stride=(2, 3), padding=(1, 0), output_padding=(1, 2))

    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, tensors)
