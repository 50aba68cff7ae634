"""Everything that records or rewrites a program: compile, export, ONNX, tracing, FX, autocast, checkpointing."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from support import process
from support.functions import FUNCTIONS, Function
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import cnnfast
from cnnfast import functional

pytestmark = [
    pytest.mark.skipif(process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


class Net(nn.Module):
    """Three convolutions of different kinds, with what usually stands between them."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.a = conv(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.b = conv(8, 8, 3, stride=2, padding=1, groups=4)
        self.c = conv(8, 6, (1, 3), padding="same")
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        x = torch.relu(self.bn(self.a(x)))
        x = torch.relu(self.c(x + torch.nn.functional.interpolate(self.b(x), size=x.shape[2:])))
        return self.head(x.mean((2, 3)))


def _pair() -> tuple[Net, Net]:
    torch.manual_seed(0)
    ours, theirs = Net(cnnfast.Conv2d), Net(nn.Conv2d)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def _step(net: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of the input and all parameters."""
    x = x.clone().requires_grad_()
    module = getattr(net, "_orig_mod", net)
    module.zero_grad()
    out = net(x)
    out.square().sum().backward()
    return [out.detach().clone(), x.grad, *[p.grad.clone() for p in module.parameters()]]  # type: ignore[list-item]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---- torch.compile ---------------------------------------------------------------------------------------------------

COMPILED: dict[str, dict[str, Any]] = {
    "eager": {"backend": "eager"},
    "aot_eager, static": {"backend": "aot_eager", "dynamic": False},
    "aot_eager, dynamic": {"backend": "aot_eager", "dynamic": True},
    "inductor, static": {"dynamic": False},
    "inductor, dynamic": {"dynamic": True},
    "inductor, reduce-overhead": {"mode": "reduce-overhead"},
}


@pytest.mark.parametrize("name", COMPILED)
def test_compile(name: str) -> None:
    """One graph without breaks; results and gradients are torch's, for changing sizes, in training and eval."""
    ours, theirs = _pair()
    compiled = torch.compile(ours, fullgraph=True, **COMPILED[name])
    sizes = [(2, 9, 8), (3, 9, 8), (5, 12, 11)] if "dynamic" in name or "inductor" not in name else [(2, 9, 8)]
    for n, h, w in sizes:
        x = torch.randn(n, 3, h, w)
        for net in (ours, theirs):
            net.train()
        assert_close(_step(compiled, x), _step(theirs, x), rtol=1e-4, atol=1e-4)
        last = x.to(memory_format=torch.channels_last)
        for net in (ours, theirs):
            net.eval()
        with torch.no_grad():
            assert_close(compiled(last), theirs(last), rtol=1e-4, atol=1e-4)


def test_compile_dynamic_does_not_recompile() -> None:
    """Sizes that only differ in symbols share one graph."""
    conv = cnnfast.Conv2d(3, 4, 3, padding=1)
    import torch._dynamo.testing

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(conv, fullgraph=True, dynamic=True, backend=counter)
    for n, h, w in ((2, 8, 9), (3, 8, 9), (4, 11, 7), (7, 23, 30)):
        x = torch.randn(n, 3, h, w)
        assert_close(compiled(x), conv(x))
    assert counter.frame_count == 1


def test_compiled_graph_holds_our_operators() -> None:
    seen: list[str] = []

    def look(gm: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(n.target) for n in gm.graph.nodes if n.op == "call_function")
        return gm.forward

    from torch._dynamo.backends.common import aot_autograd

    conv = cnnfast.Conv2d(3, 4, 3)
    compiled = torch.compile(conv, fullgraph=True, backend=aot_autograd(fw_compiler=look, bw_compiler=look))
    compiled(torch.randn(2, 3, 6, 6, requires_grad=True)).sum().backward()
    for name in ("conv2d.default", "conv2d_dgrad.default", "conv2d_wgrad.default", "conv2d_bgrad.default"):
        assert f"cnnfast.{name}" in seen
    assert not any("aten.convolution" in s for s in seen)


def test_compiled_graphs_obey_the_settings() -> None:
    """A graph holds the settings it was traced with; under others it is traced again, not silently wrong."""
    conv = cnnfast.Conv2d(3, 4, 3)
    targets: list[Any] = []

    def look(gm: torch.fx.GraphModule, _: Any) -> Any:
        targets.append(next(n.args for n in gm.graph.nodes if "cnnfast" in str(n.target)))
        return gm.forward

    compiled = torch.compile(conv, fullgraph=True, backend=look)
    x = torch.randn(1, 3, 6, 6)
    compiled(x)
    with cnnfast.backend("aten"), cnnfast.precision("ieee"):
        compiled(x)
    compiled(x)
    assert len(targets) == 2
    assert targets[0][-3:] == ("fp32", "auto", False)
    assert targets[1][-3:] == ("ieee", "aten", False)


def test_compile_of_autocast() -> None:
    ours, theirs = _pair()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = compiled(x), theirs(x)
    assert a.dtype == b.dtype == torch.bfloat16
    assert_close(a, b, rtol=0.05, atol=0.05)


# ---- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export(strict: bool) -> None:
    """torch.export with a dynamic batch: our operators are nodes; saved and loaded it gives the same."""
    ours, theirs = _pair()
    ours.eval(), theirs.eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(ours, (torch.randn(4, 3, 9, 8),), dynamic_shapes=({0: batch},), strict=strict)
    names = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert names.count("cnnfast.conv2d.default") == 3, names
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    for exported in (program.module(), torch.export.load(buffer).module(), program.run_decompositions().module()):
        for n in (2, 7):
            x = torch.randn(n, 3, 9, 8)
            assert_close(exported(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_export_under_aten_is_portable() -> None:
    """Under backend("aten") the exported program still runs anywhere cnnfast is; its operator says aten."""
    conv = cnnfast.Conv2d(3, 4, 3).eval()
    with cnnfast.backend("aten"):
        program = torch.export.export(conv, (torch.randn(2, 3, 6, 6),))
    node = next(n for n in program.graph.nodes if "conv" in str(n.target))
    assert "cnnfast" not in str(node.target) or "aten" in node.args


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_onnx_has_standard_nodes(dynamo: bool) -> None:
    """ONNX files hold Conv nodes, and a runtime, where there is one, gives the same numbers."""
    onnx = pytest.importorskip("onnx")
    if dynamo:
        pytest.importorskip("onnxscript")
    net = nn.Sequential(
        cnnfast.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), cnnfast.Conv2d(8, 4, 3, groups=2)
    ).eval()
    x = torch.randn(2, 3, 12, 11)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            program = torch.onnx.export(net, (x,), dynamo=True, verbose=False)
            assert program is not None
            program.save(buffer)
        else:
            torch.onnx.export(net, (x,), buffer, dynamo=False, verbose=False)
    model = onnx.load_from_string(buffer.getvalue())
    types = [n.op_type for n in model.graph.node]
    assert types.count("Conv") == 2, types
    assert not [n for n in model.graph.node if n.domain not in ("", "ai.onnx")], types
    runtime = pytest.importorskip("onnxruntime", reason="the file is right; no runtime here to run it")
    session = runtime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(out), net(x), rtol=1e-4, atol=1e-4)


# ---- tracing, FX -----------------------------------------------------------------------------------------------------


def test_jit_trace() -> None:
    """A traced module holds standard operators, and runs where cnnfast isn't installed."""
    ours, theirs = _pair()
    ours.eval(), theirs.eval()
    x = torch.randn(2, 3, 9, 8)
    traced = torch.jit.trace(ours, x)
    assert not [n.kind() for n in traced.inlined_graph.nodes() if n.kind().startswith("cnnfast")]
    assert sum(n.kind() == "aten::_convolution" for n in traced.inlined_graph.nodes()) >= 2
    assert_close(traced(torch.randn(2, 3, 9, 8).fill_(0.5)), theirs(torch.full((2, 3, 9, 8), 0.5)))
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    assert_close(torch.jit.load(buffer)(x), theirs(x))


SCRIPTED: list[tuple[Any, tuple[int, ...], int]] = [
    (lambda: cnnfast.Conv2d(4, 6, 3, 2, 1, groups=2), (2, 4, 9, 8), 1),
    (lambda: cnnfast.Conv2d(4, 6, (3, 4), padding="same", bias=False), (4, 9, 8), 1),
    (lambda: cnnfast.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), (2, 4, 9, 8), 1),
    (lambda: cnnfast.Conv1d(4, 6, 3), (2, 4, 9), 1),
    (lambda: cnnfast.ConvTranspose2d(4, 6, 3, 2), (2, 4, 5, 4), 1),
    (lambda: cnnfast.MaxPool2d(3, 2, 1), (2, 4, 9, 8), 1),
    (lambda: cnnfast.AvgPool2d(3, 2, 1), (2, 4, 9, 8), 1),
    (lambda: cnnfast.AdaptiveAvgPool2d((2, 3)), (2, 4, 9, 8), 1),
    (lambda: cnnfast.AdaptiveMaxPool2d(2), (2, 4, 9, 8), 1),
    (lambda: cnnfast.BatchNorm2d(4), (2, 4, 9, 8), 1),
    *((lambda a=a: cnnfast.AddAct(a), (2, 4, 9, 8), 2) for a in ("none", "relu", "relu6", "leaky_relu")),
    (lambda: cnnfast.ConvBNAct(4, 4, 3), (2, 4, 9, 8), 2),
    (lambda: torch.nn.Sequential(cnnfast.Conv2d(4, 6, 3), cnnfast.BatchNorm2d(6), cnnfast.MaxPool2d(2)), (2, 4, 9, 8), 1),
]  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("make", "shape", "count"), SCRIPTED)
def test_torchscript(make: Any, shape: tuple[int, ...], count: int, training: bool) -> None:
    """Every module can be compiled and traced for TorchScript, to torch's own operators; what was given stays ours."""
    torch.manual_seed(0)
    module, inputs = make().train(training), [torch.randn(shape) for _ in range(count)]
    before = copy.deepcopy(module)
    classes = [type(m) for m in module.modules()]
    compiled = [torch.jit.script(copy.deepcopy(module))]
    if not training:  # a trace of batch norm in training would hold the batch's share of the running statistics
        compiled.append(torch.jit.trace(copy.deepcopy(module), tuple(inputs)))
    for scripted in compiled:
        assert "cnnfast::" not in str(scripted.inlined_graph)
        buffer = io.BytesIO()
        torch.jit.save(scripted, buffer)
        buffer.seek(0)
        assert_close(torch.jit.load(buffer)(*inputs), before(*inputs), rtol=1e-4, atol=1e-5)
        before = copy.deepcopy(module)
    torch.jit.script(module)
    assert [type(m) for m in module.modules()] == classes


