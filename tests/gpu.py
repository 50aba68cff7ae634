"""`make gpu`: builds offline, tests on the card, benchmarks against cuDNN; what is finished isn't done again.

Parts run in order, each in a process of its own: the build, the microtests of the PTX wrappers, the tests by file (large
files in shares), the benchmarks by suite, tables and plots. What passed is kept in build/gpu/state.json, which holds for
one card, one torch and one state of the sources: the next call goes on where this one stopped, whether it was interrupted,
ran out of its minutes or failed; --fresh begins anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "gpu"
MINUTES = 8.0  # no part is started after that many
MODULES = (
    "torch", "triton", "numpy", "pytest", "pytest_benchmark", "rich", "platformdirs", "pybind11", "setuptools",
)  # fmt: skip
SOURCES = ("csrc", "kernels", "cnnfast", "tests", "benchmarks", "build_backend", "setup.py", "pyproject.toml")
ENDINGS = (".py", ".cu", ".cpp", ".h", ".txt", ".toml")
PRIMITIVES = "tests/test_gpu_primitives.py"
SHARE = 400  # tests of a large file in one part


@dataclasses.dataclass(frozen=True)
class Part:
    """One process. ``seconds``: it is stopped after that many."""

    name: str
    command: tuple[str, ...]
    seconds: float
    report: Path | None = None  # pytest's, which says what passed
    environment: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a part."""

    ok: bool
    seconds: float
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    note: str = ""

    def __str__(self) -> str:
        tests = f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"
        counts = tests if self.passed + self.failed + self.skipped else ("done" if self.ok else "failed")
        return f"{self.seconds:6.1f} s  {counts}{'  ' + self.note if self.note else ''}"


# ---- the state -------------------------------------------------------------------------------------------------------


def sources() -> str:
    """A digest of everything that results depend on in this tree."""
    digest = hashlib.sha256()
    for name in SOURCES:
        start = ROOT / name
        paths = sorted(p for p in start.rglob("*") if p.suffix in ENDINGS) if start.is_dir() else [start]
        for path in (p for p in paths if p.is_file()):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


class State:
    """What is finished, in a file that is written after every part."""

    def __init__(self, path: Path, key: str, fresh: bool = False) -> None:
        self.path, self.key = path, key
        self.outcomes: dict[str, Outcome] = {}
        self.note = ""
        if fresh or not path.exists():
            return
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["key"] != key:
                self.note = "card, torch or sources are others than the last time: begins anew"
                return
            self.outcomes = {name: Outcome(**outcome) for name, outcome in data["parts"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            self.note = f"{path} can't be read ({type(error).__name__}): begins anew"

    def finished(self, part: str) -> bool:
        """Whether a part passed already."""
        return part in self.outcomes and self.outcomes[part].ok

    def add(self, part: str, outcome: Outcome) -> None:
        self.outcomes[part] = outcome
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = {"key": self.key, "parts": {name: dataclasses.asdict(o) for name, o in self.outcomes.items()}}
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self.path)


# ---- the parts -------------------------------------------------------------------------------------------------------


def build_part() -> Part:
    """An editable build without network, for this card alone."""
    command = (
        sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index", "-e", str(ROOT),
    )  # fmt: skip
    return Part("build", command, 300)


def pytest_part(name: str, paths: Sequence[str], workers: int, share: str = "") -> Part:
    """The tests of a few files that are marked gpu; ``share``: "2/5", the second fifth of them."""
    report = FOLDER / f"{re.sub(r'[^a-z0-9_]+', '-', name)}.xml"
    spread = ("-n", str(workers), "--dist", "worksteal") if workers > 1 else ()
    command = (
        sys.executable, "-m", "pytest", *paths, "-q", "-m", "gpu", "-p", "support.share", *spread,
        f"--junitxml={report}", "-o", "junit_family=xunit1",
    )  # fmt: skip
    return Part(name, command, 300, report, (("CNNFAST_TEST_SHARE", share), ("PYTHONPATH", _paths())))


def _paths() -> str:
    return os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))


