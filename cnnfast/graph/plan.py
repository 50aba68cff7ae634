"""A plan: a flat list of native kernels over one arena, planned once and run in one native call without the GIL.

Values are dense NHWC tensors. Intermediate ones live in the arena, where a buffer is used again once its last reader has
run; constants (weights) stay where they are and are kept alive by the plan, and what is frozen of them is packed once;
results are allocated anew at every call, so that a caller may keep them. What runs is chosen by
:func:`cnnfast.dispatch.select`, like an eager call; a problem that no native kernel serves can't be planned.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cnnfast import dispatch, settings

_ALIGNMENT = 256  # bytes; what torch's CUDA allocator gives, and a whole number of cache lines


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the plan: shape (N, C, H, W) or (n,), strides in elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

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

    @property
    def parameters(self) -> dict[str, int]:
        """Every field of the kernel's parameter struct."""
        problem = self.selection.problem
        roles = dispatch.signature(problem.op).roles
        strides = {r.name: v.strides for r, v in zip(roles, self.operands, strict=True) if v is not None}
        return dispatch.parameters(problem, strides)


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
    """

    def __init__(self, device: torch.device, backend: str = settings.AUTO) -> None:
        self.device, self.backend = device, backend
        self._inputs: list[Value] = []
        self._constants: list[tuple[Value, torch.Tensor]] = []
        self._frozen: dict[int, torch.Tensor] = {}  # of the constants, by the value's id
        self._nodes: list[_Node] = []
        self._results: list[Value] = []
        self._native: Any = None
        self._owner: dispatch.Backend | None = None
        self.arena_bytes = 0

    # ---- building

    def input(self, shape: Sequence[int], dtype: torch.dtype) -> Value:
        """A tensor given at every call, in channels_last if it has four dimensions."""
        value = Value(tuple(shape), _dense(shape), dtype)
        self._inputs.append(value)
        return value

    def constant(self, tensor: torch.Tensor, frozen: bool = False) -> Value:
        """A tensor known now (a weight). It isn't copied: the plan sees what is in it when it runs.

        ``frozen`` promises that it never changes again: kernels may then read it once, when the plan is finished, and
        keep it in a form of their own. A change afterwards may be seen, or not, or in part.
        """
        value = Value(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)
        self._constants.append((value, tensor))
        if frozen:
            self._frozen[id(value)] = tensor
        return value

    def node(
        self,
        problem: dispatch.Problem,
        inputs: Mapping[str, Value | None],
        outputs: Mapping[str, Sequence[int]],
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> list[Value]:
        """Adds one kernel; returns its outputs in the signature's order.

        Raises:
            NotImplementedError: no native kernel serves the problem; lists the reasons.
        """
        signature = dispatch.signature(problem.op)
        constants = [inputs.get(role.name) for role in signature.roles if role.is_constant]
        packed = all(v is None or id(v) in self._frozen for v in constants)
        problem = dataclasses.replace(problem, packed=packed)
        selection = dispatch.select(problem, self.backend, strict=True)
        implementation = selection.implementation
        if implementation.node is None:
            raise NotImplementedError(f"{implementation.name} is no native kernel: a plan can't hold {problem}")
        backend = dispatch.backends()[implementation.backend]
        if self._owner not in (None, backend):
            raise NotImplementedError(f"a plan runs on one backend, not on {self._owner.name} and {backend.name}")
        self._owner = backend
        made: list[Value] = []
        operands: list[Value | None] = []
        for role in signature.roles:
            if role.name in outputs:
                shape = tuple(outputs[role.name])
                dtype = (dtypes or {}).get(role.name) or dispatch.TORCH_DTYPES[problem.dtype]
                made.append(Value(shape, _dense(shape), dtype))
                operands.append(made[-1])
                continue
            value = inputs.get(role.name)
            layout = implementation.layouts.get(role.name)
            if value is not None and not dispatch.readable(role, value.shape, value.strides, layout):
                raise NotImplementedError(f"{implementation.name} can't read {role.name} with strides {value.strides}")
            operands.append(value)
        self._nodes.append(_Node(selection, operands, made))
        return made

    def finish(self, results: Sequence[Value]) -> None:
        """Plans the arena and packs the nodes. ``results`` are the values that a call returns."""
        if self._owner is None or self._owner.plan is None:
            raise NotImplementedError("a plan needs at least one node of a backend with a native module")
        self._results = list(results)
        packed = [self._pack(node) for node in self._nodes]
        outside: list[Value] = [*self._inputs, *(v for v, _ in self._constants), *self._results]
        slots = {id(v): (i + 1, 0) for i, v in enumerate(outside)}
        offsets, self.arena_bytes = _plan_arena(self._nodes, {id(v) for v in outside})
        self._native = self._owner.plan()
        for node, extra in zip(self._nodes, packed, strict=True):
            assert node.selection.implementation.node is not None
            kernel, params = node.selection.implementation.node(node.selection.problem, node.parameters)
            operands = node.operands
            if extra is not None:
                operands = [*operands, *[None] * (dispatch.PACKED_OPERAND - len(operands)), extra]
            where = [(-1, 0) if v is None else slots.get(id(v)) or (0, offsets[id(v)]) for v in operands]
            self._native.add(kernel, params, where)

    def _pack(self, node: _Node) -> Value | None:
        """What the node's kernel makes of its constants beforehand, if they are all frozen: a constant of its own."""
        prepare = node.selection.implementation.prepare
        if prepare is None or not node.selection.problem.packed:
            return None
        frozen = [None if v is None else self._frozen.get(id(v)) for v in node.operands]
        return self.constant(prepare(node.selection.problem, node.parameters)(frozen))

    # ---- running

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Runs the plan; takes its inputs in the order of :meth:`input`, returns the results of :meth:`finish`."""
        if len(tensors) != len(self._inputs):
            raise ValueError(f"the plan takes {len(self._inputs)} tensors, got {len(tensors)}")
        given = []
        for tensor, value in zip(tensors, self._inputs, strict=True):
            if tuple(tensor.shape) != value.shape or tensor.dtype != value.dtype or tensor.device != self.device:
                raise ValueError(
                    f"the plan was made for {value.shape} {value.dtype} on {self.device}, got "
                    f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
                )
            given.append(tensor.contiguous(memory_format=_format(value.shape)))
        results = [torch.empty_strided(v.shape, v.strides, dtype=v.dtype, device=self.device) for v in self._results]
        bytes = self.arena_bytes + self._native.workspace
        arena = torch.empty(bytes + _ALIGNMENT, dtype=torch.uint8, device=self.device)
        base = -(-arena.data_ptr() // _ALIGNMENT) * _ALIGNMENT
        buffers = [base, *(t.data_ptr() for t in given), *(t.data_ptr() for _, t in self._constants)]
        buffers += [t.data_ptr() for t in results]
        assert self._owner is not None
        threads = torch.get_num_threads()
        self._native.run(buffers, base + self.arena_bytes, self._owner.stream(self.device), threads)
        return results

    @property
    def kernels(self) -> list[str]:
        """The implementations of the nodes, in their order."""
        return [node.selection.implementation.name for node in self._nodes]

    def __len__(self) -> int:
        return len(self._nodes)


def _dense(shape: Sequence[int]) -> tuple[int, ...]:
    if len(shape) == 4:
        return dispatch.channels_last_strides(shape)
    return dispatch.contiguous_strides(shape)


def _format(shape: Sequence[int]) -> torch.memory_format:
    return torch.channels_last if len(shape) == 4 else torch.contiguous_format


def _plan_arena(nodes: Sequence[_Node], outside: set[int]) -> tuple[dict[int, int], int]:
    """Offsets of the intermediate values: first fit among those whose lifetimes overlap; and the arena's size."""
    born: dict[int, int] = {}
    dies: dict[int, int] = {}
    size: dict[int, int] = {}
    for step, node in enumerate(nodes):
        for value in node.operands:
            if value is None or id(value) in outside:
                continue
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
