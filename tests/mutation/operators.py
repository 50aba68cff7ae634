"""What a mutant is, and the small changes that make one: operators, bounds, constants, indices, barriers, waits, masks."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change in one line of a file."""

    path: str
    line: int
    what: str  # the operator that made it
    before: str  # the line
    after: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line} ({self.what})\n    - {self.before.strip()}\n    + {self.after.strip()}"

    @property
    def key(self) -> tuple[str, str, str]:
        """What identifies it when lines have moved."""
        return self.path, self.before.strip(), self.after.strip()

    def text(self) -> str:
        """The whole file, changed."""
        lines = (ROOT / self.path).read_text().splitlines(keepends=True)
        assert lines[self.line - 1].rstrip("\n") == self.before, f"{self.path} has changed"
        lines[self.line - 1] = self.after + "\n"
        return "".join(lines)


# Operators between blanks, as both formatters write binary ones.
SWAPS = {
    "+": "-", "-": "+", "*": "+", "/": "*", "//": "*", "%": "/", "<": "<=", "<=": "<", ">": ">=", ">=": ">",
    "==": "!=", "!=": "==", "&&": "||", "||": "&&", "&": "|", "|": "&", "^": "|", "<<": ">>", ">>": "<<",
    "+=": "-=", "-=": "+=", "*=": "+=", "and": "or", "or": "and",
}  # fmt: skip
_OPERATOR = re.compile(
    r"(?<= )(?:" + "|".join(re.escape(o) for o in sorted(SWAPS, key=len, reverse=True)) + r")(?= |$)"
)
_INTEGER = re.compile(r"(?<![\w.])\d+(?![\w.])")
_REAL = re.compile(r"(?<![\w.])(\d+\.\d*)(f?)(?![\w.])")
_INDEX = re.compile(r"(?<=\w)\[([a-z]\w*)\]")

Change = tuple[str, int, int, str]  # (operator's name, from, to, new text)


def swaps(code: str) -> Iterator[Change]:
    """Another operator."""
    for m in _OPERATOR.finditer(code):
        yield f"{m[0]} becomes {SWAPS[m[0]]}", m.start(), m.end(), SWAPS[m[0]]


def constants(code: str) -> Iterator[Change]:
    """A number one larger or smaller."""
    for m in _INTEGER.finditer(code):
        yield "one more", m.start(), m.end(), str(int(m[0]) + 1)
        if int(m[0]) > 1:
            yield "one less", m.start(), m.end(), str(int(m[0]) - 1)
    for m in _REAL.finditer(code):
        yield "one more", m.start(), m.end(), f"{float(m[1]) + 1}{m[2]}"


def indices(code: str) -> Iterator[Change]:
    """The next element."""
    for m in _INDEX.finditer(code):
        yield "the next element", m.start(1), m.end(1), f"{m[1]} + 1"


def removed(*statements: str) -> Callable[[str], Iterator[Change]]:
    """Statements left out; each is a regular expression."""
    pattern = re.compile("|".join(statements))

    def changes(code: str) -> Iterator[Change]:
        for m in pattern.finditer(code):
            yield "left out", m.start(), m.end(), ";" if m[0].endswith(";") else "pass"

    return changes


def mutants(
    path: Path,
    code_lines: list[str],
    applies: Callable[[int], bool],
    changes: tuple[Callable[[str], Iterator[Change]], ...],
) -> Iterator[Mutant]:
    """All of a file. ``code_lines``: its lines with blanks for comments and strings; ``applies``: to the ith line."""
    lines = path.read_text().splitlines()
    seen = set()
    for i, (line, code) in enumerate(zip(lines, code_lines, strict=True)):
        if not applies(i):
            continue
        for change in changes:
            for what, begin, end, new in change(code):
                mutant = Mutant(str(path.relative_to(ROOT)), i + 1, what, line, line[:begin] + new + line[end:])
                if (mutant.line, mutant.after) not in seen:
                    seen.add((mutant.line, mutant.after))
                    yield mutant
