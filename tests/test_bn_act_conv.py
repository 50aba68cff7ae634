"""bn_act_conv and the layers that train with it: derivatives, and that nothing differs from the layers one by one.

The plain process lets the layers take the operator with no kernel for it, so that other operators compose it; the
interpreter's runs Triton's kernels.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import process
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import cnnfast
from cnnfast import dispatch, nn, ops, settings
from cnnfast.backends import triton
from cnnfast.models.resnet import BasicBlock, Bottleneck

CL = torch.channels_last
plain = pytest.mark.skipif(process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it")
kernels = [
    pytest.mark.interpreter if process.INTERPRETED else pytest.mark.gpu,
    pytest.mark.skipif(not (process.INTERPRETED or process.GPU) or bool(triton.ABSENT), reason="runs Triton kernels"),
]
DEVICE = "cpu" if process.INTERPRETED or not process.GPU else "cuda"
_CONV = ((2, 1), (1, 1, 0, 1), (1, 1), 2)


def _operands(channels: int = 4, filters: int = 6) -> list[Tensor]:
    """x, w, xw, xb in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, channels, 4, 3), (filters, channels // 2, 3, 2), (channels,), (channels,)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def _function(activation: str) -> Callable[..., Tensor]:
    def function(x: Tensor, w: Tensor, xw: Tensor, xb: Tensor) -> Tensor:
        mean, invstd, _ = ops.batch_norm_stats(x, 1e-2, "auto", False)
        y, *_ = ops.bn_act_conv(x, w, None, mean, invstd, xw, xb, *_CONV, activation, 1e-2, 1e-3, "fp32", "auto", False)
        return y

    return function


def _by_torch(activation: str, x: Tensor, w: Tensor, xw: Tensor, xb: Tensor) -> Tensor:
    z = ops.activate(torch.nn.functional.batch_norm(x, None, None, xw, xb, True, 0.1, 1e-2), activation)
    return torch.nn.functional.conv2d(torch.nn.functional.pad(z, (0, 1, 1, 1)), w, None, (2, 1), 0, 1, 2)


@plain
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_derivatives(activation: str) -> None:
    """Values and gradients are torch's; forward mode and second derivatives agree with differences."""
    operands, function = _operands(), _function(activation)
    y, expected = function(*operands), _by_torch(activation, *operands)
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, operands, g), torch.autograd.grad(expected, operands, g), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    torch.autograd.gradcheck(function, operands, check_forward_ad=True, check_undefined_grad=False)
    torch.autograd.gradgradcheck(function, operands)


@plain
def test_statistics_are_the_results() -> None:
    x, w, _, _ = _operands()
    y, mean, invstd, unbiased = ops.bn_act_conv(
        x, w, None, None, None, None, None, *_CONV, "none", 0.0, 1e-3, "fp32", "auto", False
    )
    torch.testing.assert_close(mean, y.mean((0, 2, 3)))
    torch.testing.assert_close(invstd, (y.var((0, 2, 3), correction=0) + 1e-3).rsqrt())
    torch.testing.assert_close(unbiased, y.var((0, 2, 3)))
    assert not any(t.requires_grad for t in (mean, invstd, unbiased))


@plain
def test_rejects_vectors_that_do_not_fit() -> None:
    x, w, xw, xb = _operands()
    mean = torch.zeros(4, dtype=torch.float64)
    rest = (*_CONV, "relu", 1e-3, 1e-3, "fp32", "auto", False)
    for vectors in (
        (mean, None, xw, xb),
        (None, None, xw, None),
        (mean[:3], mean, xw, xb),
        (mean.float(), mean, xw, xb),
    ):
        with pytest.raises((cnnfast.ShapeError, cnnfast.DtypeError), match=r"bn_act_conv|batch_norm"):
            ops.bn_act_conv(x, w, None, *vectors, *rest)


# ---- the layers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Layers in training take the operator, whoever serves it."""
    called: list[str] = []
    original = ops.bn_act_conv

    def spy(*args: Any) -> Any:
        called.append("normalised" if args[3] is not None else "statistics")
        return original(*args)

    monkeypatch.setattr(dispatch, "has_kernel", lambda *args: True)
    monkeypatch.setattr(ops, "bn_act_conv", spy)
    return called


def _network() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = (nn.ConvBNAct(3, 16, 3), BasicBlock(16, 16), Bottleneck(16, 4, norm_layer=nn.BatchNorm2d))
    return torch.nn.Sequential(*layers).to(memory_format=CL)


def _step(model: torch.nn.Module, x: Tensor, forward: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
    """Two training steps' gradients accumulated, an evaluation between them, the averages after."""
    model.zero_grad()
    x = x.detach().clone(memory_format=CL).requires_grad_()
    results = {}
    for i in range(2):
        y = (forward or model)(x)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).reshape(y.shape)).sum().backward()
        results[f"y{i}"] = y
        model.eval()
        with torch.no_grad():
            results[f"evaluated{i}"] = model(x)
        model.train()
    results |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**results, "gradient of x": x.grad, **dict(model.named_buffers())}  # type: ignore[dict-item]


