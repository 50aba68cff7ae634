"""Inception v2 (Ioffe and Szegedy 2015, "BN-Inception") and v3 (Szegedy et al. 2015, as torchvision has it)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Dropout, Linear

from cnnfast.models._blocks import BasicConv2d, initialise, transformed
from cnnfast.models._registry import network
from cnnfast.nn import AdaptiveAvgPool2d, AvgPool2d, MaxPool2d

Block = Callable[..., torch.nn.Module]


# ---- Inception v3 ----------------------------------------------------------------------------------------------------


class InceptionOutputs(NamedTuple):
    """What Inception v3 returns in training with its auxiliary head; each (N, num_classes)."""

    logits: Tensor
    aux_logits: Tensor | None


class InceptionA(torch.nn.Module):
    """1x1; 5x5; two 3x3; pooling. (N, in_channels, H, W) to (N, 224 + pool_features, H, W)."""

    def __init__(self, in_channels: int, pool_features: int, conv_block: Block | None = None) -> None:
        super().__init__()
        conv = conv_block or BasicConv2d
        self.branch1x1 = conv(in_channels, 64, kernel_size=1)
        self.branch5x5_1 = conv(in_channels, 48, kernel_size=1)
        self.branch5x5_2 = conv(48, 64, kernel_size=5, padding=2)
        self.branch3x3dbl_1 = conv(in_channels, 64, kernel_size=1)
        self.branch3x3dbl_2 = conv(64, 96, kernel_size=3, padding=1)
        self.branch3x3dbl_3 = conv(96, 96, kernel_size=3, padding=1)
        self.pool = AvgPool2d(3, stride=1, padding=1)
        self.branch_pool = conv(in_channels, pool_features, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """The branches' results, concatenated."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        branches = [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(self.pool(x))]
        return torch.cat(branches, 1)


class InceptionB(torch.nn.Module):
    """To half the size: 3x3; two 3x3; pooling. (N, in_channels, H, W) to (N, 480 + in_channels, P, Q)."""

    def __init__(self, in_channels: int, conv_block: Block | None = None) -> None:
        super().__init__()
        conv = conv_block or BasicConv2d
        self.branch3x3 = conv(in_channels, 384, kernel_size=3, stride=2)
        self.branch3x3dbl_1 = conv(in_channels, 64, kernel_size=1)
        self.branch3x3dbl_2 = conv(64, 96, kernel_size=3, padding=1)
        self.branch3x3dbl_3 = conv(96, 96, kernel_size=3, stride=2)
        self.pool = MaxPool2d(3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """The branches' results, concatenated."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, self.pool(x)], 1)


class InceptionC(torch.nn.Module):
    """1x1; 7x7, and twice 7x7, as 1x7 and 7x1; pooling. (N, in_channels, H, W) to (N, 768, H, W)."""

    def __init__(self, in_channels: int, channels_7x7: int, conv_block: Block | None = None) -> None:
        super().__init__()
        conv = conv_block or BasicConv2d
        row: dict[str, Any] = {"kernel_size": (1, 7), "padding": (0, 3)}
        column: dict[str, Any] = {"kernel_size": (7, 1), "padding": (3, 0)}
        c = channels_7x7
        self.branch1x1 = conv(in_channels, 192, kernel_size=1)
        self.branch7x7_1 = conv(in_channels, c, kernel_size=1)
        self.branch7x7_2 = conv(c, c, **row)
        self.branch7x7_3 = conv(c, 192, **column)
        self.branch7x7dbl_1 = conv(in_channels, c, kernel_size=1)
        self.branch7x7dbl_2 = conv(c, c, **column)
        self.branch7x7dbl_3 = conv(c, c, **row)
        self.branch7x7dbl_4 = conv(c, c, **column)
        self.branch7x7dbl_5 = conv(c, 192, **row)
        self.pool = AvgPool2d(3, stride=1, padding=1)
        self.branch_pool = conv(in_channels, 192, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """The branches' results, concatenated."""
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(self.pool(x))], 1)


