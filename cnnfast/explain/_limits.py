"""What this machine can do: measured once, and kept in the user's cache."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cnnfast import dispatch

_MEASUREMENTS = 3


def machine_limits(dtype: str, threads: int, again: bool = False) -> tuple[float, float]:
    """What this CPU can do: FLOP/s of a large matrix product in a dtype, bytes/s of a large copy; the best of several.

    Measured in a second, by the first three processes that ask for it on this kind of CPU, with this torch and so many
    threads, because other programs may be busy at the time of the first: the best that was found is kept in the user's
    cache (``python -m cnnfast info`` names the folder). Where standard error is a terminal, it says what it waits for.

    Args:
        dtype: ``"f32"``, ``"f64"``, ``"bf16"`` or ``"f16"``.
        threads: Those in use; a part of the key.
        again: Measure once more.

    Raises:
        KeyError: an unknown dtype.
    """
    if again:
        _limits.cache_clear()
    return _limits(dtype, threads, again)


@functools.cache
def _limits(dtype: str, threads: int, again: bool) -> tuple[float, float]:
    key = f"{_processor()}, torch {torch.__version__}, {threads} threads, {dtype}"
    flops, bandwidth, count = _kept().get(key, (0.0, 0.0, 0))
    if count >= _MEASUREMENTS and not again:
        return flops, bandwidth
    with _announced(f"measuring what this machine can do in {dtype}, threads: {threads}"):
        flops, bandwidth = max(flops, _product(dispatch.TORCH_DTYPES[dtype])), max(bandwidth, _copy())
    _keep({**_kept(), key: (flops, bandwidth, count + 1)})
    return flops, bandwidth


def _product(dtype: torch.dtype) -> float:
    """The better of two sizes: the larger is nearer to the peak, the smaller to a moment when nobody else runs."""
    rates = []
    for n in (1024, 512):
        a = torch.ones(n, n, dtype=dtype)
        with torch.no_grad():
            rates.append(2 * n**3 / _best(lambda a=a: a @ a, 0.3))  # type: ignore[misc]
    return max(rates)


def _copy() -> float:
    source = torch.ones(16 << 20, dtype=torch.float32)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), 0.3)


def _best(function: Callable[[], Any], budget_s: float) -> float:
    best, end = float("inf"), time.perf_counter() + budget_s
    function()
    for _ in range(1000):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    return best


def _processor() -> str:
    """Its name, and what torch uses of it."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        names = (line.partition(":")[2].strip() for line in file if line.startswith(("model name", "Model")))
        name = next(names, name)
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


# ---- the cache -------------------------------------------------------------------------------------------------------


def _path() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("cnnfast")) / "limits.json"


def _kept() -> dict[str, tuple[float, float, int]]:
    """What earlier processes measured: FLOP/s, bytes/s, and how many they were; nothing where the file is missing or torn."""
    try:
        found = json.loads(_path().read_text(encoding="utf-8"))
        return {key: (float(flops), float(bandwidth), int(count)) for key, (flops, bandwidth, count) in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _keep(found: dict[str, tuple[float, float, int]]) -> None:
    """Writes the file, at once, for others may read it; where nothing can be written, nothing is kept."""
    path = _path()
    part = path.with_suffix(f".{os.getpid()}.part")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        part.replace(path)


@contextlib.contextmanager
def _announced(what: str) -> Iterator[None]:
    """Shows a line on standard error while it takes; nothing where that is no terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield
