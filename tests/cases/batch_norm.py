"""The cases of batch_norm: the architectures' shapes, every kind of row, every combination of operands."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from support.memory import Guarded, place
from torch import Tensor

from cnnfast import dispatch, ops
from cnnfast.ops import _activation
from cnnfast.ops.batch_norm import accumulator
from cnnfast.ops.batch_norm import problem as describe

OP = "batch_norm"
DIRECTIONS = ("stats", "fprop", "dgrad", "wgrad", "backward", "backward_residual")
EPS = 1e-3


@dataclasses.dataclass(frozen=True)
class Case:
    """One batch norm of x (N, C, H, W)."""

    why: str
    N: int
    C: int
    H: int
    W: int
    training: bool = True
    has: str = "wbmv"  # which of the vectors there are, and r for a residual
    activation: str = "none"
    x_layout: str = "nhwc"
    r_layout: str = "nhwc"
    g_layout: str = "nhwc"
    offset: float = 0.5  # of x, in standard deviations

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every operand."""
        x, vector = (self.N, self.C, self.H, self.W), (self.C,)
        return {**dict.fromkeys("xrytu", x), **dict.fromkeys(("w", "b", "m", "v", "s", "dw", "db"), vector)}

    def __str__(self) -> str:
        parts = [f"{self.N}x{self.C}x{self.H}x{self.W}", "training" if self.training else "eval", self.has]
        parts += [self.activation, self.x_layout, self.r_layout if "r" in self.has else "", self.g_layout]
        parts += [f"offset{self.offset:g}"] * (self.offset != 0.5)
        return "-".join(p for p in parts if p)


CASES = (
    Case("resnet: batch norm and relu", 2, 64, 9, 9, activation="relu"),
    Case("resnet: the end of a block", 2, 64, 7, 7, has="wbmvr", activation="relu"),
    Case("resnet: the end of a block, evaluated", 2, 64, 7, 7, False, "wbmvr", "relu"),
    Case("resnet: downsampling, no activation", 2, 96, 5, 5),
    Case("mobilenet: relu6", 2, 24, 9, 9, activation="relu6"),
    Case("mobilenet: relu6 after a residual", 2, 24, 9, 9, has="wbmvr", activation="relu6"),
    Case("darknet: leaky", 2, 32, 9, 9, activation="leaky_relu"),
    Case("leaky after a residual, evaluated", 2, 32, 9, 9, False, "wbmvr", "leaky_relu"),
    Case("mobilenet v2: a residual without activation", 2, 24, 9, 9, has="wbmvr"),
    Case("inception: a wide stage, few pixels", 1, 768, 3, 3, activation="relu"),
    Case("many chunks of rows", 2, 160, 30, 31, activation="relu"),
    Case("short rows, many chunks", 3, 5, 150, 151, has="wbmvr", activation="relu"),
    Case("without affine", 2, 16, 6, 5, has="mv", activation="relu"),
    Case("weight alone", 2, 16, 6, 5, has="wmv"),
    Case("bias alone", 2, 16, 6, 5, has="bmv", activation="relu"),
    Case("without affine, evaluated", 2, 16, 6, 5, False, "mv", "relu"),
    Case("scale and shift alone", 2, 16, 6, 5, False, "wb", "relu"),
    Case("nothing but a residual", 2, 16, 6, 5, False, "r", "relu6"),
    Case("primes", 3, 13, 11, 7, has="wbmvr", activation="relu"),
    Case("one channel", 3, 1, 11, 7, activation="relu"),
    Case("three channels", 3, 3, 11, 7, activation="relu"),
    Case("a vector less one", 2, 15, 6, 5, activation="relu"),
    Case("a vector and one", 2, 17, 6, 5, activation="relu"),
    Case("more channels than a long row, odd", 1, 4099, 2, 3, activation="relu"),
    Case("a prime between", 2, 1009, 2, 3, has="wbmvr", activation="relu"),
    Case("one pixel an image: after a linear layer", 9, 40, 1, 1, activation="relu"),
    Case("one image of one row", 1, 33, 1, 17),
    Case("two values a channel", 2, 19, 1, 1),
    Case("one value a channel, evaluated", 1, 19, 1, 1, False),
    Case("empty batch, evaluated", 0, 8, 4, 4, False, "wbmvr", "relu"),
    Case("empty batch", 0, 8, 4, 4, False, activation="none"),
    Case("a mean far from zero", 2, 24, 9, 9, offset=1e4),
    Case("NCHW", 2, 12, 6, 7, activation="relu", x_layout="nchw", g_layout="nchw"),
    Case("NCHW with a residual, evaluated", 2, 12, 6, 7, False, "wbmvr", "relu", "nchw", "nchw", "nchw"),
    Case("sliced", 2, 21, 6, 7, has="wbmvr", activation="relu", x_layout="sliced", r_layout="sliced"),
    Case("only the pixels' stride is unaligned", 2, 24, 6, 6, has="wbmvr", activation="relu", x_layout="sliced"),
    Case("a part of a concatenation", 2, 24, 7, 7, activation="relu", x_layout="channels", g_layout="channels"),
    Case("a short pixel of a concatenation", 2, 5, 7, 11, activation="relu", x_layout="channels"),
    Case("expanded batch", 3, 8, 7, 6, activation="relu", x_layout="expanded"),
    Case("expanded residual", 3, 8, 7, 6, has="wbmvr", activation="relu", r_layout="expanded"),
    Case("misaligned", 2, 32, 7, 6, has="wbmvr", activation="relu", x_layout="misaligned", r_layout="misaligned"),
    Case("transposed", 2, 16, 7, 6, activation="relu", x_layout="transposed"),
    Case("a constant gradient: every stride is 0", 2, 16, 8, 6, activation="relu", g_layout="constant"),
    Case("a gradient in the other format", 2, 16, 8, 6, has="wbmvr", activation="relu", g_layout="nchw"),
)

