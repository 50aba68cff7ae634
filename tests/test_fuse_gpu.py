"""Fused networks on the GPU's kernels: the emulated GPU's in plans, the interpreter's operator by operator, or a card's."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import process
from support.running import Applied, in_threads
from torch import nn

import cnnfast
from cnnfast.graph.program import Program, Segment

HERE = process.EMULATED or process.INTERPRETED
on_a_gpu = (
    pytest.mark.emulated if process.EMULATED else pytest.mark.interpreter if process.INTERPRETED else pytest.mark.gpu
)
on_a_card = pytest.mark.gpu
pytestmark = pytest.mark.skipif(not HERE and not process.GPU, reason="no NVIDIA GPU on this machine")
DEVICE = "cpu" if HERE else "cuda"
# what serves: on a card both backends together, too
BACKENDS = ["cuda"] if process.EMULATED else ["triton"] if process.INTERPRETED else ["auto", "cuda", "triton"]
CL = torch.channels_last


def _conv(c: int, k: int, size: int = 3, **kw: Any) -> nn.Sequential:
    conv = nn.Conv2d(c, k, size, **{"padding": size // 2, "bias": False, **kw})
    return nn.Sequential(conv, nn.BatchNorm2d(k))


def _plain() -> nn.Module:
    return nn.Sequential(
        _conv(3, 16, 7, stride=2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), _conv(16, 20), nn.ReLU6(),
        _conv(20, 8, dilation=2, padding=2), nn.LeakyReLU(), nn.AdaptiveAvgPool2d((3, 2)), nn.Flatten(), nn.Dropout(),
        nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 5),
    )  # fmt: skip


def _residual(m: Any, x: Any) -> Any:
    x = m.stem(x).relu()
    x = (m.b(m.a(x).relu()) + m.short(x)).relu()
    return m.fc((m.d(m.c(x).relu()) + x).relu().mean((2, 3)))


def _inception(m: Any, x: Any) -> Any:
    x = m.stem(x).relu()
    x = torch.cat([m.a(x).relu(), m.c(m.b(x).relu()), m.e(m.d(x).relu()), m.f(F.max_pool2d(x, 3, 1, 1))], 1)
    return m.g(x), F.avg_pool2d(x, 2)


def _dense(m: Any, x: Any) -> Any:
    features = [m.stem(x)]
    for bn, conv in ((m.b1, m.c1), (m.b2, m.c2)):
        features.append(conv(bn(torch.cat(features, 1)).relu()))
    return torch.cat(features, 1)


def _shuffled(m: Any, x: Any) -> Any:
    x = m.stem(x)
    left, right = x.chunk(2, 1)
    return m.last(F.channel_shuffle(torch.cat([left, m.b(m.a(right).relu())], 1), 2))


# name -> model, plans on the CUDA backend, what torch runs there
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, list[str]]] = {
    "plain": (_plain, 1, []),
    "residual": (
        lambda: Applied(_residual, stem=_conv(3, 16), a=_conv(16, 32, 1), b=_conv(32, 32, stride=2), short=_conv(16, 32, 1, stride=2),
                        c=_conv(32, 32, groups=8), d=_conv(32, 32, 1), fc=nn.Linear(32, 7)), 1, []),
    "concatenations": (
        lambda: Applied(_inception, stem=_conv(3, 16), a=_conv(16, 8, 1), b=_conv(16, 4, 1), c=_conv(4, 12),
                        d=_conv(16, 5, 1), e=_conv(5, 8, 5), f=_conv(16, 4, 1), g=_conv(32, 16)), 1, []),
    "dense block": (
        lambda: Applied(_dense, stem=_conv(3, 8), b1=nn.BatchNorm2d(8), c1=_conv(8, 4), b2=nn.BatchNorm2d(12), c2=_conv(12, 4)),
        1, []),
    "depthwise, shuffled": (
        lambda: Applied(_shuffled, stem=_conv(3, 12), a=_conv(6, 6, groups=6), b=_conv(6, 6, 1), last=_conv(12, 8, 1)), 1, []),
    "torch between": (
        lambda: nn.Sequential(_conv(3, 8), nn.GELU(), _conv(8, 8, 1), nn.SiLU(), nn.AdaptiveMaxPool2d(2)), 3,
        ["aten.gelu.default", "aten.silu.default"]),
}  # fmt: skip


def _model(name: str) -> nn.Module:
    """In evaluation, with statistics that a fold could get wrong."""
    torch.manual_seed(0)
    model = NETWORKS[name][0]()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for tensor, low, high in ((m.weight, 0.5, 1.5), (m.bias, -0.3, 0.3), (m.running_mean, -0.2, 0.2)):
                tensor.data.uniform_(low, high)  # type: ignore[union-attr]
            m.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return model.eval()


def _on(backend: str) -> contextlib.ExitStack:
    """Within it a backend serves, with the accuracy of fp32."""
    if backend == "cuda" and process.cuda.ABSENT:
        pytest.skip(process.cuda.ABSENT)
    stack = contextlib.ExitStack()
    stack.enter_context(torch.no_grad())
    stack.enter_context(cnnfast.backend(backend))
    stack.enter_context(cnnfast.precision("fp32"))
    return stack


def _leaves(result: Any) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]


def _check(found: Any, model: nn.Module, x: torch.Tensor) -> None:
    """As near to float64 as torch at the same dtype, three times over, and a rounding of the result."""
    x = x.cpu()
    exact = copy.deepcopy(model).double()(x.double())
    own = copy.deepcopy(model).to(x.dtype)(x)
    for y, a, b in zip(_leaves(found), _leaves(exact), _leaves(own), strict=True):
        assert (y.shape, y.dtype) == (b.shape, b.dtype)
        error, allowed = (y.cpu().double() - a).norm(), (b.double() - a).norm()
        bound = 3 * allowed + torch.finfo(x.dtype).eps * a.norm()
        assert error <= bound, f"error {error / a.norm():.2e}, torch's {allowed / a.norm():.2e}"


def _plans(program: Program) -> list[Any]:
    return [step.plan for step in program.steps if isinstance(step, Segment)]


@on_a_gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, backend: str) -> None:
    """Each structure: on the CUDA kernels as few plans as torch's operators leave, on Triton's one operator after another."""
    model, x = _model(name), torch.randn(2, 3, 13, 11)
    _, plans, others = NETWORKS[name]
    process.schedule(name)
    with _on(backend):
        fused = cnnfast.fuse(copy.deepcopy(model).to(DEVICE))
        _check(fused(x.to(DEVICE)), model, x)
        (program,) = fused.programs
        listed = [call.name for call in program.calls if call.reason and not call.ours]
        if backend == "cuda":
            assert len(_plans(program)) == plans, fused.report()
            assert not any(call.ours for call in program.calls), fused.report()
            assert listed == others, fused.report()
            assert all(kernel.startswith("cuda.") for kernel in program.kernels)
        elif backend == "triton":
            assert not _plans(program)
            assert set(others) <= set(listed) <= {*others, "aten.cat.default", "aten.channel_shuffle.default"}
            assert any(call.ours for call in program.calls)
            assert "no backend runs plans" in fused.report()


def _inverted(m: Any, x: Any) -> Any:
    y = F.relu6(m.a(x))
    return (m.b(y) + y).relu()


@on_a_gpu
@pytest.mark.skipif(process.INTERPRETED, reason="the CUDA backend's")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_depthwise_layers_are_one_kernel_each(dtype: torch.dtype) -> None:
    """With batch norm, activation and residual in its epilogue."""
    torch.manual_seed(0)
    model = Applied(_inverted, a=_conv(24, 24, stride=2, groups=24), b=_conv(24, 24, 5, groups=24)).eval().to(dtype)
    x = torch.randn(2, 24, 13, 11, dtype=dtype)
    with _on("cuda"):
        fused = cnnfast.fuse(copy.deepcopy(model).to(DEVICE), x.to(DEVICE))
        _check(fused(x.to(DEVICE)), model, x)
        assert set(fused.programs[0].kernels) == {"cuda.conv2d_depthwise"}, fused.report()
        assert len(fused.programs[0].kernels) == 2


@on_a_gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_batches_layouts_and_dtypes(backend: str) -> None:
    """From one fused model: batches that come, channels_last, slices of larger tensors, other numbers of pixels."""
    model = _model("residual")
    with _on(backend):
        fused = cnnfast.fuse(copy.deepcopy(model).to(DEVICE))
        given = [
            torch.randn(1, 3, 1, 1), torch.randn(3, 4, 9, 17)[:, 1:, :, 1::2], torch.randn(1, 3, 9, 8),
            torch.randn(3, 3, 9, 8).to(memory_format=CL),
        ]  # fmt: skip
        for x in given[: 2 if process.INTERPRETED or process.CHECKED else 4]:
            _check(fused(x.to(DEVICE)), model, x)
        x = torch.randn(2, 3, 9, 8).bfloat16()
        half = copy.deepcopy(model).bfloat16()
        _check(cnnfast.fuse(copy.deepcopy(half).to(DEVICE))(x.to(DEVICE)), half, x)


@on_a_gpu
@pytest.mark.skipif(process.INTERPRETED, reason="Triton has no native module: its launches are Python's")
def test_a_plan_is_one_native_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _model("torch between"), torch.randn(2, 3, 13, 11)
    with _on("cuda"):
        fused = cnnfast.fuse(copy.deepcopy(model).to(DEVICE), x.to(DEVICE), cuda_graph=False)
        calls = []
        for plan in _plans(fused.programs[0]):
            native = plan._native

            class Counting:
                workspace = native.workspace

                def run(self, *args: Any, native: Any = native) -> None:
                    calls.append(args)
                    native.run(*args)

            monkeypatch.setattr(plan, "_native", Counting())
        _check(fused(x.to(DEVICE)), model, x)
        assert len(calls) == 3


def _misaligned(x: torch.Tensor) -> torch.Tensor:
    """The same in channels_last, one element behind an address that vectors may begin at."""
    like = x.to(memory_format=CL)
    return x.new_empty(x.numel() + 1)[1:].as_strided(like.shape, like.stride()).copy_(x)


@on_a_gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_addresses_that_vectors_may_not_begin_at(backend: str) -> None:
    """Of an input, of a slice of a batch, of a weight."""
    torch.manual_seed(0)
    model = Applied(
        lambda m, x: m.b(m.a(x)[1:]) + m.c(x[1:]), a=nn.Conv2d(4, 5, 1), b=nn.Conv2d(5, 8, 3), c=nn.Conv2d(4, 8, 3)
    )
    model.c.weight.data = _misaligned(model.c.weight.data)
    x = torch.randn(3, 4, 5, 3)
    with _on(backend):
        moved = copy.deepcopy(model).eval().to(DEVICE)
        moved.c.weight.data = _misaligned(moved.c.weight.data)
        fused = cnnfast.fuse(moved)
        for given in (x, _misaligned(x)):
            given = _misaligned(given.to(DEVICE)) if given.data_ptr() % 16 else given.to(DEVICE)
            _check(fused(given), model.eval(), x)


@on_a_gpu
@pytest.mark.skipif(process.INTERPRETED, reason="plans are native")
def test_copies_where_they_pay() -> None:
    """A kernel that wants whole images and copies from and to slices, where it and they are predicted to be faster."""
    torch.manual_seed(0)

    def pieces(m: Any, x: Any) -> Any:
        y = m.a(x)
        return m.d(torch.cat([m.b(y[:, :64]), m.c(y[:, 64:])], 1))

    model = Applied(
        pieces, a=nn.Conv2d(4, 128, 1), b=nn.Conv2d(64, 64, 3), c=nn.Conv2d(64, 64, 3), d=nn.Conv2d(128, 8, 1)
    ).eval()
    found = {}
    with _on("cuda"):
        for size in (4, 24):
            x = torch.randn(1, 4, size, size)
            fused = cnnfast.fuse(copy.deepcopy(model).to(DEVICE), x.to(DEVICE))
            _check(fused(x.to(DEVICE)), model, x)
            found[size] = fused.programs[0].kernels
    assert "cuda.batch_norm" not in found[4]
    assert "cuda.conv2d_direct" in found[4]
    assert found[24].count("cuda.batch_norm") == 4
    assert "cuda.conv2d_direct" not in found[24]


@on_a_gpu
@pytest.mark.skipif(process.INTERPRETED, reason="plans are native")
def test_weights_lie_as_kernels_read_them_and_once() -> None:
    """Implicit GEMMs read weights in channels_last: laid out once for all shapes, and the model's own are let go."""
    torch.manual_seed(0)
    model = nn.Sequential(_conv(8, 64), nn.ReLU(), _conv(64, 64, 5), nn.ReLU(), _conv(64, 64, 1)).eval()
    size = sum(t.nbytes for t in model.state_dict().values())
    reference = copy.deepcopy(model)
    with _on("cuda"):
        fused = cnnfast.fuse(model.to(DEVICE), torch.randn(1, 8, 9, 9, device=DEVICE), inplace=True)
        assert any("implicit_gemm" in kernel for kernel in fused.programs[0].kernels)
        for shape in ((1, 8, 9, 9), (2, 8, 7, 5)):
            x = torch.randn(shape)
            _check(fused(x.to(DEVICE)), reference, x)
        assert fused.weight_bytes <= 1.05 * size, fused.report()


