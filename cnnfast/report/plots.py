"""Plots from records (see :mod:`cnnfast.report.bench`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cnnfast.report.bench import is_ours
from cnnfast.report.timing import describe, milliseconds

_PEERS = ("#b9c0c7", "#7f8a94", "#565f68", "#d7c9a8")
_OURS = ("#2a78b5", "#0b4f85", "#3f9b52")


def figure(width: float, height: float) -> Any:
    """An empty matplotlib figure that needs no display; ImportError says what to install."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def times(records: Sequence[Mapping[str, Any]], machine: Mapping[str, Any], path: str | Path, title: str = "") -> None:
    """Writes an image: for each workload one bar a competitor, its length the time relative to the best peer's.

    Args:
        records: Of :func:`cnnfast.report.bench.measure`.
        machine: Of :func:`cnnfast.report.timing.machine`.
        path: The file; its ending says the format.
        title: Above the plot.

    Raises:
        ValueError: no records.
        ImportError: matplotlib isn't installed.
    """
    if not records:
        raise ValueError("times: no records")
    names = list(dict.fromkeys(name for record in records for name in record["timings"]))
    ours = [name for name in names if is_ours(name)]
    peers = [name for name in names if not is_ours(name)]
    colour = {name: _PEERS[i % len(_PEERS)] for i, name in enumerate(peers)}
    colour.update({name: _OURS[i % len(_OURS)] for i, name in enumerate(ours)})
    fig = figure(10, 1.8 + len(records) * (0.28 * len(names) + 0.25))
    axes = fig.subplots()
    height = 0.84 / len(names)
    for j, name in enumerate(names):
        ys, widths, low, high, labels = [], [], [], [], []
        for i, record in enumerate(records):
            timing = record["timings"].get(name)
            if timing is None:
                continue
            unit = record["timings"][record["best_peer"]]["median_s"]
            ys.append(i + (j - (len(names) - 1) / 2) * height)
            widths.append(timing["median_s"] / unit)
            low.append((timing["median_s"] - timing["p20_s"]) / unit)
            high.append((timing["p80_s"] - timing["median_s"]) / unit)
            faster = f"  ({1 / widths[-1]:.2f}×)" if is_ours(name) else ""
            labels.append(f"{milliseconds(timing['median_s'])} ms{faster}")
        axes.barh(ys, widths, height * 0.92, color=colour[name], label=name)
        axes.errorbar(widths, ys, xerr=[low, high], fmt="none", ecolor="black", elinewidth=0.8, capsize=2)
        for y, width, more, label in zip(ys, widths, high, labels, strict=True):
            weight = "bold" if is_ours(name) else "normal"
            axes.annotate(
                label, (width + more, y), (5, 0), textcoords="offset points", va="center", fontsize=8, fontweight=weight,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
            )  # fmt: skip
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":", zorder=1.5)  # above the bars, below their labels
    axes.set_yticks(range(len(records)), [_label(record) for record in records])
    axes.invert_yaxis()
    axes.margins(x=0.16)
    axes.set_xlim(left=0)
    axes.set_xlabel(
        "time relative to the best of torch: shorter is faster\n"
        "bars: median and 20th to 80th percentile of interleaved runs; (×): how many times as fast as the best of torch"
    )
    heading = title or "cnnfast beside PyTorch"
    axes.set_title(f"{heading}\n{describe(machine)}", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    fig.legend(loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)
    fig.savefig(path, dpi=130)


def _label(record: Mapping[str, Any]) -> str:
    more = f"batch {record['batch']}, {record['dtype']}"
    return "\n".join(line for line in (record["workload"], more, record.get("weights", "")) if line)
