"""The Triton backend: kernels for CUDA tensors that need no compiler on the user's machine.

With ``TRITON_INTERPRET=1`` (read by Triton at import) the kernels are interpreted and ``backend("triton")`` takes CPU
tensors, through the same registrations.
"""

from __future__ import annotations

import functools
import importlib
import os
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from cnnfast.backends import _gpu, _tiles
from cnnfast.backends import _winograd as _checks
from cnnfast.dispatch import DTYPES, Backend, Implementation, Kernel, Problem

INTERPRETED = os.environ.get("TRITON_INTERPRET", "") not in ("", "0")

_PROGRAMS = 2**31 - 2**24  # pixels are numbered in 32 bits, with room for the last tile


def _conv2d(p: Problem) -> list[str]:
    phases = -(-p.H // p.stride_h) * p.stride_h * -(-p.W // p.stride_w) * p.stride_w
    return [
        reason
        for wrong, reason in (
            (p.N * max(p.P * p.Q, phases) >= _PROGRAMS, f"numbers pixels in 32 bits: {p.N} x {p.P * p.Q} are too many"),
            (p.K * (p.C // p.G) * p.R * p.S >= 2**31, "numbers weights in 32 bits"),
        )
        if wrong
    ]


def _avg_pool2d(p: Problem) -> list[str]:
    return [
        reason
        for wrong, reason in (
            (p.N * max(p.P * p.Q, p.H * p.W) >= _PROGRAMS, "numbers pixels in 32 bits"),
            ((p.H + 2 * p.pad_h) * (p.W + 2 * p.pad_w) >= 2**31, "numbers the pixels of a map in 32 bits"),
        )
        if wrong
    ]


def _max_pool2d(p: Problem) -> list[str]:
    return _avg_pool2d(p) + (["numbers taps in 16 bits"] if max(p.R, p.S) >= 2**15 else [])


def _adaptive_pool2d(p: Problem) -> list[str]:
    return [
        reason
        for wrong, reason in (
            (p.N * max(p.P * p.Q, p.H * p.W) >= _PROGRAMS, "numbers pixels in 32 bits"),
            (max((p.P + 1) * (p.H + 1), (p.Q + 1) * (p.W + 1)) >= 2**31, "multiplies positions in 32 bits"),
            (p.op == "adaptive_max_pool2d" and max(p.H, p.W) >= 2**15, "numbers taps in 16 bits"),
        )
        if wrong
    ]


def _add_act(p: Problem) -> list[str]:
    rows = p.N * p.H * max(p.C, p.W)
    return [f"numbers rows in 32 bits: {rows} are too many"] if rows >= _PROGRAMS else []


def _batch_norm(p: Problem) -> list[str]:
    pixels = p.N * p.H * p.W
    return [f"numbers pixels in 32 bits: {pixels} are too many"] if pixels >= _PROGRAMS else []


def _bn_act_conv(p: Problem) -> list[str]:
    narrow = min(p.C, p.K) // p.G
    phases = -(-p.H // p.stride_h) * p.stride_h * -(-p.W // p.stride_w) * p.stride_w
    tiles = p.N * max(p.P * p.Q, phases) // 64 + p.stride_h * p.stride_w
    return _conv2d(p) + [
        reason
        for wrong, reason in (
            (p.direction != "fprop" and not p.normed, "x isn't normalised: the gradient is conv2d's"),
            (p.N * p.P * p.Q == 0, "an empty result has no statistics"),
            (p.N * p.H * p.W >= _PROGRAMS, "numbers pixels in 32 bits"),
            (3 * tiles * max(p.C, p.K) >= _PROGRAMS, "numbers the sums of tiles in 32 bits"),
            (narrow < 16, f"{narrow} channels a group leave tiles empty: kernels for so few, and passes of their own"),
        )
        if wrong
    ]


_WORKSPACE = 128 * 2**20  # bytes


def _winograd(p: Problem, m: int) -> list[str]:
    summed, least = {
        "fprop": (p.C, 64),
        "dgrad": (p.K, 128),  # torch's sums over few channels are more exact there
        "wgrad": (p.N * p.P * p.Q, _checks.WGRAD_PIXELS),
    }[p.direction]
    products = 4 * (m + 2) ** 2
    weights = products * (p.K + 63) * (p.C + 63)
    tiles = products * 64 * (p.K + p.C + 128)
    return _conv2d(p) + [
        reason
        for wrong, reason in (
            *_checks.shape(p),
            (p.G != 1, f"needs one group, not {p.G}"),
            *(_checks.accuracy(p, summed, least) if m == 4 else ()),
            (weights > _WORKSPACE, f"transformed weights of {weights} bytes, {_WORKSPACE} at most"),
            (tiles > _WORKSPACE, f"64 transformed tiles of {tiles} bytes, {_WORKSPACE} at most"),
            *_checks.precision(p),
        )
        if wrong
    ]


# Bytes and multiply-adds x 2 a second on an H200, measured (benchmarks/bandwidth.py, convolutions.py; bf16 where dtypes
# differ), but for fp32 grade and the averages, an H100's and 1.4 times an H100's.
_LAUNCH = 8e-6
_RATES = {
    ("batch_norm", "stats"): 1.6e12, ("batch_norm", "backward"): 3.0e12, ("batch_norm", "backward_residual"): 3.2e12,
    ("max_pool2d", "fprop"): 3.0e12, ("max_pool2d", "dgrad"): 0.7e12, ("adaptive_max_pool2d", "dgrad"): 1.7e12,
    ("avg_pool2d", "fprop"): 2.8e12, ("avg_pool2d", "dgrad"): 2.1e12, ("adaptive_avg_pool2d", "fprop"): 2.1e12,
    ("adaptive_avg_pool2d", "dgrad"): 1.7e12,
}  # fmt: skip
# of products: fprop, dgrad, wgrad. In tf32 tensor cores read no operand that lies across the reduction.
_PRODUCTS = {
    "bf16": (4.5e14, 4.5e14, 3e14), "f16": (4.5e14, 4.5e14, 3e14), "high": (3e14, 8e13, 2.6e13), "fp32": (6e13, 6e13, 6e13),
    "ieee": (2e13, 2e13, 2e13),
}  # fmt: skip
_DESCRIBED = 7e14  # of 16-bit products that tensor descriptors feed
_NORMALISED = 1.2e14  # of products whose operand is normalised on its way to them, or whose results are
_SUMMED = 3e-12  # seconds that sums over a tile's pixels cost, an output
_PLACE = {"fprop": 0, "dgrad": 1, "wgrad": 2, "bgrad": 2}


def _rate(p: Problem) -> float:
    half = p.dtype in ("bf16", "f16") and p.capability is not None and 9 <= p.capability[0] < 12
    if half and p.direction in ("fprop", "dgrad") and p.G == p.stride_h == p.stride_w == 1 and p.C % 8 == p.K % 8 == 0:
        return _DESCRIBED
    return _PRODUCTS[p.precision if p.dtype == "f32" else p.dtype][_PLACE[p.direction]]


def _moved(p: Problem) -> float:
    """Predicted seconds of what is bound by memory."""
    return _LAUNCH + p.bytes / _RATES.get((p.op, p.direction), _gpu.BANDWIDTH)


def _multiplied(p: Problem) -> float:
    """Predicted seconds of a convolution: few channels a group leave most of a tile, and the vectors, unused."""
    c, k, dense = p.C // p.G, p.K // p.G, _rate(p)
    width = 16 if p.dtype == "f32" else 32  # channels of a tile that groups share
    if min(c, k) >= 16:
        rate = dense * min(1.0, k / 64)
    elif p.G > 1 and 2 * max(c, k) <= width:
        rate = dense / 8 * min(c, k) / width  # not measured yet: most products are with zeros, of small tiles
    else:
        depth = c * p.R * p.S
        rate = 6.5e12 * min(1.0, max(k, 1) / 16) * depth / (-(-depth // 16) * 16) if depth else 1e12
    products, moved = p.flops / rate, p.bytes / _gpu.BANDWIDTH
    # the weights' gradient of 1x1 convolutions takes as long as the memory, on an H200
    return _LAUNCH + (max(products, moved) if p.direction == "wgrad" and p.G == 1 else products + moved)


def _multiplied_and_normed(p: Problem) -> float:
    """Predicted seconds of a convolution between batch norms, as an H200 had them."""
    rate = _PRODUCTS[p.precision if p.dtype == "f32" else p.dtype][_PLACE[p.direction]]
    products = p.flops / (min(rate, _NORMALISED) if p.normed else rate)
    outputs = {"fprop": p.N * p.P * p.Q * p.K, "dgrad": p.N * p.H * p.W * p.C, "wgrad": 0}[p.direction]
    return _LAUNCH + products + outputs * _SUMMED + p.bytes / _gpu.BANDWIDTH


def _winograd_cost(p: Problem, m: int) -> float:
    # Predicted: products at half of the rate that implicit GEMM has without descriptors, what goes through L2 at a quarter of
    # the memory's, so that what a card has measured goes first.
    rate = _PRODUCTS[p.precision if p.dtype == "f32" else p.dtype][_PLACE[p.direction]] / 2
    products, itemsize = (m + 2) ** 2, 4 if p.dtype == "f32" else 2
    c, k, h, w = (p.K, p.C, p.H, p.W) if p.direction == "dgrad" else (p.C, p.K, p.P, p.Q)
    tiles = p.N * -(-h // m) * -(-w // m)
    multiply = 2.0 * products * tiles * c * k / (rate * min(1.0, k / 64))
    if p.direction == "wgrad":
        moved = 2 * itemsize * tiles * (c + k) + 8 * c * k
        multiply /= min(1.0, products * -(-c // 64) * -(-k // 64) / 132)  # which nothing splits
    else:
        moved = tiles * (2 * itemsize * c + 8 * k) + 2 * itemsize * c * k
    chunks = -(-4 * products * tiles * (c + k) // 2**25)
    return _LAUNCH * (1 + 3 * chunks) + multiply + (p.bytes + products * moved) / 8e11


# kernel module -> (operation, capability, predicted seconds); in the order of preference
RULES: dict[str, tuple[str, Callable[[Problem], list[str]], Callable[[Problem], float]]] = {
    "conv2d_implicit_gemm": ("conv2d", _conv2d, _multiplied),
    "conv2d_winograd_f4x4": ("conv2d", lambda p: _winograd(p, 4), lambda p: _winograd_cost(p, 4)),
    "conv2d_winograd_f2x2": ("conv2d", lambda p: _winograd(p, 2), lambda p: _winograd_cost(p, 2)),
    "max_pool2d": ("max_pool2d", _max_pool2d, _moved),
    "avg_pool2d": ("avg_pool2d", _avg_pool2d, _moved),
    "adaptive_avg_pool2d": ("adaptive_avg_pool2d", _adaptive_pool2d, _moved),
    "adaptive_max_pool2d": ("adaptive_max_pool2d", _adaptive_pool2d, _moved),
    "batch_norm": ("batch_norm", _batch_norm, _moved),
    "add_act": ("add_act", _add_act, _moved),
    "bn_act_conv_implicit_gemm": ("bn_act_conv", _bn_act_conv, _multiplied_and_normed),
}


# kernel module -> operations that are its fprop with an epilogue: the same kernel under the same rule
EPILOGUES: dict[str, tuple[str, ...]] = dict.fromkeys(
    ("conv2d_implicit_gemm", "conv2d_winograd_f4x4", "conv2d_winograd_f2x2"), ("conv_bn_act",)
)
# kernel module -> why its results are less exact than plain sums
ERROR_BOUNDS = {
    "conv2d_winograd_f4x4": (3.0, "transforms of inputs, weights and sums with the points 0, +-sqrt(1/2), +-sqrt(2)"),
    "conv2d_winograd_f2x2": (3.0, "transforms of inputs, weights and sums with the points 0, 1, -1"),
}


def _operations(stem: str, direction: str) -> tuple[str, ...]:
    """What a direction of a kernel serves."""
    return (RULES[stem][0], *(EPILOGUES.get(stem, ()) if direction == "fprop" else ()))


def _implementations() -> tuple[list[Implementation], str]:
    found: list[Implementation] = []
    for stem, (_, unsupported, cost) in RULES.items():
        try:
            module = importlib.import_module(f"cnnfast.kernels.{stem}")
        except ImportError as error:
            return [], f"Triton kernels can't be imported: {error}"
        found += [
            Implementation(
                name=f"triton.{stem}",
                op=op,
                backend="triton",
                stem=stem,
                direction=direction,
                dtypes=tuple(DTYPES[t] for t in module.DTYPES),
                unsupported=unsupported,
                bind=_binder(
                    launcher, getattr(module, "WORKSPACE", {}).get(direction), _tiles.chooser(stem, direction)
                ),
                cost=cost,
                layouts=getattr(module, "LAYOUTS", {}).get(direction, {}),
                error_bound=ERROR_BOUNDS.get(stem, Implementation.error_bound),
            )
            for direction, launcher in module.KERNELS.items()
            for op in _operations(stem, direction)
        ]
    return found, ""


def _binder(
    launcher: Callable[..., None], workspace: Callable[[Any], int] | None, choose: _tiles.Chooser | None = None
) -> Callable[[Problem, Mapping[str, int]], Kernel]:
    def bind(problem: Problem, fields: Mapping[str, int]) -> Kernel:
        p = types.SimpleNamespace(**fields, precision=problem.precision, capability=problem.capability)
        size = workspace(p) if workspace is not None else 0
        return _bound(functools.partial(launcher, p), size, choose and functools.partial(choose, p))

    return bind


def _bound(launcher: Callable[..., None], size: int, choose: Callable[..., Any] | None) -> Kernel:
    """A launcher over operands, with so many bytes of workspace and the tile that is chosen at the first call."""
    repeats: dict[tuple[Any, ...], _Repeat | None] = {}  # None: what can't be repeated
    tiles: dict[tuple[Any, ...], Any] = {}

    def launch(operands: Sequence[torch.Tensor | None]) -> None:
        device = next(t.device for t in operands if t is not None)
        extra = torch.empty(size, dtype=torch.uint8, device=device) if size else None
        # What Triton compiles for, beyond sizes and strides, which are the problem's.
        key = (device.index, *(None if t is None else t.data_ptr() % 16 == 0 for t in operands))
        repeat = repeats.get(key)
        if repeat is not None:
            repeat(operands, extra)
            return
        keywords: dict[str, Any] = {"workspace": extra} if size else {}
        if choose is not None:
            if key not in tiles:
                tiles[key] = choose(operands, lambda tile: _bound(functools.partial(launcher, tile=tile), size, None))
            keywords |= {"tile": tiles[key]} if tiles[key] is not None else {}
        if INTERPRETED or key in repeats:
            launcher(*operands, **keywords)
            return
        common = importlib.import_module("cnnfast.kernels._common")
        with common.record() as launches:
            launcher(*operands, **keywords)
        repeats[key] = _Repeat.of(launches, operands, extra)

    return launch


def _based(descriptor: Any, base: torch.Tensor | None) -> Any:
    """A tensor descriptor of the same form over another tensor; copy.copy() takes five times as long."""
    other = object.__new__(type(descriptor))
    other.__dict__.update(descriptor.__dict__, base=base)
    return other


class _Repeat:
    """The launches of a bound problem, repeated with other tensors; a place: (argument, operand, offset in bytes).

    An argument may be a tensor descriptor, whose base is such a tensor.
    """

    def __init__(self, launches: list[Any], places: list[list[tuple[int, int, int]]], device: torch.device) -> None:
        self._launches: list[tuple[Any, ...]] = []
        for recorded, found in zip(launches, places, strict=True):
            template = list(recorded.arguments)
            pointers, descriptors = [], []
            for at, operand, offset in found:  # keeps no tensor alive
                if isinstance(template[at], torch.Tensor):
                    template[at] = None
                    pointers.append((at, operand, offset))
                else:
                    template[at] = _based(template[at], None)
                    descriptors.append((at, operand))
            compiled = recorded.compiled
            compiled[recorded.grid]  # loads it
            self._launches.append((compiled, recorded.grid, template, pointers, descriptors))
        self._device = device
        self._knobs = importlib.import_module("triton").knobs.runtime

    @classmethod
    def of(cls, launches: list[Any], operands: Sequence[Any], workspace: torch.Tensor | None) -> _Repeat | None:
        """None where an argument is a tensor whose origin can't be told."""
        known = {id(t): i for i, t in enumerate(operands) if t is not None}
        if len(known) < sum(t is not None for t in operands):
            return None  # one tensor in two places now, two tensors perhaps the next time
        places: list[list[tuple[int, int, int]]] = []
        for recorded in launches:
            found = []
            for at, argument in enumerate(recorded.arguments):
                argument = getattr(argument, "base", argument)
                if not isinstance(argument, torch.Tensor):
                    continue
                if id(argument) in known:
                    found.append((at, known[id(argument)], 0))
                    continue
                offset = -1 if workspace is None else argument.data_ptr() - workspace.data_ptr()
                if workspace is None or not 0 <= offset < workspace.numel() or hasattr(recorded.arguments[at], "base"):
                    return None
                found.append((at, len(operands), offset))
            places.append(found)
        return cls(launches, places, next(t for t in operands if t is not None).device)

    def __call__(self, operands: Sequence[Any], workspace: torch.Tensor | None) -> None:
        if self._device.type == "cuda" and self._device.index != torch._C._cuda_getDevice():
            with torch.cuda.device(self._device):
                self(operands, workspace)
            return
        # What compiled[grid](*arguments) does, but for its hooks, which it calls even where there are none, and with addresses
        # in the tensors' stead, which nobody then looks up.
        tensors = [*operands, workspace]
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        stream = torch._C._cuda_getCurrentRawStream(self._device.index)
        hooks = self._knobs.launch_enter_hook, self._knobs.launch_exit_hook
        hooked = any(getattr(hook, "calls", hook) for hook in hooks)
        for compiled, grid, template, pointers, descriptors in self._launches:
            arguments = template.copy()
            for at, operand, offset in pointers:
                arguments[at] = addresses[operand] + offset
            for at, operand in descriptors:
                arguments[at] = _based(template[at], tensors[operand])
            if hooked:  # a profiler's
                compiled[grid](*arguments)
            else:
                compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)


IMPLEMENTATIONS, ABSENT = _implementations()


def _unavailable(problem: Problem) -> list[str]:
    return [ABSENT] if ABSENT else _gpu.unavailable(problem, "interpreted" if INTERPRETED else "")


def _status() -> str:
    if ABSENT:
        return ABSENT
    import triton

    return f"triton {triton.__version__}{', interpreted (TRITON_INTERPRET)' if INTERPRETED else ''}"


BACKEND = Backend(
    name="triton",
    unavailable=_unavailable,
    implementations=IMPLEMENTATIONS,
    automatic=lambda problem: problem.device == "cuda" and not INTERPRETED,
    status=_status,
)
