"""Offline compilation of conv2d_implicit_gemm: the calls that its launchers make, with every tile they can select."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ._common import Variant
from ._tiles import INPUT_PRECISION, Config, candidates, cuts
from .conv2d_implicit_gemm import (
    BGRAD_BLOCK_M,
    BGRAD_BLOCK_N,
    REDUCE_BLOCK,
    TOGETHER_CHANNELS,
    TOGETHER_WARPS,
    _bgrad_partial,
    _gather_gemm,
    _sum_splits,
    _wgrad_gemm,
)


@dataclass(frozen=True)
class Kind:
    """A family of calls that Triton's just-in-time compiler specialises alike."""

    name: str
    fn: Any
    flags: dict[str, bool]  # those that are set
    ones: tuple[str, ...]  # arguments that are 1
    unaligned: tuple[str, ...] = ()  # arguments that a call of this kind has not divisible by 16
    vectors: bool = True  # loads of 16 bytes
    present: tuple[str, ...] = ()  # operands of the epilogue


_AFFINE, _EPILOGUE = ("scale", "shift"), ("scale", "shift", "residual")
_NORM = ("mean", "invstd", "gamma", "beta", "sums")
_UNIT = ("groups", "dilation_h", "dilation_w", "gcd_h", "gcd_w")
_STRIDE_1 = ("stride_h", "stride_w")
_ALIGNED = (
    "src", "weight", "bias", "scale", "shift", "residual", "out", "x", "grad", "workspace", "c_src", "c_out", "src_n", "src_row", "src_col",
    "w_group", "w_src", "w_out", "w_k", "w_c", "w_r", "w_s", "out_n", "out_row", "out_col", "res_n", "res_row", "res_col",
    "columns", "channels", "mean", "invstd", "gamma", "beta", "sums",
)  # fmt: skip
_X_ODD = ("c_src", "src_n", "src_row", "src_col", "w_out", "w_group", "w_r", "w_s", "w_k")
_Y_ODD = ("c_out", "out_n", "out_row", "out_col", "res_n", "res_row", "res_col", "w_group")

