"""Offline compilation of Winograd's kernels: the calls that their launchers make, with every tile they can select."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ._common import Variant
from ._conv2d_winograd import BLOCKS, DEPTH, DIRECT_BLOCK, OUTPUT_WARPS, WARPS, crowded
from ._conv2d_winograd_kernels import (
    _multiply,
    _transform_filters,
    _transform_outputs,
    _transform_tiles,
    _transform_weights,
)
from ._tiles import INPUT_PRECISION, fit_depth, untuned


@dataclass(frozen=True)
class Kind:
    """A family of calls that Triton's just-in-time compiler specialises alike."""

    name: str
    fn: Any
    flags: dict[str, Any]
    ones: tuple[str, ...] = ()  # arguments that are 1
    aligned: bool = True  # whether sizes and strides of activations and weights are divisible by 16
    present: tuple[str, ...] = ()  # operands of the epilogue


_POINTERS = ("src", "weight", "grad", "bias", "scale", "shift", "residual", "products", "out", "a", "b")
_VECTORS = ("bias", "scale", "shift", "residual")
_WIDE = ("scale", "shift", "products")
_SCRATCH = (  # always aligned
    "rows", "pitch", "a_product", "b_product", "a_row", "a_depth", "b_column", "b_depth",
)  # fmt: skip
_SIZES = (
    "channels", "filters", "src_n", "src_row", "src_col", "out_n", "out_row", "out_col", "res_n", "res_row", "res_col",
    "w_k", "w_c", "w_r", "w_s",
)  # fmt: skip
_FLAGS = ("WHAT", "TURNED", "INT64", "ADD", "ACT")
_EPILOGUE = ("scale", "shift", "residual")

KINDS: tuple[Kind, ...] = (
    Kind("filters", _transform_filters, {}, ("w_c",)),
    Kind("filters_turned", _transform_filters, {"TURNED": True}, ("w_k",)),
    Kind("filters_odd", _transform_filters, {"INT64": True}, aligned=False),
    Kind("inputs", _transform_tiles, {"WHAT": "inputs"}),
    Kind("inputs_odd", _transform_tiles, {"WHAT": "inputs", "INT64": True}, aligned=False),
    Kind("gradients", _transform_tiles, {"WHAT": "gradients"}),
    Kind("gradients_odd", _transform_tiles, {"WHAT": "gradients", "INT64": True}, aligned=False),
    Kind("outputs", _transform_outputs, {}, ("w_c",), present=("bias",)),
    Kind("outputs_turned", _transform_outputs, {"TURNED": True}, ("w_k",)),
    Kind("outputs_epilogue", _transform_outputs, {"ACT": 1}, ("w_c",), present=_EPILOGUE),
    Kind("outputs_odd", _transform_outputs, {"ACT": 1, "INT64": True}, aligned=False, present=_VECTORS),
    Kind("weights", _transform_weights, {}, ("w_c",)),
    Kind("weights_odd", _transform_weights, {"INT64": True}, aligned=False),
)
# of _multiply: reductions over channels, and over tiles in the first chunk and the ones after it
PRODUCTS: tuple[Kind, ...] = (
    Kind("product", _multiply, {}, ("a_depth", "b_depth")),
    Kind("product_odd", _multiply, {}, ("a_depth", "b_depth"), aligned=False),
    Kind("product_wgrad", _multiply, {}, ("a_row", "b_column")),
    Kind("product_wgrad_more", _multiply, {"ADD": True}, ("a_row", "b_column")),
)
MODES = {"bf16": "high", "fp16": "high", **{INPUT_PRECISION[p]: p for p in ("fp32", "high")}}


def _variant(kind: Kind, m: int, mode: str, arch: int, block: str, warps: int, stages: int, **blocks: int) -> Variant:
    element = mode if mode in ("bf16", "fp16") else "fp32"
    names, product = kind.fn.arg_names, kind.fn is _multiply
    constants: dict[str, Any] = {flag: kind.flags.get(flag, 0 if flag == "ACT" else False) for flag in _FLAGS}
    constants |= {"M": m, "BY_HAND": False, "INPUT_PRECISION": "tf32" if element != "fp32" else mode, **blocks}
    constants |= dict.fromkeys(kind.ones, 1) | dict.fromkeys(set(_VECTORS) - set(kind.present))
    constants = {name: constants[name] for name in names if name in constants}
    pointers = dict.fromkeys(_POINTERS, f"*{element}") | dict.fromkeys(_WIDE, "*fp32")
    if product:
        pointers["out"] = "*fp32"
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = (*_POINTERS, *_SCRATCH, *((*_SIZES, "columns") if kind.aligned else ()))
    prefix = "winograd" if product else f"winograd_f{m}x{m}"
    return Variant(
        name=f"{prefix}_{kind.name}.{mode}.{block}", fn=kind.fn, signature=signature, constexprs=constants,
        aligned=tuple(n for n in aligned if n in names and n not in constants), num_warps=warps, num_stages=stages,
        capability=arch, tensor_cores=product, asynchronous=product,
    )  # fmt: skip


def variants(arch: int, modes: tuple[str, ...] = ("fp32", *MODES)) -> Iterator[Variant]:
    """Every kind of call that can be selected for sm_<arch>."""
    for mode in modes:
        if mode in ("fp32", "bf16", "fp16"):
            for m in (4, 2) if mode == "fp32" else (2,):
                rows, columns = BLOCKS[m]
                for kind in KINDS:
                    warps = OUTPUT_WARPS[m] if kind.fn is _transform_outputs else WARPS
                    yield _variant(
                        kind, m, mode, arch, f"{rows}x{columns}", warps, 3,
                        BLOCK_R=rows, BLOCK_C=columns, BLOCK_D=DIRECT_BLOCK,
                    )  # fmt: skip
        if mode in MODES:
            for kind in PRODUCTS:
                wgrad, itemsize = "a_row" in kind.ones, 4 if mode.startswith("tf32") else 2
                tiles = untuned(MODES[mode], itemsize, True, arch, crowded(itemsize, wgrad))
                depths = (DEPTH,) if wgrad else (DEPTH, DEPTH // 2)
                for tile in dict.fromkeys(fit_depth(tile, depth, itemsize) for tile in tiles for depth in depths):
                    yield _variant(
                        kind, 2, mode, arch, tile.name, tile.num_warps, tile.num_stages,
                        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
                    )  # fmt: skip
