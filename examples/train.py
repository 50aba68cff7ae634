"""Trains a network with cnnfast, and the same one with plain PyTorch from the same seed beside it.

    python examples/train.py                                          # scikit-learn's digits, a small ResNet: a minute
    python examples/train.py --network resnet50 --data FOLDER --with cnnfast --augment crop flip colour --bf16
    torchrun --nproc-per-node 2 examples/train.py --with cnnfast      # several processes, each a share of the batch
    python examples/train.py ... --resume                             # goes on where it was stopped, bit for bit

``--with`` names who trains, one after the other: ``cnnfast`` (cnnfast.models), ``torch`` (torchvision's network) and
``converted`` (torchvision's, through ``cnnfast.convert``). All start from the same weights and see the same images.

Every random number is a function of the seed, the step and the process: what a step draws doesn't depend on what was run
before it, so that a checkpoint needs no random states and a resumed run is the same as one that wasn't stopped.

Writes into ``--output``: <who>.pt (checkpoints: weights for ``cnnfast.models.create(..., weights=)``, optimizer, step),
metrics.json, and curves.png with the losses and the scores on the test images.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import Tensor

import cnnfast
from cnnfast import data, models

SMALL = "small_resnet"
WHO = ("cnnfast", "torch", "converted")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
AUXILIARY = 0.3  # the weight of an auxiliary head's loss (GoogLeNet's)


# ---- images ----------------------------------------------------------------------------------------------------------


class Tensors:
    """Images in memory: (N, C, H, W) from 0 to 1, labels (N,)."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]


class Folder:
    """Photographs in a folder a class, read when they are needed; short side 256/224 of the size, the middle of it."""

    def __init__(self, folder: Path, classes: Sequence[str], size: int) -> None:
        self.size = size
        self.files = [
            (path, i) for i, name in enumerate(classes) for path in sorted((folder / name).iterdir()) if path.is_file()
        ]
        self.pool = ThreadPoolExecutor(max_workers=os.cpu_count())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        chosen = [self.files[i] for i in indices.tolist()]
        images = self.pool.map(self._read, [path for path, _ in chosen])
        return torch.stack(list(images)), torch.tensor([label for _, label in chosen])

    def _read(self, path: Path) -> Tensor:
        import numpy
        from PIL import Image

        image = Image.open(path).convert("RGB")
        scale = self.size * 256 / 224 / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        cut = image.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(numpy.array(cut)).permute(2, 0, 1) / 255


@dataclasses.dataclass
class Data:
    """What there is to learn, with the mean and deviation of its channels."""

    train: Any
    test: Any
    classes: int
    mean: Tensor
    std: Tensor

    def normalised(self, images: Tensor) -> Tensor:
        """Images as a network gets them, in channels_last."""
        x = (images - self.mean[:, None, None]) / self.std[:, None, None]
        return x.contiguous(memory_format=torch.channels_last)


