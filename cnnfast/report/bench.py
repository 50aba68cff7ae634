"""A model on cnnfast against the same model on torch: checked first, then timed, interleaved; as a record for JSON."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import cnnfast
from cnnfast.convert import convert, revert
from cnnfast.report.timing import interleaved

NCHW, NHWC = torch.contiguous_format, torch.channels_last
# How far an output may be from torch's fp32 one, relative to the largest; in bf16 and fp16 torch's own error decides.
TOLERANCE = 1e-3


def competitors(model: torch.nn.Module, x: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """What a user could run, by name, each with its own copy of the model: torch's first, ours start with ``cnnfast``.

    Args:
        model: In eval mode, of the input's dtype and device.
        x: (N, C, H, W).
    """

    def runner(network: Any, memory_format: torch.memory_format) -> Callable[[], Any]:
        images = x.clone(memory_format=memory_format)

        def run() -> Any:
            with torch.inference_mode():
                return network(images)

        return run

    out = {
        "torch NCHW": runner(copy.deepcopy(model).to(memory_format=NCHW), NCHW),
        "torch channels_last": runner(copy.deepcopy(model).to(memory_format=NHWC), NHWC),
        "cnnfast": runner(convert(model), NHWC),
    }
    fuse = getattr(cnnfast, "fuse", None)
    if fuse is not None:
        out["cnnfast fused"] = runner(fuse(copy.deepcopy(model)), NHWC)
    return out


def measure(
    name: str,
    model: torch.nn.Module,
    x: torch.Tensor,
    *,
    rounds: int = 15,
    budget_s: float | None = 20.0,
    progress: Callable[[int, int], None] | None = None,
    **labels: Any,
) -> dict[str, Any]:
    """Checks every competitor's output, then times them against each other.

    Args:
        name: The workload's.
        model: In eval mode, float32; it is converted to the input's dtype.
        x: (N, C, H, W), float32, bfloat16 or float16.
        rounds, budget_s, progress: As :func:`cnnfast.report.timing.interleaved` takes them.
        labels: Copied into the record.

    Returns:
        A record: ``workload, batch, shape, dtype, flops``, ``errors`` (of each, against torch in fp32, relative to the
        largest output), ``wrong`` (names of ours that are too far off), ``timings`` (of each), ``best_peer``,
        ``best_ours`` and ``ratio``, the best peer's time over the best of ours: above 1 where cnnfast is faster.
    """
    reference, flops = _reference(model, x)
    model = copy.deepcopy(model).to(x.dtype)
    functions = competitors(model, x)
    scale = float(reference.abs().max()) or 1.0
    errors = {k: float((_output(f()).float() - reference).abs().max()) / scale for k, f in functions.items()}
    allowed = TOLERANCE if x.dtype == torch.float32 else 3 * max(errors["torch NCHW"], 1e-3)
    timings = interleaved(functions, rounds=rounds, budget_s=budget_s, progress=progress)
    peers = [k for k in functions if not is_ours(k)]
    ours = [k for k in functions if is_ours(k)]
    best_peer, best_ours = (min(names, key=lambda k: timings[k].median) for names in (peers, ours))
    return {
        "workload": name,
        "batch": x.shape[0],
        "shape": list(x.shape),
        "dtype": str(x.dtype).removeprefix("torch."),
        "flops": flops,
        "errors": errors,
        "wrong": [k for k in ours if not errors[k] <= allowed],
        "timings": {k: t.to_dict() for k, t in timings.items()},
        "best_peer": best_peer,
        "best_ours": best_ours,
        "ratio": timings[best_peer].median / timings[best_ours].median,
        **labels,
    }


def is_ours(competitor: str) -> bool:
    """Whether a competitor is cnnfast's."""
    return competitor.startswith("cnnfast")


def _output(value: Any) -> torch.Tensor:
    """The tensor to compare: a model may return a tuple or a mapping of them."""
    while not isinstance(value, torch.Tensor):
        value = next(iter(value.values())) if isinstance(value, Mapping) else value[0]
    return value


def _reference(model: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Torch's fp32 output for an input, and the FLOPs of its convolutions and matrix products."""
    plain = revert(model).float().to(memory_format=NCHW)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = _output(plain(x.float().contiguous()))
    return out, int(counter.get_total_flops())
