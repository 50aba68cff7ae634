"""The CUDA C++ backend: native kernels for CUDA tensors, or, in tests, the same sources on an emulated GPU.

With ``CNNFAST_EMULATE_CUDA=1`` the emulation (built by ``make test``, never installed) stands in for the native module and
``backend("cuda")`` takes CPU tensors: the same table, launchers and registrations, executed on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from cnnfast.backends import _gpu
from cnnfast.backends import _winograd as _checks
from cnnfast.backends._native import Table, addresses, implementation, load
from cnnfast.dispatch import Backend, Implementation, Kernel, Problem

EMULATED = os.environ.get("CNNFAST_EMULATE_CUDA", "") not in ("", "0")


def _load() -> tuple[ModuleType | None, str]:
    if EMULATED:
        return _load_emulation()
    try:
        return load("_cuda"), ""
    except ImportError as error:
        return None, f"the native module cnnfast._cuda can't be imported: {error}"


def _load_emulation() -> tuple[ModuleType | None, str]:
    checked = os.environ["CNNFAST_EMULATE_CUDA"] == "check"
    name = "_emulated_check" if checked else "_emulated"
    default = Path(__file__).resolve().parents[2] / "build" / "emulation"
    folder = Path(os.environ.get("CNNFAST_EMULATION_DIR", default))
    found = sorted(folder.glob(f"{name}.*so")) + sorted(folder.glob(f"{name}.so"))
    if not found:
        return None, f"CNNFAST_EMULATE_CUDA is set, but {folder} has no {name} module: run make emulation"
    return load(name, str(found[0])), ""


MODULE, ABSENT = _load()


def _stream(device: torch.device) -> int:
    if EMULATED:
        return 0
    return int(torch._C._cuda_getCurrentRawStream(device.index))  # current_stream() makes an object first


def _caller(call: Any, problem: Problem) -> Kernel:
    size = call.workspace

    def launch(operands: Sequence[torch.Tensor | None]) -> None:
        device = next(t.device for t in operands if t is not None)
        if device.type == "cuda" and device.index != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                return launch(operands)
        workspace = torch.empty(size, dtype=torch.uint8, device=device) if size else None
        call(addresses(operands), 0 if workspace is None else workspace.data_ptr(), _stream(device), 1)
        return None

    return launch


_COORDINATE = 2**30  # the kernels hold coordinates in 32 bits (memory offsets in 64), with room for a tile
_PIXELS = 2**31 - 2**24  # or number those of all images, with room for the last tile


def _direct(p: Problem) -> list[str]:
    """What every kernel over windows of an image needs."""
    extents = {
        "H * W": p.H * p.W,
        "P * Q": p.P * p.Q,
        "height of the padded window": (p.R - 1) * p.dilation_h + p.pad_h,
        "width of the padded window": (p.S - 1) * p.dilation_w + p.pad_w,
        "P * stride": max(p.P, p.dilation_h) * p.stride_h,
        "Q * stride": max(p.Q, p.dilation_w) * p.stride_w,
    }
    return [f"{name} = {n} doesn't fit 32-bit coordinates" for name, n in extents.items() if n >= _COORDINATE]


def _pixels(p: Problem) -> list[str]:
    """What the kernels need that count the pixels of all images."""
    counts = {"N * H * W": p.N * p.H * p.W, "N * P * Q": p.N * getattr(p, "P", 0) * getattr(p, "Q", 0)}
    return [f"{name} = {n} doesn't fit 32-bit coordinates" for name, n in counts.items() if n >= _COORDINATE]


def _avg_pool2d(p: Problem) -> list[str]:
    reach = max(p.P * p.stride_h + p.R, p.Q * p.stride_w + p.S, p.pad_h + p.R, p.pad_w + p.S, abs(p.divisor_override))
    return _pixels(p) + [f"a coordinate or divisor of {reach} doesn't fit 32 bits"] * (reach >= _COORDINATE)


def _depthwise(p: Problem) -> list[str]:
    taps = p.R * p.S
    return (
        _direct(p)
        + _pixels(p)
        + [
            reason
            for wrong, reason in (
                (p.G != p.C or p.K != p.C, f"needs a group and a filter a channel, not {p.C}, {p.G} and {p.K}"),
                (taps > 3072, f"holds 3072 taps in shared memory, not {taps}"),
            )
            if wrong
        ]
    )


def _elements(p: Problem) -> list[str]:
    weights = (p.K + 128) * (p.C // p.G) * p.R * p.S
    return _direct(p) + [
        reason
        for wrong, reason in (
            (weights >= 2**31, "numbers the weights, and a tile's more, in 32 bits"),
            (p.N * max(p.H * p.W, p.P * p.Q) >= _PIXELS, "numbers the pixels of the batch in 32 bits"),
        )
        if wrong
    ]


def _vectors(p: Problem) -> list[str]:
    vector = 4 if p.dtype == "f32" else 8
    channels = {"input": p.C // p.G, "output": p.K // p.G}
    return _elements(p) + [
        f"needs {name} channels of a group in multiples of {vector}, not {n}"
        for name, n in channels.items()
        if n % vector != 0
    ]


_WORKSPACE = 128 * 2**20  # bytes


def _winograd(p: Problem, m: int) -> list[str]:
    summed, computed, least = (p.C, p.K, 64) if p.direction == "fprop" else (p.K, p.C, 64)
    weights = 4 * (m + 2) ** 2 * (-(-summed // 8) * 8) * (-(-computed // 64) * 64)
    odd, even = summed % 2 != 0, f"needs an even number of channels to sum over, not {summed}"
    if p.direction == "wgrad":
        summed, least, weights = p.N * p.P * p.Q, _checks.WGRAD_PIXELS, 36 * p.C * p.K
        odd, even = p.C % 2 + p.K % 2 != 0, f"needs even numbers of channels, not {p.C} and {p.K}"
    return (
        _direct(p)
        + _pixels(p)
        + [
            reason
            for wrong, reason in (
                *_checks.shape(p),
                (p.G != 1, f"needs one group, not {p.G}"),
                *(_checks.accuracy(p, summed, least) if m == 4 else ()),
                (p.dtype != "f32" and odd, even),
                (weights > _WORKSPACE, f"transformed weights of {weights} bytes, {_WORKSPACE} at most"),
                *_checks.precision(p),
            )
            if wrong
        ]
    )


def _grouped(p: Problem) -> list[str]:
    c, k, taps = p.C // p.G, p.K // p.G, p.R * p.S
    vector = 4 if p.dtype == "f32" else 8
    patch = ((p.R - 1) * p.dilation_h + 1) * ((p.S - 1) * p.dilation_w + 1)  # of a single position
    return _elements(p) + [
        reason
        for wrong, reason in (
            (c != k or c not in (4, 8, 16, 32), f"needs 4, 8, 16 or 32 channels a group, in as out, not {c} and {k}"),
            (p.C % vector != 0, f"needs channels in multiples of {vector}, not {p.C}"),
            (p.direction == "wgrad" and taps > 10, f"holds the sums of 10 taps in registers, not {taps}"),
            (taps * max(c, 8) > 320, f"holds the weights of {320 // max(c, 8)} taps in shared memory, not {taps}"),
            (patch > 448, f"holds 448 pixels in shared memory, a position reads {patch}"),
            (max(p.stride_h, p.stride_w) > 8, f"needs strides up to 8, not {p.stride_h}, {p.stride_w}"),
        )
        if wrong
    ]


def _stem(p: Problem) -> list[str]:
    across = -(-p.S // 4) * 4  # taps, with those that fill a product
    return _elements(p) + [
        reason
        for wrong, reason in (
            (p.G != 1, f"needs one group, not {p.G}"),
            (p.C > 4, f"needs 4 input channels at most, not {p.C}"),
            ((p.dilation_h, p.dilation_w) != (1, 1), f"needs dilation 1, not {p.dilation_h}, {p.dilation_w}"),
            (p.R * across > 132, f"holds the weights of 132 taps in shared memory, not {p.R} x {across}"),
        )
        if wrong
    ]


def _stem_weights(p: Problem) -> list[str]:
    vector, pairs = 4 if p.dtype == "f32" else 8, p.R * (-(-p.S // 2))
    return _stem(p) + [
        reason
        for wrong, reason in (
            (p.K % vector != 0, f"needs filters in multiples of {vector}, not {p.K}"),
            (pairs > 32, f"holds the sums of 32 pairs of taps in registers, not {pairs}"),
        )
        if wrong
    ]


def _if_high(p: Problem) -> list[str]:
    return [f"precision {p.precision}: rounds to tf32"] if p.precision != "high" else []


def _unless_ieee(p: Problem) -> list[str]:
    return ["precision ieee: splits each number in two"] if p.precision == "ieee" else []


def _implicit_gemm_cost(p: Problem, rate: float) -> float:
    # a tile has at least 64 of both: what a group doesn't fill is computed in vain
    rows, columns = (p.K, p.C) if p.direction == "wgrad" else (64 * p.G, p.K if p.direction == "fprop" else p.C)
    used = min(1.0, columns / p.G / 64) * min(1.0, rows / p.G / 64)
    if p.direction == "wgrad":
        used *= min(1.0, rows * columns / p.G**2 / 2**13)  # of 64 by 64 half, as an H200 had it
    if p.G > 1:
        used *= 0.4  # not measured, and behind the kernels that are made for groups
    return 4e-6 + p.flops / (rate * used) + p.bytes / _gpu.BANDWIDTH


def _winograd_cost(p: Problem, m: int, rate: float) -> float:
    # Predicted: a block is 32 tiles by 64 (F(4x4): 32) channels, a processor has one at a time. The rates are a quarter
    # of an H100's, for such blocks reach half of it elsewhere, and what a card has measured goes first.
    if p.direction == "wgrad":
        return _winograd_weights_cost(p, m, rate)
    c, k, h, w = (p.C, p.K, p.P, p.Q) if p.direction == "fprop" else (p.K, p.C, p.H, p.W)
    products, columns = (m + 2) ** 2, 32 if m == 4 else 64
    blocks = -(-p.N * -(-h // m) * -(-w // m) // 32) * -(-k // columns)
    turns, depth = -(-blocks // 132), -(-c // 8) * 8 + 16  # 16: the transforms at the end
    weights = 4 * products * c * k / 2e12
    return 7e-6 + turns * 132 * 2 * products * 32 * columns * depth / rate + weights


def _winograd_weights_cost(p: Problem, m: int, rate: float) -> float:
    # A block is 32 by 32 (16 bits: 64) channels and a slice of the tiles, of 128 at least. What a chain ends with takes as
    # long as the products of so many tiles.
    columns, chain, end = (64, 1024, 48) if p.dtype != "f32" else (32, 32, 10) if m == 4 else (32, 128, 13)
    tiles, owners = p.N * -(-p.P // m) * -(-p.Q // m), -(-p.C // 32) * -(-p.K // columns)
    slices = max(1, min(-(-264 // max(owners, 1)), -(-tiles // 128)))
    length = -(-tiles // slices)
    turns, depth = -(-owners * slices // 132), length + -(-length // chain) * end + 16  # 16: what is read ahead
    return 9e-6 + turns * 132 * 2 * (m + 2) ** 2 * 32 * columns * depth / rate + 2 * slices * 36 * p.C * p.K / 2e12


def _grouped_cost(p: Problem, rate: float) -> float:
    # Predicted: a quarter of an H100's bandwidth, or of what mma.sync does, half of it in vain where groups go in pairs.
    return 4e-6 + max(p.bytes / 8e11, p.flops / (rate * (0.5 if p.C // p.G == 4 else 1.0)))


def _stem_cost(p: Problem, rate: float) -> float:
    # Predicted, as above; the products are of 4 channels and whole fours of taps.
    products = 2 * p.N * p.P * p.Q * p.K * p.R * (-(-p.S // 4) * 16)
    return 4e-6 + max(p.bytes / 8e11, products / rate)


def _direct_cost(p: Problem) -> float:
    columns = {"fprop": p.K, "dgrad": p.C}.get(p.direction, 32 * p.G) / p.G  # of 32 that a tile has
    return 4e-6 + p.flops / (2e12 * min(1.0, columns / 32))


def _bn_act_conv(p: Problem) -> list[str]:
    blocks, depth = p.G * -(-p.N * p.P * p.Q // 64) * -(-p.K // p.G // 64), p.R * p.S * (p.C // p.G)
    reasons = [
        reason
        for wrong, reason in (
            (p.normed, "x is to be normalised while it is read: a pass of its own does that"),
            (p.N * p.P * p.Q == 0, "an empty result has no statistics"),
            (blocks < 132 and depth >= 512, "few tiles, deep sums: conv2d cuts their depth into slices"),
        )
        if wrong
    ]
    return reasons + _vectors(p) + _pixels(p)


def _bn_act_conv_cost(p: Problem, rate: float) -> float:
    # What the tiles leave is two doubles a channel for every 64 pixels, written and read; a picosecond an output on an H200.
    return _implicit_gemm_cost(p, rate) + 3e-6 + p.N * p.P * p.Q * p.K * 1e-12


# Bytes a second on an H200, measured (benchmarks/bandwidth.py; bf16 where dtypes differ), but for the averages, which are 1.4
# times an H100's. So are the rates of implicit GEMM's products in bf16 and tf32; others are predicted.
_RATES = {
    ("batch_norm", "stats"): 2.1e12, ("batch_norm", "fprop"): 3.3e12, ("batch_norm", "backward"): 2.6e12,
    ("batch_norm", "backward_residual"): 3.1e12, ("max_pool2d", "fprop"): 2.0e12, ("max_pool2d", "dgrad"): 1.2e12,
    ("adaptive_max_pool2d", "fprop"): 3.2e12, ("adaptive_max_pool2d", "dgrad"): 1.4e12, ("avg_pool2d", "fprop"): 1.8e12,
    ("avg_pool2d", "dgrad"): 1.1e12, ("adaptive_avg_pool2d", "fprop"): 1.5e12, ("adaptive_avg_pool2d", "dgrad"): 0.7e12,
}  # fmt: skip


def _moved(p: Problem) -> float:
    """Predicted seconds of what is bound by memory."""
    return 4e-6 + p.bytes / _RATES.get((p.op, p.direction), _gpu.BANDWIDTH)


_Rule = tuple[str, Callable[[Problem], list[str]], Callable[[Problem], float], dict[str, Any]]


def _implicit_gemm(rate: float, *unsupported: Callable[[Problem], list[str]]) -> _Rule:
    options = {"layouts": dict.fromkeys("xwy", "nhwc"), "alignment": 16}
    return "conv2d", lambda p: [r for f in unsupported for r in f(p)], lambda p: _implicit_gemm_cost(p, rate), options


def _bn_act_conv_rule(rate: float, *unsupported: Callable[[Problem], list[str]]) -> _Rule:
    options = {"layouts": dict.fromkeys("xwy", "nhwc"), "alignment": 16}

    def against(p: Problem) -> list[str]:
        return [r for f in unsupported for r in f(p)] + _bn_act_conv(p)

    return "bn_act_conv", against, lambda p: _bn_act_conv_cost(p, rate), options


def _grouped_rule(rate: float, *unsupported: Callable[[Problem], list[str]]) -> _Rule:
    options = {"layouts": dict.fromkeys("xwy", "nhwc"), "alignment": 16}
    return "conv2d", lambda p: [r for f in unsupported for r in f(p)], lambda p: _grouped_cost(p, rate), options


_DENSE: dict[str, Any] = {"layouts": dict.fromkeys("xy", "nhwc"), "alignment": 16}


def _stem_rule(rate: float, *unsupported: Callable[[Problem], list[str]], **options: Any) -> _Rule:
    options = {"layouts": {"x": "any", "y": "nhwc"}, **options}
    return "conv2d", lambda p: [r for f in unsupported for r in f(p)], lambda p: _stem_cost(p, rate), options


def _winograd_rule(m: int, rate: float, **options: Any) -> _Rule:
    points = "0, 1, -1" if m == 2 else "0, +-sqrt(1/2), +-sqrt(2)"
    options["error_bound"] = (3.0, f"transforms of inputs, weights and sums with the points {points}")
    return "conv2d", lambda p: _winograd(p, m), lambda p: _winograd_cost(p, m, rate), options


# stem, or stem.variant -> (operation, capability, predicted seconds, options); in the order of preference
RULES: dict[str, _Rule] = {
    "conv2d_implicit_gemm": _implicit_gemm(3.5e14, _vectors),
    "conv2d_implicit_gemm.tf32": _implicit_gemm(1.2e14, _if_high, _vectors),
    "conv2d_implicit_gemm.tf32x3": _implicit_gemm(6e13, _unless_ieee, _vectors),
    "conv2d_implicit_gemm.elements": _implicit_gemm(6e13, _elements),
    "conv2d_implicit_gemm.elements_tf32": _implicit_gemm(3e13, _if_high, _elements),
    "conv2d_implicit_gemm.elements_tf32x3": _implicit_gemm(1.5e13, _unless_ieee, _elements),
    "conv2d_grouped": _grouped_rule(6e13, _grouped),
    "conv2d_grouped.tf32": _grouped_rule(3e13, _if_high, _grouped),
    "conv2d_grouped.tf32x3": _grouped_rule(1e13, _unless_ieee, _grouped),
    "conv2d_stem": _stem_rule(6e13, _stem),
    "conv2d_stem.tf32": _stem_rule(3e13, _if_high, _stem),
    "conv2d_stem.tf32x3": _stem_rule(1e13, _unless_ieee, _stem),
    "conv2d_stem.dense": _stem_rule(6e13, _stem_weights, **_DENSE),
    "conv2d_stem.dense_tf32": _stem_rule(3e13, _if_high, _stem_weights, **_DENSE),
    "conv2d_stem.dense_tf32x3": _stem_rule(1e13, _unless_ieee, _stem_weights, **_DENSE),
    "conv2d_winograd_f4x4": _winograd_rule(4, 1.6e13),
    "conv2d_winograd_f2x2": _winograd_rule(2, 1.6e13),
    "conv2d_winograd_f2x2.mma": _winograd_rule(2, 6e13, layouts=dict.fromkeys("xwy", "nhwc"), alignment=16),
    "conv2d_depthwise": ("conv2d", _depthwise, lambda p: 4e-6 + max(p.flops / 7e12, p.bytes / 1.5e12), {}),
    "conv2d_direct": ("conv2d", _direct, _direct_cost, {}),
    "max_pool2d": ("max_pool2d", _direct, _moved, {}),
    "avg_pool2d": ("avg_pool2d", _avg_pool2d, _moved, {}),
    "adaptive_avg_pool2d": ("adaptive_avg_pool2d", _pixels, _moved, {}),
    "adaptive_max_pool2d": ("adaptive_max_pool2d", _pixels, _moved, {}),
    "batch_norm": ("batch_norm", _pixels, _moved, {}),
    "bn_act_conv_implicit_gemm": _bn_act_conv_rule(3.5e14),
    "bn_act_conv_implicit_gemm.tf32": _bn_act_conv_rule(1.2e14, _if_high),
    "bn_act_conv_implicit_gemm.tf32x3": _bn_act_conv_rule(6e13, _unless_ieee),
    "add_act": ("add_act", lambda p: [], _moved, {"layouts": dict.fromkeys("xrygt", "any")}),
}  # fmt: skip

# stem -> operations that are its fprop with an epilogue: the same kernels under the same rules
EPILOGUES = dict.fromkeys(
    (
        "conv2d_implicit_gemm",
        "conv2d_grouped",
        "conv2d_stem",
        "conv2d_winograd_f4x4",
        "conv2d_winograd_f2x2",
        "conv2d_depthwise",
        "conv2d_direct",
    ),
    ("conv_bn_act",),
)


def _implementations() -> list[Implementation]:
    if MODULE is None:
        return []
    table = Table(MODULE)
    found = []
    for name, (op, unsupported, cost, options) in RULES.items():
        stem, _, variant = name.partition(".")
        fused = {**options, "layouts": {**options["layouts"], "r": "nhwc"}} if "layouts" in options else options
        found += [
            implementation(table, "cuda", served, stem, direction, variant, unsupported, _caller, cost=cost, **given)
            for direction in table.directions(stem)
            if table.dtypes(stem, direction, variant)
            for served, given in (
                (op, options),
                *((epilogue, fused) for epilogue in EPILOGUES.get(stem, ()) if direction == "fprop"),
            )
        ]
    return found


def _unavailable(problem: Problem) -> list[str]:
    return [ABSENT] if ABSENT else _gpu.unavailable(problem, "emulated" if EMULATED else "")


def _architectures(cmake: str) -> str:
    """CMake's list (``80-real 90-real 80-virtual``) in words: code for these cards, and PTX for newer ones."""
    listed = [entry.partition("-") for entry in cmake.split()]
    real = [f"sm_{number}" for number, _, kind in listed if kind != "virtual"]
    virtual = [f"PTX for newer than sm_{number}" for number, _, kind in listed if kind != "real"]
    return ", ".join(real + virtual)


def _status() -> str:
    if ABSENT:
        return ABSENT
    if EMULATED:
        return "emulated on the CPU (CNNFAST_EMULATE_CUDA)"
    found = MODULE.device() if MODULE is not None else {}
    driver = found.get("driver", "none")
    built = _architectures(found.get("architectures", ""))
    return f"built for {built}; " + ("no NVIDIA driver on this machine" if driver == "none" else f"driver {driver}")


BACKEND = Backend(
    name="cuda",
    unavailable=_unavailable,
    implementations=_implementations(),
    automatic=lambda problem: problem.device == "cuda" and not EMULATED,
    plan=None if MODULE is None else MODULE.Plan,
    stream=_stream,
    status=_status,
)
