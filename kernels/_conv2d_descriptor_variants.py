"""Offline compilation of the products that tensor descriptors feed: the calls that tuning can select."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ._common import Variant
from ._conv2d_descriptor import _descriptor_gemm, boxes
from ._tiles import Config, persistent

_EPILOGUE = ("bias", "scale", "shift", "residual")
# name -> (whether it is dgrad, operands of its epilogue)
KINDS: dict[str, tuple[bool, tuple[str, ...]]] = {
    "fprop_descriptor": (False, ("bias",)),
    "fprop_descriptor_epilogue": (False, _EPILOGUE),
    "dgrad_descriptor": (True, ()),
}


def _variant(name: str, mode: str, arch: int, tile: Config, box: tuple[int, int, int]) -> Variant:
    transposed, present = KINDS[name]
    m, n, k = tile.block_m, tile.block_n, tile.block_k
    constants: dict[str, Any] = {"ACT": int("scale" in present), "TRANSPOSED": transposed, "BY_HAND": False}
    constants |= {"TILE_H": box[1], "TILE_W": box[2], "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": tile.group_m}
    constants |= dict.fromkeys(set(_EPILOGUE) - set(present))

    def described(*block: int) -> str:
        return f"tensordesc<{mode}{list(block)}>"

    types = {
        "src": described(*box, k), "out": described(*box, n), "residual": described(*box, n),
        "weight": described(1, 1, k, n) if transposed else described(1, 1, n, k),
        "bias": f"*{mode}", "scale": "*fp32", "shift": "*fp32",
    }  # fmt: skip
    names = _descriptor_gemm.arg_names
    return Variant(
        name=f"{name}.{mode}.{tile.name}.{'x'.join(map(str, box))}", fn=_descriptor_gemm,
        signature={a: "constexpr" if a in constants else types.get(a, "i32") for a in names}, constexprs=constants,
        aligned=tuple(a for a in ("bias", "scale", "shift") if a not in constants),
        num_warps=tile.num_warps, num_stages=tile.num_stages, capability=arch, tensor_cores=True, asynchronous=True,
    )  # fmt: skip


def variants(arch: int, modes: tuple[str, ...] = ("bf16", "fp16")) -> Iterator[Variant]:
    """Every kind of call with every tile for sm_<arch>, in every box."""
    for mode in modes:
        for name in KINDS:
            for tile in persistent(arch):
                for box in boxes(tile.block_m):
                    yield _variant(name, mode, arch, tile, box)
