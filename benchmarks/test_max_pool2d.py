"""max_pool2d, layer by layer, beside torch: `pytest benchmarks --benchmark-only`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import measuring
import pytest
import torch
import torch.nn.functional as F
from providers import COMPILE, NCHW, OURS, Function, checked
from torch._functorch import config as functorch
from workloads import Pooling, poolings, representative_poolings

import cnnfast

COMPILED = ("forward", "backward")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    layers = poolings() if metafunc.config.getoption("--full") else representative_poolings()
    measuring.parametrize(metafunc, list(layers), COMPILED)


def test_max_pool2d(
    direction: str, batch: int, workload: Pooling, name: str, benchmark: Any, machine: dict[str, Any], request: Any
) -> None:
    measuring.run(
        "max_pool2d", _providers, workload, direction, batch, name, True, benchmark, machine, request.config.getoption
    )


def _providers(
    layer: Pooling, direction: str, batch: int, dtype: torch.dtype, device: str, with_compile: bool
) -> measuring.Competitors:
    """Everybody pools the same values, in channels_last but for ``torch NCHW``; ``backward``: the gradient of the input."""
    x = layer.tensor(batch, dtype, device)
    # torch's maximum is ours: the results are equal, not just close
    return checked(
        lambda name: _provider(name, direction, x, layer), layer, direction, dtype, device, with_compile, 0.0
    )


def _provider(name: str, direction: str, x: torch.Tensor, layer: Pooling) -> Function:
    pool: Callable[..., torch.Tensor] = cnnfast.functional.max_pool2d if name.startswith(OURS) else F.max_pool2d
    backend = name.removeprefix(OURS).strip() if name.startswith(OURS) else ""
    if name == NCHW:
        x = x.contiguous()

    def forward(images: torch.Tensor) -> torch.Tensor:
        return pool(images, layer.kernel, layer.stride, layer.padding, ceil_mode=layer.ceil_mode)

    if name == COMPILE:
        torch._dynamo.reset()
        forward = torch.compile(forward, dynamic=False)
    if direction == "forward":

        def inference() -> torch.Tensor:
            with torch.no_grad():
                if not backend:
                    return forward(x)
                with cnnfast.backend(backend):
                    return forward(x)

        return inference
    x = x.detach().requires_grad_()
    # a graph that is kept for the next round may not hand its buffers on
    with functorch.patch(donated_buffer=False), cnnfast.backend(backend or "auto"):
        y = forward(x)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        g = g.contiguous(memory_format=torch.contiguous_format if name == NCHW else torch.channels_last)

        def backward() -> torch.Tensor:
            return torch.autograd.grad(y, x, g, retain_graph=True)[0]

        backward()
    return backward
