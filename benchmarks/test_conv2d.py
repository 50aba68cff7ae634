"""conv2d, layer by layer, beside torch: `pytest benchmarks --benchmark-only`.

torch.compile is timed forward only: backward it calls the same function as eager torch.
"""

from __future__ import annotations

from typing import Any

import measuring
import pytest
from providers import providers
from workloads import Layer, distinct, representative

COMPILED = ("forward",)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    layers = distinct() if metafunc.config.getoption("--full") else representative()
    measuring.parametrize(metafunc, list(layers), COMPILED)


def test_conv2d(
    direction: str, batch: int, workload: Layer, name: str, benchmark: Any, machine: dict[str, Any], request: Any
) -> None:
    measuring.run(
        "conv2d", providers, workload, direction, batch, name, direction in COMPILED, benchmark, machine,
        request.config.getoption,
    )  # fmt: skip
