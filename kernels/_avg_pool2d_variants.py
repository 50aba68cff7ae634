"""Offline compilation of avg_pool2d: the calls that its launchers make, with every block they can select."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ._common import CHANNELS, VECTORS, Variant
from ._windows import NUM_WARPS, SIDE_BY_SIDE, _gather, block_pixels, unrolled

_STRIDES = tuple(f"{role}_{axis}" for role in ("src", "labels", "out") for axis in ("n", "row", "col"))
_ALIGNED = ("src", "labels", "out", "channels", *_STRIDES)


def gather_variant(
    name: str, mode: str, arch: int, taps: int, block_t: int, channels: int, *, odd: bool = False, labels: bool = False,
    **flags: bool,
) -> Variant:  # fmt: skip
    """A call of the gathering kernel; odd: channels and strides that no vector fits, offsets of 64 bits."""
    vectors = not odd and channels >= VECTORS
    block_m = block_pixels(taps, block_t, channels, vectors)
    constants: dict[str, Any] = dict.fromkeys(("GRADIENT", "ADAPTIVE"), False) | flags
    constants |= {"TAPS": taps, "INT64": odd, "BY_HAND": False}
    constants |= {"BLOCK_M": block_m, "BLOCK_T": block_t, "BLOCK_C": channels}
    constants |= {} if labels else {"labels": None}
    names = _gather.arg_names
    pointers = {"src": f"*{mode}", "labels": "*i32", "out": f"*{mode}"}
    return Variant(
        name=f"{name}{'_odd' * odd}.{mode}.{taps}x{block_m}x{block_t}x{channels}",
        fn=_gather,
        signature={n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names},
        constexprs={n: constants[n] for n in names if n in constants},
        aligned=tuple(n for n in _ALIGNED if vectors and n not in constants),
        num_warps=NUM_WARPS, num_stages=3, capability=arch, tensor_cores=False, asynchronous=False,
    )  # fmt: skip


def gather_variants(name: str, arch: int, modes: tuple[str, ...], **flags: bool) -> Iterator[Variant]:
    """A kind of call with every block that can be selected."""
    for mode in modes:
        for odd in (False, True):
            counts = reversed(unrolled(flags.get("labels", False)))
            for taps, block_t in (*((taps, 1) for taps in counts), (0, SIDE_BY_SIDE)):
                for channels in reversed(CHANNELS):
                    yield gather_variant(name, mode, arch, taps, block_t, channels, odd=odd, **flags)


def variants(arch: int, modes: tuple[str, ...] = ("bf16", "fp16", "fp32")) -> Iterator[Variant]:
    """Every kind of call with every block that can be selected for sm_<arch>."""
    yield from gather_variants("avg_pool2d_fprop", arch, modes)
    yield from gather_variants("avg_pool2d_dgrad", arch, modes, GRADIENT=True)
