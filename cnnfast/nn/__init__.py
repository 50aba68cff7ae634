"""Drop-in modules: subclasses of ``torch.nn``'s, with their constructors, parameters and ``state_dict``."""

from cnnfast.nn.adaptive_avg_pool2d import AdaptiveAvgPool2d
from cnnfast.nn.adaptive_max_pool2d import AdaptiveMaxPool2d
from cnnfast.nn.add_act import AddAct
from cnnfast.nn.avg_pool2d import AvgPool2d
from cnnfast.nn.batch_norm import BatchNorm2d
from cnnfast.nn.conv1d import Conv1d
from cnnfast.nn.conv2d import Conv2d
from cnnfast.nn.conv_bn_act import ConvBNAct
from cnnfast.nn.conv_transpose2d import ConvTranspose2d
from cnnfast.nn.max_pool2d import MaxPool2d

__all__ = [
    "AdaptiveAvgPool2d",
    "AdaptiveMaxPool2d",
    "AddAct",
    "AvgPool2d",
    "BatchNorm2d",
    "Conv1d",
    "Conv2d",
    "ConvBNAct",
    "ConvTranspose2d",
    "MaxPool2d",
]
