"""A lowered graph as a program: plans of native kernels, and between them what torch runs.

Nodes are scheduled so that plans are long: first everything that kernels of ours can compute, then ATen's nodes that
have become ready, and so on. Inside a plan nothing moves that needn't: reshapes and slices are views, and what is
concatenated is written in its place by whoever computes it. Two concatenations of the same tensors share one buffer, where
one's are the beginning or a stretch of the other's (dense blocks).
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from cnnfast import dispatch, settings
from cnnfast.graph._nodes import (
    ADAPTIVE_AVG_POOL,
    ADAPTIVE_MAX_POOL,
    ADD,
    AVG_POOL,
    BATCH_NORM,
    CAT,
    CONV,
    MAX_POOL,
    MUL,
    RESHAPE,
    SLICE,
    affine_maps,
    arguments,
    is_tensor,
    shape,
)
from cnnfast.graph.capture import value
from cnnfast.graph.constants import Constant, Constants
from cnnfast.graph.plan import Plan, Shared, Value
from cnnfast.ops.adaptive_avg_pool2d import problem as adaptive_avg_pool2d_problem
from cnnfast.ops.adaptive_max_pool2d import problem as adaptive_max_pool2d_problem
from cnnfast.ops.add_act import problem as add_act_problem
from cnnfast.ops.avg_pool2d import problem as avg_pool2d_problem
from cnnfast.ops.batch_norm import problem as batch_norm_problem
from cnnfast.ops.conv_bn_act import problem as conv_bn_act_problem
from cnnfast.ops.max_pool2d import problem as max_pool2d_problem


class _Unplanned(Exception):
    """A node that a plan can't hold after all, and why."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        self.node, self.reason = node, reason


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
        except _Unplanned as unplanned:
            refused[unplanned.node] = unplanned.reason
        else:
            _check_strict(program, who)
            finish()
            return program


def _check_strict(program: Program, who: str) -> None:
    left = [f"{call.name}: {call.reason}" for call in program.calls if call.reason and call.name[:8] != "cnnfast."]
    if settings.state()[2] and left:
        raise NotImplementedError(f"{who}: strict() is set, and torch would run\n  " + "\n  ".join(left))


# ---- what plans can hold ----------------------------------------------------------------------------------------------


def _is_slice(node: fx.Node) -> bool:
    """A stretch of channels (or images), or of a vector."""
    a = arguments(node)
    return ((is_tensor(a["self"], 4) and a["dim"] in (0, 1)) or is_tensor(a["self"], 1)) and a["step"] == 1


def _is_channel_cat(node: fx.Node) -> bool:
    a = arguments(node)
    return a["dim"] in (1, -3) and all(is_tensor(t, 4) and value(t).dtype == value(node).dtype for t in a["tensors"])


def _is_gate(node: fx.Node) -> bool:
    """An image times a factor for each of its channels (squeeze-and-excite)."""
    return _gated(node) is not None and value(node).dtype in (torch.float32, torch.float64)


