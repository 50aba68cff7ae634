"""The classic convolutional networks, made of cnnfast's modules, with torchvision's parameter names and arguments.

    model = cnnfast.models.resnet50(num_classes=10)     # or create("resnet50", num_classes=10)
    cnnfast.models.list()
    print(cnnfast.models.describe("resnet50"))          # sizes, parameters, FLOPs, receptive fields

A ``state_dict`` of torchvision's loads strictly, and the other way round; with one seed the initial weights are the same.
"""

from cnnfast.models import _registry
from cnnfast.models._blocks import BasicConv2d
from cnnfast.models._describe import Description, Layer, describe
from cnnfast.models._registry import create
from cnnfast.models.alexnet import AlexNet, ZFNet, alexnet, zfnet
from cnnfast.models.googlenet import GoogLeNet, GoogLeNetOutputs, googlenet
from cnnfast.models.inception import Inception2, Inception3, InceptionOutputs, inception_v2, inception_v3
from cnnfast.models.resnet import (
    BasicBlock,
    Bottleneck,
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from cnnfast.models.vgg import VGG, vgg11, vgg11_bn, vgg13, vgg13_bn, vgg16, vgg16_bn, vgg19, vgg19_bn

list = _registry.names  # not in __all__: `from cnnfast.models import *` leaves Python's own

__all__ = [
    "VGG", "AlexNet", "BasicBlock", "BasicConv2d", "Bottleneck", "Description", "GoogLeNet", "GoogLeNetOutputs",
    "Inception2", "Inception3", "InceptionOutputs", "Layer", "ResNet", "ZFNet", "alexnet", "create", "describe",
    "googlenet", "inception_v2", "inception_v3", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "resnext50_32x4d", "resnext101_32x8d", "vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19",
    "vgg19_bn", "wide_resnet50_2", "wide_resnet101_2", "zfnet",
]  # fmt: skip
