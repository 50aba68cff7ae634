"""A plan: a flat list of native kernels over one arena, planned once and run in one native call without the GIL.

Values are NHWC tensors, dense or views of others: the channels of a concatenation, one image of a batch. Intermediate
ones live in the arena, where a buffer is used again once its last reader has run; constants (weights) stay where they are
and are kept alive by the plan, and what is frozen of them is packed once, and held in no other form that nothing reads;
results are allocated anew at every call, so that a caller may keep them. What runs is chosen by
:func:`cnnfast.dispatch.select`, like an eager call; a problem that no native kernel serves can't be planned. Any number of
threads may call a plan: each call takes an arena that no other has. On a GPU it runs on the current stream.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cnnfast import dispatch, settings
from cnnfast.graph.constants import Constant
from cnnfast.graph.shared import Shared

_ALIGNMENT = 256  # bytes; what torch's CUDA allocator gives, and a whole number of cache lines
_SWELLING, _SMALL = 1.25, 1 << 16  # a lean plan's packed forms: times their weights' bytes, and so many bytes more


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the plan: shape (N, C, H, W) or (n,), strides in elements; a view has a base, and an offset in it."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    base: Value | None = None
    offset: int = 0  # elements from the base's first

    @property
    def root(self) -> Value:
        """The value whose memory this is: itself, if it isn't a view."""
        return self if self.base is None else self.base

    def view(self, shape: Sequence[int], strides: Sequence[int], offset: int = 0) -> Value:
        """Elements of this value in another shape; ``offset`` counts from its first."""
        return Value(tuple(shape), tuple(strides), self.dtype, self.root, self.offset + offset)

    def narrow(self, dim: int, start: int, length: int) -> Value:
        """A slice along one dimension."""
        shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        return self.view(shape, self.strides, start * self.strides[dim])

    def reshape(self, shape: Sequence[int]) -> Value | None:
        """The elements in another shape where that takes no copy; None where it does. Unit dimensions come and go."""
        meta = torch.empty_strided(self.shape, self.strides, device="meta")
        try:
            strides = meta.view(tuple(shape)).stride()
        except RuntimeError:
            return None
        return self.view(shape, dispatch.canonical_strides(shape, strides))

    @property
    def bytes(self) -> int:
        """The span that the strides cover."""
        if 0 in self.shape:
            return 0
        return (sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)) + 1) * self.dtype.itemsize


@dataclasses.dataclass
class _Node:
    selection: dispatch.Selection
    operands: list[Value | None]  # in the signature's order
    outputs: list[Value]
    layer: str  # of the network, for explain

    @property
    def parameters(self) -> dict[str, int]:
        """Every field of the kernel's parameter struct."""
        problem = self.selection.problem
        roles = dispatch.signature(problem.op).roles
        return dispatch.parameters(problem, _strides(roles, self.operands))


