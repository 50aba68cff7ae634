"""Every distinct convolution and max pooling of nine networks at 224 x 224 (inception_v3: 299 x 299).

What benchmarks time, and tests cover. The table is written out, so that it needs no torchvision; a test holds it against
torchvision's models.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution of square images: (C, H, H) to K channels, R x S taps, the same stride both ways."""

    C: int
    H: int
    K: int
    R: int
    S: int
    stride: int
    pad_h: int
    pad_w: int
    groups: int
    bias: bool

    @property
    def padding(self) -> tuple[int, int]:
        return (self.pad_h, self.pad_w)

    @property
    def output(self) -> tuple[int, int]:
        """Height and width of the result."""
        return (
            (self.H + 2 * self.pad_h - self.R) // self.stride + 1,
            (self.H + 2 * self.pad_w - self.S) // self.stride + 1,
        )

    def flops(self, batch: int = 1) -> int:
        """Multiply-adds x 2 of the direct algorithm."""
        p, q = self.output
        return 2 * batch * p * q * self.K * self.R * self.S * self.C // self.groups

    def bytes(self, batch: int = 1, size: int = 4, direction: str = "forward") -> int:
        """Of x, w and y, each once; backward: their gradients, too, and y's values aren't read."""
        p, q = self.output
        x, w, y = batch * self.C * self.H**2, self.K * self.C // self.groups * self.R * self.S, batch * self.K * p * q
        return size * (x + w + y if direction == "forward" else 2 * x + 2 * w + y)

    @property
    def kind(self) -> str:
        """The group that a table lists it in."""
        if self.groups > 1:
            return "depthwise" if self.groups == self.C else "grouped"
        if self.C <= 4:
            return "stem"
        if (self.R, self.S) == (1, 1):
            return "1x1" if self.stride == 1 else "1x1 stride 2"
        if (self.R, self.S) == (3, 3):
            return "3x3" if self.stride == 1 else "3x3 stride 2"
        return "5x5, 7x1 and others"

    def __str__(self) -> str:
        extra = "".join(
            text
            for given, text in (
                (self.stride != 1, f" /{self.stride}"),
                (self.pad_h or self.pad_w, f" p{self.pad_h}" + (f",{self.pad_w}" if self.pad_w != self.pad_h else "")),
                (self.groups != 1, f" g{self.groups}"),
                (self.bias, " bias"),
            )
            if given
        )
        return f"{self.C}x{self.H}x{self.H} > {self.K} {self.R}x{self.S}{extra}"

    def tensors(
        self, batch: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
    ) -> list[torch.Tensor | None]:
        """x in channels_last, w as a module holds it, b or None; unit variance goes in and comes out."""
        generator = torch.Generator().manual_seed(seed)
        fan_in = self.R * self.S * self.C // self.groups
        x = torch.randn(batch, self.C, self.H, self.H, generator=generator)
        w = torch.randn(self.K, self.C // self.groups, self.R, self.S, generator=generator) / fan_in**0.5
        b = torch.randn(self.K, generator=generator) if self.bias else None
        x = x.to(device, dtype).contiguous(memory_format=torch.channels_last)
        return [x, w.to(device, dtype), None if b is None else b.to(device, dtype)]


@dataclasses.dataclass(frozen=True)
class Pooling:
    """A max pooling of square images: (C, H, H), square windows."""

    C: int
    H: int
    kernel: int
    stride: int
    padding: int
    ceil_mode: bool

    @property
    def output(self) -> int:
        """Height and width of the result; the last window starts inside the image."""
        span = self.H + 2 * self.padding - self.kernel
        out = (span + (self.stride - 1 if self.ceil_mode else 0)) // self.stride + 1
        return out - 1 if self.ceil_mode and (out - 1) * self.stride >= self.H + self.padding else out

    def flops(self, batch: int = 1) -> int:
        """None that count: memory decides."""
        return 0

    def bytes(self, batch: int = 1, size: int = 4, direction: str = "forward") -> int:
        """Of x and y, each once; backward: x, y's gradient and x's."""
        x, y = batch * self.C * self.H**2, batch * self.C * self.output**2
        return size * (x + y if direction == "forward" else 2 * x + y)

    @property
    def kind(self) -> str:
        """The group that a table lists it in."""
        return f"{self.kernel}x{self.kernel} stride {self.stride}"

    def __str__(self) -> str:
        extra = (f" p{self.padding}" if self.padding else "") + (" ceil" if self.ceil_mode else "")
        return f"{self.C}x{self.H}x{self.H} max {self.kernel}x{self.kernel} /{self.stride}{extra}"

    def tensor(
        self, batch: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
    ) -> torch.Tensor:
        """x in channels_last: what a ReLU gives, so that windows of nothing but zeros occur."""
        x = torch.randn(batch, self.C, self.H, self.H, generator=torch.Generator().manual_seed(seed)).relu()
        return x.to(device, dtype).contiguous(memory_format=torch.channels_last)


def _net(bias: bool, *rows: tuple[int, ...]) -> dict[Layer, int]:
    """Rows of (how often, C, H, K, R, S, stride, pad_h, pad_w, groups)."""
    return {Layer(*row[1:], bias): row[0] for row in rows}  # type: ignore[call-arg]


# fmt: off
NETWORKS: dict[str, dict[Layer, int]] = {  # network -> layer -> how often, in the order of the first call
    "alexnet": _net(
        True,
        (1, 3, 224, 64, 11, 11, 4, 2, 2, 1), (1, 64, 27, 192, 5, 5, 1, 2, 2, 1), (1, 192, 13, 384, 3, 3, 1, 1, 1, 1),
        (1, 384, 13, 256, 3, 3, 1, 1, 1, 1), (1, 256, 13, 256, 3, 3, 1, 1, 1, 1),
    ),
    "vgg16": _net(
        True,
        (1, 3, 224, 64, 3, 3, 1, 1, 1, 1), (1, 64, 224, 64, 3, 3, 1, 1, 1, 1), (1, 64, 112, 128, 3, 3, 1, 1, 1, 1),
        (1, 128, 112, 128, 3, 3, 1, 1, 1, 1), (1, 128, 56, 256, 3, 3, 1, 1, 1, 1), (2, 256, 56, 256, 3, 3, 1, 1, 1, 1),
        (1, 256, 28, 512, 3, 3, 1, 1, 1, 1), (2, 512, 28, 512, 3, 3, 1, 1, 1, 1), (3, 512, 14, 512, 3, 3, 1, 1, 1, 1),
    ),
    "googlenet": _net(
        False,
        (1, 3, 224, 64, 7, 7, 2, 3, 3, 1), (1, 64, 56, 64, 1, 1, 1, 0, 0, 1), (1, 64, 56, 192, 3, 3, 1, 1, 1, 1),
        (1, 192, 28, 64, 1, 1, 1, 0, 0, 1), (1, 192, 28, 96, 1, 1, 1, 0, 0, 1), (1, 96, 28, 128, 3, 3, 1, 1, 1, 1),
        (1, 192, 28, 16, 1, 1, 1, 0, 0, 1), (1, 16, 28, 32, 3, 3, 1, 1, 1, 1), (1, 192, 28, 32, 1, 1, 1, 0, 0, 1),
        (2, 256, 28, 128, 1, 1, 1, 0, 0, 1), (1, 128, 28, 192, 3, 3, 1, 1, 1, 1), (1, 256, 28, 32, 1, 1, 1, 0, 0, 1),
        (1, 32, 28, 96, 3, 3, 1, 1, 1, 1), (1, 256, 28, 64, 1, 1, 1, 0, 0, 1), (1, 480, 14, 192, 1, 1, 1, 0, 0, 1),
        (1, 480, 14, 96, 1, 1, 1, 0, 0, 1), (1, 96, 14, 208, 3, 3, 1, 1, 1, 1), (1, 480, 14, 16, 1, 1, 1, 0, 0, 1),
        (1, 16, 14, 48, 3, 3, 1, 1, 1, 1), (1, 480, 14, 64, 1, 1, 1, 0, 0, 1), (1, 512, 14, 160, 1, 1, 1, 0, 0, 1),
        (2, 512, 14, 112, 1, 1, 1, 0, 0, 1), (1, 112, 14, 224, 3, 3, 1, 1, 1, 1), (2, 512, 14, 24, 1, 1, 1, 0, 0, 1),
        (2, 24, 14, 64, 3, 3, 1, 1, 1, 1), (3, 512, 14, 64, 1, 1, 1, 0, 0, 1), (2, 512, 14, 128, 1, 1, 1, 0, 0, 1),
        (1, 128, 14, 256, 3, 3, 1, 1, 1, 1), (1, 512, 14, 144, 1, 1, 1, 0, 0, 1), (1, 144, 14, 288, 3, 3, 1, 1, 1, 1),
        (1, 512, 14, 32, 1, 1, 1, 0, 0, 1), (1, 32, 14, 64, 3, 3, 1, 1, 1, 1), (1, 528, 14, 256, 1, 1, 1, 0, 0, 1),
        (1, 528, 14, 160, 1, 1, 1, 0, 0, 1), (1, 160, 14, 320, 3, 3, 1, 1, 1, 1), (1, 528, 14, 32, 1, 1, 1, 0, 0, 1),
        (1, 32, 14, 128, 3, 3, 1, 1, 1, 1), (1, 528, 14, 128, 1, 1, 1, 0, 0, 1), (1, 832, 7, 256, 1, 1, 1, 0, 0, 1),
        (1, 832, 7, 160, 1, 1, 1, 0, 0, 1), (1, 160, 7, 320, 3, 3, 1, 1, 1, 1), (1, 832, 7, 32, 1, 1, 1, 0, 0, 1),
        (1, 32, 7, 128, 3, 3, 1, 1, 1, 1), (2, 832, 7, 128, 1, 1, 1, 0, 0, 1), (1, 832, 7, 384, 1, 1, 1, 0, 0, 1),
        (1, 832, 7, 192, 1, 1, 1, 0, 0, 1), (1, 192, 7, 384, 3, 3, 1, 1, 1, 1), (1, 832, 7, 48, 1, 1, 1, 0, 0, 1),
        (1, 48, 7, 128, 3, 3, 1, 1, 1, 1),
    ),
    "inception_v3": _net(
        False,
        (1, 3, 299, 32, 3, 3, 2, 0, 0, 1), (1, 32, 149, 32, 3, 3, 1, 0, 0, 1), (1, 32, 147, 64, 3, 3, 1, 1, 1, 1),
        (1, 64, 73, 80, 1, 1, 1, 0, 0, 1), (1, 80, 73, 192, 3, 3, 1, 0, 0, 1), (2, 192, 35, 64, 1, 1, 1, 0, 0, 1),
        (1, 192, 35, 48, 1, 1, 1, 0, 0, 1), (3, 48, 35, 64, 5, 5, 1, 2, 2, 1), (4, 64, 35, 96, 3, 3, 1, 1, 1, 1),
        (3, 96, 35, 96, 3, 3, 1, 1, 1, 1), (1, 192, 35, 32, 1, 1, 1, 0, 0, 1), (3, 256, 35, 64, 1, 1, 1, 0, 0, 1),
        (1, 256, 35, 48, 1, 1, 1, 0, 0, 1), (4, 288, 35, 64, 1, 1, 1, 0, 0, 1), (1, 288, 35, 48, 1, 1, 1, 0, 0, 1),
        (1, 288, 35, 384, 3, 3, 2, 0, 0, 1), (1, 96, 35, 96, 3, 3, 2, 0, 0, 1), (12, 768, 17, 192, 1, 1, 1, 0, 0, 1),
        (2, 768, 17, 128, 1, 1, 1, 0, 0, 1), (2, 128, 17, 128, 1, 7, 1, 0, 3, 1), (1, 128, 17, 192, 7, 1, 1, 3, 0, 1),
        (2, 128, 17, 128, 7, 1, 1, 3, 0, 1), (1, 128, 17, 192, 1, 7, 1, 0, 3, 1), (4, 768, 17, 160, 1, 1, 1, 0, 0, 1),
        (4, 160, 17, 160, 1, 7, 1, 0, 3, 1), (2, 160, 17, 192, 7, 1, 1, 3, 0, 1), (4, 160, 17, 160, 7, 1, 1, 3, 0, 1),
        (2, 160, 17, 192, 1, 7, 1, 0, 3, 1), (4, 192, 17, 192, 1, 7, 1, 0, 3, 1), (4, 192, 17, 192, 7, 1, 1, 3, 0, 1),
        (1, 192, 17, 320, 3, 3, 2, 0, 0, 1), (1, 192, 17, 192, 3, 3, 2, 0, 0, 1), (1, 1280, 8, 320, 1, 1, 1, 0, 0, 1),
        (1, 1280, 8, 384, 1, 1, 1, 0, 0, 1), (4, 384, 8, 384, 1, 3, 1, 0, 1, 1), (4, 384, 8, 384, 3, 1, 1, 1, 0, 1),
        (1, 1280, 8, 448, 1, 1, 1, 0, 0, 1), (2, 448, 8, 384, 3, 3, 1, 1, 1, 1), (1, 1280, 8, 192, 1, 1, 1, 0, 0, 1),
        (1, 2048, 8, 320, 1, 1, 1, 0, 0, 1), (1, 2048, 8, 384, 1, 1, 1, 0, 0, 1), (1, 2048, 8, 448, 1, 1, 1, 0, 0, 1),
        (1, 2048, 8, 192, 1, 1, 1, 0, 0, 1),
    ),
    "resnet18": _net(
        False,
        (1, 3, 224, 64, 7, 7, 2, 3, 3, 1), (4, 64, 56, 64, 3, 3, 1, 1, 1, 1), (1, 64, 56, 128, 3, 3, 2, 1, 1, 1),
        (3, 128, 28, 128, 3, 3, 1, 1, 1, 1), (1, 64, 56, 128, 1, 1, 2, 0, 0, 1), (1, 128, 28, 256, 3, 3, 2, 1, 1, 1),
        (3, 256, 14, 256, 3, 3, 1, 1, 1, 1), (1, 128, 28, 256, 1, 1, 2, 0, 0, 1), (1, 256, 14, 512, 3, 3, 2, 1, 1, 1),
        (3, 512, 7, 512, 3, 3, 1, 1, 1, 1), (1, 256, 14, 512, 1, 1, 2, 0, 0, 1),
    ),
    "resnet50": _net(
        False,
        (1, 3, 224, 64, 7, 7, 2, 3, 3, 1), (1, 64, 56, 64, 1, 1, 1, 0, 0, 1), (3, 64, 56, 64, 3, 3, 1, 1, 1, 1),
        (4, 64, 56, 256, 1, 1, 1, 0, 0, 1), (2, 256, 56, 64, 1, 1, 1, 0, 0, 1), (1, 256, 56, 128, 1, 1, 1, 0, 0, 1),
        (1, 128, 56, 128, 3, 3, 2, 1, 1, 1), (4, 128, 28, 512, 1, 1, 1, 0, 0, 1), (1, 256, 56, 512, 1, 1, 2, 0, 0, 1),
        (3, 512, 28, 128, 1, 1, 1, 0, 0, 1), (3, 128, 28, 128, 3, 3, 1, 1, 1, 1), (1, 512, 28, 256, 1, 1, 1, 0, 0, 1),
        (1, 256, 28, 256, 3, 3, 2, 1, 1, 1), (6, 256, 14, 1024, 1, 1, 1, 0, 0, 1), (1, 512, 28, 1024, 1, 1, 2, 0, 0, 1),
        (5, 1024, 14, 256, 1, 1, 1, 0, 0, 1), (5, 256, 14, 256, 3, 3, 1, 1, 1, 1), (1, 1024, 14, 512, 1, 1, 1, 0, 0, 1),
        (1, 512, 14, 512, 3, 3, 2, 1, 1, 1), (3, 512, 7, 2048, 1, 1, 1, 0, 0, 1), (1, 1024, 14, 2048, 1, 1, 2, 0, 0, 1),
        (2, 2048, 7, 512, 1, 1, 1, 0, 0, 1), (2, 512, 7, 512, 3, 3, 1, 1, 1, 1),
    ),
    "resnet152": _net(
        False,
        (1, 3, 224, 64, 7, 7, 2, 3, 3, 1), (1, 64, 56, 64, 1, 1, 1, 0, 0, 1), (3, 64, 56, 64, 3, 3, 1, 1, 1, 1),
        (4, 64, 56, 256, 1, 1, 1, 0, 0, 1), (2, 256, 56, 64, 1, 1, 1, 0, 0, 1), (1, 256, 56, 128, 1, 1, 1, 0, 0, 1),
        (1, 128, 56, 128, 3, 3, 2, 1, 1, 1), (8, 128, 28, 512, 1, 1, 1, 0, 0, 1), (1, 256, 56, 512, 1, 1, 2, 0, 0, 1),
        (7, 512, 28, 128, 1, 1, 1, 0, 0, 1), (7, 128, 28, 128, 3, 3, 1, 1, 1, 1), (1, 512, 28, 256, 1, 1, 1, 0, 0, 1),
        (1, 256, 28, 256, 3, 3, 2, 1, 1, 1), (36, 256, 14, 1024, 1, 1, 1, 0, 0, 1), (1, 512, 28, 1024, 1, 1, 2, 0, 0, 1),
        (35, 1024, 14, 256, 1, 1, 1, 0, 0, 1), (35, 256, 14, 256, 3, 3, 1, 1, 1, 1), (1, 1024, 14, 512, 1, 1, 1, 0, 0, 1),
        (1, 512, 14, 512, 3, 3, 2, 1, 1, 1), (3, 512, 7, 2048, 1, 1, 1, 0, 0, 1), (1, 1024, 14, 2048, 1, 1, 2, 0, 0, 1),
        (2, 2048, 7, 512, 1, 1, 1, 0, 0, 1), (2, 512, 7, 512, 3, 3, 1, 1, 1, 1),
    ),
    "resnext50_32x4d": _net(
        False,
        (1, 3, 224, 64, 7, 7, 2, 3, 3, 1), (1, 64, 56, 128, 1, 1, 1, 0, 0, 1), (3, 128, 56, 128, 3, 3, 1, 1, 1, 32),
        (3, 128, 56, 256, 1, 1, 1, 0, 0, 1), (1, 64, 56, 256, 1, 1, 1, 0, 0, 1), (2, 256, 56, 128, 1, 1, 1, 0, 0, 1),
        (1, 256, 56, 256, 1, 1, 1, 0, 0, 1), (1, 256, 56, 256, 3, 3, 2, 1, 1, 32), (4, 256, 28, 512, 1, 1, 1, 0, 0, 1),
        (1, 256, 56, 512, 1, 1, 2, 0, 0, 1), (3, 512, 28, 256, 1, 1, 1, 0, 0, 1), (3, 256, 28, 256, 3, 3, 1, 1, 1, 32),
        (1, 512, 28, 512, 1, 1, 1, 0, 0, 1), (1, 512, 28, 512, 3, 3, 2, 1, 1, 32), (6, 512, 14, 1024, 1, 1, 1, 0, 0, 1),
        (1, 512, 28, 1024, 1, 1, 2, 0, 0, 1), (5, 1024, 14, 512, 1, 1, 1, 0, 0, 1), (5, 512, 14, 512, 3, 3, 1, 1, 1, 32),
        (1, 1024, 14, 1024, 1, 1, 1, 0, 0, 1), (1, 1024, 14, 1024, 3, 3, 2, 1, 1, 32), (3, 1024, 7, 2048, 1, 1, 1, 0, 0, 1),
        (1, 1024, 14, 2048, 1, 1, 2, 0, 0, 1), (2, 2048, 7, 1024, 1, 1, 1, 0, 0, 1), (2, 1024, 7, 1024, 3, 3, 1, 1, 1, 32),
    ),
    "wide_resnet50_2": _net(
        False,
        (1, 3, 224, 64, 7, 7, 2, 3, 3, 1), (1, 64, 56, 128, 1, 1, 1, 0, 0, 1), (3, 128, 56, 128, 3, 3, 1, 1, 1, 1),
        (3, 128, 56, 256, 1, 1, 1, 0, 0, 1), (1, 64, 56, 256, 1, 1, 1, 0, 0, 1), (2, 256, 56, 128, 1, 1, 1, 0, 0, 1),
        (1, 256, 56, 256, 1, 1, 1, 0, 0, 1), (1, 256, 56, 256, 3, 3, 2, 1, 1, 1), (4, 256, 28, 512, 1, 1, 1, 0, 0, 1),
        (1, 256, 56, 512, 1, 1, 2, 0, 0, 1), (3, 512, 28, 256, 1, 1, 1, 0, 0, 1), (3, 256, 28, 256, 3, 3, 1, 1, 1, 1),
        (1, 512, 28, 512, 1, 1, 1, 0, 0, 1), (1, 512, 28, 512, 3, 3, 2, 1, 1, 1), (6, 512, 14, 1024, 1, 1, 1, 0, 0, 1),
        (1, 512, 28, 1024, 1, 1, 2, 0, 0, 1), (5, 1024, 14, 512, 1, 1, 1, 0, 0, 1), (5, 512, 14, 512, 3, 3, 1, 1, 1, 1),
        (1, 1024, 14, 1024, 1, 1, 1, 0, 0, 1), (1, 1024, 14, 1024, 3, 3, 2, 1, 1, 1), (3, 1024, 7, 2048, 1, 1, 1, 0, 0, 1),
        (1, 1024, 14, 2048, 1, 1, 2, 0, 0, 1), (2, 2048, 7, 1024, 1, 1, 1, 0, 0, 1), (2, 1024, 7, 1024, 3, 3, 1, 1, 1, 1),
    ),
}
DEPTHWISE: dict[str, dict[Layer, int]] = {  # the depthwise convolutions alone of networks whose other ones are 1x1
    "mobilenet_v2": _net(
        False,
        (1, 32, 112, 32, 3, 3, 1, 1, 1, 32), (1, 96, 112, 96, 3, 3, 2, 1, 1, 96), (1, 144, 56, 144, 3, 3, 1, 1, 1, 144),
        (1, 144, 56, 144, 3, 3, 2, 1, 1, 144), (2, 192, 28, 192, 3, 3, 1, 1, 1, 192), (1, 192, 28, 192, 3, 3, 2, 1, 1, 192),
        (4, 384, 14, 384, 3, 3, 1, 1, 1, 384), (2, 576, 14, 576, 3, 3, 1, 1, 1, 576), (1, 576, 14, 576, 3, 3, 2, 1, 1, 576),
        (3, 960, 7, 960, 3, 3, 1, 1, 1, 960),
    ),
    "efficientnet_b0": _net(
        False,
        (1, 32, 112, 32, 3, 3, 1, 1, 1, 32), (1, 96, 112, 96, 3, 3, 2, 1, 1, 96), (1, 144, 56, 144, 3, 3, 1, 1, 1, 144),
        (1, 144, 56, 144, 5, 5, 2, 2, 2, 144), (1, 240, 28, 240, 5, 5, 1, 2, 2, 240), (1, 240, 28, 240, 3, 3, 2, 1, 1, 240),
        (2, 480, 14, 480, 3, 3, 1, 1, 1, 480), (1, 480, 14, 480, 5, 5, 1, 2, 2, 480), (2, 672, 14, 672, 5, 5, 1, 2, 2, 672),
        (1, 672, 14, 672, 5, 5, 2, 2, 2, 672), (3, 1152, 7, 1152, 5, 5, 1, 2, 2, 1152),
        (1, 1152, 7, 1152, 3, 3, 1, 1, 1, 1152),
    ),
    "convnext_tiny": _net(
        True,
        (3, 96, 56, 96, 7, 7, 1, 3, 3, 96), (3, 192, 28, 192, 7, 7, 1, 3, 3, 192), (9, 384, 14, 384, 7, 7, 1, 3, 3, 384),
        (3, 768, 7, 768, 7, 7, 1, 3, 3, 768),
    ),
}
_RESNET = (Pooling(64, 112, 3, 2, 1, False),)
POOLINGS: dict[str, tuple[Pooling, ...]] = {  # network -> its distinct max poolings, in the order of the first call
    "alexnet": tuple(Pooling(c, h, 3, 2, 0, False) for c, h in ((64, 55), (192, 27), (256, 13))),
    "vgg16": tuple(Pooling(c, h, 2, 2, 0, False) for c, h in ((64, 224), (128, 112), (256, 56), (512, 28), (512, 14))),
    "googlenet": (
        Pooling(64, 112, 3, 2, 0, True), Pooling(192, 56, 3, 2, 0, True), Pooling(192, 28, 3, 1, 1, True),
        Pooling(256, 28, 3, 1, 1, True), Pooling(480, 28, 3, 2, 0, True), Pooling(480, 14, 3, 1, 1, True),
        Pooling(512, 14, 3, 1, 1, True), Pooling(528, 14, 3, 1, 1, True), Pooling(832, 14, 2, 2, 0, True),
        Pooling(832, 7, 3, 1, 1, True),
    ),
    "inception_v3": tuple(Pooling(c, h, 3, 2, 0, False) for c, h in ((64, 147), (192, 71), (288, 35), (768, 17))),
    **dict.fromkeys(("resnet18", "resnet50", "resnet152", "resnext50_32x4d", "wide_resnet50_2"), _RESNET),
}
# fmt: on


def distinct(networks: Iterable[str] = tuple(NETWORKS)) -> dict[Layer, tuple[str, ...]]:
    """The distinct layers of these networks, each with the networks that have it."""
    found: dict[Layer, tuple[str, ...]] = {}
    for network in networks:
        for layer in {**NETWORKS, **DEPTHWISE}[network]:
            found[layer] = (*found.get(layer, ()), network)
    return found


def representative() -> dict[Layer, tuple[str, ...]]:
    """One layer in about four, every kind among them: what a quick benchmark times."""
    chosen: dict[Layer, tuple[str, ...]] = {}
    seen: Counter[str] = Counter()
    for layer, networks in distinct().items():
        if seen[layer.kind] % {"1x1": 6, "3x3": 4, "5x5, 7x1 and others": 4}.get(layer.kind, 2) == 0:
            chosen[layer] = networks
        seen[layer.kind] += 1
    return chosen


def poolings() -> list[Pooling]:
    """The distinct max poolings of the nine networks."""
    return list(dict.fromkeys(layer for layers in POOLINGS.values() for layer in layers))


def representative_poolings() -> list[Pooling]:
    """A large and a small one of every kind, and ResNet's: what a quick benchmark times."""
    chosen = [*_RESNET]
    for kind in dict.fromkeys(layer.kind for layer in poolings()):
        members = sorted((layer for layer in poolings() if layer.kind == kind), key=lambda layer: layer.bytes())
        chosen += [members[0], members[-1]]
    return list(dict.fromkeys(chosen))


def extract(network: str) -> dict[Layer, int]:
    """The same table from torchvision's model, by hooks: what the test compares."""
    model = _model(network)
    found: Counter[Layer] = Counter()

    def note(module: torch.nn.Conv2d, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        (x,) = args
        assert x.shape[2] == x.shape[3]
        assert module.stride[0] == module.stride[1]
        assert module.dilation == (1, 1)
        found[Layer(
            x.shape[1], x.shape[2], module.out_channels, *module.kernel_size, module.stride[0], *module.padding,
            module.groups, module.bias is not None,
        )] += 1  # fmt: skip

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(note)
    model(_image(network))
    return dict(found)


def extract_poolings(network: str) -> tuple[Pooling, ...]:
    """The same for max poolings, also those that a forward calls as a function."""
    found: dict[Pooling, None] = {}

    class Note(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.nn.functional.max_pool2d:
                call = dict(
                    zip(("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode"), args, strict=False)
                )
                call.update(kwargs or {})
                x, kernel = call["input"], call["kernel_size"]
                stride, padding = call.get("stride") or kernel, call.get("padding", 0)
                found[Pooling(x.shape[1], x.shape[2], kernel, stride, padding, call.get("ceil_mode", False))] = None
            return func(*args, **(kwargs or {}))

    model, image = _model(network), _image(network)
    with Note():
        model(image)
    return tuple(found)


def _model(network: str) -> torch.nn.Module:
    import torchvision

    options = {"aux_logits": False, "init_weights": False} if network in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):
        return torchvision.models.get_model(network, weights=None, **options).eval()


def _image(network: str) -> torch.Tensor:
    size = 299 if network == "inception_v3" else 224
    return torch.empty(1, 3, size, size, device="meta")
