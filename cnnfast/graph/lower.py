"""ATen's operators as ours: one function for each kind, and a table of which serves what.

A lowered graph computes what the captured one does, node by node; :mod:`cnnfast.graph.passes` then merges nodes. A
function returns the node that takes the place of the one it was given, or the reason why there is none: then ATen's
operator stays, and that reason is reported.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from cnnfast import dispatch
from cnnfast.functional._arguments import pair, resolve_precision
from cnnfast.graph._nodes import (
    ADAPTIVE_AVG_POOL,
    ADAPTIVE_MAX_POOL,
    ADD,
    AVG_POOL,
    BATCH_NORM,
    CONV,
    MAX_POOL,
    RESHAPE,
    SLICE,
    Editor,
    arguments,
    is_constant,
    is_tensor,
    shape,
)
from cnnfast.graph.capture import value
from cnnfast.graph.constants import Constants
from cnnfast.ops import conv2d as conv2d_operator
from cnnfast.ops.batch_norm import problem as batch_norm_problem

Lowered = fx.Node | str  # what takes a node's place, or why nothing does

aten = torch.ops.aten


def lower(graph: fx.Graph, constants: Constants) -> dict[fx.Node, str]:
    """Lowers a graph in place; returns the nodes that stay ATen's, each with the reason."""
    editor = Editor(graph, constants)
    erase_unused(graph)  # the indices of poolings that nobody reads
    fold_constants(editor)
    reasons: dict[fx.Node, str] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not node.users:
            continue
        rule = RULES.get(node.target)
        if rule is None:
            continue
        try:
            made = rule(editor, node)
        except _Unserved as unserved:
            made = str(unserved)
        if isinstance(made, str):
            reasons[node] = made
        elif made is not node:
            editor.replace(node, made)
    erase_unused(graph)
    return {node: reason for node, reason in reasons.items() if node in set(graph.nodes)}


def erase_unused(graph: fx.Graph) -> None:
    """Removes what nobody reads. Operators of a functional graph have no other effect."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)


def fold_constants(editor: Editor) -> None:
    """Computes what depends on constants alone: casts, standardised and reparametrised weights, scales."""
    for node in list(editor.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        inputs = node.all_input_nodes
        if not inputs or not all(n.op == "get_attr" for n in inputs) or not is_tensor(node):
            continue
        if torch.Tag.nondeterministic_seeded in node.target.tags or node.target._schema.is_mutable:
            continue
        key = f"{node.target}({fx.map_arg((node.args, node.kwargs), editor.key)})"
        editor.replace(node, editor.constant(node, key, inputs, _calling(node)))


def _calling(node: fx.Node) -> Callable[..., Any]:
    """A node's operator as a function of the tensors of its inputs, which holds no node: that would keep the whole graph."""
    target: Any = node.target
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    inputs = node.all_input_nodes
    places = {i: inputs.index(leaf) for i, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)}
    plain = [None if i in places else leaf for i, leaf in enumerate(leaves)]

    def call(*tensors: torch.Tensor) -> Any:
        given = [tensors[places[i]] if i in places else leaf for i, leaf in enumerate(plain)]
        args, kwargs = pytree.tree_unflatten(given, spec)
        return target(*args, **kwargs)

    return call


class _Unserved(Exception):
    """Why a node can't be lowered."""


def _require(holds: Any, reason: str) -> None:
    if not holds:
        raise _Unserved(reason)


def _activation_tensor(node: Any, dims: Sequence[int] = (4,)) -> None:
    _require(is_tensor(node), "its input is no tensor")
    val = value(node)
    _require(val.dim() in dims, f"{val.dim()}-D input (ours: {' or '.join(map(str, dims))}-D)")
    _require(val.dtype in dispatch.DTYPES, f"dtype {val.dtype}")
    _require(val.device.type in ("cpu", "cuda"), f"device {val.device}")
    _require(all(n != 0 for n in val.shape), "an empty tensor")


