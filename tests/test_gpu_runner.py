"""`make gpu` without a card: which parts there are, what is skipped, what goes on; the tables of its benchmarks."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import gpu
import pytest
from support import process

pytestmark = pytest.mark.skipif(
    process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it"
)
ROOT = Path(__file__).resolve().parent.parent
PARTS = [gpu.Part(name, ("true",), 10) for name in ("build", "primitives", "test_kernels 1/2", "benchmark layers")]


class Machine:
    """Runs parts: notes them, lets some fail, and time pass."""

    def __init__(self, failing: tuple[str, ...] = (), seconds: float = 60.0, interrupt: str = "") -> None:
        self.failing, self.seconds, self.interrupt = failing, seconds, interrupt
        self.ran: list[str] = []
        self.now = 0.0

    def execute(self, part: gpu.Part, seconds: float) -> gpu.Outcome:
        if part.name == self.interrupt:
            raise KeyboardInterrupt
        self.ran.append(part.name)
        self.now += self.seconds
        failed = int(part.name in self.failing)
        return gpu.Outcome(not failed, self.seconds, passed=5, failed=failed)

    def clock(self) -> float:
        return self.now


def run(state: gpu.State, machine: Machine, minutes: float = 99) -> bool:
    return gpu.run(PARTS, state, minutes, execute=machine.execute, clock=machine.clock)


def test_what_is_finished_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "gpu" / "state.json"
    first = Machine()
    assert run(gpu.State(path, "a card"), first)
    assert first.ran == [part.name for part in PARTS]
    second = Machine()
    assert run(gpu.State(path, "a card"), second)
    assert second.ran == []
    third = Machine()
    assert run(gpu.State(path, "a card", fresh=True), third)
    assert third.ran == first.ran


def test_an_interruption_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    with pytest.raises(KeyboardInterrupt):
        run(gpu.State(path, "k"), Machine(interrupt="test_kernels 1/2"))
    again = Machine()
    assert run(gpu.State(path, "k"), again)
    assert again.ran == ["test_kernels 1/2", "benchmark layers"]


def test_when_the_minutes_are_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing more is started; the next call has minutes of its own."""
    path = tmp_path / "state.json"
    state = gpu.State(path, "k")
    assert not run(state, Machine(seconds=100), minutes=3)
    gpu.summary(PARTS, state)
    out = capsys.readouterr().out
    assert "2 of 4 parts are left: make gpu goes on with them" in out
    assert out.splitlines()[-1] == "10 passed, 0 failed, 0 skipped"
    again = Machine(seconds=100)
    assert run(gpu.State(path, "k"), again, minutes=3)
    assert again.ran == ["test_kernels 1/2", "benchmark layers"]


