"""What a graph knows beforehand: parameters, and what is computed of them, each held only in the form that something reads.

A constant is known by what it is: a parameter's name, or the expression that makes it of others. Its value is computed when
it is asked for. A plan that packs it holds the packed form alone; one that reads it as it lies holds that; parameters are
let go as soon as nothing needs them any more. Where another shape wants another form, that is made of the one that is held.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch


class Constant:
    """A tensor that never changes, in the forms in which it is held: as it is, as kernels packed it, or as a recipe."""

    def __init__(
        self, key: str, like: torch.Tensor, inputs: Sequence[Constant | None] = (),
        compute: Callable[..., torch.Tensor] | None = None, kept: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        self.key, self.like = key, like
        self.inputs, self.compute = inputs, compute
        self.kept = kept
        self.packed: list[tuple[torch.Tensor, Callable[[torch.Tensor], None]]] = []  # each with how to undo it
        # of a parameter: its tensor until it is let go, and whose it is, as long as that lives, with its version
        self.source: torch.Tensor | None = None
        self.owner: weakref.ref[torch.Tensor] | None = None
        self.version = 0
        self.uses = 0  # by constants that are still to be computed
        self.restored = False  # from a file: nothing tells that it isn't needed before it has been
        self.settled: Callable[[], None] = lambda: None

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Constant:
        """A tensor that somebody else holds."""
        return cls("", tensor, kept=tensor)

    def value(self) -> torch.Tensor:
        """The tensor, for now: as it is held, unpacked, or computed."""
        if self.kept is not None:
            return self.kept
        if self.packed:
            out = self._empty()
            self.packed[0][1](out)
            return out
        if self.compute is None:
            return self._parameter()
        made = self.compute(*[None if i is None else i.value() for i in self.inputs])
        assert made.shape == self.like.shape
        assert made.dtype == self.like.dtype
        return made if made.stride() == self.like.stride() else self._empty().copy_(made)

    def keep(self) -> torch.Tensor:
        """The tensor, held from now on; in memory of its own, where whoever gave it could still write to it."""
        if self.kept is None:
            value = self.value()
            lent = any(leaf.owner is not None and leaf.owner() is not None for leaf in self.leaves())
            storages = {leaf.source.untyped_storage().data_ptr() for leaf in self.leaves() if leaf.source is not None}
            if lent and (not storages or value.untyped_storage().data_ptr() in storages):
                value = self._empty().copy_(value)
            self.kept = value
        return self.kept

    def leaves(self) -> set[Constant]:
        """The parameters that it is computed of."""
        if self.compute is None:
            return {self}
        return {leaf for i in self.inputs if i is not None for leaf in i.leaves()}

    @property
    def bytes(self) -> int:
        """Of the forms that are held, but those that others hold."""
        kept = 0 if self.kept is None else self.kept.numel() * self.kept.itemsize
        return kept + sum(packed.numel() for packed, _ in self.packed)

    def _empty(self) -> torch.Tensor:
        return torch.empty_strided(self.like.shape, self.like.stride(), dtype=self.like.dtype, device=self.like.device)

    def _parameter(self) -> torch.Tensor:
        if self.source is not None:
            return self.source
        owner = None if self.owner is None else self.owner()
        if owner is None:
            why = "the model that was fused is gone"
        elif _version(owner) != self.version:
            why = "the model that was fused has been changed since"
        else:
            return owner.detach()
        raise NotImplementedError(
            f"fuse: this kind of input needs {self.key} in a form that isn't held (another dtype, mostly), and {why}; "
            "call the fused model with inputs of this kind first, or fuse the model again for them"
        )


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class Constants:
    """The constants of one network's graphs, so that what is made for one shape serves the next."""

    def __init__(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self._mode = FakeTensorMode()
        self._by_key: dict[str, Constant] = {}
        self._by_name: dict[str, Constant] = {}
        self._names: dict[str, str] = {}  # by key

    def add(self, key: str, tensor: torch.Tensor) -> str:
        """The name of a constant, new or known, whose tensor is given and stays; the key says what is in it."""
        return self._names.get(key) or self._new(Constant(key, self._like(tensor), kept=tensor))

    def lend(self, key: str, tensor: torch.Tensor, owner: torch.Tensor | None = None) -> str:
        """A parameter that is held until it isn't needed any more.

        ``owner``: the tensor whose memory that is, if whoever has it may go on using it; as long as it lives, unchanged,
        it can be read again.
        """
        constant = Constant(key, self._like(tensor))
        constant.source = tensor
        if owner is not None:
            constant.owner, constant.version = weakref.ref(owner), _version(owner)
        return self._new(constant)

    def derive(self, key: str, inputs: Sequence[Constant | None], compute: Callable[..., torch.Tensor]) -> str:
        """What is computed of other constants, new or known; of None where one is absent."""
        if key in self._names:
            return self._names[key]
        with self._mode, torch.no_grad():
            like = compute(*[None if i is None else i.like for i in inputs])
        return self._new(Constant(key, like, inputs, compute))

    def add_unnamed(self, key: str, tensor: torch.Tensor) -> str:
        """A tensor that its key doesn't describe: another graph's may differ."""
        for i in range(len(self._names) + 1):
            known = self._by_key.get(f"{key}#{i}")
            if known is None or _same(known.keep(), tensor):
                return self.add(f"{key}#{i}", tensor)
        raise AssertionError("more keys than names")

    def __getitem__(self, name: str) -> Constant:
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def _new(self, constant: Constant) -> str:
        name = f"constant_{len(self._names)}"
        self._names[constant.key] = name
        self._by_key[constant.key] = self._by_name[name] = constant
        return name

    def _like(self, tensor: torch.Tensor) -> torch.Tensor:
        with self._mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)

    # ---- letting go

    def expect(self, constants: Iterable[Constant]) -> None:
        """Parameters are let go when these have called ``settled``, each as often as it stands here."""
        expected = list(constants)
        lent = [c for c in self._by_name.values() if c.compute is None]
        for leaf in lent:
            leaf.uses = 0
        for constant in expected:
            for leaf in constant.leaves():
                leaf.uses += 1
            constant.settled = lambda c=constant: self._settled(c)  # type: ignore[misc]
        for leaf in lent:
            if not leaf.uses and not leaf.restored:
                leaf.source = None

    @staticmethod
    def _settled(constant: Constant) -> None:
        for leaf in constant.leaves():
            leaf.uses -= 1
            if leaf.uses == 0:
                leaf.source = None

    # ---- all of them

    @property
    def bytes(self) -> int:
        """Of everything that is held; parameters that haven't been let go count, whosever they are."""
        own = sum(c.bytes for c in self._by_name.values())
        lent = {c.source.untyped_storage().data_ptr(): c.source for c in self._by_name.values() if c.source is not None}
        return own + sum(t.untyped_storage().nbytes() for t in lent.values())

    def state(self) -> dict[str, torch.Tensor]:
        """The value of everything whose value is at hand, by key."""
        return {
            c.key: c.value() for c in self._by_name.values() if c.source is not None or c.kept is not None or c.packed
        }

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes what :meth:`state` returned."""
        for key, tensor in state.items():
            self[self.lend(key, tensor)].restored = True


def _same(a: Any, b: Any) -> bool:
    return bool(a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))