def digits(size: int) -> Data:
    """scikit-learn's 1797 handwritten digits of 8 x 8, three equal channels, every fifth one for testing."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 16
    labels = torch.from_numpy(found.target).long()
    if size != 8:
        images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    images = images.repeat(1, 3, 1, 1)
    test = torch.arange(len(labels)) % 5 == 4
    mean, std = images[~test].mean((0, 2, 3)), images[~test].std((0, 2, 3))
    return Data(Tensors(images[~test], labels[~test]), Tensors(images[test], labels[test]), 10, mean, std)


def load_data(name: str, size: int) -> Data:
    """``digits``, or a folder with the folders ``train`` and ``test`` (or ``val``), which have a folder a class."""
    if name == "digits":
        return digits(size)
    train, test = Path(name) / "train", Path(name) / "test"
    test = test if test.is_dir() else Path(name) / "val"
    if not train.is_dir() or not test.is_dir():
        raise ValueError(f"--data: expected 'digits' or a folder with train/ and test/ or val/, got {name!r}")
    classes = sorted(path.name for path in train.iterdir() if path.is_dir())
    missing = [name for name in classes if not (test / name).is_dir()]
    if missing:
        raise ValueError(f"--data: {test} has no folder {', '.join(missing)}")
    mean, std = (torch.tensor(values) for values in IMAGENET)
    return Data(Folder(train, classes, size), Folder(test, classes, size), len(classes), mean, std)


def augmentation(names: Sequence[str], size: int) -> torch.nn.Sequential:
    """Transforms by name, for images of a size: an eighth of it is what crops and translations may move."""
    by = max(1, size // 8)
    made: dict[str, Callable[[], torch.nn.Module]] = {
        "crop": lambda: data.RandomCrop(size, padding=by), "translate": lambda: data.RandomTranslation(by),
        "flip": data.RandomFlip, "colour": data.ColourNoise,
    }  # fmt: skip
    return torch.nn.Sequential(*(made[name]() for name in names))


# ---- networks and losses ---------------------------------------------------------------------------------------------


def build(name: str, who: str, outputs: int, dropout: float, seed: int) -> torch.nn.Module:
    """A network of ours, torchvision's, or torchvision's converted, with the weights that the seed gives all three."""
    torch.manual_seed(seed)
    ours = who == "cnnfast"
    if not ours:
        try:
            from torchvision import models as theirs
        except ImportError as error:
            raise ImportError(f"--with {who} needs torchvision: pip install torchvision") from error
    with_fc = name == SMALL or name.startswith(("resnet", "resnext", "wide_resnet"))
    options: dict[str, Any] = {"num_classes": outputs}
    if not with_fc:
        options["dropout"] = dropout
    if name == SMALL:
        nn: Any = cnnfast if ours else torch.nn
        model: Any = small_resnet(models if ours else theirs.resnet, nn.Conv2d, outputs)
    elif ours or not hasattr(theirs, name):
        model = models.create(name, **options)
        model = model if ours else cnnfast.revert(model)
    else:
        heads = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}  # else torchvision warns
        model = theirs.get_model(name, **options, **heads)
    if with_fc and dropout:
        model.fc.register_forward_pre_hook(lambda module, args: (F.dropout(args[0], dropout, module.training),))
    return cnnfast.convert(model) if who == "converted" else model


def small_resnet(family: Any, conv: Any, outputs: int) -> torch.nn.Module:
    """A ResNet of one block a stage for the smallest images: its first convolution is 3x3, and nothing is pooled."""
    model = family.ResNet(family.BasicBlock, [1, 1, 1, 1], num_classes=outputs)
    model.conv1 = conv(3, 64, 3, padding=1, bias=False)
    torch.nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = torch.nn.Identity()
    return model


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "hinge": F.multi_margin_loss,
    "mse": lambda out, labels: F.mse_loss(out[:, 0], labels.to(out.dtype)),
    "l1": lambda out, labels: F.l1_loss(out[:, 0], labels.to(out.dtype)),
}
REGRESSION = ("mse", "l1")  # one output, which is to be the label's number


def total_loss(loss: str, outputs: Any, labels: Tensor) -> Tensor:
    """Of a batch's outputs, with those of auxiliary heads, which are tuples."""
    main, *heads = outputs if isinstance(outputs, tuple) else (outputs,)
    function = LOSSES[loss]
    return function(main.float(), labels) + AUXILIARY * sum(
        (function(head.float(), labels) for head in heads if head is not None), torch.zeros((), device=main.device)
    )


