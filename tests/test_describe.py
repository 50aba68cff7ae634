"""``cnnfast.models.describe``: sizes by formula, parameters, FLOPs and receptive fields, as an object and as a command."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import process
from torch.utils.flop_counter import FlopCounterMode

import cnnfast
from cnnfast import cli, models
from cnnfast.models import _describe

pytestmark = pytest.mark.skipif(
    process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it"
)


@pytest.mark.parametrize("name", models.list())
def test_describe(name: str) -> None:
    """Sizes by the formula are those of the run; FLOPs are FlopCounterMode's; parameters all there are, but for heads."""
    found = models.describe(name)
    size = found.input[-1]
    for layer in found:
        for text, n in zip(layer.formula.split(", "), layer.output[2:], strict=False):
            if text:
                assert text.endswith(f"= {n}"), layer
    with torch.device("meta"):
        model = models.create(name).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size, device="meta"))
    assert found.flops == counter.get_total_flops()
    heads = sum(p.numel() for n, p in model.named_parameters() if n.lower().startswith("aux"))
    assert sum(layer.parameters for layer in found) + heads == found.parameters
    assert ("in training only" in found.summary()) == (heads > 0)


# As published by Araujo, Norris and Sim, "Computing Receptive Fields of Convolutional Neural Networks" (2019), for networks
# that are the same here; ResNets of torchvision's kind by the recursion r = 1 + sum of (window - 1) * steps before.
FIELDS = {
    "alexnet": 195, "vgg16": 212, "vgg19": 268, "inception_v3": 1311, "resnet18": 435,
    "resnet34": 899, "resnet50": 427, "resnet101": 971, "resnet152": 1451,
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_receptive_fields(name: str) -> None:
    assert max(models.describe(name).receptive_field) == FIELDS[name]


def test_receptive_field_is_what_a_gradient_reaches() -> None:
    """Of an element in the middle of the last map, through every layer."""
    model = models.ResNet(models.BasicBlock, (1, 1, 1, 1), num_classes=2).double().eval()
    described = {layer.name: layer for layer in models.describe(model, size=160)}
    x = torch.rand(1, 3, 160, 160, dtype=torch.float64, requires_grad=True)
    maps: list[torch.Tensor] = []
    model.layer2.register_forward_hook(lambda m, args, out: maps.append(out))
    for parameter in model.parameters():  # nothing negative: no ReLU hides anything
        parameter.data.abs_().add_(1e-3)
    model(x)
    middle = maps[0].shape[-1] // 2
    (g,) = torch.autograd.grad(maps[0][0, :, middle, middle].sum(), x)
    seen = g.abs().sum((0, 1))
    reached = (seen > 1e-9 * seen.max()).nonzero()  # Winograd rounds where plain sums would leave 0
    extent = tuple((reached.max(0).values - reached.min(0).values + 1).tolist())
    assert extent == described["layer2.0.conv2"].receptive_field


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((224, 7, 2, 3), (112, "⌊(224 + 2·3 − 7)/2⌋ + 1 = 112")),
        ((227, 11, 4, 0), (55, "(227 + 2·0 − 11)/4 + 1 = 55")),
        ((112, 3, 2, 0, True), (56, "⌈(112 + 2·0 − 3)/2⌉ + 1 = 56")),
        ((5, 2, 3, 1, True), (2, "⌈(5 + 2·1 − 2)/3⌉ + 1 − 1 = 2")),
    ],
)
def test_size(arguments: Any, expected: Any) -> None:
    assert _describe.size(*arguments) == expected


def test_sizes_are_torchs() -> None:
    for n in range(1, 14):
        for extent, stride, pad, ceil in (
            (3, 2, 1, True),
            (3, 2, 1, False),
            (2, 3, 1, True),
            (4, 3, 2, True),
            (1, 2, 0, True),
        ):
            if n + 2 * pad >= extent:
                pool = torch.nn.MaxPool2d(extent, stride, pad, ceil_mode=ceil)
                result, text = _describe.size(n, extent, stride, pad, ceil)
                assert result == pool(torch.zeros(1, 1, n, n)).shape[-1]
                assert text.endswith(f"= {result}")


