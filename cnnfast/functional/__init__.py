"""``torch.nn.functional``'s signatures, served by cnnfast's kernels: one module an operation.

Each function first lets ``__torch_function__`` have its say, then normalises its arguments, reads the settings and
calls the differentiable operator. What no operator of ours takes (integer and complex dtypes, other devices, inputs
without channels) goes to torch, is reported to ``explain`` with its reason, and is an error under ``strict()``.
"""

from cnnfast.functional.adaptive_avg_pool2d import adaptive_avg_pool2d
from cnnfast.functional.adaptive_max_pool2d import adaptive_max_pool2d
from cnnfast.functional.add_act import add_act
from cnnfast.functional.avg_pool2d import avg_pool2d
from cnnfast.functional.batch_norm import batch_norm, batch_norm_act
from cnnfast.functional.conv1d import conv1d
from cnnfast.functional.conv2d import conv2d
from cnnfast.functional.conv_bn_act import conv_bn_act
from cnnfast.functional.conv_transpose2d import conv_transpose2d
from cnnfast.functional.max_pool2d import max_pool2d

__all__ = [
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "add_act",
    "avg_pool2d",
    "batch_norm",
    "batch_norm_act",
    "conv1d",
    "conv2d",
    "conv_bn_act",
    "conv_transpose2d",
    "max_pool2d",
]