def test_fx_symbolic_trace() -> None:
    """Traced through, functional.conv2d is one node; as a leaf, the module is one."""
    ours, theirs = _pair()
    ours.eval(), theirs.eval()
    x = torch.randn(2, 3, 9, 8)

    class Leaf(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return isinstance(m, cnnfast.Conv2d) or super().is_leaf_module(m, name)

    through, leaves = torch.fx.Tracer().trace(ours), Leaf().trace(ours)
    assert sum(n.target is functional.conv2d for n in through.nodes) == 3
    assert sum(n.op == "call_module" and n.target in ("a", "b", "c") for n in leaves.nodes) == 3
    for graph in (through, leaves):
        assert_close(torch.fx.GraphModule(ours, graph)(x), theirs(x))


def test_make_fx() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    x, w = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3)
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(lambda x, w: functional.conv2d(x, w, padding=1), tracing_mode=mode)(x, w)
        assert any("cnnfast.conv2d" in str(n.target) for n in graph.graph.nodes), mode


def test_feature_extractor() -> None:
    torchvision = pytest.importorskip("torchvision")
    from torchvision.models.feature_extraction import create_feature_extractor

    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=3).eval()
    ours = copy.deepcopy(theirs)
    _swap(ours)
    x = torch.randn(1, 3, 64, 64)
    layers = ["conv1", "layer2.0.conv2", "layer4"]
    a, b = (create_feature_extractor(net, layers)(x) for net in (ours, theirs))
    assert_close(a, b, rtol=1e-3, atol=1e-3)


