"""The CUDA kernels, compiled for six architectures: no spills, no warnings, the instructions that they are for.

Registers, shared memory and the blocks that a multiprocessor holds stand in ``cuda_static.txt`` and change only on
purpose. The tests compile a rotating sample, where there is an nvcc. Run as a script, this file compiles everything,
compares, and with ``--write`` writes the table; with names of files (conv2d_stem.cu ...) these alone.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.occupancy import LIMITS, SHARED_RESERVED, blocks_at_once

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
TABLE = Path(__file__).with_name("cuda_static.txt")
SEED = int(os.environ.get("CNNFAST_TEST_SEED", "0"))
SAMPLE = 2  # of the pairs (file, architecture)

# Instructions by what they are for.
INSTRUCTIONS = {"HMMA": r"\bHMMA\.", "LDGSTS": r"\bLDGSTS\.", "loads of 128 bits": r"\bLDG(?:STS)?\.\S*128"}
# Files whose products are the tensor cores', with what their kernels have to have; those of implicit GEMM that stage their
# operands element by element need only the first.
TENSOR_FILES = {
    "bn_act_conv_implicit_gemm.cu": tuple(INSTRUCTIONS),
    "conv2d_implicit_gemm.cu": tuple(INSTRUCTIONS),
    "conv2d_implicit_gemm_weights.cu": tuple(INSTRUCTIONS),
    **dict.fromkeys(
        (
            "conv2d_grouped.cu",
            "conv2d_grouped_weights.cu",
            "conv2d_stem.cu",
            "conv2d_stem_weights.cu",
            "conv2d_winograd_weights_half.cu",
        ),
        ("HMMA",),
    ),
}
TENSOR_KERNELS, BY_ELEMENT = ("correlate<", "wgrad<", "winograd::correlate", "winograd::wgrad"), ", true>"
# Dynamic shared memory isn't in the machine code. Of a kernel with so named parameters: the launcher's expression.
DYNAMIC = {
    r"(implicit_gemm::(?:Half<\w+>|Tf32(?:x3)?)), (implicit_gemm::Tile<[\d, ]+>)": (
        "conv2d_implicit_gemm.h",
        "implicit_gemm::kSharedBytes<{0}, {1}>",
    ),
    r"winograd::correlate<(\d)>": ("conv2d_winograd.h", "winograd::Block<{0}>::kSharedBytes"),
    r"winograd::wgrad<(\d)>": ("conv2d_winograd_weights.cu", "winograd::WeightsBlock<{0}>::kSharedBytes"),
    r"winograd::correlate_half<": ("conv2d_winograd_half.h", "winograd::HalfBlock::kSharedBytes"),
    r"winograd::wgrad_half<": ("conv2d_winograd_weights_half.cu", "winograd::WeightsHalfBlock::kSharedBytes"),
}
VARYING = (  # what filters, or a tile and its halo, need
    "conv2d_depthwise.cu", "conv2d_grouped.cu", "conv2d_grouped_weights.cu", "conv2d_stem.cu", "conv2d_stem_weights.cu",
)  # fmt: skip


def compiler() -> str | None:
    """An nvcc: the system's, or the one of PyPI's wheels."""
    include = os.environ.get("CNNFAST_CUDA_INCLUDE")  # a toolkit's
    beside = str(Path(include).resolve().parent / "bin" / "nvcc") if include else None
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc"), beside]
    roots = [Path(sysconfig.get_path("purelib")), ROOT / "build" / "cuda-headers"]
    candidates += [str(p) for root in roots for p in sorted(root.glob("nvidia/cu[0-9]*/bin/nvcc"))]
    return next((c for c in candidates if c and os.access(c, os.X_OK)), None)


def tool(name: str) -> str | None:
    """cuobjdump and nvdisasm: the toolkit's, or those in Triton's wheel."""
    nvcc = compiler()
    beside = Path(nvcc).parent / name if nvcc else None
    triton = Path(sysconfig.get_path("purelib"), "triton", "backends", "nvidia", "bin", name)
    return shutil.which(name) or next((str(p) for p in (beside, triton) if p and p.exists()), None)


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the machine code of one kernel shows."""

    file: str
    kernel: str
    architecture: int
    threads: int
    registers: int
    shared: int  # bytes of a block, with the dynamic ones where the launcher's are constant
    problems: tuple[str, ...] = ()

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor holds at once."""
        return blocks_at_once(self.architecture, self.threads, self.registers, self.shared)


def readable(names: list[str]) -> list[str]:
    """Mangled names in C++'s words, without what all have."""
    out = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    found = []
    for line in out.splitlines():
        name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|cnnfast::cuda::|cnnfast::|^void ", "", line)
        name = re.sub(r"\((?:Direction|Activation|\w+)\)(\d+)", r"\1", name)
        depth = 0
        for i, c in enumerate(name):  # to the end of the template's arguments, or of the name
            depth += (c == "<") - (c == ">")
            if c == "(" and depth == 0:
                name = name[:i]
                break
        found.append(name)
    return found


