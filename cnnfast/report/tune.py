"""Tuning: the calls of a network, each measured in the tiles that its kernel can take, within so many seconds.

A tile counts only if its result agrees with that of the tile before, and is only taken if it is faster by more than the
noise. What was found is kept after every problem, so that an interruption loses nothing. Where time is short the problems
that were never measured come first, of these the ones predicted to take most of the network's time, and of each the tiles
predicted to be fastest.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from cnnfast import _render, settings, tuning

# Seconds a call of what it is given.
Measure = Callable[[Callable[[], Any]], float]
GAIN = 1.02  # a tile that isn't so many times faster than the one before isn't taken
AGREEMENT = {
    torch.float32: 1e-3,
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
}  # of the result's norm: only mistakes differ more
DIRECTIONS = {"forward": ("fprop",), "backward": ("dgrad", "wgrad"), "both": ("fprop", "dgrad", "wgrad")}


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of one problem; seconds a call."""

    label: str
    calls: int  # in the network
    before: Any
    after: Any
    seconds_before: float
    seconds_after: float
    tried: int
    tiles: int
    failed: tuple[str, ...] = ()

    @property
    def speedup(self) -> float:
        """Of one call."""
        return self.seconds_before / self.seconds_after


# ---- what there is to tune -------------------------------------------------------------------------------------------


