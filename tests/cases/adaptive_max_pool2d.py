"""The cases of adaptive_max_pool2d: those of the average, and ties."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from support.memory import Guarded, place
from torch import Tensor

from cases.adaptive_avg_pool2d import COMMON, Case
from cases.max_pool2d import NO_TAP, Axes, drawn, numbers, offsets, results_of_nothing
from cnnfast import dispatch, ops
from cnnfast.ops.adaptive_max_pool2d import problem as describe

OP = "adaptive_max_pool2d"
DIRECTIONS = ("fprop", "indices", "dgrad", "jvp", "taps", "scatter")
CASES = (
    *COMMON,
    Case("ties: the first wins", 2, 19, 8, 7, 3, 4, ties=True),
    Case("ties, many elements a window", 1, 33, 14, 13, 1, 2, ties=True),
    Case("ties, few channels, NCHW", 1, 5, 8, 7, 3, 5, ties=True, x_layout="nchw"),
)

OPERATORS = {
    "fprop": ops.adaptive_max_pool2d, "indices": ops.adaptive_max_pool2d_indices,
    "dgrad": ops.adaptive_max_pool2d_dgrad, "jvp": ops.adaptive_max_pool2d_jvp,
    "taps": ops.adaptive_max_pool2d_recorded, "scatter": ops.adaptive_max_pool2d_dgrad,
}  # fmt: skip
# scatter reads no value of x, but its layout is that of t
READS = {
    "fprop": ("x",), "indices": ("x",), "dgrad": ("x", "y"), "jvp": ("x", "t"), "taps": ("x",), "scatter": ("x", "y", "k"),
}  # fmt: skip


def axes(case: Case) -> Axes:
    """The windows of a case."""
    sizes = ((case.H, case.P), (case.W, case.Q))
    begins, ends = ([torch.tensor([f(i, n, m) for i in range(m)]) for n, m in sizes] for f in (_begin, _end))
    taps = tuple(min(-(-n // m) + (n % m != 0), n) for n, m in sizes)
    return Axes((begins[0][:, None], begins[1]), (ends[0][:, None], ends[1]), (1, 1), taps, (case.H, case.W))


def _begin(window: int, size: int, outputs: int) -> int:
    return window * size // outputs


def _end(window: int, size: int, outputs: int) -> int:
    return -(-(window + 1) * size // outputs)


def inputs(case: Case, direction: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Guarded]:
    """The operands that a direction reads, in their layouts, amid NaNs."""
    generator = torch.Generator().manual_seed(seed)
    other = case.g_layout or ("nchw" if "nchw" in case.x_layout else "nhwc")
    made = {}
    for role in READS[direction]:
        if role == "k":
            made[role] = place(drawn(case, axes(case), generator), other, torch.uint8, device)
            continue
        value = torch.randn(case.shapes[role], generator=generator, dtype=torch.float64)
        if role == "x" and case.ties:
            value = value.round()
        made[role] = place(value, case.x_layout if role == "x" else other, dtype, device)
    return made


def call(case: Case, direction: str, t: Mapping[str, Tensor], precision: str, backend: str, strict: bool) -> Any:
    """Our operator."""
    operands = [t[role] for role in READS[direction]] + [None] * (direction == "dgrad")
    return OPERATORS[direction](*operands, (case.P, case.Q), backend, strict)


def reference(case: Case, direction: str, t: Mapping[str, Tensor]) -> Any:
    """torch, in the dtype of the tensors."""
    x = t["x"]
    if x.numel() == 0:
        y = x.new_empty(case.shapes["y"])
        return results_of_nothing(x, y)[direction]
    values, indices = torch.ops.aten.adaptive_max_pool2d(x, [case.P, case.Q])
    if direction == "fprop":
        return values
    if direction == "indices":
        return values, indices
    if direction == "taps":
        return values, numbers(indices, axes(case))
    if direction in ("dgrad", "scatter"):
        g = t["y"]
        if direction == "scatter":
            none, indices = t["k"] == NO_TAP, offsets(t["k"], axes(case))
            g, indices = g.masked_fill(none, 0), indices.masked_fill(none, 0)
        return torch.ops.aten.adaptive_max_pool2d_backward(g.contiguous(), x.contiguous(), indices.contiguous())
    return t["t"].flatten(2).gather(2, indices.flatten(2)).reshape(values.shape)


def magnitude(case: Case, direction: str, t: Mapping[str, Tensor]) -> Any:
    """The sums of the absolute terms."""
    if direction in ("dgrad", "scatter"):
        return reference(case, direction, {**t, "y": t["y"].abs()})
    out = reference(case, direction, t)
    return (out[0].abs(), out[1]) if isinstance(out, tuple) else out.abs()


def depth(case: Case, direction: str) -> int:
    """How many terms are summed for one element."""
    return max(1, case.P * case.Q // (case.H * case.W)) * 4 if direction in ("dgrad", "scatter") else 1


def nonfinite(case: Case, direction: str) -> tuple[str, ...]:
    """The operands that may hold NaN and infinities."""
    return tuple(role for role in READS[direction] if role != "k")


def problem(case: Case, direction: str, dtype: torch.dtype, precision: str, device: str = "cpu") -> dispatch.Problem:
    """The problem that dispatch sees."""
    return describe(direction, case.shapes["x"], dtype, torch.device(device), ((case.P, case.Q),))
