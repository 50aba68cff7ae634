"""Runs torchvision's and timm's networks (``cases/models.py``) converted and fused, and writes what became of each.

    python tests/zoo.py [-k PART] [--output benchmarks/results/models.md]

Ends with 1 where a result isn't within its bound.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from cases.models import MODELS, Model, Outcome, examine

from cnnfast.report import timing

HEAD = """# Other people's networks on cnnfast

{count} networks of torchvision {torchvision} and timm {timm}, with random weights, on two images of {sizes} pixels, fp32;
{machine}. Written by `python tests/zoo.py --output`.

`on cnnfast`: convolutions and poolings that `convert` puts on cnnfast, of all. `kernels`, `plans`: of the fused network. Errors are
those against float64, relative to the result's norm: of torch, converted, fused; the bound is 3 times torch's, and a
rounding for each kernel.

| network | of | what is special | on cnnfast | kernels | plans | torch's error | converted | fused | torch runs between plans |
|---|---|---|---:|---:|---:|---:|---:|---:|---|
"""


def line(case: Model, found: Outcome) -> str:
    """One row of the table."""
    errors = [f"{e:.1e}" for e in (found.torch_error, found.converted_error, found.fused_error)]
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, reason in found.aten.items():
        reasons[reason].append(name)
    left = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
    name = case.name.rpartition("/")[2]
    cells = [
        name,
        case.source,
        case.why,
        f"{found.converted}/{found.layers}",
        found.kernels,
        found.plans,
        *errors,
        left,
    ]
    return f"| {' | '.join(map(str, cells))} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("-k", default="", help="only networks whose name holds this")
    parser.add_argument("--output", type=Path, help="write the table there, as Markdown")
    options = parser.parse_args(arguments)
    import timm
    import torchvision

    cases = [case for case in MODELS if options.k in str(case)]
    rows, wrong = [], []
    for i, case in enumerate(cases):
        print(f"{i + 1}/{len(cases)} {case}", file=sys.stderr, flush=True)
        found = examine(case)
        rows.append(line(case, found))
        if max(found.converted_error, found.fused_error) > found.allowed or not set(found.aten) <= set(case.aten):
            wrong.append(str(case))
    sizes = sorted({case.size for case in cases})
    head = HEAD.format(
        count=len(cases), torchvision=torchvision.__version__.split("+")[0], timm=timm.__version__,
        sizes=f"{sizes[0]} to {sizes[-1]}", machine=timing.describe(timing.machine()),
    )  # fmt: skip
    text = head + "\n".join(rows) + "\n"
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    else:
        print(text)
    print(f"{len(cases) - len(wrong)} of {len(cases)} as expected" + "".join(f"\nnot so: {name}" for name in wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