def test_description(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    found = models.describe("resnet50", batch=2, num_classes=10)
    assert (len(found), found[0].name, found[-1].output) == (109, "conv1", (2, 10))
    text = str(found)
    assert "conv 7x7 /2 pad 3" in text
    assert "⌊(224 + 2·3 − 7)/2⌋ + 1 = 112" in text
    assert "427x427 before the last pooling" in text
    assert "…" not in text
    found.to_json(tmp_path / "resnet50.json")
    data = json.loads((tmp_path / "resnet50.json").read_text())
    assert data["parameters"] == 25557032 - 990 * 2049
    assert [layer["name"] for layer in data["layers"]] == [layer.name for layer in found]
    for width in ("80", "60"):
        monkeypatch.setenv("COLUMNS", width)
        assert max(map(len, str(found).splitlines())) <= int(width)
    assert repr(found) == f"<Description of resnet50: 109 layers, {found.parameters:,} parameters>"


def test_describe_a_module() -> None:
    """Anybody's: it is neither run nor changed, shared layers count once, steps of concatenations and odd layers."""
    conv = torch.nn.Conv2d(3, 3, 3, padding="same", groups=3)
    model = torch.nn.Sequential(
        conv, conv, torch.nn.ReLU(), torch.nn.ConvTranspose2d(3, 4, 2, stride=2), torch.nn.AdaptiveAvgPool2d(3),
        torch.nn.Flatten(), torch.nn.Linear(36, 2),
    )  # fmt: skip
    before, training = copy.deepcopy(model.state_dict()), model.training
    found = models.describe(model, size=10)
    assert [(layer.name, layer.parameters) for layer in found] == [("0", 30), ("0", 0), ("3", 52), ("4", 0), ("6", 74)]
    assert found.parameters == 156
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 10, 10))
    assert found.flops == counter.get_total_flops()
    assert model.training == training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not conv._forward_hooks
    torchvision = pytest.importorskip("torchvision")
    ours, others = (
        {layer.name: layer for layer in models.describe(m)} for m in ("resnet18", torchvision.models.resnet18())
    )
    assert ours == others
    with pytest.raises(TypeError, match="num_classes go with a name"):
        models.describe(model, num_classes=3)
    with pytest.raises(TypeError, match=r"expected a name or a torch\.nn\.Module, got int"):
        models.describe(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alexnet on 1x3x16x16: "):
        models.describe("alexnet", size=16)
    with pytest.raises(ValueError, match="unknown network 'lenet'"):
        models.describe("lenet")


class _PadsItself(torch.nn.Conv2d):
    """As EfficientNet's do: its forward pads with a part of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pad = torch.nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(
            self.pad(x), self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class _Functional(torch.nn.Module):
    """No convolution by its class."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = torch.nn.Parameter(torch.zeros(4, 4, 3, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(x, self.filters, stride=2, dilation=(2, 1))


@pytest.mark.parametrize("convert", [False, True])
def test_convolutions_with_a_forward_of_their_own(convert: bool) -> None:
    """They widen the field like others, and the formula says how far they pad."""
    model = torch.nn.Sequential(
        _PadsItself(3, 4, 3, 2),
        torch.nn.BatchNorm2d(4),
        _Functional(),
        torch.nn.Conv2d(4, 4, 1),
        torch.nn.BatchNorm2d(4),
    )
    found = models.describe(cnnfast.convert(model) if convert else model, size=32)
    assert found[0].formula == "(32 + 1 − 3)/2 + 1 = 16"
    assert [layer.receptive_field for layer in found] == [(3, 3), (3, 3), (11, 11), (11, 11), (11, 11)]
    timm = pytest.importorskip("timm")
    same = timm.layers.Conv2dSame(3, 4, 3, 2)
    (layer,) = models.describe(cnnfast.convert(same) if convert else same, size=33)
    assert layer.formula == "(33 + 2 − 3)/2 + 1 = 17"
    assert layer.receptive_field == (3, 3)


def test_describe_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["describe", "vgg16", "--batch", "2", "--size", "64", "--json", str(tmp_path / "x.json")]) == 0
    out = capsys.readouterr().out
    assert "vgg16 on 2x3x64x64: 22 layers, 138,357,544 parameters" in out
    assert json.loads((tmp_path / "x.json").read_text())["input"] == [2, 3, 64, 64]
    assert cli.main(["describe", "resnet5"]) == 1
    assert "unknown network 'resnet5'; meant: resnet50" in capsys.readouterr().err