class InceptionD(torch.nn.Module):
    """To half the size: 3x3; 7x7 as 1x7 and 7x1, and 3x3; pooling. (N, in_channels, H, W) to (N, 512 + in_channels, P, Q)."""

    def __init__(self, in_channels: int, conv_block: Block | None = None) -> None:
        super().__init__()
        conv = conv_block or BasicConv2d
        self.branch3x3_1 = conv(in_channels, 192, kernel_size=1)
        self.branch3x3_2 = conv(192, 320, kernel_size=3, stride=2)
        self.branch7x7x3_1 = conv(in_channels, 192, kernel_size=1)
        self.branch7x7x3_2 = conv(192, 192, kernel_size=(1, 7), padding=(0, 3))
        self.branch7x7x3_3 = conv(192, 192, kernel_size=(7, 1), padding=(3, 0))
        self.branch7x7x3_4 = conv(192, 192, kernel_size=3, stride=2)
        self.pool = MaxPool2d(3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """The branches' results, concatenated."""
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(seven), self.pool(x)], 1)


class InceptionE(torch.nn.Module):
    """1x1; 1x3 beside 3x1; 3x3, then 1x3 beside 3x1; pooling. (N, in_channels, H, W) to (N, 2048, H, W)."""

    def __init__(self, in_channels: int, conv_block: Block | None = None) -> None:
        super().__init__()
        conv = conv_block or BasicConv2d
        row: dict[str, Any] = {"kernel_size": (1, 3), "padding": (0, 1)}
        column: dict[str, Any] = {"kernel_size": (3, 1), "padding": (1, 0)}
        self.branch1x1 = conv(in_channels, 320, kernel_size=1)
        self.branch3x3_1 = conv(in_channels, 384, kernel_size=1)
        self.branch3x3_2a = conv(384, 384, **row)
        self.branch3x3_2b = conv(384, 384, **column)
        self.branch3x3dbl_1 = conv(in_channels, 448, kernel_size=1)
        self.branch3x3dbl_2 = conv(448, 384, kernel_size=3, padding=1)
        self.branch3x3dbl_3a = conv(384, 384, **row)
        self.branch3x3dbl_3b = conv(384, 384, **column)
        self.pool = AvgPool2d(3, stride=1, padding=1)
        self.branch_pool = conv(in_channels, 192, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """The branches' results, concatenated."""
        one = self.branch3x3_1(x)
        two = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat([
            self.branch1x1(x), self.branch3x3_2a(one), self.branch3x3_2b(one), self.branch3x3dbl_3a(two),
            self.branch3x3dbl_3b(two), self.branch_pool(self.pool(x)),
        ], 1)  # fmt: skip


class InceptionAux(torch.nn.Module):
    """A classifier in the middle of the network, for training: (N, in_channels, H, W) to (N, num_classes)."""

    def __init__(self, in_channels: int, num_classes: int, conv_block: Block | None = None) -> None:
        super().__init__()
        conv = conv_block or BasicConv2d
        self.pool = AvgPool2d(5, stride=3)
        self.conv0 = conv(in_channels, 128, kernel_size=1)
        self.conv1 = conv(128, 768, kernel_size=5)
        self.conv1.stddev = 0.01  # type: ignore[assignment]
        self.avgpool = AdaptiveAvgPool2d((1, 1))
        self.fc = Linear(768, num_classes)
        self.fc.stddev = 0.001  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """Maps of 17 x 17 or more to logits."""
        x = self.avgpool(self.conv1(self.conv0(self.pool(x))))
        return self.fc(torch.flatten(x, 1))


class Inception3(torch.nn.Module):
    """Five convolutions, eleven Inception modules of five kinds, and a classifier; one more in the middle, in training.

    Args:
        num_classes: Of the classifiers.
        aux_logits: With the auxiliary head ``AuxLogits``.
        transform_input: Input is normalised by ImageNet's statistics, the weights expect mean and deviation 0.5.
        inception_blocks: What makes convolutions, the five kinds of Inception module and the head, instead of
            :class:`BasicConv2d`, :class:`InceptionA` to :class:`InceptionE` and :class:`InceptionAux`.
        init_weights: The truncated normal initialisation (None means True); otherwise torch's own.
        dropout: Probability before the classifier.
    """

    def __init__(
        self, num_classes: int = 1000, aux_logits: bool = True, transform_input: bool = False,
        inception_blocks: Sequence[Block] | None = None, init_weights: bool | None = None, dropout: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__()
        ours = (BasicConv2d, InceptionA, InceptionB, InceptionC, InceptionD, InceptionE, InceptionAux)
        blocks: Sequence[Block] = ours if inception_blocks is None else inception_blocks
        if len(blocks) != 7:
            raise ValueError(f"Inception3: expected 7 blocks (convolution, Inception A to E, head), got {len(blocks)}")
        conv, a, b, c, d, e, head = blocks
        self.aux_logits, self.transform_input = aux_logits, transform_input
        self.Conv2d_1a_3x3 = conv(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = conv(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = conv(32, 64, kernel_size=3, padding=1)
        self.maxpool1 = MaxPool2d(3, stride=2)
        self.Conv2d_3b_1x1 = conv(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = conv(80, 192, kernel_size=3)
        self.maxpool2 = MaxPool2d(3, stride=2)
        self.Mixed_5b = a(192, pool_features=32)
        self.Mixed_5c = a(256, pool_features=64)
        self.Mixed_5d = a(288, pool_features=64)
        self.Mixed_6a = b(288)
        self.Mixed_6b = c(768, channels_7x7=128)
        self.Mixed_6c = c(768, channels_7x7=160)
        self.Mixed_6d = c(768, channels_7x7=160)
        self.Mixed_6e = c(768, channels_7x7=192)
        self.AuxLogits = head(768, num_classes) if aux_logits else None
        self.Mixed_7a = d(768)
        self.Mixed_7b = e(1280)
        self.Mixed_7c = e(2048)
        self.avgpool = AdaptiveAvgPool2d((1, 1))
        self.dropout = Dropout(dropout)
        self.fc = Linear(2048, num_classes)
        if init_weights or init_weights is None:
            initialise(self, std=0.1)

    def forward(self, x: Tensor) -> Tensor | InceptionOutputs:
        """(N, 3, H, W), of 75 x 75 or more, to (N, num_classes); in training, with its head, :class:`InceptionOutputs`."""
        if self.transform_input:
            x = transformed(x)
        x = self.maxpool1(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = self.maxpool2(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        aux = self.AuxLogits(x) if self.training and self.AuxLogits is not None else None
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        x = self.fc(torch.flatten(self.dropout(self.avgpool(x)), 1))
        return InceptionOutputs(x, aux) if self.training and self.aux_logits else x


# ---- Inception v2 ----------------------------------------------------------------------------------------------------


class InceptionBN(torch.nn.Module):
    """GoogLeNet's module with the 5x5 convolution as two of 3x3.

    Args:
        in_channels: Of the input.
        ch1x1: Filters of the 1x1 branch; 0: there is none, the module halves the map, and its pooling passes all channels.
        ch3x3red, ch3x3, ch5x5red, ch5x5: Filters of the 3x3 branch, and of the branch of two 3x3.
        pool: The pooling branch's pooling, ``"avg"`` or ``"max"``.
        pool_proj: Filters of the convolution behind it; none where the map is halved.
    """

    def __init__(
        self, in_channels: int, ch1x1: int, ch3x3red: int, ch3x3: int, ch5x5red: int, ch5x5: int, pool: str,
        pool_proj: int,
    ) -> None:  # fmt: skip
        super().__init__()
        stride = 1 if ch1x1 else 2
        self.branch1 = BasicConv2d(in_channels, ch1x1, kernel_size=1) if ch1x1 else None
        self.branch2 = torch.nn.Sequential(
            BasicConv2d(in_channels, ch3x3red, kernel_size=1),
            BasicConv2d(ch3x3red, ch3x3, kernel_size=3, stride=stride, padding=1),
        )
        self.branch3 = torch.nn.Sequential(
            BasicConv2d(in_channels, ch5x5red, kernel_size=1),
            BasicConv2d(ch5x5red, ch5x5, kernel_size=3, padding=1),
            BasicConv2d(ch5x5, ch5x5, kernel_size=3, stride=stride, padding=1),
        )
        pooling = AvgPool2d if pool == "avg" else MaxPool2d
        self.branch4 = torch.nn.Sequential(  # halving, it rounds up, as the convolutions' padding does
            pooling(3, stride=stride, padding=1 if ch1x1 else 0, ceil_mode=not ch1x1),
            *([BasicConv2d(in_channels, pool_proj, kernel_size=1)] if ch1x1 else []),
        )
        self.out_channels = ch1x1 + ch3x3 + ch5x5 + (pool_proj if ch1x1 else in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, P, Q)."""
        first = [] if self.branch1 is None else [self.branch1(x)]
        return torch.cat([*first, self.branch2(x), self.branch3(x), self.branch4(x)], 1)


# of figure 5 in the paper: module, and the arguments of InceptionBN behind in_channels; None: ``projection``
_V2: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("inception3a", (64, 64, 64, 64, 96, "avg", 32)),
    ("inception3b", (64, 64, 96, 64, 96, "avg", 64)),
    ("inception3c", (0, 128, 160, 64, 96, "max", 0)),
    ("inception4a", (224, 64, 96, 96, 128, "avg", 128)),
    ("inception4b", (192, 96, 128, 96, 128, "avg", 128)),
    ("inception4c", (160, 128, 160, 128, 160, "avg", None)),
    ("inception4d", (96, 128, 192, 160, 192, "avg", None)),
    ("inception4e", (0, 128, 192, 192, 256, "max", 0)),
    ("inception5a", (352, 192, 320, 160, 224, "avg", 128)),
    ("inception5b", (352, 192, 320, 192, 224, "max", 128)),
)


class Inception2(torch.nn.Module):
    """Three convolutions, ten Inception modules with batch norm, and a classifier.

    Args:
        num_classes: Of the classifier.
        transform_input: Input is normalised by ImageNet's statistics, the weights expect mean and deviation 0.5.
        init_weights: The truncated normal initialisation; otherwise torch's own.
        dropout: Probability before the classifier; the paper has none.
        projection: Filters behind the pooling of 4c and 4d. The paper's table says 128, and results of 576 channels, for
            which it has to be 96 (as in TensorFlow's networks); with 128 they have 608.
    """

    def __init__(
        self, num_classes: int = 1000, transform_input: bool = False, init_weights: bool = True, dropout: float = 0.0,
        projection: int = 96,
    ) -> None:  # fmt: skip
        super().__init__()
        self.transform_input = transform_input
        self.conv1 = BasicConv2d(3, 64, kernel_size=7, stride=2, padding=3)
        self.maxpool1 = MaxPool2d(3, stride=2, ceil_mode=True)
        self.conv2 = BasicConv2d(64, 64, kernel_size=1)
        self.conv3 = BasicConv2d(64, 192, kernel_size=3, padding=1)
        self.maxpool2 = MaxPool2d(3, stride=2, ceil_mode=True)
        channels = 192
        for name, arguments in _V2:
            filled: list[Any] = [projection if a is None else a for a in arguments]
            module = InceptionBN(channels, *filled)
            self.add_module(name, module)
            channels = module.out_channels
        self.avgpool = AdaptiveAvgPool2d((1, 1))
        self.dropout = Dropout(dropout)
        self.fc = Linear(channels, num_classes)
        if init_weights:
            initialise(self, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W), of 15 x 15 or more, to (N, num_classes)."""
        if self.transform_input:
            x = transformed(x)
        x = self.maxpool2(self.conv3(self.conv2(self.maxpool1(self.conv1(x)))))
        for name, _ in _V2:
            x = self.get_submodule(name)(x)
        return self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))


@network()
def inception_v2(**options: Any) -> Inception2:
    """Inception v2 (BN-Inception); options are :class:`Inception2`'s."""
    return Inception2(**options)


@network(size=299, loaded={"init_weights": False}, published={"transform_input": True}, heads=("AuxLogits",))
def inception_v3(**options: Any) -> Inception3:
    """Inception v3; options are :class:`Inception3`'s."""
    return Inception3(**options)