def test_parts(collected: Counter[str], workers: int) -> list[Part]:
    """From the number of tests by file: the wrappers first, large files in shares, the small ones together at the end."""
    parts = [pytest_part("primitives", [PRIMITIVES], 1)] if PRIMITIVES in collected else []
    small = []
    for path, count in sorted(collected.items()):
        if path == PRIMITIVES:
            continue
        shares = -(-count // SHARE)
        if count < SHARE // 4:
            small.append(path)
            continue
        for share in range(shares):
            which = f"{share + 1}/{shares}" if shares > 1 else ""
            parts.append(pytest_part(f"{Path(path).stem} {which}".strip(), [path], workers, which))
    return [*parts, *([pytest_part("other tests", small, workers)] if small else [])]


def collect() -> Counter[str]:
    """The tests marked gpu, by file."""
    command = [sys.executable, "-m", "pytest", "tests", "-q", "-m", "gpu", "--collect-only"]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    found = Counter(line.split("::")[0] for line in done.stdout.splitlines() if "::" in line)
    if not found:
        sys.exit(f"make gpu found no tests:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return found


def benchmark_parts(target: Path, suites: dict[str, float]) -> list[Part]:
    """A part a suite, which adds to the results, and one that makes tables and plots of them."""
    script = str(ROOT / "benchmarks" / "cudnn.py")
    parts = [
        Part(f"benchmark {name}", (sys.executable, script, "--suite", name, "--output", str(target)), seconds)
        for name, seconds in suites.items()
    ]
    return [*parts, Part("tables and plots", (sys.executable, script, "--report", str(target)), 60)]


# ---- running ---------------------------------------------------------------------------------------------------------


def execute(part: Part, seconds: float) -> Outcome:
    """Runs a part, its output on the terminal; stops it, with all that it started, after so many seconds."""
    begin = time.monotonic()
    if part.report is not None:
        part.report.parent.mkdir(parents=True, exist_ok=True)
        part.report.unlink(missing_ok=True)
    environment = {**os.environ, **dict(part.environment)}
    process = subprocess.Popen(
        part.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
    )
    note = ""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        note = f"stopped after {seconds:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    elapsed = time.monotonic() - begin
    if part.report is None:
        return Outcome(process.returncode == 0, elapsed, note=note)
    counts = read(part.report)
    ok = process.returncode == 0 and counts["failed"] == 0 and counts["passed"] + counts["skipped"] > 0
    return Outcome(ok, elapsed, counts["passed"], counts["failed"], counts["skipped"], note)


def read(path: Path) -> Counter[str]:
    """The outcomes of a JUnit report; none where it is missing or torn."""
    counts: Counter[str] = Counter()
    try:
        cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return counts
    for case in cases:
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        counts[{"failure": "failed", "error": "failed"}.get(outcome, outcome)] += 1
    return counts


def run(
    parts: Sequence[Part], state: State, minutes: float = MINUTES,
    execute: Callable[[Part, float], Outcome] = execute, clock: Callable[[], float] = time.monotonic,
) -> bool:  # fmt: skip
    """Runs what isn't finished, in order, while there is time; a failure stops nothing but what builds on the build.

    Returns:
        Whether all parts have passed, now or before.
    """
    begin = clock()
    for part in parts:
        left = 60 * minutes - (clock() - begin)
        if state.finished(part.name):
            print(f"==== {part.name}: finished before", flush=True)
            continue
        if left <= 0:
            break
        print(f"==== {part.name}", flush=True)
        outcome = execute(part, part.seconds)
        state.add(part.name, outcome)
        print(f"==== {part.name}: {outcome}", flush=True)
        if part.name == "build" and not outcome.ok:
            break
    return all(state.finished(part.name) for part in parts)


def summary(parts: Sequence[Part], state: State) -> None:
    """What came of each part; the counted line last."""
    print("\n==== make gpu")
    total: Counter[str] = Counter()
    for part in parts:
        outcome = state.outcomes.get(part.name)
        print(f"{part.name:32} {outcome if outcome is not None else '     -   not reached'}")
        if outcome is not None:
            broken = not outcome.ok and not outcome.failed
            total.update(passed=outcome.passed, failed=outcome.failed + broken, skipped=outcome.skipped)
    left = [part.name for part in parts if not state.finished(part.name)]
    if left:
        print(f"{len(left)} of {len(parts)} parts are left: make gpu goes on with them")
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped", flush=True)


def card_name(name: str) -> str:
    """A card's name as its files have it: ``h100-80gb-hbm3``."""
    return "-".join(name.lower().replace("nvidia", "").split())


def main(fresh: bool = False, minutes: float = MINUTES) -> int:
    """See the head of this file."""
    missing = [m.replace("_", "-") for m in MODULES if not importlib.util.find_spec(m)]
    missing += [] if shutil.which("cmake") else ["cmake"]
    if missing:
        print(f"make gpu needs {', '.join(missing)} in {sys.prefix}: pip install {' '.join(missing)}")
        return 1
    import torch

    if not torch.cuda.is_available():
        print("make gpu needs an NVIDIA GPU that torch can use: torch.cuda.is_available() is False")
        return 1
    name = torch.cuda.get_device_name()
    state = State(FOLDER / "state.json", f"{name}, torch {torch.__version__}, sources {sources()}", fresh)
    if state.note:
        print(state.note)
    begin = time.monotonic()
    build = build_part()
    if not run([build], state):
        summary([build], state)
        return 1
    if not list((ROOT / "cnnfast").glob("_cuda.*.so")):
        print("WARNING: no nvcc on this system: the CUDA kernels are not built, only Triton's are tested")
    # Compiling Triton's kernels and computing the references is the CPU's work: with pytest-xdist on all its cores.
    workers = min(16, len(os.sched_getaffinity(0))) if importlib.util.find_spec("xdist") else 1
    target = ROOT / "benchmarks" / "results" / f"{card_name(name)}.json"
    parts = [build, *test_parts(collect(), workers), *benchmark_parts(target, _suites())]
    ok = run(parts, state, minutes - (time.monotonic() - begin) / 60)
    summary(parts, state)
    return 0 if ok else 1


def _suites() -> dict[str, float]:
    """The suites of benchmarks/cudnn.py, with the seconds that each may take."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "cudnn.py"), "--list"], cwd=ROOT, capture_output=True, text=True, check=True
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return {name: float(seconds) for name, seconds in found.items()}
