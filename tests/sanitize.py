"""The CPU kernels under the compiler's sanitizers: `make sanitize`.

    python tests/sanitize.py               AddressSanitizer with UndefinedBehaviorSanitizer, then ThreadSanitizer
    python tests/sanitize.py address -k max_pool2d
    python tests/sanitize.py address --isa avx512 --kernels "conv2d_grouped*;conv2d_direct"

The last builds and tests a piece; conv2d's kernels need conv2d_direct and conv2d_gemm_tile, which they call.

Builds the module once more for each into build/sanitize (a few minutes) and runs tests/test_kernels.py on it: every
kernel, direction, dtype and ISA; the slow ThreadSanitizer with AVX2's alone, which differ from the others by vector
length. Further arguments go to pytest. Needs g++ with its sanitizers.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from run import build

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = {"address": "libasan.so", "thread": "libtsan.so"}
TESTS = {"address": "cpu", "thread": "cpu and avx2"}
OPTIONS = {
    "address": {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},  # Python itself leaks
    "thread": {"TSAN_OPTIONS": "exitcode=66"},
}
# torch's threads are OpenMP's, whose barriers ThreadSanitizer can't see; its mutexes are destroyed too early at exit
SUPPRESSIONS = "\n".join([
    *(f"called_from_lib:{name}" for name in ("libtorch_cpu.so", "libtorch_python.so", "libc10.so", "libgomp.so")),
    "race:libtorch", "race:libc10.so", "race:libgomp.so", "mutex:libtorch", "mutex:capsule_dealloc",
])  # fmt: skip


def runtime(name: str) -> str:
    """A library of the compiler's, by name."""
    compiler = os.environ.get("CXX", "g++")
    return subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


def run(sanitizer: str, isas: str, kernels: str, arguments: list[str]) -> int:
    """Builds, tests; the exit code of pytest."""
    begin = time.monotonic()
    print(f"==== {sanitizer}: building", flush=True)
    folder = ROOT / "build" / "sanitize" / sanitizer
    piece = [f"-DCNNFAST_CPU_ISAS={isas}", f"-DCNNFAST_CPU_KERNELS={kernels}"]
    build(folder, "the sanitized module", "-DCMAKE_BUILD_TYPE=None", f"-DCNNFAST_SANITIZE={sanitizer}", *piece)
    module = next(iter(folder.glob("_cpu*.so")))
    print(f"==== {sanitizer}: built in {time.monotonic() - begin:.0f} s, testing", flush=True)
    # Python is not instrumented: the runtime comes first, and libstdc++ beside it, whose exceptions it intercepts
    preload = f"{runtime(LIBRARY[sanitizer])} {runtime('libstdc++.so')}"
    for old in folder.glob("report*"):
        old.unlink()
    (folder / "suppressions").write_text(SUPPRESSIONS + "\n")
    environment = {"LD_PRELOAD": preload, "CNNFAST_CPU_MODULE": str(module), **OPTIONS[sanitizer]}
    for name in environment:
        if name.endswith("_OPTIONS"):  # into files: pytest swallows what a dying process prints
            environment[name] += f":log_path={folder}/report"
    if sanitizer == "thread":
        environment["TSAN_OPTIONS"] += f":suppressions={folder}/suppressions"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_kernels.py"]
    command += arguments or ["-k", TESTS[sanitizer]]
    # without address randomisation: ThreadSanitizer's shadow memory is at fixed addresses
    prefix = ["setarch", "-R"] if sanitizer == "thread" and shutil.which("setarch") else []
    assignments = [f"{name}={value}" for name, value in environment.items()]
    failed = subprocess.run([*prefix, "env", *assignments, *command], cwd=ROOT).returncode
    for report in sorted(folder.glob("report*")):
        print(report.read_text(errors="replace")[:8000])
        failed = failed or 1
    print(f"==== {sanitizer}: {'FAILED' if failed else 'clean'}, {time.monotonic() - begin:.0f} s", flush=True)
    return failed


def main() -> int:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sanitizer", nargs="?", choices=list(LIBRARY))
    parser.add_argument("--isa", default="portable;avx2;avx512", help="ISAs to build, between semicolons")
    parser.add_argument("--kernels", default="*", help="files of csrc/cpu to build: patterns, between semicolons")
    options, arguments = parser.parse_known_args()
    chosen = [options.sanitizer] if options.sanitizer else list(LIBRARY)
    return max(run(sanitizer, options.isa, options.kernels, arguments) for sanitizer in chosen)


if __name__ == "__main__":
    sys.exit(main())
