"""functional.conv2d takes, rejects and gives what torch's takes, rejects and gives."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from cases.conv2d import CASES, Case
from cases.conv2d import inputs as case_inputs
from support import process
from support.verdict import outcome, same

import cnnfast
from cnnfast import functional, settings

pytestmark = pytest.mark.skipif(
    process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it"
)

OURS, TORCHS = functional.conv2d, torch.nn.functional.conv2d
X, W, B = torch.randn(2, 4, 7, 6), torch.randn(6, 4, 3, 3), torch.randn(6)
IMAGE = torch.randn(4, 7, 6)


def _same(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return same(OURS, TORCHS, args, kwargs)


# ---- what torch accepts ----------------------------------------------------------------------------------------------

VALID: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "defaults": ((X, W), {}),
    "bias": ((X, W, B), {}),
    "all by position": ((X, W, B, 2, 1, 2, 1), {}),
    "all by name": ((), {"input": X, "weight": W, "bias": B, "stride": 2, "padding": 1, "dilation": 1, "groups": 1}),
    "pairs": ((X, W, B, (2, 1), (0, 1), (1, 2)), {}),
    "lists": ((X, W, None, [2, 1], [0, 1], [1, 2]), {}),
    "sequences of one": ((X, W, None, [2], (1,), [1]), {}),
    "torch.Size": ((X, W), {"stride": torch.Size([2, 1]), "padding": torch.Size([1, 0])}),
    "numpy integers": ((X, W), {"stride": np.int64(2), "padding": (np.int32(1), np.int64(0))}),
    "integer tensors in a pair": ((X, W), {"stride": (torch.tensor(2), torch.tensor(1))}),
    "unbatched": ((IMAGE, W, B), {"padding": 1}),
    "unbatched, same": ((IMAGE, W), {"padding": "same"}),
    "padding valid": ((X, W), {"padding": "valid", "stride": 2}),
    "padding same": ((X, W, B), {"padding": "same"}),
    "padding same, even kernel": ((X, torch.randn(6, 4, 2, 4)), {"padding": "same"}),
    "padding same, dilation": ((X, torch.randn(6, 4, 3, 2)), {"padding": "same", "dilation": (2, 3)}),
    "padding valid, unbatched": ((IMAGE, W), {"padding": "valid"}),
    "groups": ((X, torch.randn(6, 2, 3, 3), B), {"groups": 2}),
    "depthwise": ((X, torch.randn(8, 1, 3, 3)), {"groups": 4}),
    "batch 0": ((torch.randn(0, 4, 7, 6), W, B), {}),
    "no input channels": ((torch.randn(2, 0, 7, 6), torch.randn(6, 0, 3, 3), B), {}),
    "kernel as large as the padded input": ((X, torch.randn(6, 4, 9, 8)), {"padding": 1}),
    "padding larger than the kernel": ((X, W), {"padding": (5, 9)}),
    "stride larger than the input": ((X, W), {"stride": 100}),
    "double": ((X.double(), W.double(), B.double()), {}),
    "bfloat16": ((X.bfloat16(), W.bfloat16(), B.bfloat16()), {}),
    "float16": ((X.half(), W.half(), B.half()), {}),
    "int64, by torch": ((X.long(), W.long()), {}),
    "int32, by torch": ((X.int(), W.int(), B.int()), {"padding": 1}),
    "complex, by torch": ((X.cfloat(), W.cfloat(), B.cfloat()), {}),
    "meta": ((X.to("meta"), W.to("meta"), B.to("meta")), {}),
    "negated view": ((torch._neg_view(X), W), {}),
    "zero tensor": ((torch._efficientzerotensor((2, 4, 7, 6)), W, B), {}),
}


@pytest.mark.parametrize("name", VALID)
def test_accepts_what_torch_accepts(name: str) -> None:
    args, kwargs = VALID[name]
    if name == "meta":
        ours, theirs = OURS(*args, **kwargs), TORCHS(*args, **kwargs)
        assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
        return
    result = _same(args, kwargs)
    assert isinstance(result, torch.Tensor), result


# ---- what torch rejects ----------------------------------------------------------------------------------------------

# name -> (arguments, keywords, words that the message has besides "conv2d")
INVALID: dict[str, tuple[tuple[Any, ...], dict[str, Any], tuple[str, ...]]] = {
    "2-D input": ((X[0, 0], W), {}, ("4-D", "(7, 6)")),
    "5-D input": ((X[None], W), {}, ("4-D", "(1, 2, 4, 7, 6)")),
    "3-D weight": ((X, W[0]), {}, ("4-D", "(2, 4, 7, 6)", "(4, 3, 3)")),
    "channels differ": (
        (X, torch.randn(6, 3, 3, 3)),
        {},
        ("input channels", "3 * 1 = 3", "(2, 4, 7, 6)", "(6, 3, 3, 3)"),
    ),
    "channels differ, unbatched": ((IMAGE, torch.randn(6, 3, 3, 3)), {}, ("input channels", "3 * 1 = 3")),
    "groups don't divide K": ((X, torch.randn(5, 2, 3, 3)), {"groups": 2}, ("K = 5", "groups = 2", "(5, 2, 3, 3)")),
    "groups don't divide C": ((X, torch.randn(6, 1, 3, 3)), {"groups": 3}, ("1 * 3 = 3", "(2, 4, 7, 6)")),
    "fewer filters than groups": ((X, torch.randn(2, 1, 3, 3)), {"groups": 4}, ("K = 2", "groups = 4")),
    "groups 0": ((X, W), {"groups": 0}, ("groups",)),
    "groups negative": ((X, W), {"groups": -1}, ("groups",)),
    "stride 0": ((X, W), {"stride": 0}, ("stride", "(0, 0)")),
    "stride negative": ((X, W), {"stride": (1, -2)}, ("stride", "(1, -2)")),
    "padding negative": ((X, W), {"padding": (0, -1)}, ("padding",)),
    "dilation 0": ((X, W), {"dilation": 0}, ("dilation", "(0, 0)")),
    "dilation negative": ((X, W), {"dilation": (-1, 1)}, ("dilation",)),
    "kernel taller than the input": (
        (X, torch.randn(6, 4, 8, 3)),
        {},
        ("height 7 + 0 + 0 = 7 < 1 * (8 - 1) + 1 = 8", "(6, 4, 8, 3)"),
    ),
    "dilated kernel wider than the input": (
        (X, W),
        {"dilation": (1, 3)},
        ("width 6 + 0 + 0 = 6 < 3 * (3 - 1) + 1 = 7",),
    ),
    "empty image": ((torch.randn(2, 4, 0, 6), W), {"padding": 1}, ("(2, 4, 0, 6)",)),
    "bias of another size": ((X, W, torch.randn(5)), {}, ("bias", "6", "(5,)")),
    "bias of two dimensions": ((X, W, torch.randn(6, 1)), {}, ("bias", "(6, 1)")),
    "bias without dimensions": ((X, W, torch.tensor(1.0)), {}, ("bias", "()")),
    "weight of another dtype": ((X, W.double()), {}, ("dtype", "torch.float32", "torch.float64")),
    "bias of another dtype": ((X, W, B.bfloat16()), {}, ("dtype", "torch.bfloat16")),
    "input half, weight float": ((X.half(), W), {}, ("dtype", "torch.float16")),
    "padding same with stride": ((X, W), {"padding": "same", "stride": 2}, ("same", "stride")),
    "padding of another name": ((X, W), {"padding": "full"}, ("'full'", "same", "valid")),
    "padding of three": ((X, W), {"padding": (1, 1, 1)}, ("padding", "(1, 1, 1)")),
    "padding of four": ((X, W), {"padding": (1, 1, 1, 1)}, ("padding", "(1, 1, 1, 1)")),
    "stride of three": ((X, W), {"stride": (1, 1, 1)}, ("stride", "(1, 1, 1)")),
    "stride empty": ((X, W), {"stride": ()}, ("stride",)),
    "stride a float": ((X, W), {"stride": 1.0}, ("stride", "1.0")),
    "stride None": ((X, W), {"stride": None}, ("stride", "None")),
    "dilation a string": ((X, W), {"dilation": "2"}, ("dilation", "'2'")),
    "padding of floats": ((X, W), {"padding": (0.5, 1)}, ("padding", "0.5")),
    "groups a float": ((X, W), {"groups": 1.0}, ("groups", "1.0")),
    "groups a pair": ((X, W), {"groups": (1, 1)}, ("groups", "(1, 1)")),
    "input a list": (([[1.0]], W), {}, ("input", "Tensor", "list")),
    "weight an array": ((X, W.numpy()), {}, ("weight", "Tensor", "ndarray")),
    "weight None": ((X, None), {}, ("weight", "Tensor", "NoneType")),
    "bias a float": ((X, W, 1.0), {}, ("bias", "Tensor", "float")),
    "bias True": ((X, W, True), {}, ("bias", "Tensor", "bool")),
    "no output channels": ((X, torch.randn(0, 4, 3, 3)), {}, ()),
    "an empty kernel": ((X, torch.randn(6, 4, 0, 3)), {}, ()),
    "bool tensors": ((X > 0, W > 0), {}, ()),
}


@pytest.mark.parametrize("name", INVALID)
def test_rejects_what_torch_rejects(name: str) -> None:
    args, kwargs, words = INVALID[name]
    error = _same(args, kwargs)
    assert isinstance(error, Exception), "torch accepts this: it belongs into the other table"
    if words:
        text = str(error)
        assert text.startswith("conv2d: "), text
        for word in words:
            assert word in text, f"{word!r} is missing in: {text}"


def test_devices_may_not_differ() -> None:
    """torch lets some such calls through, with memory that nothing ever wrote as the result."""
    with pytest.raises(ValueError, match=r"conv2d: expected one device, got cpu, meta; .*\(2, 4, 7, 6\)"):
        OURS(X, W.to("meta"))


@pytest.mark.parametrize("name", [n for n in INVALID if INVALID[n][2]])
@pytest.mark.parametrize("backend", ["aten", "cpu"])
def test_rejects_under_every_backend(name: str, backend: str) -> None:
    args, kwargs, _ = INVALID[name]
    with settings.backend(backend), pytest.raises((ValueError, TypeError)):
        OURS(*args, **kwargs)


@pytest.mark.parametrize("name", ["int64, by torch", "complex, by torch", "no input channels"])
def test_what_torch_serves_is_an_error_under_strict(name: str) -> None:
    args, kwargs = VALID[name]
    with cnnfast.strict(), pytest.raises(NotImplementedError, match=r"conv2d: .*strict"):
        OURS(*args, **kwargs)
    with cnnfast.backend("cpu"), pytest.raises(NotImplementedError, match=r"conv2d: .*'cpu'"):
        OURS(*args, **kwargs)


# ---- results: layouts and values -------------------------------------------------------------------------------------

CL = torch.channels_last
_X8, _W1, _W3 = torch.randn(2, 8, 6, 5), torch.randn(4, 8, 1, 1), torch.randn(4, 8, 3, 3)
STRIDES: dict[str, tuple[torch.Tensor, torch.Tensor]] = {
    "NCHW, contiguous": (_X8, _W3),
    "channels_last input": (_X8.to(memory_format=CL), _W3),
    "channels_last weight": (_X8, _W3.to(memory_format=CL)),
    "both channels_last": (_X8.to(memory_format=CL), _W3.to(memory_format=CL)),
    "NCHW input, 1x1 weight": (_X8, _W1),
    "NCHW input, channels_last 1x1 weight": (_X8, _W1.to(memory_format=CL)),
    "channels_last input, 1x1 weight": (_X8.to(memory_format=CL), _W1),
    "NCHW input, 1x1 weight made from a matrix": (_X8, torch.randn(4, 8)[:, :, None, None]),
    "NCHW input, 1x1 weight with channels_last strides": (_X8, torch.randn(4, 1, 1, 8).permute(0, 3, 1, 2)),
    "one channel, both formats at once": (torch.randn(2, 1, 6, 5), torch.randn(4, 1, 3, 3)),
    "one channel, channels_last": (torch.randn(2, 1, 6, 5).to(memory_format=CL), torch.randn(4, 1, 3, 3)),
    "one channel weight channels_last": (torch.randn(2, 1, 6, 5), torch.randn(4, 1, 3, 3).to(memory_format=CL)),
    "1x1 map": (torch.randn(2, 8, 1, 1), _W1),
    "1x1 map, channels_last": (torch.randn(2, 8, 1, 1).to(memory_format=CL), _W1),
    "1x1 map, channels_last weight": (torch.randn(2, 8, 1, 1), _W1.to(memory_format=CL)),
    "slice of rows, NCHW": (torch.randn(2, 8, 9, 5)[:, :, 1:7], _W3),
    "slice of channels, NCHW": (torch.randn(2, 16, 6, 5)[:, 4:12], _W3),
    "slice of channels, channels_last": (torch.randn(2, 16, 6, 5).to(memory_format=CL)[:, 4:12], _W3),
    "slice of rows, channels_last": (torch.randn(2, 8, 9, 5).to(memory_format=CL)[:, :, 1:7], _W3),
    "every second pixel": (torch.randn(2, 8, 12, 10)[:, :, ::2, ::2], _W3),
    "every second pixel, channels_last": (torch.randn(2, 8, 12, 10).to(memory_format=CL)[:, :, ::2, ::2], _W3),
    "transposed image": (torch.randn(2, 8, 5, 6).transpose(2, 3), _W3),
    "permuted from NHWC": (torch.randn(2, 6, 5, 8).permute(0, 3, 1, 2), _W3),
    "batch last": (torch.randn(8, 6, 5, 2).permute(3, 0, 1, 2), _W3),
    "expanded batch": (torch.randn(1, 8, 6, 5).expand(3, -1, -1, -1), _W3),
    "expanded batch, channels_last": (torch.randn(1, 8, 6, 5).to(memory_format=CL).expand(3, -1, -1, -1), _W3),
    "expanded channels": (torch.randn(2, 1, 6, 5).expand(-1, 8, -1, -1), _W3),
    "expanded everywhere": (torch.randn(1, 1, 1, 1).expand(2, 8, 6, 5), _W3),
    "batch 0": (torch.randn(0, 8, 6, 5), _W3),
    "batch 0, channels_last": (torch.randn(0, 8, 6, 5).to(memory_format=CL), _W3),
    "batch 1, strides of either format": (torch.randn(1, 8, 6, 5), _W3),
    "unbatched": (torch.randn(8, 6, 5), _W3),
    "unbatched, permuted from HWC": (torch.randn(6, 5, 8).permute(2, 0, 1), _W3),
    "unbatched, channels_last weight": (torch.randn(8, 6, 5), _W3.to(memory_format=CL)),
    "unbatched, channels_last 1x1 weight": (torch.randn(8, 6, 5), _W1.to(memory_format=CL)),
    "unbatched, one channel": (torch.randn(1, 6, 5), torch.randn(4, 1, 3, 3)),
    "one output channel": (_X8, torch.randn(1, 8, 3, 3)),
    "one output channel, channels_last": (_X8.to(memory_format=CL), torch.randn(1, 8, 3, 3)),
    "one output pixel": (_X8, torch.randn(4, 8, 6, 5)),
    "one output pixel, channels_last": (_X8.to(memory_format=CL), torch.randn(4, 8, 6, 5)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STRIDES)
def test_strides_are_torchs(name: str, dtype: torch.dtype) -> None:
    x, w = (t.to(dtype) if t.dtype != dtype else t for t in STRIDES[name])
    if dtype != torch.float32:  # .to() keeps strides of dense tensors only
        x, w = (
            torch.empty_strided(t.shape, t.stride(), dtype=dtype).copy_(t) if 0 not in t.stride() else t for t in (x, w)
        )
    ours, theirs = OURS(x, w), TORCHS(x, w)
    assert (ours.shape, ours.stride()) == (theirs.shape, theirs.stride())
    fake_ours, fake_theirs = OURS(x.to("meta"), w.to("meta")), TORCHS(x.to("meta"), w.to("meta"))
    assert fake_ours.stride() == ours.stride() or 0 in x.stride(), "the meta function promises other strides"
    assert fake_ours.shape == fake_theirs.shape


@pytest.mark.parametrize("name", STRIDES)
def test_gradients_have_torchs_strides(name: str) -> None:
    """The input's gradient as torch lays it out, the weight's with the weight's own strides (DDP warns of others)."""
    x, w = STRIDES[name]
    if len(x) == 0:
        pytest.skip("an empty gradient has no layout to speak of")
    grads = []
    for conv in (OURS, TORCHS):
        a, b = x.detach().requires_grad_(), w.detach().requires_grad_()
        out = conv(a, b)
        g = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        grads.append(
            torch.autograd.grad(
                out,
                (a, b),
                g.contiguous(memory_format=CL) if out.dim() == 4 and out.is_contiguous(memory_format=CL) else g,
            )
        )
    for what, ours, theirs in zip(("input", "weight"), *grads, strict=True):
        torch.testing.assert_close(ours, theirs)
        expected = theirs if what == "input" else w
        assert ours.stride() == expected.stride(), f"{what}'s gradient: {ours.stride()}, not {expected.stride()}"


