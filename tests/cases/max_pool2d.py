"""The cases of max_pool2d: the architectures' poolings, and every shape that breaks a kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from support.memory import Guarded, place
from torch import Tensor

from cnnfast import dispatch, ops
from cnnfast.ops.max_pool2d import output_shape
from cnnfast.ops.max_pool2d import problem as describe

OP = "max_pool2d"
DIRECTIONS = ("fprop", "indices", "dgrad", "jvp", "taps", "scatter")
NO_TAP = 255  # in k, where no tap of a window is in the image


@dataclasses.dataclass(frozen=True)
class Case:
    """One max pooling of x (N, C, H, W) over R x S windows, operands in these layouts."""

    why: str
    N: int
    C: int
    H: int
    W: int
    R: int
    S: int
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False
    x_layout: str = "nhwc"
    g_layout: str = ""  # of the gradient or tangent; "": x's format
    ties: bool = False  # small integers: many equal elements

    @property
    def params(self) -> tuple[Any, ...]:
        """As the operators take them."""
        return ((self.R, self.S), self.stride, self.padding, self.dilation, self.ceil_mode)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every operand."""
        x = (self.N, self.C, self.H, self.W)
        y = output_shape(x, self.params)
        return {"x": x, "y": y, "i": y, "t": x, "k": y}

    def __str__(self) -> str:
        parts = [f"{self.N}x{self.C}x{self.H}x{self.W}-{self.R}x{self.S}"]
        for short, value, default in (
            ("s", self.stride, (0, 0)), ("p", self.padding, (0, 0)), ("d", self.dilation, (1, 1)),
        ):  # fmt: skip
            if value != default:
                parts.append(short + ".".join(map(str, value)))
        parts += ["ceil"] * self.ceil_mode + ["ties"] * self.ties
        return "-".join(p for p in [*parts, self.x_layout, self.g_layout] if p)


NETWORKS = (
    Case("resnet stem: 3x3 stride 2, padded", 1, 64, 24, 24, 3, 3, (2, 2), (1, 1)),
    Case("vgg16: 2x2 stride 2", 2, 32, 14, 14, 2, 2, (2, 2)),
    Case("alexnet: 3x3 stride 2 without padding", 1, 24, 13, 13, 3, 3, (2, 2), x_layout="nchw"),
    Case("googlenet: 3x3 stride 2, ceil", 1, 48, 14, 14, 3, 3, (2, 2), ceil_mode=True),
    Case("googlenet branch: 3x3 stride 1", 1, 40, 7, 7, 3, 3, (1, 1), (1, 1), ceil_mode=True),
    Case("googlenet: 2x2 stride 2, ceil, of a part of a concatenation", 1, 24, 7, 7, 2, 2, (2, 2), ceil_mode=True,
         x_layout="channels"),
    Case("SPP: 5x5 stride 1", 1, 16, 8, 8, 5, 5, (1, 1), (2, 2)),
)  # fmt: skip
SHAPES = (
    Case("primes", 3, 13, 11, 7, 3, 2, (2, 3), (1, 1)),
    Case("one channel", 2, 1, 9, 10, 3, 3, (2, 2), (1, 1)),
    Case("three channels, NCHW", 2, 3, 9, 10, 2, 3, (2, 1), (1, 1), x_layout="nchw"),
    Case("channels: a vector less one", 1, 15, 6, 5, 2, 2, (1, 1)),
    Case("channels: a vector and one", 1, 17, 6, 5, 2, 2, (1, 1)),
    Case("channels: a block and one", 1, 65, 5, 6, 3, 3, (1, 1), (1, 1)),
    Case("1x1 map", 2, 8, 1, 1, 1, 1, (1, 1)),
    Case("1x1 window", 1, 8, 4, 5, 1, 1, (1, 1)),
    Case("window as large as the map", 2, 9, 5, 4, 5, 4, (1, 1)),
    Case("rows only", 1, 12, 9, 6, 3, 1, (2, 1), (1, 0)),
    Case("columns only", 1, 12, 6, 9, 1, 4, (1, 3), (0, 2)),
    Case("stride larger than the window", 1, 8, 11, 12, 2, 2, (3, 4)),
    Case("stride larger than the map", 1, 8, 4, 5, 2, 2, (7, 9)),
    Case("dilation", 1, 10, 9, 11, 3, 2, (1, 2), (1, 1), (2, 3)),
    Case("dilation leaves windows without elements", 1, 6, 2, 2, 2, 2, (1, 1), (1, 1), (3, 3)),
    Case("dilation leaves rows of windows without elements", 1, 6, 2, 5, 2, 2, (1, 1), (1, 1), (3, 1)),
    Case("dilation leaves columns of windows without elements", 1, 6, 5, 2, 2, 2, (1, 1), (1, 1), (1, 3)),
    Case("ceil: the last window would start in the padding", 1, 8, 6, 5, 2, 2, (3, 3), (1, 1), ceil_mode=True),
    Case("SPP: 9x9 stride 1, rows first", 1, 33, 13, 12, 9, 9, (1, 1), (4, 4)),
    Case("ties, rows first", 2, 35, 12, 13, 9, 7, (1, 1), (4, 3), ties=True),
    Case("ties, rows first, dilation", 1, 34, 15, 16, 8, 8, (1, 1), (4, 4), (2, 2), ties=True),
    Case("ties, few channels", 2, 3, 15, 16, 3, 4, (2, 1), (1, 2), ties=True),
    Case("ties, few channels of many", 2, 3, 9, 10, 3, 3, (2, 2), (1, 1), ties=True, x_layout="sliced"),
    Case("empty batch", 0, 4, 6, 6, 2, 2, (2, 2)),
    Case("ties: the first wins", 2, 9, 8, 7, 3, 3, (1, 1), (1, 1), ties=True),
    Case("ties, strided, NCHW", 1, 9, 8, 7, 2, 3, (2, 2), (1, 1), ties=True, x_layout="nchw"),
)
LAYOUTS = (
    Case("sliced", 2, 9, 7, 6, 3, 3, (2, 2), (1, 1), x_layout="sliced"),
    Case("sliced NCHW", 2, 9, 7, 6, 3, 3, (2, 2), (1, 1), x_layout="sliced_nchw"),
    Case("expanded batch", 3, 8, 7, 6, 2, 2, (2, 2), x_layout="expanded"),
    Case("expanded channels", 2, 8, 7, 6, 2, 2, (2, 2), x_layout="expanded_c"),
    Case("misaligned", 1, 16, 7, 6, 3, 3, (2, 2), (1, 1), x_layout="misaligned"),
    Case("transposed", 1, 16, 7, 6, 3, 3, (2, 2), (1, 1), x_layout="transposed"),
    Case("a constant gradient: every stride is 0", 1, 16, 8, 6, 3, 3, (2, 2), (1, 1), g_layout="constant"),
    Case("a gradient in the other format", 1, 16, 8, 6, 3, 3, (2, 2), (1, 1), g_layout="nchw"),
)
CASES = NETWORKS + SHAPES + LAYOUTS

