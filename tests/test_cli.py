"""``python -m cnnfast info | explain | describe | bench``, and the tables that they print (explain's: test_explain.py)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import process

import cnnfast
from cnnfast import _render, cli, dispatch
from cnnfast.report import bench, networks, tables, timing

pytestmark = pytest.mark.skipif(
    process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it"
)
REPOSITORY = Path(__file__).resolve().parent.parent


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), env.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, "-m", "cnnfast", *arguments], cwd=REPOSITORY, env={**env, **environment},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def widest(text: str) -> int:
    return max(map(len, text.splitlines()))


# ---- the command -----------------------------------------------------------------------------------------------------


def test_info_as_a_command() -> None:
    done = command("info")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"cnnfast {cnnfast.__version__}" in done.stdout
    assert "\x1b" not in done.stdout  # no colours into a pipe


def test_bench_as_a_command(tmp_path: Path) -> None:
    """One small layer, all files, at the width that COLUMNS says."""
    pytest.importorskip("torchvision")
    arguments = ("resnet18.layer4.0.downsample.0", "--size", "32", "--rounds", "3", "--output", str(tmp_path))
    done = command("bench", *arguments, COLUMNS="80")
    assert done.returncode == 0, done.stderr
    assert widest(done.stdout.partition("\nIn ")[0]) <= 80
    data = json.loads((tmp_path / "bench.json").read_text())
    (record,) = data["records"]
    assert data["machine"]["cpu"]
    assert record["workload"] == arguments[0]
    assert set(record["timings"]) >= {"torch NCHW", "torch channels_last", "cnnfast"}
    assert record["wrong"] == []
    assert (tmp_path / "bench.md").read_text().startswith("| workload |")


@pytest.mark.parametrize("arguments", [(), ("info",), ("explain",), ("describe",), ("bench",)], ids=" ".join)
def test_help(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: cnnfast")
    for option in re.findall(r"^  (--\w+)", out, re.MULTILINE):
        described = re.search(rf"^  {option}[^\n]*(  +\w|\n {{10,}}\w)", out, re.MULTILINE)
        assert described, f"{option} is not explained"


BAD = {
    "no command": ([], "required: info | explain | describe | bench"),
    "unknown command": (["tone"], "invalid choice: 'tone'"),
    "no network": (["explain"], "required: network"),
    "batch 0": (["bench", "--batch", "0"], "--batch: expected a whole number above 0, got '0'"),
    "size by word": (["explain", "resnet18", "--size", "big"], "--size: expected a whole number above 0, got 'big'"),
    "no budget": (["bench", "--budget", "-1"], "--budget: expected a number of seconds above 0, got '-1'"),
    "dtype": (["bench", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 2, as argparse has it, the usage, and one sentence."""
    arguments, sentence = BAD[name]
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err.splitlines()[-1]


FAILS = {
    "unknown": (["explain", "nosuch"], "unknown network 'nosuch'; expected torchvision's name of a classifier"),
    "mistyped": (["bench", "resnet81"], "unknown network 'resnet81'; meant: resnet18"),
    "no such layer": (["bench", "resnet18.layer9"], "resnet18 has no layer 'layer9'; its convolutions: conv1, layer1."),
    "no such folder": (["info", "--json", "/nonexistent/info.json"], "No such file or directory"),
    "too small": (["explain", "vgg16", "--size", "8"], "vgg16 on 1x3x8x8 float32: "),
}


