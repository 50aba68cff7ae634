"""What the suites share: competitors timed in one interleaved run, shown one by one to pytest-benchmark.

Each competitor appears as a benchmark of its own, with the samples it had in the common run, so that pytest-benchmark's
tables, comparisons and JSON work as usual.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from providers import COMPILE, OURS, Function, fair, names
from tables import ROWS

from cnnfast import settings
from cnnfast.report import timing

_NAMED = 8  # kernels, at most, whose names a table lists
Competitors = tuple[dict[str, Function], dict[str, str]]  # name -> function to time, name -> why it is missing


# A workload has a kind (the group that a table lists it in), flops(batch) of the forward pass (0 where only bytes count)
# and bytes(batch, size of an element, direction), each operand once.
# (workload, direction, batch, dtype, device, with torch.compile) -> competitors, their results checked
Build = Callable[[Any, str, int, torch.dtype, str, bool], Competitors]


BOTH = {"forward": 1, "backward": 4}  # direction -> its usual batch


def parametrize(
    metafunc: pytest.Metafunc, workloads: Sequence[Any], with_compile: Sequence[str], directions: Mapping[str, int] = BOTH,
    competitors: Sequence[str] = (),
) -> None:  # fmt: skip
    """Every workload in its directions by every competitor; torch.compile in the directions named."""
    option = metafunc.config.getoption
    rows = [
        pytest.param(
            direction, option("--batch") or batch, workload, name,
            id=f"{direction}-{option('--batch') or batch}-{workload}-{name}".replace(" ", "_"),
        )
        for direction, batch in directions.items()
        for workload, name in itertools.product(workloads, competitors or names(option("--device")))
        if name != COMPILE or (direction in with_compile and not option("--no-compile"))
    ]  # fmt: skip
    metafunc.parametrize(("direction", "batch", "workload", "name"), rows)


@functools.cache
def _measured(
    build: Build,
    workload: Any,
    direction: str,
    batch: int,
    dtype: str,
    device: str,
    rounds: int,
    with_compile: bool,
    ours: str,
) -> tuple[dict[str, timing.Timing], dict[str, str], str]:
    """Timings of all competitors, why others are missing, and the kernel(s) that served ours."""
    with fair(device):
        functions, missing = build(workload, direction, batch, getattr(torch, dtype), device, with_compile)
        with settings.observe() as events:
            functions[ours]()
        found = [getattr(getattr(e, "selection", None), "implementation", None) for e in events]
        kernels = list(dict.fromkeys(i.name for i in found if i is not None)) or ["torch"]
        kernel = ", ".join(kernels) if len(kernels) <= _NAMED else f"{len(kernels)} kernels"
        return timing.interleaved(functions, rounds=rounds, budget_s=20.0), missing, kernel


class _Replay:
    """A clock that shows the samples that were taken already: pytest-benchmark reads it before and after each round."""

    def __init__(self, samples: Sequence[float]) -> None:
        self._times: Iterator[float] = iter([t for s in itertools.accumulate(samples, initial=0.0) for t in (s, s)][1:])

    def __call__(self) -> float:
        return next(self._times, 0.0)


def run(
    op: str, build: Build, workload: Any, direction: str, batch: int, name: str, with_compile: bool, benchmark: Any,
    machine: Mapping[str, Any], option: Callable[[str], Any], ours: str = OURS,
) -> None:  # fmt: skip
    """Measures a workload where that hasn't been done yet, and gives one competitor's samples to pytest-benchmark.

    ``ours``: the competitor that tables compare with the others.
    """
    dtype, with_compile = option("--dtype"), with_compile and not option("--no-compile")
    timings, missing, kernel = _measured(
        build, workload, direction, batch, dtype, option("--device"), option("--rounds"), with_compile, ours
    )
    if name not in timings:
        pytest.skip(missing.get(name, "not timed"))
    # a backward pass: two products for a convolution; a pooling reads its input and the gradient, and writes another
    flops = workload.flops(batch) * {"forward": 1, "training step": 3}.get(direction, 2)
    moved = workload.bytes(batch, getattr(torch, dtype).itemsize, direction)
    best = min(t.median for peer, t in timings.items() if not peer.startswith(OURS))
    benchmark.group = f"{op} {direction}, batch {batch}: {workload}"
    benchmark.extra_info.update(
        op=op, layer=str(workload), kind=workload.kind, direction=direction, batch=batch, dtype=dtype, provider=name,
        cpu=machine["cpu"], isa=machine["isa"], gpu=machine["gpu"], threads=machine["threads"],
        gflops=flops / timings[name].median / 1e9, gbytes_s=moved / timings[name].median / 1e9,
        times_best_peer=best / timings[name].median, kernel=kernel if name.startswith(OURS) else "",
    )  # fmt: skip
    benchmark._timer = _Replay(timings[name].samples)
    benchmark.pedantic(lambda: None, rounds=len(timings[name].samples), iterations=1, warmup_rounds=0)
    if name == ours:
        ROWS.append({
            "group": f"{op} {direction}, batch {batch}, {dtype}: {workload.kind}", "layer": str(workload),
            "ms": {n: t.ms for n, t in timings.items()}, "missing": missing, "gflops": flops / timings[ours].median / 1e9,
            "gbytes_s": moved / timings[ours].median / 1e9, "ratio": best / timings[ours].median, "kernel": kernel,
            "machine": machine, "ours": ours,
        })  # fmt: skip
