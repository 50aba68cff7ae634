"""One convolution by us and by what a user would have instead, as functions to time against each other."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from workloads import Layer

import cnnfast

OURS, CHANNELS_LAST, NCHW, COMPILE = "cnnfast", "torch channels_last", "torch NCHW", "torch.compile"
PEERS = (CHANNELS_LAST, NCHW, COMPILE)
# Far above any rounding, far below any mistake: accuracy itself is what the tests are for.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-10}
Function = Callable[[], Any]


def names(device: str) -> tuple[str, ...]:
    """The providers, ours first. On a GPU each of our backends is also timed alone."""
    ours = (OURS,) if device == "cpu" else (OURS, f"{OURS} cuda", f"{OURS} triton")
    return (*ours, CHANNELS_LAST, NCHW, COMPILE)


@contextlib.contextmanager
def fair(device: str, allow_tf32: bool = True) -> Iterator[None]:
    """torch at its best: cuDNN chooses by measuring."""
    if device == "cpu":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=allow_tf32):
        yield


def providers(
    layer: Layer,
    direction: str,
    batch: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    with_compile: bool = True,
) -> tuple[dict[str, Function], dict[str, str]]:
    """(name -> function to time, name -> why a provider is missing), each checked against torch.

    ``forward``: without gradients; x in channels_last but for ``torch NCHW``, the weight as a module holds it but for
    ``torch channels_last``. ``torch.compile`` freezes the weight, so it may repack it beforehand; nobody else may.
    ``backward``: the gradients of input, weight and bias, from a forward pass made before; ``dgrad`` and ``wgrad``: that
    of the input or of the weight alone.
    """
    x, w, b = layer.tensors(batch, dtype, device)
    assert x is not None
    assert w is not None
    args = (layer.stride, layer.padding, 1, layer.groups)
    return checked(
        lambda name: _provider(name, direction, x, w, b, args), layer, direction, dtype, device,
        with_compile and direction == "forward",
        5e-3 if dtype == torch.float32 and device != "cpu" else TOLERANCE[dtype],
    )  # fmt: skip


def checked(
    make: Callable[[str], Function], layer: Any, direction: str, dtype: torch.dtype, device: str, with_compile: bool,
    limit: float,
) -> tuple[dict[str, Function], dict[str, str]]:  # fmt: skip
    """(name -> function to time, name -> why a provider is missing), each within ``limit`` of torch's channels_last."""
    found: dict[str, Function] = {}
    missing: dict[str, str] = {}
    expected = _results(make(CHANNELS_LAST))
    for name in names(device):
        if name == COMPILE and not with_compile:
            continue
        try:
            function = make(name)
            out = _results(function)
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
            continue
        found[name] = function
        for ours, theirs in zip(out, expected, strict=True):
            error = (ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30)
            assert error <= limit, f"{name}, {direction}, {layer}: off by {error:.2g} of the result's norm"
    return found, missing


def _results(function: Function) -> tuple[torch.Tensor, ...]:
    out = function()
    return out if isinstance(out, tuple) else (out,)


def _provider(
    name: str, direction: str, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, args: tuple[Any, ...]
) -> Function:
    convolution: Callable[..., torch.Tensor] = cnnfast.functional.conv2d if name.startswith(OURS) else F.conv2d
    backend = name.removeprefix(OURS).strip() if name.startswith(OURS) else ""
    if name == NCHW:
        x = x.contiguous()
    if name in (CHANNELS_LAST, COMPILE):
        w = w.contiguous(memory_format=torch.channels_last)

    if name == COMPILE:
        return _compiled(x, w, b, args)

    def forward() -> torch.Tensor:
        if not backend:
            return convolution(x, w, b, *args)
        with cnnfast.backend(backend):
            return convolution(x, w, b, *args)

    if direction == "forward":

        def inference() -> torch.Tensor:
            with torch.no_grad():
                return forward()

        return inference
    x, w = x.detach().requires_grad_(direction != "wgrad"), w.detach().requires_grad_(direction != "dgrad")
    inputs = [t for t in (x, w) if t.requires_grad]
    if b is not None and direction == "backward":
        b = b.detach().requires_grad_()
        inputs.append(b)
    y = forward()
    memory_format = torch.contiguous_format if name == NCHW else torch.channels_last
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y).contiguous(memory_format=memory_format)

    def backward() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(y, inputs, g, retain_graph=True)

    return backward


def _compiled(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, args: tuple[Any, ...]) -> Function:
    import torch._inductor.config

    stride, padding, dilation, groups = args
    module = torch.nn.Conv2d(
        x.shape[1], w.shape[0], tuple(w.shape[2:]), stride, padding, dilation, groups, b is not None, dtype=x.dtype, device=x.device
    ).eval()  # fmt: skip
    with torch.no_grad():
        module.weight.copy_(w)
        if b is not None and module.bias is not None:
            module.bias.copy_(b)
    module = module.to(memory_format=torch.channels_last)
    torch._dynamo.reset()
    compiled = torch.compile(module, dynamic=False)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        compiled(x)

    def run() -> Any:
        with torch.no_grad():
            return compiled(x)

    return run


def geometric_mean(values: list[float]) -> float:
    """Of positive numbers; NaN of none."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan
