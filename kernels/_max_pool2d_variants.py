"""Offline compilation of max_pool2d: the calls that its launchers make, with every block they can select."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ._common import CHANNELS, VECTORS, Variant
from ._maximum import ELEMENTS, NUM_WARPS, UNROLLED, _search, warps
from .max_pool2d import BLOCKS_PHASE, _pool_gradient, block_cells

# The operands that a call has not.
KINDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "fprop": (_search, ("index", "tangent")),
    "indices": (_search, ("tangent",)),
    "jvp": (_search, ("index",)),
    "labels": (_search, ("y", "tangent")),  # of adaptive_max_pool2d
    "dgrad": (_pool_gradient, ()),
}
_STRIDES = tuple(f"{role}_{axis}" for role in ("src", "out", "index", "tan", "grad") for axis in ("n", "row", "col"))
_ALIGNED = ("x", "y", "grad", "out", "index", "tangent", "channels", *_STRIDES)


def variant(
    kind: str, mode: str, arch: int, taps: int, channels: int, phases: int, odd: bool, op: str = "max_pool2d",
    adaptive: bool = False,
) -> Variant:  # fmt: skip
    """A call; odd: channels and strides that no vector fits, offsets of 64 bits."""
    fn, absent = KINDS[kind]
    cells = ELEMENTS // channels if fn is _search else block_cells(phases, channels)
    constants: dict[str, Any] = {"ADAPTIVE": adaptive, "TAPS": taps, **dict.fromkeys(absent)}
    constants |= {"INT64": odd, "BY_HAND": False, "BLOCK_M": cells, "BLOCK_PHASE": phases, "BLOCK_C": channels}
    constants = {name: constants[name] for name in fn.arg_names if name in constants}
    pointers = dict.fromkeys(("x", "y", "grad", "out", "tangent"), f"*{mode}")
    pointers["index"] = "*i32" if kind == "labels" else "*i64"
    return Variant(
        name=f"{op}_{kind}{'_odd' * odd}.{mode}.{taps}x{cells}x{phases}x{channels}",
        fn=fn,
        signature={name: "constexpr" if name in constants else pointers.get(name, "i32") for name in fn.arg_names},
        constexprs=constants,
        aligned=() if odd or channels < VECTORS else tuple(n for n in _ALIGNED if n in fn.arg_names and n not in constants),
        num_warps=warps(4 if mode == "fp32" else 2, adaptive, "index" not in absent) if fn is _search else NUM_WARPS,
        num_stages=3, capability=arch, tensor_cores=False, asynchronous=False,
    )  # fmt: skip


def variants(arch: int, modes: tuple[str, ...] = ("bf16", "fp16", "fp32")) -> Iterator[Variant]:
    """Every kind of call with every block that can be selected for sm_<arch>."""
    for mode in modes:
        for kind, (fn, _) in KINDS.items():
            if kind == "labels":
                continue
            for odd in (False, True):
                for taps in (*reversed(UNROLLED), 0):
                    for phases in reversed(BLOCKS_PHASE) if fn is _pool_gradient else (1,):
                        for channels in reversed(CHANNELS):
                            yield variant(kind, mode, arch, taps, channels, phases, odd)
