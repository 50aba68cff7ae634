"""cnnfast on real photographs and whole networks, beside PyTorch: what ``make demo`` runs.

1. Every network is converted with ``cnnfast.convert`` and classifies photographs; its logits are held against
   PyTorch's. EfficientNet-Lite0 has its published weights and must name what the photographs show. Others have random
   weights, unless torchvision's lie in torch's cache: nothing is downloaded.
2. Both sides are timed, interleaved.
3. ``cnnfast.explain`` says for one network what served each layer.

Writes demo.json, times.png, photographs.png and explain.png into ``--output``. Exits with 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

NETWORKS = ("efficientnet_lite0", "resnet50", "resnext50_32x4d", "googlenet", "vgg16")
EXPLAINED = "efficientnet_lite0"
TOP = 3


@dataclasses.dataclass(frozen=True)
class Photograph:
    """An image that ships in a package, and the ImageNet classes that would be right."""

    name: str
    source: str
    load: Callable[[], Any]  # -> (height, width[, 3]) uint8
    answers: tuple[str, ...]


def photographs() -> list[Photograph]:
    """The photographs; ImportError where a package is missing."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    return [
        Photograph("china", "scikit-learn", lambda: load_sample_image("china.jpg"), ("palace",)),
        Photograph("flower", "scikit-learn", lambda: load_sample_image("flower.jpg"), ("daisy",)),
        Photograph("chelsea", "scikit-image", data.chelsea, ("tiger cat", "Egyptian cat", "tabby")),
        Photograph("coffee", "scikit-image", data.coffee, ("espresso",)),
        Photograph("rocket", "scikit-image", data.rocket, ("missile",)),
        Photograph("camera", "scikit-image", data.camera, ("tripod",)),
    ]


