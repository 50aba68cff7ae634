"""The tables at the end of a benchmark run, and in layers.py."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from providers import OURS, geometric_mean
from rich.console import Console
from rich.table import Table

from cnnfast.report import timing

ROWS: list[dict[str, Any]] = []  # one a layer and direction, filled by the benchmarks


def render(rows: Sequence[Mapping[str, Any]], machine: Mapping[str, Any]) -> str:
    """Layers by group, with the geometric mean of each group; losses are not left out."""
    out = io.StringIO()
    console = Console(file=out, width=170, force_terminal=False)
    console.print(timing.describe(machine))
    providers = list(dict.fromkeys(name for row in rows for name in row["ms"]))
    peers = [p for p in providers if not p.startswith(OURS)]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    means = Table("group", "layers", *(f"x {p}" for p in peers), "x best peer", "lowest", "losses")
    for name, members in groups.items():
        timed = [p for p in providers if any(p in row["ms"] for row in members)]
        table = Table("layer", *(f"{p}, ms" for p in timed), "GFLOP/s", "x best peer", "kernel", title=name)
        for row in members:
            cells = [f"{row['ms'][p]:.3f}" if p in row["ms"] else "-" for p in timed]
            lost = "" if row["ratio"] >= 1 else " loss"
            table.add_row(row["layer"], *cells, f"{row['gflops']:.0f}", f"{row['ratio']:.2f}{lost}", row["kernel"])
        console.print(table)
        means.add_row(name, *_means(members, peers))
    if len(groups) > 1:
        means.add_row("all", *_means(rows, peers))
    console.print(means)
    for name, why in sorted({(name, why) for row in rows for name, why in row["missing"].items()}):
        console.print(f"not timed: {name}: {why}")
    return out.getvalue()


def _means(rows: Sequence[Mapping[str, Any]], peers: Sequence[str]) -> list[str]:
    ratios = [row["ratio"] for row in rows]
    against = [[row["ms"][p] / row["ms"][OURS] for row in rows if p in row["ms"]] for p in peers]
    means = [f"{geometric_mean(a):.2f}" if a else "-" for a in against]
    return [
        str(len(rows)), *means, f"{geometric_mean(ratios):.2f}", f"{min(ratios):.2f}", str(sum(r < 1 for r in ratios)),
    ]  # fmt: skip