@functools.cache
def constants(header: str, expressions: frozenset[str]) -> dict[str, int]:
    """The values of a header's constants, by the compiler: sizes of arrays in PTX."""
    names = dict(enumerate(sorted(expressions)))
    with tempfile.TemporaryDirectory() as folder:
        source, ptx = Path(folder) / "constants.cu", Path(folder) / "constants.ptx"
        arrays = "".join(f"__device__ char bytes{i}[{expression}];\n" for i, expression in names.items())
        source.write_text(f'#include "{SOURCES / header}"\nusing namespace cnnfast::cuda;\n{arrays}')
        nvcc = compiler()
        assert nvcc
        command = [nvcc, "-std=c++17", "-ptx", "-arch=compute_80", "-o", str(ptx), str(source)]
        subprocess.run(command, check=True, capture_output=True)
        found = dict(re.findall(r"bytes(\d+)\[(\d+)\]", ptx.read_text()))
    return {expression: int(found[str(i)]) for i, expression in names.items()}


def dynamic(kernels: list[str]) -> dict[str, int]:
    """Bytes of dynamic shared memory that every launch of a kernel has, of those where they don't differ."""
    found: dict[str, tuple[str, str]] = {}
    for kernel, (pattern, (header, expression)) in itertools.product(kernels, DYNAMIC.items()):
        match = re.search(pattern, kernel)
        if match and kernel.startswith(TENSOR_KERNELS):
            found[kernel] = header, expression.format(*match.groups())
    values: dict[str, int] = {}
    for header in {h for h, _ in found.values()}:
        values |= constants(header, frozenset(e for h, e in found.values() if h == header))
    return {kernel: values[expression] for kernel, (_, expression) in found.items()}


@functools.cache
def _lock(file: str, generation: int) -> threading.Lock:
    return threading.Lock()


@functools.cache
def _ptx(file: str, generation: int) -> str:
    nvcc = compiler()
    assert nvcc
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        options = ["-std=c++17", "-O3", "-DNDEBUG", "-ptx", f"-arch=compute_{generation}", "-o", ptx]
        subprocess.run([nvcc, *options, SOURCES / file], check=True, capture_output=True)
        return ptx.read_text()


def ptx_of(file: str, architecture: int) -> str:
    """The PTX that an architecture's machine code is made of in the build, see csrc/CMakeLists.txt."""
    generation = 80 if architecture < 100 else 100
    with _lock(file, generation):
        return _ptx(file, generation)


