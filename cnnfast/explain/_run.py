"""What serves each layer of a model, why the others don't, how fast, and how far from the machine's limit.

``explain`` runs the model under :func:`cnnfast.settings.observe`, which reports every selection and its time, with
hooks that know which module is running, and with a mode that catches calls that go to torch past cnnfast.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from cnnfast import _render, dispatch, settings
from cnnfast.convert import FUNCTIONS
from cnnfast.nn.conv_bn_act import WATCHES

TORCH = "torch"  # the kernel named for what goes past cnnfast


@dataclasses.dataclass(frozen=True)
class Row:
    """One call of an operation. ``rejected`` holds (implementation, reasons) of what could not serve it."""

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
    limit_s: float | None = None  # the least time that this machine needs for the FLOPs or the bytes

    @property
    def ours(self) -> bool:
        """Whether a kernel of cnnfast's served it."""
        return self.kernel != TORCH and not self.kernel.startswith("aten.")

    @property
    def flops_per_s(self) -> float:
        """FLOP/s, FLOPs counted as the direct algorithm's: 0 where they aren't known."""
        return self.flops / self.seconds if self.seconds else 0.0

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
        self, model: str, rows: Sequence[Row], seconds: float, threads: int, note: str = "", runs: int = 1
    ) -> None:
        self.model, self.seconds, self.threads, self.note, self.runs = model, seconds, threads, note, runs
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

    def summary(self) -> str:
        """The whole in a few sentences."""
        listed = sum(row.seconds for row in self)
        how = "one run" if self.runs == 1 else f"medians of {self.runs} runs"
        lines = [
            f"{self.model}: {self.seconds * 1e3:.2f} ms on {_count(self.threads, 'thread')}; the "
            f"{_count(len(self), 'call')} listed, timed one by one, {listed * 1e3:.2f} ms ({how})."
        ]
        for kernel, (calls, seconds) in self.kernels().items():
            lines.append(f"  {kernel}: {_count(calls, 'call')}, {seconds * 1e3:.2f} ms")
        if any(row.limit_s for row in self):
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
        columns = [*((h, "left") for h in headings), *_NUMBERS, ("why not the others", "left")]
        return _render.table("", columns, [(*_texts(r), *_numbers(r), "\n".join(_brief(r))) for r in self])

    def _narrow(self, width: int) -> Any:
        """Layer, problem, kernel and reasons below each other."""
        numbers = [_numbers(row) for row in self]
        room = max(24, width - sum(map(_render.width_of, _NUMBERS, zip(*numbers, strict=True))))

        def cell(row: Row) -> str:
            layer, *more = _texts(row)
            more += [f"not {line}" for line in _brief(row)]
            wrapped = [textwrap.fill(text, room, initial_indent="  ", subsequent_indent="      ") for text in more]
            return "\n".join([layer, *wrapped])

        heading = "layer: problem, kernel, why not the others"
        rows = [(cell(row), *of) for row, of in zip(self, numbers, strict=True)]
        return _render.table("", [(heading, "left"), *_NUMBERS], rows, narrow=True)

    def __str__(self) -> str:
        return _render.as_text(self)

    def __repr__(self) -> str:
        return f"<Explanation of {self.model}: {len(self)} calls, {len(self.unserved)} by torch>"

    def to_dict(self) -> dict[str, Any]:
        """Everything as a dict for JSON."""
        rows = [
            {**dataclasses.asdict(row), "ours": row.ours, "flops_per_s": row.flops_per_s, "of_limit": row.of_limit}
            for row in self
        ]
        return {
            "model": self.model, "seconds": self.seconds, "threads": self.threads, "torch": torch.__version__,
            "runs": self.runs, "note": self.note, "rows": rows,
        }  # fmt: skip

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything as JSON text, also written to ``path`` if one is given (OSError where that fails)."""
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def plot(self, path: str | Path) -> None:
        """Writes an image: time of each call as a bar, coloured by kernel.

        Args:
            path: The file; its ending says the format (png, svg, pdf).

        Raises:
            ImportError: matplotlib isn't installed.
            ValueError: there is nothing to plot.
        """
        if not self:
            raise ValueError("plot: the explanation has no rows")
        try:
            from matplotlib.figure import Figure
            from matplotlib.patches import Patch
        except ImportError as error:
            raise ImportError("plot needs matplotlib: pip install matplotlib") from error
        colours = {kernel: _COLOURS[i % len(_COLOURS)] for i, kernel in enumerate(self.kernels())}
        figure = Figure(figsize=(11, 2.2 + 0.22 * len(self)), layout="constrained")
        axes = figure.subplots()
        positions = range(len(self))
        axes.barh(positions, [row.seconds * 1e3 for row in self], color=[colours[row.kernel] for row in self])
        axes.set_yticks(positions, [f"{row.layer}  ({row.op} {row.problem})" for row in self], fontsize=8)
        axes.invert_yaxis()
        axes.margins(y=0.01)
        axes.set_xlabel("time of the call, ms" + (f" (median of {self.runs} runs)" if self.runs > 1 else ""))
        threads = _count(self.threads, "thread")
        axes.set_title(f"{self.model}, call by call: {self.seconds * 1e3:.1f} ms in all, {threads}", loc="left")
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        handles: list[Any] = [
            Patch(color=colours[k], label=f"{k} ({_count(n, 'call')}, {s * 1e3:.1f} ms)")
            for k, (n, s) in self.kernels().items()
        ]
        if any(row.limit_s for row in self):
            marks = [row.limit_s * 1e3 if row.limit_s else float("nan") for row in self]
            axes.scatter(marks, positions, marker="|", color="black", s=40, zorder=3)
            label = "limit: the least time for the FLOPs and bytes on this machine"
            handles.append(axes.scatter([], [], marker="|", color="black", label=label))
        figure.legend(handles=handles, fontsize=8, loc="outside lower left", frameon=False)
        figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.15)  # long labels may not be cut


_COLOURS = ("#2a78b5", "#e0812b", "#3f9b52", "#8d6cab", "#c6453e", "#7f7f7f", "#17a2b0", "#b5a642")


_NUMBERS = (("ms", "right"), ("GFLOP/s", "right"), ("GB/s", "right"), ("%\u00a0of limit", "right"))
LIMIT = (
    "The limit is the least time for a call's FLOPs (at the rate of a large matrix product on this machine) and bytes (at "
    "that of a large copy). More than 100 %: the operands lay in cache, or the algorithm saves multiplications."
)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _texts(row: Row) -> tuple[str, str, str]:
    """Layer, problem and kernel, as markup."""
    problem = " ".join(part for part in (row.op, row.direction.replace("fprop", ""), row.problem) if part)
    kernel = row.kernel if row.ours else f"[red]{row.kernel}[/red]"
    return _render.escape(row.layer) or "-", _render.escape(problem), kernel


def _numbers(row: Row) -> tuple[str, str, str, str]:
    share, gbytes = row.of_limit, row.bytes / row.seconds / 1e9 if row.bytes and row.seconds else None
    return (
        f"{row.seconds * 1e3:.3f}",
        f"{row.flops_per_s / 1e9:.0f}" if row.flops else "",
        "" if gbytes is None else f"{gbytes:.1f}",
        "" if share is None else f"{share * 100:.0f}",
    )


def _brief(row: Row) -> list[str]:
    """The reasons that matter to a reader: all where torch serves; else the first of each better-placed kernel."""
    rejected = [(name, why[:1] if row.ours else why) for name, why in row.rejected if not row.ours or "." in name]
    return [_render.escape(line) for line in dispatch.reason_lines(rejected)]


# ---- running ---------------------------------------------------------------------------------------------------------


class _Past(TorchFunctionMode):
    """Times calls of torch's own functions that cnnfast has a counterpart for: what was not converted."""

    def __init__(self, events: list[Any]) -> None:
        super().__init__()
        self.events = events

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ours = func in _OURS
        if not ours and func not in FUNCTIONS:
            return func(*args, **(kwargs or {}))
        start, before = time.perf_counter(), len(self.events)
        out = func(*args, **(kwargs or {}))
        seconds = time.perf_counter() - start
        noted = self.events[before:]
        # a function of ours counts only where it gave the call to torch, which its Unserved says
        past = bool(noted) and isinstance(noted[-1], dispatch.Unserved) if ours else not noted
        if past and isinstance(out, torch.Tensor):
            self.events.append(_Torch(func.__name__, _shapes(args, out), out.dtype, seconds))
        return out


