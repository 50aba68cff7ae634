"""Merging the nodes of a lowered graph: what follows a convolution goes into it, and convolutions beside each other.

Each pass is a function that edits the graph in place and keeps its meaning. A node is merged into its producer only
where nobody else reads the producer; shared and reused layers are nodes of their own, so that each use is judged alone.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from cnnfast.graph._nodes import (
    ADD,
    BATCH_NORM,
    CAT,
    CONV,
    MUL,
    RESHAPE,
    SHUFFLE,
    SLICE,
    Editor,
    affine_maps,
    arguments,
    is_constant,
    is_tensor,
    replaced,
    shape,
)
from cnnfast.graph.capture import value
from cnnfast.graph.constants import Constants
from cnnfast.graph.lower import erase_unused

_WIDENED = 1 << 18  # elements of a weight that are folded at a time
_WIDE = (torch.float32, torch.float64)  # weights of these dtypes take a scale without losing anything that counts


def optimise(graph: fx.Graph, constants: Constants) -> None:
    """Every pass, in the order in which one prepares for the next."""
    editor = Editor(graph, constants)
    merge_shuffles(editor)
    simplify_reshapes(editor)
    merge_silu(editor)
    fold_batch_norms(editor)
    merge_epilogues(editor)
    merge_siblings(editor)
    merge_affine_maps(editor)
    erase_unused(graph)
    graph.lint()


def _calls(editor: Editor, target: Any) -> list[fx.Node]:
    return [n for n in editor.graph.nodes if n.op == "call_function" and n.target is target]


def _only_reader(node: fx.Node) -> fx.Node | None:
    """The one node that reads another, once."""
    readers = list(node.users)
    if len(readers) != 1 or sum(n is node for n in readers[0].all_input_nodes) != 1:
        return None
    return readers[0] if readers[0].op == "call_function" else None


def simplify_reshapes(editor: Editor) -> None:
    """A reshape of a reshape is one; one that changes nothing is none: matrices and 1x1 images meet without either."""
    for node in _calls(editor, RESHAPE):
        source = node.args[0]
        while isinstance(source, fx.Node) and source.op == "call_function" and source.target is RESHAPE:
            source = source.args[0]
        assert isinstance(source, fx.Node)
        if shape(source) == shape(node):
            editor.replace(node, source)
        elif source is not node.args[0]:
            node.args = (source, *node.args[1:])
    erase_unused(editor.graph)


def merge_shuffles(editor: Editor) -> None:
    """Channels as groups, groups and their members exchanged, and flat again: one operator, as that which has the name."""
    for node in _calls(editor, RESHAPE):
        swapped: Any = node.args[0]
        if swapped.target not in (torch.ops.aten.transpose.int, torch.ops.aten.swapaxes.default):
            continue
        grouped: Any = swapped.args[0]
        if grouped.target is not RESHAPE or not is_tensor(grouped, 5) or {d % 5 for d in swapped.args[1:3]} != {1, 2}:
            continue
        (n, groups, members, h, w), source = shape(grouped), grouped.args[0]
        if shape(source) == shape(node) == (n, groups * members, h, w):
            editor.replace(node, editor.call(node, SHUFFLE, (source, groups), node))
    erase_unused(editor.graph)


def merge_silu(editor: Editor) -> None:
    """x * sigmoid(x), written out."""
    for node in _calls(editor, MUL):
        for x, gate in (node.args[:2], node.args[1::-1]):
            if not is_tensor(gate, 4) or not is_tensor(x, 4) or gate.target is not BATCH_NORM:  # type: ignore[union-attr]
                continue
            a = arguments(gate)  # type: ignore[arg-type]
            plain = all(a[k] is None for k in ("w", "b", "m", "v", "r"))
            if a["activation"] == "sigmoid" and plain and a["x"] is x and _only_reader(gate) is node:  # type: ignore[arg-type]
                replaced(gate, activation="silu")  # type: ignore[arg-type]
                editor.replace(node, gate)  # type: ignore[arg-type]
                break


def fold_batch_norms(editor: Editor) -> None:
    """Batch norm into the weights of the convolution before it, or, where they aren't constants, beside its sums."""
    for norm in _calls(editor, BATCH_NORM):
        a = arguments(norm)
        conv = a["x"]
        vectors = [a[k] for k in ("w", "b", "m", "v")]
        if all(v is None for v in vectors) or _only_reader(conv) is not norm:
            continue
        if conv.target is BATCH_NORM:
            _join_norms(editor, conv, norm, vectors, a["eps"])
            continue
        if not _bare(conv):
            continue
        c = arguments(conv)
        frozen = all(is_constant(t) for t in (c["w"], c["b"], *vectors))
        if frozen and value(conv).dtype in _WIDE:
            w, b = _folded(editor, conv, c["w"], c["b"], vectors, a["eps"])
            replaced(conv, w=w, b=b)
        else:
            scale, shift = _scale_and_shift(editor, norm, vectors, a["eps"])
            _move(conv, norm)
            replaced(conv, scale=scale, shift=shift)
        if a["r"] is None and a["activation"] == "none":
            editor.replace(norm, conv)
        else:  # of a converted model: what is left of it is a sum and an activation
            replaced(norm, w=None, b=None, m=None, v=None, eps=0.0)


