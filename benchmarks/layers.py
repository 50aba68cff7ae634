"""Every distinct convolution of nine networks against torch's channels_last, and what it costs.

    python benchmarks/layers.py                 medians of interleaved runs, geometric mean, lowest ratio
    python benchmarks/layers.py --batch 16      at another batch size
    python benchmarks/layers.py --network mobilenet_v2 efficientnet_b0 convnext_tiny    depthwise layers
    python benchmarks/layers.py --direction dgrad --batch 8     the gradient of the input (or wgrad: of the weight) alone
    python benchmarks/layers.py --packed        ours as a plan of one node whose weights were packed beforehand
    python benchmarks/layers.py --memory        peak memory above what an import takes, in fresh processes, batch 1 and 8
    python benchmarks/layers.py --overhead      a call of almost no work: what reaching the kernel costs

Both sides without AVX-512: ``ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 CNNFAST_CPU_ISA=avx2``.

fp32, channels_last input, weights as modules hold them, a bias where the network has one, two threads. While time is
measured malloc keeps what is freed (memory.py, KEEP_FREED).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from memory import MMAP_THRESHOLD, fresh, keep_freed, reset_peak, status
from providers import CHANNELS_LAST, NCHW, OURS, TOLERANCE, geometric_mean, providers
from tables import render
from workloads import DEPTHWISE, NETWORKS, Layer, distinct

import cnnfast
from cnnfast import _render, settings
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


def layers(
    networks: Sequence[str], batch: int, rounds: int, nchw: bool, direction: str = "forward", kinds: Sequence[str] = (),
    beforehand: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Times every distinct layer; prints the table."""
    rows = []
    machine = timing.machine()
    found = {layer: where for layer, where in distinct(networks).items() if not kinds or layer.kind in kinds}
    begin = time.perf_counter()
    for number, (layer, where) in enumerate(found.items(), 1):
        functions, missing = providers(layer, direction, batch, with_compile=False)
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
            "group": f"{direction}, batch {batch}, float32: {layer.kind}", "layer": str(layer), "networks": where,
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
        "machine": machine, "direction": direction, "batch": batch, "rounds": rounds, "geometric_mean": geometric_mean(ratios),
        "minimum": worst["ratio"], "by_network": by_network, "layers": rows,
    }  # fmt: skip


# ---- memory ----------------------------------------------------------------------------------------------------------


