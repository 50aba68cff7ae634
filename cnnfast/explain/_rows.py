"""What :func:`cnnfast.explain` returns: a row for each call, and the whole as table, JSON and picture."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from cnnfast import _render, dispatch
from cnnfast.explain._devices import Gpu

TORCH = "torch"  # the kernel named for what goes past cnnfast


@dataclasses.dataclass(frozen=True)
class Row:
    """One call of an operation. ``rejected`` holds (implementation, reasons) of what could not serve it.

    ``peak`` and ``bandwidth`` are what the machine can do at most, in FLOP/s of the unit that the kernel may use and bytes/s.
    """

    layer: str
    op: str
    direction: str
    problem: str
    dtype: str
    kernel: str
    seconds: float
    flops: int = 0
    bytes: int = 0
    rejected: tuple[tuple[str, tuple[str, ...]], ...] = ()
    peak: float | None = None
    bandwidth: float | None = None
    unit: str = "arithmetic"  # what the peak is of
    receptive_field: tuple[int, int] | None = None  # of an element of the result, in pixels of the image

    @property
    def ours(self) -> bool:
        """Whether a kernel of cnnfast's served it."""
        return self.kernel != TORCH and not self.kernel.startswith("aten.")

    @property
    def flops_per_s(self) -> float:
        """FLOP/s, FLOPs counted as the direct algorithm's: 0 where they aren't known."""
        return self.flops / self.seconds if self.seconds else 0.0

    @property
    def limit_s(self) -> float | None:
        """The least time that the machine needs for the FLOPs and the bytes; None where it isn't known."""
        if not self.peak or not self.bandwidth or not (self.flops or self.bytes):
            return None
        return max(self.flops / self.peak, self.bytes / self.bandwidth)

    @property
    def bound(self) -> str:
        """What the limit is of: ``"memory"``, or the unit that multiplies; empty where there is none."""
        if not self.peak or not self.limit_s:
            return ""
        return self.unit if self.limit_s == self.flops / self.peak else "memory"

    @property
    def of_limit(self) -> float | None:
        """The limit's time over the measured one; above 1 where an algorithm saves multiplications."""
        return self.limit_s / self.seconds if self.limit_s and self.seconds else None

    @property
    def reasons(self) -> str:
        """Why the others didn't serve, as one text."""
        return "; ".join(dispatch.reason_lines(self.rejected))


