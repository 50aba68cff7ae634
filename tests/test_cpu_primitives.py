"""csrc/cpu/primitives/dot.h: dot products of pairs of bf16, on any processor by their twin, and the instructions themselves
where this one has them."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from support import process

from cnnfast import dispatch
from cnnfast.backends import cpu

pytestmark = pytest.mark.skipif(
    process.EMULATED or process.INTERPRETED, reason="the CPU's primitives: the plain process"
)

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests" / "primitives" / "dot.cpp"
HEADERS = [ROOT / "csrc" / "cpu" / "primitives" / name for name in ("dot.h", "vec.h")]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c", "-mavx512bf16"]
FLAGS = {"portable": [], "avx512_bf16": AVX512}
HERE = ["portable", *sorted({cpu.DOT for i in dispatch.implementations("conv2d") if i.name.endswith(cpu.DOT)})]
COUNT = 1 << 14


@functools.cache
def library(isa: str) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if not compiler:
        pytest.skip("needs g++")
    command = [
        compiler,
        "-std=c++17",
        "-O2",
        "-ffp-contract=fast",
        "-shared",
        "-fPIC",
        f"-DCNNFAST_ISA={isa}",
        *FLAGS[isa],
    ]
    state = hash((tuple(command), *(p.read_bytes() for p in (SOURCE, *HEADERS))))
    path = ROOT / "build" / "primitives" / f"dot-{state & (1 << 64) - 1:x}-{os.getpid()}.so"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([*command, str(SOURCE), "-o", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(path))
    path.unlink()  # it stays mapped
    return loaded


def call(isa: str, name: str, out: torch.Tensor, *operands: torch.Tensor | int) -> torch.Tensor:
    given = [ctypes.c_void_p(t.data_ptr()) if isinstance(t, torch.Tensor) else t for t in (out, *operands)]
    getattr(library(isa), name)(*given)
    return out


def operands(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums, and two operands of pairs (as 32-bit integers), of all magnitudes."""
    generator = torch.Generator().manual_seed(seed)

    def values(n: int) -> torch.Tensor:
        exponents = torch.randint(-60, 60, (n,), generator=generator) if seed else torch.zeros(n)
        return torch.randn(n, generator=generator) * torch.exp2(exponents)

    a, b = (values(2 * COUNT).bfloat16().view(torch.int32) for _ in range(2))
    return values(COUNT), a, b


def dot(isa: str, name: str, *given: torch.Tensor) -> torch.Tensor:
    return call(isa, name, torch.empty(COUNT), *given, COUNT)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("isa", HERE)
def test_dot_is_two_sums_in_order(isa: str, seed: int) -> None:
    """The second product first, each sum rounded to float: to half a unit of the largest that occurs."""
    total, a, b = operands(seed)
    products = (a.view(torch.bfloat16).double() * b.view(torch.bfloat16).double()).reshape(-1, 2)
    middle = total.double() + products[:, 1]
    ref = middle.float().double() + products[:, 0]
    unit = 2.0**-24 * torch.maximum(middle.abs(), ref.abs()) * 1.001
    assert bool(((dot(isa, "dot", total, a, b).double() - ref).abs() <= unit).all())


@pytest.mark.skipif("avx512_bf16" not in HERE, reason="this processor has no AVX512-BF16")
@pytest.mark.parametrize("seed", [0, 1])
def test_twin_is_the_instruction(seed: int) -> None:
    given = operands(seed)
    assert torch.equal(dot("avx512_bf16", "dot", *given), dot("portable", "dot_twin", *given))
    x, y = operands(seed + 2)[0], operands(seed + 3)[0]
    found = [call(isa, "narrowed_pairs", torch.empty(COUNT, dtype=torch.int32), x, y, COUNT) for isa in HERE]
    assert torch.equal(*found)


@pytest.mark.parametrize("isa", HERE)
def test_special_values(isa: str) -> None:
    """NaN and infinities come through; denormals are 0, as operands and as results."""
    inf, nan, tiny = float("inf"), float("nan"), 2.0**-130
    # sum, first and second of a, of b, result
    rows: list[tuple[float, Any, Any, float]] = [
        (1.0, (2.0, 3.0), (5.0, 7.0), 32.0), (0.0, (inf, 1.0), (1.0, 1.0), inf), (-inf, (inf, 0.0), (1.0, 1.0), nan),
        (0.0, (inf, 1.0), (0.0, 1.0), nan), (nan, (1.0, 1.0), (1.0, 1.0), nan), (0.0, (1.0, nan), (1.0, 0.0), nan),
        (tiny, (0.0, 0.0), (0.0, 0.0), 0.0), (0.0, (tiny, 1.0), (2.0**100, 1.0), 1.0),
        (0.0, (2.0**-70, 0.0), (2.0**-60, 0.0), 0.0), (3e38, (2.0**127, 0.0), (4.0, 0.0), inf),
    ]  # fmt: skip
    for total, a, b, expected in rows:
        given = [torch.tensor(v * COUNT).bfloat16().view(torch.int32) for v in (a, b)]
        found = dot(isa, "dot", torch.full((COUNT,), total), *given)
        torch.testing.assert_close(found, torch.full((COUNT,), expected), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("isa", HERE)
def test_rounding_is_torchs(isa: str) -> None:
    """To nearest even, to infinity beyond the largest, NaN to NaN; of denormals zeros."""
    x = operands(1)[0]
    x[::3] = (x[::3].view(torch.int32) & ~0xFFFF | 0x8000).view(torch.float32)  # ties
    x[:4] = torch.tensor([float("nan"), float("inf"), -3.4e38, 2.0**-130])
    found = call(isa, "narrowed", torch.empty(COUNT, dtype=torch.bfloat16), x, COUNT)
    expected = x.bfloat16()
    expected[3] = 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("isa", HERE)
def test_partial_loads(isa: str) -> None:
    width = 2 * library(isa).lanes()
    x = torch.arange(1, width + 1, dtype=torch.int16)
    for n in range(width + 1):
        found = call(isa, "partial", torch.full((width,), -1, dtype=torch.int16), x, n)
        assert found.tolist() == [*range(1, n + 1), *[0] * (width - n)]