@pytest.mark.parametrize("name", FAILS)
def test_failures(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 1 and one line that says what is wrong: no traceback."""
    pytest.importorskip("torchvision")
    arguments, sentence = FAILS[name]
    assert cli.main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cnnfast: ")
    assert sentence in line


def test_a_reader_that_has_seen_enough() -> None:
    """``python -m cnnfast info | head -1`` ends quietly."""
    shell = f"{sys.executable} -m cnnfast info | head -1"
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(shell, shell=True, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


# ---- info ------------------------------------------------------------------------------------------------------------


def test_info(wide: None, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    path = tmp_path / "info.json"
    assert cli.main(["info", "--json", str(path)]) == 0
    out, found = capsys.readouterr().out, json.loads(path.read_text())
    assert f"cnnfast {cnnfast.__version__}, torch {torch.__version__}, python" in out
    for isa in found["isa"]:
        assert isa in out
    assert list(found["backends"]) == list(dispatch.backends())
    for name, status in found["backends"].items():
        assert re.search(rf"^backend {name} +{re.escape(status)}", out, re.MULTILINE)
    counted = sum(n for counts in found["implementations"].values() for n in counts.values())
    assert counted == len(dispatch.implementations())
    for cache in found["caches"].values():
        assert cache["path"] in out
    assert found["caches"]["cnnfast"] == {
        "path": str(tmp_path / "cache" / "cnnfast"),
        "exists": False,
        "writable": True,
    }
    assert not (tmp_path / "cache").exists()  # it only asks
    assert f"XDG_CACHE_HOME={tmp_path / 'cache'}" in out
    assert "CUDA_VISIBLE_DEVICES=" in out


def test_info_names_what_is_absent(wide: None) -> None:
    """Without native module and GPU backends every backend still has a line, with the reason."""
    code = (
        "import sys; sys.modules['cnnfast._cpu'] = sys.modules['cnnfast._cuda'] = sys.modules['triton'] = None;"
        "from cnnfast import cli; sys.exit(cli.main(['info']))"
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name in ("cpu", "cuda", "triton"):
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"backend {name} ")]
        assert "can't be imported" in line or "None in sys.modules" in line, line
        assert "kernels:" not in line


def test_info_says_where_nothing_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "not writable: nothing is kept" in cli._state(cli._cache(tmp_path / "cache"))


@pytest.mark.parametrize("columns", [80, 120])
def test_info_fits(columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert widest(out) <= columns
    assert "…" not in out


# ---- reasons ---------------------------------------------------------------------------------------------------------


def test_reason_lines() -> None:
    """Variants with equal reasons share a line; others, and names without variants, stand alone."""
    rejected = [
        ("cpu.grouped.avx512", ("needs K = C",)), ("cpu.grouped.avx2", ("needs K = C",)), ("cuda", ("not built",)),
        ("cpu.grouped.portable", ("needs K = C", "too wide")), ("triton.gemm", ("needs K = C",)),
    ]  # fmt: skip
    assert dispatch.reason_lines(rejected) == [
        "cpu.grouped (avx512, avx2): needs K = C",
        "cuda: not built",
        "cpu.grouped.portable: needs K = C; too wide",
        "triton.gemm: needs K = C",
    ]


@pytest.mark.skipif(cnnfast.backends.cpu.MODULE is None, reason="no native CPU module on this machine")
def test_error_groups_variants() -> None:
    with cnnfast.backend("cpu.conv2d_grouped"), pytest.raises(NotImplementedError) as raised:
        cnnfast.functional.conv2d(torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 3, 3))
    found = [line for line in str(raised.value).splitlines() if "conv2d_grouped" in line]
    lines = [line for line in found if cnnfast.backends.cpu.DOT not in line]  # which has no fp32: a reason of its own
    assert len(lines) == 1
    for isa in cnnfast.backends.cpu.isas():
        assert isa in lines[0]


# ---- tables ----------------------------------------------------------------------------------------------------------


def record(workload: str, seconds: dict[str, float], wrong: tuple[str, ...] = ()) -> dict[str, Any]:
    timings = {n: timing.Timing.of([s * f for f in (0.9, 1.0, 1.2)]).to_dict() for n, s in seconds.items()}
    peers = [n for n in seconds if not bench.is_ours(n)]
    best_peer = min(peers, key=seconds.__getitem__)
    return {
        "workload": workload, "batch": 1, "dtype": "float32", "flops": 3_000_000, "wrong": list(wrong), "timings": timings,
        "best_peer": best_peer, "best_ours": "cnnfast", "ratio": seconds[best_peer] / seconds["cnnfast"],
    }  # fmt: skip


RECORDS = [
    record("resnet50.layer1.0.conv2", {"torch NCHW": 3e-3, "torch channels_last": 2e-3, "cnnfast": 1e-3}),
    record("resnet18", {"torch NCHW": 0.3, "torch channels_last": 0.2, "cnnfast": 0.4}, wrong=("cnnfast",)),
]
MACHINE = {"cpu": "a CPU", "isa": ["avx2"], "threads": 2, "torch": "2.0", "gpu": None}


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_results_fit(columns: int) -> None:
    text = _render.as_text(tables.results(RECORDS, MACHINE, "Title"), width=columns)
    assert widest(text) <= columns
    assert "…" not in text
    words = " ".join(text.split())
    for part in ("Title", "resnet50.layer1.0.conv2", "float32", "torch channels_last" if columns < 200 else "cnnfast, ms",
                 "2.00", "0.50", "wrong!", "a CPU; avx2; 2 threads; torch 2.0", "Geometric mean 1.00"):  # fmt: skip
        assert part in words
    for seconds in ("1.00", "2.00", "3.00", "200", "300", "400"):
        assert seconds in words


def test_markdown() -> None:
    head, rule, first, second, _, caption = tables.markdown(RECORDS, MACHINE).splitlines()
    assert head.count("|") == rule.count("|") == first.count("|") == second.count("|")
    assert "cnnfast, ms" in head
    assert "| 2.00 |" in first
    assert "wrong!" in second
    assert "percentile" in caption


def test_no_records() -> None:
    with pytest.raises(ValueError, match="no records"):
        tables.geometric_mean([])


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.23456, "1235"), (0.0999, "99.9"), (1.5e-3, "1.50"), (4.2e-5, "0.042"), (0, "0.000")]
)
def test_milliseconds(seconds: float, text: str) -> None:
    assert timing.milliseconds(seconds) == text


def test_conversion_report_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    text = str(cnnfast.conversion_report(cnnfast.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)))))
    assert widest(text) <= 60
    assert "1 of 1 convolutions and poolings on cnnfast" in text


# ---- timing ----------------------------------------------------------------------------------------------------------


def test_interleaved_takes_turns() -> None:
    """Every round calls each function, and starts with another."""
    order: list[str] = []

    def noting(name: str) -> Callable[[], None]:
        return lambda: order.append(name)

    functions = {name: noting(name) for name in "abc"}
    found = timing.interleaved(functions, rounds=3, warmup=0, pause_s=0)
    assert "".join(order) == "abc" + "bca" + "cab"
    assert list(found) == ["a", "b", "c"]
    assert all(len(t.samples) == 3 for t in found.values())
    with pytest.raises(ValueError, match="expected functions"):
        timing.interleaved({})


def test_quantiles() -> None:
    found = timing.Timing.of([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (found.median, found.p20, found.p80) == (3.0, pytest.approx(1.8), pytest.approx(4.2))
    assert found.spread == pytest.approx(0.8)
    with pytest.raises(ValueError, match="at least one sample"):
        timing.Timing.of([])


def test_budget_ends_a_measurement() -> None:
    found = timing.interleaved({"a": lambda: None}, rounds=10_000, budget_s=0.01, min_rounds=2, pause_s=0.005)
    assert 2 <= len(found["a"].samples) < 1000


def test_names_of_networks() -> None:
    pytest.importorskip("torchvision")
    assert set(cli.NETWORKS) - {networks.LITE0} <= set(networks.names())