def _join_norms(editor: Editor, first: fx.Node, norm: fx.Node, vectors: list[Any], eps: float) -> None:
    """Two maps of constants as one."""
    f = arguments(first)
    before = [f[k] for k in ("w", "b", "m", "v")]
    constant = all(is_constant(v) for v in (*before, *vectors)) and any(v is not None for v in before)
    if not constant or f["r"] is not None or f["activation"] != "none":
        return

    def joined(i: int, *tensors: torch.Tensor | None) -> torch.Tensor:
        dtype = next(t.dtype for t in tensors if t is not None)
        s, t = _affine_map(tensors[:4], f["eps"], torch.float64)
        u, v = _affine_map(tensors[4:], eps, torch.float64)
        return (s * u if i == 0 else t * u + v).to(dtype)

    inputs = [*before, *vectors]
    key = f"{', '.join(editor.key(t) for t in inputs)}, {f['eps']}, {eps}"
    w, b = (editor.constant(norm, f"joined{i}({key})", inputs, functools.partial(joined, i)) for i in range(2))
    replaced(norm, x=f["x"], w=w, b=b, m=None, v=None, eps=0.0)


def _bare(node: Any) -> bool:
    """Whether a node is a convolution to whose sums nothing has been done."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.target is not CONV:
        return False
    a = arguments(node)
    return a["activation"] == "none" and all(a[k] is None for k in ("scale", "shift", "r"))


def _folded(
    editor: Editor, conv: fx.Node, w: fx.Node, b: fx.Node | None, vectors: list[Any], eps: float
) -> tuple[fx.Node, fx.Node]:
    """The weight and bias of a convolution followed by batch norm, computed in double."""

    def scaled(weight: torch.Tensor, *vectors: torch.Tensor | None) -> torch.Tensor:
        factor, _ = _affine_map(vectors, eps, torch.float64)
        out = torch.empty_like(weight)
        rows = max(1, _WIDENED // max(1, weight[0].numel()))  # in slices: the widened weight would be twice as large
        for i in range(0, len(weight), rows):
            part = slice(i, i + rows)
            out[part] = weight[part].double() * factor[part].reshape(-1, 1, 1, 1)
        return out

    def moved(bias: torch.Tensor | None, *vectors: torch.Tensor | None) -> torch.Tensor:
        scale, shift = _affine_map(vectors, eps, torch.float64)
        return (shift if bias is None else bias.double() * scale + shift).to(dtype)

    dtype = value(w).dtype
    key = f"{editor.key(w)}, {editor.key(b)}, {', '.join(editor.key(v) for v in vectors)}, {eps}"
    return (
        editor.constant(conv, f"scaled({key})", [w, *vectors], scaled),
        editor.constant(conv, f"shifted({key})", [b, *vectors], moved),
    )


def _affine_map(
    vectors: Sequence[torch.Tensor | None], eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Batch norm of constant parameters as scale * x + shift."""
    like = next(v for v in vectors if v is not None)
    gamma, beta, mean, var = (None if v is None else v.to(dtype) for v in vectors)
    scale = torch.ones_like(like, dtype=dtype) if var is None else (var + eps).rsqrt()
    scale = scale if gamma is None else scale * gamma
    shift = torch.zeros_like(scale) if mean is None else -mean * scale
    return scale, shift if beta is None else shift + beta


