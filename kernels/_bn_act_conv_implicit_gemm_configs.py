"""Which tiles bn_act_conv_implicit_gemm can take: conv2d_implicit_gemm's, with the sums beside the results, and, where it
normalises what it reads, room for that.

What tuning needs of a kernel file; see _conv2d_implicit_gemm_configs.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from . import _conv2d_implicit_gemm_configs as conv2d
from ._cards import Card, Product
from ._conv2d_implicit_gemm_configs import Facts
from ._tiles import Config
from .bn_act_conv_implicit_gemm import gradient

DIRECTIONS = {"fprop": 3, "dgrad": 13, "wgrad": 1}  # and the place of y, t, w among the operands
_XM = 4  # its place
parse, dump = conv2d.parse, conv2d.dump


def facts(operands: Sequence[torch.Tensor | None]) -> Facts:
    """Of a call's operands, in the signature's order."""
    return replace(conv2d.facts(operands[:_XM]), residual=True, sums=True, normed=operands[_XM] is not None)


def _of(p: Any, direction: str, of: Facts) -> tuple[Any, Facts]:
    """The convolution: dgrad, which normalises its result alone, writes t beside x."""
    return (gradient(p), replace(of, normed=False)) if direction == "dgrad" else (p, of)


def product(p: Any, direction: str, of: Facts) -> Product:
    """The matrix product that a direction is."""
    p, of = _of(p, direction, of)
    return conv2d.product(p, direction, of)


def configs(p: Any, direction: str, of: Facts, card: Card) -> tuple[Config, ...]:
    """The tiles that a direction can take on a card, without doubles, the predicted fastest first."""
    p, of = _of(p, direction, of)
    return conv2d.configs(p, direction, of, card)


def untuned(p: Any, direction: str, of: Facts, card: Card, tiles: Sequence[Config]) -> Config | None:
    """Of tiles, as configs() gives them, the one where nobody has tuned; None: the launcher's own choice."""
    p, of = _of(p, direction, of)
    return conv2d.untuned(p, direction, of, card, tiles)


def usual(p: Any, direction: str, of: Facts, card: Card) -> Config:
    """The tile that the launcher takes where none is given."""
    p, of = _of(p, direction, of)
    return conv2d.usual(p, direction, of, card)


def bucket(p: Any, direction: str, of: Facts) -> str:
    """What problems have in common that share a tile."""
    p, of = _of(p, direction, of)
    return conv2d.bucket(p, direction, of)
