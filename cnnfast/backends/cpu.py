"""The CPU backend: native kernels for AVX-512, AVX2 and any processor, from one source.

A kernel exists once for each ISA; the best that the processor has comes first, the others can be pinned by name.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from cnnfast.backends import _winograd as _checks
from cnnfast.backends._cpu_dot import (
    DOT_ERRORS,
    dot_grouped,
    dot_grouped_cost,
    dot_implicit_gemm_cost,
    dot_winograd_cost,
)
from cnnfast.backends._native import Table, addresses, implementation, load
from cnnfast.dispatch import Backend, Implementation, Kernel, Problem

_threads = torch.get_num_threads


def _load() -> tuple[ModuleType | None, str]:
    built = os.environ.get("CNNFAST_CPU_MODULE", "")  # another build of it: the sanitizers' (make sanitize)
    try:
        return load("_cpu", built), ""
    except ImportError as error:
        return None, f"the native module cnnfast._cpu can't be imported: {error}"


MODULE, ABSENT = _load()
LANE_BYTES = {"avx512": 64, "avx2": 32, "portable": 16}  # vector width by ISA, best first
_MOST_TAPS = 255  # of a window, that a byte numbers beside the one that means none (csrc/cpu/max_pool2d_search.h)
DOT = "avx512_bf16"  # beside avx512: kernels on dot products of pairs of bf16


def isas() -> tuple[str, ...]:
    """The ISAs that this processor runs, best first; ``CNNFAST_CPU_ISA`` caps the choice (avx2, portable)."""
    if MODULE is None:
        return ()
    usable = [isa.strip() for isa in MODULE.device()["isas"].split(",")]
    found = tuple(isa for isa in LANE_BYTES if isa in usable)
    cap = os.environ.get("CNNFAST_CPU_ISA", "")
    if cap and cap not in found:
        raise ValueError(f"CNNFAST_CPU_ISA: expected one of {', '.join(found)} on this processor, got {cap!r}")
    return found[found.index(cap) :] if cap else found


def variants() -> tuple[str, ...]:
    """The ISAs, and before them what some kernels have beside the widest; not where ``CNNFAST_CPU_ISA`` names an ISA."""
    dot = MODULE is not None and DOT in MODULE.device()["isas"].split(",") and not os.environ.get("CNNFAST_CPU_ISA")
    return (DOT, *isas()) if dot else isas()


def _caller(call: Any, problem: Problem) -> Kernel:
    if call.workspace:
        size = call.workspace

        def with_workspace(operands: Sequence[torch.Tensor | None]) -> None:
            workspace = torch.empty(size, dtype=torch.uint8)
            call(addresses(operands), workspace.data_ptr(), 0, _threads())

        return with_workspace

    def launch(operands: Sequence[torch.Tensor | None]) -> None:
        call([0 if t is None else t.data_ptr() for t in operands], 0, 0, _threads())

    return launch


def _grouped(p: Problem, lanes: int) -> list[str]:
    c, k = p.C // p.G, p.K // p.G
    multiplied = (1, 2) if p.direction == "dgrad" else (1, 2, 4)  # depthwise, outputs a channel
    served = (c == k and c in (1, 2, 4, 8, 16)) or (c == 1 and k in multiplied)
    return [
        reason
        for wrong, reason in (
            (
                not served,
                "needs 1, 2, 4, 8 or 16 input and as many output channels a group, or 1 input and "
                f"{' or '.join(map(str, multiplied[1:]))} output channels, not {c} and {k}",
            ),
            (max(c, k) > lanes, f"{max(c, k)} channels a group don't fit the {lanes} lanes of a vector"),
        )
        if wrong
    ]


@dataclasses.dataclass(frozen=True)
class _Tile:
    """Winograd's tile for a filter in so many segments: outputs and points along each axis, products over all segments."""

    filter: tuple[int, int]
    outputs: tuple[int, int]
    points: tuple[int, int]
    products: int
    segments: int = 1
    stride: int = 1
    shared: int = 0  # products that have another one's weights

    def turned(self) -> _Tile:
        """For columns, where this one is for rows."""
        return dataclasses.replace(self, filter=self.filter[::-1], outputs=self.outputs[::-1], points=self.points[::-1])


