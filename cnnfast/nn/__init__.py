"""Drop-in modules: subclasses of ``torch.nn``'s, with their constructors, parameters and ``state_dict``."""

from cnnfast.nn.conv2d import Conv2d

__all__ = ["Conv2d"]
