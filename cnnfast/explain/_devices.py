"""GPUs by their data sheets, and what is predicted of a layer on them, without one: which kernel, and its least time."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from types import MappingProxyType

import torch

from cnnfast import dispatch
from cnnfast.functional._arguments import resolve_precision


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A card. Rates are the data sheet's peaks, dense: multiply-adds x 2, or bytes, a second."""

    name: str
    capability: tuple[int, int]
    processors: int  # streaming multiprocessors
    bandwidth: float
    tensor: Mapping[str, float]  # by what the tensor cores multiply, sums in fp32
    fma: Mapping[str, float]  # of the other units, by the type of the sums
    source: str

    def peak(self, implementation: dispatch.Implementation | None, problem: dispatch.Problem) -> tuple[str, float]:
        """The unit that a kernel multiplies with, and its rate; three tf32 products make one of fp32's accuracy."""
        if problem.dtype == "f64":
            return "fp64 multiply-adds", self.fma["f64"]
        products = implementation is None or "implicit_gemm" in implementation.stem
        if not products or (problem.dtype == "f32" and problem.precision == "ieee"):
            return "fp32 multiply-adds", self.fma["f32"]
        if problem.dtype != "f32":
            return f"{problem.dtype} tensor cores", self.tensor[problem.dtype]
        if problem.precision == "high":
            return "tf32 tensor cores", self.tensor["tf32"]
        return "tf32 tensor cores, three products", self.tensor["tf32"] / 3


def _gpu(
    name: str, capability: tuple[int, int], processors: int, gbytes: float, half: float, tf32: float, f32: float,
    f64: float, source: str,
) -> Gpu:  # fmt: skip
    """Rates in TFLOP/s and GB/s, as data sheets have them."""
    tensor = {"bf16": half * 1e12, "f16": half * 1e12, "tf32": tf32 * 1e12}
    fma = {"f32": f32 * 1e12, "f64": f64 * 1e12}
    return Gpu(name, capability, processors, gbytes * 1e9, MappingProxyType(tensor), MappingProxyType(fma), source)


# The sheets of H100 and L4 give tensor cores' rates with sparsity: half of that is dense.
GPUS: Mapping[str, Gpu] = MappingProxyType({
    "h100": _gpu("H100 SXM5 80 GB", (9, 0), 132, 3350, 989.4, 494.7, 66.9, 33.5,
                 "NVIDIA H100 Tensor Core GPU data sheet; NVIDIA H100 Tensor Core GPU Architecture, table 3"),
    "a100": _gpu("A100 SXM4 80 GB", (8, 0), 108, 2039, 312, 156, 19.5, 9.7,
                 "NVIDIA A100 Tensor Core GPU data sheet"),
    "l4": _gpu("L4", (8, 9), 58, 300, 121, 60, 30.3, 0.47,
               "NVIDIA L4 Tensor Core GPU data sheet; fp64 at 1/64 of fp32, NVIDIA Ada GPU Architecture"),
    "rtx4090": _gpu("GeForce RTX 4090", (8, 9), 128, 1008, 165.2, 82.6, 82.6, 1.29,
                    "NVIDIA Ada GPU Architecture, appendix A (tensor cores with fp32 sums)"),
})  # fmt: skip


def gpu(name: str) -> Gpu:
    """A card by its name; ValueError where it isn't in the table."""
    found = GPUS.get(name.lower().replace(" ", "").replace("-", ""))
    if found is None:
        close = difflib.get_close_matches(name.lower(), GPUS)
        raise ValueError(f"explain: expected device as one of {', '.join(close or GPUS)}, got {name!r}")
    return found


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What would serve a problem on a card; no implementation where torch would. ``seconds``: the least, by the peaks."""

    implementation: dispatch.Implementation | None
    rejected: tuple[tuple[str, tuple[str, ...]], ...]
    unit: str
    peak: float
    seconds: float


def predict(problem: dispatch.Problem, card: Gpu) -> Prediction:
    """A CPU's problem on a card: what is selected, and the least time for its FLOPs and bytes by the card's peaks."""
    precision = problem.precision
    if precision == resolve_precision(torch.device("cpu"))[0]:
        precision = resolve_precision(torch.device("cuda"))[0]  # the same settings mean another one there
    problem = dataclasses.replace(problem, device="cuda", capability=card.capability, precision=precision, packed=False)
    implementation: dispatch.Implementation | None = None
    rejected: tuple[tuple[str, tuple[str, ...]], ...]
    try:
        selection = dispatch.select(problem, strict=True)
        implementation, rejected = selection.implementation, selection.rejected
    except NotImplementedError as error:
        rejected = (("cnnfast", tuple(line.strip() for line in str(error).splitlines()[2:])),)
    unit, peak = card.peak(implementation, problem)
    seconds = max(problem.flops / peak, problem.bytes / card.bandwidth)
    return Prediction(implementation, rejected, unit, peak, seconds)