OPERATORS = {
    "fprop": ops.max_pool2d, "indices": ops.max_pool2d_indices, "dgrad": ops.max_pool2d_dgrad,
    "jvp": ops.max_pool2d_jvp, "taps": ops.max_pool2d_recorded, "scatter": ops.max_pool2d_dgrad,
}  # fmt: skip
# scatter reads no value of x, but its layout is that of t
READS = {
    "fprop": ("x",), "indices": ("x",), "dgrad": ("x", "y"), "jvp": ("x", "t"), "taps": ("x",), "scatter": ("x", "y", "k"),
}  # fmt: skip


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
    """Our operator; windows without elements are left to a test of their own."""
    operands = [t[role] for role in READS[direction]] + [None] * (direction == "dgrad")
    out = OPERATORS[direction](*operands, *case.params, backend, strict)
    if direction in ("fprop", "indices", "taps") and isinstance(out, (Tensor, tuple)):
        return _without_empty(case, out)
    return out


def reference(case: Case, direction: str, t: Mapping[str, Tensor]) -> Any:
    """torch, in the dtype of the tensors."""
    x = t["x"]
    kernel, *rest, ceil_mode = case.params
    if x.numel() == 0:
        y = x.new_empty(case.shapes["y"])
        return results_of_nothing(x, y)[direction]
    values, indices = torch.ops.aten.max_pool2d_with_indices(x, list(kernel), *map(list, rest), ceil_mode)
    if direction == "fprop":
        return _without_empty(case, values)
    if direction == "indices":
        return _without_empty(case, (values, indices))
    if direction == "taps":
        return _without_empty(case, (values, numbers(indices, axes(case))))
    empty = _empty(case, x.device)
    if direction == "scatter":
        empty, indices = t["k"] == NO_TAP, offsets(t["k"], axes(case))
    indices = indices.masked_fill(empty, 0)
    if direction in ("dgrad", "scatter"):
        g = t["y"].masked_fill(empty, 0).contiguous()
        args = (list(kernel), *map(list, rest), ceil_mode)
        return torch.ops.aten.max_pool2d_with_indices_backward(g, x.contiguous(), *args, indices.contiguous())
    return t["t"].flatten(2).gather(2, indices.flatten(2)).reshape(values.shape).masked_fill(empty, 0)


