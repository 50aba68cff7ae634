"""Offline compilation of add_act: the calls that its launchers make, with every block they can select."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ._common import CHANNELS, VECTORS, Variant
from .add_act import ELEMENTS, MIXED_BLOCK, NUM_WARPS, _map

_ALIGNED = ("a", "b", "out", "columns", *(f"{name}_{i}" for name in ("a", "b", "out") for i in range(3)))
_ROW = {f"{name}_3": 1 for name in ("a", "b", "out")}
# What of a call is constant, and whether no vector fits it and offsets have 64 bits.
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "run": ({"ONE_ROW": True, **_ROW}, False),
    "rows": ({"ONE_ROW": False, **_ROW}, False),
    "odd": ({"ONE_ROW": False, **_ROW}, True),
    "mixed": ({"ONE_ROW": False, "out_3": 1}, True),
}


def _variant(kind: str, mode: str, arch: int, gradient: bool, act: int, block: int) -> Variant:
    constants, odd = KINDS[kind]
    constants = {**constants, "GRADIENT": gradient, "ACT": act, "INT64": odd, "BY_HAND": False}
    constants |= {"BLOCK_M": ELEMENTS // block, "BLOCK_N": block}
    pointers = dict.fromkeys(("a", "b", "out"), f"*{mode}")
    names = _map.arg_names
    return Variant(
        name=f"add_act_{kind}{'_gradient' * gradient}.{mode}.{act}x{block}",
        fn=_map,
        signature={name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names},
        constexprs={name: constants[name] for name in names if name in constants},
        aligned=() if odd or block < VECTORS else _ALIGNED,
        num_warps=NUM_WARPS, num_stages=3, capability=arch, tensor_cores=False, asynchronous=False,
    )  # fmt: skip


def variants(arch: int, modes: tuple[str, ...] = ("bf16", "fp16", "fp32")) -> Iterator[Variant]:
    """Every kind of call with every block that can be selected for sm_<arch>."""
    blocks = {"run": (ELEMENTS,), "rows": CHANNELS, "odd": CHANNELS, "mixed": (MIXED_BLOCK,)}
    for mode in modes:
        for kind in KINDS:
            for gradient in (False, True):
                for act in range(4):
                    for block in reversed(blocks[kind]):
                        yield _variant(kind, mode, arch, gradient, act, block)