@on_a_gpu
@pytest.mark.parametrize("freeze", [False] if process.INTERPRETED or process.CHECKED else [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(backend: str, freeze: bool) -> None:
    """Parameters as inputs, which kernels want in another layout than they come; a change of one is seen."""
    from cnnfast.graph.backend import backend as compiler

    torch._dynamo.reset()
    model = _model("residual")
    moved = copy.deepcopy(model).to(DEVICE)
    with _on(backend):
        compiled = torch.compile(moved, backend=compiler, options={"freeze": freeze, "cuda_graph": freeze})
        x = torch.randn(2, 3, 9, 8)
        for _ in range(3):
            _check(compiled(x.to(DEVICE)), model, x)
        if not freeze:
            for each in (model, moved):
                each.b[0].weight.mul_(-1)
            _check(compiled(x.to(DEVICE)), model, x)
    torch._dynamo.reset()


# ---- on a card: CUDA graphs -------------------------------------------------------------------------------------------


@on_a_card
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_recorded(name: str, backend: str) -> None:
    """Equal results, call after call and for several batches in turns; the caller's own, whatever is called next."""
    model = _model(name)
    with _on(backend):
        moved = copy.deepcopy(model).to(DEVICE)
        fused, plain = cnnfast.fuse(moved), cnnfast.fuse(moved, cuda_graph=False)
        inputs = [torch.randn(1 + i % 3, 3, 13, 11, device=DEVICE) for i in range(9)]
        results = [_leaves(fused(x)) for x in inputs]
        expected = [_leaves(plain(x)) for x in inputs]
        for found, step_by_step in zip(results, expected, strict=True):
            for a, b in zip(found, step_by_step, strict=True):
                assert torch.equal(a, b)
        assert fused.report().count("launched as a CUDA graph") == 3, fused.report()
        assert "CUDA graph" not in plain.report()
        _check(results[-1], model, inputs[-1])


@on_a_card
def test_recorded_and_called_on_other_streams() -> None:
    """From several threads, each with a stream of its own; inputs are made, and results read, on that stream."""
    model = _model("residual")
    with _on("auto"):
        fused = cnnfast.fuse(copy.deepcopy(model).to(DEVICE))
        inputs = [torch.randn(1 + i % 2, 3, 33, 31) for i in range(6)]
        expected = [fused(x.to(DEVICE)).cpu() for x in inputs]

    def work(x: torch.Tensor, y: torch.Tensor) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                assert torch.equal(fused(x.to(DEVICE)).cpu(), y)

    with cnnfast.precision("fp32"):
        in_threads(work, zip(inputs, expected, strict=True))
    assert "CUDA graph" in fused.report()


@on_a_card
def test_within_a_recording_of_the_callers() -> None:
    model = _model("plain")
    with _on("auto"):
        fused = cnnfast.fuse(copy.deepcopy(model).to(DEVICE))
        x = torch.randn(2, 3, 13, 11, device=DEVICE)
        for _ in range(2):
            fused(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = fused(x)
        x.copy_(torch.randn(2, 3, 13, 11))
        graph.replay()
        _check(y, model, x)


@on_a_card
def test_what_cannot_be_recorded_runs() -> None:
    """An operator that synchronises beyond what the graph tells: the reason is listed, and later calls go on."""
    failing = torch.library.Library("cnnfast_test_gpu", "DEF")
    failing.define("waits(Tensor x) -> Tensor")
    failing.impl("waits", lambda x: x * float(x.abs().max()), "CUDA")
    torch.library.register_fake("cnnfast_test_gpu::waits", torch.empty_like, lib=failing)
    model = (
        Applied(lambda m, x: torch.ops.cnnfast_test_gpu.waits(m.a(x)).relu(), a=nn.Conv2d(3, 8, 3)).eval().to(DEVICE)
    )
    x = torch.randn(2, 3, 13, 11, device=DEVICE)
    with _on("auto"), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        fused = cnnfast.fuse(model)
        for _ in range(4):
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)
        assert "no CUDA graph: " in fused.report()
        other = cnnfast.fuse(_model("plain").to(DEVICE))
        for _ in range(3):
            other(x)
        assert "launched as a CUDA graph" in other.report()