_OURS = frozenset(FUNCTIONS.values())


@dataclasses.dataclass(frozen=True)
class _Torch:
    op: str
    problem: str
    dtype: torch.dtype
    seconds: float
    reason: str = "not converted"


def _shapes(args: Sequence[Any], out: torch.Tensor) -> str:
    shapes = ["x".join(map(str, a.shape)) for a in args if isinstance(a, torch.Tensor)]
    return f"{', '.join(shapes)} -> {'x'.join(map(str, out.shape))}"


@contextlib.contextmanager
def _layers(model: Any, events: list[Any], names: list[str]) -> Iterator[None]:
    """Within it ``names`` gets, for each event, the module that was running."""
    stack: list[str] = [""]
    handles = []

    def settle() -> None:
        names.extend([stack[-1]] * (len(events) - len(names)))

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            settle()
            stack.append(name)

        setattr(hook, WATCHES, True)  # what is fused stays fused
        return hook

    def leave(*_: Any) -> None:
        settle()
        if len(stack) > 1:
            stack.pop()

    setattr(leave, WATCHES, True)
    for name, module in model.named_modules() if isinstance(model, torch.nn.Module) else ():
        if not isinstance(module, torch.jit.ScriptModule):
            handles.append(module.register_forward_pre_hook(enter(name), prepend=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
        settle()
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Restores the buffers (running statistics) and random states that running a model changes."""
    buffers = list(model.buffers()) if isinstance(model, torch.nn.Module) else []
    before = [b.clone() for b in buffers]
    with torch.random.fork_rng(), torch.no_grad():
        try:
            yield
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def explain(model: Callable[..., Any], *inputs: Any, runs: int = 5, limits: bool = True, **kwargs: Any) -> Explanation:
    """Runs a model and says for each convolution and pooling which kernel served it, why not another, and how fast.

    Args:
        model: A module, converted or not, or any function. A compiled module is run uncompiled. It runs without
            gradients, in the mode it is in; running statistics and random states are restored.
        inputs, kwargs: What it is called with; tensors of any shape that it takes.
        runs: Timed runs after one for warm-up; times are medians.
        limits: Also measure what the machine can do (a matrix product and a copy, a second at most, once a process).

    Returns:
        An :class:`Explanation`: print it, iterate over its rows, or use ``to_json(path)`` and ``plot(path)``. What no
        kernel of cnnfast's served is listed with the reason. On a GPU the times are the host's.

    Raises:
        ValueError: ``runs`` < 1.
        TypeError: ``model`` can't be called.
        Any error of the model's.
    """
    if runs < 1:
        raise ValueError(f"explain: expected runs >= 1, got {runs}")
    if not callable(model):
        raise TypeError(f"explain: expected a module or a function, got {type(model).__name__}")
    notes = []
    if hasattr(model, "_orig_mod"):
        model = model._orig_mod
        notes.append("The model was compiled; shown is how it runs uncompiled.")
    observed: list[tuple[list[Any], list[str]]] = []
    totals: list[float] = []
    with _undisturbed(model):
        model(*inputs, **kwargs)
        for _ in range(runs):  # in turns: what disturbs the machine disturbs the whole and its parts alike
            start = time.perf_counter()
            model(*inputs, **kwargs)
            _wait()
            totals.append(time.perf_counter() - start)
            names: list[str] = []
            with settings.observe() as events, _layers(model, events, names), _Past(events):
                model(*inputs, **kwargs)
            observed.append((events, names))
    rows = _rows(observed, limits)
    if not any(row.ours for row in rows):
        notes.append("No kernel of cnnfast's ran. cnnfast.convert(model) puts the modules of a model on them.")
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        notes.append("On a GPU the times of single calls are the host's.")
    name = getattr(model, "__name__", type(model).__name__)
    return Explanation(name, rows, statistics.median(totals), torch.get_num_threads(), " ".join(notes), runs)


def _wait() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def _rows(observed: Sequence[tuple[list[Any], list[str]]], limits: bool) -> list[Row]:
    events, names = observed[-1]
    same = [e for e, _ in observed if len(e) == len(events)]  # a model may take another path at each call
    rows: list[Row] = []
    pending: dispatch.Unserved | None = None
    for i, (event, name) in enumerate(zip(events, names, strict=True)):
        seconds = statistics.median(getattr(e[i], "seconds", 0.0) for e in same)
        if isinstance(event, dispatch.Event):
            rows.append(_row(event, name, seconds, limits))
        elif isinstance(event, dispatch.Unserved):
            pending = event
            rows.append(Row(name, event.op, "", "", "", TORCH, seconds, rejected=(("cnnfast", (event.reason,)),)))
        elif isinstance(event, _Torch):
            dtype = str(event.dtype).removeprefix("torch.")
            if pending is not None and rows and rows[-1].kernel == TORCH and rows[-1].layer == name:
                # cnnfast itself gave the call to torch: one row, with the reason of the one and the time of the other
                rows[-1] = dataclasses.replace(rows[-1], problem=event.problem, dtype=dtype, seconds=seconds)
            else:
                rejected = (("cnnfast", (event.reason,)),)
                rows.append(Row(name, event.op, "", event.problem, dtype, TORCH, seconds, rejected=rejected))
            pending = None
    return rows


def _row(event: dispatch.Event, name: str, seconds: float, limits: bool) -> Row:
    selection = event.selection
    problem = selection.problem
    limit = None
    if limits and problem.device == "cpu":
        peak, bandwidth = machine_limits(problem.dtype, torch.get_num_threads())
        limit = max(problem.flops / peak, problem.bytes / bandwidth)
    return Row(
        layer=name, op=problem.op, direction=problem.direction, problem=describe(problem), dtype=problem.dtype,
        kernel=selection.implementation.name, seconds=seconds, flops=problem.flops, bytes=problem.bytes,
        rejected=selection.rejected, limit_s=limit,
    )  # fmt: skip


def describe(problem: dispatch.Problem) -> str:
    """A problem as one reads it: ``1x64x56x56 -> 128x28x28, 3x3 /2 pad 1, f32 nhwc`` (batch x channels x map)."""
    sizes: Mapping[str, int] = dict(problem.sizes)
    if not {"N", "C", "H", "W"} <= sizes.keys():
        return ", ".join([*(f"{k}={v}" for k, v in sizes.items()), problem.dtype])
    n = sizes
    if not {"P", "Q", "R", "S"} <= sizes.keys():  # no filter: the map, the result's if it has another, what isn't 0
        text = f"{n['N']}x{n['C']}x{n['H']}x{n['W']}" + (f" -> {n['C']}x{n['P']}x{n['Q']}" if "P" in n else "")
        rest = [f"{k} {v}" for k, v in n.items() if v and k not in "NCHWPQ" and not k.endswith("_bits")]
        return ", ".join([text, *rest, problem.dtype])
    text = f"{n['N']}x{n['C']}x{n['H']}x{n['W']} -> {n.get('K', n['C'])}x{n['P']}x{n['Q']}, {n['R']}x{n['S']}"
    for prefix, name, plain in (("stride", "/", 1), ("pad", " pad ", 0), ("dilation", " dilation ", 1)):
        h, w = n.get(f"{prefix}_h", plain), n.get(f"{prefix}_w", plain)
        if (h, w) != (plain, plain):
            text += f" {name.strip()}{' ' if name != '/' else ''}{h if h == w else f'{h}x{w}'}"
    if n.get("G", 1) != 1:
        text += f" groups {n['G']}"
    layouts = dict(problem.layouts)
    return ", ".join([text, f"{problem.dtype} {next(iter(layouts.values()), '')}".strip()])


@functools.cache
def machine_limits(dtype: str, threads: int) -> tuple[float, float]:
    """What this CPU can do: FLOP/s of a large matrix product in a dtype, bytes/s of a large copy; the best of several.

    Args:
        dtype: ``"f32"``, ``"f64"``, ``"bf16"`` or ``"f16"``.
        threads: Those in use; only the key of the cache.

    Raises:
        KeyError: an unknown dtype.
    """
    a = torch.ones(1024, 1024, dtype=dispatch.TORCH_DTYPES[dtype])
    source = torch.ones(16 << 20, dtype=torch.float32)
    target = torch.empty_like(source)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        product = _best(lambda: a @ a, 0.3)
        copied = _best(lambda: target.copy_(source), 0.2)
    return 2 * 1024**3 / product, 2 * source.nbytes / copied


def _best(function: Callable[[], Any], budget_s: float) -> float:
    best, end = float("inf"), time.perf_counter() + budget_s
    function()
    for _ in range(100):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    return best
