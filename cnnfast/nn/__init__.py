"""Drop-in modules: subclasses of ``torch.nn``'s, with their constructors, parameters and ``state_dict``."""

from cnnfast.nn.add_act import AddAct
from cnnfast.nn.batch_norm import BatchNorm2d
from cnnfast.nn.conv2d import Conv2d
from cnnfast.nn.conv_bn_act import ConvBNAct
from cnnfast.nn.max_pool2d import MaxPool2d

__all__ = ["AddAct", "BatchNorm2d", "Conv2d", "ConvBNAct", "MaxPool2d"]
