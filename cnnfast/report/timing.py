"""Fair timing: competitors interleaved in one run, medians with their spread, and the machine they hold for.

Two functions timed one after the other meet different clocks, caches and neighbours. Here every round calls each
function once, the order turning from round to round, so that whatever disturbs the machine disturbs all of them alike.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from cnnfast import dispatch

# A pause before each sample: thread pools that spin on after a call (OpenMP's, ONNX Runtime's) slow the next one down.
PAUSE_S = 0.004
# A sample lasts at least this long: shorter functions are called several times in a row.
SAMPLE_S = 0.001


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a call of one function, over the rounds of :func:`interleaved`."""

    median: float
    p20: float
    p80: float
    samples: tuple[float, ...]
    calls: int = 1  # in a row for one sample

    @classmethod
    def of(cls, samples: Sequence[float], calls: int = 1) -> Timing:
        """The statistics of samples (seconds a call); ValueError where there are none."""
        if not samples:
            raise ValueError("Timing.of: expected at least one sample")
        ordered = sorted(samples)
        return cls(statistics.median(ordered), quantile(ordered, 0.2), quantile(ordered, 0.8), tuple(samples), calls)

    @property
    def ms(self) -> float:
        """The median in milliseconds."""
        return self.median * 1e3

    @property
    def spread(self) -> float:
        """(p80 - p20) / median: how unsettled the machine was."""
        return (self.p80 - self.p20) / self.median if self.median else 0.0

    def to_dict(self) -> dict[str, Any]:
        """A dict for JSON: ``median_s, p20_s, p80_s, samples, calls``."""
        return {
            "median_s": self.median, "p20_s": self.p20, "p80_s": self.p80,
            "samples": len(self.samples), "calls": self.calls,
        }  # fmt: skip


def quantile(ordered: Sequence[float], q: float) -> float:
    """The q-quantile (0 to 1) of an ascending sequence, interpolated between neighbours."""
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def milliseconds(seconds: float, like: float | None = None) -> str:
    """A time in ms with three significant digits (``like``: as many decimals as that time would have)."""
    reference = max((seconds if like is None else like) * 1e3, 1e-3)
    return f"{seconds * 1e3:.{max(0, min(3, 2 - math.floor(math.log10(reference))))}f}"


def synchronize() -> None:
    """Waits for the GPU, where one is in use."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 15,
    warmup: int = 2,
    budget_s: float | None = None,
    rotate: bool = True,
    pause_s: float = PAUSE_S,
    sample_s: float = SAMPLE_S,
    min_rounds: int = 3,
    lead: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Times functions against each other.

    Args:
        functions: Name to a function without arguments; its result is dropped.
        rounds: Samples of each function.
        warmup: Calls of each function before the first sample.
        budget_s: Stop after that many seconds (warm-up included), but not before ``min_rounds`` rounds.
        rotate: Start each round with another function.
        pause_s: Sleep that long before each sample.
        sample_s: Call a function so often in a row that a sample lasts at least that long.
        min_rounds: See ``budget_s``.
        lead: Calls before each sample that don't count: they wake the threads, and find the caches as another function
            left them, which is always the same one, whatever starts a round.
        progress: Called after each round with (rounds done, rounds).

    Returns:
        The :class:`Timing` of each, in the order of ``functions``: seconds a call.

    Raises:
        ValueError: no functions, or ``rounds`` or ``warmup`` out of range.
    """
    if not functions or rounds < 1 or warmup < 0:
        raise ValueError(
            f"interleaved: expected functions, rounds >= 1 and warmup >= 0, got {list(functions)}, {rounds}, {warmup}"
        )
    begin = time.perf_counter()
    calls: dict[str, int] = {}
    for name, function in functions.items():
        for _ in range(warmup):
            function()
        synchronize()
        calls[name] = _calls(function, sample_s) if warmup else 1
    names = list(functions)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for done in range(rounds):
        start = done % len(names) if rotate else 0
        for name in names[start:] + names[:start]:
            if pause_s:
                time.sleep(pause_s)
            for _ in range(lead):
                functions[name]()
            samples[name].append(_sample(functions[name], calls[name]))
        if progress is not None:
            progress(done + 1, rounds)
        if budget_s is not None and done + 1 >= min_rounds and time.perf_counter() - begin > budget_s:
            break
    return {name: Timing.of(samples[name], calls[name]) for name in names}


def _calls(function: Callable[[], Any], sample_s: float) -> int:
    once = _sample(function, 1)
    return 1 if once >= sample_s else max(1, min(1000, round(sample_s / max(once, 1e-7))))


def _sample(function: Callable[[], Any], calls: int) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize()
    return (time.perf_counter() - start) / calls


# ---- the machine -----------------------------------------------------------------------------------------------------

# What of /proc/cpuinfo's flags decides how fast a convolution can be, best first.
_FLAGS = (
    "amx_fp16", "amx_bf16", "amx_int8", "avx512_fp16", "avx512_bf16", "avx512_vnni", "avx512f", "avx_vnni", "avx2",
    "fma", "f16c", "sve", "asimd",
)  # fmt: skip


@functools.cache
def _cpuinfo() -> tuple[str, tuple[str, ...]]:
    model: str = ""
    flags: set[str] = set()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() in ("model name", "Model", "cpu model") and not model:
                    model = value.strip()
                elif key.strip() in ("flags", "Features") and not flags:
                    flags = set(value.split())
    except OSError:
        pass
    return model or platform.processor() or platform.machine(), tuple(f for f in _FLAGS if f in flags)


def machine() -> dict[str, Any]:
    """What a timing depends on, as a dict for JSON: nothing here touches a GPU that isn't there.

    ``cpu`` (model), ``isa`` (instruction sets found, best first), ``torch_isa`` (what torch uses), ``cores``,
    ``threads``, ``backends`` (name to status), ``gpu`` (name and capability, or None), ``cudnn``, ``os``, and the
    versions ``python``, ``torch``, ``cnnfast``.
    """
    import cnnfast

    model, isa = _cpuinfo()
    gpu = None
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        gpu = {"name": torch.cuda.get_device_name(), "capability": f"{major}.{minor}"}
    return {
        "cpu": model,
        "isa": list(isa),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "backends": {name: backend.status() for name, backend in dispatch.backends().items()},
        "gpu": gpu,
        "cudnn": torch.backends.cudnn.version() if gpu else None,  # type: ignore[no-untyped-call]
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cnnfast": cnnfast.__version__,
    }


def describe(found: Mapping[str, Any]) -> str:
    """One line for the head of a table, from :func:`machine`'s dict: GPU if there is one, CPU, ISA, threads, torch."""
    parts = [str(found["cpu"]), ", ".join(found["isa"][:4]) or "no vector ISA found", f"{found['threads']} threads"]
    if found.get("gpu"):
        parts.insert(0, f"{found['gpu']['name']} (sm_{found['gpu']['capability'].replace('.', '')})")
    return "; ".join([*parts, f"torch {found['torch']}"])
