"""The emulated fragments lie as CuTe says: a reading of the manual that isn't ours.

``emulation/cute.json`` is what CUTLASS 4.2's headers (PyPI's nvidia-cutlass) gave; where they are at hand
(CNNFAST_CUTLASS_INCLUDE, or that package) it is made again.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.emulated import SOURCES, Library, cuda_include, from_bf16, library, to_bf16

STORED: dict[str, list[list[Any]]] = json.loads((SOURCES / "cute.json").read_text())
SIZES = {"bf16": (16, 8, 16), "f16": (16, 8, 16), "tf32": (16, 8, 8)}  # m, n, k


@pytest.fixture(scope="session")
def plain() -> Library:
    return library(check=False)


def cutlass() -> Path | None:
    """The folder of CUTLASS's headers."""
    if "CNNFAST_CUTLASS_INCLUDE" in os.environ:
        return Path(os.environ["CNNFAST_CUTLASS_INCLUDE"])
    found = importlib.util.find_spec("cutlass_library")
    places = found.submodule_search_locations if found else None
    return Path(places[0], "source", "include") if places else None


@pytest.mark.parametrize("kind", SIZES)
def test_mma_fragments(plain: Library, kind: str) -> None:
    """Operands laid out by CuTe's tables give the product, read back by its table."""
    m, n, k = SIZES[kind]
    rng = np.random.default_rng(2)
    a, b, c = (rng.integers(-8, 9, size).astype(np.float32) for size in ((m, k), (n, k), (m, n)))  # exact in each type
    bits = {"bf16": to_bf16, "f16": lambda v: v.astype(np.float16).view(np.uint16), "tf32": lambda v: v}[kind]

    def registers(matrix: np.ndarray, name: str) -> np.ndarray:
        return np.array([[matrix[row, column] for row, column in lane] for lane in STORED[f"{kind} {name}"]])

    d = np.ascontiguousarray(registers(c, "c"), np.float32)
    operands = [np.ascontiguousarray(bits(registers(matrix, name))) for matrix, name in ((a, "a"), (b, "b"))]
    assert plain.probe(f"mma_{kind}", *operands, d) is None
    out = np.full((m, n), np.nan)
    for lane, elements in enumerate(STORED[f"{kind} c"]):
        for i, (row, column) in enumerate(elements):
            out[row, column] = d[lane, i]
    np.testing.assert_array_equal(out, c + a @ b.T)


@pytest.mark.parametrize("name", ["ldmatrix", "ldmatrix_transposed"])
def test_ldmatrix(plain: Library, name: str) -> None:
    out = np.zeros((32, 8), np.uint16)
    assert plain.probe(name, np.arange(256, dtype=np.uint16), None, out) is None
    assert out.tolist() == STORED[name]


@pytest.mark.skipif(not cutlass() or not cuda_include() or not shutil.which("g++"), reason="needs CUTLASS's headers")
def test_the_stored_layouts_are_cutes(tmp_path: Path) -> None:
    folders = [x for folder in cuda_include() or () for x in ("-isystem", folder)]
    command = ["g++", "-std=c++17", "-w", "-I", str(cutlass()), *folders, "-o", str(tmp_path / "cute")]
    subprocess.run([*command, str(SOURCES / "cute.cpp")], check=True)
    made = subprocess.run([str(tmp_path / "cute")], capture_output=True, text=True, check=True).stdout
    assert json.loads(made) == STORED


def test_bits_round_trip() -> None:
    """What the tests convert with."""
    assert from_bf16(to_bf16(np.arange(-8, 9, dtype=np.float32))).tolist() == list(range(-8, 9))