class Plan:
    """Builds and runs a plan on one device.

    ::

        plan = Plan(torch.device("cpu"))
        x = plan.input((1, 3, 8, 8), torch.float32)
        (y,) = plan.node(problem, {"x": x, "w": plan.constant(w), "b": None}, {"y": (1, 8, 8, 8)})
        plan.finish([y])
        (result,) = plan(tensor)

    Args:
        device: Where the tensors live.
        backend: As :func:`cnnfast.backend` takes it; it must have a native module.
        shared: What several plans of one network have in common, so that it exists once.
        lean: Frozen constants are packed only where the packed form isn't larger than they are (Winograd's is, up to four
            times), and a kernel is chosen accordingly: the plan holds about as many bytes as the weights have.
    """

    def __init__(
        self, device: torch.device, backend: str = settings.AUTO, shared: Shared | None = None, lean: bool = False
    ) -> None:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device, self.backend, self.lean = device, backend, lean
        self._shared = Shared() if shared is None else shared
        self._taken = 0  # how many tensors a call brings
        self._inputs: list[tuple[Value, int]] = []  # each with its place among those; one may be there in two forms
        self._seen: list[
            tuple[Value, torch.Tensor]
        ] = []  # constants that may change, whose addresses are read at every call
        self._frozen: dict[int, Constant] = {}  # the others, by the value's id
        self._values: list[Value] = []  # of those, which keeps their ids
        self._forms: list[tuple[Value, Value]] = []  # what was given in one form, and is read in another
        self._holds: list[torch.Tensor] = []  # what was packed of them
        self._nodes: list[_Node] = []
        self._results: list[Value] = []
        self._native: Any = None
        self._added: list[tuple[Any, ...]] = []  # what the native plan was made of
        self._owner: dispatch.Backend | None = None
        self._alignment = 1  # bytes that addresses are multiples of
        self.arena_bytes = 0
        self.layer = ""  # that the next nodes belong to

    # ---- building

    def input(self, shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None = None) -> Value:
        """A tensor given at every call, with these strides, or in channels_last if it has four dimensions."""
        value = Value(tuple(shape), dispatch.dense_strides(shape) if strides is None else tuple(strides), dtype)
        self._inputs.append((value, self._taken))
        self._taken += 1
        return value

    def constant(self, given: torch.Tensor | Constant, frozen: bool = False) -> Value:
        """A tensor known now (a weight). It isn't copied: the plan sees what is in it when it runs.

        ``frozen`` promises that it never changes again: kernels may then read it once, when the plan is finished, and
        keep it in a form of their own. A change afterwards may be seen, or not, or in part. A :class:`Constant` is frozen.
        """
        like = given.like if isinstance(given, Constant) else given
        value = Value(tuple(like.shape), tuple(like.stride()), like.dtype)
        if isinstance(given, Constant) or frozen:
            self._values.append(value)
            self._frozen[id(value)] = given if isinstance(given, Constant) else Constant.of(given)
        else:
            self._seen.append((value, given))
        return value

    @property
    def constants(self) -> list[Constant]:
        """The frozen ones, each once."""
        return list(dict.fromkeys(self._frozen.values()))

    @staticmethod
    def empty(shape: Sequence[int], dtype: torch.dtype) -> Value:
        """A tensor that nodes write to, slice by slice."""
        return Value(tuple(shape), dispatch.dense_strides(shape), dtype)

    def node(
        self,
        problem: dispatch.Problem,
        inputs: Mapping[str, Value | None],
        outputs: Mapping[str, Sequence[int] | Value],
        dtypes: Mapping[str, torch.dtype] | None = None,
        native: bool = False,
    ) -> list[Value]:
        """Adds one kernel; returns its outputs in the signature's order: new ones of a shape, or the value to write to.

        What is given to the plan, or frozen, is converted where the kernel can't read it as it lies; everything else isn't.
        ``native``: only kernels that a plan can hold are asked, as for copies that the plan alone wants.

        Raises:
            NotImplementedError: no kernel serves the problem, or none of a native module; says why.
        """
        roles = dispatch.signature(problem.op).roles
        made: dict[str, Value] = {}
        for role in roles:
            if role.name in outputs:
                given = outputs[role.name]
                dtype = (dtypes or {}).get(role.name) or dispatch.TORCH_DTYPES[problem.dtype]
                made[role.name] = given if isinstance(given, Value) else self.empty(given, dtype)
        operands = {**inputs, **made}
        selection = self._select(problem, operands, native)
        chosen = selection.implementation
        if chosen.node is None:
            raise NotImplementedError(f"{chosen.name} serves it, which no plan can hold: it is launched from Python")
        self._owner = dispatch.backends()[chosen.backend]
        given_as = [self._readable(chosen, role, operands.get(role.name)) for role in roles]
        self._nodes.append(_Node(selection, given_as, list(made.values()), self.layer))
        return list(made.values())

    def seconds(self, problem: dispatch.Problem, operands: Mapping[str, Value | None], native: bool = False) -> float:
        """What a node over these operands, its outputs among them, is predicted to take; infinite where nothing serves."""
        try:
            selection = self._select(problem, operands, native)
        except NotImplementedError:
            return math.inf
        return selection.implementation.cost(selection.problem)

    def _select(
        self, problem: dispatch.Problem, operands: Mapping[str, Value | None], native: bool
    ) -> dispatch.Selection:
        """The best kernel among those that can take the operands."""
        roles = dispatch.signature(problem.op).roles
        constants = [operands.get(role.name) for role in roles if role.is_constant]
        packed = all(v is None or id(v) in self._frozen for v in constants)
        problem = dataclasses.replace(problem, packed=packed)

        def further(implementation: dispatch.Implementation) -> list[str]:
            if implementation.node is None:
                return ["is no native kernel"] if native else []
            if self._owner is not None and implementation.backend != self._owner.name:
                return [f"the plan runs on {self._owner.name}"]
            return [
                reason
                for role in roles
                if (value := operands.get(role.name)) is not None and not self._converts(value)
                for reason in _unreadable(implementation, role, value)
            ]

        def lean(implementation: dispatch.Implementation) -> list[str]:
            values = [operands.get(role.name) for role in roles]
            return further(implementation) or self._swells(implementation, problem, values)

        if self.lean and packed:
            plain = dataclasses.replace(problem, packed=False)
            selections = [
                dispatch.select(problem, self.backend, strict=True, further=lean),
                dispatch.select(plain, self.backend, strict=True, further=further),
            ]
            return min(selections, key=lambda s: s.implementation.cost(s.problem))
        return dispatch.select(problem, self.backend, strict=True, further=further)

    def _converts(self, value: Value) -> bool:
        """Whether a tensor can be had in another form: constants, and what every call brings."""
        return id(value) in self._frozen or any(value is v for v, _ in (*self._inputs, *self._seen))

    def _readable(
        self, implementation: dispatch.Implementation, role: dispatch.Role, value: Value | None
    ) -> Value | None:
        """An operand in a form that a kernel can read: itself, or the same tensor, dense, as one more of the plan's."""
        if value is None or not _unreadable(implementation, role, value):
            return value
        for known, form in self._forms:
            if known is value:
                return form
        form = Value(value.shape, dispatch.dense_strides(value.shape), value.dtype)
        self._forms.append((value, form))
        if id(value) in self._frozen:
            self._values.append(form)
            self._frozen[id(form)] = self._frozen[id(value)]
        self._inputs += [(form, place) for v, place in self._inputs if v is value]
        self._seen += [(form, tensor) for v, tensor in self._seen if v is value]
        return form

    def finish(self, results: Sequence[Value]) -> None:
        """Plans the arena and packs the nodes. ``results`` are the values that a call returns."""
        if self._owner is None or self._owner.plan is None:
            raise NotImplementedError("a plan needs at least one node of a backend with a native module")
        self._results = list(results)
        self._native = self._owner.plan()
        self._alignment = max(node.selection.implementation.alignment for node in self._nodes)
        outside: list[Value] = [v for v, _ in self._inputs] + [v for v, _ in self._seen] + self._results
        slots = {id(v): (i + 1, 0) for i, v in enumerate(outside)}
        offsets, self.arena_bytes = _plan_arena(self._nodes, {*slots, *self._frozen})
        waiting: dict[Constant, int] = {}  # how many nodes have still to see it
        for node in self._nodes:
            for constant in self._constants(node):
                if constant is not None:
                    waiting[constant] = waiting.get(constant, 0) + 1

        def where(value: Value | None) -> tuple[int, int]:
            if value is None:
                return self._native.ABSENT, 0
            constant = self._frozen.get(id(value.root))
            if constant is not None:  # stays where it is, so the native plan holds its address; all else is given to it
                slot, start = self._native.FIXED, self._fixed(constant, value.root).data_ptr()
            else:
                slot, start = slots.get(id(value.root)) or (0, offsets[id(value.root)])
            return slot, start + value.offset * value.dtype.itemsize

        for node in self._nodes:  # one after the other, so that what only they need goes as they are done
            assert node.selection.implementation.node is not None
            kernel, params = node.selection.implementation.node(node.selection.problem, node.parameters)
            last = []  # constants that nobody reads after this node
            for constant in self._constants(node):
                if constant is not None:
                    waiting[constant] -= 1
                    if not waiting[constant]:
                        last.append(constant)
            operands, packed = self._packed(node, last)
            extra = () if packed is None else ((self._native.FIXED, packed.data_ptr()),)
            self._added.append((kernel, params, [where(v) for v in operands], *extra))
            self._native.add(*self._added[-1])
            for constant in last:
                constant.settled()
        for constant in self.constants:
            if constant not in waiting:
                constant.settled()

    def _fixed(self, constant: Constant, value: Value) -> torch.Tensor:
        """A frozen constant as this plan reads it."""
        if value.strides == constant.like.stride():
            kept = constant.keep()
            if kept.data_ptr() % self._alignment == 0:
                return kept
        return self._shared.laid_out(constant, value.strides)

    def _constants(self, node: _Node) -> list[Constant | None]:
        """The frozen ones among a node's operands, in their places."""
        return [None if v is None else self._frozen.get(id(v.root)) for v in node.operands]

    def _packed(self, node: _Node, last: list[Constant]) -> tuple[list[Value | None], torch.Tensor | None]:
        """What the kernel has to be given beside what it makes of its constants beforehand, and that, if it makes anything."""
        implementation, problem = node.selection.implementation, node.selection.problem
        if implementation.prepare is None or not problem.packed:
            return node.operands, None
        constants = self._constants(node)
        packing = implementation.prepare(problem, node.parameters)
        weights = _weights(problem.op)
        packed, complete = self._shared.packed(implementation.name, constants, packing, weights, last)
        self._holds.append(packed)
        return [None if complete and i in weights else v for i, v in enumerate(node.operands)], packed

    def _swells(
        self, implementation: dispatch.Implementation, problem: dispatch.Problem, operands: Sequence[Value | None]
    ) -> list[str]:
        """Why a kernel may not pack its constants in a lean plan."""
        if implementation.prepare is None:
            return []
        strides = _strides(dispatch.signature(problem.op).roles, operands)
        packing = implementation.prepare(problem, dispatch.parameters(problem, strides))
        own = sum(v.bytes for v in operands if v is not None and id(v) in self._frozen)
        if packing.bytes <= _SWELLING * own + _SMALL:
            return []
        return [f"would hold {own} bytes of weights as {packing.bytes}"]

    # ---- running

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Runs the plan; takes its inputs in the order of :meth:`input`, returns the results of :meth:`finish`."""
        if len(tensors) != self._taken:
            raise ValueError(f"the plan takes {self._taken} tensors, got {len(tensors)}")
        if self.device.type == "cuda" and self.device.index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                return self(*tensors)
        given = []
        for value, place in self._inputs:
            tensor = tensors[place]
            if tuple(tensor.shape) != value.shape or tensor.dtype != value.dtype or tensor.device != self.device:
                raise ValueError(
                    f"the plan was made for {value.shape} {value.dtype} on {self.device}, got "
                    f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
                )
            given.append(_as_read(tensor, value.strides, self._alignment))
        seen = [_as_read(tensor, value.strides, self._alignment) for value, tensor in self._seen]
        results = [torch.empty_strided(v.shape, v.strides, dtype=v.dtype, device=self.device) for v in self._results]
        arena = self._shared.take(self.arena_bytes + self._native.workspace + _ALIGNMENT, self.device)
        base = -(-arena.data_ptr() // _ALIGNMENT) * _ALIGNMENT
        buffers = [base, *[t.data_ptr() for t in given], *[t.data_ptr() for t in seen]]
        buffers += [t.data_ptr() for t in results]
        assert self._owner is not None
        more = (base + self.arena_bytes, self._owner.stream(self.device), torch.get_num_threads())
        if settings._observer is None:
            self._native.run(buffers, *more)
        else:
            self._one_by_one(buffers, *more)
        self._shared.give(arena)
        return results

    def _one_by_one(self, buffers: Sequence[int], *more: int) -> None:
        """Runs the nodes, each timed for whoever observes."""
        assert self._owner is not None
        assert self._owner.plan is not None
        for node, added in zip(self._nodes, self._added, strict=True):
            single = self._owner.plan()
            single.add(*added)
            start = time.perf_counter()
            single.run(buffers, *more)
            settings.note(dispatch.Event(node.selection, time.perf_counter() - start, node.layer))

    @property
    def kernels(self) -> list[str]:
        """The implementations of the nodes, in their order."""
        return [node.selection.implementation.name for node in self._nodes]

    def __len__(self) -> int:
        return len(self._nodes)


def _weights(op: str) -> list[int]:
    """The places of an operation's weights among its operands."""
    return [i for i, role in enumerate(dispatch.signature(op).roles) if role.is_constant and role.strides]


