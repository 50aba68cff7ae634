"""Offline compilation of adaptive_max_pool2d: the calls that its launchers make, with every block they can select."""

from __future__ import annotations

from collections.abc import Iterator

from ._avg_pool2d_variants import gather_variants
from ._common import CHANNELS, Variant
from ._max_pool2d_variants import variant
from ._maximum import UNROLLED


def variants(arch: int, modes: tuple[str, ...] = ("bf16", "fp16", "fp32")) -> Iterator[Variant]:
    """Every kind of call with every block that can be selected for sm_<arch>."""
    for mode in modes:
        for kind in ("fprop", "indices", "jvp", "labels"):
            for odd in (False, True):
                for taps in (*reversed(UNROLLED), 0):
                    for channels in reversed(CHANNELS):
                        yield variant(kind, mode, arch, taps, channels, 1, odd, "adaptive_max_pool2d", adaptive=True)
    yield from gather_variants("adaptive_max_pool2d_gather", arch, modes, ADAPTIVE=True, GRADIENT=True, labels=True)
