"""A lowered graph as a program: plans of native kernels, and between them single operators, ours or torch's.

Nodes are scheduled so that plans are long: first everything that kernels of ours can compute, then other nodes that have
become ready, and so on. An operator of ours is on its own where no plan can hold it: its kernel is Triton's, or none of ours.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from cnnfast import dispatch, settings
from cnnfast.graph._nodes import affine_maps, is_tensor, shape
from cnnfast.graph.capture import value
from cnnfast.graph.constants import Constant, Constants
from cnnfast.graph.plan import Plan, Value
from cnnfast.graph.planner import COMPUTED, VIEWS, Planner, Unplanned, backend_of, layer_of
from cnnfast.graph.shared import Shared


@dataclasses.dataclass
class _View:
    """A tensor inside a buffer that a plan returns."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.as_strided(self.shape, self.strides, self.offset)


@dataclasses.dataclass
class Segment:
    """A plan, and where its inputs and results lie among the program's tensors."""

    plan: Plan
    inputs: list[int]
    outputs: list[tuple[int, int, _View | None]]  # (place, which of the plan's results, a view of it)
    frees: list[int] = dataclasses.field(default_factory=list)

    def run(self, tensors: list[Any]) -> None:
        """Reads and writes the program's tensors."""
        results = self.plan(*[tensors[i] for i in self.inputs])
        for place, index, view in self.outputs:
            tensors[place] = results[index] if view is None else view(results[index])


@dataclasses.dataclass
class Call:
    """An operator of torch's, or one of ours on its own."""

    name: str
    function: Callable[..., Any]
    arguments: Callable[[list[Any]], tuple[Any, Any]]
    output: int
    reason: str  # why no plan holds it; empty where it does no work
    layer: str = ""  # of the network, for explain
    ours: bool = False
    frees: list[int] = dataclasses.field(default_factory=list)

    def run(self, tensors: list[Any]) -> None:
        """Reads and writes the program's tensors."""
        args, kwargs = self.arguments(tensors)
        if settings._observer is None:
            tensors[self.output] = self.function(*args, **kwargs)
            return
        events = settings._observer
        before, start = len(events), time.perf_counter()
        tensors[self.output] = out = self.function(*args, **kwargs)
        seconds = time.perf_counter() - start
        if self.ours:  # which has reported itself
            for i, event in enumerate(events[before:], before):
                if isinstance(event, dispatch.Event):
                    events[i] = dataclasses.replace(event, layer=self.layer)
        elif self.reason and isinstance(out, torch.Tensor):
            settings.note(dispatch.TorchCall.of(self.name, args, out, seconds, self.reason, self.layer))


@dataclasses.dataclass
class Program:
    """What one graph has become; called with its placeholders' tensors, returns the flat list of its outputs."""

    steps: list[Segment | Call]
    size: int  # places
    outputs: list[tuple[bool, Any]]  # (is a place, place or value)
    device: torch.device  # of its tensors
    reads: list[int]  # the tensors among its inputs that anything depends on
    waits: str  # why a GPU can't go through it without the host; empty where it can

    def __call__(self, *inputs: Any) -> list[Any]:
        """The outputs for these inputs, the placeholders in their order."""
        tensors = [*inputs, *[None] * (self.size - len(inputs))]
        for step in self.steps:
            step.run(tensors)
            for place in step.frees:
                tensors[place] = None
        return [tensors[v] if is_place else v for is_place, v in self.outputs]

    @property
    def kernels(self) -> list[str]:
        """The implementations that the plans run, in their order."""
        return [kernel for step in self.steps if isinstance(step, Segment) for kernel in step.plan.kernels]

    @property
    def calls(self) -> list[Call]:
        """What runs between the plans."""
        return [step for step in self.steps if isinstance(step, Call)]

    @property
    def summary(self) -> str:
        """How much of what it runs."""
        plans = len(self.steps) - len(self.calls)
        ours, others = ([c for c in self.calls if c.reason and c.ours == own] for own in (True, False))
        alone = f"{len(ours)} operators of ours one by one, " if ours else ""
        return (
            f"{len(self.kernels)} kernels in {plans} plan{'s' * (plans != 1)}, {alone}{len(others)} operators by torch"
        )

    def lines(self) -> Iterator[str]:
        """What it runs, step by step, and why that is in no plan."""
        for step in self.steps:
            if isinstance(step, Segment):
                counts = collections.Counter(step.plan.kernels)
                listed = ", ".join(f"{n} {name}" for name, n in counts.items())
                yield f"plan, {step.plan.arena_bytes / 2**20:.1f} MiB: {listed}"
            elif step.reason:
                yield f"{'ours' if step.ours else 'torch'}: {step.name}: {step.reason}"


