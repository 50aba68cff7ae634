"""Runs the tests in the processes that they need, and sums what came of them.

    python tests/run.py             the parts of `make test`: CPU, emulated CUDA (plain and checked), interpreted Triton
    python tests/run.py --full      the full products (make test-all)
    python tests/run.py --oldest    what concerns torch's interfaces (make test-oldest)
    python tests/run.py --gpu       on a card (make gpu): build, tests, benchmarks; goes on where it stopped, --fresh: anew
    python tests/run.py --static    the machine code of the GPU kernels (make static)
    python tests/run.py --emulation only builds the emulation (make emulation)
    python tests/run.py --simde     AVX-512's kernels as functions on AVX2 (make simde)

Which kernels run is decided by the environment when cnnfast is imported, so each part is a pytest process of its own.
On a processor with AVX2 but without AVX-512 or its bf16 the part `simde` comes by itself.
The last line is `N passed, N failed, N skipped`, over all parts. A part that ran no test is a failure.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import gpu

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
PLAIN = "not gpu and not emulated and not interpreter"
# Tests that torch's version says nothing about: not run with the oldest torch.
VERSIONLESS = (
    "test_bench.py", "test_benchmarks.py", "test_classes.py", "test_cli.py", "test_cuda*.py", "test_demo.py",
    "test_design.py", "test_emulation*.py", "test_explain.py", "test_harness.py", "test_kernels.py", "test_layers.py",
    "test_models_of_others.py", "test_packaging.py", "test_triton*.py", "test_workloads.py",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Part:
    """One pytest process. ``minutes`` is its budget on two slow cores; at three times that it is stopped."""

    name: str
    what: str
    minutes: float
    marker: str
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    paths: tuple[str, ...] = ("tests",)
    options: tuple[str, ...] = ()
    beside: bool = False  # needs one core: runs beside the part before it


@dataclasses.dataclass
class Result:
    """What came of a part."""

    part: Part
    seconds: float
    returncode: int
    counts: Counter[str]
    files: Counter[str]  # seconds by test file


PARTS = (
    Part("cpu", "operations, kernels and networks on the CPU", 16, PLAIN + " and not slow"),
    Part(
        "emulated", "CUDA kernels on the emulated GPU", 7, "emulated and not slow",
        {"CNNFAST_EMULATE_CUDA": "1", "OMP_NUM_THREADS": "1"},
    ),
    Part(
        "checked", "CUDA kernels with races, bounds and uninitialised reads checked", 6, "emulated and not slow",
        {"CNNFAST_EMULATE_CUDA": "check", "OMP_NUM_THREADS": "1"}, beside=True,
    ),
    Part(
        "interpreter", "Triton kernels in Triton's interpreter", 7, "interpreter and not slow",
        {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, beside=True,
    ),
)  # fmt: skip
OLDEST = (
    Part(
        "oldest", "operators, compile and export with the oldest torch", 8, PLAIN + " and not slow",
        {"PYTHONPATH": str(ROOT)}, options=tuple(f"--ignore-glob=*/{name}" for name in VERSIONLESS),
    ),
)  # fmt: skip
# AVX-512's kernels, made of simde's functions where the processor hasn't the instructions
SIMDE = Part(
    "simde", "AVX-512's kernels as functions on AVX2", 20, PLAIN + " and not slow", paths=("tests/test_kernels.py",),
    options=("-k", "avx512"),
)  # fmt: skip
SIMDE_VERSION = "simde-py==0.8.2.post1"


def in_full(part: Part) -> Part:
    """The part of `make test-all`."""
    return dataclasses.replace(part, marker=part.marker.replace(" and not slow", ""), minutes=part.minutes * 20)


# ---- running ---------------------------------------------------------------------------------------------------------


def start(part: Part, log: Path | None) -> subprocess.Popen[str]:
    """Starts a part; its output goes to ``log`` if there is one."""
    folder = BUILD / "test"
    folder.mkdir(parents=True, exist_ok=True)
    report(part).unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "pytest", *part.paths, "-q", "-m", part.marker, *part.options,
        f"--junitxml={report(part)}", "-o", "junit_family=xunit1", "-o", "faulthandler_timeout=600",
        *(["--color=yes"] if log is None and sys.stdout.isatty() else []),
    ]  # fmt: skip
    environment = {**os.environ, **part.environment, "PYTHONUNBUFFERED": "1"}
    output = None if log is None else log.open("w", encoding="utf-8")
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT if output else None,
        stdin=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip


def report(part: Part) -> Path:
    """Where pytest writes what came of a part."""
    return BUILD / "test" / f"{part.name}.xml"


def finish(part: Part, process: subprocess.Popen[str], begin: float) -> Result:
    """Waits for a part, stops it at three times its budget, and reads its report."""
    try:
        process.wait(timeout=max(1.0, begin + 180 * part.minutes - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(f"{part.name}: stopped after {3 * part.minutes:.0f} minutes", flush=True)
    counts, files = read(report(part))
    return Result(part, time.monotonic() - begin, process.returncode, counts, files)


def read(path: Path) -> tuple[Counter[str], Counter[str]]:
    """Counts of outcomes, and seconds by test file, of a JUnit report; nothing where it is missing or torn."""
    counts: Counter[str] = Counter()
    files: Counter[str] = Counter()
    try:
        cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return counts, files
    for case in cases:
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        counts[{"failure": "failed", "error": "failed"}.get(outcome, outcome)] += 1
        name = case.get("file") or case.get("classname") or "?"
        files[Path(name).name] += float(case.get("time") or 0)  # type: ignore[assignment]
    return counts, files


def run(parts: tuple[Part, ...]) -> list[Result]:
    """Runs the parts in order; one marked ``beside`` at the same time as the one before it, its output after that's."""
    results: list[Result] = []
    i = 0
    while i < len(parts):
        group = [parts[i]]
        while i + len(group) < len(parts) and parts[i + len(group)].beside:
            group.append(parts[i + len(group)])
        running = []
        for part in group:
            log = BUILD / "test" / f"{part.name}.log" if part is not group[0] else None
            print(f"\n==== {part.name}: {part.what}", flush=True)
            begin = time.monotonic()
            running.append((part, start(part, log), begin, log))
        for part, process, begin, log in running:
            result = finish(part, process, begin)
            if log is not None:
                print(f"\n==== {part.name}: {part.what} (ran beside the part above)")
                print(log.read_text(encoding="utf-8", errors="replace"), flush=True)
            results.append(result)
        i += len(group)
    return results


