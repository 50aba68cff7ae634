"""VGG (Simonyan and Zisserman 2014) with 11 to 19 layers, with and without batch norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Dropout, Linear, ReLU

from cnnfast.models._blocks import Chain
from cnnfast.models._registry import network
from cnnfast.nn import AdaptiveAvgPool2d, BatchNorm2d, Conv2d, MaxPool2d

WIDTHS = (64, 128, 256, 512, 512)
DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(torch.nn.Module):
    """Five stages of 3x3 convolutions, each pooled, and three fully connected layers.

    Args:
        features: What comes before the classifier: (N, 3, H, W) to (N, 512, P, Q); see :func:`features`.
        num_classes: Of the classifier.
        init_weights: Kaiming's initialisation (fan out); otherwise torch's own.
        dropout: Probability, after each of the first two fully connected layers.
    """

    def __init__(
        self, features: torch.nn.Module, num_classes: int = 1000, init_weights: bool = True, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.features = features
        self.avgpool = AdaptiveAvgPool2d((7, 7))
        self.classifier = torch.nn.Sequential(
            Linear(512 * 7 * 7, 4096), ReLU(inplace=True), Dropout(dropout),
            Linear(4096, 4096), ReLU(inplace=True), Dropout(dropout),
            Linear(4096, num_classes),
        )  # fmt: skip
        for module in self.modules() if init_weights else ():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Linear):
                torch.nn.init.normal_(module.weight, 0, 0.01)
            elif isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.ones_(module.weight)
            else:
                continue
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W), of 32 x 32 or more, to (N, num_classes)."""
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def features(depths: Sequence[int], batch_norm: bool = False) -> Chain:
    """The convolutions: ``depths`` says how many stand before each pooling."""
    layers: list[torch.nn.Module] = []
    channels = 3
    for depth, width in zip(depths, WIDTHS, strict=True):
        for _ in range(depth):
            norm = [BatchNorm2d(width)] if batch_norm else []
            layers += [Conv2d(channels, width, 3, padding=1), *norm, ReLU(inplace=True)]
            channels = width
        layers.append(MaxPool2d(2, stride=2))
    return Chain(*layers)


_UNINITIALISED = {"init_weights": False}


@network(loaded=_UNINITIALISED)
def vgg11(**options: Any) -> VGG:
    """VGG-11 (the paper's A); options are :class:`VGG`'s."""
    return VGG(features(DEPTHS[11]), **options)


@network(loaded=_UNINITIALISED)
def vgg11_bn(**options: Any) -> VGG:
    """VGG-11 with batch norm; options are :class:`VGG`'s."""
    return VGG(features(DEPTHS[11], batch_norm=True), **options)


@network(loaded=_UNINITIALISED)
def vgg13(**options: Any) -> VGG:
    """VGG-13 (B); options are :class:`VGG`'s."""
    return VGG(features(DEPTHS[13]), **options)


@network(loaded=_UNINITIALISED)
def vgg13_bn(**options: Any) -> VGG:
    """VGG-13 with batch norm; options are :class:`VGG`'s."""
    return VGG(features(DEPTHS[13], batch_norm=True), **options)


@network(loaded=_UNINITIALISED)
def vgg16(**options: Any) -> VGG:
    """VGG-16 (D); options are :class:`VGG`'s."""
    return VGG(features(DEPTHS[16]), **options)


@network(loaded=_UNINITIALISED)
def vgg16_bn(**options: Any) -> VGG:
    """VGG-16 with batch norm; options are :class:`VGG`'s."""
    return VGG(features(DEPTHS[16], batch_norm=True), **options)


@network(loaded=_UNINITIALISED)
def vgg19(**options: Any) -> VGG:
    """VGG-19 (E); options are :class:`VGG`'s."""
    return VGG(features(DEPTHS[19]), **options)


@network(loaded=_UNINITIALISED)
def vgg19_bn(**options: Any) -> VGG:
    """VGG-19 with batch norm; options are :class:`VGG`'s."""
    return VGG(features(DEPTHS[19], batch_norm=True), **options)
