"""The cases of conv_bn_act: convolutions of every kernel's kind, with every combination of what an epilogue adds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from support.memory import Guarded, place
from torch import Tensor

from cases import conv2d
from cnnfast import dispatch, ops
from cnnfast.dispatch import ACCUMULATORS
from cnnfast.ops import _activation
from cnnfast.ops.conv_bn_act import problem as describe

OP = "conv_bn_act"
DIRECTIONS = ("fprop",)
Conv = conv2d.Case


@dataclasses.dataclass(frozen=True)
class Case:
    """A convolution, and what its epilogue has: some of s(cale), (s)h(ift), r(esidual), and an activation."""

    conv: conv2d.Case
    has: str = "shr"
    activation: str = "relu"
    r_layout: str = ""  # "": the result's

    @property
    def why(self) -> str:
        """The convolution's reason."""
        return self.conv.why

    @property
    def params(self) -> tuple[Any, ...]:
        """As the operator takes them."""
        return (self.conv.stride, self.conv.pads, self.conv.dilation, self.conv.groups, self.activation)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every operand."""
        s = self.conv.shapes
        return {**s, "scale": (self.conv.K,), "shift": (self.conv.K,), "r": s["y"]}

    def __str__(self) -> str:
        return "-".join(p for p in (str(self.conv), self.has, self.activation, self.r_layout) if p)


CASES = (
    Case(Conv("resnet stem", 1, 3, 22, 22, 64, 7, 7, (2, 2), (3, 3)), "sh"),
    Case(Conv("resnet basic block, its second convolution", 1, 32, 8, 8, 32, 3, 3, padding=(1, 1))),
    Case(Conv("resnet bottleneck: 1x1 up", 2, 32, 7, 7, 128, 1, 1)),
    Case(Conv("resnet downsample: 1x1 stride 2", 2, 32, 9, 9, 64, 1, 1, (2, 2)), "sh", "none"),
    Case(Conv("mobilenet: depthwise", 1, 32, 9, 9, 32, 3, 3, (2, 2), (1, 1), groups=32), "sh", "relu6"),
    Case(Conv("resnext: 4 channels a group", 1, 32, 8, 8, 32, 3, 3, padding=(1, 1), groups=8), "shr", "leaky_relu"),
    Case(Conv("resnext: 8 channels a group, stride 2", 1, 32, 9, 8, 32, 3, 3, (2, 2), (1, 1), groups=4), "sh", "relu"),
    Case(Conv("resnext: 16 channels a group", 1, 32, 7, 7, 32, 3, 3, padding=(1, 1), groups=2)),
    Case(Conv("32 channels a group", 2, 64, 5, 6, 64, 1, 1, groups=2, bias=True), "sr", "relu6"),
    Case(Conv("8 channels a group, dilated", 1, 24, 8, 9, 24, 3, 3, dilation=(2, 2), groups=3), "r", "none"),
    Case(Conv("4 channels a group, two images", 2, 24, 6, 6, 24, 3, 3, groups=6), "h", "leaky_relu"),
    Case(Conv("groups that aren't vectors", 1, 36, 8, 8, 48, 3, 3, padding=(1, 1), groups=4), "shr", "relu6"),
    Case(Conv("squeeze and excite: a matrix-vector product", 1, 48, 1, 1, 40, 1, 1, bias=True), "", "relu"),
    Case(Conv("darknet: leaky, with bias", 1, 24, 13, 13, 32, 3, 3, padding=(1, 1), bias=True), "sh", "leaky_relu"),
    Case(Conv("primes", 2, 13, 11, 7, 17, 3, 2, (2, 1), (1, 0), bias=True), "shr", "relu"),
    Case(Conv("residual alone", 2, 16, 6, 5, 31, 3, 3, padding=(1, 1)), "r", "none"),
    Case(Conv("residual and activation", 2, 16, 6, 5, 33, 3, 3, padding=(1, 1)), "r", "relu"),
    Case(Conv("scale alone", 1, 16, 6, 5, 15, 1, 1), "s", "none"),
    Case(Conv("shift alone", 1, 16, 6, 5, 1, 1, 1), "h", "relu6"),
    Case(Conv("activation alone", 1, 5, 6, 5, 14, 3, 3), "", "relu"),
    Case(Conv("nothing: conv2d", 1, 5, 6, 5, 14, 3, 3, bias=True), "", "none"),
    Case(Conv("one channel", 1, 1, 6, 5, 1, 3, 3), "shr", "relu"),
    Case(Conv("a reduction in chunks", 1, 1200, 4, 4, 40, 3, 3, padding=(1, 1)), "shr", "relu"),
    Case(Conv("Winograd's chains of sums", 1, 72, 18, 17, 36, 3, 3, padding=(1, 1)), "shr", "relu"),
    Case(Conv("5x5 by Winograd", 1, 70, 19, 18, 36, 5, 5, padding=(2, 2)), "shr", "relu"),
    Case(Conv("5x5 by Winograd, without padding", 2, 66, 13, 15, 20, 5, 5, bias=True), "sh", "leaky_relu"),
    Case(Conv("5x5 by Winograd in groups", 1, 130, 14, 15, 40, 5, 5, padding=(2, 1), groups=2), "r", "relu6"),
    Case(Conv("1x3 by Winograd", 1, 70, 17, 19, 40, 1, 3, padding=(0, 1), bias=True), "shr", "relu"),
    Case(Conv("3x1 by Winograd", 1, 70, 17, 19, 20, 3, 1, padding=(1, 0)), "sh", "leaky_relu"),
    Case(Conv("1x7 by Winograd", 1, 70, 17, 19, 36, 1, 7, padding=(0, 3)), "shr", "relu"),
    Case(Conv("7x1 by Winograd", 2, 64, 17, 13, 20, 7, 1, padding=(3, 0)), "r", "none"),
    Case(Conv("3x3 stride 2 by Winograd", 2, 70, 17, 18, 36, 3, 3, (2, 2), (1, 1), bias=True), "shr", "relu"),
    Case(Conv("3x3 stride 2 by Winograd in groups", 1, 66, 15, 13, 40, 3, 3, (2, 2), groups=2), "r", "leaky_relu"),
    Case(Conv("wide maps", 1, 8, 3, 70, 20, 1, 7, padding=(0, 3)), "shr", "relu"),
    Case(Conv("no input channel reaches a pixel", 1, 4, 3, 3, 8, 1, 1, padding=(2, 2)), "shr", "none"),
    Case(Conv("asymmetric padding", 1, 4, 6, 7, 20, 2, 4, padding="same"), "shr", "relu"),
    Case(Conv("empty batch", 0, 4, 6, 6, 8, 3, 3), "shr", "relu"),
    Case(Conv("NCHW", 2, 12, 6, 7, 20, 3, 3, padding=(1, 1), x_layout="nchw"), "shr", "relu"),
    Case(Conv("NCHW residual of a channels_last result", 2, 12, 6, 7, 20, 3, 3), "shr", "relu", "nchw"),
    Case(Conv("channels_last residual of an NCHW result", 2, 12, 6, 7, 20, 3, 3, x_layout="nchw"), "r", "relu", "nhwc"),
    Case(Conv("sliced residual", 2, 12, 6, 7, 20, 3, 3, x_layout="sliced"), "shr", "relu", "sliced"),
    Case(Conv("expanded residual", 3, 12, 6, 7, 20, 1, 1), "shr", "relu", "expanded"),
    Case(Conv("constant residual", 1, 16, 6, 7, 16, 3, 3, groups=16), "shr", "relu6", "constant"),
    Case(Conv("depthwise 5x5, with all that there is", 2, 24, 7, 9, 24, 5, 5, padding=(2, 2), groups=24, bias=True)),
    Case(Conv("depthwise 3x3 stride 2 on more channels than a block has", 1, 264, 5, 6, 264, 3, 3, (2, 2), (1, 1),
              groups=264, bias=True), "shr", "relu6", "channels"),
    Case(Conv("depthwise 7x7 on an odd number of channels", 1, 13, 6, 7, 13, 7, 7, padding=(3, 3), groups=13, bias=True,
              x_layout="sliced"), "sr", "leaky_relu"),
    Case(Conv("depthwise, dilated: a filter that no kernel is made for", 2, 16, 7, 6, 16, 3, 2, padding=(2, 1),
              dilation=(2, 2), groups=16), "hr", "none"),
    Case(Conv("depthwise, a residual that takes no packs", 1, 16, 6, 7, 16, 3, 3, padding=(1, 1), groups=16), "r", "relu",
         "misaligned"),
    Case(Conv("residual off alignment, depthwise", 1, 17, 6, 7, 17, 3, 3, padding=(1, 1), groups=17), "shr", "relu",
         "misaligned"),
)  # fmt: skip

OPERATORS = {"fprop": ops.conv_bn_act}


def inputs(case: Case, direction: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Guarded]:
    """The operands, in their layouts, amid NaNs."""
    made = conv2d.inputs(case.conv, direction, dtype, device, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    wide = ACCUMULATORS.get(dtype, torch.float32)
    nchw = "nchw" in case.conv.x_layout
    for role, letter, type, layout in (
        ("scale", "s", wide, "nchw"), ("shift", "h", wide, "nchw"),
        ("r", "r", dtype, case.r_layout or ("nchw" if nchw else "nhwc")),
    ):  # fmt: skip
        value = torch.randn(case.shapes[role], generator=generator, dtype=torch.float64)
        if letter in case.has:
            made[role] = place(value, layout, type, device)
    return made


def call(case: Case, direction: str, t: Mapping[str, Tensor], precision: str, backend: str, strict: bool) -> Tensor:
    """Our operator."""
    tensors = (t["x"], t["w"], *(t.get(role) for role in ("b", "scale", "shift", "r")))
    return ops.conv_bn_act(*tensors, *case.params, precision, backend, strict)


def _linear(case: Case, t: Mapping[str, Tensor]) -> Tensor:
    z = conv2d.reference(case.conv, "fprop", t)
    dtype = z.dtype
    if "s" in case.has:
        z = z * t["scale"].reshape(1, -1, 1, 1)
    if "h" in case.has:
        z = z + t["shift"].reshape(1, -1, 1, 1)
    z = z.to(dtype)
    return z + t["r"] if "r" in case.has else z


def reference(case: Case, direction: str, t: Mapping[str, Tensor]) -> Tensor:
    """torch, step by step, in the dtype of the tensors."""
    return _activation.forward(_linear(case, t), case.activation)


def magnitude(case: Case, direction: str, t: Mapping[str, Tensor]) -> Tensor:
    """The sums of the absolute terms."""
    return _linear(case, {role: tensor.abs() for role, tensor in t.items()})


def depth(case: Case, direction: str) -> int:
    """How many terms are summed for one element."""
    return conv2d.depth(case.conv, "fprop") + 3


def nonfinite(case: Case, direction: str) -> tuple[str, ...]:
    """The operands that may hold NaN and infinities where only one answer is right."""
    given = [role for role, letter in (("scale", "s"), ("shift", "h"), ("r", "r")) if letter in case.has]
    return (*conv2d.nonfinite(case.conv, "fprop"), *given)


def problem(case: Case, direction: str, dtype: torch.dtype, precision: str, device: str = "cpu") -> dispatch.Problem:
    """The problem that dispatch sees."""
    s = case.shapes
    params = (*case.params, precision)
    return describe(s["x"], s["w"], s["y"], dtype, torch.device(device), params, residual="r" in case.has)
