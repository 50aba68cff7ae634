"""``cnnfast.explain``: what served each call of a model, measured or predicted, as rows, text, JSON and picture."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import process

import cnnfast
from cnnfast import cli, dispatch, models
from cnnfast.explain import GPUS, Explanation, Row, _devices, _limits, machine_limits
from cnnfast.report import networks

pytestmark = pytest.mark.skipif(
    process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it"
)
needs_cpu = pytest.mark.skipif(cnnfast.backends.cpu.MODULE is None, reason="no native CPU module on this machine")


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def widest(text: str) -> int:
    return max(map(len, text.splitlines()))


class Small(torch.nn.Module):
    """A stem, a grouped convolution and a pooling on cnnfast, and one convolution that is left to torch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = cnnfast.Conv2d(3, 16, 3, padding=1)
        self.grouped = cnnfast.Conv2d(16, 16, 3, padding=1, groups=4)
        self.pool = cnnfast.MaxPool2d(2)
        self.plain = torch.nn.Conv2d(16, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.plain(self.pool(self.grouped(self.stem(x))))


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is measured of this machine isn't kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def explanation() -> Any:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 20, 20).contiguous(memory_format=torch.channels_last)
    return cnnfast.explain(Small().eval(), x, runs=2)


@needs_cpu
def test_explain(explanation: Any) -> None:
    rows = {row.layer: row for row in explanation}
    assert list(rows) == ["stem", "grouped", "pool", "plain"]
    assert rows["stem"].kernel.startswith("cpu.conv2d_")
    assert rows["grouped"].kernel.startswith("cpu.conv2d_")
    assert rows["pool"].kernel.startswith("cpu.max_pool2d")
    assert [row.layer for row in explanation.unserved] == ["plain"]
    assert "not converted" in rows["plain"].reasons
    for layer in ("stem", "grouped", "pool"):
        assert rows[layer].ours
        assert rows[layer].seconds > 0
        assert rows[layer].of_limit > 0
    assert rows["stem"].flops == 2 * 2 * 20 * 20 * 16 * 3 * 9
    assert rows["stem"].bytes == 4 * (2 * 3 * 20 * 20 + 16 * 3 * 9 + 2 * 16 * 20 * 20)
    assert [row.receptive_field for row in explanation] == [(3, 3), (5, 5), (6, 6), (6, 6)]
    assert rows["stem"].problem == "2x3x20x20 -> 16x20x20, 3x3 pad 1, f32 nhwc"
    names = {i.name for i in dispatch.implementations()}
    assert {name for name, _ in rows["stem"].rejected} <= names  # records keep every variant and every reason


@needs_cpu
def test_explanation_as_json(explanation: Any, tmp_path: Path) -> None:
    path = tmp_path / "explanation.json"
    assert json.loads(explanation.to_json(path)) == json.loads(path.read_text())
    data = json.loads(path.read_text())
    assert (data["model"], data["runs"], data["torch"]) == ("Small", 2, torch.__version__)
    assert [row["layer"] for row in data["rows"]] == ["stem", "grouped", "pool", "plain"]
    for row, found in zip(data["rows"], explanation, strict=True):
        assert row["kernel"] == found.kernel
        assert [(name, tuple(why)) for name, why in row["rejected"]] == list(found.rejected)


@needs_cpu
@pytest.mark.parametrize("columns", [80, 120, 200])
def test_explanation_as_text(explanation: Any, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer, kernel and number, nothing cut off, at any width."""
    monkeypatch.setenv("COLUMNS", str(columns))
    text = str(explanation)
    assert widest(text) <= columns
    assert "…" not in text
    words = " ".join(text.split())
    for row in explanation:
        assert row.layer in words
        assert row.kernel in text
        assert f"{row.seconds * 1e3:.3f}" in words
        if row.of_limit is not None:
            assert re.search(rf"\b{row.of_limit * 100:.0f}\b", words)
    for heading in ("ms", "MFLOP", "MB", "TFLOP/s", "limit", "receptive", "field", "why", "others"):
        assert heading in words
    assert "2 threads" in words or f"{explanation.threads} thread" in words
    assert "medians of 2 runs" in words
    assert "not converted" in words


@needs_cpu
def test_explanation_plot(explanation: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "explanation.png"
    explanation.plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no rows"):
        cnnfast.explain(lambda: None).plot(path)


def test_explain_rejects() -> None:
    with pytest.raises(ValueError, match="runs >= 1, got 0"):
        cnnfast.explain(torch.nn.Identity(), torch.zeros(1), runs=0)
    with pytest.raises(TypeError, match="a module or a function, got int"):
        cnnfast.explain(3)  # type: ignore[arg-type]


def test_nothing_of_ours(wide: None) -> None:
    found = cnnfast.explain(torch.nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8), runs=1)
    assert "No kernel of cnnfast's ran. cnnfast.convert(model)" in str(found)
    assert "The limit is" not in str(found)


def test_brackets_are_text(wide: None) -> None:
    """A layer's name or a reason may look like rich's markup."""
    row = Row("a[red]b", "op", "", "1x[bold]", "f32", "torch", 1e-3, rejected=(("cnnfast", ("got [1, x]",)),))
    text = str(Explanation("model", [row], 1e-3, 1))
    for part in ("a[red]b", "1x[bold]", "got [1, x]"):
        assert part in text


def test_explain_as_a_command(tmp_path: Path, wide: None, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    path, plot = tmp_path / "e.json", tmp_path / "e.png"
    arguments = ["explain", "squeezenet1_1", "--size", "64", "--runs", "1", "--json", str(path), "--plot", str(plot)]
    assert cli.main(arguments) == 0
    out, data = capsys.readouterr().out, json.loads(path.read_text())
    assert out.splitlines()[0].split()[:3] == ["layer", "problem", "kernel"]
    assert data["model"] == "squeezenet1_1"
    assert "squeezenet1_1: " in out
    for row in data["rows"]:
        assert row["layer"] in out
    assert plot.stat().st_size > 10_000


# ---- fused -----------------------------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    """Convolutions with batch norm and a residual, something of torch's, and a fully connected layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = torch.nn.Conv2d(3, 16, 3, padding=1, bias=False), torch.nn.BatchNorm2d(16)
        self.conv2 = torch.nn.Conv2d(16, 16, 3, padding=1, dilation=1)
        self.norm = torch.nn.InstanceNorm2d(16)
        self.pool, self.fc = torch.nn.MaxPool2d(2), torch.nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.pool(self.norm((self.conv2(x) + x).relu()))
        return self.fc(x.mean((2, 3)))


@needs_cpu
def test_fused() -> None:
    """Kernel by kernel, named by the layer whose weights it has; what torch runs between the plans with its reason."""
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(2, 3, 12, 12)
    fused = cnnfast.fuse(model, x)
    expected = fused(x)
    found = cnnfast.explain(fused, x, runs=2, limits=False)
    assert torch.equal(fused(x), expected)
    assert found.model == "Block fused"
    ours = {row.layer: row for row in found if row.ours}
    assert list(ours) == ["conv1", "conv2", "pool", "", "fc"]
    assert [row.kernel for row in found if row.ours] == fused.programs[0].kernels
    assert all(row.seconds > 0 for row in found)
    assert ours["conv2"].flops == 2 * 2 * 12 * 12 * 16 * 16 * 9
    assert [ours[name].receptive_field for name in ("conv1", "conv2", "pool")] == [(3, 3), (5, 5), (6, 6)]
    (left,) = found.unserved
    assert (left.layer, left.op) == ("norm", "aten.instance_norm.default")
    assert "has no such operation" in left.reasons


@needs_cpu
def test_fused_within_a_model() -> None:
    model = torch.nn.Sequential(cnnfast.fuse(Block().eval()), torch.nn.Tanh())
    assert [row.layer for row in cnnfast.explain(model, torch.randn(1, 3, 8, 8), runs=1, limits=False)][:2] == [
        "0.conv1", "0.conv2",
    ]  # fmt: skip


@needs_cpu
def test_layers_of_our_networks_by_name() -> None:
    """Their blocks call convolutions by function: the weights say which; so do receptive fields, as describe has them."""
    model, x = models.ResNet(models.BasicBlock, (1, 1, 1, 1), num_classes=3).eval(), torch.randn(1, 3, 64, 64)
    fields = {layer.name: layer.receptive_field for layer in models.describe(model, size=64)}
    eager = cnnfast.explain(model, x, runs=1, limits=False)
    fused = cnnfast.explain(cnnfast.fuse(model), x, runs=1, limits=False)
    for found in (eager, fused):
        named = {row.layer: row.receptive_field for row in found if row.op == "conv_bn_act" and row.layer != "fc"}
        assert set(named) == {name for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}
        assert all(field == fields[name] for name, field in named.items())


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_limits_are_measured_three_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of three processes is kept; a torn file, and a folder that can't be written, are no error."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rates = iter([(10.0, 3.0), (30.0, 1.0), (20.0, 2.0), (40.0, 0.5)])
    now: list[float] = []

    def product(dtype: torch.dtype) -> float:
        now[:] = next(rates)
        return now[0]

    monkeypatch.setattr(_limits, "_product", product)
    monkeypatch.setattr(_limits, "_copy", lambda: now[1])

    def another_process(**options: Any) -> tuple[float, float]:
        _limits._limits.cache_clear()
        return machine_limits("f32", 7, **options)

    assert [another_process() for _ in range(4)] == [(10, 3), (30, 3), (30, 3), (30, 3)]
    assert machine_limits("f32", 7) == (30, 3)
    assert another_process(again=True) == (40, 3)
    (file,) = (tmp_path / "cnnfast").iterdir()
    assert [entry[2] for entry in json.loads(file.read_text()).values()] == [4]
    for torn in ("{", "[1]", '{"a": 3}'):
        file.write_text(torn)
        assert _limits._kept() == {}
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    _limits._keep({"a": (1.0, 1.0, 1)})
    with pytest.raises(KeyError):
        machine_limits("i8", 7)
    _limits._limits.cache_clear()


def test_limits_of_this_machine() -> None:
    """A matrix product isn't slower than the clock, nor a copy faster than caches."""
    flops, bandwidth = machine_limits("f32", torch.get_num_threads())
    assert 1e8 < flops < 1e14
    assert 1e7 < bandwidth < 1e13


# ---- predicted for a GPU ---------------------------------------------------------------------------------------------


def test_cards() -> None:
    """The table's figures are those of its kind, and each says where it is from."""
    assert list(GPUS) == ["h100", "a100", "l4", "rtx4090"]
    for card in GPUS.values():
        assert card.capability >= (8, 0)
        assert 2 * card.tensor["tf32"] <= 1.01 * card.tensor["bf16"] * 1.01
        assert card.fma["f64"] < card.fma["f32"] <= card.tensor["tf32"] < card.tensor["bf16"]
        # 128 lanes a processor (64 before), a multiply-add a clock: the peak is a clock between 1 and 3 GHz
        lanes = 64 if card.capability == (8, 0) else 128
        assert 1e9 < card.fma["f32"] / (2 * lanes * card.processors) < 3e9
        assert "NVIDIA" in card.source
    assert _devices.gpu("RTX 4090") is GPUS["rtx4090"]
    with pytest.raises(ValueError, match="expected device as one of h100"):
        _devices.gpu("h10")


def problem(**changes: Any) -> dispatch.Problem:
    """Of a 3x3 convolution of 256 channels, as the CPU gets it."""
    x, w = torch.randn(8, 256, 14, 14), torch.randn(256, 256, 3, 3)
    with cnnfast.settings.observe() as events:
        cnnfast.functional.conv2d(x, w, padding=1)
    (event,) = events
    return dispatch.dataclasses.replace(event.selection.problem, **changes)


@needs_cpu
def test_prediction_by_hand() -> None:
    """The unit that multiplies, by precision and dtype; the least time by FLOPs or bytes."""
    flops = 2 * 8 * 14 * 14 * 256 * 256 * 9
    card = GPUS["h100"]
    implementation = dispatch.implementations("conv2d")[0]

    def unit(stem: str, **changes: Any) -> tuple[str, float]:
        given = dispatch.dataclasses.replace(implementation, stem=stem)
        return card.peak(given, problem(**changes))

    assert unit("conv2d_implicit_gemm", dtype="bf16") == ("bf16 tensor cores", pytest.approx(989.4e12))
    assert unit("conv2d_implicit_gemm", precision="high") == ("tf32 tensor cores", pytest.approx(494.7e12))
    assert unit("conv2d_implicit_gemm", precision="fp32") == (
        "tf32 tensor cores, three products",
        pytest.approx(494.7e12 / 3),
    )
    assert unit("conv2d_implicit_gemm", precision="ieee") == ("fp32 multiply-adds", pytest.approx(66.9e12))
    assert unit("conv2d_depthwise", dtype="bf16") == ("fp32 multiply-adds", pytest.approx(66.9e12))
    assert unit("conv2d_direct", dtype="f64") == ("fp64 multiply-adds", pytest.approx(33.5e12))
    for name, high in (("h100", 494.7e12), ("l4", 60e12)):
        found = _devices.predict(problem(precision="high"), GPUS[name])
        assert found.seconds == max(flops / high, problem().bytes / GPUS[name].bandwidth)


@needs_cpu
@pytest.mark.parametrize("name", GPUS)
def test_predicted(name: str, tmp_path: Path, wide: None) -> None:
    """Of an eager model and a fused one, marked as predicted; every time is the card's least for FLOPs and bytes."""
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(2, 3, 12, 12)
    card = GPUS[name]
    for given in (cnnfast.convert(copy.deepcopy(model)), cnnfast.fuse(model)):
        found = cnnfast.explain(given, x, device=name)
        assert found.gpu is card
        gpu = [row for row in found if row.ours]
        if dispatch.backends()["triton"].implementations:
            assert gpu
        for row in gpu:
            assert row.kernel.startswith(("triton.", "cuda."))
            assert row.seconds == row.limit_s == max(row.flops / row.peak, row.bytes / card.bandwidth)
            assert row.bound in ("memory", row.unit)
        assert found.seconds == sum(row.seconds for row in found)
        assert f"on {card.name}, predicted: at least" in str(found)
        assert "Predicted, not measured" in str(found)
        data = found.to_dict()
        assert (data["predicted"], data["device"]) == (True, card.name)
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "predicted.png")


@needs_cpu
@pytest.mark.skipif(not dispatch.backends()["cuda"].implementations, reason="no native CUDA module on this machine")
def test_a_depthwise_layer_on_a_card() -> None:
    """Is one kernel with batch norm and activation, as a module's call and in a fused network."""
    conv = torch.nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False)
    model, x = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(32), torch.nn.ReLU6()).eval(), torch.randn(1, 32, 14, 14)
    found = cnnfast.explain(cnnfast.fuse(model), x, device="h100")
    assert [row.kernel for row in found] == ["cuda.conv2d_depthwise"]


