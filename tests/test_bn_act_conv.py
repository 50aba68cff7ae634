"""bn_act_conv and the layers that train with it: derivatives, and that nothing differs from the layers one by one.

The plain process lets the layers take the operator with no kernel for it, so that other operators compose it; the
interpreter's runs Triton's kernels.
"""

from __future__ import annotations

import contextlib
import copy
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
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
    assert fused.count("normalised") == 2 * 3, (
        "all but the first convolution of each block take what was not normalised"
    )
    assert fused.count("statistics") == 2 * 3
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
        _hold(ours, own, exact, dtype)


def _hold(
    ours: dict[str, Tensor], own: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype = torch.float32
) -> None:
    """As far from float64 as torch's layers are, and a random walk of roundings: 144 products and 40 pixels."""
    u = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-24
    assert ours.keys() == own.keys() == exact.keys()
    for name, reference in ((name, t.detach().cpu().double()) for name, t in exact.items()):
        norm = float(reference.norm())
        error, torchs = (float((t[name].detach().cpu().double() - reference).norm()) for t in (ours, own))
        assert error <= 3 * torchs + 184**0.5 * u * norm, (
            f"{name}: {error:.3g}, torch's {torchs:.3g}, beside {norm:.3g}"
        )


class TestTraining:
    """What training does with layers, on Triton's kernels; each is held against torch's layers and float64."""

    pytestmark = kernels

    def test_autocast(self) -> None:
        """Convolutions in bf16, parameters and their gradients in float32."""
        block, x = _trained()
        exact, own = (_run(copy.deepcopy(block).to(d), x.to(d), "aten", True) for d in (torch.double, torch.float))
        with settings.observe() as seen:
            ours = _run(block, x, "triton", True)
        assert {str(e.selection.problem.dtype) for e in _served(seen)} == {"bf16"}
        assert all(t.dtype == torch.float32 for name, t in ours.items() if "gradient" in name)
        _hold(ours, own, exact, torch.bfloat16)

    def test_checkpointing_is_bitwise_the_same(self) -> None:
        block, x = _trained()
        twin = copy.deepcopy(block)
        ours = _run(block, x, "triton", forward=lambda t: checkpoint(block, t, use_reentrant=False))
        for name, expected in _run(twin, x, "triton").items():
            if "gradient" in name or name.startswith("y"):  # averages are updated twice, as torch's
                assert torch.equal(ours[name], expected), name

    def test_frozen_norm(self) -> None:
        """The frozen norm's averages stay, its convolution is fused with them; the others' still leave their statistics."""
        block, x = _trained()
        block.bn2.eval()
        before = {name: b.clone() for name, b in block.bn2.named_buffers()}
        exact, own = (_run(copy.deepcopy(block).to(d), x.to(d), "aten") for d in (torch.double, torch.float))
        with settings.observe() as seen:
            ours = _run(block, x, "triton")
        assert sum(e.selection.problem.direction == "fprop" for e in _served(seen)) == 2 * 2
        assert all(torch.equal(b, before[name]) for name, b in block.bn2.named_buffers())
        _hold(ours, own, exact)

    def test_evaluated_trained_evaluated(self) -> None:
        """Between evaluations an optimizer's step and new averages: nothing of the first is left in the second."""

        def steps(block: Any, x: Tensor, backend: str) -> dict[str, Tensor]:
            optimizer, results = torch.optim.SGD(block.parameters(), lr=0.1, momentum=0.9), {}
            with cnnfast.backend(backend), cnnfast.precision("fp32"):
                for i in range(2):
                    with torch.no_grad():
                        results[f"evaluated{i}"] = block.eval()(x)
                    (block.train()(x) * 0.1).square().sum().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                with torch.no_grad():
                    results["evaluated at last"] = block.eval()(x)
            return results

        block, x = _trained()
        exact, own = (steps(copy.deepcopy(block).to(d), x.to(d), "aten") for d in (torch.double, torch.float))
        ours = steps(block, x, "triton")
        assert not torch.allclose(ours["evaluated0"], ours["evaluated at last"], rtol=1e-2)
        _hold(ours, own, exact)

    def test_synchronised_norm_says_why(self) -> None:
        """SyncBatchNorm's convolution is torch's or ours, without statistics, with the reason."""
        block, x = _trained()
        block.bn2 = torch.nn.SyncBatchNorm.convert_sync_batchnorm(block.bn2).eval()
        own = {name: p.clone() for name, p in block.named_parameters()}
        with settings.observe() as seen:
            ours = _run(block, x, "triton")
        reasons = [e.reason for e in seen if isinstance(e, dispatch.Unserved)]
        assert any("SyncBatchNorm's statistics are of all processes' batches" in reason for reason in reasons)
        assert sum(e.selection.problem.direction == "fprop" for e in _served(seen)) == 2 * 2
        assert {f"gradient of {name}" for name in own} < ours.keys()

    @pytest.mark.skipif(not process.INTERPRETED, reason="two processes share no card")
    def test_ddp(self) -> None:
        """Two processes with half a batch each: gradients are the mean of both halves', averages each one's own."""
        here = str(Path(__file__).resolve().parent)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        code = (
            f"import sys; sys.path.insert(0, {here!r}); import test_bn_act_conv as t; t._rank(int(sys.argv[1]), {port})"
        )
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(Path(here).parent), os.environ.get("PYTHONPATH")])
        )
        children = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(rank)], env=environment, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True,
            )
            for rank in range(2)
        ]  # fmt: skip
        try:
            outputs = [child.communicate(timeout=200)[0] for child in children]
        finally:
            for child in children:
                child.kill()
        for child, output in zip(children, outputs, strict=True):
            assert child.returncode == 0, output


