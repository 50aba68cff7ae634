"""What a fused model holds: one set of weights, as its kernels read them; and what it can still do with those alone."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from support import process
from torch import nn

import cnnfast

pytestmark = pytest.mark.skipif(process.EMULATED or process.INTERPRETED, reason="plans are the plain process's")


def _conv(c: int, k: int, size: int = 3, **kw: Any) -> list[nn.Module]:
    return [nn.Conv2d(c, k, size, **{"padding": size // 2, "bias": False, **kw}), nn.BatchNorm2d(k), nn.ReLU()]


def _network() -> nn.Sequential:
    """3x3, 5x5, 1x1, strided, grouped, and fully connected of an image: kernels that pack their weights and others."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *_conv(3, 64), *_conv(64, 128), *_conv(128, 160, 5, stride=2), *_conv(160, 192, 1), *_conv(192, 192, groups=48),
        *_conv(192, 128), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(2048, 300), nn.ReLU(), nn.Linear(300, 10),
    )  # fmt: skip
    for m in model:
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.uniform_(-0.2, 0.2), m.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return model.eval()


def _bytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in model.state_dict().values())


def _near(out: torch.Tensor, expected: torch.Tensor, bound: float = 1e-5) -> None:
    assert out.dtype == expected.dtype
    error = (out.double() - expected.double()).norm() / expected.double().norm()
    assert error <= bound, f"relative error {error:.2e}"


SHAPES = ((1, 3, 24, 20), (2, 3, 40, 41), (1, 3, 9, 9), (16, 3, 12, 12))


@pytest.mark.parametrize("how", ["dropped before", "dropped after", "inplace"])
def test_one_set_of_weights(how: str) -> None:
    """As many bytes as the model's and a few per cent, nothing of the model's own; other shapes come out of those."""
    model = _network()
    size = _bytes(model)
    inputs = [torch.randn(shape) for shape in SHAPES]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
        owned = [weakref.ref(p) for p in model.parameters()]
        storages = {p.untyped_storage().data_ptr() for p in model[3].parameters()}
        if how == "dropped before":
            model = cnnfast.fuse(model)
            assert model.weight_bytes <= size
        elif how == "dropped after":
            model = cnnfast.fuse(model, inputs[0])
        else:
            given, model = model, cnnfast.fuse(model, inputs[0], inplace=True)
            assert all(p.untyped_storage().nbytes() == 0 for p in given.parameters())
            del given
        gc.collect()
        assert all(p() is None for p in owned)
        _near(model(inputs[0]), expected[0])
        assert model.weight_bytes <= 1.1 * size, f"{model.weight_bytes} bytes of {size}\n{model.report()}"
        held = [c for c in model._constants._by_name.values() if c.source is not None]
        assert not held, [c.key for c in held]
        assert storages - {
            c.kept.untyped_storage().data_ptr() for c in model._constants._by_name.values() if c.kept is not None
        }
        for x, y in zip(inputs, expected, strict=True):
            _near(model(x), y)
    assert len(model.programs) == len(SHAPES)


def test_later_changes_of_the_model_are_not_seen() -> None:
    """Whichever form a weight is held in: packed, or as it is, as those of fully connected layers are."""
    model, inputs = _network(), [torch.randn(shape) for shape in SHAPES]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
        fused = cnnfast.fuse(model, inputs[0])
        for p in model.parameters():
            p.zero_()
        for x, y in zip(inputs, expected, strict=True):
            _near(fused(x), y)


def test_another_dtype_needs_the_model() -> None:
    model, x = _network(), torch.randn(SHAPES[0])
    with torch.no_grad():
        fused = cnnfast.fuse(model, x)
        with torch.autocast("cpu", torch.bfloat16):
            _near(fused(x), model(x), 3e-2)
        first = cnnfast.fuse(model, x)
        model[0].weight.mul_(2)
        with torch.autocast("cpu", torch.bfloat16):
            with pytest.raises(NotImplementedError, match=r"in a form that isn't held.*has been changed since"):
                first(x)
            _near(cnnfast.fuse(model, x)(x), model(x), 3e-2)
        alone = cnnfast.fuse(_network(), x)
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(NotImplementedError, match="the model that was fused is gone"),
        ):
            alone(x)
        assert alone(x).dtype == torch.float32


def test_weights_that_are_not_finite_are_kept() -> None:
    """A kernel turns to them where they are beside the padding."""
    torch.manual_seed(0)
    model = nn.Conv2d(3, 40, 3, 2, 1).eval()
    with torch.no_grad():
        model.weight[5, 1, 0, 1], model.weight[7, 0, 2, 2] = float("inf"), float("nan")
        eager = cnnfast.convert(model)  # whose padding contributes nothing
        fused = cnnfast.fuse(model, torch.randn(1, 3, 30, 30))
        for shape in ((1, 3, 30, 30), (2, 3, 17, 19)):
            x = torch.randn(shape)
            torch.testing.assert_close(fused(x), eager(x), rtol=1e-4, atol=1e-4, equal_nan=True)
            assert bool(torch.isfinite(eager(x)).any())


@pytest.mark.parametrize("planned", [False, True])
def test_copies(planned: bool) -> None:
    """Through a file, or in memory, with the model gone: equal results, for the same shape and another."""
    model, inputs = _network(), [torch.randn(shape) for shape in SHAPES[:3]]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
        fused = cnnfast.fuse(model, *inputs[: int(planned)])
        del model
        gc.collect()
        for twin in (
            pickle.loads(pickle.dumps(fused)),
            copy.deepcopy(fused),
            pickle.loads(pickle.dumps(copy.deepcopy(fused))),
        ):
            for x, y in zip(inputs, expected, strict=True):
                _near(twin(x), y)


def test_shared_and_sibling_weights() -> None:
    """A tied weight is let go when its last reader has it; siblings are merged from what is held, in any order of nodes."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 64, 1), nn.Conv2d(64, 4, 1)
            self.c, self.d = nn.Conv2d(4, 48, 1), nn.Conv2d(64, 48, 3, padding=1)
            self.again = self.a

        def forward(self, x: Any) -> Any:
            y, z = self.a(x).relu(), self.c(x).relu()
            return self.d(self.again(self.b(y))) + z, self.again(x * 2), self.c(x - 1)

    torch.manual_seed(0)
    for convert in (False, True):
        model = Tied().eval()
        x = torch.randn(2, 4, 9, 9)
        with torch.no_grad():
            expected = model(x)
            fused = cnnfast.fuse(cnnfast.convert(model) if convert else model, x, inplace=convert)
            for out, y in zip(fused(x), expected, strict=True):
                _near(out, y)
