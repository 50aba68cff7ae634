"""The Triton kernels, compiled for cards that this machine need not have: no spills, no access without a mask, the
instructions they are for, and the table in triton_static.txt.

As a script (``make static``): every variant that can be selected is in the table, as the compiler makes it now. A row whose
IR is unchanged holds; a rotating share of them is compiled all the same. ``--write`` writes what changed or is new, first of
all what has no row, so that it goes on where it was interrupted; ``--fresh`` compiles all rows (hours); ``--prune`` compiles
nothing and takes out the rows whose IR changed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

pytest.importorskip("triton")

from support import process, static, ttir
from support.static import ARCHITECTURES, Row

from cnnfast.kernels import _cards, _common, _tiles

ROOT = Path(__file__).resolve().parent.parent
# make test compiles one row in so many, beside one of a quarter of the kinds on one card or another; make static one in so many,
# although its IR is unchanged. The seed turns the wheel.
SAMPLE, AGAIN = 400, 100
SEED = process.SEED

pytestmark = pytest.mark.skipif(process.EMULATED or process.INTERPRETED, reason="compiles: the plain process runs it")


def _turn(*parts: object) -> int:
    return zlib.crc32(".".join(map(str, (SEED, *parts))).encode())


def sample(architecture: int) -> list[Any]:
    """A quarter of the kinds of call in bf16 with their first tile, on one card or another, and a rotating share of all."""
    chosen = []
    seen: set[str] = set()
    for variant in static.variants(architecture):
        kind, mode, _ = variant.name.split(".", 2)
        turn = _turn(kind) % (4 * len(ARCHITECTURES))
        first = mode == "bf16" and kind not in seen and turn == ARCHITECTURES.index(architecture)
        seen |= {kind} if mode == "bf16" else set()
        if first or _turn(architecture, variant.name) % SAMPLE == 0:
            chosen.append(variant)
    return chosen


def wrong() -> list[Any]:
    """Variants that aren't what they say: too many sums for a warp, products, and copies that neither multiply nor fetch ahead."""
    there = {variant.name: variant for variant in static.variants(90)}
    copies = next(variant for name, variant in there.items() if name.startswith("add_act_run.bf16"))
    return [
        replace(there["fprop.bf16.64x64x64-4x4"], name="wrong.spills", num_warps=1),
        replace(there["fprop.bf16.64x16x64-4x4"], name="wrong.products", tensor_cores=False),
        replace(copies, name="wrong.copies", tensor_cores=True, asynchronous=True),
    ]


def jobs(what: str) -> list[Any]:
    """What to examine: "test" (a sample, and what is wrong), or "table" (everything)."""
    if what == "test":
        return [*wrong(), *(variant for architecture in ARCHITECTURES for variant in sample(architecture))]
    return [variant for architecture in ARCHITECTURES for variant in static.variants(architecture)]


def worker(part: int, parts: int, what: str, *options: str) -> None:
    """Examines its part; a line of JSON each. A row of the table whose IR is unchanged is repeated, not compiled.

    Options: "--fresh": compiles everything; "--prune": compiles nothing; "--write": trusts all rows whose IR is unchanged.
    """
    compiler, rows = static.read()
    known = (
        {row.digest: row for row in rows.values()} if compiler == static.compiler() and "--fresh" not in options else {}
    )
    trusted = {"--write", "--prune"} & set(options)
    for variant in sorted(jobs(what)[part::parts], key=lambda v: (v.capability, v.name) in rows):
        mark, open_ = static.lower(variant)
        row = known.get(mark)
        if row is None and "--prune" in options:
            continue
        if row is None or (not trusted and _turn(mark) % AGAIN == 0):
            row = known[mark] = static.examine(variant, mark)
        problems = {*open_, *row.problems, *static.wanting(variant, row.counts, row.shared)}
        print(json.dumps({**asdict(row), "name": variant.name, "problems": sorted(problems)}), flush=True)


