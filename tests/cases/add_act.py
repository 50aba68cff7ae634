"""The cases of add_act: sizes around a run and a vector, and every pair of layouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from support.memory import Guarded, place
from torch import Tensor

from cnnfast import dispatch, ops
from cnnfast.ops import _activation
from cnnfast.ops.add_act import problem as describe

OP = "add_act"
DIRECTIONS = ("fprop", "dgrad")


@dataclasses.dataclass(frozen=True)
class Case:
    """A sum of two tensors (N, C, H, W); in the gradient the layouts are the result's and its gradient's."""

    why: str
    N: int
    C: int
    H: int
    W: int
    activation: str = "relu"
    x_layout: str = "nhwc"
    r_layout: str = "nhwc"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every operand."""
        return dict.fromkeys("xrygt", (self.N, self.C, self.H, self.W))

    def __str__(self) -> str:
        return f"{self.N}x{self.C}x{self.H}x{self.W}-{self.activation}-{self.x_layout}-{self.r_layout}"


CASES = (
    Case("resnet: the end of a block", 2, 64, 7, 7),
    Case("no activation", 2, 64, 7, 7, "none"),
    Case("relu6", 2, 24, 9, 9, "relu6"),
    Case("leaky", 2, 24, 9, 9, "leaky_relu"),
    Case("a run", 1, 1024, 1, 1),
    Case("a run less one", 1, 1023, 1, 1),
    Case("runs and one", 1, 41, 5, 25),
    Case("more runs than are walked side by side", 3, 64, 23, 24),
    Case("one element", 1, 1, 1, 1),
    Case("one channel", 3, 1, 9, 7),
    Case("three channels", 3, 3, 9, 7),
    Case("empty batch", 0, 4, 6, 6),
    Case("empty image", 2, 4, 0, 6),
    Case("NCHW", 2, 12, 6, 7, x_layout="nchw", r_layout="nchw"),
    Case("mixed", 2, 12, 6, 7, x_layout="nchw"),
    Case("mixed, the other way", 2, 12, 6, 7, r_layout="nchw"),
    Case("mixed, threads", 2, 40, 26, 27, r_layout="nchw"),
    Case("sliced", 2, 21, 6, 7, x_layout="sliced", r_layout="sliced"),
    Case("sliced and whole", 2, 21, 6, 7, r_layout="sliced"),
    Case("only the pixels' stride is unaligned", 2, 24, 6, 6, x_layout="sliced"),
    Case("only the residual's pixels' stride is unaligned", 2, 24, 6, 6, r_layout="sliced"),
    Case("sliced NCHW", 2, 21, 6, 7, x_layout="sliced_nchw", r_layout="nchw"),
    Case("a part of a concatenation", 2, 24, 7, 7, x_layout="channels"),
    Case("expanded batch", 3, 8, 7, 6, r_layout="expanded"),
    Case("expanded channels", 3, 8, 7, 6, x_layout="expanded_c"),
    Case("transposed, both", 2, 16, 7, 6, x_layout="transposed", r_layout="transposed"),
    Case("transposed", 2, 16, 7, 6, x_layout="transposed"),
    Case("constant", 2, 16, 8, 6, r_layout="constant"),
    Case("misaligned", 2, 16, 7, 6, x_layout="misaligned", r_layout="misaligned_nchw"),
    Case("only the residual is misaligned", 1, 16, 5, 6, r_layout="misaligned"),
)

OPERATORS = {"fprop": ops.add_act, "dgrad": ops.add_act_dgrad}
READS = {"fprop": ("x", "r"), "dgrad": ("y", "g")}


def inputs(case: Case, direction: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Guarded]:
    """The operands that a direction reads, in their layouts, amid NaNs."""
    generator = torch.Generator().manual_seed(seed)
    return {
        role: place(torch.randn(case.shapes[role], generator=generator, dtype=torch.float64) * 3, layout, dtype, device)
        for role, layout in zip(READS[direction], (case.x_layout, case.r_layout), strict=True)
    }


def call(case: Case, direction: str, t: Mapping[str, Tensor], precision: str, backend: str, strict: bool) -> Any:
    """Our operator."""
    return OPERATORS[direction](*(t[role] for role in READS[direction]), case.activation, backend, strict)


def reference(case: Case, direction: str, t: Mapping[str, Tensor]) -> Tensor:
    """torch, in the dtype of the tensors."""
    if direction == "fprop":
        return _activation.forward(t["x"] + t["r"], case.activation)
    return _activation.backward(t["g"], t["y"], case.activation)


def magnitude(case: Case, direction: str, t: Mapping[str, Tensor]) -> Tensor:
    """The sums of the absolute terms."""
    return t["x"].abs() + t["r"].abs() if direction == "fprop" else t["g"].abs()


def depth(case: Case, direction: str) -> int:
    """How many terms are summed for one element."""
    return 2


def nonfinite(case: Case, direction: str) -> tuple[str, ...]:
    """The operands that may hold NaN and infinities."""
    return READS[direction]


def problem(case: Case, direction: str, dtype: torch.dtype, precision: str, device: str = "cpu") -> dispatch.Problem:
    """The problem that dispatch sees."""
    return describe(direction, case.shapes["x"], dtype, torch.device(device), case.activation)
