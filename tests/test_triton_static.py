"""The Triton kernels, compiled for cards that this machine need not have: no spills, the instructions they are for.

Machine code comes from the compiler in Triton's wheel, offline, in processes of their own. Run as a script, this file
compiles every variant and prints the table.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

ARCHITECTURES = (80, 90)
# One variant in so many, and one of each kind for either card: the rest rotates in with the seed, and all are compiled by
# the script.
SAMPLE = 120
SEED = int(os.environ.get("CNNFAST_TEST_SEED", "0"))
INSTRUCTIONS = ("HMMA", "HGMMA", "LDGSTS", "LDG", "FFMA", "STL", "LDL")


@dataclass(frozen=True)
class Facts:
    """What the machine code of one variant shows."""

    architecture: int
    name: str
    registers: int
    stack: int
    shared: int
    counts: dict[str, int]
    problems: list[str]

    def __str__(self) -> str:
        counts = " ".join(f"{name}={count}" for name, count in self.counts.items() if count)
        line = f"sm_{self.architecture} {self.name:36s} {self.registers:3d} registers, {self.shared:6d} B; {counts}"
        return line + "".join(f"\n    {problem}" for problem in self.problems)


def variants(architecture: int) -> Iterator[Any]:
    """All variants of all kernel files."""
    kernels = importlib.import_module("cnnfast.kernels")
    for path in sorted(Path(str(kernels.__file__)).parent.glob("_*_variants.py")):
        yield from importlib.import_module(f"cnnfast.kernels.{path.stem}").variants(architecture)


def sample(architecture: int) -> list[int]:
    """Every kind of call in bf16 with its largest tile, on one card or the other, and a rotating share of everything."""
    chosen = []
    seen: set[str] = set()
    for index, variant in enumerate(variants(architecture)):
        kind, mode, _ = variant.name.split(".", 2)
        turn = ARCHITECTURES[zlib.crc32(f"{SEED}.{kind}".encode()) % len(ARCHITECTURES)]
        first = mode == "bf16" and f"{kind}.{mode}" not in seen and turn == architecture
        seen.add(f"{kind}.{mode}")
        if first or zlib.crc32(f"{SEED}.{architecture}.{variant.name}".encode()) % SAMPLE == 0:
            chosen.append(index)
    return chosen


def _tool(*arguments: str) -> str:
    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(binary), *arguments], capture_output=True, text=True, check=True).stdout


def examine(architecture: int, index: int) -> Facts:
    """Compiles one variant and reads its machine code."""
    from cnnfast.kernels import _common

    variant = list(variants(architecture))[index]
    compiled = _common.compile_variant(variant)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        resources = _tool("--dump-resource-usage", str(cubin))
        assembly = _tool("-sass", str(cubin))
    match = re.search(r"REG:(\d+) STACK:(\d+)", resources)
    assert match, resources
    registers, stack = int(match[1]), int(match[2])
    counts = {name: len(re.findall(rf"\b{name}\b", assembly)) for name in INSTRUCTIONS}
    problems: list[str] = []
    if counts["STL"] or counts["LDL"]:  # a frame of 8 bytes that nothing reads is no spill
        problems.append(f"spills: {stack} bytes of stack, {counts['STL']} stores, {counts['LDL']} loads")
    tensor_core = "HGMMA" if architecture == 90 else "HMMA"
    if variant.tensor_cores and not counts[tensor_core]:
        problems.append(f"no {tensor_core}")
    if not variant.tensor_cores and (counts["HMMA"] or counts["HGMMA"]):
        problems.append("tensor cores in a kernel of full precision")
    if variant.asynchronous and not counts["LDGSTS"]:
        problems.append("no LDGSTS: loads are not asynchronous")
    if compiled.metadata.shared > (163 if architecture == 80 else 227) * 1024:
        problems.append(f"{compiled.metadata.shared} bytes of shared memory: more than a block can have")
    return Facts(architecture, variant.name, registers, stack, compiled.metadata.shared, counts, problems)


def worker(part: int, parts: int, everything: bool) -> None:
    """Examines its part of the variants; one line of JSON each."""
    jobs = []
    for architecture in ARCHITECTURES:
        indices = range(sum(1 for _ in variants(architecture))) if everything else sample(architecture)
        jobs += [(architecture, index) for index in indices]
    for architecture, index in jobs[part::parts]:
        print(json.dumps(asdict(examine(architecture, index))), flush=True)


def examine_all(everything: bool) -> Iterator[Facts]:
    """In processes of their own: an interpreting process cannot compile, and a test process may have threads."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    parts = len(os.sched_getaffinity(0))

    def run(part: int) -> str:
        arguments = [sys.executable, __file__, "--part", str(part), str(parts), *(["--all"] if everything else [])]
        return subprocess.run(arguments, stdout=subprocess.PIPE, text=True, env=environment, check=True).stdout

    with ThreadPoolExecutor(parts) as pool:
        for output in pool.map(run, range(parts)):
            yield from (Facts(**json.loads(line)) for line in output.splitlines())


def test_machine_code() -> None:
    facts = list(examine_all(everything=False))
    for fact in facts:
        print(fact)
    assert {fact.architecture for fact in facts} == set(ARCHITECTURES)
    failures = [str(fact) for fact in facts if fact.problems]
    assert not failures, "\n".join(failures)


def test_tiles_fit() -> None:
    from cnnfast.kernels import _tiles

    for architecture in ARCHITECTURES:
        for precision, itemsize in (("ieee", 4), ("fp32", 4), ("high", 4), ("high", 2)):
            for vectors in (False, True):
                for tile in _tiles.candidates(precision, itemsize, vectors, architecture):
                    assert tile.shared_bytes(itemsize) <= _tiles.SHARED_BYTES[architecture], tile


def main() -> None:
    if "--part" in sys.argv:
        at = sys.argv.index("--part")
        worker(int(sys.argv[at + 1]), int(sys.argv[at + 2]), "--all" in sys.argv)
        return
    failed = total = 0
    for fact in examine_all(everything=True):
        print(fact, flush=True)
        failed += bool(fact.problems)
        total += 1
    sys.exit(f"{failed} of {total} variants have problems" if failed else 0)


if __name__ == "__main__":
    main()
