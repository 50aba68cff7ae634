"""``weights=``: state dicts, files, checkpoints, URLs, torchvision's names; what fits no network is a sentence."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import process

from cnnfast import models

pytestmark = pytest.mark.skipif(
    process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it"
)
torchvision = pytest.importorskip("torchvision")


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(v, w) for v, w in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Path]:
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    yield tmp_path / "hub" / "checkpoints"
    torch.hub.set_dir(before)


def test_weights_from_everything(tmp_path: Path, hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = torchvision.models.resnet18(num_classes=7)
    state = source.state_dict()
    plain, checkpoint = tmp_path / "plain.pth", tmp_path / "checkpoint.pt"
    torch.save(state, plain)
    torch.save({"model": state, "step": 3}, checkpoint)
    given: list[Any] = [state, plain, str(plain), checkpoint, plain.as_uri()]
    for i, weights in enumerate(given):
        if i % 2 == 0:
            assert same(models.resnet18(weights=weights, num_classes=7), source)
        else:
            assert same(models.create("resnet18", weights=weights, num_classes=7, progress=False), source)
    assert re.search(r"100(\.0)?%", capsys.readouterr().err)  # the URL's, once; tqdm's, or torch's own bar
    other = tmp_path / "other" / "plain.pth"  # of the same name, elsewhere
    other.parent.mkdir()
    torch.save(models.resnet18(num_classes=7).state_dict(), other)
    assert not same(models.resnet18(weights=other.as_uri(), num_classes=7), source)
    assert len(list(hub.iterdir())) == 2
    source.load_state_dict(models.resnet18(num_classes=7).state_dict())  # and the other way round


def published(hub: Path, enumeration: Any, state: Any) -> None:
    """Puts weights where torch would have downloaded torchvision's to."""
    hub.mkdir(parents=True, exist_ok=True)
    torch.save(state, hub / enumeration.url.rsplit("/", 1)[1])


def test_torchvisions_weights(hub: Path) -> None:
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    source = torchvision.models.resnet18()
    published(hub, weights, source.state_dict())
    for given in (weights, "IMAGENET1K_V1", "DEFAULT", "ResNet18_Weights.DEFAULT", "ResNet18_Weights.IMAGENET1K_V1"):
        assert same(models.resnet18(weights=given), source)
    with pytest.raises(ValueError, match="for num_classes=1000, not 10"):
        models.resnet18(weights="DEFAULT", num_classes=10)
    with pytest.raises(ValueError, match="no weights IMAGENET1K_V7; torchvision has IMAGENET1K_V1"):
        models.resnet18(weights="IMAGENET1K_V7")
    with pytest.raises(ValueError, match="no weights ResNet50_Weights"):
        models.resnet18(weights=torchvision.models.ResNet50_Weights.DEFAULT)
    with pytest.raises(ValueError, match="torchvision has no weights for it"):
        models.zfnet(weights="DEFAULT")


def test_torchvisions_weights_of_networks_with_heads(hub: Path) -> None:
    """As torchvision: the input is transformed, googlenet's heads are left out unless asked for, inception_v3's stay."""
    for name, enumeration in (
        ("googlenet", torchvision.models.GoogLeNet_Weights), ("inception_v3", torchvision.models.Inception_V3_Weights),
    ):  # fmt: skip
        published(hub, enumeration.DEFAULT, torchvision.models.get_model(name, init_weights=False).state_dict())
        for options in ({}, {"aux_logits": True})[: 2 if name == "googlenet" else 1]:  # inception_v3's stay anyway
            ours = models.create(name, weights="DEFAULT", **options)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that googlenet's heads aren't trained
                other = torchvision.models.get_model(name, weights="DEFAULT", **options)
            assert same(ours, other)
            assert (ours.transform_input, ours.aux_logits) == (other.transform_input, other.aux_logits)
        ours = models.create(name, weights="DEFAULT", aux_logits=False, transform_input=False)
        assert not [key for key in ours.state_dict() if key.lower().startswith("aux")]
        assert not ours.transform_input


BAD_WEIGHTS: dict[str, tuple[Any, type[Exception], str]] = {
    "no file": ("nowhere.pth", ValueError, "resnet18: no file 'nowhere.pth'"),
    "a number": (3, ValueError, "expected weights as a path, a URL, a state dict or torchvision's name, got int"),
    "pretrained": (True, ValueError, "got bool"),
    "no state dict": ({"epoch": 3}, ValueError, "expected a state dict"),
    "another network's": ({"fc.weight": torch.zeros(2, 2)}, RuntimeError, "Missing key"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights(name: str) -> None:
    weights, error, sentence = BAD_WEIGHTS[name]
    with pytest.raises(error, match=sentence):
        models.resnet18(weights=weights)


def test_file_that_is_no_state_dict(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list.pt: expected a state dict, or a checkpoint"):
        models.resnet18(weights=tmp_path / "list.pt")


def test_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        models.resnet18(weights="DEFAULT")
    assert models.describe("resnet18").parameters == 11689512
