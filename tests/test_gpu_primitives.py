"""What each wrapper of csrc/cuda/primitives does, on the emulated GPU and on a card: tests/primitives/primitives.cu.

An emulator written from the same manual as the wrappers can share a misreading with them; here a card decides, before any
kernel that stands on them runs. The expected values are the manual's formulas, in numpy.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from support import process

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests" / "primitives" / "primitives.cu"
PRIMITIVES = ROOT / "csrc" / "cuda" / "primitives"
EMULATION = ROOT / "csrc" / "emulation"

pytestmark = pytest.mark.skipif(process.EMULATED or process.INTERPRETED, reason="has an emulation of its own")
ON = [pytest.param("emulated"), pytest.param("card", marks=pytest.mark.gpu)]


# ---- building and calling --------------------------------------------------------------------------------------------


def _headers() -> list[str]:
    """Options that find cuda_fp16.h and what it includes, for g++."""
    folders = [os.environ.get("CNNFAST_CUDA_INCLUDE"), "/usr/local/cuda/include"]
    folders += [os.path.join(os.environ[v], "include") for v in ("CUDA_HOME", "CUDA_PATH") if v in os.environ]
    folders += [str(p) for p in Path(sysconfig.get_path("purelib")).glob("nvidia/cu[0-9]*/include")]
    folders += [str(ROOT / "build" / "cuda-headers" / "nvidia" / "cu13" / "include")]
    found = next((f for f in folders if f and Path(f, "cuda_bf16.h").exists() and Path(f, "crt").exists()), None)
    if found is None:
        pytest.skip("needs the CUDA headers (cuda_fp16.h)")
    return ["-isystem", found, "-isystem", os.path.join(found, "cccl")]


def _build(command: list[str], sources: list[Path]) -> Path:
    """A shared library, cached by the hash of everything that goes into it."""
    digest = hashlib.sha256(repr(command).encode())
    for path in sorted([*sources, *PRIMITIVES.glob("*.h"), *EMULATION.glob("*.h")]):
        digest.update(path.read_bytes())
    library = ROOT / "build" / "primitives" / f"{digest.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        unfinished.replace(library)
    return library


@functools.cache
def _library(on: str) -> ctypes.CDLL:
    if on == "card":
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
        if nvcc is None:
            pytest.skip("needs nvcc: without it there are no CUDA kernels either")
        major, minor = torch.cuda.get_device_capability()
        target = ["-shared", "-Xcompiler", "-fPIC", f"-arch=sm_{major}{minor}"]
        path = _build([nvcc, "-std=c++17", "-O2", *target, str(SOURCE)], [SOURCE])
    else:
        compiler = os.environ.get("CXX") or shutil.which("g++")
        if not compiler:
            pytest.skip("needs g++")
        sources = [SOURCE, *sorted(p for p in EMULATION.glob("*.cpp") if p.name != "bindings.cpp")]
        flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-ftls-model=initial-exec"]
        flags += ["-Wno-builtin-declaration-mismatch", *_headers(), "-x", "c++", *map(str, sources)]
        path = _build([compiler, *flags], sources)
    library = ctypes.CDLL(str(path))
    library.run_primitive.restype = ctypes.c_char_p
    return library


def run(
    on: str, name: str, out: np.ndarray, a: np.ndarray | None = None, b: np.ndarray | None = None, size: int = 0
) -> np.ndarray:
    """The result, whose initial values ``out`` has."""
    library = _library(on)
    if on == "emulated":
        result = out.copy()
        addresses = [None if t is None else t.ctypes.data for t in (a, b, result)]
        error = library.run_primitive(name.encode(), *map(ctypes.c_void_p, addresses), size)
        assert error is None, error
        return result
    tensors = [None if t is None else torch.from_numpy(t.view(np.uint8).copy()).cuda() for t in (a, b, out)]
    torch.cuda.synchronize()
    addresses = [None if t is None else t.data_ptr() for t in tensors]
    error = library.run_primitive(name.encode(), *map(ctypes.c_void_p, addresses), size)
    assert error is None, error
    torch.cuda.synchronize()
    assert tensors[2] is not None
    return tensors[2].cpu().numpy().view(out.dtype).reshape(out.shape)


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def bf16(x: np.ndarray) -> np.ndarray:
    """Bits of the nearest bf16, ties to even; a NaN stays one."""
    bits = torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(torch.bfloat16).view(torch.int16).numpy()
    return bits.view(np.uint16)


def wide(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


# ---- products --------------------------------------------------------------------------------------------------------


def place(lane: int, element: int, matrix: str, tf32: bool) -> tuple[int, int]:
    """(row, column) of an element of a lane's fragment: the PTX ISA's "Matrix Fragments for mma.m16n8k16" and ".m16n8k8"."""
    group, thread = lane // 4, lane % 4
    if matrix == "d":
        return group + 8 * (element >= 2), 2 * thread + element % 2
    if tf32:
        if matrix == "a":
            return group + 8 * (element % 2), thread + 4 * (element >= 2)
        return thread + 4 * element, group
    if matrix == "a":
        return group + 8 * (element in (2, 3, 6, 7)), 2 * thread + element % 2 + 8 * (element >= 4)
    return 2 * thread + element % 2 + 8 * (element >= 2), group


@pytest.mark.parametrize("on", ON)
@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_mma(on: str, kind: str) -> None:
    """d += a b over fragments as the manual lays them out."""
    tf32, depth = kind == "tf32", 8 if kind == "tf32" else 16
    a, b, d = numbers(16, depth), numbers(depth, 8) * 0.5, numbers(16, 8) * 2
    if tf32:  # values that tf32 holds
        a, b = ((x.view(np.uint32) & ~np.uint32(0x1FFF)).view(np.float32) for x in (a, b))
        bits_a, bits_b = a, b
    elif kind == "bf16":
        bits_a, bits_b = bf16(a), bf16(b)
        a, b = wide(bits_a), wide(bits_b)
    else:
        bits_a, bits_b = a.astype(np.float16), b.astype(np.float16)
        a, b = bits_a.astype(np.float32), bits_b.astype(np.float32)
    count = 1 if tf32 else 2
    registers = {"a": np.zeros((32, 4 * count), bits_a.dtype), "b": np.zeros((32, 2 * count), bits_b.dtype)}
    registers["d"] = np.zeros((32, 4), np.float32)
    for matrix, values in (("a", bits_a), ("b", bits_b), ("d", d)):
        for lane in range(32):
            for element in range(registers[matrix].shape[1]):
                registers[matrix][lane, element] = values[place(lane, element, matrix, tf32)]
    out = run(on, f"mma_{kind}", registers["d"], registers["a"], registers["b"])
    found = np.full((16, 8), np.nan)
    for lane in range(32):
        for element in range(4):
            found[place(lane, element, "d", tf32)] = out[lane, element]
    np.testing.assert_allclose(found, d + a.astype(np.float64) @ b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("on", ON)
def test_round_tf32(on: str) -> None:
    """To 10 bits of mantissa, ties away from zero; what the conversion leaves below is not read by a product."""
    x = numbers(32)
    x[:6] = [1.0, 1.0 + 2.0**-11, -(1.0 + 2.0**-11), 1.0 + 2.0**-12, 1.0 + 3 * 2.0**-11, 0.0]
    bits = run(on, "round_tf32", np.zeros(32, np.uint32), x) & np.uint32(0xFFFFE000)
    expected = (x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    np.testing.assert_array_equal(bits, expected)


# ---- moving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", ON)
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(on: str, transposed: bool) -> None:
    """Register m of lane l: row l / 4, columns 2 (l % 4) and the next, of matrix m, or of its transpose."""
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    name = "ldmatrix_transposed" if transposed else "ldmatrix"
    out = run(on, name, np.zeros((32, 4), np.uint32), matrices).view(np.uint16).reshape(32, 4, 2)
    for lane in range(32):
        for m in range(4):
            of = matrices[m].T if transposed else matrices[m]
            np.testing.assert_array_equal(out[lane, m], of[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2])


@pytest.mark.parametrize("on", ON)
def test_asynchronous_copies(on: str) -> None:
    """Each lane's 16 bytes, zeros where nothing is valid, seen by another lane after the wait and a barrier."""
    valid = (np.arange(64) % 5 != 2).astype(np.int32)
    source = np.arange(1, 257, dtype=np.uint32).reshape(64, 4)
    out = run(on, "copies", np.full((64, 4), 0xFFFFFFFF, np.uint32), valid, source)
    np.testing.assert_array_equal(out, source * valid[:, None].astype(np.uint32))


