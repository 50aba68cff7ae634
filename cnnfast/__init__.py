"""cnnfast: convolution kernels for PyTorch, hand-written in CUDA C++, Triton and SIMD C++.

    import cnnfast
    model = cnnfast.convert(model)          # any model: its convolutions and poolings on cnnfast's kernels
    layer = cnnfast.Conv2d(64, 128, 3)      # or module by module

``cnnfast.explain(model, x)`` says what serves each layer and why.
"""

from __future__ import annotations

from cnnfast import backends, data, functional, models
from cnnfast.convert import conversion_report, convert, revert
from cnnfast.errors import DtypeError, ShapeError
from cnnfast.explain import explain
from cnnfast.graph import fuse
from cnnfast.nn import (
    AdaptiveAvgPool2d,
    AdaptiveMaxPool2d,
    AddAct,
    AvgPool2d,
    BatchNorm2d,
    Conv1d,
    Conv2d,
    ConvBNAct,
    ConvTranspose2d,
    MaxPool2d,
)
from cnnfast.settings import backend, precision, strict

__version__ = "0.1.0"

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
    "DtypeError",
    "MaxPool2d",
    "ShapeError",
    "backend",
    "backends",
    "conversion_report",
    "convert",
    "data",
    "explain",
    "functional",
    "fuse",
    "models",
    "precision",
    "revert",
    "strict",
]
