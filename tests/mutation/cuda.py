"""Mutants of csrc/cuda: the mutated file alone is compiled into a checking emulation, at first in f32 and bf16."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from support.emulated import cuda_include

from . import operators
from .operators import ROOT, Mutant

NAME = "cuda"
SOURCES = ROOT / "csrc" / "cuda"
# Choices that change no result: which tile is faster is not for these tests to say, and they have their own.
EXCLUDED = ("conv2d_implicit_gemm_plan.h",)
CHECK = ["-DCNNFAST_EMULATION_CHECK"]
SANITIZE = [
    "-fsanitize=thread",
    "-fsanitize=alignment,signed-integer-overflow,shift,bounds-strict,integer-divide-by-zero",
]

_CHANGES = (
    operators.swaps,
    operators.constants,
    operators.indices,
    operators.removed(
        r"__sync(?:threads|warp)\(\);", r"copy_async_(?:commit|wait<[^;]*>)\(\);", r"\b(?:continue|break|return);"
    ),
)
_SKIPPED = re.compile(r"\s*(#|template|using|namespace|static_assert|CNNFAST_|typename|.*__launch_bounds__|.*\\$)")


def files() -> list[Path]:
    """What is mutated."""
    found = sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.h")])
    return [p for p in found if p.name not in EXCLUDED]


def _code(text: str) -> list[str]:
    """The lines, with blanks for comments and strings."""
    blank = re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.S)
    return blank.splitlines()


def mutants(path: Path) -> Iterator[Mutant]:
    """All mutants of a file."""
    code = _code(path.read_text())
    table = next((i for i, line in enumerate(code) if line.startswith("CNNFAST_KERNEL(")), len(code))
    applies = lambda i: i < table and not _SKIPPED.match(code[i])  # noqa: E731
    yield from operators.mutants(path, code, applies, _CHANGES)


@functools.cache
def _includes(path: Path) -> frozenset[Path]:
    """A file and all of csrc/cuda that it includes."""
    found = {path}
    for name in re.findall(r'#include "([^"]+)"', path.read_text()):
        target = (path.parent / name).resolve()
        if target.parent == SOURCES and target.exists():
            found |= _includes(target)
    return frozenset(found)


@functools.cache
def units(path: str) -> list[str]:
    """The kernel files that a file is a part of, the smallest first: each is built and tested until one notices."""
    users = [p for p in SOURCES.glob("*.cu") if ROOT / path in _includes(p)]
    weight = lambda p: sum(len(q.read_text()) for q in _includes(p)) * p.read_text().count("CNNFAST_KERNEL")  # noqa: E731
    return [p.name for p in sorted(users, key=weight)]


def _compiler() -> list[str]:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if not compiler or not cuda_include():
        sys.exit("mutants of CUDA kernels need g++ and the CUDA headers")
    return [compiler, "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ftls-model=initial-exec", "-w"]


def _includes_of_cuda() -> list[str]:
    return [x for folder in cuda_include() or () for x in ("-isystem", folder)]


def prepare(folder: Path) -> None:
    """Compiles once what all mutants share: the emulation's runtime and the bindings."""
    import pybind11

    folder.mkdir(parents=True, exist_ok=True)
    sources = [ROOT / "csrc" / "bindings" / "module.cpp", *sorted((ROOT / "csrc" / "emulation").glob("*.cpp"))]
    python = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    defines = [*CHECK, "-DCNNFAST_MODULE=_emulated_check", "-DCNNFAST_MODULE_EXTRAS"]
    for source in sources:
        target = folder / f"{source.stem}.o"
        if not target.exists() or target.stat().st_mtime < max(
            p.stat().st_mtime for p in (*source.parent.glob("*"), ROOT / "csrc/common/params.h")
        ):
            command = [*_compiler(), "-O2", *defines, *python, *_includes_of_cuda(), "-c", source, "-o", target]
            subprocess.run(command, check=True)


def _without_dtypes(text: str) -> str:
    """A kernel file whose table has f32 and bf16 alone: half of the templates to compile."""
    out, at = [], 0
    for m in re.finditer(r'^CNNFAST_\w+\("([\w.]+)"', text, re.M):
        if not {"f16", "f64"} & set(m[1].split(".")):
            continue
        depth, end = 0, text.index("(", m.start())
        while True:
            depth += (text[end] == "(") - (text[end] == ")")
            end += 1
            if not depth:
                break
        out.append(text[at : m.start()])
        at = end
    return "".join([*out, text[at:]])


def build(unit: str, mutant: Mutant | None, shared: Path, folder: Path, quick: bool) -> tuple[dict[str, str], str]:
    """Compiles a kernel file, mutated or not, into a module; the environment of its tests, or why it doesn't compile."""
    sources = folder / "csrc"
    if not sources.exists():
        sources.mkdir(parents=True)
        shutil.copytree(SOURCES, sources / "cuda")
        for name in ("common", "emulation"):
            (sources / name).symlink_to(ROOT / "csrc" / name)
    for path in SOURCES.glob("*.[ch]*"):
        (sources / "cuda" / path.name).write_text(path.read_text())
    if mutant:
        (folder / mutant.path).write_text(mutant.text())
    source = sources / "cuda" / unit
    if quick:
        source.write_text(_without_dtypes(source.read_text()))
    module = folder / f"_emulated_check{sysconfig.get_config_var('EXT_SUFFIX')}"
    module.unlink(missing_ok=True)
    flags = ["-O1", "-ffp-contract=fast", "-fno-strict-aliasing", "-Wno-builtin-declaration-mismatch"]
    command = [
        *_compiler(),
        *flags,
        *SANITIZE,
        *_includes_of_cuda(),
        "-x",
        "c++",
        "-c",
        source,
        "-o",
        folder / "unit.o",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {}, done.stderr[:2000]
    objects = [*sorted(shared.glob("*.o")), folder / "unit.o"]
    done = subprocess.run([*_compiler(), "-shared", *objects, "-o", module], capture_output=True, text=True)
    return {
        "CNNFAST_EMULATE_CUDA": "check",
        "CNNFAST_EMULATION_DIR": str(folder),
    }, done.stderr if done.returncode else ""


def selection(unit: str, quick: bool) -> str:
    """pytest's -k: the tests of a kernel file. Nothing else is in the module."""
    missing = " and not torch.float16 and not torch.float64" if quick else ""
    return f"cuda and not every_kernel and not foreign{missing}"
