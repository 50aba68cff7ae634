"""GoogLeNet (Szegedy et al. 2014), as torchvision has it: with batch norm, and 3x3 where the paper has 5x5."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Dropout, Linear

from cnnfast.models._blocks import BasicConv2d, initialise, transformed
from cnnfast.models._registry import network
from cnnfast.nn import AdaptiveAvgPool2d, MaxPool2d

Block = Callable[..., torch.nn.Module]


class GoogLeNetOutputs(NamedTuple):
    """What GoogLeNet returns in training with auxiliary heads; each (N, num_classes)."""

    logits: Tensor
    aux_logits2: Tensor | None
    aux_logits1: Tensor | None


class Inception(torch.nn.Module):
    """Four branches over one input, concatenated: 1x1; 1x1 and 3x3; 1x1 and 3x3 again; pooling and 1x1.

    Args:
        in_channels: Of the input.
        ch1x1, ch3x3red, ch3x3, ch5x5red, ch5x5, pool_proj: Filters of the convolutions, in the branches' order.
        conv_block: Makes a convolution; :class:`BasicConv2d`.
    """

    def __init__(
        self, in_channels: int, ch1x1: int, ch3x3red: int, ch3x3: int, ch5x5red: int, ch5x5: int, pool_proj: int,
        conv_block: Block | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        conv = conv_block or BasicConv2d
        self.branch1 = conv(in_channels, ch1x1, kernel_size=1)
        self.branch2 = torch.nn.Sequential(
            conv(in_channels, ch3x3red, kernel_size=1), conv(ch3x3red, ch3x3, kernel_size=3, padding=1)
        )
        self.branch3 = torch.nn.Sequential(
            conv(in_channels, ch5x5red, kernel_size=1), conv(ch5x5red, ch5x5, kernel_size=3, padding=1)
        )
        self.branch4 = torch.nn.Sequential(
            MaxPool2d(3, stride=1, padding=1, ceil_mode=True), conv(in_channels, pool_proj, kernel_size=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, sum of the branches' filters, H, W)."""
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class InceptionAux(torch.nn.Module):
    """A classifier in the middle of the network, for training.

    Args:
        in_channels, num_classes: Of input and result.
        conv_block: Makes a convolution; :class:`BasicConv2d`.
        dropout: Probability, between the two fully connected layers.
    """

    def __init__(
        self, in_channels: int, num_classes: int, conv_block: Block | None = None, dropout: float = 0.7
    ) -> None:
        super().__init__()
        self.avgpool = AdaptiveAvgPool2d((4, 4))
        self.conv = (conv_block or BasicConv2d)(in_channels, 128, kernel_size=1)
        self.fc1 = Linear(2048, 1024)
        self.fc2 = Linear(1024, num_classes)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, num_classes)."""
        x = torch.flatten(self.conv(self.avgpool(x)), 1)
        return self.fc2(self.dropout(torch.relu(self.fc1(x))))


class GoogLeNet(torch.nn.Module):
    """Three convolutions, nine Inception modules, and a classifier; two more of them in the middle, in training.

    Args:
        num_classes: Of the classifiers.
        aux_logits: With the auxiliary heads ``aux1`` and ``aux2``.
        transform_input: Input is normalised by ImageNet's statistics, the weights expect mean and deviation 0.5.
        init_weights: The truncated normal initialisation (None means True); otherwise torch's own.
        blocks: What makes convolutions, Inception modules and heads, instead of :class:`BasicConv2d`,
            :class:`Inception` and :class:`InceptionAux`.
        dropout, dropout_aux: Probabilities before the classifier, and in the heads.
    """

    def __init__(
        self, num_classes: int = 1000, aux_logits: bool = True, transform_input: bool = False,
        init_weights: bool | None = None, blocks: Sequence[Block] | None = None, dropout: float = 0.2,
        dropout_aux: float = 0.7,
    ) -> None:  # fmt: skip
        super().__init__()
        blocks = (BasicConv2d, Inception, InceptionAux) if blocks is None else blocks
        if len(blocks) != 3:
            raise ValueError(f"GoogLeNet: expected 3 blocks (convolution, Inception, head), got {len(blocks)}")
        conv, inception, head = blocks
        self.aux_logits, self.transform_input = aux_logits, transform_input
        self.conv1 = conv(3, 64, kernel_size=7, stride=2, padding=3)
        self.maxpool1 = MaxPool2d(3, stride=2, ceil_mode=True)
        self.conv2 = conv(64, 64, kernel_size=1)
        self.conv3 = conv(64, 192, kernel_size=3, padding=1)
        self.maxpool2 = MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception3a = inception(192, 64, 96, 128, 16, 32, 32)
        self.inception3b = inception(256, 128, 128, 192, 32, 96, 64)
        self.maxpool3 = MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception4a = inception(480, 192, 96, 208, 16, 48, 64)
        self.inception4b = inception(512, 160, 112, 224, 24, 64, 64)
        self.inception4c = inception(512, 128, 128, 256, 24, 64, 64)
        self.inception4d = inception(512, 112, 144, 288, 32, 64, 64)
        self.inception4e = inception(528, 256, 160, 320, 32, 128, 128)
        self.maxpool4 = MaxPool2d(2, stride=2, ceil_mode=True)
        self.inception5a = inception(832, 256, 160, 320, 32, 128, 128)
        self.inception5b = inception(832, 384, 192, 384, 48, 128, 128)
        self.aux1 = head(512, num_classes, dropout=dropout_aux) if aux_logits else None
        self.aux2 = head(528, num_classes, dropout=dropout_aux) if aux_logits else None
        self.avgpool = AdaptiveAvgPool2d((1, 1))
        self.dropout = Dropout(dropout)
        self.fc = Linear(1024, num_classes)
        if init_weights or init_weights is None:
            initialise(self, std=0.01)

    def forward(self, x: Tensor) -> Tensor | GoogLeNetOutputs:
        """(N, 3, H, W), of 15 x 15 or more, to (N, num_classes); in training, with heads, :class:`GoogLeNetOutputs`."""
        if self.transform_input:
            x = transformed(x)
        x = self.conv3(self.conv2(self.maxpool1(self.conv1(x))))
        x = self.maxpool3(self.inception3b(self.inception3a(self.maxpool2(x))))
        x = self.inception4a(x)
        aux1 = self.aux1(x) if self.training and self.aux1 is not None else None
        x = self.inception4d(self.inception4c(self.inception4b(x)))
        aux2 = self.aux2(x) if self.training and self.aux2 is not None else None
        x = self.maxpool4(self.inception4e(x))
        x = self.inception5b(self.inception5a(x))
        x = self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))
        return GoogLeNetOutputs(x, aux2, aux1) if self.training and self.aux_logits else x


@network(
    loaded={"init_weights": False}, published={"transform_input": True, "aux_logits": False}, heads=("aux1", "aux2")
)
def googlenet(**options: Any) -> GoogLeNet:
    """GoogLeNet; options are :class:`GoogLeNet`'s. Torchvision's weights come without trained heads."""
    return GoogLeNet(**options)