# what the kernels of each stem have (csrc/cpu/conv2d_winograd.h)
_ROW3, _ROW7 = _Tile((1, 3), (1, 4), (1, 6), 6), _Tile((1, 7), (1, 3), (1, 6), 11, segments=2)
_TILES = {
    "conv2d_winograd_f4x4": [_Tile((3, 3), (4, 4), (6, 6), 36)],
    "conv2d_winograd_f2x2": [_Tile((3, 3), (2, 2), (4, 4), 16)],
    "conv2d_winograd_f2x2_5x5": [_Tile((5, 5), (2, 2), (6, 6), 36)],
    "conv2d_winograd_f4_1x3": [_ROW3, _ROW3.turned()],
    "conv2d_winograd_f3_1x7": [_ROW7, _ROW7.turned()],
    "conv2d_winograd_f3x3_stride2": [_Tile((3, 3), (3, 3), (7, 7), 49, stride=2, shared=24)],
}


def _few_in_lanes(p: Problem, lanes: int) -> bool:
    """Whether groups are half a vector, one or two, and Winograd's products stay in L1 (conv2d_winograd_lanes.h)."""
    c, k = p.C // p.G, p.K // p.G
    fit = c in (lanes, 2 * lanes) or (2 * c == lanes and p.G % 2 == 0)
    return p.R == p.S == 3 and p.G > 1 and c == k >= 8 and fit


def _winograd(p: Problem, isa: str, stem: str, least_group: int = 8) -> list[str]:
    summed, least = (p.C if p.direction == "fprop" else p.K) // p.G, 32
    if p.G > 1:
        least = 16  # oneDNN sums these as we do
    if isa == "portable":
        least *= 2  # it has no fused multiply-add
    if p.direction == "wgrad":
        summed, least = p.N * p.P * p.Q, _checks.WGRAD_PIXELS
    tiles = _TILES[stem]
    rounds = p.dtype == "f32" and 6 in tiles[0].points
    return [
        reason
        for wrong, reason in (
            *_checks.shape(p, [tile.filter for tile in tiles], tiles[0].stride),
            (p.direction == "wgrad" and p.G != 1, f"needs one group for wgrad, not {p.G}"),
            (p.G > 1 and min(p.C, p.K) < least_group * p.G, f"needs {least_group} or more channels a group"),
            *(_checks.accuracy(p, summed, least) if rounds else ()),
            *_checks.precision(p),
        )
        if wrong
    ]


def _numbers(taps: int) -> list[str]:
    return [f"numbers a window's taps in a byte, not {taps}"] if taps > _MOST_TAPS else []


def _max_pool2d(p: Problem) -> list[str]:
    if p.direction in ("taps", "scatter"):
        return _numbers(p.R * p.S)
    span = (p.R - 1) * p.dilation_h * p.W + (p.S - 1) * p.dilation_w
    return [f"labels the pixels of a window in 30 bits, not {span}"] if span >= 2**30 else []


