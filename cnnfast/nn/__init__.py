"""Drop-in modules: subclasses of ``torch.nn``'s, with their constructors, parameters and ``state_dict``."""

from cnnfast.nn.conv2d import Conv2d
from cnnfast.nn.max_pool2d import MaxPool2d

__all__ = ["Conv2d", "MaxPool2d"]
