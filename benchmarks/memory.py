"""What a network takes in memory: torch eager, and fused, in fresh processes that build it and run it.

    python benchmarks/memory.py                             five networks, batch 1 and 8
    python benchmarks/memory.py --network vgg16 --batch 1   others

Two figures of resident memory, above what the process has after its imports and a small model that was fused and run: the
peak of building, planning and running (VmHWM), and what is left after the first forward pass (VmRSS). Beside them the bytes
of the weights as they are held, and of the plans' working memory, counted. fp32, channels_last input, two threads.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import cnnfast
from cnnfast import _render, models
from cnnfast.report import timing

RESULTS = Path(__file__).resolve().parent / "results"
NETWORKS = ("resnet50", "vgg16", "alexnet", "resnext50_32x4d", "googlenet")
EAGER, DROPPED, INPLACE, KEPT = "torch eager", "model = fuse(model)", "fuse(model, x, inplace=True)", "beside the model"

# glibc raises this threshold as it goes, and then keeps freed tensors or not, as its heap happens to lie: the same process
# peaks at 51 or 82 MB, whoever computes. With it fixed what is dropped goes back, and a peak is what was needed.
MMAP_THRESHOLD = "131072"


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(match.group(1)) * 1024 if match else 0


def reset_peak() -> None:
    """Makes VmHWM count from here, where the system lets a process do so."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def fresh(script: str, *arguments: str) -> dict[str, Any]:
    """What a script prints last, as JSON, run in a fresh process that gives freed memory back."""
    environment = {"MALLOC_MMAP_THRESHOLD_": MMAP_THRESHOLD, **os.environ}
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _model(name: str) -> torch.nn.Module:
    options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return models.create(name, **options).eval()


def child(kind: str, network: str, batch: int) -> None:
    """In a fresh process: builds the network, fuses it or not, and runs it twice; the figures, to standard output."""
    small = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 4))
    with torch.no_grad():
        cnnfast.fuse(small.eval())(torch.zeros(1, 3, 8, 8))
        small(torch.zeros(1, 3, 8, 8))
        size = 299 if network == "inception_v3" else 224
        x = torch.zeros(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
        gc.collect()
        reset_peak()
        baseline = status("VmRSS")
        model: Any = _model(network)
        if kind == EAGER:
            model = cnnfast.revert(model, inplace=True).to(memory_format=torch.channels_last)
        other = model if kind == KEPT else None
        if kind == INPLACE:
            model = cnnfast.fuse(model, x, inplace=True)
        elif kind != EAGER:
            model = cnnfast.fuse(model)
        model(x)
        model(x)
    gc.collect()
    weights = model.weight_bytes if kind != EAGER else sum(t.nbytes for t in model.state_dict().values())
    plans = [] if kind == EAGER else [s.plan.arena_bytes for p in model.programs for s in p.steps if hasattr(s, "plan")]
    del other
    print(json.dumps({
        "peak": status("VmHWM") - baseline, "resident": status("VmRSS") - baseline, "weights": weights,
        "arena": max(plans, default=0),
    }))  # fmt: skip


def measure(networks: Sequence[str], batches: Sequence[int], threads: int, processes: int) -> dict[str, Any]:
    """Runs the processes in turns; prints the table."""
    found: dict[str, Any] = {"machine": timing.machine(), "processes": processes, "networks": []}
    rows, begin = [], time.perf_counter()
    for network in networks:
        for batch in batches:
            measured: dict[str, list[dict[str, int]]] = {kind: [] for kind in (EAGER, DROPPED, INPLACE, KEPT)}
            for i in range(processes):
                for kind in list(measured)[:: 1 if i % 2 == 0 else -1]:
                    given = ("--network", network, "--batch", str(batch), "--threads", str(threads))
                    measured[kind].append(fresh(__file__, "--child", kind, *given))
            medians = {k: {f: statistics.median(m[f] for m in ms) for f in ms[0]} for k, ms in measured.items()}
            found["networks"].append({"network": network, "batch": batch, "measured": measured, "median": medians})
            for kind, of in medians.items():
                mega = [f"{of[f] / 1e6:.0f}" for f in ("peak", "resident", "weights", "arena")]
                ratios = [f"{of[f] / medians[EAGER][f]:.2f}" for f in ("peak", "resident")]
                rows.append((network, str(batch), kind, *mega, *ratios))
            print(f"\r{network} {batch}, {time.perf_counter() - begin:.0f} s   ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    headings = ("peak, MB", "then, MB", "weights, MB", "arena, MB", "peak\u00a0/\u00a0eager", "then\u00a0/\u00a0eager")
    columns = [("network", "left"), ("batch", "right"), ("", "left"), *((heading, "right") for heading in headings)]
    caption = (
        f"{timing.describe(found['machine'])}. Fresh processes; resident memory above that after imports and a small fused "
        f"model: its peak while the network is built, planned and run twice, and afterwards. Weights and arena: bytes "
        f"counted. torch eager in channels_last. Medians of {processes}. "
        f"MALLOC_MMAP_THRESHOLD_={os.environ.get('MALLOC_MMAP_THRESHOLD_', MMAP_THRESHOLD)}."
    )
    print(_render.as_text(_render.table("Memory of whole networks", columns, rows, caption)))
    return found


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", nargs="+", default=list(NETWORKS), metavar="NAME",
                        help="default: " + " ".join(NETWORKS))  # fmt: skip
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="images at once; default: 1 8")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--processes", type=int, default=3, help="fresh processes of each kind; default: 3")
    parser.add_argument("--json", type=Path, help="where the JSON goes (default: benchmarks/results/)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        child(options.child, options.network[0], options.batch[0])
        return
    found = measure(options.network, options.batch, options.threads, options.processes)
    isa = next(iter(found["machine"]["isa"]), "cpu")
    path = options.json or RESULTS / f"networks-memory-{isa}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"written: {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