def _settings(node: fx.Node) -> tuple[str, str, bool]:
    return resolve_precision(value(node).device)


# ---- convolutions and fully connected layers --------------------------------------------------------------------------


def _conv(editor: Editor, node: fx.Node) -> Lowered:
    a = arguments(node)
    x, w, b = (a[long] if long in a else a[short] for long, short in (("input", "x"), ("weight", "w"), ("bias", "b")))
    _activation_tensor(x)
    _require(is_tensor(w, 4), "its weight isn't 4-D")
    _require(not a.get("transposed", False), "a transposed convolution")
    _require(value(w).dtype == value(x).dtype, "input and weight of different dtypes")
    stride, dilation = pair("conv2d", "stride", a["stride"]), pair("conv2d", "dilation", a["dilation"])
    padding = _padding(a["padding"], shape(w), dilation)
    x, padding = _padded(x, padding)
    if node.target is conv2d_operator.op:
        settings: Sequence[Any] = (a["precision"], a["backend"], a["strict"])
    else:
        settings = _settings(node)
    rest = (list(stride), list(padding), list(dilation), a["groups"], "none", *settings)
    return editor.call(node, CONV, (x, w, b, None, None, None, *rest), node)


def _padding(given: Any, w: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """(top, bottom, left, right)."""
    if given == "valid":
        return (0, 0, 0, 0)
    if given == "same":
        totals = [d * (n - 1) for d, n in zip(dilation, w[2:], strict=True)]
        return tuple(part for total in totals for part in (total // 2, total - total // 2))
    if len(given) == 4:
        return tuple(given)
    h, width = pair("conv2d", "padding", given)
    return (h, h, width, width)


def _padded(x: fx.Node, padding: tuple[int, ...]) -> tuple[fx.Node, tuple[int, ...]]:
    """A convolution's input without the zeros that an operator of its own has put around it."""
    if x.op != "call_function" or x.target not in (aten.constant_pad_nd.default, aten.pad.default):
        return x, padding
    a = arguments(x)
    pad, inner = list(a["pad"]), a["self"]
    zeros = a.get("mode", "constant") == "constant" and not a["value"]
    if not zeros or len(pad) > 4 or any(not isinstance(n, int) or n < 0 for n in pad) or not is_tensor(inner, 4):
        return x, padding
    pad += [0] * (4 - len(pad))
    left, right, top, bottom = pad
    return inner, (padding[0] + top, padding[1] + bottom, padding[2] + left, padding[3] + right)


def _linear(editor: Editor, node: fx.Node) -> Lowered:
    a = arguments(node)
    return _fully_connected(editor, node, a["input"], a["weight"], a["bias"])


def _addmm(editor: Editor, node: fx.Node) -> Lowered:
    a = arguments(node)
    _require(a.get("beta", 1) == 1 and a.get("alpha", 1) == 1, "a scaled product")
    x, w, b = a.get("mat1", a["self"]), a["mat2"], a["self"] if "mat1" in a else None
    _require(b is None or is_tensor(b, 1), "its addend is no vector")
    if is_constant(w):
        w = _transposed(editor, node, w)
    else:
        _require(w.target in (aten.t.default, aten.permute.default, aten.transpose.int), "no weight of a linear layer")
        w = w.args[0]
    return _fully_connected(editor, node, x, w, b)


def _transposed(editor: Editor, before: fx.Node, w: fx.Node) -> fx.Node:
    return editor.constant(before, f"transposed({editor.key(w)})", [w], torch.t)


def _fully_connected(editor: Editor, node: fx.Node, x: Any, w: Any, b: Any) -> Lowered:
    """As a 1x1 convolution of a 1x1 image."""
    _activation_tensor(x, (2,))
    _require(is_tensor(w, 2), "its weight isn't 2-D")
    _require(value(w).dtype == value(x).dtype, "input and weight of different dtypes")
    n, c = shape(x)
    k = shape(w)[0]
    x4, w4 = editor.reshape(node, x, (n, c, 1, 1)), editor.reshape(node, w, (k, c, 1, 1))
    rest = ([1, 1], [0, 0, 0, 0], [1, 1], 1, "none", *_settings(node))
    y = editor.call(node, CONV, (x4, w4, b, None, None, None, *rest), node, (n, k, 1, 1))
    return editor.reshape(node, y, (n, k))


# ---- normalisation, activations, sums ---------------------------------------------------------------------------------


def _batch_norm(editor: Editor, node: fx.Node) -> Lowered:
    a = arguments(node)
    x = a["input"]
    _activation_tensor(x, (2, 4))
    _require(not a.get("training", False), "batch norm in training")
    mean, var = a["running_mean"], a["running_var"]
    _require(mean is not None and var is not None, "batch norm without running statistics")
    getters = list(node.users) if not is_tensor(node) else []
    _require(all(g.args[1] == 0 for g in getters), "the statistics of a batch norm are read")
    wide = dispatch.ACCUMULATORS.get(value(x).dtype, torch.float32)
    vectors = [_vector(editor, node, v, wide) for v in (a["weight"], a["bias"], mean, var)]
    settings = _settings(x)[1:]
    like = node if is_tensor(node) else x
    x4 = _image(editor, node, x)
    made = editor.call(node, BATCH_NORM, (x4, *vectors, None, "none", False, a["eps"], *settings), like, shape(x4))
    made = editor.reshape(node, made, shape(x))
    for getter in getters:
        editor.replace(getter, made)
    return made


def _vector(editor: Editor, before: fx.Node, vector: Any, dtype: torch.dtype) -> Any:
    """A vector in the accumulator's dtype."""
    if vector is None or value(vector).dtype == dtype:
        return vector
    if is_constant(vector):
        return editor.constant(before, f"{dtype}({editor.key(vector)})", [vector], lambda t: t.to(dtype))
    made = editor.call(before, aten._to_copy.default, (vector,), vector)
    made.kwargs = {"dtype": dtype}
    made.meta["val"] = value(vector).to(dtype)
    return made


def _image(editor: Editor, before: fx.Node, x: fx.Node) -> fx.Node:
    """A matrix (N, C) as (N, C, 1, 1); an image as it is."""
    return x if is_tensor(x, 4) else editor.reshape(before, x, (*shape(x), 1, 1))


def _activation(name: str) -> Callable[[Editor, fx.Node], Lowered]:
    def rule(editor: Editor, node: fx.Node) -> Lowered:
        x: Any = node.args[0]
        _activation_tensor(x, (2, 4))
        _require(value(node).dtype == value(x).dtype, "it changes the dtype")
        return _activated(editor, node, x, name)

    return rule


def _activated(editor: Editor, node: fx.Node, x: Any, name: str) -> fx.Node:
    x4 = _image(editor, node, x)
    _, backend, strict = _settings(x)
    problem = batch_norm_problem("fprop", shape(x4), value(x).dtype, value(x).device, (name, False, 0.0))
    _require(dispatch.serves(problem, backend), f"no kernel of ours that may serve has {name}")
    rest = (None, None, None, None, None, name, False, 0.0, backend, strict)
    return editor.reshape(node, editor.call(node, BATCH_NORM, (x4, *rest), node, shape(x4)), shape(x))


def _clamp(editor: Editor, node: fx.Node) -> Lowered:
    a = arguments(node)
    low, high = a.get("min_val", a.get("min")), a.get("max_val", a.get("max"))
    _activation_tensor(node.args[0], (2, 4))
    _require(low == 0 and high in (6, None), f"clamps to {low}, {high}")
    return _activated(editor, node, node.args[0], "relu" if high is None else "relu6")


def _leaky_relu(editor: Editor, node: fx.Node) -> Lowered:
    slope = arguments(node)["negative_slope"]
    _activation_tensor(node.args[0], (2, 4))
    _require(slope == 0.01, f"leaky ReLU of slope {slope} (ours: 0.01)")
    return _activated(editor, node, node.args[0], "leaky_relu")


def _add(editor: Editor, node: fx.Node) -> Lowered:
    a = arguments(node)
    x, r = a["self"], a["other"]
    _require(is_tensor(x), "its first term is no tensor")
    _activation_tensor(x, (2, 4))
    _require(a.get("alpha", 1) == 1, "a scaled addend")
    if _is_factor(r, x):
        return _affine(editor, node, x, b=r)
    _require(shape(x) == shape(r) and value(x).dtype == value(r).dtype, "addends of different shapes or dtypes")
    left, right = _image(editor, node, x), _image(editor, node, r)
    made = editor.call(node, ADD, (left, right, "none", *_settings(x)[1:]), node, shape(left))
    return editor.reshape(node, made, shape(x))


def _subtract(editor: Editor, node: fx.Node) -> Lowered:
    a = arguments(node)
    x, r = a["self"], a["other"]
    _activation_tensor(x, (2, 4))
    _require(a.get("alpha", 1) == 1 and isinstance(r, (int, float)), "a difference of tensors")
    return _affine(editor, node, x, b=-r)


def _multiply(editor: Editor, node: fx.Node) -> Lowered:
    a = arguments(node)
    for x, factor in ((a["self"], a["other"]), (a["other"], a["self"])):
        if is_tensor(x) and _is_factor(factor, x):
            _activation_tensor(x, (2, 4))
            return _affine(editor, node, x, w=factor)
    return node  # of two images; a plan can hold some


def _divide(editor: Editor, node: fx.Node) -> Lowered:
    a = arguments(node)
    _activation_tensor(a["self"], (2, 4))
    _require(isinstance(a["other"], (int, float)) and a["other"] != 0, "a quotient of tensors")
    return _affine(editor, node, a["self"], w=1 / a["other"])


def _is_factor(given: Any, x: fx.Node) -> bool:
    """Whether it is a number, or a constant for each channel."""
    if isinstance(given, (int, float)):
        return True
    if not is_tensor(given) or not is_constant(given) or not is_tensor(x, 4):
        return False
    own, c = shape(given), shape(x)[1]
    return len(own) in (3, 4) and own[-2:] == (1, 1) and own[-3] in (1, c) and (len(own) == 3 or own[0] == 1)


def _affine(editor: Editor, node: fx.Node, x: fx.Node, w: Any = None, b: Any = None) -> fx.Node:
    """w * x + b for each channel: batch norm without statistics."""
    _require(value(node).dtype == value(x).dtype and shape(node) == shape(x), "it changes dtype or shape")
    x4, wide = _image(editor, node, x), dispatch.ACCUMULATORS.get(value(x).dtype, torch.float32)
    c, device = shape(x4)[1], value(x).device

    def vector(given: Any) -> fx.Node | None:
        if given is None:
            return None
        if isinstance(given, (int, float)):
            key = f"{given} x {c} {wide} {device}"
            return editor.constant(node, key, [], lambda: torch.full((c,), given, dtype=wide, device=device))
        key = f"vector({editor.key(given)}, {c}, {wide})"
        return editor.constant(node, key, [given], lambda t: t.to(wide).flatten().expand(c).clone())

    rest = (vector(w), vector(b), None, None, None, "none", False, 0.0, *_settings(x)[1:])
    return editor.reshape(node, editor.call(node, BATCH_NORM, (x4, *rest), node, shape(x4)), shape(x))


# ---- poolings ---------------------------------------------------------------------------------------------------------


def _max_pool(editor: Editor, node: fx.Node) -> Lowered:
    a = arguments(node)
    _activation_tensor(a["self"])
    getters = [] if is_tensor(node) else list(node.users)
    _require(all(g.args[1] == 0 for g in getters), "the indices of a max pooling are read")
    kernel, padding, dilation = (pair("max_pool2d", k, a[k]) for k in ("kernel_size", "padding", "dilation"))
    stride = pair("max_pool2d", "stride", a["stride"]) if a["stride"] else kernel
    args = (a["self"], kernel, stride, padding, dilation, a["ceil_mode"], *_settings(a["self"])[1:])
    made = editor.call(node, MAX_POOL, args, getters[0] if getters else node)
    for getter in getters:
        editor.replace(getter, made)
    return made


def _avg_pool(editor: Editor, node: fx.Node) -> Lowered:
    a = arguments(node)
    _activation_tensor(a["self"])
    kernel, padding = (pair("avg_pool2d", k, a[k]) for k in ("kernel_size", "padding"))
    stride = pair("avg_pool2d", "stride", a["stride"]) if a["stride"] else kernel
    rest = (a["ceil_mode"], a["count_include_pad"], a["divisor_override"], *_settings(node)[1:])
    return editor.call(node, AVG_POOL, (a["self"], kernel, stride, padding, *rest), node)


def _adaptive_avg_pool(editor: Editor, node: fx.Node) -> Lowered:
    a = arguments(node)
    _activation_tensor(a["self"])
    if tuple(a["output_size"]) == shape(a["self"])[2:]:
        return a["self"]
    return editor.call(node, ADAPTIVE_AVG_POOL, (a["self"], list(a["output_size"]), *_settings(node)[1:]), node)


def _adaptive_max_pool(editor: Editor, node: fx.Node) -> Lowered:
    a = arguments(node)
    _activation_tensor(a["self"])
    getters = list(node.users)
    _require(all(g.args[1] == 0 for g in getters), "the indices of a max pooling are read")
    args = (a["self"], list(a["output_size"]), *_settings(a["self"])[1:])
    made = editor.call(node, ADAPTIVE_MAX_POOL, args, getters[0])
    for getter in getters:
        editor.replace(getter, made)
    return made


def _mean(editor: Editor, node: fx.Node) -> Lowered:
    a = arguments(node)
    x = a["self"]
    _activation_tensor(x)
    dims = sorted(d % 4 for d in (a["dim"] or ()))
    _require(dims == [2, 3] and a["dtype"] is None, "a mean over other dimensions than the image's")
    n, c = shape(x)[:2]
    made = editor.call(node, ADAPTIVE_AVG_POOL, (x, [1, 1], *_settings(x)[1:]), node, (n, c, 1, 1))
    return editor.reshape(node, made, shape(node))


# ---- what moves no data -----------------------------------------------------------------------------------------------


def _identity(editor: Editor, node: fx.Node) -> Lowered:
    """Nothing at all, where neither shape nor dtype changes: layouts are the plan's business."""
    x = node.args[0]
    _require(is_tensor(x) and is_tensor(node), "no tensor")
    same = value(x).dtype == value(node).dtype and value(x).device == value(node).device and shape(x) == shape(node)  # type: ignore[arg-type]
    _require(same, f"{value(x).dtype} to {value(node).dtype}")  # type: ignore[arg-type]
    return x  # type: ignore[return-value]


def _dropout(editor: Editor, node: fx.Node) -> Lowered:
    a = arguments(node)
    _require(not a["train"], "dropout in training")
    return a["input"]


def _reshape(editor: Editor, node: fx.Node) -> Lowered:
    _require(is_tensor(node.args[0]), "no tensor")
    x, sizes = node.args[0], shape(node)
    while isinstance(x, fx.Node) and x.target is RESHAPE:
        x = x.args[0]
    if shape(x) == sizes:  # type: ignore[arg-type]
        return x  # type: ignore[return-value]
    return editor.call(node, RESHAPE, (x, list(sizes)), node)


def _split(editor: Editor, node: fx.Node) -> Lowered:
    """Slices, each of which is a view."""
    a = arguments(node)
    x, dim = a["self"], a["dim"]
    _require(is_tensor(x), "no tensor")
    getters = list(node.users)
    _require(all(g.target is operator.getitem for g in getters), "what it returns is read as a whole")
    dim %= value(x).dim()
    starts = [0, *itertools.accumulate(piece.shape[dim] for piece in node.meta["val"])]
    made = []
    for getter in getters:
        i: Any = getter.args[1]
        made.append(editor.call(node, SLICE, (x, dim, starts[i], starts[i + 1], 1), getter))
    for getter, piece in zip(getters, made, strict=True):
        editor.replace(getter, piece)
    return made[0]


def _ours(editor: Editor, node: fx.Node) -> Lowered:
    """An operator of ours, of a converted model: what it records of training doesn't matter here."""
    a = arguments(node)
    _require(not a.get("training", False), "batch norm in training")
    return node


def _names(*names: str) -> list[Any]:
    """The operators of ATen that this torch has of these: "conv2d", or one overload of it, "conv2d.padding"."""
    found = []
    for name in names:
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(aten, packet, None), overload or "default", None)
        if operator is not None:
            found.append(operator)
    return found


RULES: dict[Any, Callable[[Editor, fx.Node], Lowered]] = {
    **dict.fromkeys([*_names("conv2d", "conv2d.padding", "convolution"), conv2d_operator.op], _conv),
    **dict.fromkeys(_names("linear"), _linear),
    **dict.fromkeys(_names("addmm", "mm"), _addmm),
    **dict.fromkeys(
        _names("batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "native_batch_norm",
               "cudnn_batch_norm"),
        _batch_norm,
    ),
    **dict.fromkeys(_names("relu"), _activation("relu")),
    **dict.fromkeys(_names("relu6"), _activation("relu6")),
    **dict.fromkeys(_names("silu"), _activation("silu")),
    **dict.fromkeys(_names("hardswish"), _activation("hardswish")),
    **dict.fromkeys(_names("sigmoid"), _activation("sigmoid")),
    **dict.fromkeys(_names("hardsigmoid"), _activation("hardsigmoid")),
    **dict.fromkeys(_names("hardtanh", "clamp", "clamp_min"), _clamp),
    **dict.fromkeys(_names("leaky_relu"), _leaky_relu),
    **dict.fromkeys(_names("add.Tensor", "add.Scalar"), _add),
    **dict.fromkeys(_names("sub.Tensor", "sub.Scalar"), _subtract),
    **dict.fromkeys(_names("mul.Tensor", "mul.Scalar"), _multiply),
    **dict.fromkeys(_names("div.Tensor", "div.Scalar"), _divide),
    **dict.fromkeys(_names("max_pool2d", "max_pool2d_with_indices"), _max_pool),
    **dict.fromkeys(_names("avg_pool2d"), _avg_pool),
    **dict.fromkeys(_names("adaptive_avg_pool2d", "_adaptive_avg_pool2d"), _adaptive_avg_pool),
    **dict.fromkeys(_names("adaptive_max_pool2d"), _adaptive_max_pool),
    **dict.fromkeys(_names("mean.dim"), _mean),
    **dict.fromkeys(
        _names("alias", "detach", "clone", "contiguous", "_to_copy", "to.dtype", "to.dtype_layout", "to.device", "to.other",
               "lift_fresh_copy", "expand", "type_as"),
        _identity,
    ),
    **dict.fromkeys(_names("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"), _dropout),
    **dict.fromkeys(
        _names("view", "_unsafe_view", "reshape", "flatten.using_ints", "squeeze", "squeeze.dim", "squeeze.dims",
               "unsqueeze", "unflatten.int"),
        _reshape,
    ),
    **dict.fromkeys(_names("split.Tensor", "split.sizes", "split_with_sizes", "unsafe_split.Tensor", "chunk"), _split),
    **dict.fromkeys([CONV, BATCH_NORM, ADD, MAX_POOL, AVG_POOL, ADAPTIVE_AVG_POOL, ADAPTIVE_MAX_POOL], _ours),
}  # fmt: skip
