"""Offline compilation of bn_act_conv_implicit_gemm: what merges its tiles' sums; its products are conv2d_implicit_gemm's."""

from __future__ import annotations

from collections.abc import Iterator

from ._common import Variant
from ._conv2d_norm import _add_tiles, _merge_tiles
from .batch_norm import COLLECT_SPLITS, COLLECT_WARPS, collect_block


def variants(arch: int, modes: tuple[str, ...] = ()) -> Iterator[Variant]:
    """Both with every block that can be selected for sm_<arch>."""
    for fn in (_merge_tiles, _add_tiles):
        for tiles in reversed(COLLECT_SPLITS):
            block_s, block_c = collect_block(tiles)
            constants = {"BLOCK_S": block_s, "BLOCK_C": block_c}
            pointers = {"tile_sums": "*fp32", "workspace": "*fp64" if fn is _merge_tiles else "*fp32"}
            yield Variant(
                name=f"bn_act_conv{fn.__name__}.bf16.{block_s}x{block_c}",
                fn=fn,
                signature={n: "constexpr" if n in constants else pointers.get(n, "i32") for n in fn.arg_names},
                constexprs=constants, aligned=("tile_sums", "workspace", "channels"),
                num_warps=COLLECT_WARPS, num_stages=3, capability=arch, tensor_cores=False, asynchronous=False,
            )  # fmt: skip