OPERATORS = {
    "stats": ops.batch_norm_stats, "fprop": ops.batch_norm, "dgrad": ops.batch_norm_dgrad, "wgrad": ops.batch_norm_wgrad,
    "backward": ops.batch_norm_backward, "backward_residual": ops.batch_norm_backward_residual,
}  # fmt: skip
_OPERANDS = ("x", "w", "b", "m", "v", "r")
READS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(DIRECTIONS, (*_OPERANDS, "y")), "stats": ("x",), "fprop": _OPERANDS,
}  # fmt: skip
_DIMS = (0, 2, 3)


def _present(case: Case, role: str) -> bool:
    return role in case.has if role in "wbmvr" else True


def _params(case: Case, direction: str) -> tuple[Any, ...]:
    """dgrad alone is evaluation's; it reads v as a variance, whatever it was made as."""
    return (case.activation, case.training and direction != "dgrad", EPS)


def inputs(case: Case, direction: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Guarded]:
    """The operands that a direction reads, in their layouts, amid NaNs."""
    generator = torch.Generator().manual_seed(seed)
    wide = accumulator(dtype)
    layouts = {"x": case.x_layout, "r": case.r_layout, "y": case.g_layout}
    made: dict[str, Guarded] = {}
    for role in READS[direction]:
        value = torch.randn(case.shapes[role], generator=generator, dtype=torch.float64)
        if not _present(case, role):
            continue
        if role == "x":
            value = value + case.offset * (1 if dtype.itemsize > 2 else min(1.0, 4 / case.offset))
            made[role] = place(value, layouts[role], dtype, device)
            continue
        if role in "mv" and case.training and made["x"].tensor.numel():
            # On the CPU whatever the device: an operand, and so the same bits as the reference's. A card's variance of
            # many pixels, summed in another order, differs by dozens of float64's roundings.
            x = made["x"].tensor.cpu().double()
            value = x.mean(_DIMS) if role == "m" else (x.var(_DIMS, correction=0) + EPS).rsqrt()
        elif role == "v":
            value = value.abs() + 0.1
        made[role] = place(value, layouts.get(role, "nchw"), dtype if role in layouts else wide, device)
    return made


