"""What a network takes in memory: torch eager, and fused, in fresh processes that build it and run it.

    python benchmarks/memory.py                             nine networks, batch 1
    python benchmarks/memory.py --network vgg16 --batch 8   others
    python benchmarks/memory.py --train                     training steps of three, batch 8

Two figures of resident memory, above what the process has after its imports and a small model that was fused and run: the
peak of building, planning and running (VmHWM), and what is left after the first forward pass (VmRSS). Beside them the bytes
of the weights as they are held, and of the plans' working memory, counted. fp32, channels_last input, two threads.

``--train``: forward, cross-entropy, backward and SGD with momentum, three times, of torch in channels_last, of the network
converted, and of cnnfast's own, whose blocks are fused.
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
NETWORKS = (
    "alexnet", "vgg16", "googlenet", "inception_v3", "resnet18", "resnet50", "resnet152", "resnext50_32x4d", "wide_resnet50_2",
)  # fmt: skip
TRAINED = ("resnet18", "resnet50", "vgg16")
EAGER, DROPPED, INPLACE, KEPT = "torch eager", "model = fuse(model)", "fuse(model, x, inplace=True)", "beside the model"
TORCH, CONVERTED, OWN = "torch channels_last", "converted", "cnnfast.models"
KINDS = {
    False: (EAGER, DROPPED, INPLACE, KEPT),
    True: (TORCH, CONVERTED, OWN),
}  # forward, training step; the first is torch

# glibc raises this threshold as it goes, and then keeps freed tensors or not, as its heap happens to lie: the same process
# peaks at 51 or 82 MB, whoever computes. With it fixed what is dropped goes back, and a peak is what was needed.
MMAP_THRESHOLD = "131072"


# Speed is measured the other way round, with what is freed kept: else results of 32 MB and more cost either side their page
# faults each time, which take longer than many an operation.
KEEP_FREED = {"MALLOC_MMAP_THRESHOLD_": "17179869184", "MALLOC_TRIM_THRESHOLD_": "17179869184"}


def keep_freed() -> None:
    """Starts the process anew with KEEP_FREED, unless its thresholds are set."""
    if any(name not in os.environ for name in KEEP_FREED):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**KEEP_FREED, **os.environ})


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


def _inputs(network: str, batch: int) -> torch.Tensor:
    size = 299 if network == "inception_v3" else 224
    return torch.zeros(batch, 3, size, size).contiguous(memory_format=torch.channels_last)


def forward(kind: str, network: str, batch: int) -> dict[str, int]:
    """Builds the network, fuses it or not, and runs it twice; the figures."""
    small = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 4))
    with torch.no_grad():
        cnnfast.fuse(small.eval())(torch.zeros(1, 3, 8, 8))
        small(torch.zeros(1, 3, 8, 8))
        x = _inputs(network, batch)
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
    return {**_taken(baseline), "weights": weights, "arena": max(plans, default=0)}


def training(kind: str, network: str, batch: int) -> dict[str, int]:
    """Builds the network and takes three steps; the figures."""

    def train(model: torch.nn.Module, x: torch.Tensor) -> None:
        optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-4, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(model(x), torch.arange(len(x))).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    small = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten())
    for of in (small, cnnfast.convert(small)):
        train(of, torch.zeros(2, 3, 8, 8))
    x = _inputs(network, batch)
    gc.collect()
    reset_peak()
    baseline = status("VmRSS")
    model = models.create(network)
    if kind != OWN:
        model = cnnfast.revert(model, inplace=True)
    if kind == CONVERTED:
        model = cnnfast.convert(model, inplace=True)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    train(model, x)
    weights = sum(t.nbytes for t in model.state_dict().values())
    return {**_taken(baseline), "weights": weights}


def _taken(baseline: int) -> dict[str, int]:
    return {"peak": status("VmHWM") - baseline, "resident": status("VmRSS") - baseline}


def measure(
    networks: Sequence[str], batches: Sequence[int], threads: int, processes: int, kinds: Sequence[str], train: bool
) -> dict[str, Any]:
    """Runs the processes in turns; prints the table."""
    found: dict[str, Any] = {"machine": timing.machine(), "processes": processes, "networks": []}
    rows, begin = [], time.perf_counter()
    for network in networks:
        for batch in batches:
            measured: dict[str, list[dict[str, int]]] = {kind: [] for kind in kinds}
            for i in range(processes):
                for kind in list(measured)[:: 1 if i % 2 == 0 else -1]:
                    given = ("--network", network, "--batch", str(batch), "--threads", str(threads))
                    measured[kind].append(fresh(__file__, "--child", kind, *given, *["--train"] * train))
            medians = {k: {f: statistics.median(m[f] for m in ms) for f in ms[0]} for k, ms in measured.items()}
            found["networks"].append({"network": network, "batch": batch, "measured": measured, "median": medians})
            for kind, of in medians.items():
                mega = [f"{of[f] / 1e6:.0f}" if f in of else "" for f in ("peak", "resident", "weights", "arena")]
                ratios = [f"{of[f] / medians[kinds[0]][f]:.3f}" for f in ("peak", "resident")]
                rows.append((network, str(batch), kind, *mega, *ratios))
            print(f"\r{network} {batch}, {time.perf_counter() - begin:.0f} s   ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    headings = ("peak, MB", "then, MB", "weights, MB", "arena, MB", "peak\u00a0/\u00a0torch", "then\u00a0/\u00a0torch")
    columns = [("network", "left"), ("batch", "right"), ("", "left"), *((heading, "right") for heading in headings)]
    what = "trained for three steps" if train else "planned and run twice"
    caption = (
        f"{timing.describe(found['machine'])}. Fresh processes; resident memory above that after imports and a small "
        f"model: its peak while the network is built and {what}, and afterwards. Weights and arena: bytes counted. "
        f"torch in channels_last. Medians of {processes}. "
        f"MALLOC_MMAP_THRESHOLD_={os.environ.get('MALLOC_MMAP_THRESHOLD_', MMAP_THRESHOLD)}."
    )
    title = "Memory of training steps" if train else "Memory of whole networks"
    print(_render.as_text(_render.table(title, columns, rows, caption)))
    return found


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train", action="store_true", help="training steps instead of forward passes")
    parser.add_argument("--network", nargs="+", metavar="NAME", help="default: nine networks; with --train three")
    parser.add_argument("--batch", type=int, nargs="+", help="images at once; default: 1; with --train 8")
    parser.add_argument("--kinds", nargs="+", metavar="KIND", choices=[k for ks in KINDS.values() for k in ks],
                        help="what is compared, torch first; default: all of " + ", ".join(map(repr, KINDS[False])))  # fmt: skip
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--processes", type=int, default=5, help="fresh processes of each kind; default: 5")
    parser.add_argument("--json", type=Path, help="where the JSON goes (default: benchmarks/results/)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        run = training if options.train else forward
        print(json.dumps(run(options.child, options.network[0], options.batch[0])))
        return
    train = options.train
    networks, batches = options.network or (TRAINED if train else NETWORKS), options.batch or [8 if train else 1]
    found = measure(networks, batches, options.threads, options.processes, options.kinds or KINDS[train], train)
    isa = next(iter(found["machine"]["isa"]), "cpu")
    path = options.json or RESULTS / f"{'training' if train else 'networks'}-memory-{isa}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"written: {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
