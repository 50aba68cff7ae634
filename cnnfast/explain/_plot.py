"""The picture of an explanation: each call's time over the least that the machine needs for it, and the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cnnfast.explain._rows import Explanation, Row

_COLOURS = ("#2a78b5", "#e0812b", "#3f9b52", "#8d6cab", "#c6453e", "#7f7f7f", "#17a2b0", "#b5a642")
_LINE = 0.2  # inches of a bar with its label
_NAMED = 6  # calls with their names in the roofline: those that take longest


def plot(explanation: Explanation, path: str | Path) -> None:
    """See :meth:`Explanation.plot`."""
    if not explanation:
        raise ValueError("plot: the explanation has no rows")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install matplotlib") from error
    rows = list(explanation)
    kernels = explanation.kernels()
    colours = {kernel: _COLOURS[i % len(_COLOURS)] for i, kernel in enumerate(kernels)}
    roof = [row for row in rows if row.limit_s and row.flops and row.bytes and row.seconds]
    height = 1.6 + _LINE * len(rows)
    beside = 4.6 if roof else 0
    figure = Figure(figsize=(13, height + beside + 0.4 + 0.17 * len(kernels)), layout="constrained")
    ratios = [beside, height] if roof else [height]
    axes = figure.subplots(len(ratios), 1, height_ratios=ratios, squeeze=False)[:, 0]
    if roof:
        _roofline(axes[0], roof, colours, explanation)
    handles = _bars(axes[-1], rows, colours, explanation)
    figure.legend(
        handles=handles, title=explanation.headline(), title_fontsize=12, fontsize=8, loc="outside upper left",
        alignment="left", frameon=False,
    )  # fmt: skip
    figure.savefig(path, dpi=110, bbox_inches="tight", pad_inches=0.15)  # long labels may not be cut


def _bars(axes: Any, rows: Sequence[Row], colours: dict[str, str], explanation: Explanation) -> list[Any]:
    """A bar a call, coloured by kernel, with a mark at its limit; returns the legend's entries."""
    from matplotlib.patches import Patch

    unit, factor = ("ms", 1e3) if max(row.seconds for row in rows) >= 1e-3 else ("µs", 1e6)
    positions = range(len(rows))
    axes.barh(positions, [row.seconds * factor for row in rows], color=[colours[row.kernel] for row in rows])
    axes.set_yticks(positions, [f"{row.layer}  ({row.op} {row.problem})" for row in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.3, -0.7)
    what = "least time of the call (predicted)" if explanation.gpu else "time of the call"
    runs = f" (median of {explanation.runs} runs)" if explanation.runs > 1 else ""
    axes.set_xlabel(f"{what}, {unit}{runs}")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    handles: list[Any] = [
        Patch(color=colours[k], label=f"{k} ({n} call{'s' * (n != 1)}, {s * factor:.2f} {unit})")
        for k, (n, s) in explanation.kernels().items()
    ]
    if not explanation.gpu and any(row.limit_s for row in rows):
        marks = [row.limit_s * factor if row.limit_s else float("nan") for row in rows]
        axes.scatter(marks, positions, marker="|", color="black", s=40, zorder=3)
        label = "limit: the least time for the FLOPs and bytes on this machine"
        handles.append(axes.scatter([], [], marker="|", color="black", label=label))
    return handles


def _roofline(axes: Any, rows: Sequence[Row], colours: dict[str, str], explanation: Explanation) -> None:
    """Calls by FLOPs a byte and TFLOP/s, an area for a share of the time, under the lines that they can't pass."""
    intensity = [row.flops / row.bytes for row in rows]
    rate = [row.flops / row.seconds / 1e12 for row in rows]
    longest = max(row.seconds for row in rows)
    areas = [max(6.0, 260 * row.seconds / longest) for row in rows]
    shades = [colours[row.kernel] for row in rows]
    axes.scatter(intensity, rate, s=areas, c=shades, alpha=0.65, linewidths=0.5, edgecolors="white", zorder=3)
    named: list[tuple[float, float]] = []
    for x, y, row in sorted(zip(intensity, rate, rows, strict=True), key=lambda point: -point[2].seconds)[:_NAMED]:
        if all(max(x / u, u / x, y / v, v / y) > 1.3 for u, v in named):  # names of calls that are alike would overlap
            axes.annotate(row.layer, (x, y), (6, -10), textcoords="offset points", fontsize=7)
            named.append((x, y))
    left, right = min(intensity) / 1.5, max(intensity) * 1.5
    bandwidth = max(row.bandwidth for row in rows if row.bandwidth)
    for peak in sorted({row.peak for row in rows if row.peak}):
        knee = min(max(peak / bandwidth, left), right)
        axes.plot(
            [left, knee, right], [min(left * bandwidth, peak) / 1e12, peak / 1e12, peak / 1e12], color="black", lw=1
        )
        axes.annotate(f"{peak / 1e12:.3g} TFLOP/s", (right, peak / 1e12), (-2, 3), textcoords="offset points", ha="right",
                      fontsize=8)  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_xlabel("FLOP a byte, each operand counted once")
    axes.set_ylabel("TFLOP/s, of the direct algorithm")
    axes.set_title(
        f"roofline: {bandwidth / 1e9:,.0f} GB/s; an area is a call's share of the time", loc="left", fontsize=9
    )
    axes.grid(which="both", color="#eeeeee", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
