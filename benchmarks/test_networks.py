"""``pytest benchmarks --benchmark-only -k networks``: whole networks, forward and a training step, beside other runtimes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import measuring
import pytest
import torch
from providers import CHANNELS_LAST, COMPILE, NCHW, OURS
from workloads import NETWORKS

from cnnfast.report import bench, networks, peers

FUSED = f"{OURS} fused"
OTHERS = [name for name in peers.PEERS if name != COMPILE]
FORWARD, STEP = "forward", "training step"
# as workloads.NETWORKS has them, and with its published weights the one that has them in a package
ALL = (*NETWORKS, networks.LITE0)
FEW = {FORWARD: ("resnet18", "googlenet"), STEP: ("resnet18",)}
TRAINED = ("resnet18", "resnet50", "vgg16")
# How far an output may be from torch's by the norm: far above rounding, far below a mistake.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 2e-2}


@dataclasses.dataclass(frozen=True)
class Whole:
    """A network at its own image size."""

    name: str

    @property
    def kind(self) -> str:
        """The group that a table lists it in."""
        return "whole networks"

    def flops(self, batch: int = 1) -> int:
        """Of the forward pass: convolutions and matrix products, of the direct algorithm."""
        return batch * _flops(self.name)

    def bytes(self, batch: int = 1, size: int = 4, direction: str = FORWARD) -> int:
        """None: what a network has to move isn't the sum of its layers' operands."""
        return 0

    def __str__(self) -> str:
        return self.name


@functools.cache
def _loaded(name: str) -> networks.Network:
    return networks.load(name)


@functools.cache
def _flops(name: str) -> int:
    network = _loaded(name)
    return bench.reference(network.model, torch.zeros(1, 3, network.size, network.size))[1]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    step = metafunc.function.__name__ == "test_training_step"
    full = metafunc.config.getoption("--full")
    direction = STEP if step else FORWARD
    chosen = (TRAINED if step else ALL) if full else FEW[direction]
    found = [Whole(name) for name in chosen if name in (*NETWORKS, *networks.names())]
    competitors = (OURS, CHANNELS_LAST, NCHW) if step else (FUSED, OURS, CHANNELS_LAST, NCHW, COMPILE, *OTHERS)
    measuring.parametrize(metafunc, found, (FORWARD,), {direction: 8 if step else 1}, competitors)


def test_networks(
    direction: str, batch: int, workload: Whole, name: str, benchmark: Any, machine: dict[str, Any], request: Any
) -> None:
    option = request.config.getoption
    measuring.run("networks", _forward, workload, direction, batch, name, True, benchmark, machine, option, FUSED)


def test_training_step(
    direction: str, batch: int, workload: Whole, name: str, benchmark: Any, machine: dict[str, Any], request: Any
) -> None:
    option = request.config.getoption
    measuring.run("networks", _step, workload, direction, batch, name, False, benchmark, machine, option)


def _images(workload: Whole, batch: int, dtype: torch.dtype, device: str) -> tuple[torch.nn.Module, torch.Tensor]:
    network = _loaded(workload.name)
    x = torch.randn(batch, 3, network.size, network.size, generator=torch.Generator().manual_seed(0))
    return network.model, x.to(device, dtype, memory_format=torch.channels_last)


def _forward(
    workload: Whole, direction: str, batch: int, dtype: torch.dtype, device: str, with_compile: bool
) -> measuring.Competitors:
    """Eager in both formats, ours converted and fused, and runtimes with frozen weights; each beside torch's output."""
    model, x = _images(workload, batch, dtype, device)
    left_out = () if with_compile else (COMPILE,)
    found, missing = bench.competitors(model.to(device, dtype), x, [n for n in peers.PEERS if n not in left_out])
    expected = bench.output(found[CHANNELS_LAST]()).double()
    for name, function in found.items():
        error = (bench.output(function()).double() - expected).norm() / expected.norm()
        assert error <= TOLERANCE[dtype], f"{name}, {workload}: off by {error:.2g} of the result's norm"
    return found, missing


def _step(
    workload: Whole, direction: str, batch: int, dtype: torch.dtype, device: str, with_compile: bool
) -> measuring.Competitors:
    """Forward, cross-entropy, backward, SGD; all have the same first loss."""
    model, x = _images(workload, batch, dtype, device)
    found = bench.training(model.to(device, dtype), x)
    losses = {name: float(step()) for name, step in found.items()}
    for name, loss in losses.items():
        error = abs(loss - losses[CHANNELS_LAST]) / max(1.0, abs(losses[CHANNELS_LAST]))
        assert error <= TOLERANCE[dtype], f"{name}, {workload}: a loss of {loss:.6g}, not {losses[CHANNELS_LAST]:.6g}"
    return dict(found), {}