def _id(case: Case) -> str:
    return str(case)


@pytest.mark.parametrize("case", CASES, ids=_id)
def test_cases_through_the_functional(case: Case) -> None:
    """Values, strides and gradients of every case, as a user gets them, beside torch's."""
    operands = {r: g.tensor for r, g in case_inputs(case, "fprop", torch.float32).items()}
    padding: Any = case.padding
    if padding != "same" and len(padding) == 4:
        if not case.symmetric:
            pytest.skip("torch's functional has no asymmetric padding; the kernels' tests have it")
        padding = padding[::2]
    results = []
    for conv in (OURS, TORCHS):
        x, w = operands["x"].detach().requires_grad_(), operands["w"].detach().requires_grad_()
        b = operands["b"].detach().requires_grad_() if case.bias else None
        out = conv(x, w, b, case.stride, padding, case.dilation, case.groups)
        g = case_inputs(case, "bgrad", torch.float32)["y"].tensor
        leaves = [t for t in (x, w, b) if t is not None]
        results.append([out.detach(), *torch.autograd.grad(out, leaves, g)])
    for what, ours, theirs in zip(("result", "dx", "dw", "db"), *results):  # noqa: B905 (no db without bias)
        torch.testing.assert_close(
            ours, theirs, rtol=1e-4, atol=2e-4 * max(1.0, float(theirs.abs().max()) if theirs.numel() else 1.0)
        )
        if what == "result" and "expanded" not in case.x_layout:
            assert ours.stride() == theirs.stride(), f"{what}: {case.why}"


