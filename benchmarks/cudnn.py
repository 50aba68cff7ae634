"""Convolutions, networks and training steps on a GPU against cuDNN at its best, by suite, into one file of results.

    python benchmarks/cudnn.py --list                                   suites, and the seconds that each may take
    python benchmarks/cudnn.py --suite layers-bf16-32 --output FILE     measures one, and adds it to the file
    python benchmarks/cudnn.py --report FILE                            FILE's tables (.md) and plots (.png), on the terminal, too

``make gpu`` runs them all. cuDNN at its best: cudnn.benchmark, everything channels_last, in the same dtype; with precision
"fp32" without tf32. Both sides are timed as CUDA graphs, eager calls beside them: there Python's time counts, too.
Results are checked before they are timed; losses are shown, and who is missing, with the reason.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import cnnfast
from cnnfast import _render, ops
from cnnfast.report import timing

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
Call = Callable[[], Any]
OURS = "cnnfast"
BACKENDS = ("cuda", "triton")
DEVICE = "cuda"
PIXELS = 224  # of the networks' images
GRAPH = " graph"  # the ending of what is timed as a CUDA graph
# name, C, H = W, K, R = S, stride, groups: of the nine networks one of each kind
LAYERS: tuple[tuple[str, int, int, int, int, int, int], ...] = (
    ("resnet50 stem 7x7/2", 3, 224, 64, 7, 2, 1), ("resnet50 1x1", 64, 56, 256, 1, 1, 1),
    ("resnet50 1x1", 1024, 14, 256, 1, 1, 1), ("resnet50 1x1/2", 512, 28, 1024, 1, 2, 1),
    ("resnet50 3x3", 64, 56, 64, 3, 1, 1), ("resnet50 3x3/2", 128, 56, 128, 3, 2, 1),
    ("resnet50 3x3", 256, 14, 256, 3, 1, 1), ("resnet50 3x3", 512, 7, 512, 3, 1, 1),
    ("vgg16 3x3", 64, 112, 128, 3, 1, 1), ("resnext50 3x3", 128, 56, 128, 3, 1, 32),
    ("resnext50 3x3", 512, 14, 512, 3, 1, 32),
)  # fmt: skip
NETWORKS = ("resnet50", "resnet18", "vgg16", "googlenet", "resnext50_32x4d")


# ---- timing ----------------------------------------------------------------------------------------------------------


def graphed(call: Call) -> Call:
    """A call as a CUDA graph: what it does beside the device's work is done once. It may not wait for the device."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def milliseconds(calls: Mapping[str, Call], rounds: int = 10) -> dict[str, float]:
    """The medians of interleaved samples, on the device's clock."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        repeats[name] = max(1, min(20, round(1e-3 / max(time.perf_counter() - begin, 1e-6))))
    for _ in range(rounds):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats[name]):
                call()
            end.record()
            end.synchronize()
            samples[name].append(start.elapsed_time(end) / repeats[name])
    return {name: statistics.median(found) for name, found in samples.items()}


def compare(
    name: str, makers: Mapping[str, Callable[[], Call]], limit: float, eager: bool, **labels: Any
) -> dict[str, Any]:
    """A record: every competitor checked against the first, then timed as a graph, and with ``eager`` as it is."""
    calls: dict[str, Call] = {}
    missing: dict[str, str] = {}
    expected: torch.Tensor | None = None
    for competitor, make in makers.items():
        try:
            call = make()
            out = call().double()
            expected = out if expected is None else expected
            error = float((out - expected).norm() / expected.norm().clamp_min(1e-30))
            if not error <= limit:
                raise ValueError(f"its result is off by {error:.2g} of the norm")
            calls[competitor + GRAPH] = graphed(call)
        except Exception as error:  # shown, not hidden: the others are still measured
            missing[competitor] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
            continue
        if eager:
            calls[competitor] = call
    return {"name": name, **labels, "ms": milliseconds(calls) if calls else {}, "missing": missing}


# ---- suites ----------------------------------------------------------------------------------------------------------


def layers(dtype: str, batch: int, precision: str = "high", fused: bool = False) -> Iterator[dict[str, Any]]:
    """Each layer in every direction; or fused: with batch norm, residual and ReLU, as inference has them."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, precision == "high"
    try:
        with cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=precision == "high"):
            yield from _layers(dtype, batch, precision, fused)
    finally:
        matmul.allow_tf32 = before


