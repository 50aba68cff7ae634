"""How the CUDA kernels' warps access memory: bank conflicts of shared memory, sectors of global memory.

Counted by the emulation's check variant (csrc/emulation/traffic.h). Run as a script in a checking process
(CNNFAST_EMULATE_CUDA=check) this file prints the counts of every kernel on a typical case; --lines: of every line.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import cases
import numpy as np
import pytest
import torch
from support import process
from support.emulated import Library, library

from cnnfast import dispatch, settings
from cnnfast.backends import cuda
from cnnfast.dispatch import TORCH_DTYPES

KINDS = ("shared read", "shared write", "global read", "global write")


@pytest.fixture(scope="session")
def checked() -> Library:
    return library(check=True)


@pytest.mark.parametrize("stride", [1, 2, 3, 8, 32])
def test_words_at_a_distance(checked: Library, stride: int) -> None:
    """32 words 4 * stride bytes apart: as many share a bank as the stride has factors of two."""
    out = np.zeros(32 * 32 + 8, np.float32)
    out = out[-(out.ctypes.data // 4) % 8 :]
    assert checked.probe("strided_words", out=out, size=stride, count_accesses=True) is None
    conflicts = stride & -stride
    found = {kind: (a, units, least) for kind, a, units, least, _ in checked.accesses()}
    assert found["shared_write"] == found["shared_read"] == (1, conflicts, 1)
    assert found["global_write"] == (1, min(32, 4 * stride), 4)


@pytest.mark.parametrize(("stride", "wavefronts"), [(1, 4), (2, 8), (3, 4), (8, 32)])
def test_vectors_at_a_distance(checked: Library, stride: int, wavefronts: int) -> None:
    """Eight lanes of 16 bytes a wavefront, where they fall into different banks; the pieces count as one access."""
    out = np.zeros(32 * 32 * 4 + 8, np.float32)
    out = out[-(out.ctypes.data // 4) % 8 :]
    assert checked.probe("strided_vectors", out=out, size=stride, count_accesses=True) is None
    found = {kind: (a, units, least) for kind, a, units, least, _ in checked.accesses()}
    assert found["shared_write"] == found["shared_read"] == (1, wavefronts, 4)
    assert found["global_write"] == (1, 16 if stride == 1 else 32, 16)


def test_one_word_for_all(checked: Library) -> None:
    """A broadcast is one wavefront; each line is named."""
    out = np.zeros(40, np.float32)
    assert checked.probe("same_word", out=out[-(out.ctypes.data // 4) % 8 :], count_accesses=True) is None
    found = {kind: (a, units, least, line) for kind, a, units, least, line in checked.accesses()}
    assert found["shared_read"][:3] == found["shared_write"][:3] == (1, 1, 1)
    assert found["global_write"][:3] == (1, 4, 4)
    assert all("probes.cu:" in line for *_, line in found.values())


# ---- the kernels -----------------------------------------------------------------------------------------------------

Counts = list[tuple[str, str, str, int, int, int]]  # as the module's accesses() gives them


def typical(op: str, implementation: dispatch.Implementation, dtype: str) -> Any:
    """The first case of an operation's table with enough to do for full tiles that a kernel can serve; None without."""
    adapter = {module.OP: module for module in cases.MODULES}[op]
    for case in adapter.CASES:
        p = adapter.problem(case, implementation.direction, TORCH_DTYPES[dtype], "high")
        if not dispatch.reasons_against(implementation, p) and p.bytes > 20000:
            return case
    return None


def count(op: str, implementation: dispatch.Implementation, dtype: str) -> Counts:
    """The accesses of one call."""
    adapter, case = {module.OP: module for module in cases.MODULES}[op], typical(op, implementation, dtype)
    if case is None:
        return []
    given = {r: g.tensor for r, g in adapter.inputs(case, implementation.direction, TORCH_DTYPES[dtype]).items()}
    adapter.OPERATORS[implementation.direction]._runs.clear()
    cuda.MODULE.configure(count_accesses=True)
    try:
        cuda.MODULE.accesses()
        with settings.backend(implementation.name), settings.strict():
            backend, _, strict = settings.state()
            adapter.call(case, implementation.direction, given, "high", backend, strict)
        return list(cuda.MODULE.accesses())
    finally:
        cuda.MODULE.configure()


def kernels() -> Iterator[tuple[str, dispatch.Implementation, str]]:
    """Every kernel of ours in f32 and bf16, forward and gradients."""
    for i in dispatch.implementations():
        if i.backend == "cuda":
            yield from ((i.op, i, dtype) for dtype in ("f32", "bf16") if dtype in i.dtypes)


@pytest.mark.emulated
@pytest.mark.skipif(not process.CHECKED, reason="counted by the emulated GPU's check variant")
def test_tensor_kernels_have_no_bank_conflicts() -> None:
    """Implicit GEMM whose operands are vectors: neither staging, ldmatrix, nor moving the sums has any."""
    seen = set()
    for op, implementation, dtype in kernels():
        if op == "conv_bn_act" or "implicit_gemm" not in implementation.stem or "elements" in implementation.name:
            continue
        rows = [r for r in count(op, implementation, dtype) if r[1].startswith("shared")]
        worst = [r for r in rows if r[4] > r[5]]
        assert rows, implementation.name
        assert not worst, f"{implementation.name} {implementation.direction} {dtype}: {worst}"
        seen.add((implementation.name, implementation.direction, dtype))
    assert len(seen) >= 12


def main() -> None:
    assert process.CHECKED, "CNNFAST_EMULATE_CUDA=check"
    print("units over the fewest that the bytes need: wavefronts of shared memory, sectors of global memory")
    for op, implementation, dtype in kernels():
        rows = count(op, implementation, dtype)
        if not rows:
            continue
        units: Counter[str] = Counter()
        least: Counter[str] = Counter()
        for _, kind, _, _, u, n in rows:
            units[kind] += u
            least[kind] += n
        text = "  ".join(f"{kind} {units[kind] / least[kind]:5.2f}" for kind in KINDS if least[kind])
        print(f"{implementation.name} {implementation.direction} {dtype}: {text}", flush=True)
        if "--lines" in sys.argv:
            for kernel, kind, where, accesses, u, n in sorted(rows, key=lambda r: r[5] - r[4]):
                if u > n:
                    print(f"    {kind} {u / n:5.2f} ({accesses} of {kernel[:60]}) in {where}")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
