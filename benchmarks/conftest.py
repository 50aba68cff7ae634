"""Options of the benchmarks, and the table at their end.

``pytest benchmarks --benchmark-only``: about one layer in four, forward at batch 1 and backward at batch 4, and two whole
networks; ``--full``: all. ``-k``: a part, such as ``-k "max_pool2d and backward"``, ``-k "conv2d and 3x3"``, ``-k networks``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tables import ROWS, render

from cnnfast.report import timing


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cnnfast")
    group.addoption(
        "--full", action="store_true", help="every distinct layer of nine networks, not one in four, and all networks"
    )
    group.addoption("--batch", type=int, help="batch size of both directions (default: 1 forward, 4 backward)")
    group.addoption("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    group.addoption("--rounds", type=int, default=15, help="samples of each competitor (default: 15)")
    group.addoption(
        "--no-compile", action="store_true", help="leave out torch.compile, whose compilation takes most of the time"
    )


def pytest_configure(config: pytest.Config) -> None:
    """pytest-benchmark's own tables, where nobody asked for other columns: what says something about a replayed sample."""
    asked = any(str(argument).startswith("--benchmark-columns") for argument in config.invocation_params.args)
    if hasattr(config.option, "benchmark_columns") and not asked:
        config.option.benchmark_columns = ["min", "median", "max", "rounds"]


@pytest.fixture(scope="session")
def machine() -> dict[str, Any]:
    return timing.machine()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if ROWS:
        terminalreporter.section("cnnfast: medians of interleaved runs; ×: the peer's time over ours")
        terminalreporter.write(render(ROWS, ROWS[0]["machine"]))