def _compare(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert a.keys() == b.keys()
    for name in a:
        scale = float(b[name].detach().double().abs().max().clamp_min(1e-30))
        worst = float((a[name].detach().double() - b[name].detach().double()).abs().max())
        assert worst <= tolerance * scale, f"{name}: {worst:.3g} beside {scale:.3g}"


@plain
def test_layers_train_as_unfused(fused: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = _network().double()
    twin, x = copy.deepcopy(model), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    ours = _step(model, x)
    assert fused.count("normalised") == 2 * 1, "the bottleneck's last convolution alone normalises while it reads"
    assert fused.count("statistics") == 2 * 5
    monkeypatch.setattr(dispatch, "has_kernel", lambda *args: False)
    _compare(ours, _step(twin, x))


@plain
def test_checkpointed_and_compiled(fused: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = _network().double()
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    once = _step(copy.deepcopy(model), x)
    again = copy.deepcopy(model)
    values = _step(again, x, lambda t: checkpoint(again, t, use_reentrant=False))
    _compare({k: v for k, v in values.items() if "gradient" in k or k == "y0"},
             {k: v for k, v in once.items() if "gradient" in k or k == "y0"})  # fmt: skip
    monkeypatch.setattr(ops, "bn_act_conv", ops.bn_act_conv.__closure__[1].cell_contents)  # Dynamo traces no spies
    compiled = copy.deepcopy(model)
    _compare(_step(compiled, x, torch.compile(compiled, backend="aot_eager", fullgraph=True)), once)


@plain
def test_frozen_and_foreign_norms_are_left_alone(fused: list[str]) -> None:
    model = Bottleneck(16, 4).train()
    model.bn2.eval()
    model(torch.randn(2, 16, 5, 5))
    assert fused == ["statistics", "statistics"], "a frozen norm's convolution needs no statistics"
    fused.clear()
    model = Bottleneck(16, 4, norm_layer=torch.nn.BatchNorm2d).train()
    model(torch.randn(2, 16, 5, 5))
    assert fused == []


@plain
def test_synchronised_norms_say_why(fused: list[str]) -> None:
    block = nn.ConvBNAct(4, 8, 1)
    block.bn = torch.nn.SyncBatchNorm.convert_sync_batchnorm(block.bn)  # type: ignore[assignment]
    with settings.observe() as seen, contextlib.suppress(ValueError):  # torch's own may insist on a GPU
        block(torch.randn(2, 4, 3, 3))
    assert any("SyncBatchNorm" in getattr(event, "reason", "") for event in seen)
    assert fused == []


@pytest.mark.parametrize(
    ("kind", "dtype"), [("basic", torch.float32), ("bottleneck", torch.float32), ("bottleneck", torch.bfloat16)]
)
class TestKernels:
    pytestmark = kernels

    def test_block_trains_as_unfused(self, kind: str, dtype: torch.dtype) -> None:
        """Blocks on Triton's kernels against float64, as far from it as torch's layers are.

        Beside torch's error stands a random walk of roundings: 144 products and 40 pixels make a gradient.
        """
        torch.manual_seed(0)
        block: Any = BasicBlock(16, 16) if kind == "basic" else Bottleneck(32, 16, downsample=_downsample(32, 64))
        for p in block.parameters():
            p.data = torch.randn_like(p).mul(0.3).to(dtype if p.dim() == 4 else torch.float32).double()
        block.double()
        x = torch.randn(2, 16 if kind == "basic" else 32, 4, 5).to(dtype)
        with cnnfast.backend("aten"):
            exact = _step(copy.deepcopy(block), x.double())
            own = _step(_cast(block, dtype), x)
        with cnnfast.backend("triton"), cnnfast.precision("fp32"):
            ours = _step(_cast(block, dtype).to(DEVICE), x.to(DEVICE))
        u = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-24
        for name, reference in ((name, t.detach().double()) for name, t in exact.items()):
            norm = float(reference.norm())
            error = float((ours[name].detach().cpu().double() - reference).norm())
            torchs = float((own[name].detach().double() - reference).norm())
            assert error <= 3 * torchs + 184**0.5 * u * norm, (
                f"{name}: {error:.3g}, torch's {torchs:.3g}, beside {norm:.3g}"
            )


def _downsample(channels: int, filters: int) -> torch.nn.Module:
    from cnnfast.models._blocks import Chain

    return Chain(nn.Conv2d(channels, filters, 1, bias=False), nn.BatchNorm2d(filters))


def _cast(block: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Convolutions in the dtype, norms in float32, as autocast has them."""
    twin = copy.deepcopy(block).float()
    for module in twin.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.to(dtype)
    return twin.to(memory_format=CL)  # type: ignore[call-overload, no-any-return]
