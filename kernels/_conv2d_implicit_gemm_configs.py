"""Which tiles conv2d_implicit_gemm can take for a problem, the predicted best first, and which problems are alike.

What tuning needs of a kernel file: ``DIRECTIONS``, ``configs`` and ``bucket``. A launcher takes the tile as ``tile``. Pure
functions of the problem and the card: tested for cards that this machine need not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import torch

from ._cards import Card, Product, asynchronous_products, seconds
from ._common import Conv2dProblem, ceil_div, next_power_of_2
from ._conv2d_descriptor import SUPPORTED, box, describable, result_map, tiles
from ._tiles import INPUT_PRECISION, Config, candidates, config, fit_depth, persistent
from .conv2d_implicit_gemm import PACKED_CHANNELS, _even, _pointwise, _wgrad_splits

DIRECTIONS = {"fprop": 3, "dgrad": 0, "wgrad": 1}  # and the result's place among the operands
_RESIDUAL = 6  # its place
FEW_CHANNELS = 16  # a group


@dataclass(frozen=True)
class Facts:
    """What a tile depends on beside the sizes and strides."""

    itemsize: int
    dtype: str  # "f32" | "bf16" | "f16"
    aligned: bool = True  # addresses are multiples of 16
    residual: bool = False
    sums: bool = False  # statistics leave with the result, or sums of the gradient: bn_act_conv's
    normed: bool = False  # x is normalised while it is loaded: bn_act_conv's


def facts(operands: Sequence[torch.Tensor | None]) -> Facts:
    """Of a call's operands, in the signature's order."""
    given = [t for t in operands if t is not None]
    return Facts(
        itemsize=given[0].element_size(),
        dtype={torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[given[0].dtype],
        aligned=all(t.data_ptr() % 16 == 0 for t in given),
        residual=len(operands) > _RESIDUAL and operands[_RESIDUAL] is not None,
    )


def product(p: Conv2dProblem, direction: str, of: Facts) -> Product:
    """The matrix product that a direction is."""
    c, k = p.C // p.G, p.K // p.G
    how = "half" if of.itemsize == 2 else INPUT_PRECISION[p.precision]
    moved = of.itemsize * (p.N * p.H * p.W * p.C + p.K * c * p.R * p.S + p.N * p.P * p.Q * p.K * (1 + of.residual))
    if direction == "wgrad":
        splits = _wgrad_splits(p)
        pixels = ceil_div(p.N * p.P * p.Q, splits)
        return Product(k, p.R * p.S * c, pixels, 1, p.G * splits, of.itemsize, how, moved, of.normed)
    if direction == "fprop":
        phases, m, n, depth, taps = 1, p.N * p.P * p.Q, k, c, p.R * p.S
    else:
        phases = p.stride_h * p.stride_w
        m = p.N * ceil_div(p.H, p.stride_h) * ceil_div(p.W, p.stride_w)
        n, depth, taps = c, k, ceil_div(p.R, p.stride_h) * ceil_div(p.S, p.stride_w)
    if _packed(p, depth, of):
        depth, taps = depth * taps, 1
    return Product(m, n, depth, taps, p.G * phases, of.itemsize, how, moved, of.normed)


def _linear(p: Conv2dProblem, of: Facts) -> bool:
    return _pointwise(p) and (not of.residual or _even(p, p.r_n, p.r_h, p.r_w))


def _packed(p: Conv2dProblem, depth: int, of: Facts) -> bool:
    return not _linear(p, of) and depth < PACKED_CHANNELS


def vectors(p: Conv2dProblem, direction: str, of: Facts) -> bool:
    """Whether operands are loaded 16 bytes at a time: the launchers' own rule."""
    strides = [p.x_n, p.x_h, p.x_w, p.y_n, p.y_h, p.y_w, p.C // p.G, p.K // p.G]
    strides += [stride for stride in (p.w_k, p.w_c, p.w_r, p.w_s) if stride != 1]
    if not of.aligned or any(stride % 16 for stride in strides):
        return False
    depth = p.C // p.G if direction == "fprop" else p.K // p.G
    return direction == "wgrad" or (p.w_c == 1 and not _packed(p, depth, of))


def configs(p: Conv2dProblem, direction: str, of: Facts, card: Card) -> tuple[Config, ...]:
    """The tiles that a direction can take on a card, without doubles, the predicted fastest first.

    None for groups of few channels, whose tiles follow from their sizes: the launcher's own rule.
    """
    if p.G > 1 and max(p.C, p.K) // p.G <= FEW_CHANNELS:
        return ()
    wanted = product(p, direction, of)
    width = max(16, next_power_of_2(wanted.n))
    found = candidates(p.precision, of.itemsize, vectors(p, direction, of), card.arch, of.residual, of.normed)
    if direction != "wgrad":  # whose reduction runs over pixels
        found = tuple(fit_depth(c, wanted.depth, of.itemsize, of.normed) for c in found)
    if _described(p, direction, of):
        found += persistent(card.arch)
    found = tuple(c for c in found if c.block_n <= width)

    def predicted(c: Config) -> float:
        covered = replace(wanted, m=_places(p, direction, of, c.block_m)) if c.persistent else wanted
        return seconds(covered, c, card)

    return tuple(sorted(dict.fromkeys(found), key=predicted))


def untuned(p: Conv2dProblem, direction: str, of: Facts, card: Card, tiles: Sequence[Config]) -> Config | None:
    """Of tiles, as configs() gives them, the one where nobody has tuned; None: the launcher's own choice.

    Where tensor cores read shared memory, products that descriptors feed; of their tiles the model's order is good to 5 % of
    the best. On an H200 they take 0.55 to 1.0 of the others' time, but where their depth, which isn't cut, is padded too far.
    """
    if not asynchronous_products(card.arch):
        return tiles[0]
    depth = product(p, direction, of).depth
    return next((c for c in tiles if c.persistent and c == fit_depth(c, depth, of.itemsize)), None)


def _described(p: Conv2dProblem, direction: str, of: Facts) -> bool:
    """Whether _conv2d_descriptor.py serves: stride 1, 16-bit floats, and every address and stride aligned."""
    if direction == "wgrad" or p.G > 1 or of.itemsize != 2 or of.normed or of.sums:
        return False
    tensors = [
        ((p.N, p.H, p.W, p.C), (p.x_n, p.x_h, p.x_w, p.x_c)), ((p.N, p.P, p.Q, p.K), (p.y_n, p.y_h, p.y_w, p.y_c)),
        ((p.R, p.S, p.K, p.C), (p.w_r, p.w_s, p.w_k, p.w_c)),
    ]  # fmt: skip
    if of.residual:
        tensors.append(((p.N, p.P, p.Q, p.K), (p.r_n, p.r_h, p.r_w, 1)))
    deep = not _packed(p, p.C if direction == "fprop" else p.K, of)
    fits = p.stride_h == p.stride_w == 1 and of.aligned and all(describable(*one) for one in tensors)
    return SUPPORTED and deep and fits


def _places(p: Conv2dProblem, direction: str, of: Facts, block_m: int) -> int:
    """Those of all tiles that descriptors feed, the ones beyond the map too."""
    covered = result_map(p, direction == "dgrad", _linear(p, of))
    return block_m * tiles(box(block_m, *covered), *covered)


def usual(p: Conv2dProblem, direction: str, of: Facts, card: Card) -> Config:
    """The tile that the launcher takes where none is given."""
    wanted, wide = product(p, direction, of), vectors(p, direction, of)
    depth = 0 if direction == "wgrad" else wanted.depth
    m = wanted.m * wanted.batches
    return config(m, wanted.n, depth, p.precision, of.itemsize, wide, card.arch, of.residual, of.normed)


def bucket(p: Conv2dProblem, direction: str, of: Facts) -> str:
    """What problems have in common that share a tile: all but the pixels, which count by the next power of 2."""
    pixels = next_power_of_2(p.N * p.P * p.Q).bit_length() - 1
    mode = f"f32-{p.precision}" if of.dtype == "f32" else of.dtype
    flags = "v" * vectors(p, direction, of) + "l" * _pointwise(p) + "r" * of.residual + "n" * of.normed
    return (
        f"{direction} {mode} {p.C}>{p.K} g{p.G} {p.R}x{p.S} s{p.stride_h}x{p.stride_w}"
        f" d{p.dilation_h}x{p.dilation_w} 2^{pixels} {flags or '-'}"
    )


def parse(values: object) -> Config | None:
    """A tile as it stands in a file; None where it is none."""
    if not isinstance(values, list) or len(values) != 7 or not all(type(v) is int for v in values):
        return None
    return Config(*values)


def dump(tile: Config) -> list[int]:
    """A tile as it stands in a file."""
    return list(astuple(tile))
