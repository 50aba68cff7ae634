"""examples/train.py: the same curve as plain PyTorch's, exact resume, several processes, losses, schedules, data."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import process
from torch.testing import assert_close

from cnnfast import models

pytestmark = pytest.mark.skipif(
    process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it"
)
REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLE = REPOSITORY / "examples" / "train.py"


@pytest.fixture(scope="module")
def train() -> Any:
    for package in ("sklearn", "torchvision", "matplotlib"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("train", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def parsed(train: Any, tmp_path: Path) -> Callable[..., Any]:
    def make(*arguments: str) -> Any:
        return train.parse(["--batch", "16", "--output", str(tmp_path), *arguments])

    return make


def trained(train: Any, options: Any, who: str = "cnnfast") -> Any:
    found = train.load_data(options.data, options.size)
    return train.train(options, who, found, train.Process(0, 1, torch.device("cpu")))


def checkpoint(options: Any, who: str = "cnnfast") -> Any:
    return torch.load(options.output / f"{who}.pt", weights_only=True)


# ---- the curve -------------------------------------------------------------------------------------------------------


def test_everybody_starts_on_one_curve(train: Any, parsed: Any) -> None:
    """cnnfast, plain PyTorch and torchvision's network converted: the first losses are the same, one seed apart they aren't."""
    losses = {who: trained(train, parsed("--stop-after", "4"), who).losses for who in train.WHO}
    for who in ("torch", "converted"):
        assert_close(torch.tensor(losses[who]), torch.tensor(losses["cnnfast"]), rtol=1e-2, atol=0)
        assert abs(losses[who][0] - losses["cnnfast"][0]) < 1e-5
    other = trained(train, parsed("--stop-after", "1", "--seed", "1")).losses
    assert abs(other[0] - losses["cnnfast"][0]) > 1e-3


@pytest.mark.slow
def test_all_learn_the_digits(train: Any, tmp_path: Path) -> None:
    """As the command runs by default, and a converted network: 98 % and more, and the losses of one curve."""
    assert train.main(["--with", *train.WHO, "--output", str(tmp_path)]) == 0
    runs = json.loads((tmp_path / "metrics.json").read_text())["runs"]
    assert [run["scores"][-1][1] > 0.98 for run in runs] == [True] * 3
    assert train.apart([train.Run(**run) for run in runs], 22) < 0.15


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_resumed_is_the_same(train: Any, parsed: Any, tmp_path: Path) -> None:
    """Bit for bit, wherever it was stopped: weights, statistics, momentum, losses; with all that is random switched on."""
    arguments = ("--dropout", "0.2", "--augment", "translate", "crop", "flip", "colour", "--epochs", "1")
    straight = trained(train, parsed(*arguments, "--stop-after", "7"))
    whole = checkpoint(parsed(*arguments))
    (tmp_path / "cnnfast.pt").unlink()
    for stop in ("1", "4", "7"):
        run = trained(train, parsed(*arguments, "--stop-after", stop, "--resume"))
    again = checkpoint(parsed(*arguments))
    assert run.losses == straight.losses
    assert again["step"] == whole["step"] == 7
    for key in ("model", "optimizer"):
        assert_close(again[key], whole[key], rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"was trained with batch 16, not 32: it can't go on so"):
        trained(train, parsed(*arguments, "--batch", "32", "--resume"))
    model = train.build(train.SMALL, "cnnfast", 10, 0.0, 5)
    model.load_state_dict(whole["model"])
    assert not list(tmp_path.glob("*.part"))


def test_checkpoints_are_weights(train: Any, parsed: Any, tmp_path: Path) -> None:
    """``weights=`` takes a checkpoint."""
    options = parsed("--network", "resnet18", "--size", "32", "--stop-after", "1")
    trained(train, options)
    model = models.resnet18(weights=tmp_path / "cnnfast.pt", num_classes=10)
    assert_close(model.state_dict(), checkpoint(options)["model"], rtol=0, atol=0)


# ---- several processes -----------------------------------------------------------------------------------------------


def test_two_processes(train: Any, parsed: Any, tmp_path: Path) -> None:
    """Two steps under torchrun are those of one process that averages the gradients of both shares."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE), "--batch",
        "16", "--with", "cnnfast", "--augment", "--stop-after", "2", "--output", str(tmp_path),
    ]  # fmt: skip
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")])),
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "strides" not in done.stderr  # gradients lie as DDP's buckets expect
    data = json.loads((tmp_path / "metrics.json").read_text())
    assert data["processes"] == 2

    options = parsed("--augment")
    found = train.load_data("digits", 8)
    model = train.build(options.network, "cnnfast", 10, 0.0, options.seed)
    optimizer = torch.optim.SGD(
        model.parameters(), momentum=options.momentum, weight_decay=options.weight_decay, nesterov=True
    )
    order = torch.randperm(len(found.train), generator=torch.Generator().manual_seed(0))
    an_epoch = len(found.train) // 16
    losses = []
    for step in range(2):
        optimizer.param_groups[0]["lr"] = train.learning_rate(options, step, options.epochs * an_epoch, an_epoch)
        optimizer.zero_grad()
        statistics = {k: v.clone() for k, v in model.named_buffers()}
        losses.append(0.0)
        for rank in (1, 0):  # the first process's statistics are those that are kept
            for name, buffer in model.named_buffers():
                buffer.copy_(statistics[name])
            images, labels = found.train[order[step * 16 : step * 16 + 16][rank::2]]
            loss = train.total_loss("cross_entropy", model(found.normalised(images)), labels) / 2
            loss.backward()
            losses[-1] += float(loss.detach())
        optimizer.step()
    assert_close(data["runs"][0]["losses"], losses, rtol=1e-4, atol=1e-5)
    state = checkpoint(options)["model"]
    assert_close(state, model.state_dict(), rtol=1e-2, atol=1e-4)


