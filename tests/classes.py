"""Runs ``test_classes.py`` on networks at their full size, and writes what came of each.

    python tests/classes.py [NETWORK ...] [--output benchmarks/results/classes.md]

Rows of networks that aren't run stay as they are in the file, so that it can be made in pieces. Ends with 1 where a class
of ours is wrong and torch's isn't.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from test_classes import IMAGES, Outcome, check

from cnnfast import models
from cnnfast.models import _registry
from cnnfast.report import timing

HEAD = """# Classes of the networks, beside float64's

{images} photographs through each network at its own size, fp32, random weights whose logits are centred, so that classes differ;
{machine}. Written by `python tests/classes.py --output`.

Each cell: for how many images the first class / the first five in their order are float64's, and the largest error of an
image's logits over torch's of the same image. What torch gets right and is no tie within rounding, ours has to get right
(`tests/test_classes.py`).

| network | torch | {ways} |
|---|---:|---:|---:|---:|---:|
"""
WAYS = ("eager", "fused", "converted", "converted and fused")


def row(name: str, found: Sequence[Outcome]) -> str:
    """One row of the table."""
    torch, *ours = found
    assert tuple(o.way for o in ours) == WAYS
    cells = [f"{torch.firsts} / {torch.fives}", *(f"{o.firsts} / {o.fives}, {o.error:.1f}x" for o in ours)]
    return f"| {name} | {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help="default: all")
    parser.add_argument("--output", type=Path, help="write the table there, as Markdown")
    options = parser.parse_args(arguments)
    rows: dict[str, str] = {}
    if options.output and options.output.exists():
        lines = options.output.read_text(encoding="utf-8").splitlines()
        rows = {name: line for line in lines for name in models.list() if line.startswith(f"| {name} |")}
    wrong = []
    for name in options.networks or models.list():
        start = time.perf_counter()
        try:
            rows[name] = row(name, check(name, _registry.entry(name).size))
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
            rows.pop(name, None)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        head = HEAD.format(images=IMAGES, machine=timing.describe(timing.machine()), ways=" | ".join(WAYS))
        text = head + "\n".join(rows[n] for n in models.list() if n in rows) + "\n"
        if options.output:
            options.output.write_text(text, encoding="utf-8")
    if not options.output:
        print(text)
    print("\n".join(wrong) or "every class as it should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