def summary(results: list[Result], steps: dict[str, float], slowest: int = 6) -> int:
    """Prints times and counts, the counted line last; returns the exit code."""
    print("\n==== time by part (budgets are for two slow cores)")
    for step, seconds in steps.items():
        print(f"{step:14} {seconds / 60:6.1f} min")
    total: Counter[str] = Counter()
    broken = []
    for r in results:
        counts = Counter({k: r.counts[k] for k in ("passed", "failed", "skipped")})
        if counts["passed"] + counts["failed"] == 0:
            broken.append(f"{r.part.name}: ran no test (pytest ended with {r.returncode})")
            counts["failed"] += 1
        elif r.returncode != 0 and counts["failed"] == 0:
            broken.append(f"{r.part.name}: pytest ended with {r.returncode}")
            counts["failed"] += 1
        total += counts
        over = "" if r.seconds < 60 * r.part.minutes else "  OVER BUDGET"
        print(
            f"{r.part.name:14} {r.seconds / 60:6.1f} min of {r.part.minutes:g}: {counts['passed']} passed, "
            f"{counts['failed']} failed, {counts['skipped']} skipped{over}"
        )
        for name, seconds in r.files.most_common(slowest):
            if seconds >= 1:
                print(f"    {seconds:7.1f} s {name}")
    for line in broken:
        print(line)
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped", flush=True)
    return 1 if total["failed"] else 0


# ---- the emulation ---------------------------------------------------------------------------------------------------