# ---- fuzz ------------------------------------------------------------------------------------------------------------


def _random_call(r: random.Random) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Mostly valid calls; one argument in fifteen is off."""

    def off() -> bool:
        return r.random() < 0.02

    groups = r.choice([1, 1, 1, 1, 2, 3, 4])
    c, k = groups * r.choice([1, 2, 3, 5]), groups * r.choice([1, 2, 3, 4])
    size, kernel = (
        (r.choice([1, 2, 5, 6, 9, 12]), r.choice([1, 3, 7, 10])),
        (r.choice([1, 2, 3, 4]), r.choice([1, 1, 3, 5])),
    )
    generator = torch.Generator().manual_seed(r.randrange(1 << 30))
    dtype = r.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])

    def tensor(*shape: int, strided: bool = True) -> torch.Tensor:
        t = torch.randn(shape, generator=generator).to(r.choice([torch.float64, torch.float16]) if off() else dtype)
        if t.dim() == 4 and r.random() < 0.4:
            t = t.to(memory_format=CL)
        if t.dim() == 4 and r.random() < 0.15 and strided:
            t = t[:, :, :, : max(1, shape[3] - 1)] if r.random() < 0.5 else t.transpose(2, 3)
        return t

    x = tensor(r.choice([0, 1, 1, 2, 3]), c + off(), *size)
    x = x[0] if len(x) and r.random() < 0.15 else x
    # torch 2.14 is wrong, or crashes, with a weight of a grouped convolution that is in neither format
    w = tensor(k + off(), c // groups + off(), *kernel, strided=groups == 1)
    b = tensor(k + off()) if r.random() < 0.5 else None

    def pair(options: list[int], bad: list[Any]) -> Any:
        if off():
            return r.choice(bad)
        one = r.choice(options)
        return r.choice([one, (one, r.choice(options)), [r.choice(options), one], (one,)])

    stride = pair([1, 1, 2, 3], [0, -1, (1, 2, 3), 1.5])
    # torch 2.14 crashes on some dilated kernels that see nothing but padding, as on maps of one or two pixels
    dilation = pair([1, 1, 1, 2] if min(size) >= 5 and 1 not in kernel else [1], [0, -2, "1", (2, 0)])
    padding = (
        r.choice(["same", "valid", "full"]) if r.random() < 0.15 else pair([0, 1, 2, 4], [-1, (1, 1, 1), 0.5, None])
    )
    return (x, w, b), {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups + off()}


def test_fuzz() -> None:
    """Random calls, valid and not: torch's verdict, torch's shape, strides and values."""
    count, accepted = process.FUZZ_CALLS, 0
    for number in range(count):
        seed = process.SEED * count + number
        args, kwargs = _random_call(random.Random(seed))
        shapes = [None if t is None else (tuple(t.shape), t.stride(), t.dtype) for t in args]
        theirs, ours = outcome(TORCHS, args, kwargs), outcome(OURS, args, kwargs)
        call = f"call {number} of CNNFAST_TEST_SEED={process.SEED}: {shapes} {kwargs}"
        if not isinstance(theirs, Exception) and isinstance(ours, Exception):
            mixed = len({t.dtype for t in args if t is not None}) > 1
            if len(args[0]) == 0 or (mixed and isinstance(ours, cnnfast.DtypeError)):
                continue  # torch looks at dtypes and dilation only on some of its ways
        if isinstance(theirs, Exception):
            assert isinstance(ours, (ValueError, TypeError)), (
                f"{call}: torch rejects ({theirs}), cnnfast gives {ours!r}"
            )
            continue
        assert not isinstance(ours, Exception), f"{call}: torch accepts, cnnfast raises {ours!r}"
        accepted += 1
        # torch's grouped float64 convolution concatenates the groups' results, in the layout that cat() finds best; its
        # empty results have strides that depend on the algorithm
        unruly = theirs.numel() == 0 or (theirs.dtype == torch.float64 and kwargs["groups"] > 1)
        assert unruly or ours.stride() == theirs.stride(), f"{call}: strides {ours.stride()}, torch's {theirs.stride()}"
        assert ours.shape == theirs.shape, f"{call}: shape {tuple(ours.shape)}, torch's {tuple(theirs.shape)}"
        ref = TORCHS(*[None if t is None else t.double().contiguous() for t in args], **kwargs)
        tolerance = {torch.float64: 1e-10, torch.float32: 2e-4}.get(theirs.dtype, 0.06)
        torch.testing.assert_close(
            ours.double(), ref, rtol=tolerance, atol=tolerance, msg=lambda text, call=call: f"{call}: {text}"
        )
    assert accepted > count // 3