class Explanation(Sequence[Row]):
    """What :func:`explain` found: a sequence of :class:`Row`, in order of the calls; printable."""

    def __init__(
        self,
        model: str,
        rows: Sequence[Row],
        seconds: float,
        threads: int,
        note: str = "",
        runs: int = 1,
        gpu: Gpu | None = None,
    ) -> None:
        self.model, self.seconds, self.threads, self.note, self.runs = model, seconds, threads, note, runs
        self.gpu = gpu  # the card that everything is predicted for; None: measured on this machine
        self._rows = tuple(rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def unserved(self) -> list[Row]:
        """The calls that no kernel of cnnfast's served."""
        return [row for row in self if not row.ours]

    def kernels(self) -> dict[str, tuple[int, float]]:
        """For each kernel the number of calls and the seconds in all, most seconds first."""
        totals: dict[str, tuple[int, float]] = {}
        for row in self:
            calls, seconds = totals.get(row.kernel, (0, 0.0))
            totals[row.kernel] = (calls + 1, seconds + row.seconds)
        return dict(sorted(totals.items(), key=lambda item: -item[1][1]))

    def headline(self) -> str:
        """What was explained, and its time."""
        if self.gpu is not None:
            return f"{self.model} on {self.gpu.name}, predicted: at least {self.seconds * 1e6:.0f} µs"
        return f"{self.model}: {self.seconds * 1e3:.2f} ms on {_count(self.threads, 'thread')}"

    def summary(self) -> str:
        """The whole in a few sentences."""
        listed = sum(row.seconds for row in self)
        scale, unit = (1e3, "ms") if self.gpu is None else (1e6, "µs")
        if self.gpu is None:
            how = "one run" if self.runs == 1 else f"medians of {self.runs} runs"
            lines = [
                f"{self.headline()}; the {_count(len(self), 'call')} listed, timed one by one, {listed * 1e3:.2f} ms ({how})."
            ]
        else:
            lines = [f"{self.headline()} in {_count(len(self), 'call')}."]
        for kernel, (calls, seconds) in self.kernels().items():
            lines.append(f"  {kernel}: {_count(calls, 'call')}, {seconds * scale:.2f} {unit}")
        if self.gpu is not None:
            lines.append(PREDICTED.format(source=self.gpu.source))
        elif any(row.limit_s for row in self):
            lines.append(LIMIT)
        if self.note:
            lines.append(self.note)
        return "\n".join(lines)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        yield self._wide() if options.max_width >= 150 else self._narrow(options.max_width)
        yield Text("\n" + self.summary())

    def _wide(self) -> Any:
        headings = ("layer", "problem", "kernel")
        columns = [*((h, "left") for h in headings), *self._columns, ("why not the others", "left")]
        return _render.table("", columns, [(*_texts(r), *self._numbers(r), "\n".join(_brief(r))) for r in self])

    def _narrow(self, width: int) -> Any:
        """Layer, problem, kernel and reasons below each other."""
        numbers = [self._numbers(row) for row in self]
        room = max(24, width - sum(map(_render.width_of, self._columns, zip(*numbers, strict=True))))

        def cell(row: Row) -> str:
            layer, *more = _texts(row)
            more += [f"not {line}" for line in _brief(row)]
            wrapped = [textwrap.fill(text, room, initial_indent="  ", subsequent_indent="      ") for text in more]
            return "\n".join([layer, *wrapped])

        heading = "layer: problem, kernel, why not the others"
        rows = [(cell(row), *of) for row, of in zip(self, numbers, strict=True)]
        return _render.table("", [(heading, "left"), *self._columns], rows, narrow=True)

    @property
    def _columns(self) -> tuple[tuple[str, str], ...]:
        times = ("ms", "TFLOP/s", "%\u00a0of limit") if self.gpu is None else ("µs at\u00a0least", "bound by")
        return tuple((heading, "right") for heading in ("MFLOP", "MB", *times, "receptive field"))

    def _numbers(self, row: Row) -> tuple[str, ...]:
        share, field = row.of_limit, row.receptive_field
        times: tuple[str, ...] = (f"{row.seconds * 1e6:.2f}", row.bound)
        if self.gpu is None:
            rate = f"{row.flops_per_s / 1e12:.3f}" if row.flops else ""
            times = (f"{row.seconds * 1e3:.3f}", rate, "" if share is None else f"{share * 100:.0f}")
        return (
            f"{row.flops / 1e6:.1f}" if row.flops else "", f"{row.bytes / 1e6:.2f}" if row.bytes else "", *times,
            "" if field is None else f"{field[0]}" if field[0] == field[1] else f"{field[0]}x{field[1]}",
        )  # fmt: skip

    def __str__(self) -> str:
        return _render.as_text(self)

    def __repr__(self) -> str:
        return f"<Explanation of {self.model}: {len(self)} calls, {len(self.unserved)} by torch>"

    def to_dict(self) -> dict[str, Any]:
        """Everything as a dict for JSON."""
        derived = ("ours", "flops_per_s", "limit_s", "bound", "of_limit")
        rows = [{**dataclasses.asdict(row), **{name: getattr(row, name) for name in derived}} for row in self]
        return {
            "model": self.model, "seconds": self.seconds, "threads": self.threads, "torch": torch.__version__,
            "runs": self.runs, "note": self.note, "predicted": self.gpu is not None,
            "device": "cpu" if self.gpu is None else self.gpu.name, "rows": rows,
        }  # fmt: skip

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything as JSON text, also written to ``path`` if one is given (OSError where that fails)."""
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def plot(self, path: str | Path) -> None:
        """Writes an image: time of each call as a bar over the least possible, coloured by kernel, and the roofline.

        Args:
            path: The file; its ending says the format (png, svg, pdf).

        Raises:
            ImportError: matplotlib isn't installed.
            ValueError: there is nothing to plot.
        """
        from cnnfast.explain._plot import plot

        plot(self, path)


LIMIT = (
    "The limit is the least time for a call's FLOPs (at the rate of a large matrix product on this machine) and bytes (at "
    "that of a large copy). More than 100 %: the operands lay in cache, or the algorithm saves multiplications."
)


PREDICTED = (
    "Predicted, not measured: the kernel that would be selected, and the least time for a call's FLOPs and bytes by the card's "
    "peaks ({source}). Launches, and what a kernel leaves unused, come on top."
)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _texts(row: Row) -> tuple[str, str, str]:
    """Layer, problem and kernel, as markup."""
    problem = " ".join(part for part in (row.op, row.direction.replace("fprop", ""), row.problem) if part)
    kernel = row.kernel if row.ours else f"[red]{row.kernel}[/red]"
    return _render.escape(row.layer) or "-", _render.escape(problem), kernel


def _brief(row: Row) -> list[str]:
    """The reasons that matter to a reader: all where torch serves; else the first of each better-placed kernel."""
    rejected = [(name, why[:1] if row.ours else why) for name, why in row.rejected if not row.ours or "." in name]
    return [_render.escape(line) for line in dispatch.reason_lines(rejected)]
