"""The cases of bn_act_conv: convolutions between batch norms, their kinds of tile, and every combination of vectors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from support.memory import Guarded, place
from torch import Tensor

from cases import conv2d
from cnnfast import dispatch, ops
from cnnfast.ops import _activation
from cnnfast.ops.batch_norm import accumulator
from cnnfast.ops.bn_act_conv import problem as describe

OP = "bn_act_conv"
DIRECTIONS = ("fprop", "dgrad", "wgrad")
EPS = 1e-3
Conv = conv2d.Case


@dataclasses.dataclass(frozen=True)
class Case:
    """A convolution, which of m, v, w, b its input's batch norm has, if it has one, and the activation between them."""

    conv: conv2d.Case
    has: str = "mvwb"
    activation: str = "relu"
    offset: float = 0.5  # of x, in standard deviations

    @property
    def why(self) -> str:
        """The convolution's reason."""
        return self.conv.why

    def normed(self, direction: str) -> str:
        """What a direction's batch norm has: statistics alone are fprop's, whose gradient is conv2d's."""
        return self.has or ("" if direction == "fprop" else "mv")

    @property
    def params(self) -> tuple[Any, ...]:
        """As the operator takes them."""
        conv = self.conv
        return (conv.stride, conv.pads, conv.dilation, conv.groups, self.activation, EPS, EPS)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every operand."""
        s, vector = self.conv.shapes, (self.conv.C,)
        of_x = dict.fromkeys(("xm", "xv", "xw", "xb", "dw", "db"), vector)
        return {**s, "t": s["x"], **of_x, **dict.fromkeys(("ym", "yv", "ys"), (self.conv.K,))}

    def __str__(self) -> str:
        return "-".join((str(self.conv), self.has, self.activation)) + f"-offset{self.offset:g}" * (self.offset != 0.5)


CASES = (
    Case(Conv("resnet bottleneck: 1x1 up", 2, 32, 7, 7, 64, 1, 1)),
    Case(Conv("resnet basic block: its second convolution", 1, 16, 9, 8, 32, 3, 3, padding=(1, 1))),
    Case(Conv("resnet: 3x3 stride 2, four phases in the gradient", 2, 24, 9, 7, 16, 3, 3, (2, 2), (1, 1))),
    Case(Conv("resnet downsample: 1x1 stride 2", 2, 32, 9, 9, 16, 1, 1, (2, 2)), "mvwb", "none"),
    Case(Conv("statistics alone, with bias", 2, 17, 9, 9, 19, 3, 3, padding=(1, 1), bias=True), "", "none"),
    Case(Conv("statistics alone: 1x1", 3, 16, 5, 7, 48, 1, 1), "", "none"),
    Case(Conv("more tiles than are merged at once", 5, 16, 29, 29, 16, 1, 1), "", "none"),
    Case(Conv("statistics alone: groups, stride 2", 2, 48, 9, 7, 48, 3, 3, (2, 2), (1, 1), groups=2), "", "none"),
    Case(Conv("statistics alone: one more than a tile both ways", 1, 16, 5, 13, 72, 1, 1, bias=True), "", "none"),
    Case(Conv("wide groups", 2, 32, 7, 7, 64, 3, 3, padding=(1, 1), groups=2), "mvwb", "relu6"),
    Case(Conv("primes", 2, 19, 11, 7, 23, 3, 2, (2, 1), (1, 0), bias=True), "mvwb", "leaky_relu"),
    Case(Conv("one tile exactly", 1, 64, 8, 8, 64, 1, 1)),
    Case(Conv("dilated", 1, 16, 9, 8, 16, 3, 3, padding=(2, 2), dilation=(2, 2)), "mvw", "relu"),
    Case(Conv("stride beyond the kernel: phases without taps", 1, 16, 8, 7, 16, 1, 1, (3, 3), (1, 1)), "mvb", "relu"),
    Case(Conv("no affine", 2, 16, 7, 6, 16, 1, 1), "mv", "relu"),
    Case(Conv("asymmetric padding", 1, 16, 6, 7, 20, 2, 4, padding="same")),
    Case(Conv("NCHW", 2, 16, 6, 7, 20, 3, 3, padding=(1, 1), x_layout="nchw")),
    Case(Conv("sliced", 2, 16, 6, 7, 20, 3, 3, padding=(1, 1), x_layout="sliced")),
    Case(Conv("a mean far from zero", 2, 16, 9, 9, 16, 1, 1), offset=1e3),
)  # fmt: skip

OPERATORS = {"fprop": ops.bn_act_conv, "dgrad": ops.bn_act_conv_dgrad, "wgrad": ops.bn_act_conv_wgrad}
_VECTORS = ("xm", "xv", "xw", "xb")
READS = {"fprop": ("x", "w", "b"), "dgrad": ("x", "w", "y"), "wgrad": ("x", "y")}
_DIMS = (0, 2, 3)


def inputs(case: Case, direction: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Guarded]:
    """The operands that a direction reads, in their layouts, amid NaNs."""
    made = {}
    for side in ("fprop", "wgrad"):
        made.update(conv2d.inputs(case.conv, side, dtype, device, seed))
    made = {role: made[role] for role in READS[direction] if role in made}
    generator = torch.Generator().manual_seed(seed + 1)
    offset = case.offset if dtype.itemsize > 2 else min(case.offset, 4.0)
    made["x"].tensor.add_(offset)
    made["x"] = Guarded(made["x"].tensor, made["x"].buffer, made["x"].buffer.clone())
    if not case.normed(direction):
        return made
    wide, x = accumulator(dtype), made["x"].tensor.double()
    values = {
        "xm": x.mean(_DIMS), "xv": (x.var(_DIMS, correction=0) + EPS).rsqrt(),
        "xw": torch.randn(case.conv.C, generator=generator, dtype=torch.float64),
        "xb": torch.randn(case.conv.C, generator=generator, dtype=torch.float64),
    }  # fmt: skip
    made.update(
        {
            role: place(values[role].cpu(), "nchw", wide, device)
            for role in _VECTORS
            if role[1] in case.normed(direction)
        }
    )
    return made


def call(case: Case, direction: str, t: Mapping[str, Tensor], precision: str, backend: str, strict: bool) -> Any:
    """Our operator."""
    vectors, params = [t.get(role) for role in _VECTORS], (*case.params, precision, backend, strict)
    if direction == "fprop":
        return ops.bn_act_conv(t["x"], t["w"], t.get("b"), *vectors, *params)
    if direction == "dgrad":
        return ops.bn_act_conv_dgrad(t["x"], t["w"], t["y"], *vectors, *params)
    return ops.bn_act_conv_wgrad(t["x"], t["y"], *vectors, case.shapes["w"], case.conv.w_layout == "nhwc", *params)


def _along(t: Mapping[str, Tensor], role: str, missing: float) -> Any:
    return t[role].reshape(1, -1, 1, 1) if role in t else missing


def _normed(case: Case, t: Mapping[str, Tensor], size: bool) -> Tensor:
    """What the convolution reads; with ``size`` of absolute terms."""
    x = t["x"]
    if "xm" not in t:
        return x.abs() if size else x
    wide, scale = x.to(accumulator(x.dtype)), t["xv"].reshape(1, -1, 1, 1) * _along(t, "xw", 1.0)
    shift = torch.as_tensor(_along(t, "xb", 0.0))
    if size:
        return (wide.abs() + _along(t, "xm", 0.0).abs()) * scale.abs() + shift.abs()
    return _activation.forward((wide - _along(t, "xm", 0.0)) * scale + shift, case.activation).to(x.dtype)


def _reference(case: Case, direction: str, t: Mapping[str, Tensor], size: bool) -> Any:
    """torch's formulas, rounded to the dtype where the layers would round; with ``size`` of absolute terms."""
    absolute = torch.abs if size else lambda v: v
    given = {role: absolute(t[role]) for role in ("w", "b", "y") if role in t}
    if direction == "wgrad":
        return conv2d.reference(case.conv, "wgrad", {**given, "x": _normed(case, t, size)})
    if direction == "fprop":
        y = conv2d.reference(case.conv, "fprop", {**given, "x": _normed(case, t, size)})
        wide, count = y.to(accumulator(y.dtype)), y.numel() // y.shape[1]
        variance = (wide - wide.mean(_DIMS, keepdim=True)).square().mean(_DIMS)
        return y, wide.mean(_DIMS), (variance + EPS).rsqrt(), variance * (count / max(1, count - 1))
    x = t["x"]
    wide, invstd = x.to(accumulator(x.dtype)), t["xv"].reshape(1, -1, 1, 1)
    g, centred = conv2d.reference(case.conv, "dgrad", given).to(wide.dtype), wide - _along(t, "xm", 0.0)
    z = centred * (invstd * _along(t, "xw", 1.0)) + _along(t, "xb", 0.0)
    dz = _activation.backward(g, z, case.activation).to(x.dtype).to(wide.dtype)
    xhat = (wide.abs() + abs(_along(t, "xm", 0.0)) if size else centred) * invstd
    dw, db, count = (dz * xhat).sum(_DIMS), dz.sum(_DIMS), x.numel() // x.shape[1]
    inner = dz + (1 if size else -1) * (db.reshape(1, -1, 1, 1) + xhat * dw.reshape(1, -1, 1, 1)) / count
    return dw, db, (inner * absolute(invstd * _along(t, "xw", 1.0))).to(x.dtype)


