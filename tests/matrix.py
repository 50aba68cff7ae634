"""The coverage matrix of ARCHITECTURE.md, from the registrations: `make matrix` writes it, a test holds it.

A row is an operation and a direction; a cell lists the kernels of a backend, each with the dtypes that it is compiled for.
What the kernels require of sizes is said by their capability predicates (``python -m cnnfast explain``), not here.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "ARCHITECTURE.md"
BEGIN, END = "<!-- coverage: begin -->", "<!-- coverage: end -->"
BACKENDS = ("cpu", "cuda", "triton")
DTYPES = ("f32", "f64", "bf16", "f16")
DIRECTIONS = ("fprop", "dgrad", "wgrad", "bgrad")  # first, in this order; then others by name


def cells() -> dict[tuple[str, str], dict[str, str]]:
    """(operation, direction) -> backend -> cell, of the backends that loaded here."""
    import cnnfast  # noqa: F401
    from cnnfast import dispatch

    found: dict[tuple[str, str], dict[str, dict[str, set[str]]]] = {}
    for i in dispatch.implementations():
        if i.backend in BACKENDS:
            row = found.setdefault((i.op, i.direction), {backend: {} for backend in BACKENDS})
            algorithm = i.stem.removeprefix(i.op).lstrip("_") or "plain"
            row[i.backend].setdefault(algorithm, set()).update(i.dtypes)

    def place(key: tuple[str, str]) -> tuple[str, int, str]:
        op, direction = key
        return op, DIRECTIONS.index(direction) if direction in DIRECTIONS else len(DIRECTIONS), direction

    return {
        key: {
            backend: "; ".join(
                f"{name} ({' '.join(d for d in DTYPES if d in dtypes)})" for name, dtypes in sorted(kernels.items())
            )
            for backend, kernels in found[key].items()
        }
        for key in sorted(found, key=place)
    }


def present() -> list[str]:
    """The backends that have kernels in this process."""
    from cnnfast import dispatch

    return [b for b in BACKENDS if any(i.backend == b for i in dispatch.implementations())]


def render(rows: dict[tuple[str, str], dict[str, str]]) -> str:
    """Markdown."""
    lines = [f"| operation | direction | {' | '.join(BACKENDS)} |", "|---" * (2 + len(BACKENDS)) + "|"]
    lines += [
        f"| {op} | {direction} | {' | '.join(row[b] or '–' for b in BACKENDS)} |"
        for (op, direction), row in rows.items()
    ]
    return "\n".join(lines)


def parse(text: str) -> dict[tuple[str, str], dict[str, str]]:
    """The matrix that a document holds."""
    table = text[text.index(BEGIN) : text.index(END)]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| ")][1:]
    return {(r[0], r[1]): {b: "" if c == "–" else c for b, c in zip(BACKENDS, r[2:], strict=True)} for r in rows}


def main() -> int:
    """Prints the matrix, or with --write puts it into the document."""
    if "--write" not in sys.argv[1:]:
        print(render(cells()))
        return 0
    absent = set(BACKENDS) - set(present())
    if absent:
        print(f"no kernels of {', '.join(sorted(absent))} in this environment: the matrix would lose them")
        return 1
    text = DOCUMENT.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    DOCUMENT.write_text(f"{head}{BEGIN}\n{render(cells())}\n{END}{tail}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