def examine(file: str, architecture: int) -> list[Facts]:
    """Compiles a file as the build does, for one architecture, and reads its machine code."""
    nvcc, cuobjdump = compiler(), tool("cuobjdump")
    assert nvcc
    assert cuobjdump
    text = ptx_of(file, architecture)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(text)
        ptxas = Path(nvcc).with_name("ptxas")
        assembled = subprocess.run(
            [ptxas, "-v", "-O3", f"-arch=sm_{architecture}", ptx, "-o", cubin],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        usage = run([cuobjdump, "--dump-resource-usage", cubin]).stdout
        assembly = run([cuobjdump, "-sass", cubin]).stdout if file in TENSOR_FILES else ""
        entries = {e.split("(", 1)[0]: e for e in re.split(r"\.entry ", text)[1:]}
    threads = {name: m[1] for name, entry in entries.items() if (m := re.search(r"\.maxntid (\d+)", entry))}
    complaints = [line for line in assembled.stderr.splitlines() if "warning" in line or re.search(r"\(C\d+\)", line)]
    bodies = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", assembly, re.S))
    used = re.findall(r"Function (\S+):\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    # From sm_90 on the bytes that the system takes are counted, too, in files that use shared memory.
    reserved = SHARED_RESERVED if architecture >= 90 else 0
    names = readable([u[0] for u in used])
    more = dynamic(names)
    facts = []
    for (name, registers, stack, shared, local), kernel in zip(used, names, strict=True):
        problems = [f"{stack} bytes of stack, {local} of local memory"] if int(stack) or int(local) else []
        problems += [] if name in threads else ["no __launch_bounds__"]
        if "cnnfast_dynamic_shared" in entries[name] and kernel not in more and file not in VARYING:
            problems.append("how much dynamic shared memory? Neither DYNAMIC nor VARYING says")
        if bodies and kernel.startswith(TENSOR_KERNELS):
            body = bodies[name]
            wanted = ("HMMA",) if kernel.endswith(BY_ELEMENT) else TENSOR_FILES[file]
            problems += [f"no {what}" for what in wanted if not re.search(INSTRUCTIONS[what], body)]
        facts.append(
            Facts(file, kernel, architecture, int(threads.get(name, 1024)), int(registers),
                  max(0, int(shared) - reserved) + more.get(kernel, 0), tuple(problems + complaints))
        )  # fmt: skip
        if not facts[-1].blocks:
            facts[-1] = dataclasses.replace(facts[-1], problems=(*facts[-1].problems, "not one block fits"))
    return facts


def files() -> list[str]:
    """The kernel files."""
    return sorted(p.name for p in SOURCES.glob("*.cu"))


# ---- the table -------------------------------------------------------------------------------------------------------

Row = tuple[str, str]  # (file, kernel)


def cell(fact: Facts) -> str:
    """Registers, and the blocks at once."""
    return f"{fact.registers}/{fact.blocks}"


HEAD = [
    "# Written by tests/test_cuda_static.py --write, held by its test: what nvcc makes of the CUDA kernels.",
    "# Registers of a thread / blocks that a multiprocessor holds at once, by architecture; threads and shared bytes of",
    "# a block (on sm_80; without dynamic ones where they depend on the problem); the kernel.",
    " ".join([*(f"{f'sm_{a}':>7}" for a in LIMITS), "threads", " shared"]),
]


def sections() -> dict[str, list[str]]:
    """The lines of the table in the repository, by file."""
    found: dict[str, list[str]] = {}
    for line in TABLE.read_text().splitlines()[len(HEAD) :]:
        if line.endswith(".cu"):
            found[line] = lines = []
        elif line:
            lines.append(line)
    return found


def render(facts: list[Facts]) -> str:
    """A line for each kernel, a column for each architecture; of files that weren't compiled as it was."""
    by_file = {file: lines for file, lines in sections().items() if file in files()}
    rows: dict[Row, dict[int, Facts]] = {}
    for fact in facts:
        rows.setdefault((fact.file, fact.kernel), {})[fact.architecture] = fact
        by_file[fact.file] = []
    for (file, kernel), by in sorted(rows.items()):
        first = by[min(by)]
        cells = [f"{cell(by[a]) if a in by else '-':>7}" for a in LIMITS]
        by_file[file].append(" ".join([*cells, f"{first.threads:7d}", f"{first.shared:7d}", kernel]))
    return "\n".join([*HEAD, *itertools.chain(*(["", file, *lines] for file, lines in sorted(by_file.items())))]) + "\n"


def stored() -> dict[Row, dict[int, str]]:
    """(file, kernel) -> architecture -> cell, of the table in the repository."""
    found: dict[Row, dict[int, str]] = {}
    for file, lines in sections().items():
        for line in lines:
            *cells, _, _, kernel = line.split(maxsplit=len(LIMITS) + 2)
            found[file, kernel] = dict(zip(LIMITS, cells, strict=True))
    return found


def differences(facts: list[Facts]) -> list[str]:
    """What of these files and architectures isn't as in the table."""
    table = stored()
    new = {(f.file, f.kernel, f.architecture): cell(f) for f in facts}
    pairs = {(f.file, f.architecture) for f in facts}
    old = {(*row, a): c for row, cells in table.items() for a, c in cells.items() if (row[0], a) in pairs and c != "-"}
    return [
        f"{file}: {kernel} on sm_{a}: {old.get((file, kernel, a), 'nothing')} in the table, now "
        f"{new.get((file, kernel, a), 'nothing')}"
        for file, kernel, a in sorted(old.keys() | new.keys())
        if old.get((file, kernel, a)) != new.get((file, kernel, a))
    ]


def examine_all(pairs: list[tuple[str, int]]) -> Iterator[list[Facts]]:
    """Each pair of file and architecture, as many at a time as there are processors."""
    jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda pair: examine(*pair), pairs)


# ---- tests -----------------------------------------------------------------------------------------------------------


def test_blocks_at_once() -> None:
    """By hand: registers are given to warps in 256, shared memory to blocks in 128 bytes and 1 KB more."""
    assert blocks_at_once(80, 256, 32, 0) == 8  # threads: 2048
    assert blocks_at_once(86, 256, 32, 0) == 6  # threads: 1536
    assert blocks_at_once(80, 32, 16, 0) == 32  # blocks
    assert blocks_at_once(86, 32, 16, 0) == 16
    assert blocks_at_once(80, 256, 128, 0) == 2  # registers: 16 warps of 4096
    assert blocks_at_once(80, 256, 129, 0) == 1  # 136 each: 15 warps, of which 12 are in whole fours
    assert blocks_at_once(80, 128, 168, 0) == 3  # 5376 a warp: 12 warps
    assert blocks_at_once(80, 128, 255, 0) == 2
    assert blocks_at_once(90, 128, 64, 64 * 1024) == 3  # shared memory: 65 KB each of 228
    assert blocks_at_once(80, 128, 64, 64 * 1024) == 2
    assert blocks_at_once(86, 128, 64, 64 * 1024) == 1
    assert blocks_at_once(86, 128, 64, 100 * 1024) == 0  # more than a block can have


def test_table_covers_every_file() -> None:
    assert sorted({file for file, _ in stored()}) == files()
    for (file, kernel), cells in stored().items():
        for architecture, text in cells.items():
            assert re.fullmatch(r"\d+/[1-9]\d*", text), f"{file}: {kernel} on sm_{architecture}: {text}"


@pytest.mark.skipif(not compiler() or not tool("cuobjdump"), reason="needs nvcc and cuobjdump (Triton's wheel has one)")
def test_machine_code_of_a_sample() -> None:
    pairs = [(file, architecture) for file in files() for architecture in LIMITS]
    pairs.sort(key=lambda pair: zlib.crc32(f"{SEED}.{pair}".encode()))
    facts = [fact for found in examine_all(pairs[:SAMPLE]) for fact in found]
    assert facts
    problems = [f"{f.file}: {f.kernel} on sm_{f.architecture}: {p}" for f in facts for p in f.problems]
    assert not problems, "\n".join(problems)
    changed = differences(facts)
    assert not changed, "\n".join([*changed, "if on purpose: python tests/test_cuda_static.py --write"])


def main() -> None:
    if not compiler() or not tool("cuobjdump"):
        sys.exit("make static needs nvcc (pip install 'cuda-toolkit[nvcc,cudart,cccl]==13.0.3') and cuobjdump")
    facts: list[Facts] = []
    chosen = [file for file in files() if file in sys.argv[1:]] or files()
    for found in examine_all([(file, architecture) for file in chosen for architecture in LIMITS]):
        facts += found
        print(f"{found[0].file} sm_{found[0].architecture}: {len(found)} kernels", flush=True)
        for f in found:
            for problem in f.problems:
                print(f"    {f.kernel}: {problem}", flush=True)
    problems = sum(bool(f.problems) for f in facts)
    if "--write" in sys.argv:
        TABLE.write_text(render(facts))
        print(f"written: {TABLE.relative_to(ROOT)}")
    changed = differences(facts)
    print(render(facts))
    print("\n".join(changed))
    if problems or changed:
        sys.exit(f"{problems} of {len(facts)} kernels have problems, {len(changed)} differ from the table")


if __name__ == "__main__":
    main()