@pytest.mark.parametrize("on", ON)
def test_dynamic_shared_memory(on: str) -> None:
    """As much as asked for, beyond the 48 KiB that need asking, too; aligned."""
    for size in (64, 12000, 20000):
        out = run(on, "dynamic_shared", np.full(2, -1, np.int32), size=size)
        assert list(out) == [size - 1, 0]


# ---- numbers ---------------------------------------------------------------------------------------------------------

SPECIAL = np.array([
    0.0, -0.0, 1.0, -2.5, np.inf, -np.inf, np.nan, 6.1e-5, 5.9e-8, 65504.0, 1e-40, 3.0e38, 1.00390625, 1.01171875, 2049.0, 1e5,
], np.float32)  # fmt: skip


@pytest.mark.parametrize("on", ON)
@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_conversions(on: str, kind: str) -> None:
    """To nearest even, overflow to infinity, subnormals and NaN kept; one by one, and in pairs."""
    x = np.concatenate([SPECIAL, numbers(16)])
    with np.errstate(over="ignore"):
        expected = wide(bf16(x)) if kind == "bf16" else x.astype(np.float16).astype(np.float32)
    narrow = run(on, f"narrow_{kind}", np.zeros(32, np.uint16), x)
    found = wide(narrow) if kind == "bf16" else narrow.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(found, expected)
    assert (np.signbit(found) == np.signbit(expected))[~np.isnan(expected)].all()
    np.testing.assert_array_equal(run(on, f"widen_{kind}", np.zeros(32, np.float32), narrow), expected)
    twice = np.concatenate([x, x[::-1]])
    pairs = run(on, f"pairs_{kind}", np.zeros(64, np.uint16), twice)
    for half, of in ((pairs[:32], expected), (pairs[32:], expected[::-1])):
        values = wide(half) if kind == "bf16" else half.view(np.float16).astype(np.float32)
        np.testing.assert_array_equal(values, of)


@pytest.mark.parametrize("on", ON)
def test_bits_and_finiteness(on: str) -> None:
    x = np.concatenate([SPECIAL, numbers(16)])
    out = run(on, "numbers", np.zeros(32, np.float32), x)
    np.testing.assert_array_equal(out, np.where(np.isfinite(x), x, -1.0))


# ---- all of them -----------------------------------------------------------------------------------------------------


def test_every_wrapper_has_a_microtest() -> None:
    """A function of csrc/cuda/primitives that holds an instruction is called in primitives.cu."""
    tested = SOURCE.read_text(encoding="utf-8")
    found: list[str] = []
    missing = []
    for path in sorted(PRIMITIVES.glob("*.h")):
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"__device__ __forceinline__ [\w:<>]+ (\w+)\([^{;]*\) \{(.*?)\n?\}", text, re.DOTALL):
            if "asm" in match[2]:
                found.append(match[1])
            if "asm" in match[2] and not re.search(rf"\b{match[1]}\b", tested):
                missing.append(f"{path.name}: {match[1]}")
    assert {"ldmatrix_x4", "mma_m16n8k8_tf32", "copy_async_16", "copy_async_wait", "round_tf32"} <= set(found)
    assert not missing, missing