def _swap(net: nn.Module) -> None:
    """Puts our convolutions into a network, on the same parameters."""
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Conv2d:
                new = cnnfast.Conv2d.__new__(cnnfast.Conv2d)
                new.__dict__ = child.__dict__
                setattr(parent, name, new)


# ---- poolings --------------------------------------------------------------------------------------------------------

POOLINGS = [f for f in FUNCTIONS if "pool" in f.name]
pooling = pytest.mark.parametrize("f", POOLINGS, ids=str)


class Pooling(nn.Module):
    """A pooling between two other operations."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Twice the pooling of x + 1."""
        return self.function(x + 1) * 2


@pooling
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_poolings(f: Function, dynamic: bool) -> None:
    """One graph, dynamic sizes share it; results and gradients are those of the uncompiled call."""
    import torch._dynamo.testing

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    net = Pooling(f.ours)
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic, backend=counter)
    for larger in (0, 2, 5) if dynamic else (0,):
        (x,) = f.tensors(torch.float32)
        x = torch.nn.functional.pad(x, (0, larger, 0, larger)).requires_grad_()
        results = []
        for function in (compiled, net):
            out = function(x)
            results.append((out, *torch.autograd.grad(out.square().sum(), x)))
        assert_close(*results)
    assert counter.frame_count == 1 or "ceil" in f.name  # whose size depends on where the last window starts