def _scale_and_shift(editor: Editor, norm: fx.Node, vectors: list[Any], eps: float) -> tuple[fx.Node, fx.Node]:
    """Batch norm as a factor and an addend for each channel: constants if its parameters are, else computed at each call."""
    gamma, beta, mean, var = vectors
    if all(is_constant(v) for v in vectors):
        dtype = value(next(v for v in vectors if v is not None)).dtype
        key = f"{', '.join(editor.key(t) for t in vectors)}, {eps}"
        return (
            editor.constant(norm, f"factor({key})", vectors, lambda *t: _affine_map(t, eps, dtype)[0]),
            editor.constant(norm, f"addend({key})", vectors, lambda *t: _affine_map(t, eps, dtype)[1]),
        )
    if gamma is None or beta is None:
        return _written_out(editor, norm, vectors, eps)
    count = shape(var)[0]
    flat = editor.call(norm, affine_maps, ([gamma], [beta], [mean], [var], eps), var, (2 * count,))
    return tuple(editor.call(norm, SLICE, (flat, 0, i * count, (i + 1) * count, 1), var) for i in range(2))  # type: ignore[return-value]


def _written_out(editor: Editor, norm: fx.Node, vectors: list[Any], eps: float) -> tuple[fx.Node, fx.Node]:
    """The factor and the addend where either of gamma and beta is absent."""
    gamma, beta, mean, var = vectors
    aten = torch.ops.aten
    scale = editor.call(norm, aten.rsqrt.default, (editor.call(norm, aten.add.Scalar, (var, eps), var),), var)
    if gamma is not None:
        scale = editor.call(norm, aten.mul.Tensor, (scale, gamma), var)
    if beta is None:
        shift = editor.call(norm, aten.neg.default, (editor.call(norm, aten.mul.Tensor, (mean, scale), var),), var)
    else:
        shift = editor.call(norm, aten.addcmul.default, (beta, mean, scale), var)
        shift.kwargs = {"value": -1}
    return scale, shift