def build(
    graph: fx.Graph, constants: Constants, reasons: Mapping[fx.Node, str], shared: Shared, frozen: bool, who: str
) -> Program:
    """Plans a lowered graph. ``reasons``: why nodes weren't lowered; ``frozen``: constants never change again.

    Raises:
        NotImplementedError: under ``strict()``, where torch would run anything.
    """
    refused = dict(reasons)
    while True:
        try:
            program, finish = _Builder(graph, constants, refused, shared, frozen).program()
        except Unplanned as unplanned:
            refused.update(unplanned.reasons)
        else:
            _check_strict(program, who)
            finish()
            if program.device.type == "cuda":  # constants are computed on this stream, and read on any
                torch.cuda.current_stream(program.device).synchronize()
            return program


def _check_strict(program: Program, who: str) -> None:
    left = [f"{call.name}: {call.reason}" for call in program.calls if call.reason and not call.ours]
    if settings.state()[2] and left:
        raise NotImplementedError(f"{who}: strict() is set, and torch would run\n  " + "\n  ".join(left))


class _Builder:
    def __init__(
        self, graph: fx.Graph, constants: Constants, refused: dict[fx.Node, str], shared: Shared, frozen: bool
    ) -> None:
        self.graph, self.constants, self.refused = graph, constants, refused
        self.shared, self.frozen = shared, frozen
        self.nodes = list(graph.nodes)
        self.places: dict[fx.Node, int] = {}
        devices = [value(n).device for n in self.nodes if is_tensor(n)]
        # a GPU, if any of the tensors is there
        self.device = next((d for d in devices if d.type == "cuda"), devices[0] if devices else torch.device("cpu"))

    def unplannable(self, node: fx.Node) -> str:
        """Why no plan holds a node; empty where one may."""
        if node in self.refused:
            return self.refused[node]
        if node.target is affine_maps:
            return "computes the factors and addends of batch norms, whose parameters may change"
        rule = VIEWS.get(node.target) or COMPUTED.get(node.target)
        if rule is None or not is_tensor(node) or not rule(node):
            return "plans don't hold this operator" if _is_ours(node) else "cnnfast has no such operation"
        val = value(node)
        if val.dtype not in dispatch.DTYPES or 0 in val.shape:
            return f"dtype {val.dtype}" if 0 not in val.shape else "an empty tensor"
        if not dispatch.runs_plans(val.device.type, backend_of(node)):
            return f"no backend runs plans over {val.device.type} tensors here"
        return ""

    # ---- scheduling

    def schedule(self) -> list[tuple[bool, list[fx.Node]]]:
        """Runs of nodes: (whether it is a plan, nodes)."""
        done = {n for n in self.nodes if n.op in ("placeholder", "get_attr")}
        waiting = [n for n in self.nodes if n.op == "call_function"]
        # where plans run that may hold them; None: in none
        places = {n: None if self.unplannable(n) else value(n).device for n in waiting}
        turns = [*dict.fromkeys(place for place in places.values() if place is not None), None]
        runs: list[tuple[bool, list[fx.Node]]] = []
        for place in itertools.cycle(turns):
            if not waiting:
                break
            run, rest = [], []
            for node in waiting:  # in the graph's order, so one walk finds everything that is ready
                if places[node] == place and all(i in done for i in node.all_input_nodes):
                    run.append(node)
                    done.add(node)
                else:
                    rest.append(node)
            if run:
                # views alone are no work for a plan
                runs.append((place is not None and any(n.target not in VIEWS for n in run), run))
            waiting = rest
        return runs

    def program(self) -> tuple[Program, Callable[[], None]]:
        """The program, and what makes its plans ready once it is known that nothing has to be planned again."""
        placeholders = [n for n in self.nodes if n.op == "placeholder"]
        self.places = {n: i for i, n in enumerate(placeholders)}
        steps: list[Segment | Call] = []
        finishes: list[Callable[[], None]] = []
        constants: list[Constant] = []
        refused: dict[fx.Node, str] = {}
        for plans, run in self.schedule():
            if plans:
                try:
                    segment, finish = self.segment(run)
                except Unplanned as unplanned:  # what else can't be planned is seen at once
                    refused.update(unplanned.reasons)
                    continue
                steps.append(segment)
                finishes.append(finish)
                constants += segment.plan.constants
            elif not refused:
                steps += [self.call(node) for node in run]
        if refused:
            raise Unplanned(refused)
        output = self.nodes[-1]
        assert output.op == "output"
        outputs: list[tuple[bool, Any]] = []
        for item in output.args[0]:
            if not isinstance(item, fx.Node):
                outputs.append((False, item))
            elif item.op == "get_attr":
                outputs.append((False, self.tensor(item)))
            else:
                outputs.append((True, self.places[item]))
        _free(steps, {v for is_place, v in outputs if is_place})

        def finish_all() -> None:
            self.constants.expect(constants)
            for finish in finishes:
                finish()

        reads = [i for i, n in enumerate(placeholders) if n.users and is_tensor(n)]
        return Program(steps, len(self.places), outputs, self.device, reads, self.waits()), finish_all

    def waits(self) -> str:
        """See :class:`Program`."""
        for node in self.nodes:
            tags = getattr(node.target, "tags", ())
            if torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags:
                return f"{node.target} waits for values on the host"
            tensors = [t for t in pytree.tree_leaves(node.meta.get("val")) if isinstance(t, torch.Tensor)]
            others = {t.device for t in tensors if t.dim() > 0 or node.op != "get_attr"} - {self.device}
            if others:  # but constants that are numbers
                return f"tensors on {self.device} and on {others.pop()}"
        return ""

    def place(self, node: fx.Node) -> int:
        return self.places.setdefault(node, len(self.places))

    def tensor(self, node: fx.Node) -> torch.Tensor:
        """The tensor of a constant that isn't a plan's."""
        return self.constants[str(node.target)].keep()

    # ---- single operators

    def call(self, node: fx.Node) -> Call:
        ours = _is_ours(node)
        tensor = self.dense if ours else self.tensor
        leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
        holes = [(i, self.place(n)) for i, n in enumerate(leaves) if isinstance(n, fx.Node) and n.op != "get_attr"]
        template = [tensor(n) if isinstance(n, fx.Node) and n.op == "get_attr" else n for n in leaves]

        def fill(tensors: list[Any]) -> tuple[Any, Any]:
            given = list(template)
            for i, place in holes:
                given[i] = tensors[place]
            return pytree.tree_unflatten(given, spec)

        name = getattr(node.target, "__name__", str(node.target))
        # views are no work, and so nothing to explain
        reason = "" if node.target in VIEWS or name == "getitem" else self.unplannable(node)
        function: Any = node.target
        if ours and node.target in COMPUTED:
            function = _on_dense_images(function)
        elif _reads_strides(function):
            function = _with_captured_strides(function, node)
        full = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else name
        layer = layer_of(node, self.constants)
        return Call(full if reason else name, function, fill, self.place(node), reason, layer, ours)

    def dense(self, node: fx.Node) -> torch.Tensor:
        """The same for an operator of ours, which reads weights in channels_last."""
        constant = self.constants[str(node.target)]
        like = constant.like
        if not self.frozen or like.dim() != 4 or like.is_contiguous(memory_format=torch.channels_last):
            return constant.keep()
        return self.shared.laid_out(constant, dispatch.channels_last_strides(like.shape))

    # ---- plans

    def segment(self, run: list[fx.Node]) -> tuple[Segment, Callable[[], None]]:
        inside = set(run)
        device = value(run[0]).device
        planner = Planner(Plan(device, shared=self.shared, lean=True), inside, self.constants, self.frozen)
        planner.place_concatenations(run)
        refused: dict[fx.Node, str] = {}
        for node in run:
            try:
                planner.add(node)
            except Unplanned as unplanned:  # its readers are planned over an input in its place
                refused.update(unplanned.reasons)
        if refused:
            raise Unplanned(refused)
        needed = [n for n in run if any(user not in inside for user in n.users)]
        roots: list[Value] = []
        outputs: list[tuple[int, int, _View | None]] = []
        inputs = list(planner.inputs)
        for node in needed:
            v = planner.values[node]
            if any(v.root is planner.values[i].root for i in inputs):
                raise Unplanned({node: "a view of what it is given"})
            index = next((i for i, r in enumerate(roots) if r is v.root), len(roots))
            if index == len(roots):
                roots.append(v.root)
            whole = v is v.root and v.shape == shape(node)
            view = None if whole else _View(v.shape, v.strides, v.offset)
            outputs.append((self.place(node), index, view))
        segment = Segment(planner.plan, [self.place(n) for n in inputs], outputs)
        return segment, lambda: planner.plan.finish(roots)