def collect(model: torch.nn.Module, x: torch.Tensor, direction: str = "both") -> list[tuple[tuning.Task, int]]:
    """The tunable calls of one pass through a network with cnnfast's modules, and how often each occurs.

    Args:
        model: On the device of ``x``; its weights stay as they are, its running statistics too.
        x: (N, C, H, W).
        direction: "forward", in eval mode; "backward" and "both", in training mode.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction: expected one of {', '.join(DIRECTIONS)}, got {direction!r}")
    training = model.training
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    # observe(): calls are bound anew, also those that were served before
    with settings.backend("triton"), settings.observe(), tuning.collecting() as tasks:
        try:
            if direction == "forward":
                with torch.no_grad():
                    model.eval()(x)
            else:
                out = model.train()(x)
                out = out if isinstance(out, torch.Tensor) else out[0]
                out.backward(torch.randn_like(out))
        finally:
            model.train(training)
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for name, buffer in model.named_buffers():
                buffer.copy_(kept[name])
    found: dict[str, tuning.Task] = {}
    calls: dict[str, int] = {}
    for task in tasks:
        if task.label.split()[0] in DIRECTIONS[direction]:
            found.setdefault(task.key, task)
            calls[task.key] = calls.get(task.key, 0) + 1
    return [(task, calls[key]) for key, task in found.items()]


def merged(found: Sequence[Sequence[tuple[tuning.Task, int]]]) -> list[tuple[tuning.Task, int]]:
    """What several networks, or forms of one, have to tune."""
    tasks: dict[str, tuple[tuning.Task, int]] = {}
    for task, calls in (pair for pairs in found for pair in pairs):
        kept, most = tasks.get(task.key, (task, 0))
        tasks[task.key] = (kept, max(calls, most))
    return list(tasks.values())


# ---- measuring -------------------------------------------------------------------------------------------------------


def device_seconds(call: Callable[[], Any], sample: float = 2e-3, samples: int = 5) -> float:
    """The card's time of a call: the median of samples, each a graph of calls in a row, so that Python's time doesn't count."""
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    count = max(1, min(100, round(sample / max(time.perf_counter() - begin, 1e-6))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    graph.replay()
    times = []
    for _ in range(samples):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / count)
    return statistics.median(times)


def tune(
    tasks: Sequence[tuple[tuning.Task, int]], seconds: float, *, measure: Measure = device_seconds,
    clock: Callable[[], float] = time.monotonic, progress: Callable[[str, float], None] = lambda text, share: None,
    keep: Callable[[str, dict[str, tuning.Entry]], Any] = tuning.store,
) -> Iterator[Result]:  # fmt: skip
    """Measures, keeps, and yields what came of each problem, until the time is over.

    Args:
        tasks: From :func:`collect`.
        seconds: In all, at most, but for what the measurement at hand still takes.
        measure, clock: Of a call, and of the budget.
        progress: Called before each measurement with a text and the share of the budget that is spent.
        keep: Called with the card and the entries to keep.

    Raises:
        RuntimeError: while a CUDA graph is being captured.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tuning measures, which a CUDA graph can't capture: tune before")
    begin = clock()
    for task, calls in sorted(tasks, key=_urgency):
        spent = (clock() - begin) / seconds
        if spent >= 1:
            return
        problem = _Problem(task, measure)
        problem.try_tile(task.before)
        if task.before not in problem.times:
            continue
        for tile in task.tiles:
            spent = (clock() - begin) / seconds
            if spent >= 1:
                break
            if tile != task.before:
                progress(f"{task.label}: {describe(tile)}", spent)
                problem.try_tile(tile)
        best = problem.best()
        entry = tuning.Entry(task.dump(best), problem.times[best], problem.times[task.before])
        keep(task.card, {task.key: entry})
        yield Result(
            task.label, calls, task.before, best, entry.before, entry.seconds, len(problem.times) + len(problem.failed),
            len(task.tiles), tuple(problem.failed),
        )  # fmt: skip


def _urgency(pair: tuple[tuning.Task, int]) -> tuple[bool, float]:
    """What was never measured comes first, so that the same command again goes on; then what takes the network longest."""
    task, calls = pair
    return tuning.lookup(task.card, task.key) is not None, -task.predicted * calls


class _Problem:
    """One task with operands of its own, and the times of the tiles that were tried."""

    def __init__(self, task: tuning.Task, measure: Measure) -> None:
        self._task, self._measure = task, measure
        self._operands = [None if meta is None else _random(*meta) for meta in task.operands]
        self._expected: torch.Tensor | None = None
        self.times: dict[Any, float] = {}
        self.failed: list[str] = []

    def try_tile(self, tile: Any) -> None:
        try:
            call = self._task.bind(tile)
            out = self._operands[self._task.output]
            assert out is not None
            out.zero_()
            call(self._operands)
            if self._expected is None:
                self._expected = out.double()
            error = (out.double() - self._expected).norm() / self._expected.norm().clamp_min(1e-30)
            if not error <= AGREEMENT[out.dtype]:
                raise ValueError(f"its result is off by {error:.2g} of the norm")
            self.times[tile] = self._measure(lambda: call(self._operands))
        except Exception as error:  # a tile that doesn't compile or run here is no candidate; the others still are
            lines = str(error).splitlines() or [""]
            self.failed.append(f"{describe(tile)}: {type(error).__name__} {lines[0][:120]}")

    def best(self) -> Any:
        fastest = min(self.times, key=lambda tile: self.times[tile])
        before = self._task.before
        return fastest if self.times[fastest] * GAIN < self.times[before] else before


def _random(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Values whose sums neither overflow nor hide a mistake, in any strides, those of expanded tensors included."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return torch.empty(extent, dtype=dtype, device=device).normal_().as_strided(shape, strides)


# ---- showing ---------------------------------------------------------------------------------------------------------


def describe(tile: Any) -> str:
    """A tile as tables show it: ``128x64x64, 4 warps, 3 stages``."""
    size = f"{tile.block_m}x{tile.block_n}x{tile.block_k}, {tile.num_warps} warps, {tile.num_stages} stages"
    return size + ", persistent" * bool(tile.persistent)


def table(results: Sequence[Result], title: str) -> str:
    """The results, those first whose calls gain most, and what the whole gains."""
    ordered = sorted(results, key=lambda r: -(r.seconds_before - r.seconds_after) * r.calls)
    columns = [("problem", "left"), ("calls", "right"), ("before", "left"), ("after", "left"), ("µs before", "right"),
               ("µs after", "right"), ("×", "right"), ("tried", "right")]  # fmt: skip
    rows = [
        [r.label, str(r.calls), describe(r.before), "the same" if r.after == r.before else describe(r.after),
         f"{r.seconds_before * 1e6:.1f}", f"{r.seconds_after * 1e6:.1f}", f"{r.speedup:.2f}", f"{r.tried} of {r.tiles}"]
        for r in ordered
    ]  # fmt: skip
    before, after = (sum(t * r.calls for r, t in zip(results, times, strict=True)) for times in (
        [r.seconds_before for r in results], [r.seconds_after for r in results],
    ))  # fmt: skip
    caption = f"All of these calls: {before * 1e3:.3f} ms before, {after * 1e3:.3f} ms after." if results else ""
    return _render.as_text(_render.table(title, columns, rows, caption))