def memory_child(provider: str, network: str, batch: int) -> None:
    """In a fresh process that has imported torch and cnnfast: runs each layer once; the peak, to standard output."""
    reset_peak()  # that of the import itself may have been higher
    baseline = status("VmRSS")
    convolution: Any = cnnfast.functional.conv2d if provider == OURS else F.conv2d
    last = torch.channels_last
    with torch.no_grad():
        for layer in distinct([network]):  # made in place: no copy that would hide a kernel's own needs
            x = torch.empty(batch, layer.C, layer.H, layer.H, memory_format=last).normal_()
            w = torch.empty(layer.K, layer.C // layer.groups, layer.R, layer.S)
            w = torch.empty_like(w, memory_format=last if provider == CHANNELS_LAST else None).normal_()
            b = torch.zeros(layer.K) if layer.bias else None
            convolution(x, w, b, layer.stride, layer.padding, 1, layer.groups)
            del x, w, b
    print(json.dumps({"baseline": baseline, "peak": status("VmHWM")}))


def memory(networks: Sequence[str], batches: Sequence[int], threads: int, processes: int) -> dict[str, Any]:
    """Peak resident memory above the import's, of processes that run a network's distinct layers one after another."""
    found: dict[str, Any] = {"machine": timing.machine(), "processes": processes, "networks": []}
    rows = []
    begin = time.perf_counter()
    for network, batch in itertools.product(networks, batches):
        added: dict[str, list[int]] = {OURS: [], CHANNELS_LAST: []}
        for i in range(processes):
            for provider in list(added)[:: 1 if i % 2 == 0 else -1]:
                given = ("--network", network, "--batch", str(batch), "--threads", str(threads))
                measured = fresh(__file__, "--child", provider, *given)
                added[provider].append(measured["peak"] - measured["baseline"])
        medians = {provider: statistics.median(values) for provider, values in added.items()}
        ratio = medians[OURS] / medians[CHANNELS_LAST]
        found["networks"].append({
            "network": network, "batch": batch, "layers": len(distinct([network])), "bytes": added, "median": medians,
            "ratio": ratio,
        })  # fmt: skip
        mega = [f"{medians[p] / 1e6:.1f} ({min(added[p]) / 1e6:.1f}–{max(added[p]) / 1e6:.1f})" for p in added]
        rows.append((network, str(batch), *mega, f"{ratio:.2f}"))
        print(
            f"\r{len(rows)} of {len(networks) * len(batches)}, {time.perf_counter() - begin:.0f} s",
            end="",
            file=sys.stderr,
        )
    print(file=sys.stderr)
    headings = ("batch", f"{OURS}, MB", f"{CHANNELS_LAST}, MB", "cnnfast\u00a0/\u00a0torch")
    caption = (
        f"{timing.describe(found['machine'])}. A fresh process imports torch and cnnfast, then runs every distinct "
        f"convolution of the network once, forward, one after another, each layer's tensors dropped after it: peak resident "
        f"memory (VmHWM) less that after the import (VmRSS). Median (lowest to highest) of {processes} processes, in turns. "
        f"MALLOC_MMAP_THRESHOLD_={os.environ.get('MALLOC_MMAP_THRESHOLD_', MMAP_THRESHOLD)}."
    )
    columns = [("network", "left"), *((heading, "right") for heading in headings)]
    print(_render.as_text(_render.table("Peak memory above the import", columns, rows, caption)))
    return found


# ---- overhead --------------------------------------------------------------------------------------------------------

CALLS = 10  # in a row for one sample's call: the loop itself costs nothing beside them


def overhead(rounds: int) -> dict[str, Any]:
    """Microseconds of an eager call on a 1 x 4 x 4 x 4 input, by layout of the input, by module and by function."""
    found: dict[str, Any] = {"machine": timing.machine(), "calls": []}
    rows = []
    for layout, memory_format in (("NCHW", torch.contiguous_format), ("channels_last", torch.channels_last)):
        torch.manual_seed(0)
        theirs = torch.nn.Conv2d(4, 4, 3, padding=1).to(memory_format=memory_format)
        ours = cnnfast.convert(theirs)
        x, g = (torch.randn(1, 4, 4, 4).contiguous(memory_format=memory_format) for _ in range(2))
        torch.testing.assert_close(ours(x), theirs(x))
        functions = {
            "module": (ours, theirs, (x,)),
            "function": (cnnfast.functional.conv2d, F.conv2d, (x, theirs.weight, theirs.bias, 1, 1)),
        }
        for mode in ("no gradients", "gradients recorded", "with backward pass"):
            timed = {}
            for kind, (mine, peer, args) in functions.items():
                timed[f"{kind} cnnfast"] = _repeated(mine, args, mode, g)
                timed[f"{kind} torch"] = _repeated(peer, args, mode, g)
            timings = timing.interleaved(timed, rounds=max(rounds, 51), warmup=20, pause_s=0.001, sample_s=0.005)
            us = {name: t.median / CALLS * 1e6 for name, t in timings.items()}
            for kind in functions:
                mine_us, peer_us = us[f"{kind} cnnfast"], us[f"{kind} torch"]
                call = {"input": layout, "call": f"{kind}, {mode}"}
                found["calls"].append({**call, "cnnfast_us": mine_us, "torch_us": peer_us, "ratio": mine_us / peer_us})
                rows.append((*call.values(), f"{mine_us:.1f}", f"{peer_us:.1f}", f"{mine_us / peer_us:.2f}"))
    columns = [(heading, "left") for heading in ("input", "call")]
    columns += [(heading, "right") for heading in ("cnnfast, µs", "torch, µs", "cnnfast\u00a0/\u00a0torch")]
    caption = (
        f"{timing.describe(found['machine'])}. Conv2d(4, 4, 3, padding=1) on a 1 x 4 x 4 x 4 input, as a module and as a "
        f"function; the module's weight in the input's layout. No gradients: under no_grad; recorded: as in training, but "
        f"forward only. Medians of interleaved runs; above 1 cnnfast is slower."
    )
    print(_render.as_text(_render.table("What a call costs that computes almost nothing", columns, rows, caption)))
    return found


def _repeated(function: Any, args: Sequence[Any], mode: str, g: torch.Tensor) -> Callable[[], None]:
    def without() -> None:
        with torch.no_grad():
            for _ in range(CALLS):
                function(*args)

    def recorded() -> None:
        for _ in range(CALLS):
            function(*args)

    def trained() -> None:
        for _ in range(CALLS):
            function(*args).backward(g)

    return {"no gradients": without, "gradients recorded": recorded, "with backward pass": trained}[mode]


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="Times and memory mean something on an otherwise idle machine.",
    )
    parser.add_argument("--batch", type=int, nargs="+", help="images at once; default: 1, with --memory 1 and 8")
    parser.add_argument("--direction", choices=["forward", "backward", "dgrad", "wgrad"], default="forward")
    parser.add_argument(
        "--kind", nargs="+", default=[], help="only layers of these kinds: grouped, stem, 1x1, 3x3, ..."
    )
    parser.add_argument("--network", nargs="+", choices=[*NETWORKS, *DEPTHWISE], default=list(NETWORKS),
                        metavar="NAME", help="only layers of these: " + ", ".join(NETWORKS)
                        + "; of these the depthwise ones: " + ", ".join(DEPTHWISE))  # fmt: skip
    parser.add_argument("--rounds", type=int, default=15, help="interleaved samples of each; default: 15")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--nchw", action="store_true", help="time torch with NCHW tensors, too")
    parser.add_argument("--packed", action="store_true", help="pack our weights beforehand, as plans do")
    parser.add_argument("--json", type=Path, help="where the JSON goes (default: benchmarks/results/)")
    parser.add_argument(
        "--memory",
        action="store_true",
        help="instead of time: the peak of resident memory above "
        "that after importing torch and cnnfast, of fresh processes that run a network's distinct layers "
        "one after another (--network, --batch, --threads, --processes)",
    )
    parser.add_argument(
        "--processes", type=int, default=3, help="with --memory: fresh processes of each side; default: 3"
    )
    parser.add_argument(
        "--overhead",
        action="store_true",
        help="instead: the time of a call that computes almost nothing, "
        "with NCHW and channels_last input, with and without gradients (--rounds)",
    )
    parser.add_argument("--child", choices=[OURS, CHANNELS_LAST], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.memory and not options.child:
        keep_freed()
    torch.set_num_threads(options.threads)
    if options.child:
        memory_child(options.child, options.network[0], options.batch[0])
        return
    if options.memory:
        name, found = "memory", memory(options.network, options.batch or [1, 8], options.threads, options.processes)
    elif options.overhead:
        name, found = "overhead", overhead(options.rounds)
    else:
        batch = (options.batch or [1])[0]
        found = layers(
            options.network, batch, options.rounds, options.nchw, options.direction, options.kind, options.packed
        )
        name = f"layers-batch{batch}" if options.direction == "forward" else f"layers-{options.direction}-batch{batch}"
        name += "-packed" if options.packed else ""
    isa = os.environ.get("CNNFAST_CPU_ISA") or next((i for i in found["machine"]["isa"]), "cpu")
    path = options.json or RESULTS / f"{name}-{isa}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"written: {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
