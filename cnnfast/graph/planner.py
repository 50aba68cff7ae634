"""A run of a graph's nodes as one plan: which nodes a plan can hold, and each as kernels over the plan's tensors.

Nothing moves that needn't: reshapes and slices are views, and what is concatenated is written in its place by whoever
computes it. Two concatenations of the same tensors share one buffer, where one's are the beginning or a stretch of the
other's (dense blocks).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

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
    SHUFFLE,
    SLICE,
    arguments,
    is_tensor,
    shape,
)
from cnnfast.graph.capture import value
from cnnfast.graph.constants import Constants
from cnnfast.graph.plan import Plan, Value
from cnnfast.ops.adaptive_avg_pool2d import problem as adaptive_avg_pool2d_problem
from cnnfast.ops.adaptive_max_pool2d import problem as adaptive_max_pool2d_problem
from cnnfast.ops.add_act import problem as add_act_problem
from cnnfast.ops.avg_pool2d import problem as avg_pool2d_problem
from cnnfast.ops.batch_norm import problem as batch_norm_problem
from cnnfast.ops.conv_bn_act import problem as conv_bn_act_problem
from cnnfast.ops.max_pool2d import problem as max_pool2d_problem

_BAND = 4 << 20  # bytes that a convolution writes at a time where an image has more, and a pooling alone reads them


class Unplanned(Exception):
    """Nodes that a plan can't hold after all, each with the reason."""

    def __init__(self, reasons: Mapping[fx.Node, str]) -> None:
        self.reasons = dict(reasons)


# ---- what plans can hold ----------------------------------------------------------------------------------------------


def _is_slice(node: fx.Node) -> bool:
    """A stretch of channels (or images), or of a vector."""
    a = arguments(node)
    return ((is_tensor(a["self"], 4) and a["dim"] in (0, 1)) or is_tensor(a["self"], 1)) and a["step"] == 1


def _is_channel_cat(node: fx.Node) -> bool:
    a = arguments(node)
    return a["dim"] in (1, -3) and all(is_tensor(t, 4) and value(t).dtype == value(node).dtype for t in a["tensors"])


def _is_gate(node: fx.Node) -> bool:
    """An image times a factor for each of its channels (squeeze-and-excite): a call an image, and launches cost more."""
    few = value(node).device.type == "cpu" or shape(node)[0] == 1
    return few and _gated(node) is not None and value(node).dtype in (torch.float32, torch.float64)