@pooling
def test_export_poolings(f: Function) -> None:
    """The graph holds our operator; with a dynamic batch where there is one."""
    (x,) = f.tensors(torch.float32)
    batch = {0: torch.export.Dim("batch", min=2)} if x.dim() == 4 else None
    sample = torch.cat([x, x, x]) if x.dim() == 4 else x
    exported = torch.export.export(Pooling(f.ours), (sample,), dynamic_shapes=(batch,))
    assert any(str(n.target).startswith(f"cnnfast.{f.name.split()[0]}") for n in exported.graph.nodes)
    again = torch.cat([x, x]) if x.dim() == 4 else x
    assert_close(exported.module()(again), Pooling(f.torchs)(again))


@pooling
def test_autocast_leaves_poolings_as_torch_does(f: Function) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        (x,) = f.tensors(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = f.ours(x), f.torchs(x)
        assert ours.dtype == theirs.dtype
        assert_close(ours, theirs)


# ---- autocast, checkpointing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """Under autocast dtypes of results and gradients are torch's, a float64 stays, disabled regions are respected."""
    x, w, b = torch.randn(2, 4, 8, 8), torch.randn(6, 4, 3, 3), torch.randn(6)
    results = []
    for conv in (functional.conv2d, torch.nn.functional.conv2d):
        a, c, d = (t.clone().requires_grad_() for t in (x, w, b))
        with torch.autocast("cpu", dtype):
            out = conv(a, c, d, padding=1)
            mixed = conv(a.to(dtype), c, d, padding=1)
            with torch.autocast("cpu", enabled=False):
                full = conv(a, c, d, padding=1)
            wide = conv(x.double(), w.double(), b.double())
        out.float().square().sum().backward()
        results.append((out, mixed, full, wide, a.grad, c.grad, d.grad))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.stride() == theirs.stride()
        size = float(theirs.double().abs().max())
        tolerance = 1e-5 if ours.dtype == torch.float64 else 0.02
        assert float((ours.double() - theirs.double()).abs().max()) <= tolerance * size


def test_autocast_sees_changed_weights() -> None:
    """autocast keeps its casts of weights while it is active; a change between two contexts is seen."""
    conv = cnnfast.Conv2d(3, 4, 3, bias=False)
    x = torch.randn(1, 3, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        before = conv(x)
    with torch.no_grad():
        conv.weight.mul_(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(conv(x), before * 2)
        conv.weight.data.mul_(2)  # torch's own cache would keep the old cast here for a weight that needs a gradient
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(conv(x), before * 4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    ours, theirs = _pair()
    ours.eval(), theirs.eval()
    x = torch.randn(2, 3, 9, 8)
    results = []
    for net, run in ((ours, lambda n, t: checkpoint(n, t, use_reentrant=reentrant)), (theirs, lambda n, t: n(t))):
        a = x.clone().requires_grad_()
        out = run(net, a)
        out.square().sum().backward()
        results.append([out.detach(), a.grad, *[p.grad for p in net.parameters()]])
    assert_close(*results, rtol=1e-4, atol=1e-4)


def test_saved_tensor_hooks_see_what_is_saved() -> None:
    """Offloading and compression of activations work through hooks: input and weight are saved, nothing else."""
    packed: list[torch.Size] = []
    x, w = torch.randn(2, 3, 6, 6, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)

    def pack(t: torch.Tensor) -> torch.Tensor:
        packed.append(t.shape)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        functional.conv2d(x, w, torch.randn(4, requires_grad=True)).sum().backward()
    assert sorted(packed) == sorted([x.shape, w.shape])
    packed.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        functional.conv2d(x.detach(), w).sum().backward()
    assert packed == [x.shape]