def cropped(photograph: Photograph, size: int) -> Any:
    """The photograph as classifiers take it (a PIL image): short side 256/224 of the size, centre crop, RGB."""
    from PIL import Image

    image = Image.fromarray(photograph.load()).convert("RGB")
    scale = size * 256 / 224 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def batch(images: Sequence[Any], mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """PIL images of one size as a normalised (N, 3, size, size) tensor in channels_last."""
    import numpy

    pixels = torch.from_numpy(numpy.stack([numpy.asarray(image) for image in images])).permute(0, 3, 1, 2)
    return (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def classify(
    network: Any, converted: torch.nn.Module, photos: Sequence[Photograph], names: Sequence[str]
) -> tuple[list[dict[str, Any]], float, bool]:
    """What a converted network says of each photograph, and how far its logits are from PyTorch's.

    Returns:
        One dict a photograph with its ``top`` classes and probabilities; the largest deviation of a logit, relative to
        the largest logit; whether all top classes are PyTorch's.
    """
    x = batch([cropped(photo, network.size) for photo in photos], network.mean, network.std)
    with torch.inference_mode():
        theirs, ours = network.model(x.contiguous()), converted(x)
    deviation = float((ours - theirs).abs().max() / theirs.abs().max())
    values, indices = ours.softmax(1).topk(TOP)
    found = []
    for photo, row_values, row_indices in zip(photos, values.tolist(), indices.tolist(), strict=True):
        top = [{"class": names[i], "probability": v} for i, v in zip(row_indices, row_values, strict=True)]
        right = top[0]["class"] in photo.answers if network.trained else None
        found.append({"photograph": photo.name, "source": photo.source, "top": top, "right": right})
    same = bool((theirs.argmax(1) == ours.argmax(1)).all())
    return found, deviation, same


def table(title: str, headings: Sequence[str]) -> Any:
    """An empty rich table."""
    from rich import box
    from rich.table import Table

    made = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False
    )
    for i, heading in enumerate(headings):
        made.add_column(heading, no_wrap=i == 0, overflow="fold")
    return made


def predictions_table(found: Sequence[dict[str, Any]], title: str) -> Any:
    """A rich table of what one network sees."""
    places = ("first class", "second", "third")[:TOP]
    made = table(title, ("photograph", "from", *places, "first is"))
    for row in found:
        cells = [f"{entry['class']} {entry['probability'] * 100:.0f}\u00a0%" for entry in row["top"]]
        cells[0] = f"[bold]{cells[0]}[/bold]"
        mark = {True: "[green]right[/green]", False: "[red]wrong[/red]", None: ""}[row["right"]]
        made.add_row(row["photograph"], row["source"], *cells, mark)
    return made


def networks_table(results: Sequence[dict[str, Any]]) -> Any:
    """A rich table of how the networks were converted and how well they agree with PyTorch."""
    made = table(
        f"{len(results[0]['photographs'])} photographs through each network: the same logits as PyTorch's",
        ("network", "weights", "on cnnfast", "largest error of a logit", "same first class"),
    )
    for r in results:
        same = "[green]for all[/green]" if r["same_classes"] else "[red]no[/red]"
        converted = f"{r['converted']} of {r['layers']} layers"
        made.add_row(r["network"], r["weights"], converted, f"{r['deviation']:.1e} × largest", same)
    return made


def plot_photographs(photos: Sequence[Photograph], found: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Writes the photographs with the classes that a network gave them."""
    from cnnfast.report import plots

    columns = 3
    rows = -(-len(photos) // columns)
    figure = plots.figure(11, 1.0 + 4.3 * rows)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    grid = figure.subplots(rows, columns, squeeze=False)
    text = "Above each photograph the first class and its probability, below it the next ones, and where the photograph is from"
    figure.suptitle(f"{title}\n{text}", x=0.012, ha="left", fontsize=12)
    for axes in grid.flat:
        axes.axis("off")
    for axes, photo, row in zip(grid.flat, photos, found, strict=False):
        axes.imshow(cropped(photo, 448))
        first, *others = row["top"]
        heading = f"{first['class']}  {first['probability'] * 100:.0f} %"
        colour = "#a02020" if row["right"] is False else "black"
        axes.set_title(heading, fontsize=15, fontweight="bold", loc="left", color=colour)
        next_ones = ",  ".join(f"{other['class']} {other['probability'] * 100:.0f} %" for other in others)
        below = f"{next_ones}\n{photo.name}, from {photo.source}"
        axes.text(0, -0.02, below, transform=axes.transAxes, va="top", fontsize=10, color="#444444")
    figure.savefig(path, dpi=110)


def run(networks: Sequence[str], output: Path, rounds: int, budget_s: float, console: Any) -> list[str]:
    """The demo; returns what went wrong, in sentences."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    import cnnfast
    from cnnfast.report import bench, plots, tables, timing
    from cnnfast.report import networks as zoo

    output.mkdir(parents=True, exist_ok=True)
    machine, photos, names = timing.machine(), photographs(), zoo.categories()
    console.print(f"[bold]cnnfast {cnnfast.__version__}[/bold] on {timing.describe(machine)}\n")
    wrong: list[str] = []
    results: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    explanation = None
    begin = time.perf_counter()
    percentage = TextColumn("{task.percentage:>3.0f} %")
    bar = (TextColumn("{task.description}"), BarColumn(), percentage, TimeElapsedColumn())
    with Progress(*bar, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(networks) * 100)
        for i, name in enumerate(networks):

            def at(percent: float, text: str, i: int = i, name: str = name) -> None:
                progress.update(task, completed=i * 100 + percent, description=f"{name}: {text}")

            at(0, "loading")
            network = zoo.load(name)
            converted = cnnfast.convert(network.model)
            report = cnnfast.conversion_report(converted)
            at(10, "classifying photographs")
            found, deviation, same = classify(network, converted, photos, names)
            results.append({
                "network": name, "weights": network.weights, "converted": len(report.converted), "layers": len(report),
                "left": [[layer.name, layer.reason] for layer in report.left], "deviation": deviation,
                "same_classes": same, "photographs": found,
            })  # fmt: skip
            if not deviation <= bench.TOLERANCE or not same:
                wrong.append(f"{name}: logits are {deviation:.1e} from PyTorch's, same classes: {same}")
            wrong += [f"{name}: {f['photograph']} is no {f['top'][0]['class']}" for f in found if f["right"] is False]
            x = batch([cropped(photos[0], network.size)], network.mean, network.std)
            if name == (EXPLAINED if EXPLAINED in networks else networks[0]):
                at(15, "explaining")
                explanation = cnnfast.explain(converted, x.contiguous(memory_format=torch.channels_last))
                explanation.model = name
            at(20, "timing")
            records.append(bench.measure(
                name, network.model, x, rounds=rounds, budget_s=budget_s, weights=network.weights,
                progress=lambda done, total: at(20 + 80 * done / total, "timing"),
            ))  # fmt: skip
            wrong += [f"{name}: the output of {k} differs from PyTorch's" for k in records[-1]["wrong"]]
    seconds = time.perf_counter() - begin

    for i, result in enumerate(r for r in results if r["weights"] != zoo.RANDOM):
        title = f"{result['network']} ({result['weights']}), converted by cnnfast.convert"
        console.print(predictions_table(result["photographs"], title), "")
        path = output / ("photographs.png" if i == 0 else f"photographs-{result['network']}.png")
        plot_photographs(photos, result["photographs"], title, path)
    console.print(networks_table(results), "")
    if explanation is not None:
        console.print(f"[bold]cnnfast.explain: {explanation.model}, layer by layer[/bold]")
        console.print(explanation, "")
        explanation.plot(output / "explain.png")
    console.print(tables.results(records, machine, "One photograph through each network"), "")
    plots.times(records, machine, output / "times.png", "One photograph through each network, cnnfast beside PyTorch")
    (output / "demo.json").write_text(json.dumps({
        "machine": machine, "seconds": seconds, "wrong": wrong, "networks": results, "records": records,
        "explanation": None if explanation is None else explanation.to_dict(),
    }, indent=1) + "\n", encoding="utf-8")  # fmt: skip
    files = ", ".join(sorted(p.name for p in output.iterdir()))
    console.print(f"Took {seconds:.0f} s. In {output}: {files}")
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="cnnfast on real photographs and whole networks, beside PyTorch")
    parser.add_argument(
        "--networks",
        nargs="+",
        default=list(NETWORKS),
        metavar="NAME",
        help="torchvision's classifiers, or efficientnet_lite0; default: " + " ".join(NETWORKS),
    )
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for demo.json and the images")
    parser.add_argument("--rounds", type=int, default=15, help="timed runs of each network and side")
    parser.add_argument("--budget", type=float, default=12.0, help="seconds for the timing of one network, at most")
    options = parser.parse_args(arguments)
    from rich.console import Console

    console = Console(width=shutil.get_terminal_size((200, 50)).columns, highlight=False)
    try:
        wrong = run(options.networks, options.output, options.rounds, options.budget, console)
    except ImportError as error:
        print(f"the demo needs more packages: pip install 'cnnfast[demo]' ({error})", file=sys.stderr)
        return 1
    for sentence in wrong:
        console.print(f"[bold red]{sentence}[/bold red]")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