def examine_all(what: str, *options: str) -> Iterator[Row]:
    """In processes of their own: an interpreting process cannot compile, and a test process may have threads."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = (str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    parts = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    lines: Queue[str | None] = Queue()

    def run(part: int) -> int:
        arguments = [sys.executable, __file__, "--part", str(part), str(parts), what, *options]
        try:
            with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment) as running:
                for line in running.stdout or ():
                    lines.put(line)
            return running.returncode
        finally:
            lines.put(None)

    with ThreadPoolExecutor(parts) as pool:
        done = [pool.submit(run, part) for part in range(parts)]
        for _ in range(parts):
            while (line := lines.get()) is not None:
                found = json.loads(line)
                yield Row(**{**found, "problems": tuple(found["problems"])})
        assert not any(future.result() for future in done), "a compiling process failed"


# ---- tests -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def examined() -> dict[str, list[Row]]:
    """What make test compiles: "sample" and "wrong"."""
    found: dict[str, list[Row]] = {"sample": [], "wrong": []}
    for row in examine_all("test", "--fresh"):
        found["wrong" if row.name.startswith("wrong.") else "sample"].append(row)
    return found


def test_machine_code(examined: dict[str, list[Row]]) -> None:
    """A rotating sample is as it should be, and as its row says where there is one by this compiler: make static asks for it."""
    compiler, rows = static.read()
    found = examined["sample"]
    assert {row.architecture for row in found} == set(ARCHITECTURES)
    rows = {(row.architecture, row.name): row for row in found} | (rows if compiler == static.compiler() else {})
    failed = [f"{row}: {'; '.join(what)}" for row in found if (what := static.failures(row, rows))]
    assert not failed, "\n".join(failed) + "\n(on purpose? python tests/test_triton_static.py --write, or --prune)"


def test_what_is_wrong_is_said(examined: dict[str, list[Row]]) -> None:
    """In machine code, and of rows: other registers, other shared memory, other instructions, no row."""
    said = {row.name.split(".")[1]: "; ".join(row.problems) for row in examined["wrong"]}
    assert "spills: " in said["spills"]
    assert "no HGMMA" in said["spills"]  # which takes four warps
    assert said["products"] == "tensor cores in a kernel of full precision"
    assert said["copies"] == "neither LDGSTS nor UTMALDG: loads are not asynchronous; no HGMMA"
    right = examined["sample"][0]
    key = (right.architecture, right.name)
    assert static.failures(right, {key: right}) == []
    assert static.failures(right, {}) == ["not in the table"]
    for other in (
        replace(right, registers=right.registers + 1),
        replace(right, shared=-1),
        replace(right, counts={"": 1}),
    ):
        assert static.failures(right, {key: other}) == [f"in the table: {other}"]


def test_no_row_is_left_over() -> None:
    """Every row is of a variant that there still is, and has the instructions that it is for. (make static misses others.)"""
    _, rows = static.read()
    there = {(v.capability, v.name): v for architecture in ARCHITECTURES for v in static.variants(architecture)}
    left = sorted(set(rows) - set(there))
    assert rows
    assert not left, f"{left[:5]}: python tests/test_triton_static.py --write, or --prune"
    lacking = {key: found for key, row in rows.items() if (found := static.wanting(there[key], row.counts, row.shared))}
    assert not lacking


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_are_those_of_one_variant(architecture: int) -> None:
    """Two of one name would share a row, and one of them never be compiled."""
    counted = Counter(variant.name for variant in static.variants(architecture))
    assert [name for name, count in counted.items() if count > 1] == []


def test_the_model_of_shared_memory() -> None:
    """kernels/_cards.py predicts at least what the compiler takes, and not much more: it decides which tiles fit."""
    _, rows = static.read()
    checked = 0
    for architecture in ARCHITECTURES:
        for variant in static.variants(architecture):
            row = rows.get((architecture, variant.name))
            blocks = variant.constexprs
            if row is None or not variant.tensor_cores or "INPUT_PRECISION" not in blocks:
                continue
            itemsize = 2 if variant.name.split(".")[1] in ("bf16", "fp16") else 4
            how = "half" if itemsize == 2 else blocks["INPUT_PRECISION"]
            tile = _tiles.Config(
                blocks["BLOCK_M"], blocks["BLOCK_N"], blocks["BLOCK_K"], variant.num_warps, variant.num_stages
            )
            normed, stored = "_normed" in variant.name, 4 if variant.name.startswith("winograd_product") else None
            predicted = _cards.shared_bytes(tile, itemsize, architecture, how, normed, stored)
            assert row.shared <= predicted, f"{row}: predicted {predicted}"
            checked += 1
    assert checked


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_access_has_its_masks(architecture: int) -> None:
    """In the IR of one block of each kind of call; make static looks at all."""
    failures, seen = [], set()
    for variant in static.variants(architecture):
        turn = ARCHITECTURES[_turn(static.kind(variant)) % len(ARCHITECTURES)]
        if static.kind(variant) in seen or turn != architecture:
            continue
        seen.add(static.kind(variant))
        failures += [f"{variant.name}: {reason}" for reason in static.lower(variant)[1]]
    assert not failures, "\n".join(failures)


def _text(kind: str) -> tuple[str, Any]:
    variant = next(v for v in static.variants(90) if v.name.startswith(f"{kind}.bf16."))
    return _common.lower_variant(variant), variant


@pytest.mark.parametrize("kind", ["fprop_odd_epilogue", "wgrad_stem", "batch_norm_sums_odd", "max_pool2d_dgrad_odd"])
def test_a_mask_that_is_taken_away_is_missed(kind: str) -> None:
    """From each access of a kernel in turn: its mask, and each half of it."""
    text, variant = _text(kind)
    lines = text.splitlines()
    of = (variant.fn.__name__, variant.constexprs)
    assert not list(ttir.unmasked(text, *of))
    mutated = 0
    for at, line in enumerate(lines):
        access = re.search(r"tt\.(load|store) (.*) : ", line)
        if not access:
            continue
        values = access[2].split(", ")
        mask = 1 if access[1] == "load" else 2
        bare = line.replace(access[2], ", ".join(values[:mask]))
        halves = next(
            re.findall(r"%[\w$.-]+(?:#\d+)?", one)[1:] for one in lines if f" {values[mask]} = " in f" {one.strip()}"
        )
        changed = [bare]
        if any(f"{values[mask]} = arith.andi" in one for one in lines) and f"tensor<{_shape(line)}xi1>" in text:
            changed += [line.replace(values[mask], half) for half in halves if _two_ranges(lines, halves)]
        for other in changed:
            found = list(ttir.unmasked("\n".join([*lines[:at], other, *lines[at + 1 :]]), *of))
            assert found, f"{other.strip()} of {line.strip()}"
            mutated += 1
    assert mutated >= 4


def _shape(line: str) -> str:
    match = re.search(r"tensor<([\dx]+)x!tt", line)
    return match[1] if match else "?"


def _two_ranges(lines: list[str], halves: list[str]) -> bool:
    """Whether both sides of an `and` are broadcast along different dimensions: then neither can do alone."""
    origins = [next((one for one in lines if one.strip().startswith(f"{half} = ")), "") for half in halves]
    shapes = [re.search(r"tensor<(\d+)x(\d+)xi1> -> ", origin) for origin in origins]
    return all(shapes) and len({tuple(size == "1" for size in s.groups()) for s in shapes if s}) == 2


PLANTED = {
    "right": 0, "no_mask": 1, "half_a_mask": 1, "mask_of_another_range": 1, "always_true": 1, "store": 1, "in_a_loop": 1,
    "through_a_helper": 1,
}  # fmt: skip


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs(bug: str) -> None:
    import planted_triton

    names = planted_triton.copy.arg_names
    constants = {"BUG": bug, "BLOCK_M": 16, "BLOCK_N": 32}
    variant = _common.Variant(
        name=bug, fn=planted_triton.copy, constexprs=constants, aligned=(), num_warps=4, num_stages=1, capability=90,
        signature={n: "constexpr" if n in constants else {"x": "*fp32", "y": "*fp32"}.get(n, "i32") for n in names},
        tensor_cores=False, asynchronous=False,
    )  # fmt: skip
    assert len(list(ttir.unmasked(_common.lower_variant(variant)))) == PLANTED[bug]


# ---- the script ------------------------------------------------------------------------------------------------------


def main() -> int:
    """See the head of this file."""
    if "--part" in sys.argv:
        at = sys.argv.index("--part")
        worker(int(sys.argv[at + 1]), int(sys.argv[at + 2]), *sys.argv[at + 3 :])
        return 0
    writing, pruning = "--write" in sys.argv, "--prune" in sys.argv
    compiler, rows = static.read()
    expected = {(v.capability, v.name) for architecture in ARCHITECTURES for v in static.variants(architecture)}
    comparing = compiler == static.compiler()
    if not comparing:
        print(
            f"the table is of {compiler or 'no compiler'}, this one is {static.compiler()}: registers aren't compared"
        )
    kept = {key: row for key, row in rows.items() if key in expected} if comparing else {}
    held: set[tuple[int, str]] = set()
    failed = changed = total = 0
    try:
        for row in examine_all("table", *({"--fresh", "--prune", "--write"} & set(sys.argv))):
            key = (row.architecture, row.name)
            held.add(key)
            total += 1
            failed += bool(row.problems)
            if row.problems:  # has no row, so that it is compiled, and said, every time
                kept.pop(key, None)
                print(f"{row}: {'; '.join(row.problems)}", flush=True)
            elif key in expected and rows.get(key) != row:
                changed += 1
                kept[key] = row
                if comparing:
                    print(f"{row}: {static.failures(row, rows)[0]}", flush=True)
                if writing and changed % 50 == 0:
                    static.write(kept.values())
        if pruning:
            static.write(row for key, row in kept.items() if key in held)
    finally:
        if writing:
            static.write(kept.values())
    left = sorted(set(rows) - expected)
    print(
        f"{total} variants: {failed} with problems, {changed} changed or new, {len(left)} rows of variants that aren't there"
    )
    return 1 if failed or (comparing and not writing and not pruning and (changed or left)) else 0


if __name__ == "__main__":
    sys.exit(main())
