"""The library of planted and probing kernels for the emulated GPU, compiled where a test asks for it.

It is compiled here, not by `make emulation`: no test can mistake its kernels for real ones.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
EMULATION = REPOSITORY / "csrc" / "emulation"
SOURCES = REPOSITORY / "tests" / "emulation"
ORDERS = ("ascending", "descending", "random")


@dataclasses.dataclass(frozen=True)
class Mode:
    order: str
    lazy_async: bool
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.order}-{'lazy' if self.lazy_async else 'eager'}"


MODES = tuple(Mode(order, lazy) for order in ORDERS for lazy in (False, True))


# ---------------------------------------------------------------------------------------------------------- building


def cuda_include() -> list[str] | None:
    """Folders with cuda_fp16.h and what it includes."""
    compiler = shutil.which("nvcc")
    candidates = [os.environ.get("CNNFAST_CUDA_INCLUDE"), "/usr/local/cuda/include"]
    candidates += [os.path.join(os.environ[v], "include") for v in ("CUDA_HOME", "CUDA_PATH") if v in os.environ]
    if compiler:
        candidates.append(os.path.join(os.path.dirname(os.path.realpath(compiler)), "..", "include"))
    candidates += [str(p) for p in Path(sysconfig.get_path("purelib")).glob("nvidia/cu[0-9]*/include")]
    for folder in filter(None, candidates):
        nv = [f for f in (folder, os.path.join(folder, "cccl")) if os.path.exists(os.path.join(f, "nv", "target"))]
        if nv and all(os.path.exists(os.path.join(folder, f)) for f in ("cuda_bf16.h", "crt/host_defines.h")):
            return [folder, *nv]
    return None


def build(check: bool) -> Path:
    """The library of planted and probing kernels, cached by the hash of everything that goes into it."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    include = cuda_include()
    if not compiler or not include:
        pytest.skip("needs g++ and the CUDA headers (cuda_fp16.h)")
    runtime = sorted(p for p in EMULATION.glob("*.cpp") if p.name != "bindings.cpp")
    kernels = sorted(SOURCES.glob("*.cu"))
    headers = sorted([*EMULATION.glob("*.h"), *SOURCES.glob("*.h"), *(REPOSITORY / "csrc/cuda/primitives").glob("*.h")])
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ftls-model=initial-exec"]
    flags += ["-Wno-builtin-declaration-mismatch", *(x for folder in include for x in ("-isystem", folder))]
    digest = hashlib.sha256(repr((compiler, flags, check)).encode())
    for path in [*runtime, *kernels, *headers]:
        digest.update(path.read_bytes())
    folder = REPOSITORY / "build" / "emulation-tests" / digest.hexdigest()[:16]
    library = folder / "planted.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    objects = []
    for source in [*runtime, *kernels]:
        target = folder / f"{source.name}.{os.getpid()}.o"
        extra = ["-DCNNFAST_EMULATION_CHECK"] if check else []
        if source in kernels and check:
            extra += ["-g1", "-fsanitize=thread"]
            extra.append("-fsanitize=alignment,signed-integer-overflow,shift,bounds-strict,integer-divide-by-zero")
        subprocess.run([compiler, *flags, *extra, "-x", "c++", "-c", source, "-o", target], check=True)
        objects.append(target)
    unfinished = folder / f"planted.{os.getpid()}.so"
    subprocess.run([compiler, "-shared", *objects, "-o", unfinished], check=True)
    for target in objects:
        target.unlink()
    unfinished.replace(library)
    return library


class Library:
    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        for name in ("run_planted", "run_probe", "bug_names", "accesses"):
            getattr(self._library, name).restype = ctypes.c_char_p
        # name -> the kernel that the bug is planted in; the numbers are the order
        self.bugs: dict[str, str] = dict(line.split() for line in self._library.bug_names().decode().splitlines())
        self._kept: list[np.ndarray] = []

    def configure(self, mode: Mode, count_accesses: bool = False) -> None:
        self._library.configure(ORDERS.index(mode.order), mode.seed, int(mode.lazy_async), int(count_accesses))

    def accesses(self) -> list[tuple[str, int, int, int, str]]:
        """(kind, accesses of a warp, wavefronts or sectors, the fewest, line) of each place since the last call."""
        lines = [line.split(maxsplit=4) for line in self._library.accesses().decode().splitlines()]
        return [(kind, int(a), int(units), int(least), line) for kind, a, units, least, line in lines]

    def register(self, *arrays: tuple[np.ndarray, bool]) -> None:
        self._library.clear_ranges()
        self._kept = [array for array, _ in arrays]
        for array, writable in arrays:
            self._library.register_range(pointer(array), ctypes.c_uint64(array.nbytes), int(writable))

    def planted(self, kernel: str, bug: str, a: np.ndarray, b: np.ndarray, out: np.ndarray, *sizes: int) -> str | None:
        padded = [*sizes, 0, 0, 0, 0][:4]
        number = list(self.bugs).index(bug)
        return text(self._library.run_planted(kernel.encode(), number, pointer(a), pointer(b), pointer(out), *padded))

    def probe(
        self,
        name: str,
        a: np.ndarray | None = None,
        b: np.ndarray | None = None,
        out: np.ndarray | None = None,
        size: int = 0,
        count_accesses: bool = False,
    ) -> str | None:
        self._library.clear_ranges()
        self.configure(MODES[0], count_accesses)
        return text(self._library.run_probe(name.encode(), pointer(a), pointer(b), pointer(out), size))


def pointer(array: np.ndarray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data if array is not None else None)


def text(message: bytes | None) -> str | None:
    return message.decode() if message is not None else None


@functools.cache
def library(check: bool) -> Library:
    """The library, its check variant or not."""
    return Library(build(check))


def to_bf16(a: np.ndarray) -> np.ndarray:
    """Rounded to nearest even, as uint16."""
    bits = np.ascontiguousarray(a, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """The values of such bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
