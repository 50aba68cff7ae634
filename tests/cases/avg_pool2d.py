"""The cases of avg_pool2d: the architectures' poolings, and every shape that breaks a kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from support.memory import Guarded, place
from torch import Tensor

from cnnfast import dispatch, ops
from cnnfast.ops.avg_pool2d import output_shape
from cnnfast.ops.avg_pool2d import problem as describe

OP = "avg_pool2d"
DIRECTIONS = ("fprop", "dgrad")


@dataclasses.dataclass(frozen=True)
class Case:
    """One average pooling of x (N, C, H, W) over R x S windows, operands in these layouts."""

    why: str
    N: int
    C: int
    H: int
    W: int
    R: int
    S: int
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor_override: int | None = None
    x_layout: str = "nhwc"
    g_layout: str = ""  # of the gradient; "": x's format
    offset: float = 0.0  # added to the values: sums that grow with every addend

    @property
    def params(self) -> tuple[Any, ...]:
        """As the operators take them."""
        return (
            (self.R, self.S),
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every operand."""
        x = (self.N, self.C, self.H, self.W)
        return {"x": x, "y": output_shape(x, self.params)}

    def __str__(self) -> str:
        parts = [f"{self.N}x{self.C}x{self.H}x{self.W}-{self.R}x{self.S}-s" + ".".join(map(str, self.stride))]
        parts += [f"p{self.padding[0]}.{self.padding[1]}"] * (self.padding != (0, 0)) + ["ceil"] * self.ceil_mode
        parts += ["without_pad"] * (not self.count_include_pad) + ["offset"] * bool(self.offset)
        parts += [f"over{self.divisor_override}"] * (self.divisor_override is not None)
        return "-".join(p for p in [*parts, self.x_layout, self.g_layout] if p)