def _unreadable(implementation: dispatch.Implementation, role: dispatch.Role, value: Value) -> list[str]:
    """Why a kernel can't take an operand where it lies in its memory, which begins as kernels want it."""
    layout, offset = implementation.layouts.get(role.name), value.offset * value.dtype.itemsize
    return [
        reason
        for wrong, reason in (
            (
                not dispatch.readable(role, value.shape, value.strides, layout),
                f"can't take {role.name} with strides {value.strides}",
            ),
            (
                offset % implementation.alignment != 0,
                f"needs {role.name} at a multiple of {implementation.alignment} bytes, not at {offset}",
            ),
        )
        if wrong
    ]


def _as_read(tensor: torch.Tensor, strides: tuple[int, ...], alignment: int) -> torch.Tensor:
    """The tensor, copied if its elements don't lie so."""
    shape, own = tensor.shape, tensor.stride()
    lies_so = own == strides or all(n <= 1 or a == b for n, a, b in zip(shape, own, strides, strict=True))
    if lies_so and (alignment == 1 or tensor.data_ptr() % alignment == 0):
        return tensor
    return torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _strides(roles: Sequence[dispatch.Role], operands: Sequence[Value | None]) -> dict[str, tuple[int, ...]]:
    """Of the operands that are there, by role."""
    pairs = zip(roles, operands, strict=True)
    return {role.name: dispatch.canonical_strides(v.shape, v.strides) for role, v in pairs if v is not None}


def _plan_arena(nodes: Sequence[_Node], outside: set[int]) -> tuple[dict[int, int], int]:
    """Offsets of the intermediate values: first fit among those whose lifetimes overlap; and the arena's size."""
    born: dict[int, int] = {}
    dies: dict[int, int] = {}
    size: dict[int, int] = {}
    for step, node in enumerate(nodes):
        for operand in node.operands:
            if operand is None or id(operand.root) in outside:
                continue
            value = operand.root
            born.setdefault(id(value), step)
            dies[id(value)] = step
            size[id(value)] = math.ceil(value.bytes / _ALIGNMENT) * _ALIGNMENT
    placed: list[tuple[int, int, int]] = []  # (offset, end, value)
    offsets: dict[int, int] = {}
    for key in sorted(born, key=lambda v: -size[v]):
        taken = sorted((o, e) for o, e, v in placed if born[v] <= dies[key] and born[key] <= dies[v])
        offset = 0
        for start, end in taken:
            if offset + size[key] <= start:
                break
            offset = max(offset, end)
        offsets[key] = offset
        placed.append((offset, offset + size[key], key))
    return offsets, max((e for _, e, _ in placed), default=0)
