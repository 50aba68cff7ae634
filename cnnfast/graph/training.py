"""A graph that records gradients, forward or backward, on our operators: each node of ATen's by one or a few of ours.

Nothing is merged or frozen. Batch norm in training is ``batch_norm_stats`` and ``batch_norm``; a maximum's gradient searches
its windows again and reads no indices. Shapes may be symbolic.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx

from cnnfast import dispatch, ops
from cnnfast.functional._arguments import pair, resolve_precision
from cnnfast.graph._nodes import Editor, arguments, is_tensor
from cnnfast.graph.capture import value
from cnnfast.graph.constants import Constants
from cnnfast.graph.lower import erase_unused

aten = torch.ops.aten
_Results = Sequence["fx.Node | None"]


def train(graph: fx.Graph) -> None:
    """Puts our operators in the place of ATen's, in place."""
    editor = Editor(graph, Constants())
    for node in list(graph.nodes):
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        if rule is None or not _ours(node):
            continue
        made = rule(editor, node)
        if made is None:
            continue
        if is_tensor(node):
            assert made[0] is not None
            editor.replace(node, made[0])
            continue
        for getter in list(node.users):
            result = made[getter.args[1]]
            if result is not None:
                editor.replace(getter, result)
        if not node.users:
            graph.erase_node(node)
    erase_unused(graph)
    graph.lint()


def _ours(node: fx.Node) -> bool:
    """Whether all tensors are of a kind that operators of ours take; what isn't an image is nobody's."""
    tensors = [value(n) for n in node.all_input_nodes if is_tensor(n)]
    return (
        bool(tensors)
        and any(t.dim() == 4 for t in tensors)
        and all(t.dim() in (1, 4) and t.device.type in ("cpu", "cuda") for t in tensors)
        and all(t.dtype in dispatch.DTYPES for t in tensors if t.dim() == 4 and t.dtype != torch.int64)
    )


def _settings(node: fx.Node) -> tuple[str, str, bool]:
    return resolve_precision(value(node).device)


def _like(node: fx.Node, index: int) -> fx.Node:
    """A stand-in that carries the meta of one result."""
    return next((g for g in node.users if g.args[1] == index), node)


def _channels_last(*nodes: fx.Node) -> bool:
    return ops.prefers_channels_last(*(value(n) for n in nodes))


def _geometry(a: dict[str, Any]) -> tuple[Any, ...]:
    h, w = pair("conv2d", "padding", a["padding"])
    stride, dilation = (list(pair("conv2d", k, a[k])) for k in ("stride", "dilation"))
    return stride, [h, h, w, w], dilation, a["groups"]


def _conv(editor: Editor, node: fx.Node) -> _Results | None:
    a = arguments(node)
    if a["transposed"] or value(a["input"]).dim() != 4:
        return None
    args = (a["input"], a["weight"], a["bias"], *_geometry(a), *_settings(node))
    return [editor.call(node, ops.conv2d.op, args, node)]


def _conv_backward(editor: Editor, node: fx.Node) -> _Results | None:
    a = arguments(node)
    g, x, w, mask = a["grad_output"], a["input"], a["weight"], a["output_mask"]
    if a["transposed"] or value(x).dim() != 4:
        return None
    rest = (*_geometry(a), *_settings(g))
    made: list[fx.Node | None] = [None, None, None]
    if mask[0]:
        args = (w, g, _sizes(editor, node, x), _channels_last(x, w), *rest)
        made[0] = editor.call(node, ops.conv2d_dgrad.op, args, _like(node, 0))
    if mask[1]:
        args = (x, g, _sizes(editor, node, w), _channels_last(w), *rest)
        made[1] = editor.call(node, ops.conv2d_wgrad.op, args, _like(node, 1))
    if mask[2]:
        made[2] = editor.call(node, ops.conv2d_bgrad.op, (g, *_settings(g)), _like(node, 2))
    return made


def _sizes(editor: Editor, before: fx.Node, node: fx.Node) -> list[Any]:
    """A shape as an argument: numbers, or nodes where it is symbolic."""
    sizes: list[Any] = []
    for dim, n in enumerate(value(node).shape):
        if isinstance(n, int):
            sizes.append(n)
            continue
        with editor.graph.inserting_before(before):
            size = editor.graph.call_function(aten.sym_size.int, (node, dim))
        size.meta["val"] = n
        sizes.append(size)
    return sizes


def _pool_geometry(a: dict[str, Any], *names: str) -> list[list[int]]:
    kernel = pair("pool2d", "kernel_size", a["kernel_size"])
    stride = pair("pool2d", "stride", a["stride"]) if a["stride"] else kernel
    return [list(kernel), list(stride), *(list(pair("pool2d", name, a[name])) for name in names)]


def _max_pool(editor: Editor, node: fx.Node) -> _Results:
    a = arguments(node)
    args = (a["self"], *_pool_geometry(a, "padding", "dilation"), a["ceil_mode"], *_settings(a["self"])[1:])
    both = editor.call(node, ops.max_pool2d_indices.op, args, node)
    return _getters(editor, node, both, 2)