def test_what_failed_runs_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A failure stops nothing but what needs the build, and counts."""
    path = tmp_path / "state.json"
    state = gpu.State(path, "k")
    assert not run(state, Machine(failing=("primitives",)))
    gpu.summary(PARTS, state)
    assert capsys.readouterr().out.splitlines()[-1] == "20 passed, 1 failed, 0 skipped"
    again = Machine()
    assert run(gpu.State(path, "k"), again)
    assert again.ran == ["primitives"]
    broken = Machine(failing=("build",))
    assert not run(gpu.State(path, "k", fresh=True), broken)
    assert broken.ran == ["build"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": "k"}', '{"key": "k", "parts": {"build": {"no": 1}}}'])
def test_a_state_that_is_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text(text)
    state = gpu.State(path, "k")
    assert "begins anew" in state.note
    machine = Machine()
    assert run(state, machine)
    assert len(machine.ran) == len(PARTS)


def test_another_card_or_source_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    assert run(gpu.State(path, "one"), Machine())
    state = gpu.State(path, "another")
    assert (state.outcomes, "begins anew" in state.note) == ({}, True)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    digests = set()
    for text in ("a", "b"):
        (tmp_path / "csrc" / "x.cu").write_text(text)
        digests.add(gpu.sources())
    (tmp_path / "csrc" / "y.o").write_text("not a source")
    digests.add(gpu.sources())
    assert len(digests) == 2


def test_parts_of_the_tests() -> None:
    """The wrappers first; large files in shares that fit together, small ones in one process."""
    collected = Counter({
        "tests/test_kernels.py": 950, "tests/test_a.py": 7, "tests/test_b.py": 30, gpu.PRIMITIVES: 12, "tests/test_c.py": 200,
    })  # fmt: skip
    parts = gpu.test_parts(collected, workers=4)
    names = ["primitives", "test_c", "test_kernels 1/3", "test_kernels 2/3", "test_kernels 3/3", "other tests"]
    assert [part.name for part in parts] == names
    assert "tests/test_a.py" in parts[-1].command
    assert "tests/test_b.py" in parts[-1].command
    assert len({part.report for part in parts}) == len(parts)
    assert dict(parts[2].environment)["CNNFAST_TEST_SHARE"] == "1/3"


def test_shares_make_the_whole(tmp_path: Path) -> None:
    """Two shares of a file run every test once."""
    (tmp_path / "test_x.py").write_text("import pytest\n@pytest.mark.parametrize('i', range(7))\ndef test_x(i): pass\n")
    seen: list[str] = []
    for share in ("1/2", "2/2"):
        part = gpu.pytest_part("x", ["test_x.py"], 1, share)
        command = [*part.command[:4], "-v", "-p", "support.share", "-p", "no:cacheprovider"]
        environment = {**dict(part.environment), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        seen += [line.split("[")[1].split("]")[0] for line in done.stdout.splitlines() if "PASSED" in line]
    assert sorted(seen) == list("0123456")


def test_a_process_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that it started; what a pytest process reports is counted, none is no success."""
    monkeypatch.setattr(gpu, "FOLDER", tmp_path)
    slow = gpu.Part("slow", ("sh", "-c", "sleep 60 & wait"), 1)
    outcome = gpu.execute(slow, 0.3)
    assert not outcome.ok
    assert outcome.note == "stopped after 0 s"
    assert outcome.seconds < 10
    assert gpu.execute(gpu.Part("fast", ("true",), 1), 5).ok
    assert not gpu.execute(gpu.Part("no report", ("true",), 1, tmp_path / "missing.xml"), 5).ok
    report = "<testsuite><testcase/><testcase><failure/></testcase><testcase><skipped/></testcase></testsuite>"
    (tmp_path / "source.xml").write_text(report)
    copying = ("cp", str(tmp_path / "source.xml"), str(tmp_path / "target.xml"))
    counted = gpu.execute(gpu.Part("counted", copying, 1, tmp_path / "target.xml"), 5)
    assert (counted.ok, counted.passed, counted.failed, counted.skipped) == (False, 1, 1, 1)


