"""Mutants of kernels/*.py: what Triton compiles, run in its interpreter."""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from . import operators
from .operators import ROOT, Change, Mutant

NAME = "triton"
SOURCES = ROOT / "kernels"


def files() -> list[Path]:
    """What is mutated: every file with functions that Triton compiles."""
    return [p for p in sorted(SOURCES.glob("*.py")) if "@triton.jit" in p.read_text()]


def masks(code: str) -> Iterator[Change]:
    """A mask that lets everything through."""
    for m in re.finditer(r"\bmask=", code):
        depth, end = 0, m.end()
        while end < len(code) and (depth or code[end] not in ",)"):
            depth += (code[end] in "([") - (code[end] in ")]")
            end += 1
        if not depth and end < len(code):
            yield "everything let through", m.end(), end, f"({code[m.end() : end]}) | True"


def fillings(code: str) -> Iterator[Change]:
    """Another value where a mask lets nothing through."""
    for m in re.finditer(r"\bother=[\d.-]+|\bother=-?float\(\S+?\)", code):
        yield "another filling", m.start(), m.end(), "other=1.0"


def _code(text: str) -> list[str]:
    lines = [list(line) for line in text.splitlines()]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT):
            for row in range(token.start[0], token.end[0] + 1):
                begin = token.start[1] if row == token.start[0] else 0
                end = token.end[1] if row == token.end[0] else len(lines[row - 1])
                lines[row - 1][begin:end] = " " * (end - begin)
    return ["".join(line) for line in lines]


@functools.cache
def _compiled_lines(text: str) -> frozenset[int]:
    """The numbers of the lines in bodies of functions that Triton compiles."""
    found: set[int] = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
            found |= set(range(node.body[0].lineno, (node.end_lineno or 0) + 1))
    return frozenset(found)


def mutants(path: Path) -> Iterator[Mutant]:
    """All mutants of a file."""
    text = path.read_text()
    inside = _compiled_lines(text)
    changes = (operators.swaps, operators.constants, masks, fillings, operators.removed(r"\b(?:continue|break)\b"))
    skipped = re.compile(r"\s*(assert|tl\.static_assert|tl\.assume)")
    code = _code(text)
    applies = lambda i: i + 1 in inside and not skipped.match(code[i])  # noqa: E731
    yield from operators.mutants(path, code, applies, changes)


def units(path: str) -> list[str]:
    """The operations whose kernels use a file, the smallest first."""
    name = Path(path).stem
    users = [p for p in SOURCES.glob("*.py") if not p.name.startswith("_")]

    def uses(p: Path, seen: set[Path]) -> bool:
        if p.stem == name:
            return True
        seen.add(p)
        imported = [SOURCES / f"{m}.py" for m in re.findall(r"^from \.(?: import )?(\w+)", p.read_text(), re.M)]
        return any(q.exists() and q not in seen and uses(q, seen) for q in imported)

    found = [p.stem for p in sorted(users, key=lambda p: len(p.read_text())) if uses(p, set())]
    return [name] if name in found else found


def prepare(folder: Path) -> None:
    """Nothing is shared."""
    folder.mkdir(parents=True, exist_ok=True)


def build(unit: str, mutant: Mutant | None, shared: Path, folder: Path, quick: bool) -> tuple[dict[str, str], str]:
    """Writes the mutated file for the import hook in run_tests.py; the environment of its tests."""
    environment = {"TRITON_INTERPRET": "1"}
    if mutant:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / Path(mutant.path).name
        path.write_text(mutant.text())
        try:
            compile(path.read_text(), str(path), "exec")
        except SyntaxError as error:
            return {}, str(error)
        environment["CNNFAST_MUTANT"] = str(path)
    return environment, ""


def selection(unit: str, quick: bool) -> str:
    """pytest's -k: the tests of an operation's kernels."""
    return f"triton.{unit} and not every_kernel"
