"""The command line: ``python -m cnnfast info | explain | describe | bench | tune``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import cnnfast
from cnnfast import _render, dispatch, tuning
from cnnfast.explain import GPUS, machine_limits
from cnnfast.report import bench, networks, plots, tables, timing, tune

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NETWORKS = ("resnet18", "resnet50", "resnext50_32x4d", "googlenet", "vgg16", networks.LITE0)
# Environment variables that cnnfast, or what it stands on, reads.
VARIABLES = (
    "CNNFAST_CPU_ISA", "CNNFAST_TUNING", "CNNFAST_EMULATE_CUDA", "CNNFAST_EMULATION_DIR", "TRITON_INTERPRET", "TRITON_CACHE_DIR",
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "KMP_AFFINITY", "ONEDNN_MAX_CPU_ISA", "CUDA_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING", "NVIDIA_TF32_OVERRIDE", "TORCH_HOME", "XDG_CACHE_HOME",
)  # fmt: skip


# ---- info ------------------------------------------------------------------------------------------------------------


def info() -> dict[str, Any]:
    """What cnnfast finds on this machine, as a dict: :func:`cnnfast.report.timing.machine`, and more.

    ``triton`` (version or None), ``package`` (folder), ``caches`` (what is kept to its folder, and whether that is there
    and could be written), ``tuning`` (its folder, and how many problems are kept there), ``implementations`` (how many each
    backend has, by operation), ``environment`` (of the variables that matter, those that are set). Writes nothing.
    """
    import importlib.metadata

    try:
        triton: str | None = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    counts: dict[str, dict[str, int]] = {}
    for implementation in dispatch.implementations():
        of = counts.setdefault(implementation.backend, {})
        of[implementation.op] = of.get(implementation.op, 0) + 1
    return {
        **timing.machine(),
        "triton": triton,
        "package": str(Path(cnnfast.__file__).parent),
        "caches": {what: _cache(path) for what, path in _caches().items()},
        "tuning": tuning.summary(),
        "implementations": counts,
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _caches() -> dict[str, Path]:
    """The folders outside of the package that something is kept in."""
    import platformdirs

    triton = os.environ.get("TRITON_CACHE_DIR")
    return {
        "cnnfast": Path(platformdirs.user_cache_dir("cnnfast")),
        "Triton's kernels": Path(triton) if triton else Path.home() / ".triton" / "cache",
        "torch's weights": Path(torch.hub.get_dir()) / "checkpoints",
    }


def _cache(path: Path) -> dict[str, Any]:
    """Whether a folder is there, and whether it can be written, or made: asked, not tried."""
    existing = next((p for p in (path, *path.parents) if p.exists()), path)
    return {"path": str(path), "exists": path.is_dir(), "writable": os.access(existing, os.W_OK)}


def _info(options: argparse.Namespace) -> int:
    found = info()
    if options.json:
        _write(options.json, found)
    gpu = found["gpu"]
    versions = {**{k: found[k] for k in ("cnnfast", "torch", "python")}, "triton": found["triton"] or "not installed"}
    rows = [
        ("versions", ", ".join(f"{k} {v}" for k, v in versions.items())),
        ("CPU", f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads in use"),
        ("instruction sets", ", ".join(found["isa"]) or "none of those that matter"),
        ("GPU", f"{gpu['name']}, compute capability {gpu['capability']}" if gpu else "none that torch can use"),
        *((f"backend {name}", _backend(found, name, status)) for name, status in found["backends"].items()),
        ("package", found["package"]),
        *((f"cache: {what}", _state(cache)) for what, cache in found["caches"].items()),
        ("tuning", _tuned(found["tuning"])),
        *(("environment", f"{name}={value}") for name, value in found["environment"].items()),
    ]
    print(_render.as_text(_render.table("", [("", "left"), ("", "left")], rows), markup=False))
    return 0


def _backend(found: dict[str, Any], name: str, status: str) -> str:
    counts = [f"{op} {n}" for op, n in found["implementations"].get(name, {}).items()]
    return f"{status}; kernels: {', '.join(counts)}" if counts else status


def _state(cache: dict[str, Any]) -> str:
    state = "in use" if cache["exists"] else "not made yet"
    return f"{cache['path']} ({state}{'' if cache['writable'] else ', not writable: nothing is kept'})"


def _tuned(found: dict[str, Any]) -> str:
    outdated = f", {found['outdated']} for other versions" if found["outdated"] else ""
    return f"{found['path']} ({found['entries']} problems{outdated})"


# ---- explain ---------------------------------------------------------------------------------------------------------


def _explain(options: argparse.Namespace) -> int:
    network = networks.load(options.network)
    dtype = DTYPES[options.dtype]
    x = _images(options.batch, options.size or network.size, dtype)
    model = network.model.to(dtype)
    if options.fused:
        model = cnnfast.fuse(model)
    elif not options.torch:
        model = cnnfast.convert(model, inplace=True)
    if options.measure and not options.device:
        machine_limits(dispatch.DTYPES[dtype], torch.get_num_threads(), again=True)
    with _running(network.name, x):
        explanation = cnnfast.explain(model, x, runs=options.runs, device=options.device)
    explanation.model = network.name + " fused" * options.fused
    print(explanation)
    if options.json:
        explanation.to_json(options.json)
    if options.plot:
        explanation.plot(options.plot)
    return 0


@contextlib.contextmanager
def _running(name: str, x: torch.Tensor) -> Iterator[None]:
    """What torch says of images that a network can't take (too small, mostly) becomes a ValueError that names them."""
    try:
        yield
    except NotImplementedError:
        raise
    except RuntimeError as error:
        images = f"{'x'.join(map(str, x.shape))} {str(x.dtype).removeprefix('torch.')}"
        raise ValueError(f"{name} on {images}: {str(error).splitlines()[0]}") from error


