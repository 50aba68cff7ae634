"""Tables from records (see :mod:`cnnfast.report.bench`), for the terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cnnfast import _render
from cnnfast.report.bench import is_ours
from cnnfast.report.timing import describe, milliseconds

Record = Mapping[str, Any]


def _competitors(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record["timings"]))


def _cells(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    names = _competitors(records)
    headings = ["workload", "GFLOP", *(f"{name}, ms" for name in names), "GFLOP/s", "×\u00a0best peer"]
    rows = []
    for record in records:
        row = [_workload(record), f"{record['flops'] / 1e9:.2f}"]
        for name in names:
            timing = record["timings"].get(name)
            row.append("" if timing is None else _time(timing) + (" wrong!" if name in record["wrong"] else ""))
        best = record["timings"][record["best_ours"]]["median_s"]
        rows.append([*row, f"{record['flops'] / best / 1e9:.0f}", f"{record['ratio']:.2f}"])
    return headings, rows


def _workload(record: Record) -> str:
    labels = [
        record["workload"],
        f"batch {record['batch']}",
        record["dtype"],
        record.get("pass"),
        record.get("weights"),
    ]
    return ", ".join(label for label in labels if label)


def _time(timing: Mapping[str, Any]) -> str:
    """``12.3 (12.0-13.1)``: the median with the 20th and 80th percentile, in ms."""
    median, low, high = (milliseconds(timing[k], timing["median_s"]) for k in ("median_s", "p20_s", "p80_s"))
    return f"{median} ({low}–{high})"


def geometric_mean(records: Sequence[Record]) -> float:
    """Of the ratios to the best peer; ValueError where there are none."""
    if not records:
        raise ValueError("geometric_mean: no records")
    return math.exp(sum(math.log(record["ratio"]) for record in records) / len(records))


class _Results:
    """A table with a row a workload, or, where that would be too wide, a line a competitor."""

    def __init__(self, records: Sequence[Record], machine: Record, title: str) -> None:
        self.records, self.machine, self.title = records, machine, title

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        headings, rows = _cells(self.records)
        if sum(max(map(len, column)) + 3 for column in zip(headings, *rows, strict=True)) > options.max_width:
            caption = _caption(self.records, self.machine, "")
            yield _render.table(self.title, _LONG, _long(self.records), caption=caption)
            return
        for row, record in zip(rows, self.records, strict=True):
            row[-1] = _coloured(record["ratio"])
        columns = [(heading, "left" if heading == "workload" else "right") for heading in headings]
        caption = _caption(self.records, self.machine, _fastest(self.records))
        yield _render.table(self.title, columns, rows, caption=caption)


_LONG = (("workload: competitor", "left"), *((h, "right") for h in ("ms", "20–80 %", "GFLOP/s", "×\u00a0best peer")))


def _long(records: Sequence[Record]) -> list[list[str]]:
    rows = []
    for record in records:
        rows.append([_workload(record), "", "", "", ""])
        unit = record["timings"][record["best_peer"]]["median_s"]
        for name, timing in record["timings"].items():
            median, _, spread = _time(timing).partition(" ")
            ratio = unit / timing["median_s"]
            wrong = " (wrong!)" if name in record["wrong"] else ""
            rows.append([
                f"  {name}{wrong}", median, spread.strip("()"), f"{record['flops'] / timing['median_s'] / 1e9:.0f}",
                _coloured(ratio) if is_ours(name) else f"{ratio:.2f}",
            ])  # fmt: skip
    return rows


def _coloured(ratio: float) -> str:
    return f"[{'green' if ratio >= 1 else 'red'}]{ratio:.2f}[/]"


def results(records: Sequence[Record], machine: Record, title: str = "") -> Any:
    """A table of records for rich; ratios below 1, the losses, in red."""
    return _Results(records, machine, title)


def markdown(records: Sequence[Record], machine: Record) -> str:
    """The same table as Markdown."""
    headings, rows = _cells(records)
    align = ["---" if heading == "workload" else "---:" for heading in headings]
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, align, *rows)]
    return "\n".join([*lines, "", _caption(records, machine, _fastest(records)), ""])


def _fastest(records: Sequence[Record]) -> str:
    ours = [name for name in _competitors(records) if is_ours(name)]
    return ours[0] if len(ours) == 1 else f"the faster of {' and '.join(ours)}"


def _caption(records: Sequence[Record], machine: Record, whose: str) -> str:
    """``whose``: the competitor that GFLOP/s are of, where they aren't of the one in the same row."""
    mean = f" Geometric mean {geometric_mean(records):.2f}." if len(records) > 1 else ""
    return (
        f"{describe(machine)}. Median (20th to 80th percentile) of interleaved runs. GFLOP/s{f' of {whose}' if whose else ''}: "
        f"FLOPs counted as the direct algorithm's. × best peer: how many times as fast as the best of torch; below 1 is "
        f"slower.{mean}"
    )