def _gated(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    both: list[Any] = list(node.args[:2])
    for x, gate in (both, both[::-1]):
        if not is_tensor(x, 4) or not is_tensor(gate, 4) or shape(x) != shape(node):
            continue
        if shape(gate) == (*shape(x)[:2], 1, 1) and value(gate).dtype == value(x).dtype == value(node).dtype:
            return x, gate
    return None


_VIEWS: dict[Any, Callable[[fx.Node], bool]] = {
    RESHAPE: lambda node: is_tensor(node.args[0]),
    SLICE: _is_slice,
}
_COMPUTED: dict[Any, Callable[[fx.Node], bool]] = {
    **dict.fromkeys(
        [CONV, BATCH_NORM, ADD, MAX_POOL, AVG_POOL, ADAPTIVE_AVG_POOL, ADAPTIVE_MAX_POOL], lambda node: True
    ),
    CAT: _is_channel_cat,
    MUL: _is_gate,
}


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
        rule = _VIEWS.get(node.target) or _COMPUTED.get(node.target)
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
                plans = kind and any(n.target not in _VIEWS for n in run)
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
        if node.target in _VIEWS or name == "getitem":
            reason = ""  # no work, and so nothing to explain
        function: Any = node.target
        if _reads_strides(function):
            function = _with_captured_strides(function, node)
        full = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else name
        layer = _layer(node, self.constants)
        return Call(full if reason else name, function, fill, self.place(node), reason, layer)

    # ---- plans

    def segment(self, run: list[fx.Node]) -> tuple[Segment, Callable[[], None]]:
        inside = set(run)
        device = value(run[0]).device
        planner = _Planner(self, Plan(device, shared=self.shared, lean=True), inside)
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
                raise _Unplanned(node, "a view of what it is given")
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


class _Planner:
    """Puts the nodes of one run into a plan."""

    def __init__(self, builder: _Builder, plan: Plan, inside: set[fx.Node]) -> None:
        self.builder, self.plan, self.inside = builder, plan, inside
        self.values: dict[fx.Node, Value] = {}
        self.inputs: list[fx.Node] = []  # in the plan's order
        self.targets: dict[fx.Node, Value] = {}  # where a node has to write
        self.copies: dict[fx.Node, list[tuple[fx.Node, Value]]] = {}  # what a concatenation copies

    def value(self, node: fx.Node) -> Value:
        """The plan's tensor of a node."""
        found = self.values.get(node)
        if found is not None:
            return found
        if node.op == "get_attr":
            constant = self.builder.constants[str(node.target)]
            found = self.plan.constant(constant if self.builder.frozen else constant.keep())
        else:
            val = value(node)
            weight = any(user.target is CONV and node is arguments(user)["w"] for user in node.users)
            found = self.plan.input(tuple(val.shape), val.dtype, val.stride() if weight and val.dim() == 4 else None)
            self.inputs.append(node)
        self.values[node] = found
        return found

    # ---- concatenations

    def place_concatenations(self, run: list[fx.Node]) -> None:
        """Gives concatenations their buffers and their operands the places in them, the last concatenation first."""
        cats = [n for n in run if n.target is CAT]
        for cat in reversed(cats):
            buffer = self.targets.get(cat)
            if buffer is None:
                buffer = self.targets[cat] = self.plan.empty(shape(cat), value(cat).dtype)
            operands = list(cat.args[0])  # type: ignore[arg-type]
            if cat in self.copies:
                continue  # lies inside of another one
            offsets, at = [], 0
            for operand in operands:
                offsets.append(at)
                at += shape(operand)[1]
            copies: list[tuple[fx.Node, Value]] = []
            for i, (operand, offset) in enumerate(zip(operands, offsets, strict=True)):
                piece = buffer.narrow(1, offset, shape(operand)[1])
                written = operand in self.inside and operand.target in _COMPUTED
                if written and operand not in self.targets and operand not in operands[:i]:
                    self.targets[operand] = piece
                else:
                    copies.append((operand, piece))
            self.copies[cat] = copies
            for other in cats:
                if other is cat or other in self.copies or other in self.targets:
                    continue
                stretch = list(other.args[0])  # type: ignore[arg-type]
                start = _stretch_of(stretch, operands)
                if start is None:
                    continue
                self.targets[other] = buffer.narrow(1, offsets[start], shape(other)[1])
                # what the larger one copies has to be there when the smaller one is read
                early = [(o, p) for o, p in copies if o in stretch]
                self.copies[other] = early
                self.copies[cat] = copies = [(o, p) for o, p in copies if o not in stretch]

    # ---- nodes

    def add(self, node: fx.Node) -> None:
        """Plans one node."""
        self.plan.layer = _layer(node, self.builder.constants)
        try:
            self.values[node] = _PLANNED[node.target](self, node)
        except NotImplementedError as error:
            raise _Unplanned(node, str(error).split("\n")[0]) from error

    def output(self, node: fx.Node) -> Sequence[int] | Value:
        """What a node writes to: its place in a concatenation, or a tensor of its own."""
        return self.targets.get(node) or shape(node)

    def copy(self, x: Value, y: Value) -> None:
        """y = x."""
        self._batch_norm(x, y, {}, "none", 0.0)

    def _batch_norm(
        self, x: Value, y: Value | Sequence[int], more: Mapping[str, Value | None], act: str, eps: float
    ) -> Value:
        problem = batch_norm_problem("fprop", x.shape, x.dtype, self.plan.device, (act, False, eps))
        return self.plan.node(problem, {"x": x, **more}, {"y": y})[0]

    def conv(self, node: fx.Node) -> Value:
        a = arguments(node)
        inputs = {k: None if a[k] is None else self.value(a[k]) for k in ("x", "w", "b", "scale", "shift", "r")}
        x, w = inputs["x"], inputs["w"]
        assert x is not None
        assert w is not None
        params = [a[k] for k in ("stride", "padding", "dilation", "groups", "activation", "precision")]
        layouts = tuple((name, _layout(v)) for name, v in (("x", x), ("w", w)))
        residual = inputs["r"] is not None
        args = (x.shape, w.shape, shape(node), x.dtype, self.plan.device, params, layouts, residual)
        return self.plan.node(conv_bn_act_problem(*args), inputs, {"y": self.output(node)})[0]

    def batch_norm(self, node: fx.Node) -> Value:
        a = arguments(node)
        more = {k: None if a[k] is None else self.value(a[k]) for k in ("w", "b", "m", "v", "r")}
        return self._batch_norm(self.value(a["x"]), self.output(node), more, a["activation"], a["eps"])

    def gate(self, node: fx.Node) -> Value:
        """Image by image: batch norm's kernel, the factors being its weight."""
        found = _gated(node)
        assert found is not None
        x, gate = self.value(found[0]), self.value(found[1])
        out = self.output(node)
        y = out if isinstance(out, Value) else self.plan.empty(out, x.dtype)
        for n in range(x.shape[0]):
            factors = gate.narrow(0, n, 1).view((x.shape[1],), (1,))
            self._batch_norm(x.narrow(0, n, 1), y.narrow(0, n, 1), {"w": factors}, "none", 0.0)
        return y

    def sum(self, node: fx.Node) -> Value:
        a = arguments(node)
        problem = add_act_problem("fprop", shape(node), value(node).dtype, self.plan.device, a["activation"])
        return self.plan.node(problem, {k: self.value(a[k]) for k in ("x", "r")}, {"y": self.output(node)})[0]

    def pool(self, node: fx.Node) -> Value:
        problem = _POOLS[node.target]
        geometry = node.args[1:-2]
        x = self.value(node.args[0])  # type: ignore[arg-type]
        made = problem("fprop", x.shape, x.dtype, self.plan.device, geometry)
        return self.plan.node(made, {"x": x}, {"y": self.output(node)})[0]

    def concatenation(self, node: fx.Node) -> Value:
        for operand, piece in self.copies[node]:
            self.copy(self.value(operand), piece)
        return self.targets[node]

    def reshape(self, node: fx.Node) -> Value:
        x, sizes = self.value(node.args[0]), shape(node)  # type: ignore[arg-type]
        made = x.reshape(sizes)
        if made is None and len(x.shape) == 4 and sizes[0] == x.shape[0] and all(n == 1 for n in sizes[2:]):
            return self.flat(x).view(sizes, dispatch.channels_last_strides((*sizes, 1, 1)[:4])[: len(sizes)])
        if made is None:
            raise NotImplementedError("reshapes an image in another order than it lies in memory")
        return made

    def flat(self, x: Value) -> Value:
        """An image row-major, C H W: a copy, of one channel of C rows of H * W pixels. Far smaller than the weights after it."""
        n, c, h, w = x.shape
        if h > 1 and x.strides[2] != w * x.strides[3]:
            dense = self.plan.empty(x.shape, x.dtype)
            self.copy(x, dense)
            x = dense
        flat = self.plan.empty((n * c * h * w,), x.dtype)
        pixels = (n, 1, c, h * w)
        self.copy(x.view(pixels, (x.strides[0], 1, 1, x.strides[3])), flat.view(pixels, (c * h * w, 1, h * w, 1)))
        return flat

    def slice(self, node: fx.Node) -> Value:
        a = arguments(node)
        x, dim = self.value(a["self"]), a["dim"]
        start = min(max(a["start"] or 0, 0), x.shape[dim])
        return x.narrow(dim, start, shape(node)[dim])


def _layer(node: fx.Node, constants: Constants) -> str:
    """The module that a node was recorded in: a convolution's by its weight's name, because a block may call it."""
    weight = arguments(node)["w"] if node.target is CONV else None
    if isinstance(weight, fx.Node) and weight.op == "get_attr":
        merged = constants[str(weight.target)].key.split("; ")
        names = [found[1] for key in merged if (found := re.search(r"([\w.]+)\.weight\b", key))]
        if names:
            return " + ".join(dict.fromkeys(names))
    paths = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return str(paths[-1]) if paths else ""


def _layout(v: Value) -> str:
    if all(
        n == 1 or a == b for n, a, b in zip(v.shape, v.strides, dispatch.channels_last_strides(v.shape), strict=True)
    ):
        return "nhwc"
    contiguous = dispatch.contiguous_strides(v.shape)
    return (
        "nchw" if all(n == 1 or a == b for n, a, b in zip(v.shape, v.strides, contiguous, strict=True)) else "strided"
    )


def _stretch_of(part: list[Any], whole: list[Any]) -> int | None:
    """Where one list lies in another."""
    for start in range(len(whole) - len(part) + 1):
        if whole[start : start + len(part)] == part:
            return start
    return None


_POOLS: dict[Any, Callable[..., dispatch.Problem]] = {
    MAX_POOL: max_pool2d_problem,
    AVG_POOL: avg_pool2d_problem,
    ADAPTIVE_AVG_POOL: adaptive_avg_pool2d_problem,
    ADAPTIVE_MAX_POOL: adaptive_max_pool2d_problem,
}
_PLANNED: dict[Any, Callable[[_Planner, fx.Node], Value]] = {
    CONV: _Planner.conv,
    BATCH_NORM: _Planner.batch_norm,
    MUL: _Planner.gate,
    ADD: _Planner.sum,
    **dict.fromkeys(_POOLS, _Planner.pool),
    CAT: _Planner.concatenation,
    RESHAPE: _Planner.reshape,
    SLICE: _Planner.slice,
}