def _images(batch: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, size, size, generator=generator)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


# ---- describe --------------------------------------------------------------------------------------------------------


def _describe(options: argparse.Namespace) -> int:
    description = cnnfast.models.describe(options.network, options.size, options.batch)
    print(description)
    if options.json:
        description.to_json(options.json)
    return 0


# ---- bench -----------------------------------------------------------------------------------------------------------


def workload(name: str, batch: int, dtype: torch.dtype, size: int | None = None) -> tuple[Any, torch.Tensor, str]:
    """A model and its input, by name.

    Args:
        name: A network, or one layer of it by its module name: ``resnet50.layer1.0.conv2``, with the input that it has
            there.
        batch, dtype, size: Of the network's input, (batch, 3, size, size); None is the network's own size.

    Returns:
        (module in fp32, its input in ``dtype``, label of the weights).

    Raises:
        ValueError: no such network or layer.
    """
    head, _, layer = name.partition(".")
    network = networks.load(head)
    x = _images(batch, size or network.size, torch.float32)
    if not layer:
        return network.model, x.to(dtype), network.weights
    try:
        module = network.model.get_submodule(layer)
    except AttributeError as error:
        known = ", ".join(n for n, m in network.model.named_modules() if isinstance(m, torch.nn.Conv2d))
        raise ValueError(f"{head} has no layer {layer!r}; its convolutions: {known}") from error
    seen: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(), handle, _running(head, x):
        network.model(x)
    if not seen:
        raise ValueError(f"{name} isn't called in {head}'s forward")
    return module, seen[0].detach().clone().to(dtype), network.weights


