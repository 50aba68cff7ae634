"""Whole networks: every pass by what it makes of a small model, then networks, shapes, and what a fused model refuses."""

from __future__ import annotations

import copy
import importlib.metadata
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.running import Applied, in_threads
from torch import nn

import cnnfast
from cnnfast.graph.backend import backend
from cnnfast.graph.program import Program


def _randomise(model: nn.Module) -> nn.Module:
    """In evaluation, with statistics that a fold could get wrong."""
    generator = torch.Generator().manual_seed(1)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in ((m.weight, 0.5, 1.5), (m.bias, -0.3, 0.3), (m.running_mean, -0.2, 0.2)):
                if tensor is not None:
                    tensor.data.uniform_(low, high, generator=generator)
            if m.running_var is not None:
                m.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def _near(out: torch.Tensor, expected: torch.Tensor, exact: torch.Tensor | None = None) -> None:
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype
    bound = 1e-5 if out.dtype in (torch.float32, torch.float64) else 2e-2
    error = (out.double() - expected.double()).norm() / expected.double().norm()
    assert error <= bound, f"relative error {error:.2e}"


class Scale(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.rand(1, c, 1, 1))

    def forward(self, x: Any) -> Any:
        return x * self.factors


def _conv(c: int, k: int, size: int = 3, **kw: Any) -> nn.Conv2d:
    return nn.Conv2d(c, k, size, **{"padding": size // 2, **kw})


def _se(m: Any, x: Any) -> Any:
    x = m.act(m.bn(m.conv(x)))
    gate = m.down(F.adaptive_avg_pool2d(x, 1)).relu()
    return x * torch.sigmoid(m.up(gate))


def _inception(m: Any, x: Any) -> Any:
    return torch.cat([m.a(x).relu(), m.c(m.b(x).relu()), m.e(m.d(x).relu()), m.f(F.max_pool2d(x, 3, 1, 1))], 1)


def _dense(m: Any, x: Any) -> Any:
    features = [m.stem(x)]
    for bn, conv in ((m.b1, m.c1), (m.b2, m.c2), (m.b3, m.c3)):
        features.append(conv(bn(torch.cat(features, 1)).relu()))
    return torch.cat(features, 1).mean((2, 3))


def _twice(m: Any, x: Any) -> Any:
    y = m.conv(x)
    return m.bn(y).relu() + m.conv(y.relu())


ACTIVATIONS = (nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.Hardswish(), nn.Sigmoid(), nn.Hardsigmoid(), nn.LeakyReLU())
INPLACE = (nn.ReLU(True), nn.ReLU6(True), nn.SiLU(True), nn.Hardswish(True), nn.LeakyReLU(0.01, True))

# name -> model, kernels, operators by torch
PASSES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "bn": (lambda: nn.Sequential(_conv(5, 7), nn.BatchNorm2d(7)), 1, 0),
    "bn without affine": (lambda: nn.Sequential(_conv(5, 7, bias=False), nn.BatchNorm2d(7, affine=False)), 1, 0),
    "bn alone": (lambda: nn.Sequential(nn.BatchNorm2d(5), nn.ReLU()), 1, 0),
    "grouped": (lambda: nn.Sequential(_conv(5, 10, groups=5), nn.BatchNorm2d(10), nn.ReLU6()), 1, 0),
    "a padded convolution": (lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 2, 0)), nn.Conv2d(5, 6, 3, 2)), 1, 0),
    "same": (lambda: nn.Conv2d(5, 6, (3, 4), padding="same"), 1, 0),
    "residual": (
        lambda: Applied(lambda m, x: (m.b(m.a(x)) + x).relu(), a=_conv(5, 5), b=nn.BatchNorm2d(5)), 1, 0),
    "residual of two": (
        lambda: Applied(lambda m, x: (m.b(m.a(x)) + m.d(m.c(x))).relu(), a=_conv(5, 6), b=nn.BatchNorm2d(6),
                        c=_conv(5, 6, 1), d=nn.BatchNorm2d(6)), 2, 0),
    "residual after an activation": (lambda: Applied(lambda m, x: m.a(x).relu() + x, a=_conv(5, 5)), 2, 0),
    "broadcast sums are torch's": (
        lambda: Applied(lambda m, x: m.a(x) + m.a(x).mean((2, 3), keepdim=True), a=_conv(5, 5)), 3, 1),
    "a multiple as residual": (
        lambda: Applied(lambda m, x: m.a(x) + 2 * m.a(x), a=_conv(5, 5)), 2, 0),
    "squeeze and excite": (
        lambda: Applied(_se, conv=_conv(5, 8), bn=nn.BatchNorm2d(8), act=nn.SiLU(), down=_conv(8, 4, 1), up=_conv(4, 8, 1)),
        5, 0),
    "factors and addends": (
        lambda: Applied(lambda m, x: (m.scale(m.a(x * 2 - 1) / 4) + 0.5).relu(), a=_conv(5, 5), scale=Scale(5)), 2, 0),
    "silu written out": (lambda: Applied(lambda m, x: (y := m.a(x)) * torch.sigmoid(y), a=_conv(5, 5)), 1, 0),
    "concatenation in place, siblings": (
        lambda: Applied(_inception, a=_conv(5, 6, 1), b=_conv(5, 4, 1), c=_conv(4, 3), d=_conv(5, 2, 1), e=_conv(2, 7, 5),
                        f=_conv(5, 3, 1)), 6, 0),
    "dense block": (
        lambda: Applied(_dense, stem=_conv(5, 6), b1=nn.BatchNorm2d(6), c1=_conv(6, 3), b2=nn.BatchNorm2d(9),
                        c2=_conv(9, 3), b3=nn.BatchNorm2d(12), c3=_conv(12, 3)), 8, 0),
    "an input concatenated": (lambda: Applied(lambda m, x: torch.cat([x, m.a(x), x], 1), a=_conv(5, 4)), 3, 0),
    "concatenated twice": (
        lambda: Applied(lambda m, x: torch.cat([m.b(torch.cat([y := m.a(x), y * 2], 1)), y], 1), a=_conv(5, 4),
                        b=_conv(8, 3)), 4, 0),
    "slices": (lambda: Applied(lambda m, x: m.b(m.a(x)[:, 2:5]) + m.a(x).chunk(3, 1)[1], a=_conv(5, 9), b=_conv(3, 3)), 3, 0),
    "flattened": (
        lambda: nn.Sequential(nn.MaxPool2d(3, 2), nn.Flatten(), nn.LazyLinear(20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 7)),
        4, 0),
    "pools": (lambda: nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, 1), nn.AdaptiveAvgPool2d((3, 2))), 3, 0),
    "pooled to its own size": (lambda: nn.Sequential(_conv(5, 6), nn.AdaptiveAvgPool2d((11, 13))), 1, 0),
    "shared": (lambda: nn.Sequential(c := _conv(5, 5), nn.BatchNorm2d(5), nn.ReLU(), c, nn.BatchNorm2d(5)), 2, 0),
    "reused, normed on one path": (lambda: Applied(_twice, conv=_conv(5, 5), bn=nn.BatchNorm2d(5)), 4, 0),
    "standardised weights": (
        lambda: Applied(lambda m, x: F.conv2d(x, (m.a.weight - m.a.weight.mean((1, 2, 3), keepdim=True)) * 2), a=_conv(5, 6)),
        1, 0),
    "torch between": (lambda: nn.Sequential(_conv(5, 8), nn.GroupNorm(2, 8), nn.GELU(), _conv(8, 5), nn.ReLU()), 2, 2),
    "transposed": (lambda: nn.Sequential(_conv(5, 4), nn.ConvTranspose2d(4, 3, 2, 2), nn.ReLU()), 2, 1),
    **{f"{type(a).__name__}": ((lambda a=a: nn.Sequential(_conv(5, 7), a, _conv(7, 3))), 2, 0) for a in ACTIVATIONS},
    **{f"{type(a).__name__} in place": ((lambda a=a: nn.Sequential(_conv(5, 7), a, _conv(7, 3))), 2, 0) for a in INPLACE},
}  # fmt: skip