def _layers(dtype: str, batch: int, precision: str, fused: bool) -> Iterator[dict[str, Any]]:
    of = DTYPES[dtype]
    limit = {"f32": 5e-3 if precision == "high" else 1e-4, "bf16": 2e-2, "f16": 4e-3}[dtype]
    for name, c, h, k, r, stride, groups in LAYERS:
        x = _images(batch, c, h, of)
        w = (torch.randn(k, c // groups, r, r, device=DEVICE) / (c // groups * r * r) ** 0.5).to(of)
        w = w.contiguous(memory_format=torch.channels_last)
        args = (None, stride, r // 2, 1, groups)
        y = F.conv2d(x, w, *args)
        flops = 2 * y.numel() * (c // groups) * r * r
        label = f"{name} {c}x{h}x{h} > {k}" + (f", {groups} groups" if groups > 1 else "")
        shared = {"dtype": dtype, "batch": batch, "precision": precision, "flops": flops}
        if fused:
            yield compare(label, _fused(x, w, y, args), limit, True, direction="conv + bn + add + relu", **shared)
            continue
        for direction in ("fprop", "dgrad", "wgrad"):
            makers = _directions(direction, x, w, torch.randn_like(y), stride, r // 2, groups, precision)
            yield compare(label, makers, limit, direction == "fprop", direction=direction, **shared)


def _images(batch: int, c: int, h: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(batch, c, h, h, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)


def _directions(
    direction: str,
    x: torch.Tensor,
    w: torch.Tensor,
    g: torch.Tensor,
    stride: int,
    pad: int,
    groups: int,
    precision: str,
) -> dict[str, Callable[[], Call]]:
    pairs = ((stride, stride), (pad, pad), (1, 1))
    mask = [direction == "dgrad", direction == "wgrad", False]

    def cudnn() -> torch.Tensor:
        if direction == "fprop":
            return F.conv2d(x, w, None, *pairs, groups)
        out = torch.ops.aten.convolution_backward(g, x, w, None, *pairs, False, [0, 0], groups, mask)
        return out[mask.index(True)]

    def ours(backend: str) -> Call:
        tail = ((stride, stride), (pad,) * 4, (1, 1), groups, precision, backend, True)

        def run() -> torch.Tensor:
            if direction == "fprop":
                return ops.conv2d(x, w, None, *tail)
            if direction == "dgrad":
                return ops.conv2d_dgrad(w, g, x.shape, True, *tail)
            return ops.conv2d_wgrad(x, g, w.shape, True, *tail)

        return run

    return {"cuDNN": lambda: cudnn, **{f"{OURS} {b}": lambda b=b: ours(b) for b in BACKENDS}}


def _fused(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, args: tuple[Any, ...]) -> dict[str, Callable[[], Call]]:
    """Inference's convolution, batch norm, addition and ReLU; for torch.compile the norm is folded beforehand."""
    k, (_, stride, pad, _, groups) = w.shape[0], args
    scale, shift, residual = torch.rand(k, device=DEVICE) + 0.5, torch.randn(k, device=DEVICE), torch.randn_like(y)
    zero, one = torch.zeros_like(shift), torch.ones_like(shift)

    def eager() -> torch.Tensor:
        z = F.batch_norm(F.conv2d(x, w, *args), zero, one, scale, shift, eps=1e-12)
        return F.relu_(z.add_(residual))

    def compiled() -> Call:
        folded = (w.float() * scale[:, None, None, None]).to(w)
        function = torch.compile(
            lambda a, r: F.relu(F.conv2d(a, folded, shift.to(a.dtype), stride, pad, 1, groups) + r), dynamic=False
        )
        return lambda: function(x, residual)

    def ours(backend: str) -> Call:
        tail = ((stride, stride), (pad,) * 4, (1, 1), groups, "relu", "high", backend, True)
        return lambda: ops.conv_bn_act(x, w, None, scale, shift, residual, *tail)

    return {
        "cuDNN": lambda: eager, "torch.compile": compiled,
        **{f"{OURS} {b}": lambda b=b: ours(b) for b in BACKENDS},
    }  # fmt: skip


def networks(batch: int, names: Sequence[str], autotune: bool) -> Iterator[dict[str, Any]]:
    """Inference in bf16: torchvision's network channels_last, torch.compile(mode="max-autotune"), and ours: the same network
    of ``cnnfast.models``, layer by layer, and torchvision's through ``cnnfast.fuse``."""
    for name in names:
        plain, ours = (model.eval().to(torch.bfloat16) for model in _pair(name))
        x = _images(batch, 3, PIXELS, torch.bfloat16)
        makers: dict[str, Callable[[], Call]] = {"torch channels_last": lambda m=plain, x=x: _network(m, x)}
        if autotune:
            makers["torch max-autotune"] = lambda m=plain, x=x: _network(_autotuned(copy.deepcopy(m), x), x)
        makers[OURS] = lambda m=ours, x=x: _network(m, x)
        # everybody's graphs are made alike
        makers[f"{OURS} fused"] = lambda m=plain, x=x: _network(cnnfast.fuse(m, x, cuda_graph=False), x)
        shared = {"dtype": "bf16", "batch": batch, "precision": "high", "flops": 0}
        yield compare(name, makers, 5e-2, True, direction="inference", **shared)


def _pair(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """torchvision's network and ours, channels_last and of the same weights."""
    import torchvision

    options: dict[str, Any] = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    torch.manual_seed(0)
    plain, ours = torchvision.models.get_model(name, weights=None, **options), cnnfast.models.create(name, **options)
    ours.load_state_dict(plain.state_dict())
    return plain.to(DEVICE, memory_format=torch.channels_last), ours.to(DEVICE, memory_format=torch.channels_last)


def _network(model: Any, x: torch.Tensor) -> Call:
    def run() -> torch.Tensor:
        with torch.inference_mode():
            return model(x)

    return run


def _autotuned(model: torch.nn.Module, x: torch.Tensor) -> Any:
    """Without its own CUDA graphs: everybody's are made alike."""
    import torch._inductor.config

    with torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(model, mode="max-autotune-no-cudagraphs", dynamic=False)
        with torch.inference_mode():
            compiled(x)
    return compiled


def training(batch: int, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A step in bf16 (autocast, SGD) with its peak memory: torchvision's network channels_last, through torch.compile, and ours;
    as users run it, where Python's time counts, and all of it as one CUDA graph."""
    for name in names:
        record: dict[str, Any] = {
            "name": name, "direction": "training step", "dtype": "bf16", "batch": batch, "precision": "high", "flops": 0,
            "ms": {}, "memory": {}, "missing": {},
        }  # fmt: skip
        x = _images(batch, 3, PIXELS, torch.float32)
        labels = torch.arange(batch, device=DEVICE) % 1000
        for competitor in ("torch channels_last", "torch.compile", OURS):
            model = _pair(name)[competitor == OURS].train()
            try:
                step = _step(model if competitor != "torch.compile" else torch.compile(model, dynamic=False), x, labels)
                for _ in range(3):
                    step()
                torch.cuda.reset_peak_memory_stats()
                record["ms"] |= milliseconds({competitor: step}, rounds=5)
                record["memory"][competitor] = torch.cuda.max_memory_allocated()
                record["ms"] |= milliseconds({competitor + GRAPH: graphed(step)}, rounds=5)
            except Exception as error:
                record["missing"][competitor] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
            del model
            torch.cuda.empty_cache()
        yield record


def _step(model: Any, x: torch.Tensor, labels: torch.Tensor) -> Call:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()

    return step


# suite -> (seconds it may take, its records); what is cheap and matters most comes first
SUITES: dict[str, tuple[float, Callable[[], Iterator[dict[str, Any]]]]] = {
    "layers-bf16-32": (60, lambda: layers("bf16", 32)),
    "fused-bf16-32": (60, lambda: layers("bf16", 32, fused=True)),
    "networks-bf16-32": (90, lambda: networks(32, NETWORKS, autotune=False)),
    "training-resnet50-128": (180, lambda: training(128, ("resnet50",))),
    "layers-bf16-256": (60, lambda: layers("bf16", 256)),
    "layers-tf32-32": (60, lambda: layers("f32", 32)),
    "layers-fp32-32": (60, lambda: layers("f32", 32, "fp32")),
    "layers-f16-32": (60, lambda: layers("f16", 32)),
    "layers-bf16-1": (60, lambda: layers("bf16", 1)),
    "max-autotune-resnet50-32": (150, lambda: networks(32, ("resnet50",), autotune=True)),
}


# ---- results ---------------------------------------------------------------------------------------------------------


def load(path: Path) -> dict[str, Any]:
    """A file of results; an empty one where there is none."""
    if not path.exists():
        return {"suites": {}}
    return json.loads(path.read_text(encoding="utf-8"))


def save(path: Path, suite: str, records: Sequence[Mapping[str, Any]], machine: Mapping[str, Any]) -> None:
    """Adds a suite to a file of results, in the place of what it measured before."""
    data = load(path)
    data["suites"][suite] = {"machine": dict(machine), "records": list(records)}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def ratio(record: Mapping[str, Any], graph: bool = True) -> float:
    """The best peer's time over the best of ours, among graphs or among eager calls; NaN where one side is missing."""
    times = {n: t for n, t in record["ms"].items() if n.endswith(GRAPH) == graph}
    ours = [t for n, t in times.items() if n.startswith(OURS)]
    peers = [t for n, t in times.items() if not n.startswith(OURS)]
    return min(peers) / min(ours) if ours and peers else math.nan


def geometric_mean(values: Sequence[float]) -> float:
    """Of those that aren't NaN."""
    found = [v for v in values if not math.isnan(v)]
    return math.exp(sum(map(math.log, found)) / len(found)) if found else math.nan


def _cells(suite: str, records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]], str]:
    names = list(dict.fromkeys(name for record in records for name in record["ms"]))
    memory = any(record.get("memory") for record in records)
    headings = ["what", "", *(f"{n}, ms" for n in names), "TFLOP/s", "× best, graphs", "× best, eager"]
    headings += ["memory, MiB"] if memory else []
    rows = []
    for record in records:
        ours = [t for n, t in record["ms"].items() if n.startswith(OURS)]
        rate = f"{record['flops'] / min(ours) / 1e9:.1f}" if record["flops"] and ours else ""
        row = [
            record["name"],
            record["direction"],
            *(f"{record['ms'][n]:.3f}" if n in record["ms"] else "-" for n in names),
        ]
        row += [rate, *(f"{v:.2f}" if not math.isnan(v) else "-" for v in (ratio(record), ratio(record, graph=False)))]
        row += [", ".join(f"{n} {m / 2**20:.0f}" for n, m in record["memory"].items())] if memory else []
        rows.append(row)
    means = [geometric_mean([ratio(r, graph) for r in records]) for graph in (True, False)]
    text = ", ".join(f"{what} {m:.2f}" for what, m in zip(("graphs", "eager"), means, strict=True) if not math.isnan(m))
    return headings, rows, f"Geometric mean of the best peer's time over ours: {text or 'none'}. Below 1 we are slower."


def report(path: Path) -> str:
    """Tables for the terminal; beside the file the same in Markdown, and plots where there is matplotlib."""
    data = load(path)
    parts, markdown = [], []
    for suite, found in data["suites"].items():
        headings, rows, caption = _cells(suite, found["records"])
        head = f"{suite}: {timing.describe(found['machine'])}"
        columns = [(h, "left" if i < 2 else "right") for i, h in enumerate(headings)]
        parts.append(_render.as_text(_render.table(head, columns, rows, caption)))
        markdown += [f"### {head}", "", f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
        markdown += [*(f"| {' | '.join(row)} |" for row in rows), "", caption]
        missing = sorted({f"{n}: {why}" for r in found["records"] for n, why in r["missing"].items()})
        markdown += [*(f"- not timed: {line}" for line in missing), ""]
        parts += [f"not timed: {line}" for line in missing]
    path.with_suffix(".md").write_text("\n".join(markdown) + "\n", encoding="utf-8")
    try:
        _plot(data, path.with_suffix(".png"))
    except ImportError as error:
        parts.append(f"no plot: {error}")
    return "\n\n".join(parts)


def _plot(data: Mapping[str, Any], path: Path) -> None:
    """A bar a record: how many times the best peer's speed, as graphs (eager where there are none)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    suites = {name: found["records"] for name, found in data["suites"].items() if found["records"]}
    if not suites:
        return
    heights = [0.6 + 0.16 * len(records) for records in suites.values()]
    figure, axes = pyplot.subplots(
        len(suites), 1, figsize=(9, sum(heights)), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for axis, (name, records) in zip(axes[:, 0], suites.items(), strict=True):
        values = [ratio(r) if not math.isnan(ratio(r)) else ratio(r, graph=False) for r in records]
        axis.barh([f"{r['name']} {r['direction']}" for r in records], [0 if math.isnan(v) else v for v in values])
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.tick_params(labelsize=6)
        axis.set_title(f"{name}: × the best peer's speed", fontsize=8, loc="left")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> int:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--suite", choices=list(SUITES))
    parser.add_argument("--output", type=Path, help="the file of results that the suite is added to")
    parser.add_argument("--report", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.list:
        print(json.dumps({name: seconds for name, (seconds, _) in SUITES.items()}))
        return 0
    if options.report:
        print(report(options.report))
        return 0
    if not options.suite or not options.output:
        parser.error("expected --list, --suite with --output, or --report")
    if not torch.cuda.is_available():
        print("no GPU that torch can use", file=sys.stderr)
        return 1
    torch.backends.cudnn.benchmark = True
    seconds, suite = SUITES[options.suite]
    machine, records, end = timing.machine(), [], time.monotonic() + 0.8 * seconds
    for record in suite():
        records.append(record)
        save(options.output, options.suite, records, machine)
        print(json.dumps(record), flush=True)
        if time.monotonic() > end:
            print("the time of this suite is over", flush=True)
            break
    return 0 if records else 1


if __name__ == "__main__":
    sys.exit(main())
