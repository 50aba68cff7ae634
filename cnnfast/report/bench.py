"""A model on cnnfast against the same model on torch: checked first, then timed, interleaved; as a record for JSON."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from cnnfast import models
from cnnfast.convert import convert, revert
from cnnfast.graph import fuse
from cnnfast.report.peers import PEERS
from cnnfast.report.timing import interleaved

NCHW, NHWC = torch.contiguous_format, torch.channels_last
# How far an output may be from torch's fp32 one, relative to the largest; in bf16 and fp16 torch's own error decides.
TOLERANCE = 1e-3


def competitors(
    model: torch.nn.Module, x: torch.Tensor, peers: Collection[str] = ()
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """What a user could run, by name, each with its own copy of the model: torch's first, ours start with ``cnnfast``.

    Args:
        model: In eval mode, of the input's dtype and device.
        x: (N, C, H, W).
        peers: Also these of :mod:`cnnfast.report.peers`.

    Returns:
        Functions by name, and by name the reason why another is missing.
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
    out["cnnfast fused"] = runner(fuse(model), NHWC)
    missing: dict[str, str] = {}
    for name in peers:
        try:
            out[name] = PEERS[name](copy.deepcopy(model), x)
        except Exception as error:  # whatever stops another project's converter: shown in the table
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    return out, missing


def training(model: torch.nn.Module, x: torch.Tensor, name: str = "") -> dict[str, Callable[[], torch.Tensor]]:
    """A training step (forward, cross-entropy, backward, SGD) of torch in both formats and of cnnfast's modules.

    Each has its own copy of the model, in training mode without dropout, so that all compute the same; a function returns
    the loss before its step. ``name``: if :mod:`cnnfast.models` has that network, its own, whose blocks are fused, too.
    """
    labels = torch.arange(x.shape[0], device=x.device)

    def runner(network: torch.nn.Module, memory_format: torch.memory_format) -> Callable[[], torch.Tensor]:
        images = x.clone(memory_format=memory_format)
        network.train()
        for module in network.modules():
            if isinstance(module, torch.nn.modules.dropout._DropoutNd):
                module.eval()
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)

        def run() -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            logits = output(network(images))
            if logits.dim() != 2:
                raise ValueError(f"a training step needs logits (N, classes), got shape {tuple(logits.shape)}")
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return loss.detach()

        return run

    out = {
        "torch NCHW": runner(copy.deepcopy(model).to(memory_format=NCHW), NCHW),
        "torch channels_last": runner(copy.deepcopy(model).to(memory_format=NHWC), NHWC),
        "cnnfast": runner(convert(model), NHWC),
    }
    if name in models.list() and not any("aux" in key for key in model.state_dict()):
        own = models.create(name).to(dtype=x.dtype, memory_format=NHWC)  # type: ignore[call-overload]
        own.load_state_dict(model.state_dict())
        out["cnnfast.models"] = runner(own, NHWC)
    return out


def measure(
    name: str,
    model: torch.nn.Module,
    x: torch.Tensor,
    *,
    rounds: int = 15,
    budget_s: float | None = 20.0,
    progress: Callable[[int, int], None] | None = None,
    peers: bool = False,
    train: bool = False,
    **labels: Any,
) -> dict[str, Any]:
    """Checks every competitor's output, then times them against each other.

    Args:
        name: The workload's.
        model: In eval mode, float32; it is converted to the input's dtype.
        x: (N, C, H, W), float32, bfloat16 or float16.
        rounds, budget_s, progress: As :func:`cnnfast.report.timing.interleaved` takes them.
        peers: Beside torch also :mod:`cnnfast.report.peers`, where they are installed.
        train: Steps of :func:`training` instead of forward passes; what is compared is the first loss.
        labels: Copied into the record.

    Returns:
        A record: ``workload, batch, shape, dtype, flops``, ``errors`` (of each, against torch in fp32, relative to the
        largest output), ``wrong`` (names of ours that are too far off), ``missing`` (why peers are; those with wrong
        outputs aren't timed), ``timings`` (of each), ``best_peer``, ``best_ours`` and ``ratio``, the
        best peer's time over the best of ours: above 1 where cnnfast is faster.
    """
    expected, flops = reference(model, x)
    model = copy.deepcopy(model).to(x.dtype)
    functions: dict[str, Callable[[], Any]]
    missing: dict[str, str] = {}
    if train:
        functions = dict(training(model, x, name))
        expected, flops = training(copy.deepcopy(model).float(), x.float())["torch NCHW"](), 3 * flops
    else:
        functions, missing = competitors(model, x, tuple(PEERS) if peers else ())
    scale = float(expected.abs().max()) or 1.0
    errors = {k: float((output(f()).float() - expected).abs().max()) / scale for k, f in functions.items()}
    allowed = TOLERANCE if x.dtype == torch.float32 else 3 * max(errors["torch NCHW"], 1e-3)
    for peer in PEERS.keys() & functions.keys():
        if not errors[peer] <= 10 * allowed:  # its rounding may be coarser than ours
            missing[peer] = f"its output is off by {errors[peer]:.1g} of the largest"
            del functions[peer]
    timings = interleaved(functions, rounds=rounds, budget_s=budget_s, progress=progress)
    others = [k for k in functions if not is_ours(k)]
    ours = [k for k in functions if is_ours(k)]
    best_peer, best_ours = (min(names, key=lambda k: timings[k].median) for names in (others, ours))
    return {
        "workload": name,
        "batch": x.shape[0],
        "shape": list(x.shape),
        "dtype": str(x.dtype).removeprefix("torch."),
        "flops": flops,
        "errors": errors,
        "wrong": [k for k in ours if not errors[k] <= allowed],
        "missing": missing,
        "timings": {k: t.to_dict() for k, t in timings.items()},
        "best_peer": best_peer,
        "best_ours": best_ours,
        "ratio": timings[best_peer].median / timings[best_ours].median,
        **labels,
    }


def is_ours(competitor: str) -> bool:
    """Whether a competitor is cnnfast's."""
    return competitor.startswith("cnnfast")


def output(value: Any) -> torch.Tensor:
    """The tensor to compare: a model may return a tuple or a mapping of them."""
    while not isinstance(value, torch.Tensor):
        value = next(iter(value.values())) if isinstance(value, Mapping) else value[0]
    return value


def reference(model: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Torch's fp32 output for an input, and the FLOPs of its convolutions and matrix products."""
    plain = revert(model).float().to(memory_format=NCHW)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = output(plain(x.float().contiguous()))
    return out, int(counter.get_total_flops())