def _rank(rank: int, port: int) -> None:
    """One of two processes that train a block together."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    block, x = _trained(batch=4)
    halves = x.chunk(2)
    exact, own = (
        [_run(copy.deepcopy(block).to(d), half.to(d), "aten") for half in halves] for d in (torch.double, torch.float)
    )
    parallel: Any = torch.nn.parallel.DistributedDataParallel(block, broadcast_buffers=False)
    with settings.observe() as seen, warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Gg]rad strides.*")
        ours = _run(block, halves[rank], "triton", forward=parallel)
    assert len(_served(seen)) == 2 * (3 + 4), (
        "three convolutions forward, two of them with two gradients, in each of two steps"
    )
    for results in (exact, own):
        mean = {name: (results[0][name] + results[1][name]) / 2 for name in ours if name.startswith("gradient of ")}
        del mean["gradient of x"]
        results[rank] |= mean
    _hold(ours, own[rank], exact[rank])
    del parallel
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # torch's own threads may outlive what they belong to, and the last steps would abort


def _trained(batch: int = 2) -> tuple[Any, Tensor]:
    """A bottleneck without a downsample, whose last convolution normalises while it reads, in training mode; an input."""
    torch.manual_seed(0)
    block = Bottleneck(64, 16)
    for p in block.parameters():
        p.data = torch.randn_like(p).mul(0.3)
    return block.to(DEVICE, memory_format=CL).train(), torch.randn(batch, 64, 3, 4).to(DEVICE)  # type: ignore[call-overload]


def _run(
    block: torch.nn.Module,
    x: Tensor,
    backend: str,
    autocast: bool = False,
    forward: Callable[..., Tensor] | None = None,
) -> dict[str, Tensor]:
    """Two steps' gradients accumulated; see _step, whose norms this leaves in the modes that they are in."""
    x, results = x.detach().clone(memory_format=CL).requires_grad_(), {}
    low = x.dtype != torch.double
    with cnnfast.backend(backend), cnnfast.precision("fp32"):
        for i in range(2):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast and low):
                y = (forward or block)(x)
            (
                y.to(x.dtype) * torch.linspace(-1, 1, y.numel(), device=y.device, dtype=x.dtype).reshape(y.shape)
            ).sum().backward()
            results[f"y{i}"] = y
    results |= {f"gradient of {name}": p.grad for name, p in block.named_parameters() if p.grad is not None}
    return {**results, "gradient of x": x.grad, **dict(block.named_buffers())}  # type: ignore[dict-item]


def _served(seen: Any) -> list[dispatch.Event]:
    """The calls of bn_act_conv that Triton's kernels served."""
    events = [e for e in seen if isinstance(e, dispatch.Event) and e.selection.problem.op == "bn_act_conv"]
    assert all(e.selection.implementation.backend == "triton" for e in events)
    return events


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
