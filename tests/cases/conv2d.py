"""The cases of conv2d: a small version of every layer of the architectures, and every shape that breaks a kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from support.memory import Guarded, place
from torch import Tensor

from cnnfast import dispatch, ops
from cnnfast.ops.conv2d import output_shape
from cnnfast.ops.conv2d import problem as describe

OP = "conv2d"
DIRECTIONS = ("fprop", "dgrad", "wgrad", "bgrad")


@dataclasses.dataclass(frozen=True)
class Case:
    """One convolution: x (N, C, H, W) with w (K, C/groups, R, S), operands in these layouts."""

    why: str
    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, ...] | str = (0, 0)  # a pair, (top, bottom, left, right), or "same"
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    bias: bool = False
    x_layout: str = "nhwc"
    w_layout: str = "nchw"
    g_layout: str = ""  # of the gradient that comes back; "": the format that the result has

    @property
    def pads(self) -> tuple[int, int, int, int]:
        """(top, bottom, left, right)."""
        if self.padding == "same":
            h, w = self.dilation[0] * (self.R - 1), self.dilation[1] * (self.S - 1)
            return (h // 2, h - h // 2, w // 2, w - w // 2)
        if len(self.padding) == 2:
            h, w = self.padding  # type: ignore[misc]
            return (h, h, w, w)  # type: ignore[return-value]
        return self.padding  # type: ignore[return-value]

    @property
    def symmetric(self) -> bool:
        """Whether torch takes the padding as it is."""
        top, bottom, left, right = self.pads
        return top == bottom and left == right

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every operand."""
        w = (self.K, self.C // self.groups, self.R, self.S)
        x = (self.N, self.C, self.H, self.W)
        y = output_shape(x, w, self.stride, self.pads, self.dilation)
        return {"x": x, "w": w, "b": (self.K,), "y": y}

    def __str__(self) -> str:
        parts = [f"{self.N}x{self.C}x{self.H}x{self.W}-{self.K}x{self.R}x{self.S}"]
        for short, value, default in (
            ("s", self.stride, (1, 1)), ("p", self.padding, (0, 0)), ("d", self.dilation, (1, 1)),
        ):  # fmt: skip
            if value != default:
                parts.append(short + (value if isinstance(value, str) else ".".join(map(str, value))))
        if self.groups != 1:
            parts.append(f"g{self.groups}")
        if self.bias:
            parts.append("b")
        parts += [self.x_layout, self.w_layout, self.g_layout]
        return "-".join(p for p in parts if p)


def _net(*cases: Case) -> tuple[Case, ...]:
    return cases


ALEXNET = _net(
    Case("alexnet conv1: 11x11 stride 4 on RGB", 1, 3, 35, 35, 16, 11, 11, (4, 4), (2, 2), bias=True, x_layout="nchw"),
    Case("alexnet conv2: 5x5", 1, 16, 13, 13, 24, 5, 5, padding=(2, 2), bias=True),
    Case("alexnet conv3-5: 3x3 with bias", 1, 24, 13, 13, 32, 3, 3, padding=(1, 1), bias=True),
)
VGG = _net(
    Case("vgg16 conv1: 3x3 on RGB", 1, 3, 20, 20, 64, 3, 3, padding=(1, 1), bias=True, x_layout="nchw"),
    Case("vgg16: 3x3, channels kept", 2, 32, 14, 14, 32, 3, 3, padding=(1, 1), bias=True),
    Case("vgg16: 3x3, channels doubled", 1, 32, 14, 14, 64, 3, 3, padding=(1, 1), bias=True, w_layout="nhwc"),
)
GOOGLENET = _net(
    Case("googlenet stem: 7x7 stride 2 on RGB", 1, 3, 24, 24, 32, 7, 7, (2, 2), (3, 3), w_layout="nhwc"),
    Case("googlenet branch: 1x1 to few channels", 2, 48, 7, 7, 16, 1, 1),
    Case("googlenet branch: 3x3 after the reduction", 1, 24, 14, 14, 48, 3, 3, padding=(1, 1)),
    Case("googlenet branch: 5x5 on 16 channels", 1, 16, 7, 7, 32, 5, 5, padding=(2, 2)),
    Case("googlenet branch: input is a part of a concatenation", 1, 24, 7, 7, 32, 1, 1, x_layout="channels"),
)
INCEPTION = _net(
    Case("inception stem: 3x3 stride 2 without padding on an odd map", 1, 3, 27, 27, 16, 3, 3, (2, 2), w_layout="nhwc"),
    Case("inception stem: 3x3 without padding", 1, 16, 15, 15, 32, 3, 3),
    Case("inception A: 5x5 on 48 channels", 1, 48, 9, 9, 32, 5, 5, padding=(2, 2)),
    Case("inception B: 3x3 stride 2 reduction without padding", 1, 32, 17, 17, 48, 3, 3, (2, 2)),
    Case("inception C: 1x7 on 17x17", 1, 24, 17, 17, 32, 1, 7, padding=(0, 3)),
    Case("inception C: 7x1 on 17x17", 1, 24, 17, 17, 32, 7, 1, padding=(3, 0), w_layout="nhwc"),
    Case("inception E: 1x3 on 8x8", 1, 48, 8, 8, 32, 1, 3, padding=(0, 1)),
    Case("inception E: 3x1 on 8x8", 1, 48, 8, 8, 32, 3, 1, padding=(1, 0)),
    Case("inception auxiliary: 5x5 on a 5x5 map leaves one pixel", 3, 16, 5, 5, 40, 5, 5),
)
RESNET = _net(
    Case("resnet stem: 7x7 stride 2 on RGB, NCHW input", 2, 3, 22, 22, 64, 7, 7, (2, 2), (3, 3), x_layout="nchw"),
    Case("resnet basic block: 3x3", 1, 64, 8, 8, 64, 3, 3, padding=(1, 1), w_layout="nhwc"),
    Case("resnet basic block: 3x3 stride 2", 1, 32, 14, 14, 64, 3, 3, (2, 2), (1, 1)),
    Case("resnet last stage: 3x3 on 7x7", 2, 48, 7, 7, 48, 3, 3, padding=(1, 1)),
    Case("resnet bottleneck: 1x1 down", 2, 64, 7, 7, 32, 1, 1, w_layout="nhwc"),
    Case("resnet bottleneck: 1x1 up", 1, 32, 14, 14, 128, 1, 1),
    Case("resnet shortcut: 1x1 stride 2", 2, 32, 14, 14, 64, 1, 1, (2, 2)),
    Case("resnet shortcut on an odd map: the last row isn't read", 1, 16, 9, 11, 32, 1, 1, (2, 2), w_layout="nhwc"),
)
RESNEXT = _net(
    Case("resnext50 32x4d: 4 channels a group", 1, 128, 7, 7, 128, 3, 3, padding=(1, 1), groups=32),
    Case("resnext50 32x4d: 4 channels a group, stride 2", 1, 64, 10, 10, 64, 3, 3, (2, 2), (1, 1), groups=16),
    Case("resnext101 32x8d: 8 channels a group", 1, 64, 7, 7, 64, 3, 3, padding=(1, 1), groups=8, w_layout="nhwc"),
    Case("resnext stage 3: 16 channels a group", 1, 64, 7, 7, 64, 3, 3, padding=(1, 1), groups=4),
    Case("resnext stage 4: 32 channels a group", 1, 64, 7, 7, 64, 3, 3, (2, 2), (1, 1), groups=2, w_layout="nhwc"),
)
WIDE_RESNET = _net(
    Case("wide resnet: 3x3 on 128 channels", 1, 128, 6, 6, 128, 3, 3, padding=(1, 1), w_layout="nhwc"),
    Case("wide resnet: 3x3 stride 2 on wide maps", 1, 64, 8, 8, 64, 3, 3, (2, 2), (1, 1)),
)
PRIMES = _net(
    Case("primes everywhere, NHWC", 3, 13, 11, 7, 17, 3, 5, (2, 3), (1, 2), bias=True),
    Case("primes everywhere, NCHW", 3, 7, 13, 11, 19, 5, 3, (3, 2), (2, 1), bias=True, x_layout="nchw"),
    Case("primes everywhere, channels_last weight", 2, 11, 17, 13, 7, 3, 3, padding=(1, 1), w_layout="nhwc"),
)
TILES = _net(
    *[
        Case(f"{k} output channels: around a vector or a tile", 1, 16, 6, 6, k, 3, 3, padding=(1, 1), bias=k % 2 == 1)
        for k in (8, 15, 16, 17, 31, 33, 47, 63, 65, 127, 129)
    ],
    *[
        Case(f"{c} input channels: around a vector or a tile", 1, c, 6, 6, 24, 3, 3, padding=(1, 1), w_layout="nhwc")
        for c in (1, 2, 3, 4, 5, 7, 8, 9, 15, 17, 31, 33, 63, 65)
    ],
    *[Case(f"rows of {q} pixels: around a register tile", 1, 8, 3, q, 16, 1, 1) for q in (5, 6, 7, 13, 14, 15, 27, 29)],
    Case("127 pixels in all, across images", 127, 16, 1, 1, 16, 1, 1, bias=True),
    Case("129 pixels in all: one more than a tile", 1, 16, 3, 43, 32, 1, 1),
    Case("a sum of 1152 products: several blocks of the reduction", 1, 128, 5, 5, 16, 3, 3, padding=(1, 1)),
    Case("a long sum and odd channels", 1, 131, 4, 4, 9, 3, 3, padding=(1, 1), w_layout="nhwc"),
)
SMALL = _net(
    Case("a batch of 0", 0, 8, 6, 6, 16, 3, 3, padding=(1, 1), bias=True),
    Case("a batch of 0, NCHW", 0, 3, 6, 6, 16, 3, 3, x_layout="nchw"),
    Case("a single pixel, a single channel, 1x1", 1, 1, 1, 1, 1, 1, 1, bias=True),
    Case("a 1x1 map under a padded 3x3", 2, 16, 1, 1, 16, 3, 3, padding=(1, 1)),
    Case("a 1x1 map with many channels: a matrix product", 4, 64, 1, 1, 32, 1, 1, bias=True, w_layout="nhwc"),
    Case("one row", 1, 16, 1, 31, 16, 1, 3, padding=(0, 1)),
    Case("one column", 1, 16, 31, 1, 16, 3, 1, padding=(1, 0)),
    Case("one output channel", 2, 16, 7, 7, 1, 3, 3, padding=(1, 1), bias=True),
    Case("one input channel", 2, 1, 12, 12, 16, 5, 5, padding=(2, 2), x_layout="nchw"),
    Case("the kernel covers the padded map exactly", 2, 8, 4, 5, 16, 6, 7, padding=(1, 1)),
)
GEOMETRY = _net(
    Case("stride larger than the kernel: input that is never read", 2, 8, 13, 13, 16, 2, 2, (3, 3)),
    Case("stride larger than the kernel, 1x1 stride 3, padded", 1, 8, 8, 8, 16, 1, 1, (3, 3), (1, 1)),
    Case("stride differs by axis", 1, 8, 12, 11, 16, 3, 3, (1, 2), (1, 1), x_layout="nchw"),
    Case("stride 3 with kernel 3", 1, 8, 11, 10, 16, 3, 3, (3, 3), (1, 1), w_layout="nhwc"),
    Case("stride 2 leaves rows below unread", 1, 16, 10, 12, 16, 3, 3, (2, 2)),
    Case("dilation 2", 1, 16, 9, 9, 16, 3, 3, padding=(2, 2), dilation=(2, 2)),
    Case("dilation differs by axis", 1, 8, 11, 13, 16, 3, 2, padding=(1, 2), dilation=(2, 3), x_layout="nchw"),
    Case(
        "dilation and stride share a factor: phases of dgrad without taps",
        1,
        8,
        11,
        11,
        16,
        3,
        3,
        (2, 2),
        (2, 2),
        (2, 2),
    ),
    Case(
        "dilation and stride without a common factor", 2, 8, 13, 13, 16, 3, 3, (3, 3), (2, 2), (2, 2), w_layout="nhwc"
    ),
    Case("dilation 4 as in segmentation heads", 1, 16, 10, 10, 8, 3, 3, padding=(4, 4), dilation=(4, 4)),
    Case("even kernel 2x2", 1, 16, 8, 8, 16, 2, 2, w_layout="nhwc"),
    Case("even kernel 4x4 stride 2, as in discriminators", 1, 8, 12, 12, 16, 4, 4, (2, 2), (1, 1)),
    Case("even kernel with padding 'same': one more below and right", 1, 8, 7, 9, 16, 4, 2, padding="same", bias=True),
    Case("padding 'same' with dilation", 1, 8, 9, 8, 16, 3, 4, padding="same", dilation=(2, 3), x_layout="nchw"),
    Case("asymmetric padding: top and left only", 1, 8, 8, 9, 16, 3, 3, padding=(2, 0, 2, 0)),
    Case("asymmetric padding: bottom and right only, stride 2", 1, 8, 8, 9, 16, 3, 3, (2, 2), (0, 1, 0, 1)),
    Case("asymmetric padding, four different", 2, 4, 7, 6, 8, 3, 3, padding=(0, 3, 2, 1), x_layout="nchw"),
    Case("padding larger than the kernel: rows of nothing but bias", 1, 8, 4, 4, 16, 3, 3, padding=(4, 5), bias=True),
    Case("padding larger than the kernel, stride 2, 1x1", 1, 8, 3, 3, 16, 1, 1, (2, 2), (2, 2), bias=True),
    Case("wide and flat", 1, 8, 2, 70, 16, 2, 9, padding=(0, 4)),
    Case("tall and thin", 1, 8, 70, 2, 16, 9, 2, padding=(4, 0)),
    Case("1x7 stride (1, 2)", 1, 16, 5, 20, 16, 1, 7, (1, 2), (0, 3)),
    Case("9x9: more taps than a table of 64", 1, 4, 11, 11, 8, 9, 9, padding=(4, 4)),
)
GROUPS = _net(
    Case("inception_v3 1x7, padded weights in a partial panel", 1, 96, 17, 17, 72, 1, 7, padding=(0, 3), bias=True),
    Case("inception_v3 7x1", 2, 64, 17, 17, 48, 7, 1, padding=(3, 0), w_layout="nhwc"),
    Case("7 taps, tiles of 3 outputs and one less", 3, 61, 11, 20, 33, 1, 7, padding=(0, 2, 3, 1)),
    Case("7 taps on a map of less than a tile", 22, 70, 2, 7, 16, 1, 7, padding=(0, 0)),
    Case("7 taps in 2 groups", 1, 96, 22, 13, 64, 7, 1, padding=(3, 0), groups=2, bias=True),
    Case("inception_v3 1x3 and more than a chunk of channels", 1, 330, 8, 8, 40, 1, 3, padding=(0, 1)),
    Case("inception_v3 3x1, odd map", 2, 70, 13, 15, 37, 3, 1, padding=(1, 0), bias=True, w_layout="nhwc"),
    Case("resnet18 3x3 stride 2, small", 1, 64, 28, 28, 48, 3, 3, (2, 2), (1, 1), bias=True),
    Case("inception_v3 3x3 stride 2 without padding, odd", 1, 70, 17, 19, 37, 3, 3, (2, 2), w_layout="nhwc"),
    Case("3x3 stride 2, asymmetric padding, many images and chunks", 3, 150, 9, 12, 24, 3, 3, (2, 2), (0, 1, 2, 0)),
    Case("3x3 stride 2 in groups", 1, 96, 15, 15, 64, 3, 3, (2, 2), (1, 1), groups=2),
    Case("few input channels, a large map: Winograd's dgrad", 1, 5, 65, 64, 128, 3, 3, padding=(1, 1)),
    Case("alexnet 5x5, small", 1, 64, 19, 18, 48, 5, 5, padding=(2, 2), bias=True),
    Case("5x5 without padding on an odd map, many images", 4, 37, 13, 12, 50, 5, 5),
    Case("2 groups", 2, 16, 8, 8, 32, 3, 3, padding=(1, 1), groups=2, bias=True),
    Case("3 groups of odd sizes", 1, 15, 7, 7, 21, 3, 3, padding=(1, 1), groups=3, w_layout="nhwc"),
    Case("depthwise 3x3", 2, 32, 9, 9, 32, 3, 3, padding=(1, 1), groups=32, bias=True),
    Case("depthwise 3x3 stride 2", 1, 24, 10, 10, 24, 3, 3, (2, 2), (1, 1), groups=24, w_layout="nhwc"),
    Case("1x1 whose tiles end with a group that isn't full", 1, 8, 24, 25, 80, 1, 1),
    Case("depthwise, x misaligned", 1, 16, 5, 6, 16, 3, 3, padding=(1, 1), groups=16, x_layout="misaligned"),
    Case("depthwise, the gradient misaligned", 1, 16, 6, 5, 16, 3, 3, padding=(1, 1), groups=16, g_layout="misaligned"),
    Case(
        "depthwise 5x5 on an odd number of channels", 1, 13, 9, 9, 13, 5, 5, padding=(2, 2), groups=13, x_layout="nchw"
    ),
    Case("depthwise 7x7, as in ConvNeXt", 1, 40, 8, 8, 40, 7, 7, padding=(3, 3), groups=40),
    Case("depthwise with channel multiplier 2", 1, 12, 8, 8, 24, 3, 3, padding=(1, 1), groups=12),
    Case("depthwise with dilation", 1, 16, 9, 9, 16, 3, 3, padding=(2, 2), dilation=(2, 2), groups=16),
    Case("channel multiplier 3 within groups", 2, 8, 6, 6, 24, 1, 1, groups=4, x_layout="nchw"),
    Case("grouped 1x1, as in ShuffleNet", 1, 24, 7, 7, 48, 1, 1, groups=3),
    Case("more channels in than out in each group", 1, 32, 6, 6, 8, 3, 3, padding=(1, 1), groups=4),
    Case("2 channels a group", 1, 32, 6, 6, 32, 3, 3, padding=(1, 1), groups=16),
    Case("depthwise multiplier 2 on a partial vector", 2, 19, 7, 8, 38, 3, 3, (2, 1), (1, 1), groups=19, bias=True),
    Case("depthwise multiplier 4, 5x5 stride 2", 1, 11, 11, 10, 44, 5, 5, (2, 2), (2, 2), groups=11, w_layout="nhwc"),
    Case("depthwise 7x7 stride 2 on a map smaller than it", 2, 20, 5, 6, 20, 7, 7, (2, 2), (3, 3), groups=20),
    Case(
        "depthwise 3x3 read in place, dilated rows",
        2,
        32,
        11,
        29,
        32,
        3,
        3,
        (1, 1),
        (2, 1),
        (2, 1),
        groups=32,
        bias=True,
    ),
    Case("depthwise 5x5 stride 2 read in place", 1, 48, 15, 31, 48, 5, 5, (2, 2), (2, 2), groups=48, x_layout="sliced"),
    Case("depthwise 7x7 wider than the map", 2, 32, 3, 2, 32, 7, 7, padding=(3, 3), groups=32, bias=True),
    Case("depthwise 3x5, rows padded beyond the filter", 1, 32, 4, 9, 32, 3, 5, (3, 2), (9, 4), (4, 1), groups=32),
    Case("depthwise 3x3 on rows longer than a chain of sums", 1, 17, 4, 150, 17, 3, 3, padding=(1, 1), groups=17),
    Case(
        "depthwise with the padding beyond the kernel: taps that no pixel has",
        1,
        8,
        2,
        3,
        8,
        3,
        3,
        (2, 2),
        (4, 4),
        groups=8,
    ),
    Case("depthwise 3x3 dilation 2 stride 2", 1, 24, 12, 11, 24, 3, 3, (2, 2), (2, 1), (2, 2), groups=24),
    Case("4 channels a group, many pixels: parts of the pixels", 3, 20, 31, 33, 20, 3, 3, padding=(1, 1), groups=5),
    Case("8 channels a group, rows of several tiles", 1, 24, 5, 45, 24, 3, 3, padding=(1, 1), groups=3, bias=True),
    Case("8 channels a group, a tile row and column more", 2, 32, 9, 31, 32, 3, 3, padding=(1, 1), groups=4, bias=True),
    Case("16 channels a group, tiles of two images", 2, 64, 15, 13, 64, 3, 3, padding=(1, 1), groups=4, bias=True),
    Case("32 channels a group, asymmetric padding", 1, 96, 17, 16, 96, 3, 3, padding=(0, 2, 1, 0), groups=3),
    Case("8 channels a group, rows of several tiles, stride 2", 2, 16, 6, 41, 16, 3, 3, (2, 2), (1, 1), groups=2),
    Case("16 channels a group, rows of several tiles, stride 3", 1, 32, 6, 70, 32, 3, 3, (3, 3), (1, 1), groups=2),
    Case("16 channels a group, 1x1 and stride 2", 2, 48, 9, 9, 48, 1, 1, (2, 2), groups=3),
    Case("8 channels a group, even kernel, asymmetric padding", 1, 40, 8, 7, 40, 2, 4, padding=(1, 0, 2, 1), groups=5),
    Case(
        "8 channels a group, 5x5 stride 2: large patches", 1, 24, 33, 30, 24, 5, 5, (2, 2), (2, 2), groups=3, bias=True
    ),
    Case(
        "32 channels a group, 1x3 dilated, several tiles",
        1,
        96,
        9,
        33,
        96,
        1,
        3,
        padding=(0, 2),
        dilation=(1, 2),
        groups=3,
    ),
    Case("a stem of 4 channels with more filters than a block", 1, 4, 21, 37, 70, 5, 5, (2, 1), (2, 1), bias=True),
    Case("a stem on many pixels: parts of the pixels", 2, 3, 49, 47, 24, 7, 7, (2, 2), (3, 3)),
    Case("odd channels on many pixels: equal parts of both", 3, 37, 29, 31, 43, 1, 1),
    Case("many pixels without padding: x is read in place", 2, 21, 41, 40, 19, 3, 3),
    Case("1x1 stride 2 on many pixels", 2, 33, 47, 49, 35, 1, 1, (2, 2)),
    Case("few channels on many pixels: chunks of them, with all taps", 2, 3, 24, 23, 5, 3, 3, padding=(1, 1)),
)
WINOGRAD = _net(  # as large as F(4x4) asks for
    Case("a map cut by tiles of 4 on both sides, odd channels", 1, 33, 27, 25, 35, 3, 3, padding=(1, 1), bias=True),
    Case("a map cut by tiles of 2, channels_last weight", 2, 33, 17, 21, 18, 3, 3, padding=(1, 1), w_layout="nhwc"),
    Case("two chunks of input channels, the second shorter", 2, 137, 11, 12, 49, 3, 3, padding=(1, 1)),
    Case("sums over two chunks of channels in the gradient", 1, 50, 22, 21, 139, 3, 3, padding=(1, 1)),
    Case("more tiles than a block holds", 2, 32, 43, 42, 32, 3, 3, padding=(1, 1), bias=True),
    Case("more weights than are kept", 1, 288, 10, 9, 272, 3, 3, padding=(1, 1)),
    Case("no padding", 1, 40, 24, 26, 34, 3, 3, x_layout="nchw"),
    Case("tiles that read nothing but padding", 2, 32, 18, 19, 40, 3, 3, padding=(9, 6), bias=True),
    Case(
        "four different paddings", 1, 36, 25, 24, 33, 3, 3, padding=(0, 3, 2, 1), x_layout="sliced", g_layout="sliced"
    ),
    Case("gradients of input that no output reads fully", 3, 64, 11, 11, 48, 3, 3, padding=(2, 0, 0, 2)),
    Case("one row of tiles", 1, 64, 2, 190, 32, 3, 3, padding=(1, 1), w_layout="transposed"),
    Case("an expanded weight", 1, 48, 22, 21, 36, 3, 3, padding=(1, 1), w_layout="expanded_nchw", x_layout="channels"),
)
LAYOUTS = _net(
    Case("NCHW input, channels_last weight", 2, 8, 7, 7, 16, 3, 3, padding=(1, 1), x_layout="nchw", w_layout="nhwc"),
    Case("NCHW input, channels_last 1x1 weight: both formats", 2, 8, 5, 5, 16, 1, 1, x_layout="nchw", w_layout="nhwc"),
    Case("a slice of a larger tensor", 2, 16, 7, 7, 16, 3, 3, padding=(1, 1), x_layout="sliced"),
    Case("a slice, its gradient too", 2, 16, 6, 6, 16, 3, 3, (2, 2), (1, 1), x_layout="sliced", g_layout="sliced"),
    Case(
        "the upper channels of a tensor",
        2, 16, 6, 6, 32, 3, 3, padding=(1, 1), x_layout="channels", g_layout="channels",
    ),
    Case("a slice of an NCHW tensor", 2, 8, 6, 7, 16, 3, 3, x_layout="sliced_nchw", g_layout="sliced_nchw", bias=True),
    Case("a transposed image", 1, 8, 6, 9, 16, 3, 3, padding=(1, 1), x_layout="transposed", g_layout="transposed"),
    Case("one image expanded to a batch", 4, 16, 6, 6, 16, 3, 3, padding=(1, 1), x_layout="expanded"),
    Case("one NCHW image expanded to a batch", 4, 3, 6, 6, 16, 3, 3, x_layout="expanded_nchw"),
    Case("a grey image expanded to 3 channels", 2, 3, 9, 9, 16, 3, 3, x_layout="expanded_c"),
    Case(
        "the gradient of sum(): every stride is 0",
        2, 8, 6, 6, 16, 3, 3, padding=(1, 1), g_layout="constant", bias=True,
    ),
    Case("a gradient expanded over the batch", 3, 8, 6, 6, 16, 1, 1, g_layout="expanded"),
    Case("an NCHW gradient of a channels_last result", 2, 16, 6, 6, 24, 3, 3, padding=(1, 1), g_layout="nchw"),
    Case(
        "all operands one element off alignment",
        2, 16, 6, 6, 16, 3, 3, x_layout="misaligned", w_layout="misaligned", g_layout="misaligned", bias=True,
    ),
    Case(
        "NCHW operands one element off alignment",
        1, 8, 6, 6, 16, 3, 3, padding=(1, 1),
        x_layout="misaligned_nchw", w_layout="misaligned_nchw", g_layout="misaligned_nchw",
    ),
    Case("a sliced weight", 1, 16, 6, 6, 16, 3, 3, padding=(1, 1), w_layout="sliced_nchw"),
    Case("a sliced channels_last weight", 1, 16, 6, 6, 16, 3, 3, padding=(1, 1), w_layout="sliced"),
    Case("a weight with its taps transposed", 1, 16, 6, 6, 16, 3, 3, padding=(1, 1), w_layout="transposed"),
    Case("one filter expanded to all output channels", 1, 16, 6, 6, 16, 3, 3, padding=(1, 1), w_layout="expanded_nchw"),
    Case("a constant weight: every stride is 0", 1, 8, 6, 6, 16, 3, 3, w_layout="constant"),
    Case(
        "a sliced weight of a depthwise convolution",
        1, 16, 6, 6, 16, 3, 3, padding=(1, 1), groups=16, w_layout="sliced_nchw",
    ),
    Case("1x1 on a slice", 2, 16, 5, 5, 16, 1, 1, x_layout="sliced", g_layout="sliced", bias=True),
)  # fmt: skip
CASES: tuple[Case, ...] = (
    *ALEXNET, *VGG, *GOOGLENET, *INCEPTION, *RESNET, *RESNEXT, *WIDE_RESNET,
    *PRIMES, *TILES, *SMALL, *GEOMETRY, *GROUPS, *LAYOUTS, *WINOGRAD,
)  # fmt: skip


# ---- the adapter: what a test of any operation's kernels needs -------------------------------------------------------

OPERATORS = {"fprop": ops.conv2d, "dgrad": ops.conv2d_dgrad, "wgrad": ops.conv2d_wgrad, "bgrad": ops.conv2d_bgrad}
READS = {"fprop": ("x", "w", "b"), "dgrad": ("w", "y"), "wgrad": ("x", "y"), "bgrad": ("y",)}


def inputs(case: Case, direction: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Guarded]:
    """The operands that a direction reads, in their layouts, amid NaNs."""
    generator = torch.Generator().manual_seed(seed)
    layouts = {"x": case.x_layout, "w": case.w_layout, "b": "nchw", "y": case.g_layout}
    if not layouts["y"]:
        channels_last = "nchw" not in case.x_layout or "nhwc" in case.w_layout
        layouts["y"] = "nhwc" if channels_last else "nchw"
    return {
        role: place(
            torch.randn(case.shapes[role], generator=generator, dtype=torch.float64), layouts[role], dtype, device
        )
        for role in READS[direction]
        if role != "b" or case.bias
    }


def call(case: Case, direction: str, t: Mapping[str, Tensor], precision: str, backend: str, strict: bool) -> Tensor:
    """Our operator."""
    args = (case.stride, case.pads, case.dilation, case.groups, precision, backend, strict)
    nhwc = case.x_layout not in ("nchw", "sliced_nchw", "expanded_nchw", "misaligned_nchw", "expanded_c", "transposed")
    if direction == "fprop":
        return ops.conv2d(t["x"], t["w"], t.get("b"), *args)
    if direction == "dgrad":
        return ops.conv2d_dgrad(t["w"], t["y"], case.shapes["x"], nhwc, *args)
    if direction == "wgrad":
        return ops.conv2d_wgrad(t["x"], t["y"], case.shapes["w"], case.w_layout == "nhwc", *args)
    return ops.conv2d_bgrad(t["y"], precision, backend, strict)


def reference(case: Case, direction: str, t: Mapping[str, Tensor]) -> Tensor:
    """torch, in the dtype of the tensors."""
    top, bottom, left, right = case.pads
    pad = (left, right, top, bottom)
    args = (list(case.stride), [0, 0], list(case.dilation), False, [0, 0], case.groups)
    if direction == "fprop":
        return F.conv2d(F.pad(t["x"], pad), t["w"], t.get("b"), case.stride, 0, case.dilation, case.groups)
    g = t["y"]
    if direction == "bgrad":
        return g.sum((0, 2, 3))
    n, c, h, w = case.shapes["x"]
    if direction == "dgrad":
        like = g.new_empty((n, c, h + top + bottom, w + left + right))
        out = torch.ops.aten.convolution_backward(g, like, t["w"], None, *args, [True, False, False])[0]
        return out[:, :, top : top + h, left : left + w]
    like = g.new_empty(case.shapes["w"])
    return torch.ops.aten.convolution_backward(g, F.pad(t["x"], pad), like, None, *args, [False, True, False])[1]


def magnitude(case: Case, direction: str, t: Mapping[str, Tensor]) -> Tensor:
    """The sums of the absolute products."""
    return reference(case, direction, {role: tensor.abs() for role, tensor in t.items()})


def depth(case: Case, direction: str) -> int:
    """How many products are summed for one element."""
    pixels = case.N * case.shapes["y"][2] * case.shapes["y"][3]
    taps = case.R * case.S
    return {"fprop": taps * case.C // case.groups, "dgrad": taps * case.K // case.groups}.get(direction, max(pixels, 1))


def nonfinite(case: Case, direction: str) -> tuple[str, ...]:
    """The operands that may hold NaN and infinities where only one answer is right.

    Where zeros from the padding would meet an infinite weight or gradient, torch's own answer depends on its algorithm.
    """
    unpadded = not any(case.pads)
    if direction == "fprop":
        return ("x", "w") if unpadded else ("x",)
    if direction == "dgrad":
        return ("y", "w") if unpadded and case.stride == (1, 1) and case.R * case.S == 1 else ("y",)
    return ("x", "y") if direction == "wgrad" and unpadded else ("x",) if direction == "wgrad" else ("y",)


def problem(case: Case, direction: str, dtype: torch.dtype, precision: str, device: str = "cpu") -> dispatch.Problem:
    """The problem that dispatch sees."""
    s = case.shapes
    params: tuple[Any, ...] = (case.stride, case.pads, case.dilation, case.groups, precision)
    return describe(direction, s["x"], s["w"], s["y"], dtype, torch.device(device), params)
