"""Programs in which operators of ours stand between plans: a kernel that dispatch prefers is none that a plan can hold."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import process
from torch import nn

import cnnfast
from cnnfast import dispatch
from cnnfast.graph import program as program_module

pytestmark = pytest.mark.skipif(process.EMULATED or process.INTERPRETED, reason="plans are the plain process's")


def _python_launches(monkeypatch: pytest.MonkeyPatch, which: Callable[[dispatch.Implementation], bool]) -> None:
    """As if these kernels of the CPU's were launched from Python, as Triton's are."""
    cpu = dispatch.backends()["cpu"]
    changed = [dataclasses.replace(i, node=None, prepare=None) if which(i) else i for i in cpu.implementations]
    monkeypatch.setitem(dispatch._backends, "cpu", dataclasses.replace(cpu, implementations=changed))


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.b, self.c, self.d = nn.Conv2d(64, 64, 3, 2), nn.Conv2d(64, 64, 3, 2), nn.Conv2d(128, 64, 1)
        self.fc = nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(self.norm(self.a(x)).relu(), 2)
        x = self.d(torch.cat([self.b(x).relu(), self.c(x)], 1)).relu()
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


# name -> which kernels a plan can't hold, plans, operators of ours on their own
CASES: dict[str, tuple[Callable[[dispatch.Implementation], bool], int, int]] = {
    "poolings": (lambda i: i.op in ("max_pool2d", "adaptive_avg_pool2d"), 3, 2),
    "convolutions": (lambda i: i.op == "conv_bn_act", 3, 5),
    "everything": (lambda i: True, 0, 7),
}


@pytest.mark.parametrize("name", CASES)
def test_mixed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal results, in channels_last throughout, each node's reason, and planned in a few rounds however many they are."""
    which, plans, alone = CASES[name]
    torch.manual_seed(0)
    model = _Network().eval()
    model.norm.running_mean.uniform_(-0.2, 0.2), model.norm.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    size = sum(t.nbytes for t in model.state_dict().values())
    reference = copy.deepcopy(model)
    rounds, original = [], program_module._Builder.program
    monkeypatch.setattr(program_module._Builder, "program", lambda self: rounds.append(1) or original(self))
    _python_launches(monkeypatch, which)
    seen: list[Any] = []
    with torch.no_grad(), cnnfast.backend("cpu"):
        fused = cnnfast.fuse(model, inplace=True)
        for shape in ((2, 3, 17, 15), (1, 3, 16, 21)):
            x = torch.randn(shape)
            error = (fused(x).double() - reference.double()(x.double())).norm() / reference(x.double()).norm()
            assert error <= 1e-5
        (first, second) = fused.programs
        calls = [call for call in first.calls if call.ours]
        assert (len(first.steps) - len(first.calls), len(calls)) == (plans, alone), fused.report()
        assert all("which no plan can hold: it is launched from Python" in call.reason for call in calls)
        assert f"{alone} operators of ours one by one" in fused.report()
        assert len(rounds) <= 2 * 3, "two shapes"
        assert fused.weight_bytes <= 1.1 * size, fused.report()
        seen += cnnfast.explain(fused, torch.randn(1, 3, 16, 21), runs=1, limits=False)
    assert {"a", "b", "c", "d", "fc"} <= {row.layer for row in seen if row.ours}
    assert len(seen) == len(second.kernels) + sum(bool(call.reason) for call in second.calls)


def test_images_are_converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _python_launches(monkeypatch, lambda i: True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.MaxPool2d(2)).eval()
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        fused = cnnfast.fuse(model)
        y = fused(x)
        torch.testing.assert_close(y, model(x))
        assert y.is_contiguous(memory_format=torch.channels_last)
        converted = []
        original = torch.Tensor.contiguous
        monkeypatch.setattr(torch.Tensor, "contiguous", lambda t, **kw: converted.append(t.shape) or original(t, **kw))
        fused(x)
    assert converted == [x.shape]


def test_strict_allows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    _python_launches(monkeypatch, lambda i: i.op == "max_pool2d")
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2)).eval(), torch.randn(1, 3, 12, 12)
    with torch.no_grad(), cnnfast.strict():
        torch.testing.assert_close(cnnfast.fuse(model)(x), model(x))
