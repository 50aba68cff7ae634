"""What the plans of one network share: the memory that calls work in, and weights in the forms that kernels read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from cnnfast import dispatch
from cnnfast.graph.constants import Constant


class Shared:
    """Arenas, and the constants that kernels packed or that were laid out for them."""

    def __init__(self) -> None:
        self._arenas: list[torch.Tensor] = []
        self._packed: dict[Any, list[torch.Tensor]] = {}

    def take(self, bytes: int, device: torch.device) -> torch.Tensor:
        """Memory that no other call has until it is given back; kept between calls, because fresh pages cost much.

        Not on a GPU, where a call has only begun when it is given back, and torch's allocator knows the order of a stream.
        """
        if device.type != "cpu":
            return torch.empty(bytes, dtype=torch.uint8, device=device)
        try:
            arena = self._arenas.pop()  # atomic, as append is
        except IndexError:
            return torch.empty(bytes, dtype=torch.uint8, device=device)
        return arena if arena.numel() >= bytes else torch.empty(bytes, dtype=torch.uint8, device=device)

    def give(self, arena: torch.Tensor) -> None:
        """Ends what :meth:`take` began."""
        if arena.device.type == "cpu":
            self._arenas.append(arena)

    def laid_out(self, constant: Constant, strides: tuple[int, ...]) -> torch.Tensor:
        """A constant as a tensor with these strides, made once; the constant can be had of it again."""
        known = self._packed.setdefault((strides, constant), [])
        if not known:
            like = constant.like
            made = torch.empty_strided(like.shape, strides, dtype=like.dtype, device=like.device)
            known.append(made.copy_(constant.value()))
            constant.packed.append((made, _copying(made)))
        return known[0]

    def packed(
        self, kernel: str, constants: Sequence[Constant | None], packing: dispatch.Packing, weights: Sequence[int],
        last: list[Constant],
    ) -> tuple[torch.Tensor, bool]:  # fmt: skip
        """What a kernel makes of constants, and whether it needs those in the places ``weights`` no more.

        That is an earlier form where it is the same, as it mostly is for another shape. Of ``last``, those that it takes over
        are settled: then a parameter goes before it is there twice.
        """
        values = [None if c is None else c.value() for c in constants]
        present = [(i, c) for i, c in enumerate(constants) if i in weights and c is not None]
        # a sum tells, without memory for an answer for each element; one that overflows keeps the weights needlessly
        complete = packing.unpack is not None and all(bool(torch.isfinite(values[i].sum())) for i, _ in present)  # type: ignore[union-attr]
        if complete:
            for _, constant in present:
                if constant in last:
                    last.remove(constant)
                    constant.settled()
        made = packing.pack(values)
        known = self._packed.setdefault((kernel, *constants), [])
        for other in known:
            if torch.equal(other, made):
                return other, complete
        if complete:
            for place, constant in present:
                constant.packed.append((made, _undoing(packing, made, place)))
        known.append(made)
        return made, complete


def _copying(made: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """Writes what was laid out to a tensor."""

    def copy(out: torch.Tensor) -> None:
        out.copy_(made)

    return copy


def _undoing(packing: dispatch.Packing, packed: torch.Tensor, place: int) -> Callable[[torch.Tensor], None]:
    """Writes packed weights to a tensor."""
    unpack = packing.unpack
    assert unpack is not None
    return lambda out: unpack(packed, [*[None] * place, out])