# ---- losses, schedules, data -----------------------------------------------------------------------------------------

VARIANTS = {
    "hinge": ("--loss", "hinge"),
    "mean squared error": ("--loss", "mse", "--rate", "0.001"),
    "absolute error": ("--loss", "l1", "--rate", "0.001"),
    "bf16": ("--bf16",),
    "dropout in front of fc": ("--dropout", "0.5"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_learn(name: str, train: Any, parsed: Any) -> None:
    run = trained(train, parsed(*VARIANTS[name], "--batch", "32", "--stop-after", "10"))
    assert sum(run.losses[-3:]) < sum(run.losses[:3])


def test_losses(train: Any) -> None:
    """Values by their formulas; auxiliary heads count 0.3."""
    out, labels = torch.tensor([[1.0, 3.0, 2.5], [0.0, 0.0, 4.0]]), torch.tensor([1, 2])
    assert float(train.LOSSES["hinge"](out, labels)) == pytest.approx((0.5 / 3 + 0) / 2)
    assert float(train.LOSSES["cross_entropy"](out, labels)) == pytest.approx(
        float((-out.log_softmax(1)[[0, 1], [1, 2]]).mean())
    )
    assert float(train.LOSSES["mse"](out[:, :1], labels)) == pytest.approx((0 + 4) / 2)
    assert float(train.LOSSES["l1"](out[:, :1], labels)) == pytest.approx((0 + 2) / 2)
    one = float(train.total_loss("cross_entropy", out, labels))
    for heads in ((out, out), (out, None)):
        tuple_of = models.GoogLeNetOutputs(out, *heads)
        expected = one * (1 + 0.3 * sum(head is not None for head in heads))
        assert float(train.total_loss("cross_entropy", tuple_of, labels)) == pytest.approx(expected)


def test_evaluation(train: Any, parsed: Any) -> None:
    """Right answers and errors are counted over all test images, with the model in evaluation mode."""
    found = train.load_data("digits", 8)
    labels = iter(found.test.labels.split(256))

    class Oracle(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training
            right = next(labels)
            out = torch.nn.functional.one_hot(right, 10).float()
            out[0] = 0 if right[0] else 1 - out[0]
            return out

    model = Oracle()
    score = train.evaluate(model, found, parsed(), torch.device("cpu"))
    assert 1 - 2 / len(found.test) <= score < 1
    assert model.training
    assert len(found.test) == 359
    assert len(found.train) == 1438


def test_learning_rate(train: Any, parsed: Any) -> None:
    def rates(*arguments: str) -> list[float]:
        options = parsed("--rate", "1", *arguments)
        return [train.learning_rate(options, step, 30, 10) for step in range(30)]

    cosine, steps, constant = rates(), rates("--schedule", "step", "--warmup", "0"), rates("--schedule", "constant")
    assert cosine[:11] == pytest.approx([*(0.1 * (i + 1) for i in range(10)), 1.0])
    assert cosine[20] == pytest.approx(0.5)
    assert 0 < cosine[29] < 0.01
    assert [steps[0], steps[10], steps[29]] == pytest.approx([1, 0.1, 0.01])
    assert constant[10:] == [1.0] * 20


def test_folder(train: Any, tmp_path: Path) -> None:
    """Photographs of any size, in folders by class; found by name, cut to size."""
    image = pytest.importorskip("PIL.Image")
    for part, count in (("train", 3), ("val", 2)):
        for i, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for k in range(count):
                image.new("RGB", (40 + k, 60), (255 * i, 0, 0)).save(tmp_path / part / name / f"{k}.png")
    found = train.load_data(str(tmp_path), 32)
    assert (found.classes, len(found.train), len(found.test)) == (2, 6, 4)
    images, labels = found.train[torch.tensor([0, 5])]
    assert images.shape == (2, 3, 32, 32)
    assert labels.tolist() == [0, 1]
    assert images[:, 0].mean((1, 2)).tolist() == [0, 1]
    assert found.normalised(images).is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"expected 'digits' or a folder with train/ and test/ or val/"):
        train.load_data(str(tmp_path / "train"), 32)
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "wolf")
    with pytest.raises(ValueError, match="has no folder dog"):
        train.load_data(str(tmp_path), 32)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_command(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables, plot and metrics of two runs; a resumed run that is already there makes no step."""
    monkeypatch.setenv("COLUMNS", "100")
    arguments = ["--batch", "700", "--epochs", "1", "--output", str(tmp_path)]
    assert train.main(arguments) == 0
    out = capsys.readouterr().out
    assert "of the first epoch's loss apart" in out
    assert f"In {tmp_path}: cnnfast.pt, curves.png, metrics.json, torch.pt" in out.replace("\n", " ").replace("  ", " ")
    data = json.loads((tmp_path / "metrics.json").read_text())
    assert [len(run["losses"]) for run in data["runs"]] == [2, 2]
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    before = (tmp_path / "cnnfast.pt").read_bytes()
    assert train.main([*arguments, "--resume"]) == 0
    assert (tmp_path / "cnnfast.pt").read_bytes() == before


FAILS = {
    "network": (["--network", "lenet"], "--network: expected small_resnet or one of alexnet"),
    "data": (["--data", "/nonexistent"], "expected 'digits' or a folder"),
    "batch": (["--batch", "2000"], "more than the 1438 images"),
    "epochs": (["--epochs", "0"], "--epochs: expected a number above 0"),
    "diverges": (["--rate", "1e30", "--warmup", "0"], "cnnfast: the loss is "),
}


@pytest.mark.parametrize("name", FAILS)
def test_failures(name: str, train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, sentence = FAILS[name]
    assert train.main([*arguments, "--output", str(tmp_path)]) == 1
    assert sentence in capsys.readouterr().err


def test_smoothed(train: Any) -> None:
    assert train.smoothed([1, 2, 3, 6], 2) == [1, 1.5, 2.5, 4.5]
    assert train.apart([train.Run("a", "", [1, 1, 2]), train.Run("b", "", [1, 1, 4])], 1) == 2
