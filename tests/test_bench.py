"""What `python -m cnnfast bench` compares: other projects' runtimes where they are installed, and training steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import process
from torch import nn

from cnnfast.report import bench, peers

pytestmark = pytest.mark.skipif(
    process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it"
)
PACKAGES = {"torch.compile": "torch", "OpenVINO": "openvino", "ONNX Runtime": "onnxruntime"}


class _Classifier(nn.Module):
    """A convolution, batch norm, pooling, dropout and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8 * 4 * 4, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).flatten(1))


@pytest.mark.parametrize("name", peers.PEERS)
def test_peer(name: str) -> None:
    """Equal results, from a copy: the model keeps its format. Images in channels_last, which others must copy and keep."""
    pytest.importorskip(PACKAGES[name])
    if name == "ONNX Runtime":
        pytest.importorskip("onnx")
    torch.manual_seed(0)
    model, x = _Classifier().eval(), torch.randn(2, 3, 16, 16)
    run = peers.PEERS[name](copy.deepcopy(model), x.contiguous(memory_format=torch.channels_last))
    for _ in range(2):
        others = [torch.full_like(x, float("nan")) for _ in range(20)]  # memory that was given back is used again
        assert len(others) == 20
        torch.testing.assert_close(run(), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_peer_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setattr(bench, "PEERS", {"broken": broken, "wrong": lambda model, x: lambda: 1.1 * model(x)})
    record = bench.measure("m", _Classifier().eval(), torch.randn(1, 3, 16, 16), rounds=1, peers=True)
    reason = "its output is off by 0.1 of the largest"
    assert record["missing"] == {"broken": "RuntimeError: no such operator", "wrong": reason}
    assert set(record["timings"]) == {"torch NCHW", "torch channels_last", "cnnfast", "cnnfast fused"}
    assert not record["wrong"]


def test_training_steps() -> None:
    """All sides have the same losses, step after step; the model is left alone."""
    torch.manual_seed(0)
    model, x = _Classifier().eval(), torch.randn(3, 3, 16, 16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    runs = bench.training(model, x)
    for _ in range(3):
        losses = [float(run()) for run in runs.values()]
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.training
    record = bench.measure("m", model, x, rounds=1, train=True)
    assert set(record["timings"]) == set(runs)
    assert not record["wrong"]


def test_training_wants_a_classifier() -> None:
    with pytest.raises(ValueError, match=r"needs logits \(N, classes\), got shape \(1, 4, 6, 6\)"):
        bench.measure("m", nn.Conv2d(3, 4, 3).eval(), torch.randn(1, 3, 8, 8), rounds=1, train=True)
