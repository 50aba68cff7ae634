"""AlexNet (Krizhevsky 2014, one tower, as torchvision has it) and ZFNet (Zeiler and Fergus 2013)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Dropout, Linear, ReLU

from cnnfast.models._registry import network
from cnnfast.nn import AdaptiveAvgPool2d, Conv2d, MaxPool2d


class AlexNet(torch.nn.Module):
    """Five convolutions, three of them pooled, and three fully connected layers; (N, 3, H, W) to (N, num_classes).

    Args:
        num_classes: Of the classifier.
        dropout: Probability, before each of the first two fully connected layers.
    """

    def __init__(self, num_classes: int = 1000, dropout: float = 0.5) -> None:
        super().__init__()
        self.features = torch.nn.Sequential(
            Conv2d(3, 64, 11, stride=4, padding=2), ReLU(inplace=True), MaxPool2d(3, stride=2),
            Conv2d(64, 192, 5, padding=2), ReLU(inplace=True), MaxPool2d(3, stride=2),
            *_three(192, (384, 256, 256)), MaxPool2d(3, stride=2),
        )  # fmt: skip
        self.avgpool = AdaptiveAvgPool2d((6, 6))
        self.classifier = _classifier(256 * 6 * 6, num_classes, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W), of 63 x 63 or more, to (N, num_classes)."""
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class ZFNet(torch.nn.Module):
    """AlexNet that looks closer: 7x7 filters with stride 2 in front, and more of them behind.

    Its maps are the paper's: 110, 55, 26, 13 and 6 pixels wide for images of 224. The paper's contrast normalisation is
    left out, as torchvision leaves AlexNet's out.

    Args:
        num_classes: Of the classifier.
        dropout: Probability, before each of the first two fully connected layers.
        filters: Of the third, fourth and fifth convolution. Other published numbers: (384, 384, 256) is the paper's figure
            3, (512, 1024, 512) its table 3.
    """

    def __init__(
        self, num_classes: int = 1000, dropout: float = 0.5, filters: Sequence[int] = (512, 512, 1024)
    ) -> None:
        super().__init__()
        if len(filters) != 3:
            raise ValueError(f"ZFNet: expected filters for three convolutions, got {filters!r}")
        self.features = torch.nn.Sequential(
            Conv2d(3, 96, 7, stride=2, padding=1), ReLU(inplace=True), MaxPool2d(3, stride=2, ceil_mode=True),
            Conv2d(96, 256, 5, stride=2), ReLU(inplace=True), MaxPool2d(3, stride=2, ceil_mode=True),
            *_three(256, filters), MaxPool2d(3, stride=2),
        )  # fmt: skip
        self.avgpool = AdaptiveAvgPool2d((6, 6))
        self.classifier = _classifier(filters[2] * 6 * 6, num_classes, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W), of 47 x 47 or more, to (N, num_classes)."""
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def _three(channels: int, filters: Sequence[int]) -> list[torch.nn.Module]:
    """Three 3x3 convolutions, each with its ReLU."""
    layers: list[torch.nn.Module] = []
    for into in filters:
        layers += [Conv2d(channels, into, 3, padding=1), ReLU(inplace=True)]
        channels = into
    return layers


def _classifier(features: int, num_classes: int, dropout: float) -> torch.nn.Sequential:
    return torch.nn.Sequential(
        Dropout(dropout), Linear(features, 4096), ReLU(inplace=True),
        Dropout(dropout), Linear(4096, 4096), ReLU(inplace=True),
        Linear(4096, num_classes),
    )  # fmt: skip


@network()
def alexnet(**options: Any) -> AlexNet:
    """AlexNet; options are :class:`AlexNet`'s."""
    return AlexNet(**options)


@network()
def zfnet(**options: Any) -> ZFNet:
    """ZFNet; options are :class:`ZFNet`'s."""
    return ZFNet(**options)