def _counts(program: Program) -> tuple[int, int]:
    return len(program.kernels), sum(bool(call.reason) for call in program.calls)


@pytest.mark.parametrize("name", PASSES)
def test_passes(name: str) -> None:
    """Equal results, and no more kernels and operators of torch's than the pass is to leave."""
    make, kernels, others = PASSES[name]
    torch.manual_seed(0)
    model = make()
    x = torch.randn(1, 5, 11, 13)
    with torch.no_grad():
        model(x)
        _randomise(model)
        fused = cnnfast.fuse(model, x)
        _near(fused(x), model(x))
        assert _counts(fused.programs[0]) == (kernels, others), fused.report()
        x = torch.randn(3, 5, 11, 13).to(memory_format=torch.channels_last)
        _near(fused(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(_conv(5, 16), nn.BatchNorm2d(16), nn.SiLU(), _conv(16, 8, 1), nn.BatchNorm2d(8), nn.Flatten())
    _randomise(model)
    x = torch.randn(2, 5, 9, 7)
    with torch.no_grad():
        fused = cnnfast.fuse(copy.deepcopy(model).to(dtype))
        _near(fused(x.to(dtype)), model(x).to(dtype))
    assert len(fused.programs[0].kernels) == 3, "two convolutions; the image in flattening's order"


def test_nan_and_infinity_pass() -> None:
    for act in ACTIVATIONS:
        x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 3e38, -3e38, 100.0, -100.0]).reshape(
            1, 1, 2, 4
        )
        identity = nn.Conv2d(1, 1, 1)
        nn.init.ones_(identity.weight)
        nn.init.zeros_(identity.bias)
        model = nn.Sequential(identity, act).eval()
        with torch.no_grad():
            torch.testing.assert_close(cnnfast.fuse(model)(x), model(x), equal_nan=True)


