"""A lowered graph as a program: plans of native kernels, and between them what torch runs.

Nodes are scheduled so that plans are long: first everything that kernels of ours can compute, then ATen's nodes that
have become ready, and so on.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from cnnfast import dispatch, settings
from cnnfast.graph._nodes import affine_maps, is_tensor, shape
from cnnfast.graph.capture import value
from cnnfast.graph.constants import Constant, Constants
from cnnfast.graph.plan import Plan, Shared, Value
from cnnfast.graph.planner import COMPUTED, VIEWS, Planner, Unplanned, layer_of


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
    """An operator of torch's."""

    name: str
    function: Callable[..., Any]
    arguments: Callable[[list[Any]], tuple[Any, Any]]
    output: int
    reason: str
    layer: str = ""  # of the network, for explain
    frees: list[int] = dataclasses.field(default_factory=list)

    def run(self, tensors: list[Any]) -> None:
        """Reads and writes the program's tensors."""
        args, kwargs = self.arguments(tensors)
        start = time.perf_counter()
        tensors[self.output] = out = self.function(*args, **kwargs)
        if settings._observer is not None and self.reason and isinstance(out, torch.Tensor):
            seconds = time.perf_counter() - start
            settings.note(dispatch.TorchCall.of(self.name, args, out, seconds, self.reason, self.layer))


@dataclasses.dataclass
class Program:
    """What one graph has become; called with its placeholders' tensors, returns the flat list of its outputs."""

    steps: list[Segment | Call]
    size: int  # places
    outputs: list[tuple[bool, Any]]  # (is a place, place or value)

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
        """What torch runs."""
        return [step for step in self.steps if isinstance(step, Call)]


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
            refused[unplanned.node] = unplanned.reason
        else:
            _check_strict(program, who)
            finish()
            return program


def _check_strict(program: Program, who: str) -> None:
    left = [f"{call.name}: {call.reason}" for call in program.calls if call.reason and call.name[:8] != "cnnfast."]
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

    def native(self, node: fx.Node) -> bool:
        """Whether a plan may hold a node."""
        if node in self.refused or not is_tensor(node):
            return False
        val = value(node)
        if val.device.type != "cpu" or val.dtype not in dispatch.DTYPES or 0 in val.shape:
            return False
        rule = VIEWS.get(node.target) or COMPUTED.get(node.target)
        return rule is not None and rule(node)

    # ---- scheduling

    def schedule(self) -> list[tuple[bool, list[fx.Node]]]:
        """Runs of nodes: (whether it is a plan, nodes)."""
        done = {n for n in self.nodes if n.op in ("placeholder", "get_attr")}
        waiting = [n for n in self.nodes if n.op == "call_function"]
        native = {n: self.native(n) for n in waiting}
        runs: list[tuple[bool, list[fx.Node]]] = []
        kind = True
        while waiting:
            run, rest = [], []
            for node in waiting:  # in the graph's order, so one walk finds everything that is ready
                if native[node] == kind and all(i in done for i in node.all_input_nodes):
                    run.append(node)
                    done.add(node)
                else:
                    rest.append(node)
            if run:
                # views alone are no work for a plan
                plans = kind and any(n.target not in VIEWS for n in run)
                runs.append((plans, run))
            waiting, kind = rest, not kind
        return runs

    def program(self) -> tuple[Program, Callable[[], None]]:
        """The program, and what makes its plans ready once it is known that nothing has to be planned again."""
        placeholders = [n for n in self.nodes if n.op == "placeholder"]
        self.places = {n: i for i, n in enumerate(placeholders)}
        steps: list[Segment | Call] = []
        finishes: list[Callable[[], None]] = []
        constants: list[Constant] = []
        for plans, run in self.schedule():
            if plans:
                segment, finish = self.segment(run)
                steps.append(segment)
                finishes.append(finish)
                constants += segment.plan.constants
            else:
                steps += [self.call(node) for node in run]
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

        return Program(steps, len(self.places), outputs), finish_all

    def place(self, node: fx.Node) -> int:
        return self.places.setdefault(node, len(self.places))

    def tensor(self, node: fx.Node) -> torch.Tensor:
        """The tensor of a constant that isn't a plan's."""
        return self.constants[str(node.target)].keep()

    # ---- torch's nodes

    def call(self, node: fx.Node) -> Call:
        leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
        holes = [(i, self.place(n)) for i, n in enumerate(leaves) if isinstance(n, fx.Node) and n.op != "get_attr"]
        template = [self.tensor(n) if isinstance(n, fx.Node) and n.op == "get_attr" else n for n in leaves]

        def fill(tensors: list[Any]) -> tuple[Any, Any]:
            given = list(template)
            for i, place in holes:
                given[i] = tensors[place]
            return pytree.tree_unflatten(given, spec)

        name = getattr(node.target, "__name__", str(node.target))
        ours = getattr(node.target, "namespace", "") == "cnnfast"
        usual = "an operator of ours, on its own: plans hold CPU tensors" if ours else "cnnfast has no such operation"
        if node.target is affine_maps:
            usual = "computes the factors and addends of batch norms, whose parameters may change"
        reason = self.refused.get(node, usual)
        if node.target in VIEWS or name == "getitem":
            reason = ""  # no work, and so nothing to explain
        function: Any = node.target
        if _reads_strides(function):
            function = _with_captured_strides(function, node)
        full = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else name
        layer = layer_of(node, self.constants)
        return Call(full if reason else name, function, fill, self.place(node), reason, layer)

    # ---- plans

    def segment(self, run: list[fx.Node]) -> tuple[Segment, Callable[[], None]]:
        inside = set(run)
        device = value(run[0]).device
        planner = Planner(Plan(device, shared=self.shared, lean=True), inside, self.constants, self.frozen)
        planner.place_concatenations(run)
        for node in run:
            planner.add(node)
        needed = [n for n in run if any(user not in inside for user in n.users)]
        roots: list[Value] = []
        outputs: list[tuple[int, int, _View | None]] = []
        inputs = list(planner.inputs)
        for node in needed:
            v = planner.values[node]
            if any(v.root is planner.values[i].root for i in inputs):
                raise Unplanned(node, "a view of what it is given")
            index = next((i for i, r in enumerate(roots) if r is v.root), len(roots))
            if index == len(roots):
                roots.append(v.root)
            whole = v is v.root and v.shape == shape(node)
            view = None if whole else _View(v.shape, v.strides, v.offset)
            outputs.append((self.place(node), index, view))
        segment = Segment(planner.plan, [self.places[n] for n in inputs], outputs)
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
