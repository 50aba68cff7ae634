"""The graph's vocabulary after lowering: which operators are ours, their arguments by name, and making new nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx

from cnnfast import ops
from cnnfast.graph.capture import value
from cnnfast.graph.constants import Constant, Constants

CONV = ops.conv_bn_act.op
BATCH_NORM = ops.batch_norm.op
ADD = ops.add_act.op
MAX_POOL = ops.max_pool2d.op
AVG_POOL = ops.avg_pool2d.op
ADAPTIVE_AVG_POOL = ops.adaptive_avg_pool2d.op
ADAPTIVE_MAX_POOL = ops.adaptive_max_pool2d.op
RESHAPE = torch.ops.aten.reshape.default
SLICE = torch.ops.aten.slice.Tensor
CAT = torch.ops.aten.cat.default
MUL = torch.ops.aten.mul.Tensor
SHUFFLE = torch.ops.aten.channel_shuffle.default


def affine_maps(
    gammas: Sequence[torch.Tensor], betas: Sequence[torch.Tensor], means: Sequence[torch.Tensor],
    variances: Sequence[torch.Tensor], eps: float,
) -> torch.Tensor:  # fmt: skip
    """Batch norms as x * factor + addend: the factors of all of them, then the addends, in four passes over all."""
    var = torch.cat(list(variances))
    out = var.new_empty(2 * var.numel())
    factor, addend = out.chunk(2)
    torch.rsqrt(var.add_(eps), out=factor)
    factor.mul_(torch.cat(list(gammas)))
    torch.addcmul(torch.cat(list(betas)), torch.cat(list(means)), factor, value=-1, out=addend)
    return out


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of an operator by name, defaults included."""
    given = {}
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if i < len(node.args):
            given[argument.name] = node.args[i]
        else:
            given[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return given


def replaced(node: fx.Node, **changes: Any) -> None:
    """Sets arguments of a call of an operator."""
    node.args = tuple({**arguments(node), **changes}.values())
    node.kwargs = {}


def shape(node: fx.Node) -> tuple[Any, ...]:
    """The shape of the tensor that a node stands for."""
    return tuple(value(node).shape)


def is_tensor(node: Any, dims: int | None = None) -> bool:
    """Whether a node stands for one tensor (of so many dimensions)."""
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    return dims is None or value(node).dim() == dims


def is_constant(node: Any) -> bool:
    """Whether a node is a constant, or absent."""
    return node is None or (isinstance(node, fx.Node) and node.op == "get_attr")


class Editor:
    """Makes nodes of a graph."""

    def __init__(self, graph: fx.Graph, constants: Constants) -> None:
        self.graph, self.constants = graph, constants

    def call(
        self, before: fx.Node, target: Any, args: Sequence[Any], like: fx.Node, sizes: Sequence[Any] | None = None
    ) -> fx.Node:
        """A call in front of a node; ``like`` has its dtype and device, and, unless ``sizes`` are given, its shape."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, tuple(args))
        node.meta = dict(like.meta)
        if sizes is not None and tuple(sizes) != shape(like):
            node.meta["val"] = value(like).new_empty(tuple(sizes))
        return node

    def constant(
        self, before: fx.Node, key: str, inputs: Sequence[fx.Node | None], compute: Callable[..., torch.Tensor]
    ) -> fx.Node:
        """A constant that ``compute`` makes of the tensors of others, None standing for one that is absent."""
        name = self.constants.derive(key, [None if n is None else self.of(n) for n in inputs], compute)
        with self.graph.inserting_before(before):
            node = self.graph.get_attr(name)
        node.meta["val"] = self.constants[name].like
        return node

    def of(self, node: fx.Node) -> Constant:
        """The constant that a node stands for."""
        return self.constants[str(node.target)]

    def key(self, node: fx.Node | None) -> str:
        """What a constant is."""
        return "none" if node is None else self.of(node).key

    def reshape(self, before: fx.Node, node: fx.Node, sizes: Sequence[Any]) -> fx.Node:
        """The node in another shape."""
        if tuple(sizes) == shape(node):
            return node
        if node.op == "get_attr":
            key = f"reshape({self.key(node)}, {list(sizes)})"
            return self.constant(before, key, [node], lambda t: t.reshape(tuple(sizes)))
        return self.call(before, RESHAPE, (node, list(sizes)), node, sizes)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Puts one node in the place of another, which is erased."""
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)