KINDS: tuple[Kind, ...] = (
    Kind("fprop", _gather_gemm, {"EVEN_K": True, "HAS_BIAS": True}, (*_UNIT, *_STRIDE_1, "w_src")),
    Kind("fprop_affine", _gather_gemm, {"EVEN_K": True}, (*_UNIT, *_STRIDE_1, "w_src"), present=_AFFINE),
    Kind("fprop_epilogue", _gather_gemm, {"EVEN_K": True}, (*_UNIT, *_STRIDE_1, "w_src"), present=_EPILOGUE),
    Kind(
        "fprop_linear_epilogue",
        _gather_gemm,
        {"LINEAR": True, "EVEN_K": True},
        (*_UNIT, *_STRIDE_1, "w_src"),
        present=_EPILOGUE,
    ),
    Kind(
        "fprop_odd_epilogue",
        _gather_gemm,
        {"HAS_BIAS": True},
        (),
        unaligned=(*_X_ODD, *_Y_ODD, "w_src"),
        vectors=False,
        present=_EPILOGUE,
    ),
    Kind("fprop_linear", _gather_gemm, {"LINEAR": True, "EVEN_K": True}, (*_UNIT, *_STRIDE_1, "w_src")),
    Kind("fprop_stem", _gather_gemm, {"PACKED": True}, (*_UNIT, "w_src"), unaligned=_X_ODD, vectors=False),
    Kind("fprop_odd", _gather_gemm, {"HAS_BIAS": True}, (), unaligned=(*_X_ODD, *_Y_ODD, "w_src"), vectors=False),
    Kind("fprop_uneven", _gather_gemm, {"HAS_BIAS": True}, (*_UNIT, *_STRIDE_1, "w_src")),
    Kind("fprop_int64", _gather_gemm, {"EVEN_K": True, "INT64": True}, (*_UNIT, *_STRIDE_1, "w_src")),
    Kind("dgrad_odd", _gather_gemm, {"TRANSPOSED": True}, (), unaligned=(*_X_ODD, *_Y_ODD, "w_src"), vectors=False),
    Kind(
        "dgrad_stem",
        _gather_gemm,
        {"TRANSPOSED": True, "PACKED": True},
        (),
        unaligned=(*_X_ODD, *_Y_ODD, "w_src"),
        vectors=False,
    ),
    Kind("wgrad_packed", _wgrad_gemm, {"PACKED": True, "EVEN": True, "SPLIT": True}, (*_UNIT, "w_c")),
    Kind("wgrad_odd", _wgrad_gemm, {"INT64": True}, (), unaligned=(*_X_ODD, *_Y_ODD, "w_c"), vectors=False),
    Kind("dgrad_stride1", _gather_gemm, {"TRANSPOSED": True, "EVEN_K": True}, (*_UNIT, *_STRIDE_1, "w_out")),
    Kind("dgrad_stride2", _gather_gemm, {"TRANSPOSED": True, "EVEN_K": True}, (*_UNIT, "w_out")),
    Kind("wgrad", _wgrad_gemm, {"EVEN": True}, (*_UNIT, *_STRIDE_1, "w_c")),
    Kind("wgrad_linear", _wgrad_gemm, {"LINEAR": True, "EVEN": True, "SPLIT": True}, (*_UNIT, *_STRIDE_1, "w_c")),
    Kind(
        "wgrad_stem",
        _wgrad_gemm,
        {"PACKED": True, "EVEN": True, "SPLIT": True},
        (*_UNIT, "w_c"),
        unaligned=_X_ODD,
        vectors=False,
    ),
    Kind(
        "fprop_together",
        _gather_gemm,
        {"DIAGONAL": True},
        (*_STRIDE_1, "dilation_h", "dilation_w", "gcd_h", "gcd_w"),
        unaligned=("each_src", "each_out", "wrap_src", "wrap_out", "w_out", "w_r", "w_s", "w_src"),
        vectors=False,
    ),
    Kind(
        "dgrad_together",
        _gather_gemm,
        {"DIAGONAL": True, "TRANSPOSED": True},
        (),
        unaligned=("each_src", "each_out", "wrap_src", "wrap_out", "w_out", "w_r", "w_s", "w_src"),
        vectors=False,
    ),
    Kind(
        "wgrad_together",
        _wgrad_gemm,
        {"DIAGONAL": True, "EVEN": True, "SPLIT": True},
        (*_STRIDE_1,),
        unaligned=("each_src", "each_out", "w_k", "w_r", "w_s", "w_c"),
        vectors=False,
    ),
    Kind("fprop_statistics", _gather_gemm, {"EVEN_K": True}, (*_UNIT, *_STRIDE_1, "w_src"), present=("sums",)),
    Kind(
        "fprop_normed",
        _gather_gemm,
        {"LINEAR": True, "EVEN_K": True, "NORM_SOURCE": True},
        (*_UNIT, *_STRIDE_1, "w_src"),
        present=_NORM,
    ),
    Kind(
        "fprop_normed_3x3",
        _gather_gemm,
        {"EVEN_K": True, "NORM_SOURCE": True},
        (*_UNIT, *_STRIDE_1, "w_src"),
        present=_NORM,
    ),
    Kind(
        "dgrad_normed",
        _gather_gemm,
        {"LINEAR": True, "EVEN_K": True, "NORM_RESULT": True},
        (*_UNIT, *_STRIDE_1, "w_out"),
        present=(*_NORM, "residual"),
    ),
    Kind(
        "dgrad_normed_stride2",
        _gather_gemm,
        {"TRANSPOSED": True, "EVEN_K": True, "NORM_RESULT": True},
        (*_UNIT, "w_out"),
        present=(*_NORM, "residual"),
    ),
    Kind(
        "wgrad_normed",
        _wgrad_gemm,
        {"LINEAR": True, "EVEN": True, "SPLIT": True, "NORM_SOURCE": True},
        (*_UNIT, *_STRIDE_1, "w_c"),
        present=_NORM,
    ),
    Kind("bgrad", _bgrad_partial, {"SPLIT": True}, ()),
    Kind("sum_splits", _sum_splits, {}, ("w_c",)),
)
# How fp32 is multiplied -> the precision mode that asks for it.
PRECISIONS = {how: mode for mode, how in INPUT_PRECISION.items()}
_FLAGS = (
    "DIAGONAL",
    "NORM_SOURCE",
    "NORM_RESULT",
    "TRANSPOSED",
    "LINEAR",
    "PACKED",
    "EVEN_K",
    "HAS_BIAS",
    "INT64",
    "SPLIT",
    "EVEN",
    "BY_HAND",
)


