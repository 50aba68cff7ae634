"""Which tile a Triton kernel gets: what was measured on this machine, else what its configurations say, else its own rule.

A kernel ``<stem>`` can be tuned if ``kernels/_<stem>_configs.py`` says what there is to choose from: ``configs``, all tiles,
the predicted fastest first, and ``untuned``, which of them a card gets that nobody tuned.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cnnfast import tuning


@functools.cache
def card(device: torch.device) -> tuple[str, Any]:
    """Name and properties (kernels/_cards.py) of a device; the interpreter poses as an A100."""
    cards = importlib.import_module("cnnfast.kernels._cards")
    if device.type != "cuda":
        return "interpreter", cards.CARDS["A100"]
    found = torch.cuda.get_device_properties(device)
    return found.name, cards.card(found.name, 10 * found.major + found.minor, found.multi_processor_count)


class Chooser:
    """Chooses the tiles of one direction of a kernel file."""

    def __init__(self, stem: str, direction: str, configs: Any) -> None:
        self._stem, self._direction, self._configs = stem, direction, configs

    def __call__(self, p: Any, operands: Sequence[torch.Tensor | None], bind: Callable[[Any], Any]) -> Any:
        """The tile of a call, or None for the launcher's own; bind(tile): the call in a given one, for tuning."""
        name, found = card(next(t.device for t in operands if t is not None))
        of = self._configs.facts(operands)
        tiles = self._configs.configs(p, self._direction, of, found)
        if not tiles:
            return None
        key = f"{self._stem} {self._configs.bucket(p, self._direction, of)}"
        entry = tuning.lookup(name, key)
        tile = self._configs.parse(entry.tile) if entry is not None else None
        if tile not in tiles:  # only what this kernel was compiled and checked in
            tile = None
        if tile is None and name != "interpreter":
            tile = self._configs.untuned(p, self._direction, of, found, tiles)
        tuning.note(lambda: self._task(p, operands, bind, name, found, of, key, tiles, tile))
        return tile

    def _task(
        self, p: Any, operands: Sequence[torch.Tensor | None], bind: Callable[[Any], Any], name: str, found: Any,
        of: Any, key: str, tiles: Any, tile: Any,
    ) -> tuning.Task:  # fmt: skip
        cards = importlib.import_module("cnnfast.kernels._cards")
        before = tile or self._configs.usual(p, self._direction, of, found)
        return tuning.Task(
            key=key, card=name, before=before, bind=bind, dump=self._configs.dump,
            output=self._configs.DIRECTIONS[self._direction],
            label=f"{self._direction} {p.C}x{p.H}x{p.W} > {p.K}, {p.R}x{p.S}"
            + (f"/{p.stride_h}" if p.stride_h > 1 else "") + (f", {p.G} groups" if p.G > 1 else ""),
            tiles=tuple(dict.fromkeys((before, *tiles))),
            operands=tuple(
                None if t is None else (tuple(t.shape), t.stride(), t.dtype, t.device) for t in operands
            ),
            predicted=cards.seconds(self._configs.product(p, self._direction, of), before, found),
        )  # fmt: skip


def chooser(stem: str, direction: str) -> Chooser | None:
    """For a direction of a kernel file; None where there is nothing to choose."""
    if importlib.util.find_spec(f"cnnfast.kernels._{stem}_configs") is None:
        return None
    configs = importlib.import_module(f"cnnfast.kernels._{stem}_configs")
    return Chooser(stem, direction, configs) if direction in configs.DIRECTIONS else None
