"""The forward pass of every distinct convolution of nine networks against torch's channels_last, and what it costs.

    python benchmarks/layers.py                 medians of interleaved runs, geometric mean, lowest ratio
    python benchmarks/layers.py --batch 16      at another batch size
    python benchmarks/layers.py --packed        ours as a plan of one node whose weights were packed beforehand
    python benchmarks/layers.py --memory        peak resident memory, each in a process of its own, batch 1 and 8
    python benchmarks/layers.py --overhead      a call of almost no work: what reaching the kernel costs

fp32, channels_last input, weights as modules hold them, a bias where the network has one, no gradients, two threads.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from providers import CHANNELS_LAST, NCHW, OURS, TOLERANCE, geometric_mean, providers
from tables import render
from workloads import NETWORKS, Layer, distinct

import cnnfast
from cnnfast import settings
from cnnfast.graph import Plan
from cnnfast.ops.conv2d import problem
from cnnfast.report import timing

RESULTS = Path(__file__).resolve().parent / "results"


def packed(layer: Layer, batch: int) -> tuple[Callable[[], Any], str]:
    """A layer as a plan runs it, and the kernel that it chose."""
    x, w, b = layer.tensors(batch)
    assert x is not None
    assert w is not None
    y = (batch, layer.K, *layer.output)
    pads = (layer.pad_h, layer.pad_h, layer.pad_w, layer.pad_w)
    params = ((layer.stride, layer.stride), pads, (1, 1), layer.groups, "fp32")
    plan = Plan(x.device)
    operands = {"x": plan.input(tuple(x.shape), x.dtype), "w": plan.constant(w, frozen=True)}
    operands["b"] = None if b is None else plan.constant(b, frozen=True)  # type: ignore[assignment]
    plan.finish(plan.node(problem("fprop", x.shape, w.shape, y, x.dtype, x.device, params), operands, {"y": y}))
    return lambda: plan(x)[0], plan.kernels[0]


def layers(networks: Sequence[str], batch: int, rounds: int, nchw: bool, beforehand: bool) -> dict[str, Any]:
    """Times every distinct layer; prints the table."""
    rows = []
    machine = timing.machine()
    found = distinct(networks)
    begin = time.perf_counter()
    for number, (layer, where) in enumerate(found.items(), 1):
        functions, missing = providers(layer, "forward", batch, with_compile=False)
        if not nchw:
            functions.pop(NCHW, None)
        with settings.observe() as events:
            functions[OURS]()
        if beforehand:
            expected = functions[OURS]()
            functions[OURS], name = packed(layer, batch)
            error = float((functions[OURS]() - expected).norm() / expected.norm())
            assert error < TOLERANCE[torch.float32], f"packed, {layer}: off by {error:.2g} of the result's norm"
        found_kernels = [getattr(getattr(e, "selection", None), "implementation", None) for e in events]
        timings = timing.interleaved(functions, rounds=rounds)
        ratio = timings[CHANNELS_LAST].median / timings[OURS].median
        rows.append({
            "group": f"forward, batch {batch}, float32: {layer.kind}", "layer": str(layer), "networks": where,
            "ms": {n: t.ms for n, t in timings.items()}, "timings": {n: t.to_dict() for n, t in timings.items()},
            "ratio": ratio, "gflops": layer.flops(batch) / timings[OURS].median / 1e9, "missing": missing,
            "kernel": name if beforehand else ", ".join(dict.fromkeys(i.name for i in found_kernels if i is not None)),
        })  # fmt: skip
        seconds = time.perf_counter() - begin
        line = f"{number}/{len(found)} layers, {seconds:.0f} s, {layer}: {ratio:.2f}"
        print(f"\r{line:78}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(render(rows, machine))
    ratios = [row["ratio"] for row in rows]
    worst = min(rows, key=lambda row: row["ratio"])
    by_network = {n: geometric_mean([r["ratio"] for r in rows if n in r["networks"]]) for n in networks}
    print("geometric mean by network: " + ", ".join(f"{n} {r:.2f}" for n, r in by_network.items()))
    print(
        f"all {len(rows)} layers over {CHANNELS_LAST}: geometric mean {geometric_mean(ratios):.3f}, "
        f"lowest {worst['ratio']:.3f} ({worst['layer']}), {sum(r < 1 for r in ratios)} losses"
    )
    return {
        "machine": machine, "batch": batch, "rounds": rounds, "geometric_mean": geometric_mean(ratios),
        "minimum": worst["ratio"], "by_network": by_network, "layers": rows,
    }  # fmt: skip


# ---- memory ----------------------------------------------------------------------------------------------------------


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(match.group(1)) * 1024 if match else 0


def memory_child(provider: str, network: str, batch: int) -> None:
    """In a fresh process: the peak over one network's layers, and what each adds to it, to standard output."""
    convolution: Any = cnnfast.functional.conv2d if provider == OURS else F.conv2d
    with torch.no_grad():  # thread pools, code pages, caches of the dispatcher: not a layer's
        x = torch.ones(2, 16, 16, 16).contiguous(memory_format=torch.channels_last)
        convolution(x, torch.ones(16, 16, 3, 3), None, 1, 1, 1, 1)
    out = []
    peak = 0
    for layer in NETWORKS[network]:
        x, w, b = layer.tensors(batch)
        if provider == CHANNELS_LAST:
            w = w.contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr]
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew here
        before = _status("VmRSS")
        with torch.no_grad():
            convolution(x, w, b, layer.stride, layer.padding, 1, layer.groups)
        peak = max(peak, _status("VmHWM"))
        out.append([str(layer), max(0, _status("VmHWM") - before)])
    print(json.dumps({"layers": out, "peak": peak}))