# ---- networks ---------------------------------------------------------------------------------------------------------


def _network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "efficientnet_lite0":
        package = pytest.importorskip("efficientnet_lite_pytorch")
        return _randomise(package.EfficientNet.from_name("efficientnet-lite0"))
    models = pytest.importorskip("torchvision").models
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    return _randomise(models.get_model(name, weights=None, **options))


# name -> kernels: convolutions and fully connected layers, and what isn't in their epilogues
NETWORKS = {
    "resnet18": 21 + 2,
    "googlenet": 58 - 9 + 14,
    "efficientnet_lite0": 50 + 1,
    "mobilenet_v2": 53 + 1,
    "mobilenet_v3_small": None,
    "densenet121": 121 + 62 + 5,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    """One plan each, no operator of torch's; converted and not, at several sizes, from one thread or more."""
    model = _network(name)
    fused = cnnfast.fuse(model)
    converted = cnnfast.convert(copy.deepcopy(model)) if name == "resnet18" else model
    with torch.no_grad():
        for shape in ((3, 3, 70, 96), (1, 3, 64, 64)):
            x = torch.randn(shape)
            _near(fused(x), model(x))
            if name in ("densenet121", "googlenet"):
                break  # capturing takes torch.export its time
        if converted is not model:
            again = cnnfast.fuse(converted)
            _near(again(x), model(x))
            assert again.programs[0].kernels == fused.programs[-1].kernels
    for program in fused.programs:
        assert len(program.steps) == 1, fused.report()
        assert NETWORKS[name] in (None, len(program.kernels)), fused.report()


# ---- a fused model ----------------------------------------------------------------------------------------------------


def _small() -> nn.Module:
    torch.manual_seed(0)
    return _randomise(
        nn.Sequential(
            _conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        )
    )


def test_the_model_is_not_touched() -> None:
    model = _small()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, 8, 8)
    fused = cnnfast.fuse(model, x)
    expected = fused(x)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(fused(x), expected), "its weights are those of the moment when it was fused"
    other = torch.randn(1, 3, 10, 9)
    assert bool(fused(other).any()), "for other shapes, too"
    assert not list(fused.parameters())
    assert not fused.state_dict()


def test_what_fuse_refuses() -> None:
    with pytest.raises(ValueError, match=r"it is in training mode; call model.eval\(\) first"):
        cnnfast.fuse(_small().train())
    partly = _small()
    partly[1].train()
    with pytest.raises(ValueError, match="its part '1' is in training mode"):
        cnnfast.fuse(partly)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        cnnfast.fuse(torch.relu)  # type: ignore[arg-type]
    fused = cnnfast.fuse(_small())
    with pytest.raises(RuntimeError, match="can't be trained"):
        fused.train()
    with pytest.raises(RuntimeError, match="packed where they lie"):
        fused.double()
    with pytest.raises(RuntimeError, match="records no gradients"):
        fused(torch.randn(1, 3, 8, 8, requires_grad=True))
    branching = Applied(lambda m, x: m.a(x) if x.sum() > 0 else x, a=_conv(3, 3)).eval()
    with pytest.raises(NotImplementedError, match=r"torch.export can't capture Applied"):
        cnnfast.fuse(branching)(torch.randn(1, 3, 8, 8))

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Any) -> Any:
            self.calls += 1
            return x.relu()

    with pytest.raises(NotImplementedError, match="writes to"):
        cnnfast.fuse(Counting().eval())(torch.randn(1, 3, 8, 8))
    with cnnfast.strict(), pytest.raises(NotImplementedError, match=r"torch would run\n  aten.gelu"):
        cnnfast.fuse(nn.Sequential(_conv(3, 3), nn.GELU()).eval())(torch.randn(1, 3, 8, 8))
    assert "nothing planned" in fused.report()