def test_without_a_card(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if process.GPU:
        pytest.skip("there is a GPU")
    monkeypatch.setattr(gpu, "MODULES", ("torch", "no_such_module"))
    assert gpu.main() == 1
    assert "make gpu needs no-such-module in" in capsys.readouterr().out


def test_card_names() -> None:
    assert gpu.card_name("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert gpu.card_name("NVIDIA GeForce RTX 4090") == "geforce-rtx-4090"


# ---- the benchmarks --------------------------------------------------------------------------------------------------


def _benchmarks() -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("cudnn_benchmarks", ROOT / "benchmarks" / "cudnn.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MACHINE = {
    "cpu": "a CPU",
    "isa": ["avx2"],
    "threads": 2,
    "torch": "2.0",
    "gpu": {"name": "a card", "capability": "9.0"},
}
RECORD = {
    "name": "resnet50 3x3", "direction": "fprop", "dtype": "bf16", "batch": 32, "precision": "high", "flops": 4 * 10**9,
    "ms": {"cuDNN graph": 0.5, "cnnfast triton graph": 0.25, "cnnfast cuda graph": 1.0, "cuDNN": 0.6, "cnnfast triton": 0.8},
    "missing": {"cnnfast cuda": "NotImplementedError: no"},
}  # fmt: skip


def test_suites_are_added_and_reported(tmp_path: Path) -> None:
    """Suite by suite into one file; a suite that is measured again takes its place; losses show."""
    benchmarks = _benchmarks()
    path = tmp_path / "results" / "card.json"
    step = {**RECORD, "name": "resnet50", "direction": "training step", "flops": 0, "memory": {"cnnfast": 2**30}}
    benchmarks.save(path, "layers-bf16-32", [RECORD], MACHINE)
    benchmarks.save(path, "training", [{**step, "ms": {"torch.compile": 2.0, "cnnfast": 4.0}}], MACHINE)
    benchmarks.save(path, "layers-bf16-32", [RECORD, {**RECORD, "direction": "dgrad"}], MACHINE)
    data = json.loads(path.read_text())
    assert {name: len(suite["records"]) for name, suite in data["suites"].items()} == {
        "layers-bf16-32": 2,
        "training": 1,
    }
    assert benchmarks.ratio(RECORD) == 2.0
    assert benchmarks.ratio(RECORD, graph=False) == pytest.approx(0.75)
    assert math.isnan(benchmarks.ratio({"ms": {"cuDNN graph": 1.0}}))
    text = " ".join(benchmarks.report(path).split())
    for part in (
        "graphs 2.00, eager 0.75",
        "eager 0.50",
        "16.0",
        "1024",
        "not timed: cnnfast cuda: NotImplementedError",
    ):
        assert part in text, part
    markdown = path.with_suffix(".md").read_text()
    assert markdown.count("### ") == 2
    assert "| resnet50 3x3 | dgrad |" in markdown
    pytest.importorskip("matplotlib")
    assert path.with_suffix(".png").stat().st_size > 1000


def test_each_suite_is_a_part(tmp_path: Path) -> None:
    found = gpu._suites()
    assert set(found) == set(_benchmarks().SUITES)
    parts = gpu.benchmark_parts(tmp_path / "card.json", found)
    assert [part.seconds for part in parts] == [*found.values(), 60]
    assert all(str(tmp_path / "card.json") in part.command for part in parts)


def test_a_competitor_that_is_wrong_or_fails_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    benchmarks = _benchmarks()
    monkeypatch.setattr(benchmarks, "graphed", lambda call: call)
    monkeypatch.setattr(benchmarks, "milliseconds", lambda calls: dict.fromkeys(calls, 1.0))

    def fails() -> Any:
        raise RuntimeError("no such kernel\nsecond line")

    makers = {
        "cuDNN": lambda: lambda: torch.ones(4), "cnnfast cuda": lambda: lambda: torch.ones(4) * 2, "cnnfast triton": fails,
    }  # fmt: skip
    record = benchmarks.compare("a layer", makers, 1e-3, True, direction="fprop")
    assert list(record["ms"]) == ["cuDNN graph", "cuDNN"]
    assert record["missing"]["cnnfast triton"] == "RuntimeError: no such kernel"
    assert "off by 1 of the norm" in record["missing"]["cnnfast cuda"]


def test_suites_measure_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every suite on CPU tensors and the CPU's kernels, but for graphs, the clock and compilers: all compute the same."""
    import torch

    benchmarks = _benchmarks()
    replaced = {
        "DEVICE": "cpu", "BACKENDS": ("cpu",), "PIXELS": 32, "graphed": lambda call: call,
        "LAYERS": (("stem", 3, 17, 8, 7, 2, 1), ("1x1/2", 8, 9, 16, 1, 2, 1), ("grouped", 16, 9, 16, 3, 1, 4)),
        "milliseconds": lambda calls, rounds=1: {name: float(call() is None) + 1.0 for name, call in calls.items()},
    }  # fmt: skip
    for name, value in replaced.items():
        monkeypatch.setattr(benchmarks, name, value)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for name in ("reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    records = list(benchmarks.layers("f32", 2, "fp32"))
    assert [r["missing"] for r in records] == [{}] * 9
    assert {tuple(r["ms"]) for r in records if r["direction"] == "dgrad"} == {("cuDNN graph", "cnnfast cpu graph")}
    fused = list(benchmarks.layers("bf16", 2, fused=True))
    assert [r["missing"] for r in fused] == [{}] * 3
    assert "torch.compile graph" in fused[0]["ms"]
    (network,) = benchmarks.networks(2, ("resnet18",), autotune=True)
    assert network["missing"] == {}
    assert {"torch max-autotune graph", "torch channels_last", "cnnfast graph", "cnnfast fused"} <= set(network["ms"])
    (step,) = benchmarks.training(2, ("resnet18",))
    assert step["missing"] == {}
    assert set(step["memory"]) == {"torch channels_last", "torch.compile", "cnnfast"}
    assert set(step["ms"]) == {f"{name}{graph}" for name in step["memory"] for graph in ("", " graph")}


def test_outcomes_read_well() -> None:
    outcome = gpu.Outcome(True, 3.0)
    assert "done" in str(outcome)
    assert "5 passed, 0 failed" in str(dataclasses.replace(outcome, passed=5))
