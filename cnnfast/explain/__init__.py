"""What serves each layer of a model, why the others don't, how fast, and how far from the machine's limit."""

from cnnfast.explain._devices import GPUS, Gpu
from cnnfast.explain._limits import machine_limits
from cnnfast.explain._rows import TORCH, Explanation, Row
from cnnfast.explain._run import explain

__all__ = ["GPUS", "TORCH", "Explanation", "Gpu", "Row", "explain", "machine_limits"]
