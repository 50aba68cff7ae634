"""Which kernel serves a call: Problem, Implementation, select, bind. Knows no operation and no backend by name.

A :class:`Problem` is the frozen description of one call; everything that decides is a pure function of it, so every
decision can be tested without the hardware. An operation registers its :class:`Signature` (roles of its operands, which
of them a direction writes); a backend registers :class:`Implementation` s. :func:`select` takes the cheapest that fits;
:func:`bind` turns it into a callable over tensors that allocates the result in torch's layout, converts operands that
the kernel can't read, and launches. A problem is only built on a cache miss: see :class:`cnnfast.ops._operator.Operator`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from cnnfast import settings

DTYPES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}
ACCUMULATORS = {torch.float64: torch.float64}  # every other dtype's sums are float32
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Role:
    """An operand: its name and, for each dimension, the parameter field that holds its stride (None: none does).

    An activation's channel stride (dimension 1) is 1 to every kernel but those that ask for its layout to be "any".
    """

    name: str
    strides: tuple[str | None, ...] = ()
    batch_dim: int | None = None  # the dimension that a vmap over this operand alone may be folded into
    dtype: str | None = None  # where it isn't the problem's: "i64", or "acc", the type that sums are accumulated in

    @property
    def is_constant(self) -> bool:
        """What a trained model holds fixed: weights and vectors."""
        return self.batch_dim is None

    @property
    def is_activation(self) -> bool:
        """An activation is NHWC to every kernel; a weight may have any strides; a vector is contiguous."""
        return self.batch_dim is not None


@dataclasses.dataclass(frozen=True)
class Signature:
    """What an operation's kernels take: the operands in their order, and the role(s) that each direction writes."""

    op: str
    roles: tuple[Role, ...]
    outputs: Mapping[str, tuple[str, ...]]  # direction -> roles written
    zeros: tuple[str, ...] = ()  # parameter fields that belong to another operation on the same kernels


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call, without its data. Sizes are attributes: ``problem.N``, ``problem.stride_h``."""

    op: str
    direction: str
    dtype: str
    device: str
    precision: str
    sizes: tuple[tuple[str, int], ...]
    layouts: tuple[tuple[str, str], ...] = ()  # role -> "nhwc" | "nchw" | "strided", as the tensors come
    capability: tuple[int, int] | None = None  # of a CUDA device
    flops: int = 0  # multiply-adds x 2 of the direct algorithm
    bytes: int = 0  # of the operands, each once
    packed: bool = False  # a kernel that packs its constants may do so beforehand (a plan's, frozen)

    def __getattr__(self, name: str) -> int:
        for field, value in object.__getattribute__(self, "sizes"):
            if field == name:
                return int(value)
        raise AttributeError(name)

    def __str__(self) -> str:
        sizes = " ".join(f"{k}={v}" for k, v in self.sizes)
        return f"{self.op} {self.direction} {self.dtype} on {self.device}, precision {self.precision}: {sizes}"


# A kernel bound to a problem: takes the operands in the signature's order, writes the outputs in place.
Kernel = Callable[[Sequence["torch.Tensor | None"]], Any]


@dataclasses.dataclass(frozen=True)
class Packing:
    """How a kernel's constants are packed beforehand."""

    bytes: int  # of the packed form
    # packs the constants among the operands; the result is the node's packed operand
    pack: Callable[[Sequence[torch.Tensor | None]], torch.Tensor]
    # writes the weights of a packed form to their place among the operands. With it the packed form is all that the kernel
    # reads, as long as the weights are finite; without it, it may read the constants themselves, too
    unpack: Callable[[torch.Tensor, Sequence[torch.Tensor | None]], None] | None


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One kernel as dispatch sees it.

    ``unsupported`` is the only capability predicate: a list of reasons, empty where the kernel serves. ``cost`` predicts
    seconds; among implementations of ours the cheapest wins, the order of registration breaking ties.
    ``error_bound`` is the factor m of the test tolerance m * (torch's own error) + one rounding, with its reason.
    """

    name: str  # "<backend>.<stem>.<variant>"
    op: str
    backend: str
    stem: str
    direction: str
    dtypes: tuple[str, ...]
    unsupported: Callable[[Problem], list[str]]
    # bind(problem, parameters): parameters maps every field (sizes and strides) to its value
    bind: Callable[[Problem, Mapping[str, int]], Kernel]
    cost: Callable[[Problem], float] = lambda problem: 0.0
    # role -> "nhwc": dense, converted where it isn't; "any": as it comes; by default an activation's channel stride is 1
    layouts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    alignment: int = 1  # bytes that every operand's address must be a multiple of
    error_bound: tuple[float, str] = (3.0, "plain accumulation in the accumulator type, any order")
    # of a kernel in a native module: its id and packed parameters, which is what a plan runs
    node: Callable[[Problem, Mapping[str, int]], tuple[int, bytes]] | None = None
    # of a native kernel that reads constants packed beforehand: how it packs them
    prepare: Callable[[Problem, Mapping[str, int]], Packing] | None = None
    returns: bool = False  # True: the kernel returns its results (ATen) and is given None for the outputs


@dataclasses.dataclass(frozen=True)
class Backend:
    """A backend: its name, why it can't serve a problem at all, and how its plans run."""

    name: str
    unavailable: Callable[[Problem], list[str]]
    implementations: Sequence[Implementation]
    automatic: Callable[[Problem], bool] = lambda problem: True  # False: serves only where it is forced
    plan: Callable[[], Any] | None = None
    stream: Callable[[torch.device], int] = lambda device: 0
    status: Callable[[], str] = lambda: "present"


_signatures: dict[str, Signature] = {}
_backends: dict[str, Backend] = {}
_order: tuple[str, ...] = ()


def register_signature(signature: Signature) -> Signature:
    """Called by an operation's contract."""
    _signatures[signature.op] = signature
    return signature


def signature(op: str) -> Signature:
    """The signature of an operation."""
    return _signatures[op]


def register_backend(backend: Backend, order: Sequence[str]) -> None:
    """Called by a backend; ``order``: the names of all backends, best first where costs are equal, ATen last."""
    global _order
    _backends[backend.name] = backend
    _order = tuple(order)


def backends() -> Mapping[str, Backend]:
    """The registered backends by name, in the order of the policy."""
    return {name: _backends[name] for name in _order if name in _backends}


def implementations(op: str | None = None) -> list[Implementation]:
    """Every registered implementation, in the order of the policy."""
    return [i for b in backends().values() for i in b.implementations if op is None or i.op == op]


def served(op: str, device: str) -> bool:
    """Whether any kernel of ours for an operation runs on a kind of device, whatever it supports there."""
    problem = Problem(op, "", "", device, "", ())
    return any(
        backend.name != "aten" and not backend.unavailable(problem) and any(i.op == op for i in backend.implementations)
        for backend in backends().values()
    )


def has_kernel(op: str, dtype: str, device: str, forced: str, direction: str = "") -> bool:
    """Whether a backend that is asked by itself, or the forced one, has a kernel of ours for an operation and a dtype.

    ``direction``: for that one; else for any.
    """
    look = _has_kernel if torch.compiler.is_compiling() else _has_kernel_cached  # which Dynamo can't trace
    return look(op, dtype, device, forced, direction)


def _has_kernel(op: str, dtype: str, device: str, forced: str, direction: str) -> bool:
    problem = Problem(op, "", dtype, device, "", ())
    return any(
        not backend.unavailable(problem)
        and any(i.op == op and dtype in i.dtypes and direction in ("", i.direction) for i in backend.implementations)
        for backend in _candidates(problem, forced)[0]
        if backend.name != "aten"
    )


_has_kernel_cached = functools.cache(_has_kernel)  # asked at every eager call; a process's kernels are what they are


def runs_plans(device: str, forced: str) -> bool:
    """Whether a backend that is asked by itself, or the forced one, runs plans on a kind of device."""
    problem = Problem("", "", "", device, "", ())
    return any(b.plan is not None and not b.unavailable(problem) for b in _candidates(problem, forced)[0])


@dataclasses.dataclass(frozen=True)
class Selection:
    """What serves a problem, and why the others don't."""

    problem: Problem
    implementation: Implementation
    rejected: tuple[tuple[str, tuple[str, ...]], ...]  # (name, reasons), in the order they were asked


def _candidates(problem: Problem, forced: str) -> tuple[list[Backend], str]:
    name, _, kernel = forced.partition(".")
    if name == settings.AUTO:
        return [b for b in backends().values() if b.automatic(problem)], ""
    if name not in _backends:
        raise NotImplementedError(f"{problem.op}: no backend {name!r} is registered")
    stem = kernel.split(".")[0]
    # a kernel, or a variant of it, may be pinned that has no backward: its backend then serves that
    of_op = [i for i in _backends[name].implementations if i.op == problem.op]
    known = {i.stem for i in of_op if i.direction == problem.direction}
    pinned = {i.direction for i in of_op if (i.name + ".").startswith(forced + ".")}
    return [_backends[name]], forced if stem in known and (not pinned or problem.direction in pinned) else ""


def select(
    problem: Problem, forced: str = settings.AUTO, strict: bool = False,
    further: Callable[[Implementation], list[str]] = lambda implementation: [],
) -> Selection:  # fmt: skip
    """The implementation that serves: of those of ours that fit the cheapest, else ATen's.

    ``further``: reasons against an implementation beside its own, such as a caller's who can't convert operands.

    Raises:
        NotImplementedError: under ``strict`` or a forced backend, where nothing fits; it prints every reason.
    """
    rejected: list[tuple[str, tuple[str, ...]]] = []
    candidates, pattern = _candidates(problem, forced)
    best: tuple[float, Implementation] | None = None
    for backend in candidates:
        if backend.name == "aten":
            if best is not None:
                break
            if strict:
                rejected.append((backend.name, ("strict() is set: ATen may not serve",)))
                continue
        absent = backend.unavailable(problem)
        if absent:
            if best is None:  # what serves another device is no news where something serves this one
                rejected.append((backend.name, tuple(absent)))
            continue
        fits = False
        for implementation in backend.implementations:
            if implementation.op != problem.op or implementation.direction != problem.direction:
                continue
            if pattern and not (implementation.name + ".").startswith(pattern + "."):
                continue
            reasons = reasons_against(implementation, problem) or further(implementation)
            if reasons:
                rejected.append((implementation.name, tuple(reasons)))
                continue
            fits = True
            cost = implementation.cost(problem)
            if best is None or cost < best[0]:
                best = (cost, implementation)
        if not fits and best is None:
            rejected.append(
                (backend.name, (f"has no kernel for {problem.op} {problem.direction} {problem.dtype} here",))
            )
    if best is not None:
        return Selection(problem, best[1], tuple(rejected))
    lines = "".join(f"\n  {line}" for line in reason_lines(rejected))
    raise NotImplementedError(f"no implementation serves {problem}\nreasons:{lines}")


def serves(problem: Problem, forced: str) -> bool:
    """Whether a kernel of ours serves a problem."""
    return predicted(problem, forced) < math.inf


def predicted(problem: Problem, forced: str) -> float:
    """Seconds that the kernel of ours which would serve a problem is predicted to take; infinite where there is none."""
    try:
        selection = select(problem, forced, strict=True)
    except NotImplementedError:
        return math.inf
    return selection.implementation.cost(problem)


def reason_lines(rejected: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """``name: reasons`` for each; variants of one kernel (its ISAs) that have the same reasons share a line."""
    variants: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name, reasons in rejected:
        backend_and_stem = ".".join(name.split(".")[:2])
        variants.setdefault((backend_and_stem, tuple(reasons)), []).append(name)
    lines = []
    for (stem, reasons), names in variants.items():
        several = f"{stem} ({', '.join(name[len(stem) + 1 :] for name in names)})"
        lines.append(f"{names[0] if len(names) == 1 else several}: {'; '.join(reasons)}")
    return lines


def reasons_against(implementation: Implementation, problem: Problem) -> list[str]:
    """Why an implementation can't serve a problem; empty where it can."""
    if problem.dtype not in implementation.dtypes:
        return [f"dtype {problem.dtype}: has {', '.join(implementation.dtypes)}"]
    return implementation.unsupported(problem)


# ---- layout and binding ----------------------------------------------------------------------------------------------


def channels_last_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense NHWC tensor of logical shape (N, C, H, W)."""
    _, c, h, w = shape
    return (h * w * c, 1, w * c, c)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense row-major tensor."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * max(int(shape[i + 1]), 1)
    return tuple(strides)


def dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a dense tensor as kernels read it: NHWC, or row-major where it hasn't four dimensions."""
    return channels_last_strides(shape) if len(shape) == 4 else contiguous_strides(shape)


def canonical_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Dimensions of one, whose strides torch leaves to chance, have a dense tensor's: kernels see dense 1x1 weights, and
    strides that are multiples of a vector.
    """
    return tuple(d if n == 1 else s for n, s, d in zip(shape, strides, dense_strides(shape), strict=True))


def readable(role: Role, shape: Sequence[int], strides: Sequence[int], layout: str | None) -> bool:
    """Whether a kernel can read an operand as it lies in memory."""
    if not role.strides:  # a vector
        return len(shape) == 0 or shape[-1] <= 1 or tuple(strides) == contiguous_strides(shape)
    if layout == "nhwc":
        return all(n == 1 or a == b for n, a, b in zip(shape, strides, channels_last_strides(shape), strict=True))
    return not role.is_activation or layout == "any" or shape[1] == 1 or strides[1] == 1


def parameters(problem: Problem, strides: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Every field of the operation's parameter struct: the problem's sizes, and the strides of the operands by role."""
    fields = dict(problem.sizes)
    fields.update(dict.fromkeys(signature(problem.op).zeros, 0))
    for role in signature(problem.op).roles:
        given = strides.get(role.name, (0,) * len(role.strides))
        fields.update({f: int(s) for f, s in zip(role.strides, given, strict=False) if f is not None})
    return fields


@dataclasses.dataclass(frozen=True)
class Meta:
    """Shape, strides and dtype of an operand."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def bind(
    selection: Selection, inputs: Mapping[str, Meta | None], outputs: Mapping[str, Meta], device: torch.device
) -> Callable[..., Any]:
    """A callable over the input tensors that allocates the outputs and launches.

    It takes the tensors named in ``inputs``, in the signature's order. Those that the kernel can't read where they lie
    are copied to NHWC first; an output that torch would give in another layout is copied there last. A direction with
    several outputs returns a tuple.
    """
    implementation, problem = selection.implementation, selection.problem
    sig = signature(problem.op)
    strides: dict[str, tuple[int, ...]] = {}
    positions: list[int] = []  # of the inputs among the operands
    converts: dict[int, torch.memory_format] = {}  # index among the inputs -> format to copy to
    allocations: list[_Allocation] = []
    for position, role in enumerate(sig.roles):
        layout = implementation.layouts.get(role.name)
        if role.name in outputs:
            returned = written = outputs[role.name]
            if not readable(role, written.shape, written.strides, layout):
                written = dataclasses.replace(written, strides=dense_strides(written.shape))
            allocations.append(_Allocation(position, written, returned))
            strides[role.name] = canonical_strides(written.shape, written.strides)
        elif role.name in inputs:
            positions.append(position)
            given = inputs[role.name]
            if given is None:
                continue
            strides[role.name] = canonical_strides(given.shape, given.strides)
            if not readable(role, given.shape, given.strides, layout):
                nhwc = len(given.shape) == 4
                converts[len(positions) - 1] = torch.channels_last if nhwc else torch.contiguous_format
                strides[role.name] = dense_strides(given.shape)
    kernel = implementation.bind(problem, parameters(problem, strides))
    if implementation.returns:
        expected = [a.returned for a in allocations]

        def returning(*tensors: torch.Tensor | None) -> Any:
            out = kernel(_scatter(tensors, positions, len(sig.roles)))
            if len(expected) == 1:
                return _laid_out(out, expected[0])
            return tuple(_laid_out(t, meta) for t, meta in zip(out, expected, strict=True))

        return returning
    return _runner(kernel, positions, converts, allocations, len(sig.roles), implementation.alignment, device)


def _laid_out(tensor: Any, meta: Meta) -> Any:
    if tensor.stride() == meta.strides:
        return tensor
    return torch.empty_strided(meta.shape, meta.strides, dtype=meta.dtype, device=tensor.device).copy_(tensor)


@dataclasses.dataclass(frozen=True)
class _Allocation:
    position: int  # among the operands
    written: Meta  # as the kernel writes it
    returned: Meta  # as the caller gets it


def _scatter(tensors: Sequence[Any], positions: Sequence[int], count: int) -> list[Any]:
    operands: list[Any] = [None] * count
    for position, tensor in zip(positions, tensors, strict=True):
        operands[position] = tensor
    return operands


def _runner(
    kernel: Kernel,
    positions: Sequence[int],
    converts: Mapping[int, torch.memory_format],
    allocations: Sequence[_Allocation],
    count: int,
    alignment: int,
    device: torch.device,
) -> Callable[..., Any]:
    empty_strided = torch.empty_strided
    empty = not any(math.prod(a.written.shape) for a in allocations)

    def general(*tensors: torch.Tensor | None) -> Any:
        operands = _scatter(tensors, positions, count)
        for index, format in converts.items():
            operands[positions[index]] = operands[positions[index]].clone(memory_format=format)
        if alignment > 1:
            operands = [t if t is None or t.data_ptr() % alignment == 0 else t.clone() for t in operands]
        for a in allocations:
            operands[a.position] = empty_strided(
                a.written.shape, a.written.strides, dtype=a.written.dtype, device=device
            )
        if not empty:
            kernel(operands)
        results = []
        for a in allocations:
            out = operands[a.position]
            if a.returned is not a.written:
                out = empty_strided(a.returned.shape, a.returned.strides, dtype=a.returned.dtype, device=device).copy_(
                    out
                )
            results.append(out)
        return results[0] if len(results) == 1 else tuple(results)

    if converts or empty or alignment > 1 or any(a.returned is not a.written for a in allocations):
        return general
    # what the hot path takes. Operands after the last that is there are absent: they need not be passed
    places = [*positions, *(a.position for a in allocations)]
    order = [places.index(i) if i in places else len(places) for i in range(max(places) + 1)]
    made = [(a.written.shape, a.written.strides, a.written.dtype) for a in allocations]
    if len(made) > 1:

        def run_several(*tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
            results = [empty_strided(shape, strides, dtype=dtype, device=device) for shape, strides, dtype in made]
            given = (*tensors, *results, None)
            kernel([given[i] for i in order])
            return tuple(results)

        return run_several
    shape, strides, dtype = made[0]
    in_order = order == list(range(len(places)))

    def run(*tensors: torch.Tensor | None) -> torch.Tensor:
        out = empty_strided(shape, strides, dtype=dtype, device=device)
        if in_order:
            kernel((*tensors, out))
        else:
            given = (*tensors, out, None)
            kernel([given[i] for i in order])
        return out

    return run


def observed(selection: Selection, run: Callable[..., Any]) -> Callable[..., Any]:
    """Reports the selection, and each call's time, to whoever observes (explain)."""
    if settings._observer is None:
        return run

    def timed(*tensors: Any) -> Any:
        start = time.perf_counter()
        out = run(*tensors)
        settings.note(Event(selection, time.perf_counter() - start))
        return out

    return timed


@dataclasses.dataclass(frozen=True)
class Event:
    """One observed call: what served it and how long the host took (on a CPU: the whole call); a plan knows the layer."""

    selection: Selection
    seconds: float
    layer: str = ""


@dataclasses.dataclass(frozen=True)
class Unserved:
    """A call that went to torch before any operator, with the reason."""

    op: str
    reason: str


@dataclasses.dataclass(frozen=True)
class TorchCall:
    """A call of torch's own: its name, shapes and dtype, how long the host took, and why it was no kernel of ours."""

    op: str
    problem: str
    dtype: torch.dtype
    seconds: float
    reason: str
    layer: str = ""

    @classmethod
    def of(
        cls, op: str, args: Sequence[Any], out: torch.Tensor, seconds: float, reason: str, layer: str = ""
    ) -> TorchCall:
        """From the call's arguments and result."""
        shapes = ", ".join("x".join(map(str, a.shape)) for a in args if isinstance(a, torch.Tensor))
        return cls(op, f"{shapes} -> {'x'.join(map(str, out.shape))}", out.dtype, seconds, reason, layer)