# ---- every network by name -------------------------------------------------------------------------------------------


def test_names() -> None:
    pytest.importorskip("torchvision")
    assert set(models.list()) <= set(networks.names())


@pytest.mark.parametrize("name", ["inception_v2", "zfnet"])
def test_networks_that_torchvision_lacks(name: str) -> None:
    """They come on torch's modules, as all others, with statistics that fit; the same at each call."""
    pytest.importorskip("torchvision")
    found = networks.load(name)
    assert (found.weights, found.model.training) == ("random weights", False)
    assert not any(type(m).__module__.startswith("cnnfast.nn") for m in found.model.modules())
    ours = models.create(name)
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in found.model.state_dict().items()
    ]


def test_explain_of_our_own_as_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fused; predicted for a card; a card that nobody knows is one sentence."""
    pytest.importorskip("torchvision")
    loaded = networks.load("inception_v2")
    monkeypatch.setattr(networks, "load", lambda name: loaded)
    arguments = [
        "explain",
        "inception_v2",
        "--size",
        "64",
        "--runs",
        "1",
        "--fused",
        "--json",
        str(tmp_path / "e.json"),
    ]
    assert cli.main(arguments) == 0
    data = json.loads((tmp_path / "e.json").read_text())
    assert data["model"] == "inception_v2 fused"
    assert {"conv1.conv", "fc"} <= {row["layer"] for row in data["rows"]}
    assert cli.main([*arguments[:6], "--device", "a100"]) == 0
    assert "on A100 SXM4 80 GB, predicted" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["explain", "inception_v2", "--device", "tpu"]) == 1
    assert "expected device as one of h100, a100, l4, rtx4090, got 'tpu'" in capsys.readouterr().err
