"""ResNet (He et al. 2015), ResNeXt (Xie et al. 2016) and Wide ResNet (Zagoruyko and Komodakis 2016).

As torchvision has them: the stride stands in a bottleneck's 3x3 convolution, not in its first ("v1.5").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, ReLU

from cnnfast.models._blocks import Chain, conv_norm_act, conv_norm_act_pending
from cnnfast.models._registry import network
from cnnfast.nn import AdaptiveAvgPool2d, BatchNorm2d, Conv2d, MaxPool2d

Norm = Callable[[int], torch.nn.Module]


def _conv3x3(channels: int, filters: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> Conv2d:
    return Conv2d(channels, filters, 3, stride, dilation, dilation, groups, bias=False)


def _conv1x1(channels: int, filters: int, stride: int = 1) -> Conv2d:
    return Conv2d(channels, filters, 1, stride, bias=False)


class BasicBlock(torch.nn.Module):
    """Two 3x3 convolutions around which the input passes, itself or through ``downsample``.

    Args:
        inplanes: Channels of the input.
        planes: Filters of both convolutions.
        stride: Of the first one.
        downsample: What gives the input the result's shape; None where it has it.
        groups, base_width, dilation: Only 1, 64 and 1.
        norm_layer: Makes a norm of so many channels; cnnfast's batch norm.
    """

    expansion = 1

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: torch.nn.Module | None = None, groups: int = 1,
        base_width: int = 64, dilation: int = 1, norm_layer: Norm | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if groups != 1 or base_width != 64:
            raise ValueError(f"BasicBlock: expected groups=1 and base_width=64, got {groups} and {base_width}")
        if dilation > 1:
            raise NotImplementedError(f"BasicBlock: expected dilation=1, got {dilation}")
        norm = norm_layer or BatchNorm2d
        self.conv1 = _conv3x3(inplanes, planes, stride)
        self.bn1 = norm(planes)
        self.relu = ReLU(inplace=True)
        self.conv2 = _conv3x3(planes, planes)
        self.bn2 = norm(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, inplanes, H, W) to (N, planes, P, Q)."""
        y = conv_norm_act_pending(self.conv1, self.bn1, self.relu, x)
        identity = x if self.downsample is None else self.downsample(x)
        return conv_norm_act(self.conv2, self.bn2, self.relu, y, identity)