def _adaptive_max_pool2d(p: Problem) -> list[str]:
    if p.direction in ("taps", "scatter"):
        h, w = (min(-(-n // max(out, 1)) + (n % max(out, 1) != 0), n) for n, out in ((p.H, p.P), (p.W, p.Q)))
        return _numbers(h * w)
    span = -(-p.H // max(p.P, 1)) * p.W + -(-p.W // max(p.Q, 1))
    return [f"labels the pixels of a window in 30 bits, not {span}"] if span >= 2**30 else []


def _lanes(isa: str, dtype: str) -> int:
    return LANE_BYTES[isa] // (8 if dtype == "f64" else 4)


# ---- predicted seconds, from cycles of one core at 2.5 GHz: only their order matters ----------------------------------


def _seconds(cycles: float, fixed: float = 2e-6) -> float:
    return fixed + cycles / 2.5e9


def _conversions(p: Problem) -> float:
    """Activations that aren't NHWC are copied, and a result that isn't is copied back: 5 us a call and the bytes."""
    foreign = sum(role != "w" and layout != "nhwc" for role, layout in p.layouts)
    return foreign * (5e-6 + p.bytes / 2e10) if p.direction != "bgrad" else 0.0


def _grouped_cost(p: Problem, isa: str) -> float:
    # every lane used; one vector multiply-add a cycle, fewer shuffles where three taps of a row share them, none in wgrad
    # where a group is a whole vector
    lanes = _lanes(isa, p.dtype)
    rate = 1.5 if p.S == 3 and p.stride_w <= 2 and p.dilation_w == 1 else 1.0
    if p.direction == "wgrad":
        rate = 2.0 if lanes == p.C // p.G else 1.0
    return _seconds(p.flops / 2 / (rate * lanes)) + _conversions(p)


def _implicit_gemm_cost(p: Problem, isa: str) -> float:
    lanes, columns = _lanes(isa, p.dtype), (p.K if p.direction != "dgrad" else p.C) // p.G
    used = min(1.0, columns / lanes) if p.G > 1 else 1.0
    multiply = p.flops / 2 / (2 * lanes * used)  # two a cycle, on the lanes that a group fills
    if p.G > 1:
        multiply *= 1.4  # short sums, and few channels to share what is loaded
    vectors = p.R * p.S * p.C // p.G * p.K / (lanes * used) if p.direction != "wgrad" else 0.0
    return _seconds(_with_weights(p, isa, multiply, vectors, 12 * vectors)) + _conversions(p)


def _with_weights(p: Problem, isa: str, multiply: float, vectors: float, pack: float, hidden: bool = True) -> float:
    """Products and vectors of weights: packed first, or, packed beforehand, read from where they lie beyond the caches.

    `hidden`: while products are at work.
    """
    if not p.packed:
        return multiply + pack
    bytes = LANE_BYTES[isa] * vectors
    if not hidden and bytes > 2**21:
        return multiply + 0.05 * bytes
    return max(multiply, 0.1 * bytes) if bytes > 2**20 else multiply


def _winograd_cost(p: Problem, isa: str, stem: str) -> float:
    lanes = _lanes(isa, p.dtype)
    tile = next((tile for tile in _TILES[stem] if tile.filter == (p.R, p.S)), _TILES[stem][0])
    c, k, h, w = (p.K, p.C, p.H, p.W) if p.direction == "dgrad" else (p.C, p.K, p.P, p.Q)
    c, k = c // p.G, k // p.G
    tiles, points = p.N * -(-h // tile.outputs[0]) * -(-w // tile.outputs[1]), math.prod(tile.points)
    read, vectors, point = float(-(-c // lanes)), float(-(-k // lanes)), 6 if points == 36 else 3.6
    if tile.stride == 1 and _few_in_lanes(p, lanes):
        read, vectors, point = c / lanes, k / lanes, point * 0.55  # in L1
    weights, transformed = p.G * c * vectors, tile.products - tile.shared
    transforms = p.G * point * points * tiles * (tile.segments * read + vectors)
    multiply, pack = tile.products * tiles * weights / 2, (3 * transformed + 8 * p.R * p.S) * weights
    # two inputs apart, tiles are too few to hide the weights, and their transforms' data is more than a cache keeps
    cycles = transforms + _with_weights(p, isa, multiply, transformed * weights, pack, hidden=tile.stride == 1)
    return _seconds(1.15 * cycles if tile.stride > 1 else cycles) + _conversions(p)


def _direct_cost(p: Problem, isa: str) -> float:
    # a matrix-vector product in all but name (squeeze-and-excite, classifiers): packing weights wouldn't pay
    few = p.N * p.P * p.Q <= 8 and p.R == p.S == p.G == 1 and p.C >= 16 and p.direction == "fprop"
    layouts = dict(p.layouts)
    if few and layouts.get("x") == "nhwc" and layouts.get("w") in ("nchw", "nhwc"):
        return 0.0
    return _seconds(p.flops / 2, fixed=1e-6)


# stem -> (operation, capability(problem, isa), predicted seconds(problem, isa)); in the order of preference
_Rule = tuple[str, Callable[[Problem, str], list[str]], Callable[[Problem, str], float]]


def _winograd_rule(stem: str) -> _Rule:
    return "conv2d", lambda p, isa: _winograd(p, isa, stem), lambda p, isa: _winograd_cost(p, isa, stem)


RULES: dict[str, _Rule] = {
    "conv2d_grouped": ("conv2d", lambda p, isa: _grouped(p, _lanes(isa, p.dtype)), _grouped_cost),
    **{stem: _winograd_rule(stem) for stem in _TILES},
    "conv2d_implicit_gemm": ("conv2d", lambda p, isa: [], _implicit_gemm_cost),
    "conv2d_direct": ("conv2d", lambda p, isa: [], _direct_cost),
    "avg_pool2d": ("avg_pool2d", lambda p, isa: [], lambda p, isa: p.bytes / 2e10),
    "adaptive_avg_pool2d": ("adaptive_avg_pool2d", lambda p, isa: [], lambda p, isa: p.bytes / 2e10),
    "adaptive_max_pool2d": (
        "adaptive_max_pool2d",
        lambda p, isa: _adaptive_max_pool2d(p),
        lambda p, isa: p.bytes / 2e10,
    ),
    "max_pool2d": ("max_pool2d", lambda p, isa: _max_pool2d(p), lambda p, isa: p.bytes / 2e10),
    "batch_norm": ("batch_norm", lambda p, isa: [], lambda p, isa: p.bytes / 2e10),
    "add_act": ("add_act", lambda p, isa: [], lambda p, isa: p.bytes / 2e10),
}

# the same of kernels on avx512_bf16's dot products of pairs
DOT_RULES: dict[str, _Rule] = {
    "conv2d_grouped": ("conv2d", dot_grouped, lambda p, isa: dot_grouped_cost(p) + _conversions(p)),
    "conv2d_winograd_f2x2": (
        "conv2d",
        lambda p, isa: _winograd(p, "avx512", "conv2d_winograd_f2x2", least_group=16),
        lambda p, isa: dot_winograd_cost(p) + _conversions(p),
    ),
    "conv2d_implicit_gemm": ("conv2d", lambda p, isa: [], lambda p, isa: dot_implicit_gemm_cost(p) + _conversions(p)),
}

# kernels that read and write activations in any layout: tiny calls save the conversions, which cost more than the work
ANY_LAYOUT = {("conv2d_direct", direction): {"x": "any", "y": "any"} for direction in ("fprop", "dgrad", "wgrad")}
ANY_LAYOUT["add_act", "fprop"] = ANY_LAYOUT["add_act", "dgrad"] = dict.fromkeys("xrygt", "any")

# stem -> operations that are its fprop with an epilogue: the same kernels under the same rules
EPILOGUES = dict.fromkeys(("conv2d_grouped", *_TILES, "conv2d_implicit_gemm", "conv2d_direct"), ("conv_bn_act",))


def _operations(table: Table, stem: str) -> list[tuple[str, str, dict[str, str]]]:
    """What a stem serves: operation, direction, layouts."""
    found = []
    for direction in table.directions(stem):
        layouts = ANY_LAYOUT.get((stem, direction), {})
        found.append((RULES[stem][0], direction, layouts))
        if direction == "fprop":
            found += [(op, direction, {**layouts, "r": "any"} if layouts else {}) for op in EPILOGUES.get(stem, ())]
    return found


def _implementations() -> list[Implementation]:
    if MODULE is None:
        return []
    table, ranks = Table(MODULE), {isa: rank for rank, isa in enumerate(isas())}
    return [
        implementation(
            table,
            "cpu",
            op,
            stem,
            direction,
            isa,
            _for_isa(unsupported, isa),
            _caller,
            cost=_ranked(cost, isa, ranks.get(isa, 0)),
            layouts=layouts,
            **({"error_bound": DOT_ERRORS[stem]} if isa == DOT else {}),
        )
        for isa in variants()
        for stem, (_, unsupported, cost) in (DOT_RULES if isa == DOT else RULES).items()
        for op, direction, layouts in _operations(table, stem)
        if table.dtypes(stem, direction, isa)
    ]


def _for_isa(unsupported: Callable[[Problem, str], list[str]], isa: str) -> Callable[[Problem], list[str]]:
    return lambda problem: unsupported(problem, isa)


def _ranked(cost: Callable[[Problem, str], float], isa: str, rank: int) -> Callable[[Problem], float]:
    """A lesser ISA is never predicted faster: it serves only where it is pinned or the better one has no kernel."""
    return lambda problem: cost(problem, isa) + 1e3 * rank


BACKEND = Backend(
    name="cpu",
    unavailable=lambda p: [ABSENT] if ABSENT else [] if p.device == "cpu" else [f"serves CPU tensors, not {p.device}"],
    implementations=_implementations(),
    plan=None if MODULE is None else MODULE.Plan,
    status=lambda: ABSENT or f"{MODULE.device()['isa']} ({', '.join(variants())}), {_threads()} threads",  # type: ignore[union-attr]
)