def memory(networks: Sequence[str], batches: Sequence[int], threads: int) -> dict[str, Any]:
    """Peak resident memory of a process that runs a network's layers, and what the hungriest layer adds (result included)."""
    found: dict[str, Any] = {"machine": timing.machine(), "networks": {}}
    print(f"{'MB':24}{'peak of the process':>36}{'most that a layer adds':>36}")
    print(f"{'network':18}{'batch':>6}" + f"{'cnnfast':>12}{'torch':>12}{'ratio':>12}" * 2)
    for batch in batches:
        for network in networks:
            measured = {}
            for provider in (OURS, CHANNELS_LAST):
                command = [
                    sys.executable, __file__, "--child", provider, "--network", network, "--batch", str(batch), "--threads", str(threads),
                ]  # fmt: skip
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                measured[provider] = json.loads(done.stdout.splitlines()[-1])
            found["networks"][f"{network}, batch {batch}"] = measured
            line = f"{network:18}{batch:6}"
            for value in (lambda m: m["peak"], lambda m: max(added for _, added in m["layers"])):
                ours, theirs = (value(measured[p]) / 1e6 for p in (OURS, CHANNELS_LAST))
                line += f"{ours:12.1f}{theirs:12.1f}{ours / max(theirs, 1e-9):12.2f}"
            print(line, flush=True)
    return found


# ---- overhead --------------------------------------------------------------------------------------------------------


def overhead(rounds: int) -> dict[str, Any]:
    """Microseconds of an eager call on a 1 x 4 x 4 x 4 input, by module and by function."""
    torch.manual_seed(0)
    theirs = torch.nn.Conv2d(4, 4, 3, padding=1)
    ours = cnnfast.Conv2d(4, 4, 3, padding=1)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 4, 4, 4).contiguous(memory_format=torch.channels_last)
    w, b = theirs.weight, theirs.bias
    g = torch.randn(1, 4, 4, 4).contiguous(memory_format=torch.channels_last)

    def plain(function: Any, *args: Any) -> Any:
        def run() -> Any:
            with torch.no_grad():
                for _ in range(10):
                    function(*args)

        return run

    def recorded(function: Any, *args: Any) -> Any:
        def run() -> Any:
            for _ in range(10):
                function(*args)

        return run

    def trained(function: Any, *args: Any) -> Any:
        def run() -> Any:
            for _ in range(10):
                function(*args).backward(g)

        return run

    found: dict[str, Any] = {"machine": timing.machine(), "us": {}}
    print(timing.describe(found["machine"]))
    for mode, wrap in (("no gradient", plain), ("with gradient", recorded), ("with gradient and backward", trained)):
        functions = {
            "cnnfast.Conv2d": wrap(ours, x), "torch.nn.Conv2d": wrap(theirs, x),
            "cnnfast.functional.conv2d": wrap(cnnfast.functional.conv2d, x, w, b, 1, 1), "torch F.conv2d": wrap(F.conv2d, x, w, b, 1, 1),
        }  # fmt: skip
        timings = timing.interleaved(functions, rounds=max(rounds, 51), warmup=20, pause_s=0.001, sample_s=0.005)
        us = {name: t.median * 1e5 for name, t in timings.items()}  # ten calls a function
        found["us"][mode] = us
        print(f"{mode:28}" + ", ".join(f"{name} {value:.1f} us" for name, value in us.items()))
        print(f"{'':28}module: ours / torch {us['cnnfast.Conv2d'] / us['torch.nn.Conv2d']:.2f}")
    return found


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", help="default: 1; with --memory 1 and 8")
    parser.add_argument("--network", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=15, help="interleaved samples of each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--nchw", action="store_true", help="time torch with NCHW tensors, too")
    parser.add_argument("--packed", action="store_true", help="pack our weights beforehand, as plans do")
    parser.add_argument("--json", type=Path, help="where the JSON goes (default: benchmarks/results/)")
    parser.add_argument("--memory", action="store_true", help="peak resident memory instead of time")
    parser.add_argument("--overhead", action="store_true", help="the time of a call that computes almost nothing")
    parser.add_argument("--child", choices=[OURS, CHANNELS_LAST], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        memory_child(options.child, options.network[0], options.batch[0])
        return
    if options.memory:
        name, found = "memory", memory(options.network, options.batch or [1, 8], options.threads)
    elif options.overhead:
        name, found = "overhead", overhead(options.rounds)
    else:
        batch = (options.batch or [1])[0]
        name = f"layers-batch{batch}" + ("-packed" if options.packed else "")
        found = layers(options.network, batch, options.rounds, options.nchw, options.packed)
    isa = next((i for i in found["machine"]["isa"]), "cpu")
    path = options.json or RESULTS / f"{name}-{isa}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"written: {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
