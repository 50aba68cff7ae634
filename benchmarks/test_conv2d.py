"""conv2d, layer by layer, beside torch: `pytest benchmarks --benchmark-only`.

All competitors of a layer are timed in one interleaved run (cnnfast.report.timing); each then appears as a benchmark of
its own, with the samples it had in that run, so that pytest-benchmark's tables, comparisons and JSON work as usual.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from providers import OURS, fair, names, providers
from tables import ROWS
from workloads import Layer, distinct, representative

from cnnfast import settings
from cnnfast.report import timing


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    layers = distinct() if option("--full") else representative()
    given = option("--batch")
    rows = [
        pytest.param(direction, batch, layer, name, id=f"{direction}-{batch}-{layer}-{name}".replace(" ", "_"))
        for direction, batch in (("forward", given or 1), ("backward", given or 4))
        for layer, name in itertools.product(layers, names(option("--device"), direction))
        if not (name == "torch.compile" and option("--no-compile"))
    ]
    metafunc.parametrize(("direction", "batch", "layer", "name"), rows)


@functools.cache
def _measured(
    direction: str, batch: int, layer: Layer, dtype: str, device: str, rounds: int, with_compile: bool
) -> tuple[dict[str, timing.Timing], dict[str, str], str]:
    """Timings of all competitors, why others are missing, and the kernel(s) that served ours."""
    with fair(device):
        functions, missing = providers(layer, direction, batch, getattr(torch, dtype), device, with_compile)
        kernels = "?"
        with settings.observe() as events:
            functions[OURS]()
        found = [getattr(getattr(e, "selection", None), "implementation", None) for e in events]
        kernels = ", ".join(dict.fromkeys(i.name for i in found if i is not None)) or kernels
        return timing.interleaved(functions, rounds=rounds, budget_s=20.0), missing, kernels


class _Replay:
    """A clock that shows the samples that were taken already: pytest-benchmark reads it before and after each round."""

    def __init__(self, samples: Sequence[float]) -> None:
        self._times: Iterator[float] = iter([t for s in itertools.accumulate(samples, initial=0.0) for t in (s, s)][1:])

    def __call__(self) -> float:
        return next(self._times, 0.0)


def test_conv2d(
    direction: str, batch: int, layer: Layer, name: str, benchmark: Any, machine: dict[str, Any], request: Any
) -> None:
    option = request.config.getoption
    key = (option("--dtype"), option("--device"), option("--rounds"), not option("--no-compile"))
    timings, missing, kernel = _measured(direction, batch, layer, *key)
    if name not in timings:
        pytest.skip(missing.get(name, "not timed"))
    flops = layer.flops(batch) * (1 if direction == "forward" else 2)
    best = min(t.median for peer, t in timings.items() if not peer.startswith(OURS))
    group = f"{direction}, batch {batch}, {option('--dtype')}: {layer.kind}"
    benchmark.group = f"{direction}, batch {batch}: {layer}"
    benchmark.extra_info.update(
        layer=str(layer), kind=layer.kind, direction=direction, batch=batch, dtype=option("--dtype"), provider=name,
        cpu=machine["cpu"], isa=machine["isa"], gpu=machine["gpu"], threads=machine["threads"],
        gflops=flops / timings[name].median / 1e9, times_best_peer=best / timings[name].median,
        kernel=kernel if name.startswith(OURS) else "",
    )  # fmt: skip
    benchmark._timer = _Replay(timings[name].samples)
    benchmark.pedantic(lambda: None, rounds=len(timings[name].samples), iterations=1, warmup_rounds=0)
    if name == OURS:
        ROWS.append({
            "group": group, "layer": str(layer), "ms": {n: t.ms for n, t in timings.items()}, "missing": missing,
            "gflops": flops / timings[OURS].median / 1e9, "ratio": best / timings[OURS].median, "kernel": kernel,
            "machine": machine,
        })  # fmt: skip