def _bench(options: argparse.Namespace) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    machine, dtype = timing.machine(), DTYPES[options.dtype]
    records: list[dict[str, Any]] = []
    with _progress() as report:
        for i, name in enumerate(options.workloads):
            report(name, i, len(options.workloads))
            model, x, weights = workload(name, options.batch, dtype, options.size)

            def step(done: int, total: int, name: str = name, i: int = i) -> None:
                report(name, i + done / total, len(options.workloads))

            with _running(name, x):
                records.append(bench.measure(
                    name, model, x, rounds=options.rounds, budget_s=options.budget, progress=step,
                    peers=options.peers, train=options.train, weights=weights,
                    **({"pass": "training step"} if options.train else {}),
                ))  # fmt: skip
    print(_render.as_text(tables.results(records, machine)))
    for record in records:
        for peer, reason in record["missing"].items():
            print(f"{record['workload']}: without {peer}: {reason}", file=sys.stderr)
    if options.output:
        folder = Path(options.output)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "bench.json", {"machine": machine, "records": records})
        (folder / "bench.md").write_text(tables.markdown(records, machine), encoding="utf-8")
        try:
            plots.times(records, machine, folder / "bench.png")
        except ImportError as error:
            print(f"no plot: {error}", file=sys.stderr)
        print(f"In {folder}: {', '.join(sorted(p.name for p in folder.glob('bench.*')))}")
    wrong = [f"{r['workload']}: {', '.join(r['wrong'])}" for r in records if r["wrong"]]
    for sentence in wrong:
        print(f"wrong output: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


# ---- tune ------------------------------------------------------------------------------------------------------------


def _tune(options: argparse.Namespace) -> int:
    interpreted = os.environ.get("TRITON_INTERPRET", "") not in ("", "0")  # for tests: tiles are chosen, not timed
    if not torch.cuda.is_available() and not interpreted:
        raise ValueError("tune measures on an NVIDIA GPU, and torch can use none here")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, x, _ = workload(options.network, options.batch, DTYPES[options.dtype], options.size)
    model = cnnfast.convert(model.to(device=device, dtype=x.dtype), inplace=True)
    x = x.to(device)
    with _running(options.network, x):
        found = [tune.collect(model, x, options.direction)]
        if options.direction != "backward" and options.network in cnnfast.models.list():  # of ours: with epilogues
            own = cnnfast.models.create(options.network).to(device=device, dtype=x.dtype)
            found.append(tune.collect(own, x, "forward"))
    tasks = tune.merged(found)
    if not tasks:
        raise ValueError(f"{options.network}: no call of it has a choice of tiles")
    results: list[tune.Result] = []
    interrupted = False
    with _progress() as report:
        try:
            for result in tune.tune(
                tasks,
                options.seconds,
                measure=tune.device_seconds,
                progress=lambda text, share: report(text, share, 1.0),
            ):
                results.append(result)
        except KeyboardInterrupt:
            interrupted = True
    print(tune.table(results, f"{options.network}, {options.dtype}, {options.batch} images, {tasks[0][0].card}"))
    rest = len(tasks) - len(results)
    if rest:
        why = "interrupted" if interrupted else f"the {options.seconds:g} seconds are over"
        print(
            f"{rest} of {len(tasks)} problems are left: {why}; what was found is kept. Go on: the same command again."
        )
    for result in results:
        for reason in result.failed:
            print(f"{result.label}: left out {reason}", file=sys.stderr)
    print(f"Kept in {tuning.file(tasks[0][0].card)}")
    return 130 if interrupted else 0


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, float, float], None]]:
    """A progress bar on the error stream, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=1.0)
        yield lambda text, done, total: progress.update(task, description=text, completed=done, total=total)


def _write(path: str | Path, data: Any) -> None:
    Path(path).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


# ---- the parser ------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("cnnfast", description="Convolution kernels for PyTorch.")
    parser.add_argument("--version", action="version", version=f"cnnfast {cnnfast.__version__}")
    commands = parser.add_subparsers(required=True, metavar="info | explain | describe | bench | tune")

    def add(name: str, run: Callable[[argparse.Namespace], int], what: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
        command.set_defaults(run=run)
        return command

    def images(command: argparse.ArgumentParser) -> None:
        command.add_argument("--batch", type=_positive, default=1, metavar="N",
                             help="images at once; default: %(default)s")  # fmt: skip
        command.add_argument("--size", type=_positive, metavar="PIXELS",
                             help="height and width of the images; default: the network's own")  # fmt: skip

    def common(command: argparse.ArgumentParser) -> None:
        images(command)
        command.add_argument(
            "--dtype", choices=list(DTYPES), default="fp32", help="of weights and images; default: %(default)s"
        )

    command = add("info", _info, "what cnnfast finds on this machine")
    command.add_argument("--json", metavar="PATH", help="also write it as JSON")

    command = add(
        "explain", _explain, "which kernel serves each layer of a network, why the others don't, and how fast"
    )
    command.add_argument("network", help=networks.EXPECTED)
    common(command)
    command.add_argument("--runs", type=_positive, default=5, metavar="N", help="timed runs; default: 5")
    how = command.add_mutually_exclusive_group()
    how.add_argument("--torch", action="store_true", help="the network as it is, not converted")
    how.add_argument("--fused", action="store_true", help="the network as cnnfast.fuse makes it, kernel by kernel")
    command.add_argument("--device", metavar="GPU",
                         help=f"what is predicted for a card, without one: {', '.join(GPUS)}")  # fmt: skip
    command.add_argument("--measure", action="store_true",
                         help="measure this machine's limits once more: it was busy when that was done")  # fmt: skip
    command.add_argument("--json", metavar="PATH", help="also write it as JSON, with every reason")
    command.add_argument("--plot", metavar="PATH", help="also plot the time of each layer; the ending says the format")

    command = add(
        "describe",
        _describe,
        "the layers of a network: output sizes, parameters, FLOPs, receptive fields; runs nothing",
    )
    command.add_argument("network", help="one of " + ", ".join(cnnfast.models.list()))
    images(command)
    command.add_argument("--json", metavar="PATH", help="also write it as JSON")

    command = add("bench", _bench, "networks and layers on cnnfast against torch, interleaved; results checked first")
    command.add_argument("workloads", nargs="*", default=list(NETWORKS), metavar="network[.layer]",
                         help="as resnet50, or resnet50.layer1.0.conv2; default: " + " ".join(NETWORKS))  # fmt: skip
    common(command)
    command.add_argument("--threads", type=_positive, metavar="N", help="default: torch's")
    command.add_argument("--peers", action="store_true",
                         help="also torch.compile with freezing, OpenVINO and ONNX Runtime, where installed")  # fmt: skip
    command.add_argument("--train", action="store_true", help="training steps instead of forward passes")
    command.add_argument("--rounds", type=_positive, default=15, metavar="N",
                         help="samples of each competitor; default: 15")  # fmt: skip
    command.add_argument("--budget", type=_seconds, default=20.0, metavar="SECONDS",
                         help="for each workload, at most; default: 20")  # fmt: skip
    command.add_argument("--output", metavar="DIR", help="write bench.json, bench.md and bench.png there")

    command = add("tune", _tune, "measures the tiles of a network's Triton kernels on this GPU, and keeps the fastest")
    command.add_argument("network", metavar="network[.layer]", help="as resnet50, or resnet50.layer1.0.conv2")
    common(command)
    command.set_defaults(batch=32, dtype="bf16")
    command.add_argument("--direction", choices=list(tune.DIRECTIONS), default="both", help="default: both")
    command.add_argument("--seconds", type=_seconds, default=60.0, metavar="S", help="in all, at most; default: 60")
    return parser


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status: 0, or 1 after one sentence about what is wrong.

    Arguments that can't be parsed end the process with status 2, as argparse has it.
    """
    options = _parser().parse_args(arguments)
    try:
        status = int(options.run(options))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, ImportError, OSError, NotImplementedError) as error:
        print(f"cnnfast: {error}", file=sys.stderr)
        return 1