def merge_affine_maps(editor: Editor) -> None:
    """The factors and addends of all batch norms whose parameters are inputs, in one call in front of everything."""
    groups: dict[Any, list[fx.Node]] = defaultdict(list)
    for node in _calls(editor, affine_maps):
        if all(n.op == "placeholder" for n in node.all_input_nodes):
            groups[node.args[4], value(node).dtype, value(node).device].append(node)
    first = next(n for n in editor.graph.nodes if n.op not in ("placeholder", "get_attr"))
    for (eps, *_), nodes in groups.items():
        if len(nodes) == 1:
            continue
        counts = [shape(node)[0] // 2 for node in nodes]
        every = [[node.args[i][0] for node in nodes] for i in range(4)]  # type: ignore[index]
        flat = editor.call(first, affine_maps, (*every, eps), nodes[0], (2 * sum(counts),))
        for node, count, start in zip(nodes, counts, itertools.accumulate(counts, initial=0), strict=False):
            for piece in list(node.users):  # the factors, the addends
                at = start if piece.args[2] == 0 else sum(counts) + start
                piece.args = (flat, 0, at, at + count, 1)


def _move(node: fx.Node, before: fx.Node) -> None:
    """Moves a node behind everything that now goes into it."""
    before.prepend(node)


def merge_epilogues(editor: Editor) -> None:
    """Sums and activations into the convolution, batch norm or sum before them."""
    for node in list(editor.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is ADD:
            _merge_sum(editor, node)
        elif node.target is BATCH_NORM:
            a = arguments(node)
            if all(a[k] is None for k in ("w", "b", "m", "v")):
                _merge_activation(editor, node, a)


def _merge_sum(editor: Editor, node: fx.Node) -> None:
    a = arguments(node)
    order = {n: i for i, n in enumerate(editor.graph.nodes)}
    for producer in sorted((a["x"], a["r"]), key=lambda n: -order[n]):
        if (
            producer.op != "call_function"
            or producer.target not in (CONV, BATCH_NORM)
            or _only_reader(producer) is not node
        ):
            continue
        p = arguments(producer)
        if p["activation"] != "none" or p["r"] is not None:
            continue
        other = a["r"] if producer is a["x"] else a["x"]
        _move(producer, node)
        replaced(producer, r=other, activation=a["activation"])
        editor.replace(node, producer)
        return


def _merge_activation(editor: Editor, node: fx.Node, a: dict[str, Any]) -> None:
    producer = a["x"]
    if (
        producer.op != "call_function"
        or producer.target not in (CONV, BATCH_NORM, ADD)
        or _only_reader(producer) is not node
    ):
        return
    p = arguments(producer)
    if p["activation"] != "none":
        return
    if a["r"] is not None:
        if producer.target is ADD or p["r"] is not None:
            return
        _move(producer, node)
        replaced(producer, r=a["r"])
    replaced(producer, activation=a["activation"])
    editor.replace(node, producer)


def merge_siblings(editor: Editor) -> None:
    """1x1 convolutions of one input as one, whose channels are theirs; those that write to a concatenation stay alone."""
    groups: dict[Any, list[fx.Node]] = defaultdict(list)
    for conv in _calls(editor, CONV):
        a = arguments(conv)
        constant = all(is_constant(a[k]) for k in ("w", "b", "scale", "shift"))
        if not constant or a["r"] is not None or a["groups"] != 1 or shape(a["w"])[2:] != (1, 1):
            continue
        if any(user.target is CAT for user in conv.users) or shape(conv)[2:] == (1, 1):
            continue
        same = ("stride", "padding", "dilation", "activation", "precision", "backend", "strict")
        present = tuple(a[k] is None for k in ("scale", "shift"))
        groups[a["x"], present, value(conv).dtype, str([a[k] for k in same])].append(conv)
    for convs in groups.values():
        if len(convs) > 1:
            _merge_group(editor, convs)


def _merge_group(editor: Editor, convs: list[fx.Node]) -> None:
    first, given = convs[0], [arguments(conv) for conv in convs]
    merged = {}
    for name in ("w", "b", "scale", "shift"):
        parts = [a[name] for a in given]
        if all(p is None for p in parts):
            continue
        sizes = [shape(conv)[1] for conv in convs]
        keys = "; ".join(f"{editor.key(p)} {n}" for p, n in zip(parts, sizes, strict=True))
        merged[name] = editor.constant(first, f"beside({name}: {keys})", parts, functools.partial(_beside, sizes))
    n, _, p, q = shape(first)
    channels = [shape(conv)[1] for conv in convs]
    wide = editor.call(first, CONV, tuple({**given[0], **merged}.values()), first, (n, sum(channels), p, q))
    starts = itertools.accumulate(channels, initial=0)
    pieces = [
        editor.call(first, SLICE, (wide, 1, start, start + count, 1), conv)
        for conv, count, start in zip(convs, channels, starts, strict=False)
    ]
    for conv, piece in zip(convs, pieces, strict=True):  # only now: the first is where the others are put
        editor.replace(conv, piece)


def _beside(sizes: Sequence[int], *tensors: torch.Tensor | None) -> torch.Tensor:
    """Tensors one behind the other, zeros for those that are absent."""
    like = next(t for t in tensors if t is not None)
    return torch.cat([like.new_zeros(n) if t is None else t for t, n in zip(tensors, sizes, strict=True)])
