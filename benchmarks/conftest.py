"""Options of the benchmarks, and the table at their end.

``pytest benchmarks --benchmark-only``: about one layer in four, forward at batch 1 and
backward at batch 4; ``--full``: all.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tables import ROWS, render

from cnnfast.report import timing


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cnnfast")
    group.addoption("--full", action="store_true", help="every distinct layer of the nine networks")
    group.addoption("--batch", type=int, help="batch size of both directions (default: 1 forward, 4 backward)")
    group.addoption("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    group.addoption("--rounds", type=int, default=15, help="samples of each competitor")
    group.addoption(
        "--no-compile", action="store_true", help="leave out torch.compile, whose compilation takes most of the time"
    )


@pytest.fixture(scope="session")
def machine() -> dict[str, Any]:
    return timing.machine()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if ROWS:
        terminalreporter.section("cnnfast: medians of interleaved runs; a ratio is the peer's time over ours")
        terminalreporter.write(render(ROWS, ROWS[0]["machine"]))
