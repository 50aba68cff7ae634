"""Offline compilation of adaptive_avg_pool2d: the calls that its launchers make, with every block they can select."""

from __future__ import annotations

from collections.abc import Iterator

from ._avg_pool2d_variants import gather_variants
from ._common import Variant


def variants(arch: int, modes: tuple[str, ...] = ("bf16", "fp16", "fp32")) -> Iterator[Variant]:
    """Every kind of call with every block that can be selected for sm_<arch>."""
    yield from gather_variants("adaptive_avg_pool2d_fprop", arch, modes, ADAPTIVE=True)
    yield from gather_variants("adaptive_avg_pool2d_dgrad", arch, modes, ADAPTIVE=True, GRADIENT=True)
