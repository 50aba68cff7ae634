"""Offline compilation of max_pool2d: the calls that its launchers make, with every block they can select."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ._common import Variant
from .max_pool2d import (
    BLOCKS_PHASE,
    ELEMENTS,
    MAX_CHANNELS,
    MIN_CHANNELS,
    NUM_WARPS,
    UNROLLED,
    _pool,
    _pool_gradient,
    block_cells,
)

# The optional operands of a call.
KINDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "fprop": (_pool, ()),
    "indices": (_pool, ("index",)),
    "jvp": (_pool, ("tangent",)),
    "dgrad": (_pool_gradient, ()),
}
_STRIDES = tuple(f"{role}_{axis}" for role in ("src", "out", "index", "tan", "grad") for axis in ("n", "row", "col"))
_ALIGNED = ("x", "y", "grad", "out", "index", "tangent", "channels", *_STRIDES)


def _variant(kind: str, mode: str, arch: int, taps: int, channels: int, phases: int, odd: bool) -> Variant:
    """Odd: channels and strides that no vector fits, offsets of 64 bits."""
    fn, operands = KINDS[kind]
    cells = ELEMENTS // channels if fn is _pool else block_cells(phases, channels)
    constants: dict[str, Any] = {"INDEX": "index" in operands, "TANGENT": "tangent" in operands, "TAPS": taps}
    constants |= {"INT64": odd, "BY_HAND": False, "BLOCK_M": cells, "BLOCK_PHASE": phases, "BLOCK_C": channels}
    constants |= {name: None for name in ("index", "tangent") if name not in operands}
    constants = {name: constants[name] for name in fn.arg_names if name in constants}
    pointers = dict.fromkeys(("x", "y", "grad", "out", "tangent"), f"*{mode}") | {"index": "*i64"}
    return Variant(
        name=f"max_pool2d_{kind}{'_odd' * odd}.{mode}.{taps}x{cells}x{phases}x{channels}",
        fn=fn,
        signature={name: "constexpr" if name in constants else pointers.get(name, "i32") for name in fn.arg_names},
        constexprs=constants,
        aligned=() if odd else tuple(n for n in _ALIGNED if n in fn.arg_names and n not in constants),
        num_warps=NUM_WARPS, num_stages=3, capability=arch, tensor_cores=False, asynchronous=False,
    )  # fmt: skip


def variants(arch: int, modes: tuple[str, ...] = ("bf16", "fp16", "fp32")) -> Iterator[Variant]:
    """Every kind of call with every block that can be selected for sm_<arch>."""
    for mode in modes:
        for kind, (fn, _) in KINDS.items():
            for odd in (False, True):
                for taps in (*reversed(UNROLLED), 0):
                    for phases in reversed(BLOCKS_PHASE) if fn is _pool_gradient else (1,):
                        channels = MAX_CHANNELS
                        while channels >= MIN_CHANNELS:
                            yield _variant(kind, mode, arch, taps, channels, phases, odd)
                            channels //= 2
