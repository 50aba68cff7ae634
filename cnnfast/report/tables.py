"""Tables from records (see :mod:`cnnfast.report.bench`), for the terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cnnfast import _render
from cnnfast.report.bench import is_ours
from cnnfast.report.timing import describe

Record = Mapping[str, Any]


def _competitors(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record["timings"]))


def _cells(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    names = _competitors(records)
    headings = ["workload", "batch", "dtype", "GFLOP", *(f"{name}, ms" for name in names), "GFLOP/s", "× best peer"]
    rows = []
    for record in records:
        row = [record["workload"], str(record["batch"]), record["dtype"], f"{record['flops'] / 1e9:.2f}"]
        for name in names:
            timing = record["timings"].get(name)
            row.append("" if timing is None else _time(timing) + (" wrong!" if name in record["wrong"] else ""))
        best = record["timings"][record["best_ours"]]["median_s"]
        rows.append([*row, f"{record['flops'] / best / 1e9:.0f}", f"{record['ratio']:.2f}"])
    return headings, rows


def _time(timing: Mapping[str, Any]) -> str:
    """``12.3 (12.0-13.1)``: the median with p20 and p80, in ms."""
    digits = max(0, min(3, 2 - math.floor(math.log10(max(timing["median_s"] * 1e3, 1e-3)))))
    median, low, high = (f"{timing[k] * 1e3:.{digits}f}" for k in ("median_s", "p20_s", "p80_s"))
    return f"{median} ({low}–{high})"


def geometric_mean(records: Sequence[Record]) -> float:
    """Of the ratios to the best peer; ValueError where there are none."""
    if not records:
        raise ValueError("geometric_mean: no records")
    return math.exp(sum(math.log(record["ratio"]) for record in records) / len(records))


def results(records: Sequence[Record], machine: Record, title: str = "") -> Any:
    """A rich table of records; ratios below 1, the losses, in red."""
    headings, rows = _cells(records)
    for row, record in zip(rows, records, strict=True):
        row[-1] = f"[{'green' if record['ratio'] >= 1 else 'red'}]{row[-1]}[/]"
    columns = [(heading, "left" if heading in ("workload", "dtype") else "right") for heading in headings]
    return _render.table(title, columns, rows, caption=_caption(records, machine))


def markdown(records: Sequence[Record], machine: Record) -> str:
    """The same table as Markdown."""
    headings, rows = _cells(records)
    align = ["---" if heading in ("workload", "dtype") else "---:" for heading in headings]
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, align, *rows)]
    return "\n".join([*lines, "", _caption(records, machine), ""])


def _caption(records: Sequence[Record], machine: Record) -> str:
    ours = [name for name in _competitors(records) if is_ours(name)]
    return (
        f"{describe(machine)}. Median (p20–p80), interleaved; FLOPs as the direct algorithm's; × best peer: the best "
        f"of torch over the best of {', '.join(ours)}. Geometric mean {geometric_mean(records):.2f}."
    )