def _gated(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    both: list[Any] = list(node.args[:2])
    for x, gate in (both, both[::-1]):
        if not is_tensor(x, 4) or not is_tensor(gate, 4) or shape(x) != shape(node):
            continue
        if shape(gate) == (*shape(x)[:2], 1, 1) and value(gate).dtype == value(x).dtype == value(node).dtype:
            return x, gate
    return None


VIEWS: dict[Any, Callable[[fx.Node], bool]] = {
    RESHAPE: lambda node: is_tensor(node.args[0]),
    SLICE: _is_slice,
}
COMPUTED: dict[Any, Callable[[fx.Node], bool]] = {
    **dict.fromkeys(
        [CONV, BATCH_NORM, ADD, MAX_POOL, AVG_POOL, ADAPTIVE_AVG_POOL, ADAPTIVE_MAX_POOL], lambda node: True
    ),
    CAT: _is_channel_cat,
    MUL: _is_gate,
    SHUFFLE: lambda node: is_tensor(node.args[0], 4),
}


class Planner:
    """Puts the nodes of one run into a plan."""

    def __init__(self, plan: Plan, inside: set[fx.Node], constants: Constants, frozen: bool) -> None:
        self.plan, self.inside = plan, inside
        self.constants, self.frozen = constants, frozen
        self.values: dict[fx.Node, Value] = {}
        self.inputs: list[fx.Node] = []  # in the plan's order
        self.targets: dict[fx.Node, Value] = {}  # where a node has to write
        self.copies: dict[fx.Node, list[tuple[fx.Node, Value]]] = {}  # what a concatenation copies
        self.postponed: set[fx.Node] = set()  # convolutions that are computed with their pooling

    def value(self, node: fx.Node) -> Value:
        """The plan's tensor of a node."""
        found = self.values.get(node)
        if found is not None:
            return found
        if node.op == "get_attr":
            constant = self.constants[str(node.target)]
            found = self.plan.constant(constant if self.frozen else constant.keep())
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
                written = operand in self.inside and operand.target in COMPUTED
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
        if self._is_banded(node):
            self.postponed.add(node)
            return
        self.plan.layer = layer_of(node, self.constants)
        self.plan.backend = backend_of(node)
        try:
            self.values[node] = _PLANNED[node.target](self, node)
        except NotImplementedError as error:
            raise Unplanned({node: str(error).split("\n")[0]}) from error

    def _output(self, node: fx.Node) -> Sequence[int] | Value:
        """What a node writes to: its place in a concatenation, or a tensor of its own."""
        return self.targets.get(node) or shape(node)

    def _copy(self, x: Value, y: Value) -> None:
        """y = x."""
        self.plan.node(self._copying(x), {"x": x}, {"y": y}, native=True)

    def _copying(self, x: Value) -> dispatch.Problem:
        return batch_norm_problem("fprop", x.shape, x.dtype, self.plan.device, ("none", False, 0.0))

    def _batch_norm(
        self, x: Value, y: Value | Sequence[int], more: Mapping[str, Value | None], act: str, eps: float
    ) -> Value:
        problem = batch_norm_problem("fprop", x.shape, x.dtype, self.plan.device, (act, False, eps))
        return self.plan.node(problem, {"x": x, **more}, {"y": y})[0]

    def _conv(self, node: fx.Node) -> Value:
        a = arguments(node)
        inputs = {k: None if a[k] is None else self.value(a[k]) for k in ("x", "w", "b", "scale", "shift", "r")}
        return self._convolution(a, inputs, self._output(node), shape(node))

    def _convolution(
        self, a: Mapping[str, Any], inputs: Mapping[str, Value | None], y: Value | Sequence[int], sizes: Sequence[int]
    ) -> Value:
        x, w = inputs["x"], inputs["w"]
        assert x is not None
        assert w is not None
        params = [a[k] for k in ("stride", "padding", "dilation", "groups", "activation", "precision")]
        layouts = tuple((name, _layout(v)) for name, v in (("x", x), ("w", w)))
        residual = inputs["r"] is not None
        args = (x.shape, w.shape, tuple(sizes), x.dtype, self.plan.device, params, layouts, residual)
        problem = conv_bn_act_problem(*args)
        dense = self._better_dense(problem, {**inputs, "y": y if isinstance(y, Value) else None})
        for name in dense.keys() - {"y"}:
            self._copy(inputs[name], dense[name])  # type: ignore[arg-type]
        made = self.plan.node(problem, {**inputs, **dense}, {"y": dense.get("y", y)})[0]
        if "y" not in dense:
            return made
        assert isinstance(y, Value)
        self._copy(made, y)
        return y

    def _better_dense(self, problem: dispatch.Problem, operands: Mapping[str, Value | None]) -> dict[str, Value]:
        """For images that lie in slices of others: dense ones, if copies and a kernel that wants these are the faster."""
        slices = {
            name: v
            for name, v in operands.items()
            if v is not None and v.base is not None and len(v.shape) == 4 and _layout(v) == "strided"
        }
        if not slices:
            return {}
        dense = {name: self.plan.empty(v.shape, v.dtype) for name, v in slices.items()}
        seconds = self.plan.seconds(problem, {**operands, **dense})
        for name, v in slices.items():
            seconds += self.plan.seconds(self._copying(v), {"x": v, "y": dense[name]}, native=True)
        return dense if seconds < self.plan.seconds(problem, operands) else {}

    def _norm(self, node: fx.Node) -> Value:
        a = arguments(node)
        more = {k: None if a[k] is None else self.value(a[k]) for k in ("w", "b", "m", "v", "r")}
        return self._batch_norm(self.value(a["x"]), self._output(node), more, a["activation"], a["eps"])

    def _gate(self, node: fx.Node) -> Value:
        """Image by image: batch norm's kernel, the factors being its weight."""
        found = _gated(node)
        assert found is not None
        x, gate = self.value(found[0]), self.value(found[1])
        out = self._output(node)
        y = out if isinstance(out, Value) else self.plan.empty(out, x.dtype)
        for n in range(x.shape[0]):
            factors = gate.narrow(0, n, 1).view((x.shape[1],), (1,))
            self._batch_norm(x.narrow(0, n, 1), y.narrow(0, n, 1), {"w": factors}, "none", 0.0)
        return y

    def _sum(self, node: fx.Node) -> Value:
        a = arguments(node)
        problem = add_act_problem("fprop", shape(node), value(node).dtype, self.plan.device, a["activation"])
        return self.plan.node(problem, {k: self.value(a[k]) for k in ("x", "r")}, {"y": self._output(node)})[0]

    def _pool(self, node: fx.Node) -> Value:
        source: Any = node.args[0]
        if source in self.postponed:
            return self._banded(source, node)
        return self._pooling(node, self.value(source), self._output(node))

    def _pooling(self, node: fx.Node, x: Value, y: Value | Sequence[int]) -> Value:
        made = _POOLS[node.target]("fprop", x.shape, x.dtype, self.plan.device, node.args[1:-2])
        return self.plan.node(made, {"x": x}, {"y": y})[0]

    # ---- bands

    def _is_banded(self, node: fx.Node) -> bool:
        """Whether it is a convolution with large images that nothing but a max pooling without padding reads."""
        if (
            node.target is not CONV
            or self.plan.device.type != "cpu"
            or _image_bytes(node) <= _BAND
            or len(node.users) != 1
        ):
            return False
        (pool,) = node.users
        if pool not in self.inside or pool.target is not MAX_POOL:
            return False
        a, c = arguments(pool), arguments(node)
        plain = tuple(a["padding"]) == (0, 0) and tuple(a["dilation"]) == (1, 1)
        inside = max(c["padding"][:2]) < _extent(c["dilation"][0], shape(c["w"])[2])  # no row of padding alone
        twice = a["kernel"][0] - a["stride"][0]  # rows that the windows of two bands share
        return plain and inside and 8 * twice <= _band_rows(node, pool) * a["stride"][0]

    def _banded(self, conv: fx.Node, pool: fx.Node) -> Value:
        """A convolution and its pooling in turns, image by image and some rows at a time.

        Then the larger of the two results is never there as a whole, and the pooling finds its part in the caches. Rows that
        the windows of two bands share are computed twice.
        """
        a, window, step = arguments(conv), arguments(pool)["kernel"][0], arguments(pool)["stride"][0]
        given = {k: None if a[k] is None else self.value(a[k]) for k in ("x", "w", "b", "scale", "shift", "r")}
        x, w = given["x"], given["w"]
        assert x is not None
        assert w is not None
        (n, k, h, q), pooled_h = shape(conv), shape(pool)[2]
        out = self._output(pool)
        y = out if isinstance(out, Value) else self.plan.empty(out, x.dtype)
        rows = _band_rows(conv, pool)
        extent = _extent(a["dilation"][0], w.shape[2])
        for image in range(n):
            for first in range(0, pooled_h, rows):
                count = min(rows, pooled_h - first)
                start = first * step
                stop = min(start + (count - 1) * step + window, h)
                top = start * a["stride"][0] - a["padding"][0]
                bottom = (stop - 1) * a["stride"][0] - a["padding"][0] + extent
                low, high = max(top, 0), min(bottom, x.shape[2])
                padding = [low - top, bottom - high, *a["padding"][2:]]
                part = {**given, "x": x.narrow(0, image, 1).narrow(2, low, high - low)}
                if given["r"] is not None:
                    part["r"] = given["r"].narrow(0, image, 1).narrow(2, start, stop - start)
                sizes = (1, k, stop - start, q)
                band = self._convolution({**a, "padding": padding}, part, sizes, sizes)
                self._pooling(pool, band, y.narrow(0, image, 1).narrow(2, first, count))
        return y

    def _concatenation(self, node: fx.Node) -> Value:
        for operand, piece in self.copies[node]:
            self._copy(self.value(operand), piece)
        return self.targets[node]

    def _reshape(self, node: fx.Node) -> Value:
        x, sizes = self.value(node.args[0]), shape(node)  # type: ignore[arg-type]
        made = x.reshape(sizes)
        if made is None and len(x.shape) == 4 and sizes[0] == x.shape[0] and all(n == 1 for n in sizes[2:]):
            return self._flat(x).view(sizes, dispatch.channels_last_strides((*sizes, 1, 1)[:4])[: len(sizes)])
        if made is None:
            raise NotImplementedError("reshapes an image in another order than it lies in memory")
        return made

    def _flat(self, x: Value) -> Value:
        """An image row-major, C H W: a copy, of one channel of C rows of H * W pixels. Far smaller than the weights after it."""
        n, c, h, w = x.shape
        x = self._in_rows(x)
        flat = self.plan.empty((n * c * h * w,), x.dtype)
        pixels = (n, 1, c, h * w)
        self._copy(x.view(pixels, (x.strides[0], 1, 1, x.strides[3])), flat.view(pixels, (c * h * w, 1, h * w, 1)))
        return flat

    def _in_rows(self, x: Value) -> Value:
        """The same, if its pixels follow each other at one distance, else a copy of which that is true."""
        _, _, h, w = x.shape
        if h == 1 or x.strides[2] == w * x.strides[3]:
            return x
        dense = self.plan.empty(x.shape, x.dtype)
        self._copy(x, dense)
        return dense

    def _shuffle(self, node: fx.Node) -> Value:
        """Channel i of group j becomes channel j of group i: each group's is a copy, of H * W rows of its channels."""
        groups = int(node.args[1])  # type: ignore[arg-type]
        x, out = self._in_rows(self.value(node.args[0])), self._output(node)  # type: ignore[arg-type]
        y = out if isinstance(out, Value) else self.plan.empty(out, x.dtype)
        n, c, h, w = x.shape
        rows = (n, 1, h * w, c // groups)
        for j in range(groups):
            source = x.view(rows, (x.strides[0], 1, x.strides[3], 1), j * (c // groups))
            self._copy(source, y.view(rows, (y.strides[0], 1, y.strides[3], groups), j))
        return y

    def _slice(self, node: fx.Node) -> Value:
        a = arguments(node)
        x, dim = self.value(a["self"]), a["dim"]
        start = min(max(a["start"] or 0, 0), x.shape[dim])
        return x.narrow(dim, start, shape(node)[dim])


def backend_of(node: fx.Node) -> str:
    """What serves a node, as it was said where it was recorded; for what isn't ours, as it is said now."""
    return str(arguments(node).get("backend", settings.state()[0]))


def layer_of(node: fx.Node, constants: Constants) -> str:
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


def _extent(dilation: int, taps: int) -> int:
    return dilation * (taps - 1) + 1


def _image_bytes(node: fx.Node) -> int:
    return math.prod(shape(node)[1:]) * int(value(node).dtype.itemsize)


def _band_rows(conv: fx.Node, pool: fx.Node) -> int:
    """Rows of a pooling's result in a band."""
    return -(-shape(pool)[2] // -(-_image_bytes(conv) // _BAND))


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
_PLANNED: dict[Any, Callable[[Planner, fx.Node], Value]] = {
    CONV: Planner._conv,
    BATCH_NORM: Planner._norm,
    MUL: Planner._gate,
    SHUFFLE: Planner._shuffle,
    ADD: Planner._sum,
    **dict.fromkeys(_POOLS, Planner._pool),
    CAT: Planner._concatenation,
    RESHAPE: Planner._reshape,
    SLICE: Planner._slice,
}
