"""What the families share: convolution, norm and activation under torchvision's names, computed by fused operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnnfast.functional.conv_bn_act import Pending
from cnnfast.nn import BatchNorm2d, Conv2d, ConvBNAct
from cnnfast.nn.conv_bn_act import conv_bn_act, conv_bn_act_pending, plain


def conv_norm_act(
    conv: torch.nn.Module,
    norm: torch.nn.Module,
    act: torch.nn.Module,
    x: Tensor | Pending,
    residual: Tensor | None = None,
) -> Tensor:
    """``act(norm(conv(x)) + residual)`` of a block's modules: fused where they are cnnfast's and nobody watches them."""
    if plain(act, torch.nn.ReLU):
        return conv_bn_act(conv, norm, x, residual, "relu")
    return act(conv_bn_act(conv, norm, x, residual, "none"))


def conv_norm_act_pending(
    conv: torch.nn.Module, norm: torch.nn.Module, act: torch.nn.Module, x: Tensor | Pending
) -> Tensor | Pending:
    """:func:`conv_norm_act` of what only another ``conv_norm_act`` reads: in training on a GPU its norm is left to that."""
    if plain(act, torch.nn.ReLU):
        return conv_bn_act_pending(conv, norm, x, "relu")
    return conv_norm_act(conv, norm, act, x)


class Chain(torch.nn.Sequential):
    """A ``torch.nn.Sequential`` that computes (convolution, batch norm[, ReLU]) fused where they follow each other."""

    def forward(self, input: Tensor) -> Tensor:
        """What the modules do, one after the other."""
        modules = [*self, None, None]
        i = 0
        while i < len(modules) - 2:
            module, norm, act = modules[i : i + 3]
            if plain(module, Conv2d) and norm is not None and plain(norm, BatchNorm2d):
                relu = act is not None and plain(act, torch.nn.ReLU)
                input = conv_bn_act(module, norm, input, None, "relu" if relu else "none")
                i += 3 if relu else 2
            else:
                input = module(input)
                i += 1
        return input


class BasicConv2d(ConvBNAct):
    """Convolution without bias, batch norm with ``eps`` 0.001 and ReLU: what the Inception networks are made of.

    Args:
        in_channels, out_channels: Of the convolution.
        options: Its other arguments: ``kernel_size``, ``stride``, ``padding`` (0 unless given) and so on.
    """

    def __init__(self, in_channels: int, out_channels: int, **options: Any) -> None:
        super().__init__(in_channels, out_channels, **{"padding": 0, "eps": 1e-3, **options})


def transformed(x: Tensor) -> Tensor:
    """Images normalised by ImageNet's statistics, (N, 3, H, W), normalised by mean and deviation 0.5 instead."""
    of = zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)
    channels = [x[:, i : i + 1] * (std / 0.5) + (mean - 0.5) / 0.5 for i, (mean, std) in enumerate(of)]
    return torch.cat(channels, 1)


def initialise(model: torch.nn.Module, std: float) -> None:
    """Inception's initialisation: weights from a normal distribution cut off at ±2, deviation a module's ``stddev`` or std."""
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            deviation: Any = getattr(module, "stddev", std)
            torch.nn.init.trunc_normal_(module.weight, mean=0.0, std=float(deviation), a=-2, b=2)
        elif isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
            torch.nn.init.zeros_(module.bias)