def test_arguments_and_results_of_any_structure() -> None:
    class Structured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = _conv(3, 4), _conv(3, 4)

        def forward(self, images: Any, scale: float = 1.0, *, more: Any = None) -> Any:
            y = self.a(images["left"]) * scale
            z = self.b(images["right"]).relu()
            return {"sum": y + z, "parts": [y, z], "same": images["left"], "none": None, "scale": scale, "more": more}

    model = Structured().eval()
    fused = cnnfast.fuse(model)
    images = {"left": torch.randn(1, 3, 6, 7), "right": torch.randn(1, 3, 6, 7)}
    with torch.no_grad():
        for args, kwargs in (((images,), {}), ((images, 2.0), {"more": torch.ones(2)})):
            out, expected = fused(*args, **kwargs), model(*args, **kwargs)
            assert out.keys() == expected.keys()
            _near(out["sum"], expected["sum"])
            _near(out["parts"][0], expected["parts"][0])
            _near(out["parts"][1], expected["parts"][1])
            assert out["none"] is None
            assert out["scale"] == expected["scale"]
            assert torch.equal(out["same"], images["left"])
    assert len(fused.programs) == 2


def test_hooks_and_in_place_operators_keep_their_meaning() -> None:
    model = _small()
    model[0].register_forward_hook(lambda module, args, out: out * 2)
    model[2].register_forward_pre_hook(lambda module, args: (args[0] - 0.1,))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        _near(cnnfast.fuse(model)(x), model(x))

    def views(m: Any, x: Any) -> Any:  # what is written through a view is read by another name
        y = m.a(x)
        y[:, :2].relu_()
        y.view(-1).mul_(2)
        return m.b(y) + y

    model = Applied(views, a=_conv(3, 5), b=_conv(5, 5)).eval()
    with torch.no_grad():
        _near(cnnfast.fuse(model)(x), model(x))


def test_results_are_the_callers() -> None:
    model = Applied(
        lambda m, x: (y := m.a(x), m.b(y).relu(), torch.cat([y, x], 1)), a=_conv(3, 8), b=_conv(8, 8)
    ).eval()
    fused = cnnfast.fuse(model)
    x = torch.randn(2, 3, 9, 9)
    first = fused(x)
    kept = [t.clone() for t in first]
    fused(torch.randn(2, 3, 9, 9))
    for a, b, expected in zip(first, kept, model(x), strict=True):
        assert torch.equal(a, b)
        _near(a, expected)


