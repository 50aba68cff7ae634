"""What the GPU backends share: which devices they serve, and the rate of memory that predictions are made with."""

from __future__ import annotations

from cnnfast.dispatch import Problem

LAST_ACTIVATION = 3  # leaky_relu, in csrc/common/activation.h
BANDWIDTH = 4.0e12  # bytes a second of an H200, measured
MINIMUM_CAPABILITY = (8, 0)  # asynchronous copies and bf16 matrix instructions


def unavailable(problem: Problem, stand_in: str) -> list[str]:
    """Why a GPU backend can't serve a problem; ``stand_in``: what executes on CPU tensors in tests, or empty."""
    if problem.device != ("cpu" if stand_in else "cuda"):
        return [f"serves {f'CPU tensors ({stand_in})' if stand_in else 'CUDA tensors'}, not {problem.device}"]
    if problem.capability is not None and problem.capability < MINIMUM_CAPABILITY:
        needed, found = (".".join(map(str, pair)) for pair in (MINIMUM_CAPABILITY, problem.capability))
        return [f"needs compute capability {needed} or newer, not {found}"]
    if getattr(problem, "act", 0) > LAST_ACTIVATION:
        return ["activations of inference alone (silu, hardswish, ...) are the CPU's kernels' so far"]
    return []