def call(command: list[str], log: Path, what: str) -> None:
    """Runs a command quietly; on failure shows its output and ends."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as output:
        if subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL).returncode:
            print(log.read_text(encoding="utf-8", errors="replace")[-8000:])
            sys.exit(f"{what} failed: {' '.join(command[:3])} ...")


def build(folder: Path, what: str, *definitions: str) -> None:
    """Builds csrc into ``folder`` with these definitions of CMake's, quietly; ends with what it printed where it fails."""
    try:
        import pybind11
    except ImportError:
        sys.exit(f"{what} needs pybind11, cmake and ninja: make env, or pip install pybind11 cmake ninja")
    scripts = sysconfig.get_path("scripts")
    cmake = shutil.which("cmake", path=scripts) or shutil.which("cmake")
    ninja = shutil.which("ninja", path=scripts) or shutil.which("ninja")
    if not cmake:
        sys.exit("cmake is missing: pip install cmake ninja")
    configure = [
        cmake, "-S", str(ROOT / "csrc"), "-B", str(folder / "cmake"), f"-DCNNFAST_OUTPUT={folder}", *definitions,
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        *(["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
    ]  # fmt: skip
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    call(configure, folder / "configure.log", f"configuring {what}")
    call([cmake, "--build", str(folder / "cmake"), "--parallel", jobs], folder / "build.log", f"building {what}")


def install(requirement: str, folder: Path, what: str) -> None:
    """Installs a package of PyPI's into a folder of its own."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), requirement]
    call(command, BUILD / "test" / f"{folder.name}.log", f"fetching {what}")


def headers(requirement: str) -> str:
    """CNNFAST_CUDA_INCLUDE where this machine has no CUDA toolkit: PyPI's headers in build/; empty where it has one."""
    given = os.environ.get("CNNFAST_CUDA_INCLUDE", "")
    nvcc = shutil.which("nvcc")
    candidates = [os.path.join(os.environ[v], "include") for v in ("CUDA_HOME", "CUDA_PATH") if v in os.environ]
    candidates += ["/usr/local/cuda/include", str(Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "include")]
    if nvcc:
        candidates.append(str(Path(nvcc).resolve().parent.parent / "include"))
    if given or any(Path(c, "cuda_bf16.h").exists() and Path(c, "crt", "host_defines.h").exists() for c in candidates):
        return given
    include = BUILD / "cuda-headers" / "nvidia" / "cu13" / "include"
    if not (include / "crt" / "host_defines.h").exists() and requirement:
        install(requirement, BUILD / "cuda-headers", "CUDA's headers")
    return str(include)


def build_emulation(requirement: str) -> float:
    """Builds _emulated and _emulated_check into build/emulation; returns the seconds it took."""
    begin = time.monotonic()
    folder = BUILD / "emulation"
    include = headers(requirement)
    if include:
        os.environ["CNNFAST_CUDA_INCLUDE"] = include
    print(f"==== emulation: building into {folder.relative_to(ROOT)}", flush=True)
    build(
        folder, "the emulation", "-DCMAKE_BUILD_TYPE=Release", "-DCNNFAST_CPU=OFF", "-DCNNFAST_EMULATION=ON",
        *([f"-DCNNFAST_CUDA_INCLUDE={include}"] if include else []),
    )  # fmt: skip
    return time.monotonic() - begin


# ---- AVX-512 where there is none --------------------------------------------------------------------------------------


def lacks_avx512() -> bool:
    """Whether this is an x86 processor with AVX2 on which some of the CPU's kernels can't run."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return False
    return "avx2" in flags and not {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"} <= flags


def build_simde() -> tuple[Part, float]:
    """Fetches simde's headers, builds AVX-512's kernels of its functions; their part, and the seconds it took."""
    begin = time.monotonic()
    folder, packages = BUILD / "simde", BUILD / "simde-headers"
    include = packages / "simde_py" / "simde"
    if not (include / "simde" / "x86" / "avx512.h").exists():
        install(SIMDE_VERSION, packages, "simde")
    print(f"==== simde: building into {folder.relative_to(ROOT)}", flush=True)
    build(folder, "the kernels of simde's functions", f"-DCNNFAST_SIMDE={include}", "-DCNNFAST_CPU_ISAS=avx512")
    module = next(folder.glob("_cpu*.so"))
    return dataclasses.replace(SIMDE, environment={"CNNFAST_CPU_MODULE": str(module)}), time.monotonic() - begin


# ---- the parts that have files of their own ---------------------------------------------------------------------------


def static() -> int:
    """The machine code of every GPU kernel, as its test prints it."""
    scripts = sorted((ROOT / "tests").glob("test_*_static.py"))
    return max((subprocess.run([sys.executable, str(s)], cwd=ROOT).returncode for s in scripts), default=1)


def main() -> int:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for option in ("full", "oldest", "gpu", "fresh", "static", "emulation", "simde"):
        parser.add_argument(f"--{option}", action="store_true")
    parser.add_argument("--headers", default="", help="what to install where the machine has no CUDA headers")
    parser.add_argument("--minutes", type=float, default=gpu.MINUTES, help="with --gpu: start nothing after that many")
    parser.add_argument("--part", action="append", help="only the part(s) of this name")
    options = parser.parse_args()
    if options.gpu:
        return gpu.main(options.fresh, options.minutes)
    if options.static:
        return static()
    if options.oldest:
        return summary(run(OLDEST), {})
    if options.simde:
        part, seconds = build_simde()
        return summary(run((part,)), {"simde": seconds})
    parts = tuple(p for p in PARTS if not options.part or p.name in options.part)
    steps = {"emulation": build_emulation(options.headers)}
    if options.emulation:
        print(f"emulation: built in {steps['emulation']:.0f} s")
        return 0
    if lacks_avx512() and not options.part:
        part, steps["simde"] = build_simde()
        parts += (part,)
    if options.full:
        parts = tuple(map(in_full, parts))
        os.environ["CNNFAST_TEST_FULL"] = "1"
    return summary(run(parts), steps)


if __name__ == "__main__":
    sys.exit(main())
