"""Running a model to explain it, under :func:`cnnfast.settings.observe`, which reports every selection and its time.

Hooks know which module is running, and a mode catches calls that go to torch past cnnfast.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from cnnfast import dispatch, settings
from cnnfast.convert import FUNCTIONS
from cnnfast.explain._devices import Gpu, gpu, predict
from cnnfast.explain._limits import machine_limits
from cnnfast.explain._rows import TORCH, Explanation, Row
from cnnfast.graph.fuse import Fused
from cnnfast.models._describe import receptive_fields
from cnnfast.nn.conv_bn_act import WATCHES


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
            self.events.append(dispatch.TorchCall.of(func.__name__, args, out, seconds, "not converted"))
        return out


_OURS = frozenset(FUNCTIONS.values())


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


def explain(
    model: Callable[..., Any],
    *inputs: Any,
    runs: int = 5,
    limits: bool = True,
    device: str | None = None,
    **kwargs: Any,
) -> Explanation:
    """Runs a model and says for each convolution and pooling which kernel served it, why not another, and how fast.

    Args:
        model: A module, converted or not, a fused one, or any function. A compiled module is run uncompiled, a fused one
            kernel by kernel. It runs without gradients, in the mode it is in; running statistics and random states are
            restored.
        inputs, kwargs: What it is called with; tensors of any shape that it takes.
        runs: Timed runs after one for warm-up; times are medians.
        limits: Also measure what the machine can do (a matrix product and a copy, a second at most, once a machine).
        device: A card by name (``"h100"``, ``"a100"``, ``"l4"``, ``"rtx4090"``): instead of timing, what is *predicted* for it,
            without one: the kernels that would be selected there, and the least time by the card's peaks. The model runs
            once, on the CPU.

    Returns:
        An :class:`Explanation`: print it, iterate over its rows, or use ``to_json(path)`` and ``plot(path)``. What no
        kernel of cnnfast's served is listed with the reason. On a GPU the times are the host's.

    Raises:
        ValueError: ``runs`` < 1, or an unknown ``device``.
        TypeError: ``model`` can't be called.
        Any error of the model's.
    """
    if runs < 1:
        raise ValueError(f"explain: expected runs >= 1, got {runs}")
    if not callable(model):
        raise TypeError(f"explain: expected a module or a function, got {type(model).__name__}")
    card = None if device is None else gpu(device)
    notes = []
    if hasattr(model, "_orig_mod"):
        model = model._orig_mod
        notes.append("The model was compiled; shown is how it runs uncompiled.")
    source = model._source if isinstance(model, Fused) else model
    name = getattr(source, "__name__", type(source).__name__) + (" fused" if source is not model else "")
    fields = receptive_fields(source, inputs, kwargs) if isinstance(source, torch.nn.Module) else {}
    observed: list[tuple[list[Any], list[str]]] = []
    totals: list[float] = []
    with _undisturbed(model):
        for _ in range(2 if isinstance(model, Fused) else 1):  # on a GPU the second call records
            model(*inputs, **kwargs)
        for _ in range(
            runs if card is None else 1
        ):  # in turns: what disturbs the machine disturbs whole and parts alike
            start = time.perf_counter()
            if card is None:
                model(*inputs, **kwargs)
                _wait()
            totals.append(time.perf_counter() - start)
            names: list[str] = []
            with settings.observe() as events, _layers(model, events, names), _Past(events):
                model(*inputs, **kwargs)
            observed.append((events, names))
    rows = [
        dataclasses.replace(row, receptive_field=fields.get(row.layer.split(" + ")[0]))
        for row in _rows(observed, limits, card)
    ]
    if not any(row.ours for row in rows):
        notes.append("No kernel of cnnfast's ran. cnnfast.convert(model) puts the modules of a model on them.")
    if card is not None:
        notes += [f"{b}: {s}." for b, s in _absent()]
        return Explanation(name, rows, sum(row.seconds for row in rows), 0, " ".join(notes), 1, card)
    if isinstance(model, Fused):
        notes += [f"Explained step by step; otherwise: {line}." for line in model.launches()]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        notes.append("On a GPU the times of single calls are the host's.")
    return Explanation(name, rows, statistics.median(totals), torch.get_num_threads(), " ".join(notes), runs)


def _wait() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def _absent() -> list[tuple[str, str]]:
    """The GPU backends that this installation lacks, whose kernels were therefore not asked."""
    served = dispatch.backends().items()
    return [
        (name, backend.status())
        for name, backend in served
        if name in ("cuda", "triton") and not backend.implementations
    ]


def _rows(observed: Sequence[tuple[list[Any], list[str]]], limits: bool, card: Gpu | None) -> list[Row]:
    events, names = observed[-1]
    same = [e for e, _ in observed if len(e) == len(events)]  # a model may take another path at each call
    rows: list[Row] = []
    pending: dispatch.Unserved | None = None
    for i, (event, module) in enumerate(zip(events, names, strict=True)):
        seconds = 0.0 if card else statistics.median(getattr(e[i], "seconds", 0.0) for e in same)
        name = ".".join(part for part in (module, getattr(event, "layer", "")) if part)
        if isinstance(event, dispatch.Event):
            problem = event.selection.problem
            rows.append(_predicted(problem, name, card) if card else _row(event, name, seconds, limits))
        elif isinstance(event, dispatch.Unserved):
            pending = event
            rows.append(Row(name, event.op, "", "", "", TORCH, seconds, rejected=(("cnnfast", (event.reason,)),)))
        elif isinstance(event, dispatch.TorchCall):
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
    peak = bandwidth = None
    if limits and problem.device == "cpu":
        peak, bandwidth = machine_limits(problem.dtype, torch.get_num_threads())
    return Row(
        layer=name, op=problem.op, direction=problem.direction, problem=describe(problem), dtype=problem.dtype,
        kernel=selection.implementation.name, seconds=seconds, flops=problem.flops, bytes=problem.bytes,
        rejected=selection.rejected, peak=peak, bandwidth=bandwidth,
    )  # fmt: skip


def _predicted(problem: dispatch.Problem, name: str, card: Gpu) -> Row:
    found = predict(problem, card)
    return Row(
        layer=name, op=problem.op, direction=problem.direction, problem=describe(problem), dtype=problem.dtype,
        kernel=TORCH if found.implementation is None else found.implementation.name, seconds=found.seconds,
        flops=problem.flops, bytes=problem.bytes, rejected=found.rejected, peak=found.peak, bandwidth=card.bandwidth,
        unit=found.unit,
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
