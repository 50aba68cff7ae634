"""The Triton kernels' machine code without a GPU: compiled by what Triton's wheel ships, examined, and kept in a table.

The table has a row for each variant that can be selected, on each architecture: a digest of its IR, registers, shared
memory, instructions. Equal IR gives equal code from one compiler, so a row whose digest holds need not be compiled again, and
variants that are the same code are compiled once.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton

from support import ttir

ARCHITECTURES = (80, 90, 100)
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
TABLE = Path(__file__).resolve().parent.parent / "triton_static.txt"
INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA", "LDGSTS", "UTMALDG", "UTMASTG")  # what a row counts
SPILLS = ("STL", "LDL")
PTX = r"\b(mma|wgmma|tcgen05|cp\.async)\b"  # what those, but for spills, are made of


@dataclass(frozen=True)
class Row:
    """What the machine code of one variant shows."""

    architecture: int
    name: str
    digest: str
    registers: int
    shared: int
    counts: Mapping[str, int]
    problems: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        counts = " ".join(f"{name}={count}" for name, count in self.counts.items())
        return f"{self.architecture} {self.name} {self.digest} {self.registers} {self.shared} {counts}".rstrip()

    @classmethod
    def of(cls, line: str) -> Row:
        architecture, name, digest, registers, shared, *counts = line.split()
        pairs = (count.split("=") for count in counts)
        return cls(int(architecture), name, digest, int(registers), int(shared), {k: int(v) for k, v in pairs})


# ---- which variants there are ----------------------------------------------------------------------------------------


def variants(architecture: int) -> Iterator[Any]:
    """All variants of all kernel files."""
    kernels = importlib.import_module("cnnfast.kernels")
    for path in sorted(Path(str(kernels.__file__)).parent.glob("_*_variants.py")):
        yield from importlib.import_module(f"cnnfast.kernels.{path.stem}").variants(architecture)


def kind(variant: Any) -> str:
    return variant.name.split(".")[0]


def product(variant: Any) -> bool:
    """Whether it multiplies matrices, on tensor cores or not."""
    return variant.tensor_cores or "INPUT_PRECISION" in variant.constexprs


# ---- examining one ---------------------------------------------------------------------------------------------------


def digest(variant: Any, text: str) -> str:
    """Of all that the compiler gets."""
    options = f"{variant.capability} {' '.join(map(str, variant.options.values()))}\n"
    return hashlib.sha256((options + text).encode()).hexdigest()[:10]


def lower(variant: Any) -> tuple[str, list[str]]:
    """The digest of a variant's IR, and what its masks leave open."""
    from cnnfast.kernels import _common

    text = _common.lower_variant(variant)
    return digest(variant, text), list(ttir.unmasked(text, variant.fn.__name__, variant.constexprs))


def _tool(*arguments: str) -> str:
    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(binary), *arguments], capture_output=True, text=True, check=True).stdout


def wanting(variant: Any, counts: Mapping[str, int], shared: int) -> list[str]:
    """What a variant's machine code, or its row, hasn't of what the variant is for."""
    from cnnfast.kernels import _cards

    architecture, problems = variant.capability, []
    if variant.tensor_cores and not counts.get(TENSOR_CORE[architecture]):
        problems.append(f"no {TENSOR_CORE[architecture]}")
    if not variant.tensor_cores and any(counts.get(name) for name in TENSOR_CORE.values()):
        problems.append("tensor cores in a kernel of full precision")
    if variant.asynchronous and not counts.get("LDGSTS") and not counts.get("UTMALDG"):
        problems.append("neither LDGSTS nor UTMALDG: loads are not asynchronous")
    if shared > (most := _cards.LIMITS[architecture].shared_block):
        problems.append(f"{shared} bytes of shared memory: a block can have {most}")
    return problems


def examine(variant: Any, mark: str) -> Row:
    """Compiles a variant, whose IR's digest is ``mark``, and reads its machine code.

    That isn't disassembled, which takes as long as compiling it, where nothing to be counted can be in it: ptxas makes no
    such instruction of anything but its counterpart in PTX, and nothing spills into no stack.
    """
    from cnnfast.kernels import _common

    architecture, problems = variant.capability, list[str]()
    compiled = _common.compile_variant(variant)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        resources = _tool("--dump-resource-usage", str(cubin))
        match = re.search(r"REG:(\d+) STACK:(\d+)", resources)
        assert match, resources
        registers, stack = int(match[1]), int(match[2])
        assembly = _tool("-sass", str(cubin)) if stack or re.search(PTX, compiled.asm["ptx"]) else ""
    counts = {name: len(re.findall(rf"\b{name}\b", assembly)) for name in (*INSTRUCTIONS, *SPILLS)}
    if any(counts[name] for name in SPILLS):  # a frame that nothing reads is no spill
        problems.append(f"spills: {stack} bytes of stack, {counts['STL']} stores, {counts['LDL']} loads")
    shared = compiled.metadata.shared
    problems += wanting(variant, counts, shared)
    kept = {name: counts[name] for name in INSTRUCTIONS if counts[name]}
    return Row(architecture, variant.name, mark, registers, shared, kept, tuple(problems))


# ---- the table -------------------------------------------------------------------------------------------------------

HEAD = """\
# The machine code of the Triton kernels, by `python tests/test_triton_static.py --write` (make static compares).
# Compiled by {compiler}. No variant spills. A row: architecture, kind.mode.block (of products MxNxK-warps x stages), digest of
# the IR, registers, bytes of shared memory, instructions.
"""


def compiler() -> str:
    return f"triton {triton.__version__}"


def read(path: Path = TABLE) -> tuple[str, dict[tuple[int, str], Row]]:
    """The compiler, and the rows by architecture and name."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    match = re.search(r"Compiled by (.*?)\. ", text)
    rows = (Row.of(line) for line in text.splitlines() if line and not line.startswith("#"))
    return match[1] if match else "", {(row.architecture, row.name): row for row in rows}


def failures(found: Row, rows: Mapping[tuple[int, str], Row]) -> list[str]:
    """What is wrong with a variant: in its code, or beside what the table says, where every variant has to be."""
    kept = rows.get((found.architecture, found.name))
    if kept == found:
        return list(found.problems)
    return [*found.problems, f"in the table: {kept}" if kept else "not in the table"]


def write(rows: Iterable[Row], path: Path = TABLE) -> None:
    """Sorted, so that a change shows as what it is."""
    ordered = sorted(rows, key=lambda row: (row.name.split(".")[0], row.name, row.architecture))
    text = HEAD.format(compiler=compiler()) + "".join(f"{row}\n" for row in ordered)
    path.with_suffix(".tmp").write_text(text, encoding="utf-8")
    path.with_suffix(".tmp").replace(path)