def reference(case: Case, direction: str, t: Mapping[str, Tensor]) -> Any:
    """torch, in the dtype of the tensors."""
    return _reference(case, direction, t, False)


def magnitude(case: Case, direction: str, t: Mapping[str, Tensor]) -> Any:
    """The sums of the absolute terms; of statistics what an error of these does to them, relative to it.

    dy <= u |y|', |y|' the sum of y's absolute terms, changes the variance v by the mean of 2 (y - mean) dy, which is at most
    2 u sqrt(v mean(|y|'^2)), and 1 / sqrt(v + eps) by half of that over (v + eps)^1.5: operands that are truncated to tf32
    make all of y smaller, and so do cuDNN's.
    """
    found = _reference(case, direction, t, True)
    if direction != "fprop":
        return found
    y, mean, *_ = found
    _, _, invstd, _ = _reference(case, direction, t, False)
    count = y.numel() // y.shape[1]
    change = 2 * ((invstd**-2 - EPS).clamp_min(0) * y.to(invstd.dtype).square().mean(_DIMS)).sqrt()
    return y, mean, invstd + 0.5 * change * invstd**3, (change + invstd**-2) * (count / max(1, count - 1))


def depth(case: Case, direction: str) -> int:
    """How many terms are summed for one element."""
    pixels = case.conv.N * case.conv.H * case.conv.W
    return conv2d.depth(case.conv, direction) + pixels


def nonfinite(case: Case, direction: str) -> tuple[str, ...]:
    """The operands that may hold NaN and infinities where only one answer is right: those of an unpadded convolution."""
    return ("x",) if direction == "fprop" and not any(case.conv.pads) else ()


def problem(case: Case, direction: str, dtype: torch.dtype, precision: str, device: str = "cpu") -> dispatch.Problem:
    """The problem that dispatch sees."""
    s = case.shapes
    params = (*case.params, precision)
    return describe(
        direction, s["x"], s["w"], s["y"], dtype, torch.device(device), params, normed=bool(case.normed(direction))
    )