def call(case: Case, direction: str, t: Mapping[str, Tensor], precision: str, backend: str, strict: bool) -> Any:
    """Our operator."""
    params = _params(case, direction) if direction != "stats" else (EPS,)
    return OPERATORS[direction](*(t.get(role) for role in READS[direction]), *params, backend, strict)


def _along(t: Mapping[str, Tensor], role: str, missing: float) -> Any:
    return t[role].reshape(1, -1, 1, 1) if role in t else missing


def _reference(case: Case, direction: str, t: Mapping[str, Tensor], size: bool) -> Any:
    """torch's formulas, rounded to the dtype where torch's modules would round; with ``size`` of absolute terms."""
    x = t["x"]
    dtype, wide = x.dtype, x.to(accumulator(x.dtype))
    absolute = torch.abs if size else lambda v: v
    if direction == "stats":
        if not x.numel():
            zero = wide.new_zeros(case.C)
            return zero, (zero + EPS).rsqrt(), zero
        # not var(): of few values that aren't far apart it is several roundings off, in float64, too
        variance, count = (wide - wide.mean(_DIMS, keepdim=True)).square().mean(_DIMS), case.N * case.H * case.W
        return absolute(wide).mean(_DIMS), (variance + EPS).rsqrt(), variance * (count / max(1, count - 1))
    invstd = _along(t, "v", 1.0)
    training = case.training and direction != "dgrad"
    if "v" in t and not training:
        invstd = (invstd + EPS).rsqrt()
    centred = wide - _along(t, "m", 0.0)
    if size:
        centred = wide.abs() + abs(_along(t, "m", 0.0))
    xhat = centred * invstd
    scale = absolute(invstd * _along(t, "w", 1.0)) if "w" in t or "v" in t else 1.0
    z = (centred * scale + absolute(torch.as_tensor(_along(t, "b", 0.0)))).to(dtype)
    if direction == "fprop":
        total = z + absolute(t["r"]) if "r" in t else z
        return total if size else _activation.forward(total, case.activation)
    exact = (wide - _along(t, "m", 0.0)) * invstd * _along(t, "w", 1.0) + _along(t, "b", 0.0)
    dz = absolute(_activation.backward(t["y"], t.get("r", exact), case.activation)).to(wide.dtype)
    if direction == "dgrad":
        return (dz * scale).to(dtype)
    dw, db = (dz * xhat).sum(_DIMS), dz.sum(_DIMS)
    if direction == "wgrad":
        return dw, db
    t = dz
    if training:
        count, sign = max(1, case.N * case.H * case.W), 1 if size else -1
        t = dz + sign * (db.reshape(1, -1, 1, 1) + xhat * dw.reshape(1, -1, 1, 1)) / count
    t = (t * scale).to(dtype)
    return (dw, db, t) if direction == "backward" else (dw, db, t, dz.to(dtype))


def reference(case: Case, direction: str, t: Mapping[str, Tensor]) -> Any:
    """torch, in the dtype of the tensors."""
    return _reference(case, direction, t, False)


def magnitude(case: Case, direction: str, t: Mapping[str, Tensor]) -> Any:
    """The sums of the absolute terms."""
    return _reference(case, direction, t, True)


def depth(case: Case, direction: str) -> int:
    """How many terms are summed for one element."""
    return max(1, case.N * case.H * case.W) if direction not in ("fprop", "dgrad") else 4


def nonfinite(case: Case, direction: str) -> tuple[str, ...]:
    """The operands that may hold NaN and infinities."""
    return tuple(role for role in ("x", "r", "y") if role in READS[direction] and _present(case, role))


def problem(case: Case, direction: str, dtype: torch.dtype, precision: str, device: str = "cpu") -> dispatch.Problem:
    """The problem that dispatch sees."""
    params = ("none", True, EPS) if direction == "stats" else _params(case, direction)
    return describe(direction, case.shapes["x"], dtype, torch.device(device), params)
