"""What the benchmarks promise: results are checked before they are timed, memory is measured, tables fit a terminal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import providers
import pytest
import tables
import torch
import workloads
from support import process

pytestmark = pytest.mark.skipif(
    process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it"
)
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
LAYER = workloads.Layer(8, 6, 16, 3, 3, 1, 1, 1, 1, True)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_competitors(direction: str) -> None:
    """Everybody is there, and computes the same from the same values."""
    found, missing = providers.providers(LAYER, direction, 2, with_compile=False)
    assert list(found) == [providers.OURS, providers.CHANNELS_LAST, providers.NCHW]
    assert missing == {}
    outs = [providers._results(function) for function in found.values()]
    assert [len(out) for out in outs] == [1 if direction == "forward" else 3] * 3


def test_a_wrong_result_is_not_timed() -> None:
    def make(name: str) -> Any:
        return lambda: torch.ones(3) * (1.1 if name == providers.OURS else 1.0)

    with pytest.raises(AssertionError, match=r"cnnfast, forward, a layer: off by 0\.1 of the result's norm"):
        providers.checked(make, "a layer", "forward", torch.float32, "cpu", False, 1e-3)


def test_nan_is_wrong() -> None:
    def make(name: str) -> Any:
        return lambda: torch.ones(3) * (float("nan") if name == providers.OURS else 1.0)

    with pytest.raises(AssertionError, match="off by nan"):
        providers.checked(make, "a layer", "forward", torch.float32, "cpu", False, 1e-3)


def test_who_cannot_run_is_named() -> None:
    def make(name: str) -> Any:
        if name == providers.NCHW:
            raise RuntimeError("no such luck\nsecond line")
        return lambda: torch.ones(3)

    found, missing = providers.checked(make, "a layer", "forward", torch.float32, "cpu", False, 0.0)
    assert missing == {providers.NCHW: "RuntimeError: no such luck"}
    assert providers.NCHW not in found


ROWS = [
    {
        "group": f"op {direction}, batch 1, float32: 3x3", "layer": str(LAYER), "missing": {"torch.compile": "no g++"},
        "ms": {"cnnfast": 1.0, "torch channels_last": time, "torch NCHW": 4.0}, "gflops": gflops, "gbytes_s": 12.5,
        "ratio": time, "kernel": kernel,
    }
    for direction, time, gflops, kernel in (
        ("forward", 2.0, 100, "cpu.conv2d_implicit_gemm.avx512"), ("forward", 0.5, 100, "cpu.conv2d_direct.avx512"),
        ("backward", 2.0, 0, "cpu.max_pool2d.avx512"),
    )
]  # fmt: skip
MACHINE = {"cpu": "a CPU", "isa": ["avx2"], "threads": 2, "torch": "2.0", "gpu": None}


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_tables(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = tables.render(ROWS, MACHINE)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= columns
    words = " ".join(text.split())
    for part in ("a CPU; avx2; 2 threads", "GFLOP/s", "GB/s", "loss", "Our kernel: cpu.max_pool2d.avx512", "1.26",
                 "not timed: torch.compile: no g++", "Summary"):  # fmt: skip
        assert part in words, part


def test_whole_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every competitor's output, and a training step's loss, are held against torch's before anything is timed."""
    pytest.importorskip("torchvision")
    import test_networks

    from cnnfast.report import bench, networks

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LazyLinear(9)
    )
    model(torch.zeros(1, 3, 16, 16))
    small = networks.Network("small", model.eval(), networks.RANDOM, 16, (0.5,) * 3, (0.2,) * 3)
    monkeypatch.setattr(test_networks, "_loaded", lambda name: small)
    workload = test_networks.Whole("small")
    assert workload.flops(3) == 3 * 2 * (7 * 7 * 8 * 27 + 7 * 7 * 8 * 9)
    monkeypatch.setattr(bench, "PEERS", {"torch.compile": lambda model, x: lambda: 1.1 * model(x)})
    monkeypatch.setattr(test_networks.peers, "PEERS", bench.PEERS)
    found, missing = test_networks._forward(workload, "forward", 2, torch.float32, "cpu", False)
    assert (set(found), missing) == ({test_networks.FUSED, *providers.names("cpu")[:3]}, {})
    with pytest.raises(AssertionError, match=r"torch.compile, small: off by 0\.1 of the result's norm"):
        test_networks._forward(workload, "forward", 2, torch.float32, "cpu", True)
    found, _ = test_networks._step(workload, "training step", 2, torch.float32, "cpu", False)
    assert set(found) == set(providers.names("cpu")[:3])
    first = {name: float(step()) for name, step in found.items()}
    assert max(first.values()) - min(first.values()) < 1e-4
    training = bench.training
    monkeypatch.setattr(
        bench,
        "training",
        lambda model, x: {k: lambda v=v, k=k: v() + (k == "cnnfast") for k, v in training(model, x).items()},
    )
    with pytest.raises(AssertionError, match="cnnfast, small: a loss of"):
        test_networks._step(workload, "training step", 2, torch.float32, "cpu", False)


def test_memory() -> None:
    """A fresh process says what it had after the import and at its peak: more, by at least one layer's tensors."""
    command = [sys.executable, str(BENCHMARKS / "layers.py"), "--network", "alexnet", "--batch", "1"]
    for provider in (providers.OURS, providers.CHANNELS_LAST):
        done = subprocess.run([*command, "--child", provider], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        largest = max(layer.bytes(1) for layer in workloads.NETWORKS["alexnet"])
        assert found["peak"] - found["baseline"] > largest / 2
        assert found["peak"] - found["baseline"] < 50 * largest