class Bottleneck(torch.nn.Module):
    """1x1, 3x3 and 1x1 convolutions around which the input passes, itself or through ``downsample``.

    Args:
        inplanes: Channels of the input.
        planes: A quarter of the result's channels; with ``base_width`` / 64 and ``groups`` it gives the inner width.
        stride, groups, dilation: Of the 3x3 convolution.
        downsample: What gives the input the result's shape; None where it has it.
        base_width: Inner channels of a group, where ``planes`` is 64.
        norm_layer: Makes a norm of so many channels; cnnfast's batch norm.
    """

    expansion = 4

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: torch.nn.Module | None = None, groups: int = 1,
        base_width: int = 64, dilation: int = 1, norm_layer: Norm | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        norm = norm_layer or BatchNorm2d
        width = int(planes * (base_width / 64)) * groups
        self.conv1 = _conv1x1(inplanes, width)
        self.bn1 = norm(width)
        self.conv2 = _conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm(width)
        self.conv3 = _conv1x1(width, planes * self.expansion)
        self.bn3 = norm(planes * self.expansion)
        self.relu = ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, inplanes, H, W) to (N, 4 * planes, P, Q)."""
        y = conv_norm_act_pending(self.conv1, self.bn1, self.relu, x)
        y = conv_norm_act_pending(self.conv2, self.bn2, self.relu, y)
        identity = x if self.downsample is None else self.downsample(x)
        return conv_norm_act(self.conv3, self.bn3, self.relu, y, identity)


class ResNet(torch.nn.Module):
    """A 7x7 convolution, pooling, four stages of residual blocks, and a fully connected layer.

    Args:
        block: :class:`BasicBlock`, :class:`Bottleneck`, or a class with their constructor and ``expansion``.
        layers: Blocks of each of the four stages.
        num_classes: Of the classifier.
        zero_init_residual: Start with the last norm of every block at 0: each block is then the identity.
        groups, width_per_group: Of the bottlenecks: (32, 4) is ResNeXt's 32x4d, (1, 128) a wide ResNet.
        replace_stride_with_dilation: For the last three stages, whether they dilate instead of striding.
        norm_layer: Makes a norm of so many channels; cnnfast's batch norm, which alone is fused.
    """

    def __init__(
        self, block: Any, layers: Sequence[int], num_classes: int = 1000, zero_init_residual: bool = False,
        groups: int = 1, width_per_group: int = 64, replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Norm | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        dilate = (False, False, False) if replace_stride_with_dilation is None else replace_stride_with_dilation
        if len(dilate) != 3:
            raise ValueError(f"replace_stride_with_dilation: expected None or three booleans, got {dilate!r}")
        self._norm_layer = norm_layer or BatchNorm2d
        self.inplanes, self.dilation = 64, 1
        self.groups, self.base_width = groups, width_per_group
        self.conv1 = Conv2d(3, self.inplanes, 7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = ReLU(inplace=True)
        self.maxpool = MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._stage(block, 64, layers[0], 1, False)
        self.layer2 = self._stage(block, 128, layers[1], 2, dilate[0])
        self.layer3 = self._stage(block, 256, layers[2], 2, dilate[1])
        self.layer4 = self._stage(block, 512, layers[3], 2, dilate[2])
        self.avgpool = AdaptiveAvgPool2d((1, 1))
        self.fc = Linear(512 * block.expansion, num_classes)

        for module in self.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (torch.nn.BatchNorm2d, torch.nn.GroupNorm)):
                torch.nn.init.ones_(module.weight)
                torch.nn.init.zeros_(module.bias)
        for module in self.modules() if zero_init_residual else ():
            last: Any = None
            if isinstance(module, (BasicBlock, Bottleneck)):
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
            if last is not None and last.weight is not None:
                torch.nn.init.zeros_(last.weight)

    def _stage(self, block: Any, planes: int, blocks: int, stride: int, dilate: bool) -> torch.nn.Sequential:
        """Blocks of one map size; the first one changes size and channels, and keeps the dilation from before."""
        before, filters = self.dilation, planes * block.expansion
        if dilate:
            self.dilation, stride = self.dilation * stride, 1
        downsample = None
        if stride != 1 or self.inplanes != filters:
            downsample = Chain(_conv1x1(self.inplanes, filters, stride), self._norm_layer(filters))
        stage = []
        for i in range(blocks):
            first = (stride, downsample) if i == 0 else (1, None)
            dilation = before if i == 0 else self.dilation
            made = block(self.inplanes, planes, *first, self.groups, self.base_width, dilation, self._norm_layer)
            stage.append(made)
            self.inplanes = filters
        return torch.nn.Sequential(*stage)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, num_classes)."""
        x = self.maxpool(conv_norm_act(self.conv1, self.bn1, self.relu, x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _fixed(options: dict[str, Any], **values: int) -> dict[str, Any]:
    """Options with those that make a network what its name says."""
    for key, value in values.items():
        if options.setdefault(key, value) != value:
            raise ValueError(f"{key}: expected {value}, which the network's name says, got {options[key]}")
    return options


@network()
def resnet18(**options: Any) -> ResNet:
    """ResNet-18; options are :class:`ResNet`'s."""
    return ResNet(BasicBlock, (2, 2, 2, 2), **options)


@network()
def resnet34(**options: Any) -> ResNet:
    """ResNet-34; options are :class:`ResNet`'s."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **options)


@network()
def resnet50(**options: Any) -> ResNet:
    """ResNet-50; options are :class:`ResNet`'s."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **options)


@network()
def resnet101(**options: Any) -> ResNet:
    """ResNet-101; options are :class:`ResNet`'s."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **options)


@network()
def resnet152(**options: Any) -> ResNet:
    """ResNet-152; options are :class:`ResNet`'s."""
    return ResNet(Bottleneck, (3, 8, 36, 3), **options)


@network()
def resnext50_32x4d(**options: Any) -> ResNet:
    """ResNeXt-50 with 32 groups of 4 channels; options are :class:`ResNet`'s."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **_fixed(options, groups=32, width_per_group=4))


@network()
def resnext101_32x8d(**options: Any) -> ResNet:
    """ResNeXt-101 with 32 groups of 8 channels; options are :class:`ResNet`'s."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **_fixed(options, groups=32, width_per_group=8))


@network()
def wide_resnet50_2(**options: Any) -> ResNet:
    """ResNet-50 with twice as wide bottlenecks; options are :class:`ResNet`'s."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **_fixed(options, width_per_group=128))


@network()
def wide_resnet101_2(**options: Any) -> ResNet:
    """ResNet-101 with twice as wide bottlenecks; options are :class:`ResNet`'s."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **_fixed(options, width_per_group=128))
