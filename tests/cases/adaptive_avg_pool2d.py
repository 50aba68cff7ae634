"""The cases of adaptive_avg_pool2d: the architectures' poolings, and every shape that breaks a kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from support.memory import Guarded, place
from torch import Tensor

from cnnfast import dispatch, ops
from cnnfast.ops.adaptive_avg_pool2d import problem as describe

OP = "adaptive_avg_pool2d"
DIRECTIONS = ("fprop", "dgrad")


@dataclasses.dataclass(frozen=True)
class Case:
    """One adaptive pooling of x (N, C, H, W) to (P, Q), operands in these layouts."""

    why: str
    N: int
    C: int
    H: int
    W: int
    P: int
    Q: int
    x_layout: str = "nhwc"
    g_layout: str = ""  # of the gradient; "": x's format
    offset: float = 0.0  # added to the values: sums that grow with every addend
    ties: bool = False  # small integers: many equal elements

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every operand."""
        x, y = (self.N, self.C, self.H, self.W), (self.N, self.C, self.P, self.Q)
        return {"x": x, "y": y, "i": y, "t": x, "k": y}

    def __str__(self) -> str:
        parts = [f"{self.N}x{self.C}x{self.H}x{self.W}-to-{self.P}x{self.Q}"]
        parts += ["offset"] * bool(self.offset) + ["ties"] * self.ties
        return "-".join(p for p in [*parts, self.x_layout, self.g_layout] if p)


COMMON = (
    Case("resnet's head: the mean of an image", 2, 96, 7, 7, 1, 1),
    Case("the same, NCHW", 2, 96, 7, 7, 1, 1, x_layout="nchw"),
    Case("alexnet: 6x6 of 6x6", 2, 32, 6, 6, 6, 6),
    Case("vgg at another resolution: windows share elements", 1, 32, 10, 9, 7, 7),
    Case("pyramid pooling: 3x3 of 20x20", 1, 40, 20, 20, 3, 3),
    Case("a part of a concatenation", 1, 24, 8, 8, 4, 4, x_layout="channels"),
    Case("primes", 3, 13, 11, 7, 5, 3),
    Case("more results than elements", 2, 19, 4, 3, 7, 11),
    Case("more results than elements, few channels", 2, 3, 4, 3, 9, 5),
    Case("more rows, fewer columns", 1, 21, 3, 11, 8, 2),
    Case("a hundred results an element", 1, 17, 1, 2, 30, 50),
    Case("one channel", 2, 1, 9, 10, 4, 3),
    Case("three channels, NCHW", 2, 3, 9, 10, 4, 10, x_layout="nchw"),
    Case("three channels of many", 2, 3, 9, 10, 4, 3, x_layout="sliced"),
    Case("channels: a vector less one", 1, 15, 6, 5, 4, 2),
    Case("channels: a vector and one", 1, 17, 6, 5, 4, 2),
    Case("channels: a block and one", 1, 65, 5, 6, 2, 4),
    Case("1x1 map", 2, 18, 1, 1, 1, 1),
    Case("1x1 map to many", 2, 18, 1, 1, 3, 2),
    Case("enough for two threads", 2, 48, 24, 23, 11, 9),
    Case("one row of results: threads share channels", 1, 195, 19, 23, 1, 1),
    Case("empty batch", 0, 4, 6, 6, 2, 2),
    Case("sliced", 2, 19, 7, 6, 3, 2, x_layout="sliced"),
    Case("sliced NCHW", 2, 9, 7, 6, 3, 2, x_layout="sliced_nchw"),
    Case("expanded batch", 3, 24, 7, 6, 3, 2, x_layout="expanded"),
    Case("expanded channels", 2, 8, 7, 6, 3, 2, x_layout="expanded_c"),
    Case("misaligned", 1, 16, 7, 6, 3, 4, x_layout="misaligned"),
    Case("transposed", 1, 16, 7, 6, 3, 4, x_layout="transposed"),
    Case("a constant gradient: every stride is 0", 1, 16, 8, 6, 3, 4, g_layout="constant"),
    Case("a gradient in the other format", 1, 16, 8, 6, 3, 4, g_layout="nchw"),
)  # fmt: skip
CASES = (
    *COMMON,
    Case("long sums of one sign", 1, 18, 41, 37, 1, 1, offset=2.0),
    Case("long sums of one sign, few channels", 1, 2, 67, 41, 2, 1, offset=2.0),
)

OPERATORS = {"fprop": ops.adaptive_avg_pool2d, "dgrad": ops.adaptive_avg_pool2d_dgrad}
READS = {"fprop": "x", "dgrad": "y"}


def inputs(case: Case, direction: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Guarded]:
    """The operand that a direction reads, in its layout, amid NaNs."""
    generator = torch.Generator().manual_seed(seed)
    role = READS[direction]
    value = torch.randn(case.shapes[role], generator=generator, dtype=torch.float64) + case.offset
    other = case.g_layout or ("nchw" if "nchw" in case.x_layout else "nhwc")
    return {role: place(value, case.x_layout if role == "x" else other, dtype, device)}


def call(case: Case, direction: str, t: Mapping[str, Tensor], precision: str, backend: str, strict: bool) -> Any:
    """Our operator."""
    size = (case.P, case.Q)
    if direction == "fprop":
        return ops.adaptive_avg_pool2d(t["x"], size, backend, strict)
    last = "nchw" not in case.x_layout
    return ops.adaptive_avg_pool2d_dgrad(t["y"], case.shapes["x"], last, size, backend, strict)


def reference(case: Case, direction: str, t: Mapping[str, Tensor]) -> Any:
    """torch, in the dtype of the tensors."""
    if direction == "fprop":
        return torch.ops.aten.adaptive_avg_pool2d(t["x"], [case.P, case.Q])
    return torch.ops.aten._adaptive_avg_pool2d_backward(
        t["y"].contiguous(), t["y"].new_empty(case.shapes["x"]).contiguous()
    )


def magnitude(case: Case, direction: str, t: Mapping[str, Tensor]) -> Any:
    """The sums of the absolute terms."""
    return reference(case, direction, {role: tensor.abs() for role, tensor in t.items()})


def depth(case: Case, direction: str) -> int:
    """How many terms are summed for one element."""
    size, results = (case.H * case.W, case.P * case.Q) if direction == "fprop" else (case.P * case.Q, case.H * case.W)
    return max(1, size // max(results, 1))


def nonfinite(case: Case, direction: str) -> tuple[str, ...]:
    """The operands that may hold NaN and infinities."""
    return (READS[direction],)


def problem(case: Case, direction: str, dtype: torch.dtype, precision: str, device: str = "cpu") -> dispatch.Problem:
    """The problem that dispatch sees."""
    return describe(direction, case.shapes["x"], dtype, torch.device(device), ((case.P, case.Q),))