NETWORKS = (
    Case("densenet's transition: 2x2 stride 2", 2, 32, 14, 14, 2, 2, (2, 2)),
    Case("inception's branch: 3x3 stride 1, padded", 1, 48, 9, 8, 3, 3, (1, 1), (1, 1)),
    Case("resnet-d's shortcut: 2x2 stride 2, ceil, padding doesn't count", 1, 40, 7, 7, 2, 2, (2, 2), ceil_mode=True,
         count_include_pad=False),
    Case("the head of old networks: 7x7 to 1x1", 2, 64, 7, 7, 7, 7, (1, 1)),
    Case("a part of a concatenation", 1, 24, 8, 8, 3, 3, (2, 2), (1, 1), x_layout="channels"),
)  # fmt: skip
SHAPES = (
    Case("primes", 3, 13, 11, 7, 3, 2, (2, 3), (1, 1)),
    Case("primes, padding doesn't count", 3, 29, 11, 7, 3, 2, (2, 3), (1, 1), count_include_pad=False),
    Case("one channel", 2, 1, 9, 10, 3, 3, (2, 2), (1, 1)),
    Case("one channel, overlapping, padding doesn't count", 2, 1, 9, 10, 3, 3, (1, 1), (1, 1), count_include_pad=False),
    Case("three channels, NCHW", 2, 3, 9, 10, 2, 3, (2, 1), (1, 1), x_layout="nchw"),
    Case("three channels", 2, 3, 9, 10, 3, 3, (2, 2), (1, 1), ceil_mode=True),
    Case("three channels of many", 2, 3, 9, 10, 3, 3, (1, 2), (1, 0), x_layout="sliced"),
    Case("channels: a vector less one", 1, 15, 6, 5, 2, 2, (1, 1)),
    Case("channels: a vector and one", 1, 17, 6, 5, 2, 2, (1, 1)),
    Case("channels: a block and one", 1, 65, 5, 6, 3, 3, (1, 1), (1, 1)),
    Case("1x1 map", 2, 8, 1, 1, 1, 1, (1, 1)),
    Case("1x1 window", 1, 18, 4, 5, 1, 1, (1, 1)),
    Case("window as large as the map", 2, 19, 5, 4, 5, 4, (1, 1)),
    Case("window larger than the map: padding", 2, 19, 3, 2, 6, 4, (1, 1), (3, 2), count_include_pad=False),
    Case("rows only", 1, 20, 9, 6, 3, 1, (2, 1), (1, 0)),
    Case("columns only", 1, 20, 6, 9, 1, 4, (1, 3), (0, 2)),
    Case("stride larger than the window: elements in none", 1, 24, 11, 12, 2, 2, (3, 4)),
    Case("stride larger than the window, few channels", 1, 5, 11, 12, 2, 2, (3, 4)),
    Case("stride larger than the map", 1, 24, 4, 5, 2, 2, (7, 9)),
    Case("ceil: the last window would start in the padding", 1, 24, 6, 5, 2, 2, (3, 3), (1, 1), ceil_mode=True),
    Case("ceil: the last window reaches beyond the padding", 1, 24, 8, 9, 4, 4, (3, 3), (1, 1), ceil_mode=True),
    Case("the same, few channels", 1, 6, 8, 9, 4, 4, (3, 3), (1, 1), ceil_mode=True),
    Case("a divisor", 1, 21, 7, 6, 3, 3, (2, 2), (1, 1), divisor_override=5),
    Case("a negative divisor, few channels", 1, 4, 7, 6, 3, 3, (2, 1), (1, 1), divisor_override=-3),
    Case("large overlapping windows: columns after rows", 1, 33, 13, 12, 7, 9, (1, 1), (3, 4)),
    Case("the same, padding doesn't count", 2, 33, 13, 12, 7, 9, (1, 1), (3, 4), count_include_pad=False),
    Case("long sums of one sign", 1, 18, 41, 37, 41, 37, (1, 1), offset=2.0),
    Case("long sums of one sign, few channels", 1, 2, 67, 41, 67, 41, (1, 1), offset=2.0),
    Case("long overlapping sums of one sign", 1, 17, 40, 44, 35, 41, (1, 1), (17, 20), offset=2.0),
    Case("enough for two threads", 2, 48, 24, 23, 3, 3, (2, 2), (1, 1)),
    Case("one row of results: threads share channels", 1, 195, 19, 23, 19, 23, (1, 1)),
    Case("empty batch", 0, 4, 6, 6, 2, 2, (2, 2)),
)
LAYOUTS = (
    Case("sliced", 2, 19, 7, 6, 3, 3, (2, 2), (1, 1), x_layout="sliced"),
    Case("sliced NCHW", 2, 9, 7, 6, 3, 3, (2, 2), (1, 1), x_layout="sliced_nchw"),
    Case("expanded batch", 3, 24, 7, 6, 2, 2, (2, 2), x_layout="expanded"),
    Case("expanded channels", 2, 8, 7, 6, 2, 2, (2, 2), x_layout="expanded_c"),
    Case("misaligned", 1, 16, 7, 6, 3, 3, (2, 2), (1, 1), x_layout="misaligned"),
    Case("transposed", 1, 16, 7, 6, 3, 3, (2, 2), (1, 1), x_layout="transposed"),
    Case("a constant gradient: every stride is 0", 1, 16, 8, 6, 3, 3, (2, 2), (1, 1), g_layout="constant"),
    Case("a gradient in the other format", 1, 16, 8, 6, 3, 3, (2, 2), (1, 1), g_layout="nchw"),
)  # fmt: skip
CASES = NETWORKS + SHAPES + LAYOUTS

OPERATORS = {"fprop": ops.avg_pool2d, "dgrad": ops.avg_pool2d_dgrad}
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
    if direction == "fprop":
        return ops.avg_pool2d(t["x"], *case.params, backend, strict)
    return ops.avg_pool2d_dgrad(t["y"], case.shapes["x"], "nchw" not in case.x_layout, *case.params, backend, strict)


def reference(case: Case, direction: str, t: Mapping[str, Tensor]) -> Any:
    """torch, in the dtype of the tensors."""
    kernel, stride, padding, *rest = case.params
    if direction == "fprop":
        return torch.ops.aten.avg_pool2d(t["x"], list(kernel), list(stride), list(padding), *rest)
    x = t["y"].new_zeros(case.shapes["x"]).requires_grad_()
    y = torch.ops.aten.avg_pool2d(x, list(kernel), list(stride), list(padding), *rest)
    return torch.autograd.grad(y, x, t["y"].contiguous())[0]


def magnitude(case: Case, direction: str, t: Mapping[str, Tensor]) -> Any:
    """The sums of the absolute terms."""
    return reference(case, direction, {role: tensor.abs() for role, tensor in t.items()}).abs()


def depth(case: Case, direction: str) -> int:
    """How many terms are summed for one element."""
    return case.R * case.S


def nonfinite(case: Case, direction: str) -> tuple[str, ...]:
    """The operands that may hold NaN and infinities."""
    return (READS[direction],)


def problem(case: Case, direction: str, dtype: torch.dtype, precision: str, device: str = "cpu") -> dispatch.Problem:
    """The problem that dispatch sees."""
    return describe(direction, case.shapes["x"], dtype, torch.device(device), case.params)
