"""The tables at the end of a benchmark run, and in layers.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from providers import OURS, geometric_mean

from cnnfast import _render
from cnnfast.report import timing

ROWS: list[dict[str, Any]] = []  # one a layer and direction, filled by the benchmarks


def render(rows: Sequence[Mapping[str, Any]], machine: Mapping[str, Any]) -> str:
    """Layers by group, with the geometric mean of each group; losses are not left out."""
    providers = list(dict.fromkeys(name for row in rows for name in row["ms"]))
    peers = [p for p in providers if not p.startswith(OURS)]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    parts = [timing.describe(machine), ""]
    for name, members in groups.items():
        parts += [_render.as_text(_layers(name, members, providers)), ""]
    headings = ["layers", *(f"×\u00a0{p}" for p in peers), "×\u00a0best peer", "lowest", "losses"]
    means = [(name, *_means(members, peers)) for name, members in groups.items()]
    if len(groups) > 1:
        means.append(("all", *_means(rows, peers)))
    caption = "Geometric means of the peer's time over ours, and the lowest over the best peer: below 1 we are slower."
    columns = [("group", "left"), *((heading, "right") for heading in headings)]
    parts.append(_render.as_text(_render.table("Summary", columns, means, caption)))
    parts += [f"not timed: {name}: {why}" for name, why in sorted({i for row in rows for i in row["missing"].items()})]
    return "\n".join(parts) + "\n"


def _layers(title: str, members: Sequence[Mapping[str, Any]], providers: Sequence[str]) -> Any:
    timed = [p for p in providers if any(p in row["ms"] for row in members)]
    rate = "GFLOP/s" if any(row["gflops"] for row in members) else "GB/s"
    columns = [
        ("layer", "left"),
        *((f"{p}, ms", "right") for p in timed),
        (rate, "right"),
        ("×\u00a0best peer", "right"),
    ]
    columns.append(("", "right"))
    kernels = {row["kernel"] for row in members}
    if len(kernels) > 1:
        columns.append(("our kernel", "left"))
    rows = []
    for row in members:
        cells = [f"{row['ms'][p]:.3f}" if p in row["ms"] else "-" for p in timed]
        speed = f"{row['gflops']:.0f}" if rate == "GFLOP/s" else f"{row['gbytes_s']:.1f}"
        lost = "" if row["ratio"] >= 1 else "loss"
        cells = [row["layer"], *cells, speed, f"{row['ratio']:.2f}", lost, row["kernel"].replace(", ", "\n")]
        rows.append(cells[: len(columns)])
    return _render.table(title, columns, rows, "" if len(kernels) > 1 else f"Our kernel: {kernels.pop()}")


def _means(rows: Sequence[Mapping[str, Any]], peers: Sequence[str]) -> list[str]:
    ratios = [row["ratio"] for row in rows]
    against = [[row["ms"][p] / row["ms"][row.get("ours", OURS)] for row in rows if p in row["ms"]] for p in peers]
    means = [f"{geometric_mean(a):.2f}" if a else "-" for a in against]
    return [
        str(len(rows)), *means, f"{geometric_mean(ratios):.2f}", f"{min(ratios):.2f}", str(sum(r < 1 for r in ratios)),
    ]  # fmt: skip