def test_autocast_and_settings_have_plans_of_their_own() -> None:
    model, x = _small(), torch.randn(2, 3, 8, 8)
    fused = cnnfast.fuse(model)
    with torch.no_grad():
        plain = fused(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert fused(x).dtype == model(x).dtype == torch.bfloat16
        with cnnfast.precision("ieee"):
            _near(fused(x), plain)
    with torch.inference_mode():
        other = torch.randn(1, 3, 8, 8)
        _near(fused(other), model(other))
    with torch.no_grad():
        _near(fused(torch.clone(other)), model(other))
    assert len(fused.programs) == 4


def test_memory_does_not_grow_with_shapes() -> None:
    """Weights are packed once where their packed form is the same; working memory and plans are bounded."""
    fused = cnnfast.fuse(_small())
    for size in range(8, 48):
        fused(torch.randn(1, 3, size, 8))
    assert len(fused.programs) <= 32
    assert len(fused._shared._arenas) == 1
    assert sum(map(len, fused._shared._packed.values())) <= 4


def test_threads() -> None:
    model = _small()
    fused = cnnfast.fuse(model)
    inputs = [torch.randn(1 + i % 3, 3, 8, 8) for i in range(12)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]

    def work(x: torch.Tensor, y: torch.Tensor) -> None:
        for _ in range(20):
            _near(fused(x), y)

    in_threads(work, zip(inputs, expected, strict=True))
    assert len(fused.programs) == 3


def test_pickle_and_deepcopy() -> None:
    x = torch.randn(2, 3, 8, 8)
    fused = cnnfast.fuse(_small(), x)
    for twin in (pickle.loads(pickle.dumps(fused)), copy.deepcopy(fused)):
        assert torch.equal(twin(x), fused(x))
        assert not twin.training
    assert cnnfast.fuse(fused) is fused


# ---- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.fixture
def _fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_the_backend_is_registered() -> None:
    pyproject = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text()
    assert 'cnnfast = "cnnfast.graph.backend:backend"' in pyproject.split("torch_dynamo_backends]")[1].split("[")[0]
    found = importlib.metadata.entry_points(group="torch_dynamo_backends")
    for entry in found:
        if entry.name == "cnnfast":
            assert entry.load() is backend


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.usefixtures("_fresh")
def test_compile(freeze: bool) -> None:
    """Several shapes, then symbolic ones; a changed parameter is seen unless it was promised not to change."""
    torch.manual_seed(0)
    model = _randomise(
        nn.Sequential(
            _conv(3, 8),
            nn.BatchNorm2d(8),
            nn.ReLU(True),
            nn.MaxPool2d(2),
            _conv(8, 8, 1),
            nn.Flatten(),
            nn.LazyLinear(4),
        )
    )
    with torch.no_grad():
        model(torch.randn(1, 3, 8, 8))
        compiled = torch.compile(model, backend=backend, options={"freeze": freeze})
        for n in (2, 3, 5):
            x = torch.randn(n, 3, 8, 8)
            out, expected = compiled(x), model(x)
            _near(out, expected)
            assert out.stride() == expected.stride()
        model[4].weight.mul_(-1)
        if not freeze:
            _near(compiled(x), model(x))
    with pytest.raises(Exception, match="expected options out of freeze"):
        torch.compile(model, backend=backend, options={"fast": True})(torch.randn(1, 3, 8, 8))


@pytest.mark.usefixtures("_fresh")
def test_batch_norms_whose_parameters_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call makes the factors and addends of all of them, where they have both, and one plan is the rest."""
    from cnnfast.graph import backend as module

    programs: list[Program] = []
    original = module.build
    monkeypatch.setattr(module, "build", lambda *args: programs.append(original(*args)) or programs[-1])
    torch.manual_seed(0)
    parts = [
        (nn.Conv2d(5 + i, 6 + i, 1 + 2 * (i % 2), padding=i % 2), nn.BatchNorm2d(6 + i), nn.ReLU()) for i in range(5)
    ]
    model = _randomise(nn.Sequential(*(m for part in parts for m in part)))
    x = torch.randn(2, 5, 9, 8)
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend)
        for _ in range(2):
            _near(compiled(x), model(x))
            for m in model.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.weight.mul_(1.5), m.bias.sub_(0.1), m.running_mean.add_(0.1), m.running_var.mul_(2)
        assert (len(programs[0].kernels), [call.name for call in programs[0].calls]) == (5, ["affine_maps"])
        bare = _randomise(
            nn.Sequential(_conv(5, 6), nn.BatchNorm2d(6, affine=False), _conv(6, 5), nn.BatchNorm2d(5, eps=1e-3))
        )
        _near(torch.compile(bare, backend=backend)(x), bare(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.usefixtures("_fresh")
def test_compile_with_gradients(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, gradients and running statistics are eager's; convolutions, poolings and batch norm are our operators."""
    torch.manual_seed(0)
    model = nn.Sequential(
        _conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1), _conv(8, 8, groups=2), nn.AvgPool2d(2),
        nn.BatchNorm2d(8, affine=False), nn.Sigmoid(), nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten(), nn.Linear(48, 5),
    ).double()  # fmt: skip
    _randomise(model).train(training)
    eager = copy.deepcopy(model)
    graphs: list[set[str]] = []
    from cnnfast.graph import backend as module

    def seen(graph: Any) -> None:
        original(graph)
        graphs.append({str(n.target) for n in graph.nodes if n.op == "call_function"})

    original = module.train
    monkeypatch.setattr(module, "train", seen)
    compiled = torch.compile(model, backend=backend)
    for n in (2, 4):
        x = torch.randn(n, 3, 16, 16, dtype=torch.float64, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        compiled(x).square().sum().backward()
        eager(y).square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
    for (name, a), b in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for (name, a), b in zip(model.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    targets = set().union(*graphs)
    assert not {t for t in targets if "convolution" in t or ("pool2d" in t and t.startswith("aten"))}, targets
    assert {"cnnfast.conv2d.default", "cnnfast.conv2d_dgrad.default", "cnnfast.conv2d_wgrad.default"} <= targets
    if training:
        assert {"cnnfast.batch_norm_stats.default", "cnnfast.batch_norm_backward.default"} <= targets