def results_of_nothing(x: Tensor, y: Tensor) -> dict[str, Any]:
    """Every direction's results for an empty batch."""
    return {
        "fprop": y, "indices": (y, y.long()), "dgrad": x.clone(), "jvp": y, "taps": (y, y.to(torch.uint8)),
        "scatter": x.clone(),
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Axes:
    """Along both axes: where windows begin and end, what lies between their taps, how many they have, the map's size."""

    begins: tuple[Tensor, Tensor]  # (P, 1) and (Q,)
    ends: tuple[Tensor, Tensor]
    steps: tuple[int, int]
    taps: tuple[int, int]
    size: tuple[int, int]


def axes(case: Case) -> Axes:
    """Those of a case."""
    _, _, p, q = case.shapes["y"]
    (sh, sw), (ph, pw), (dh, dw) = case.stride, case.padding, case.dilation
    h, w = torch.arange(p)[:, None] * sh - ph, torch.arange(q) * sw - pw
    ends = (h + (case.R - 1) * dh + 1, w + (case.S - 1) * dw + 1)
    return Axes((h, w), ends, case.dilation, (case.R, case.S), (case.H, case.W))


def numbers(indices: Tensor, axes: Axes) -> Tensor:
    """The taps with offsets h*W + w."""
    r, s = (
        (at - begin.to(at.device)) // step
        for at, begin, step in zip(
            (indices // axes.size[1], indices % axes.size[1]), axes.begins, axes.steps, strict=True
        )
    )
    return (r * axes.taps[1] + s).to(torch.uint8)


def offsets(k: Tensor, axes: Axes) -> Tensor:
    """The offsets h*W + w of taps; of those outside of the map any."""
    h, w = _places(k.long(), axes)
    return h * axes.size[1] + w


def _places(k: Tensor, axes: Axes) -> list[Tensor]:
    return [
        begin.to(k.device) + number * step
        for number, begin, step in zip((k // axes.taps[1], k % axes.taps[1]), axes.begins, axes.steps, strict=True)
    ]


def drawn(case: Any, axes: Axes, generator: torch.Generator) -> Tensor:
    """Random taps of the windows in the map; NO_TAP where what was drawn is none."""
    k = torch.randint(axes.taps[0] * axes.taps[1], case.shapes["k"], generator=generator)
    for at, end, size in zip(_places(k, axes), axes.ends, axes.size, strict=True):
        k = k.masked_fill((at < 0) | (at >= end) | (at >= size), NO_TAP)
    return k


def _empty(case: Case, device: torch.device) -> Tensor:
    """Which windows have no element."""

    def has_tap(axis: int, outputs: int, size: int) -> Tensor:
        first = torch.arange(outputs, device=device) * case.stride[axis] - case.padding[axis]
        taps = first[:, None] + torch.arange((case.R, case.S)[axis], device=device) * case.dilation[axis]
        return ((taps >= 0) & (taps < size)).any(1)

    _, _, p, q = case.shapes["y"]
    return ~(has_tap(0, p, case.H)[:, None] & has_tap(1, q, case.W))


def _without_empty(case: Case, out: Any) -> Any:
    if "without elements" not in case.why:
        return out
    values = (v.masked_fill(_empty(case, v.device), 0) for v in (out if isinstance(out, tuple) else (out,)))
    return tuple(values) if isinstance(out, tuple) else next(values)


def magnitude(case: Case, direction: str, t: Mapping[str, Tensor]) -> Any:
    """The sums of the absolute terms."""
    if direction in ("dgrad", "scatter"):
        return reference(case, direction, {**t, "y": t["y"].abs()})
    out = reference(case, direction, t)
    return (out[0].abs(), out[1]) if isinstance(out, tuple) else out.abs()


def depth(case: Case, direction: str) -> int:
    """How many terms are summed for one element."""
    return case.R * case.S if direction in ("dgrad", "scatter") else 1


def nonfinite(case: Case, direction: str) -> tuple[str, ...]:
    """The operands that may hold NaN and infinities."""
    return tuple(role for role in READS[direction] if role != "k") if "without elements" not in case.why else ()


def problem(case: Case, direction: str, dtype: torch.dtype, precision: str, device: str = "cpu") -> dispatch.Problem:
    """The problem that dispatch sees."""
    return describe(direction, case.shapes["x"], dtype, torch.device(device), case.params)
