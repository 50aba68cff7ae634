"""Offline compilation of batch_norm: the calls that its launchers make, with every block they can select."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ._common import CHANNELS, VECTORS, Variant
from .batch_norm import (
    COLLECT_SPLITS,
    COLLECT_WARPS,
    NUM_WARPS,
    _add_sums,
    _apply,
    _input_gradient,
    _merge_stats,
    _stats,
    _sums,
    collect_block,
    tile_elements,
)


@dataclass(frozen=True)
class Kind:
    """A family of calls that Triton's just-in-time compiler specialises alike."""

    name: str
    fn: Any
    absent: tuple[str, ...] = ()
    training: bool = True
    act: int = 1
    odd: bool = False  # no vector fits, pixels in three strides, offsets of 64 bits


KINDS: tuple[Kind, ...] = (
    Kind("stats", _stats),
    Kind("stats_odd", _stats, odd=True),
    Kind("fprop", _apply, ("r",)),
    Kind("fprop_residual", _apply),
    Kind("fprop_evaluated", _apply, training=False, act=2),
    Kind("fprop_odd", _apply, training=False, act=3, odd=True),
    Kind("sums", _sums, ("r", "u")),
    Kind("sums_residual", _sums),
    Kind("sums_single", _sums, ("r", "u", "workspace"), act=0),
    Kind("sums_odd", _sums, training=False, act=3, odd=True),
    Kind("input", _input_gradient, ("r",)),
    Kind("input_dz", _input_gradient, ("r",), act=0),
    Kind("input_evaluated", _input_gradient, ("m", "dw", "db"), training=False, act=2),
    Kind("input_odd", _input_gradient, act=3, odd=True),
)
_VECTORS = ("w", "b", "m", "v", "s", "dw", "db")
_STRIDES = tuple(f"{role}_{axis}" for role in ("x", "r", "y", "g", "u", "out") for axis in "nhw")
_ALIGNED = ("x", "r", "y", "grad", "u", "out", "workspace", "channels", *_VECTORS, *_STRIDES)


def _variant(kind: Kind, mode: str, arch: int, channels: int) -> Variant:
    names, vectors = kind.fn.arg_names, not kind.odd and channels >= VECTORS
    constants: dict[str, Any] = {"ACT": kind.act, "TRAINING": kind.training, "DENSE": not kind.odd, "INT64": kind.odd}
    constants |= {
        "BY_HAND": False,
        "BLOCK_M": tile_elements(4 if mode == "fp32" else 2, vectors) // channels,
        "BLOCK_C": channels,
    }
    constants |= dict.fromkeys(kind.absent)
    constants = {name: constants[name] for name in names if name in constants}
    pointers = dict.fromkeys(("x", "r", "y", "grad", "u", "out"), f"*{mode}") | dict.fromkeys(_VECTORS, "*fp32")
    pointers |= {"workspace": "*fp64" if kind.fn is _stats else "*fp32", "eps_bits": "i64"}
    return Variant(
        name=f"batch_norm_{kind.name}.{mode}.{channels}",
        fn=kind.fn,
        signature={name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names},
        constexprs=constants,
        aligned=tuple(n for n in _ALIGNED if vectors and n in names and n not in constants),
        num_warps=NUM_WARPS, num_stages=3, capability=arch, tensor_cores=False, asynchronous=False,
    )  # fmt: skip


def _collect(fn: Any, arch: int, splits: int) -> Variant:
    block_s, block_c = collect_block(splits)
    constants = {"BLOCK_S": block_s, "BLOCK_C": block_c}
    pointers = dict.fromkeys(_VECTORS, "*fp32") | {"workspace": "*fp64" if fn is _merge_stats else "*fp32"}
    pointers |= {"eps_bits": "i64"}
    return Variant(
        name=f"batch_norm{fn.__name__}.bf16.{block_s}x{block_c}",
        fn=fn,
        signature={n: "constexpr" if n in constants else pointers.get(n, "i32") for n in fn.arg_names},
        constexprs=constants, aligned=("workspace", "channels"),
        num_warps=COLLECT_WARPS, num_stages=3, capability=arch, tensor_cores=False, asynchronous=False,
    )  # fmt: skip


def variants(arch: int, modes: tuple[str, ...] = ("bf16", "fp16", "fp32")) -> Iterator[Variant]:
    """Every kind of call with every block that can be selected for sm_<arch>."""
    for fn in (_merge_stats, _add_sums):
        for splits in reversed(COLLECT_SPLITS):
            yield _collect(fn, arch, splits)
    for mode in modes:
        for kind in KINDS:
            for channels in reversed(CHANNELS):
                yield _variant(kind, mode, arch, channels)