def _getters(editor: Editor, node: fx.Node, several: fx.Node, count: int) -> list[fx.Node]:
    """The results of an operator that has several."""
    return [editor.call(node, operator.getitem, (several, i), _like(node, i)) for i in range(count)]


def _max_pool_backward(editor: Editor, node: fx.Node) -> _Results:
    a = arguments(node)
    x = a["self"]
    args = (x, a["grad_output"], None, *_pool_geometry(a, "padding", "dilation"), a["ceil_mode"], *_settings(x)[1:])
    return [editor.call(node, ops.max_pool2d_dgrad.op, args, node)]


def _avg_pool(editor: Editor, node: fx.Node) -> _Results:
    a = arguments(node)
    rest = (a["ceil_mode"], a["count_include_pad"], a["divisor_override"], *_settings(node)[1:])
    return [editor.call(node, ops.avg_pool2d.op, (a["self"], *_pool_geometry(a, "padding"), *rest), node)]


def _avg_pool_backward(editor: Editor, node: fx.Node) -> _Results:
    a = arguments(node)
    x = a["self"]
    size = (_sizes(editor, node, x), _channels_last(x))
    rest = (a["ceil_mode"], a["count_include_pad"], a["divisor_override"], *_settings(node)[1:])
    args = (a["grad_output"], *size, *_pool_geometry(a, "padding"), *rest)
    return [editor.call(node, ops.avg_pool2d_dgrad.op, args, node)]


def _adaptive(editor: Editor, node: fx.Node) -> _Results:
    a = arguments(node)
    args = (a["self"], list(a["output_size"]), *_settings(node)[1:])
    return [editor.call(node, ops.adaptive_avg_pool2d.op, args, node)]


def _adaptive_backward(editor: Editor, node: fx.Node) -> _Results:
    a = arguments(node)
    g, x = a["grad_output"], a["self"]
    args = (g, _sizes(editor, node, x), _channels_last(x), _sizes(editor, node, g)[2:], *_settings(node)[1:])
    return [editor.call(node, ops.adaptive_avg_pool2d_dgrad.op, args, node)]


def _batch_norm(editor: Editor, node: fx.Node) -> _Results | None:
    """In training: statistics, the result, and the running averages as new tensors."""
    a = arguments(node)
    x, mean, var, momentum = a["input"], a["running_mean"], a["running_var"], a["momentum"]
    if not a["training"] or not _vectors_fit(x, [a["weight"], a["bias"], mean, var]):
        return None
    settings = _settings(x)[1:]
    m, v, s = _three(
        editor, node, editor.call(node, ops.batch_norm_stats.op, (x, a["eps"], *settings), node), (1, 2, 4)
    )
    args = (x, a["weight"], a["bias"], m, v, None, "none", True, a["eps"], *settings)
    y = editor.call(node, ops.batch_norm.op, args, _like(node, 0))

    def averaged(running: fx.Node, new: fx.Node, index: int) -> fx.Node:
        return editor.call(node, aten.lerp.Scalar, (running, new, momentum), _like(node, index))

    return [y, m, v, averaged(mean, m, 3), averaged(var, s, 4)]


def _three(editor: Editor, node: fx.Node, several: fx.Node, like: tuple[int, int, int]) -> list[fx.Node]:
    return [editor.call(node, operator.getitem, (several, i), _like(node, j)) for i, j in enumerate(like)]


def _vectors_fit(x: fx.Node, vectors: Sequence[Any]) -> bool:
    """Vectors in the accumulator's dtype; running statistics there."""
    wide = dispatch.ACCUMULATORS.get(value(x).dtype, torch.float32)
    return all(v is not None for v in vectors[2:]) and all(v is None or value(v).dtype == wide for v in vectors)


def _batch_norm_backward(editor: Editor, node: fx.Node) -> _Results | None:
    a = arguments(node)
    g, x, w = a["grad_out"], a["input"], a["weight"]
    m, v = (a["save_mean"], a["save_invstd"]) if a["train"] else (a["running_mean"], a["running_var"])
    if m is None or v is None or not _vectors_fit(x, [w, None, m, v]):
        return None
    args = (x, w, None, m, v, None, g, "none", a["train"], a["eps"], *_settings(x)[1:])
    dw, db, dx = _three(editor, node, editor.call(node, ops.batch_norm_backward.op, args, node), (1, 2, 0))
    return [dx, dw, db]


_RULES: dict[Any, Callable[[Editor, fx.Node], _Results | None]] = {
    aten.convolution.default: _conv,
    aten.convolution_backward.default: _conv_backward,
    aten.max_pool2d_with_indices.default: _max_pool,
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
    aten.avg_pool2d.default: _avg_pool,
    aten.avg_pool2d_backward.default: _avg_pool_backward,
    aten._adaptive_avg_pool2d.default: _adaptive,
    aten._adaptive_avg_pool2d_backward.default: _adaptive_backward,
    aten._native_batch_norm_legit_functional.default: _batch_norm,
    aten.native_batch_norm_backward.default: _batch_norm_backward,
}