def learning_rate(options: argparse.Namespace, step: int, steps: int, an_epoch: int) -> float:
    """At a step: linearly up over the warm-up, then by the schedule."""
    warmup = options.warmup * an_epoch
    if step < warmup:
        return options.rate * (step + 1) / warmup
    if options.schedule == "cosine":
        return options.rate * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2
    if options.schedule == "step":  # a tenth after each third
        return options.rate * 0.1 ** (3 * step // max(1, steps))
    return options.rate


# ---- training --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Process:
    """This process among those that train together."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether it is the one that evaluates, prints and writes."""
        return self.rank == 0


@dataclasses.dataclass
class Run:
    """What became of a training so far: the loss of every step; score and step after every epoch."""

    who: str
    score: str  # "accuracy" | "mean absolute error"
    losses: list[float] = dataclasses.field(default_factory=list)
    scores: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


# What must be as it was for a checkpoint to go on from; the rest may change.
FIXED = (
    "network", "data", "size", "loss", "epochs", "batch", "rate", "momentum", "weight_decay", "schedule", "warmup",
    "dropout", "augment", "bf16", "seed",
)  # fmt: skip


def evaluate(model: torch.nn.Module, found: Data, options: argparse.Namespace, device: torch.device) -> float:
    """The share of test images that are told right; with a regression the mean absolute error."""
    model.eval()
    total = 0.0
    with torch.inference_mode():
        for indices in torch.arange(len(found.test)).split(256):
            images, labels = found.test[indices]
            out = model(found.normalised(images).to(device)).float().cpu()
            wrong = (out[:, 0] - labels).abs() if options.loss in REGRESSION else (out.argmax(1) == labels)
            total += float(wrong.sum())
    model.train()
    return total / len(found.test)


def train(
    options: argparse.Namespace, who: str, found: Data, process: Process,
    report: Callable[[Run, int, int], None] = lambda run, step, steps: None,
) -> Run:  # fmt: skip
    """Trains one network, from its checkpoint where there is one and ``--resume`` was given.

    Args:
        options: The command line's.
        who: One of :data:`WHO`.
        found: The images.
        process: This process.
        report: Told after every step.
    """
    regression = options.loss in REGRESSION
    model = build(options.network, who, 1 if regression else found.classes, options.dropout, options.seed)
    model = model.to(process.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), options.rate, momentum=options.momentum, weight_decay=options.weight_decay,
        nesterov=options.momentum > 0,
    )  # fmt: skip
    run = Run(who, "mean absolute error" if regression else "accuracy")
    path, begin = options.output / f"{who}.pt", 0
    if options.resume and path.exists():
        begin, run = restore(path, options, model, optimizer)
    trained: Any = model
    if process.count > 1:
        ids = [process.device.index] if process.device.type == "cuda" else None
        trained = torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)
    augment = augmentation(options.augment, options.size)
    an_epoch = len(found.train) // options.batch
    steps = options.epochs * an_epoch
    end = min(steps, options.stop_after) if options.stop_after else steps
    since = time.perf_counter() - run.seconds
    for step in range(begin, end):
        epoch, within = divmod(step, an_epoch)
        order = torch.randperm(
            len(found.train), generator=torch.Generator().manual_seed(options.seed * 100_003 + epoch)
        )
        indices = order[within * options.batch : (within + 1) * options.batch][process.rank :: process.count]
        torch.manual_seed((options.seed * 1_000_003 + step) * process.count + process.rank)
        images, labels = found.train[indices]
        x, labels = found.normalised(augment(images)).to(process.device), labels.to(process.device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, step, steps, an_epoch)
        with torch.autocast(process.device.type, torch.bfloat16, enabled=options.bf16):
            outputs = trained(x)
        loss = total_loss(options.loss, outputs, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        value = loss.detach()
        if process.count > 1:
            distributed.all_reduce(value)
        run.losses.append(float(value) / process.count)
        if not math.isfinite(run.losses[-1]):
            raise ValueError(f"{who}: the loss is {run.losses[-1]} at step {step + 1}; a lower --rate may help")
        if process.first and (within + 1 == an_epoch or step + 1 == end):
            run.seconds = time.perf_counter() - since
            if within + 1 == an_epoch:
                run.scores.append((step + 1, evaluate(model, found, options, process.device)))
            save(path, options, step + 1, run, model, optimizer)
            since = time.perf_counter() - run.seconds  # testing and writing aren't training
        report(run, step + 1, steps)
    return run


def save(path: Path, options: argparse.Namespace, step: int, run: Run, model: Any, optimizer: Any) -> None:
    """Writes a checkpoint; one that was there stays whole until the new one is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "run": dataclasses.asdict(run),
        "options": {key: getattr(options, key) for key in FIXED},
    }  # fmt: skip
    torch.save(content, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def restore(path: Path, options: argparse.Namespace, model: Any, optimizer: Any) -> tuple[int, Run]:
    """Loads a checkpoint; returns the steps that were made, and what came of them."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    for key, value in content["options"].items():
        if getattr(options, key) != value:
            raise ValueError(f"{path} was trained with {key} {value}, not {getattr(options, key)}: it can't go on so")
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    return content["step"], Run(**content["run"])


# ---- showing ---------------------------------------------------------------------------------------------------------


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Means over the ``window`` values up to each."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window) for i in range(len(values))]


def epochs(run: Run, an_epoch: int) -> list[float]:
    """The mean loss of every epoch."""
    return [
        sum(part) / len(part) for i in range(0, len(run.losses), an_epoch) if (part := run.losses[i : i + an_epoch])
    ]


def plot(runs: Sequence[Run], an_epoch: int, title: str, path: Path) -> None:
    """Writes the losses and the scores over the steps, a colour a run."""
    from cnnfast.report import plots

    figure = plots.figure(11, 4.6)
    left, right = figure.subplots(1, 2)
    styles = {"cnnfast": ("#2a78b5", "-"), "torch": ("#e0812b", "--"), "converted": ("#3f9b52", ":")}
    for run in runs:
        colour, line = styles[run.who]
        label = {"torch": "plain PyTorch", "converted": "torchvision's network, converted"}.get(run.who, run.who)
        steps = range(1, len(run.losses) + 1)
        left.plot(steps, run.losses, color=colour, linewidth=0.5, alpha=0.25)
        left.plot(steps, smoothed(run.losses, max(2, an_epoch // 2)), color=colour, linestyle=line, label=label)
        at, scores = [step for step, _ in run.scores], [score for _, score in run.scores]
        right.plot(at, scores, color=colour, linestyle=line, marker="o", markersize=3)
    left.set(title="training loss (thin: of each step)", xlabel="step", yscale="log")
    right.set(title=f"{runs[0].score} on the test images", xlabel="step")
    for axes in (left, right):
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.012, ha="left", fontsize=10)
    figure.legend(loc="outside lower center", ncols=len(runs), frameon=False)
    figure.savefig(path, dpi=120)


def table(runs: Sequence[Run], an_epoch: int, images: int) -> Any:
    """A rich table of what came of each run."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("trained with", "steps", "last epoch's loss", f"{runs[0].score}, last", "best", "images/s"):
        made.add_column(heading, justify="left" if heading == "trained with" else "right")
    accuracy = runs[0].score == "accuracy"
    best: Callable[[Sequence[float]], float] = max if accuracy else min

    def form(score: float) -> str:
        return f"{score * 100:.2f} %" if accuracy else f"{score:.3f}"

    for run in runs:
        scores = [score for _, score in run.scores]
        speed = len(run.losses) * images / run.seconds if run.seconds else 0.0
        made.add_row(
            run.who, str(len(run.losses)), f"{epochs(run, an_epoch)[-1]:.4f}", form(scores[-1]) if scores else "",
            form(best(scores)) if scores else "", f"{speed:.0f}",
        )  # fmt: skip
    return made


def apart(runs: Sequence[Run], an_epoch: int) -> float:
    """The largest distance of two runs' epoch losses, relative to the first epoch's."""
    curves = [epochs(run, an_epoch) for run in runs]
    return max(max(values) - min(values) for values in zip(*curves, strict=True)) / curves[0][0]


# ---- the command -----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description="Trains a network with cnnfast, and with plain PyTorch beside it.")
    add = made.add_argument
    add("--network", default=SMALL, help=f"{SMALL} (default), or one of: {' '.join(models.list())}")
    add("--with", dest="who", nargs="+", choices=WHO, default=["cnnfast", "torch"], help="default: cnnfast torch")
    add(
        "--data",
        default="digits",
        metavar="FOLDER",
        help="with train/ and test/ or val/; default: scikit-learn's digits",
    )
    add("--size", type=int, metavar="PIXELS", help=f"of the images; default: 8 for {SMALL}, else the network's own")
    add("--loss", choices=list(LOSSES), default="cross_entropy", help="mse and l1: a regression of the label's number")
    add("--epochs", type=int, default=15)
    add("--batch", type=int, default=64, help="images a step, of all processes together")
    add("--rate", type=float, default=0.05, help="the highest learning rate")
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=5e-4)
    add("--schedule", choices=("cosine", "step", "constant"), default="cosine")
    add("--warmup", type=int, default=1, metavar="EPOCHS", help="in which the rate rises from 0")
    add("--dropout", type=float, default=0.0, help="probability, before fully connected layers")
    add("--augment", nargs="*", choices=("crop", "translate", "flip", "colour"), default=["translate"])
    add("--bf16", action="store_true", help="autocast to bfloat16")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("train"), help="folder for checkpoints, metrics.json and curves.png")
    add("--resume", action="store_true", help="go on from the checkpoints in --output")
    add("--stop-after", type=int, metavar="STEPS", help="stop there, with a checkpoint")
    return made


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ValueError where they don't go together."""
    options = parser().parse_args(arguments)
    if options.network != SMALL and options.network not in models.list():
        raise ValueError(f"--network: expected {SMALL} or one of {', '.join(models.list())}, got {options.network!r}")
    if options.size is None:
        options.size = 8 if options.network == SMALL else models.describe(options.network).input[-1]
    for name in ("epochs", "batch", "size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name}: expected a number above 0, got {getattr(options, name)}")
    return options


def run(options: argparse.Namespace, process: Process, console: Any) -> list[Run]:
    """Trains with each of ``--with``, and writes and shows what came of it."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from cnnfast.report import timing

    found = load_data(options.data, options.size)
    an_epoch = len(found.train) // options.batch
    if an_epoch < 1:
        raise ValueError(f"--batch {options.batch} is more than the {len(found.train)} images to train with")
    if options.batch % process.count:
        raise ValueError(f"--batch {options.batch} can't be shared by {process.count} processes")
    bar = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    runs = []
    with Progress(*bar, console=console, transient=True, disable=not process.first) as progress:
        for who in options.who:
            task = progress.add_task(who)

            def report(made: Run, step: int, steps: int, task: Any = task, who: str = who) -> None:
                score = f", {made.score} {made.scores[-1][1]:.4f}" if made.scores else ""
                text = f"{who}: epoch {-(-step // an_epoch)}, loss {made.losses[-1]:.4f}{score}"
                progress.update(task, completed=step, total=steps, description=text)

            runs.append(train(options, who, found, process, report))
    if not process.first or not all(made.losses for made in runs):
        return runs
    machine = timing.machine()
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "metrics.json").write_text(json.dumps({
        "machine": machine, "options": {key: getattr(options, key) for key in FIXED}, "processes": process.count,
        "steps_an_epoch": an_epoch, "runs": [dataclasses.asdict(made) for made in runs],
    }, indent=1) + "\n", encoding="utf-8")  # fmt: skip
    title = f"{options.network} on {options.data}, batch {options.batch}, {options.loss}"
    console.print(f"[bold]{title}[/bold] on {timing.describe(machine)}\n")
    console.print(table(runs, an_epoch, options.batch), "")
    if len(runs) > 1:
        distance = apart(runs, an_epoch)
        console.print(f"The epochs' losses are at most {distance * 100:.1f} % of the first epoch's loss apart.")
    try:
        plot(runs, an_epoch, f"{title}\n{timing.describe(machine)}", options.output / "curves.png")
    except ImportError as error:
        console.print(f"no plot: {error}")
    console.print(f"In {options.output}: {', '.join(sorted(p.name for p in options.output.iterdir()))}")
    return runs


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    from rich.console import Console

    rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    console = Console(width=shutil.get_terminal_size((200, 50)).columns, highlight=False)
    try:
        options = parse(arguments)
        if count > 1:
            distributed.init_process_group("nccl" if cuda else "gloo")
        run(options, Process(rank, count, device), console)
    except (ValueError, ImportError, OSError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
