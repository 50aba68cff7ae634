"""A model as one functional ATen graph over its inputs, its parameters being named constants.

``torch.export`` records the model for one set of shapes. In-place operators become functional ones here, where what they
write has no other name (the whole of nearly every network); otherwise export's own decompositions do it, which takes as
long again.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.fx.experimental import proxy_tensor
from torch.utils import _pytree as pytree

from cnnfast.graph.constants import Constants

# operators that may return their input itself, without saying so in their schema
_MAYBE_ALIASES = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "contiguous", "to", "type_as"}


@dataclasses.dataclass
class Captured:
    """A functional graph: placeholders are the tensors among the inputs, in their order; get_attr nodes name constants.

    Its output is a flat list of nodes and plain values, ``out_spec`` what they are leaves of.
    """

    graph: fx.Graph
    constants: Constants
    out_spec: pytree.TreeSpec

    @property
    def nodes(self) -> list[fx.Node]:
        """The nodes in order."""
        return list(self.graph.nodes)


def value(node: fx.Node) -> Any:
    """The fake tensor (or tensors) that a node stands for."""
    return node.meta["val"]


class _Aliased(Exception):
    """An in-place operator writes what other nodes read by another name."""


def capture(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], constants: Constants) -> Captured:
    """The model's graph for inputs like these.

    Raises:
        NotImplementedError: the model can't be exported, or writes to its parameters or buffers; says why.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exported = torch.export.export(model, tuple(args), dict(kwargs), strict=False)
        except Exception as error:
            raise NotImplementedError(
                f"fuse: torch.export can't capture {type(model).__name__}: {type(error).__name__}: {error}"
            ) from error
        # torch.export keeps the nodes that it traced, for its messages, until it is called again
        getattr(proxy_tensor, "_FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT", {}).clear()
        try:
            return _functional(exported, model, constants)
        except _Aliased:
            pass
        try:
            return _functional(exported.run_decompositions({}), model, constants)
        except _Aliased:
            raise NotImplementedError(
                f"fuse: the graph of {type(model).__name__} can't be made functional: it holds control flow, or an operator "
                "that writes to several tensors"
            ) from None


def _functional(exported: Any, model: torch.nn.Module, constants: Constants) -> Captured:
    signature = exported.graph_signature
    if signature.buffers_to_mutate:
        names = ", ".join(signature.buffers_to_mutate.values())
        raise NotImplementedError(f"fuse: {type(model).__name__} writes to its buffers in evaluation: {names}")
    state = {**exported.constants, **exported.state_dict}
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = dict(signature.inputs_to_lifted_tensor_constants)
    graph, env, family = fx.Graph(), {}, _Families()
    outputs: list[Any] = []

    def constant(name: str, old: fx.Node) -> fx.Node:
        node = graph.get_attr(name)
        node.meta["val"] = old.meta["val"]
        return node

    for old in exported.graph.nodes:
        if old.op == "placeholder":
            if old.name in named:
                env[old] = constant(constants.add(named[old.name], state[named[old.name]].detach()), old)
            elif old.name in lifted:
                name = lifted[old.name]
                env[old] = constant(constants.add_unnamed(name, state[name].detach()), old)
            elif isinstance(old.meta.get("val"), torch.Tensor):
                env[old] = graph.placeholder(old.name)
                env[old].meta["val"] = old.meta["val"]
            else:
                env[old] = old.meta.get("val")  # a number, which the graph holds anyway
            family.found(old)
        elif old.op == "call_function":
            if isinstance(old.target, torch._ops.HigherOrderOperator):
                raise _Aliased  # export's decompositions inline what they can
            written = _written(old)
            target = old.target
            if written is not None:
                relatives = family.of(written)
                if any(n.op == "placeholder" and n.name in {**named, **lifted} for n in relatives):
                    raise NotImplementedError(
                        f"fuse: {type(model).__name__} writes to a parameter: {old.format_node()}"
                    )
                target = _without_writing(old.target)
                if target is None or any(not _same_place(n, written) for n in relatives):
                    raise _Aliased
            node = graph.call_function(
                target,
                pytree.tree_map_only(fx.Node, lambda n: env[n], old.args),
                pytree.tree_map_only(fx.Node, lambda n: env[n], old.kwargs),
            )
            node.meta = {k: old.meta[k] for k in ("val", "nn_module_stack") if k in old.meta}
            env[old] = node
            if written is not None:
                for other in family.of(written):
                    env[other] = node
                family.join(old, written)
            else:
                family.found(old)
        elif old.op == "output":
            outputs = [env[n] if isinstance(n, fx.Node) else n for n in old.args[0]]
        else:
            raise _Aliased
    graph.output(outputs)
    if not any(isinstance(n, fx.Node) for n in outputs):
        raise NotImplementedError(f"fuse: {type(model).__name__} returns no tensor that depends on its inputs")
    return Captured(graph, constants, exported.call_spec.out_spec)


class _Families:
    """Nodes that share memory."""

    def __init__(self) -> None:
        self._of: dict[fx.Node, list[fx.Node]] = {}
        self._storages: dict[int, fx.Node] = {}

    def found(self, node: fx.Node) -> None:
        """A new node: of its input's family if it may be a view of it, else of one of its own."""
        val = node.meta.get("val")
        key = val.untyped_storage()._cdata if isinstance(val, torch.Tensor) else None
        parent = self._storages.get(key) if key is not None else None
        if parent is None and node.op == "call_function" and _may_alias(node.target):
            parent = next((n for n in node.all_input_nodes), None)
        if parent is not None:
            self.join(node, parent)
        else:
            self._of[node] = [node]
        if key is not None:
            self._storages.setdefault(key, node)

    def join(self, node: fx.Node, other: fx.Node) -> None:
        family = self._of[other]
        family.append(node)
        self._of[node] = family

    def of(self, node: fx.Node) -> list[fx.Node]:
        return list(self._of[node])


def _may_alias(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return True  # getitem
    return target._overloadpacket.__name__ in _MAYBE_ALIASES or any(
        r.alias_info is not None for r in target._schema.returns
    )


def _written(node: fx.Node) -> fx.Node | None:
    """The node that an in-place operator writes to."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return None
    written = [
        i for i, a in enumerate(node.target._schema.arguments) if a.alias_info is not None and a.alias_info.is_write
    ]
    if written != [0] or not isinstance(node.args[0], fx.Node):
        raise _Aliased
    return node.args[0]


def _without_writing(target: Any) -> Any:
    """The functional operator of an in-place one's name and overload; None where there is none."""
    packet = getattr(torch.ops.aten, target._overloadpacket.__name__.removesuffix("_"), None)
    found = getattr(packet, target._overloadname, None)
    return None if found is None or found._schema.is_mutable else found


def _same_place(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors of one memory are the same elements in the same order."""
    x, y = a.meta["val"], b.meta["val"]
    return (
        isinstance(x, torch.Tensor)
        and x.shape == y.shape
        and x.stride() == y.stride()
        and x.storage_offset() == y.storage_offset()
        and x.dtype == y.dtype
    )