def _free(steps: Sequence[Segment | Call], kept: set[int]) -> None:
    """Notes after which step a tensor is read for the last time."""
    last: dict[int, Segment | Call] = {}
    for step in steps:
        if isinstance(step, Segment):
            used = [*step.inputs, *(place for place, _, _ in step.outputs)]
        else:
            probe = _Probe()
            step.arguments(probe)  # type: ignore[arg-type]
            used = [*probe.seen, step.output]
        last.update(dict.fromkeys(used, step))
    for place, step in last.items():
        if place not in kept:
            step.frees.append(place)


class _Probe:
    """Stands for the list of tensors, and notes which are read."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __getitem__(self, place: int) -> None:
        self.seen.append(place)


def _is_ours(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", "") == "cnnfast"


def _on_dense_images(operator: Any) -> Callable[..., Any]:
    """An operator of ours on images in channels_last, so that each isn't converted, and its result back."""
    roles = {role.name: role for role in dispatch.signature(operator._schema.name.partition("::")[2]).roles}
    images = [
        role is not None and role.is_activation for a in operator._schema.arguments for role in [roles.get(a.name)]
    ]

    def dense(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.shape[1] == 1 or x.stride(1) == 1:
            return x
        return x.contiguous(memory_format=torch.channels_last)

    def run(*args: Any, **kwargs: Any) -> Any:
        return operator(*[dense(a) if image else a for a, image in zip(args, images, strict=False)], **kwargs)

    return run


_STRIDED = ("as_strided", "as_strided_copy", "view_as_real", "view_as_complex", "view.dtype")


def _reads_strides(target: Any) -> bool:
    return any(str(target).startswith(f"aten.{name}") for name in _STRIDED) or target is torch.ops.aten.view.default


def _with_captured_strides(function: Callable[..., Any], node: fx.Node) -> Callable[..., Any]:
    """The operator on a first operand that lies as it did when it was recorded, because its meaning depends on that."""
    recorded = value(node.args[0])  # type: ignore[arg-type]
    sizes, strides = tuple(recorded.shape), tuple(recorded.stride())

    def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.stride() != strides:
            x = torch.empty_strided(sizes, strides, dtype=x.dtype, device=x.device).copy_(x)
        return function(x, *args, **kwargs)

    return run
