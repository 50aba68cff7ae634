"""How a convolution's cost grows with one of its sizes: none should cost much more per FLOP than the one before.

    python benchmarks/growth.py                      forward, dgrad and wgrad, three series of sizes, 3x3 and 1x1
    python benchmarks/growth.py --direction forward

Each series changes one size and keeps the others: batch 1 to 128, maps 56 to 896, channels 16 to 4096 (in and out, the map
smaller where they are many). Milliseconds per direct GFLOP of cnnfast and of torch channels_last, medians of interleaved
runs; a step is a size whose cost per FLOP is more than 1.3 times that of the size before. fp32, channels_last, two threads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from providers import CHANNELS_LAST, OURS, providers
from workloads import Layer

from cnnfast import _render
from cnnfast.report import timing

RESULTS = Path(__file__).resolve().parent / "results"
STEP = 1.3
MAPS = {16: 56, 32: 56, 64: 56, 128: 28, 256: 28, 512: 14, 1024: 14, 2048: 7, 4096: 7}


def series(taps: int) -> Iterator[tuple[str, int, Layer, int]]:
    """(series, size, layer, batch)."""

    def layer(channels: int, size: int) -> Layer:
        return Layer(channels, size, channels, taps, taps, 1, taps // 2, taps // 2, 1, False)

    for batch in (1, 2, 4, 8, 16, 32, 64, 128):
        yield "batch", batch, layer(64, 28), batch
    for size in (56, 112, 224, 448, 896):
        yield "map", size, layer(16, size), 1
    for channels, size in MAPS.items():
        if taps == 1 or channels <= 1024:
            yield "channels", channels, layer(channels, size), 1


def steps(costs: list[float]) -> list[bool]:
    """Which of a series cost more than :data:`STEP` times the one before."""
    return [False] + [cost > STEP * before for before, cost in itertools.pairwise(costs)]


def measure(direction: str, rounds: int, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of all series."""
    rows = []
    for taps in (3, 1):
        for name, size, layer, batch in series(taps):
            progress(f"{direction} {taps}x{taps} {name} {size}")
            functions, _ = providers(layer, direction, batch, with_compile=False)
            timed = timing.interleaved({k: functions[k] for k in (OURS, CHANNELS_LAST)}, rounds=rounds, budget_s=6)
            gflop = layer.flops(batch) / 1e9
            rows.append({
                "direction": direction, "taps": taps, "series": name, "size": size, "layer": str(layer), "batch": batch,
                **{who: t.median / gflop * 1e3 for who, t in timed.items()},
            })  # fmt: skip
    return rows


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--direction", nargs="+", choices=["forward", "dgrad", "wgrad"], default=["forward", "dgrad", "wgrad"]
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="where the JSON goes (default: benchmarks/results/)")
    options = parser.parse_args()
    torch.set_num_threads(2)
    machine = timing.machine()
    rows = []
    for direction in options.direction:
        rows += measure(
            direction, options.rounds, lambda text: print(f"\r{text:40}", end="", file=sys.stderr, flush=True)
        )
    print(file=sys.stderr)
    cells, found = [], 0
    keys = dict.fromkeys((r["direction"], r["taps"], r["series"]) for r in rows)
    for key in keys:
        group = [r for r in rows if (r["direction"], r["taps"], r["series"]) == key]
        for row, step in zip(group, steps([r[OURS] for r in group]), strict=True):
            row["step"], found = step, found + step
            where = f"{row['direction']} {row['taps']}x{row['taps']}"
            costs = (f"{row[OURS]:.2f}", f"{row[CHANNELS_LAST]:.2f}", f"{row[CHANNELS_LAST] / row[OURS]:.2f}")
            cells.append((where, f"{row['series']} {row['size']}", row["layer"], *costs, "step" if step else ""))
    columns = [("direction", "left"), ("size", "left"), ("layer", "left")]
    columns += [("cnnfast, ms/GFLOP", "right"), ("torch, ms/GFLOP", "right"), ("ratio", "right"), ("", "left")]
    caption = f"{timing.describe(machine)}. A step: more than {STEP} times the cost per FLOP of the size before. Steps: {found}."
    print(_render.as_text(_render.table("How cost grows", columns, cells, caption)))
    isa = os.environ.get("CNNFAST_CPU_ISA") or next(iter(machine["isa"]), "cpu")
    path = options.json or RESULTS / f"growth-{isa}.json"
    path.write_text(json.dumps({"machine": machine, "steps": found, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"written: {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