def _variant(kind: Kind, mode: str, arch: int, tile: Config) -> Variant:
    element = mode if mode in ("bf16", "fp16") else "fp32"
    constants: dict[str, Any] = {flag: kind.flags.get(flag, False) for flag in _FLAGS}
    constants |= {"INPUT_PRECISION": "tf32" if mode in ("bf16", "fp16") else mode, "GROUP_M": tile.group_m}
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "BLOCK": REDUCE_BLOCK}
    constants |= dict.fromkeys(kind.ones, 1)
    if not kind.flags.get("HAS_BIAS"):
        constants["bias"] = None
    constants |= {"NORM_ACT": 1, **dict.fromkeys(set(_NORM) - set(kind.present))}
    constants |= {
        "ACT": int(bool(set(kind.present) & set(_AFFINE))),
        **dict.fromkeys(set(_EPILOGUE) - set(kind.present)),
    }
    if kind.fn is _wgrad_gemm and not kind.flags.get("SPLIT"):
        constants["workspace"] = None
    names = kind.fn.arg_names
    constants = {name: constants[name] for name in names if name in constants}
    pointers = dict.fromkeys(("src", "weight", "bias", "residual", "out", "x", "grad"), f"*{element}")
    pointers |= dict.fromkeys(("scale", "shift", *_NORM), "*fp32")
    pointers["workspace"] = "*fp32"
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = tuple(n for n in _ALIGNED if n in names and n not in constants and n not in kind.unaligned)
    is_gemm = kind.fn is _gather_gemm or kind.fn is _wgrad_gemm
    return Variant(
        name=f"{kind.name}.{mode}.{tile.name}",
        fn=kind.fn, signature=signature, constexprs=constants, aligned=aligned,
        num_warps=tile.num_warps, num_stages=tile.num_stages, capability=arch,
        tensor_cores=is_gemm and mode != "ieee",
        asynchronous=is_gemm and not set(kind.unaligned) & {"src_row"},
    )  # fmt: skip


def variants(arch: int, modes: tuple[str, ...] = ("bf16", "fp16", *PRECISIONS)) -> Iterator[Variant]:
    """Every kind of call with every tile that config() may select for sm_<arch>."""
    for mode in modes:
        precision, itemsize = PRECISIONS.get(mode, "high"), (2 if mode in ("bf16", "fp16") else 4)
        for kind in KINDS:
            if kind.fn is _bgrad_partial:
                yield _variant(kind, mode, arch, Config(BGRAD_BLOCK_M, BGRAD_BLOCK_N, 1, 4, 1))
            elif kind.fn is _sum_splits:
                yield _variant(kind, mode, arch, Config(1, 1, 1, 4, 1))
            else:
                residual, normed = bool({"residual", "sums"} & set(kind.present)), bool(kind.flags.get("NORM_SOURCE"))
                how = "tf32" if itemsize == 2 else mode
                together, gathers = bool(kind.flags.get("DIAGONAL")), kind.fn is _gather_gemm
                for tile in candidates(precision, itemsize, kind.vectors, arch, residual or normed, normed):
                    if together and tile.block_n > TOGETHER_CHANNELS[itemsize]:
                        continue  # wider than all that share a tile
                    if together and gathers:
                        tile = replace(tile, block_k=TOGETHER_CHANNELS[itemsize], num_warps=TOGETHER_WARPS[how])
                    # Only the gathering kernel's blocks are cut to the channels.
                    for cut in cuts(tile, itemsize, normed) if gathers else (tile,):
                        yield _variant(kind, mode, arch, cut)
