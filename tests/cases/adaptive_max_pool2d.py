"""The cases of adaptive_max_pool2d: those of the average, and ties."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from support.memory import Guarded, place
from torch import Tensor

from cases.adaptive_avg_pool2d import COMMON, Case
from cnnfast import dispatch, ops
from cnnfast.ops.adaptive_max_pool2d import problem as describe

OP = "adaptive_max_pool2d"
DIRECTIONS = ("fprop", "indices", "dgrad", "jvp")
CASES = (
    *COMMON,
    Case("ties: the first wins", 2, 19, 8, 7, 3, 4, ties=True),
    Case("ties, many elements a window", 1, 33, 14, 13, 1, 2, ties=True),
    Case("ties, few channels, NCHW", 1, 5, 8, 7, 3, 5, ties=True, x_layout="nchw"),
)

OPERATORS = {
    "fprop": ops.adaptive_max_pool2d, "indices": ops.adaptive_max_pool2d_indices,
    "dgrad": ops.adaptive_max_pool2d_dgrad, "jvp": ops.adaptive_max_pool2d_jvp,
}  # fmt: skip
READS = {"fprop": ("x",), "indices": ("x",), "dgrad": ("x", "y"), "jvp": ("x", "t")}


def inputs(case: Case, direction: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Guarded]:
    """The operands that a direction reads, in their layouts, amid NaNs."""
    generator = torch.Generator().manual_seed(seed)
    other = case.g_layout or ("nchw" if "nchw" in case.x_layout else "nhwc")
    made = {}
    for role in READS[direction]:
        value = torch.randn(case.shapes[role], generator=generator, dtype=torch.float64)
        if role == "x" and case.ties:
            value = value.round()
        made[role] = place(value, case.x_layout if role == "x" else other, dtype, device)
    return made


def call(case: Case, direction: str, t: Mapping[str, Tensor], precision: str, backend: str, strict: bool) -> Any:
    """Our operator."""
    return OPERATORS[direction](*(t[role] for role in READS[direction]), (case.P, case.Q), backend, strict)


def reference(case: Case, direction: str, t: Mapping[str, Tensor]) -> Any:
    """torch, in the dtype of the tensors."""
    x = t["x"]
    if x.numel() == 0:
        y = x.new_empty(case.shapes["y"])
        return {"fprop": y, "indices": (y, y.long()), "dgrad": x.clone(), "jvp": y}[direction]
    values, indices = torch.ops.aten.adaptive_max_pool2d(x, [case.P, case.Q])
    if direction == "fprop":
        return values
    if direction == "indices":
        return values, indices
    if direction == "dgrad":
        return torch.ops.aten.adaptive_max_pool2d_backward(t["y"].contiguous(), x.contiguous(), indices.contiguous())
    return t["t"].flatten(2).gather(2, indices.flatten(2)).reshape(values.shape)


def magnitude(case: Case, direction: str, t: Mapping[str, Tensor]) -> Any:
    """The sums of the absolute terms."""
    if direction == "dgrad":
        return reference(case, direction, {"x": t["x"], "y": t["y"].abs()})
    out = reference(case, direction, t)
    return (out[0].abs(), out[1]) if isinstance(out, tuple) else out.abs()


def depth(case: Case, direction: str) -> int:
    """How many terms are summed for one element."""
    return max(1, case.P * case.Q // (case.H * case.W)) * 4 if direction == "dgrad" else 1


def nonfinite(case: Case, direction: str) -> tuple[str, ...]:
    """The operands that may hold NaN and infinities."""
    return READS[direction]


def problem(case: Case, direction: str, dtype: torch.dtype, precision: str, device: str = "cpu") -> dispatch.Problem:
    """The problem that dispatch sees."""
    return describe(direction, case.shapes["x"], dtype, torch.device(device), ((case.P, case.Q),))
