"""What a network consists of, layer by layer: sizes by formula, parameters, FLOPs, receptive fields.

The network runs once on torch's meta device, which computes shapes and nothing else. A tensor carries the receptive field
of its elements with it: a layer with a window widens it, a sum or a concatenation takes the widest of its operands'.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import batchnorm, conv, pooling
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from cnnfast import _render, functional
from cnnfast.models import _registry


@dataclasses.dataclass(frozen=True)
class Field:
    """What one element of a map sees of the image, in pixels: the window, and the step to the next element's."""

    size: tuple[float, float] = (1, 1)
    step: tuple[float, float] = (1, 1)

    def through(self, window: Sequence[float], stride: Sequence[float]) -> Field:
        """Behind a layer with such a window: ``size + (window - 1) * step``, and the step times the stride."""
        return Field(
            (self.size[0] + (window[0] - 1) * self.step[0], self.size[1] + (window[1] - 1) * self.step[1]),
            (self.step[0] * stride[0], self.step[1] * stride[1]),
        )


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a network: a module with parameters, or one that changes the map's size."""

    name: str
    kind: str  # such as "conv 3x3 /2 pad 1"
    input: tuple[int, ...]  # shapes, with the batch
    output: tuple[int, ...]
    formula: str  # of the output's height and width; "" where there is nothing to compute
    parameters: int
    flops: int  # 2 for a multiply-add; convolutions and fully connected layers, as torch's FlopCounterMode counts
    receptive_field: tuple[int, int]  # height and width, in pixels of the image; more than the image: into the padding


class Description(Sequence[Layer]):
    """What :func:`describe` found: a sequence of :class:`Layer`; printable, and :meth:`to_json`."""

    def __init__(self, model: str, input: tuple[int, ...], layers: Sequence[Layer], parameters: int) -> None:
        self.model, self.input, self.parameters = model, input, parameters
        self._layers = tuple(layers)

    def __getitem__(self, index: Any) -> Any:
        return self._layers[index]

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def flops(self) -> int:
        """Of all layers, for the whole batch."""
        return sum(layer.flops for layer in self)

    @property
    def receptive_field(self) -> tuple[int, int]:
        """The widest among the layers with a window, before anything is taken over the whole map."""
        fields = [layer.receptive_field for layer in self if layer.kind.startswith(("conv", "max pool", "avg pool"))]
        return max(fields, key=lambda field: field[0] * field[1], default=(1, 1))

    def summary(self) -> str:
        """The whole in a sentence or two."""
        listed = sum(layer.parameters for layer in self)
        text = (
            f"{self.model} on {_shape(self.input)}: {len(self)} layers, {self.parameters:,} parameters "
            f"({self.parameters * 4 / 1e6:.1f} MB in fp32), {self.flops / 1e9:.2f} GFLOP, receptive field "
            f"{_shape(self.receptive_field)} before the last pooling."
        )
        if listed != self.parameters:
            text += f" {self.parameters - listed:,} parameters are in parts that run in training only."
        return text

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        yield self._wide() if options.max_width >= 140 else self._narrow(options.max_width)
        yield Text("\n" + self.summary())

    def _wide(self) -> Any:
        columns = [("layer", "left"), ("kind", "left"), (FORMULA, "left"), *_NUMBERS]
        return _render.table("", columns, [(_render.escape(x.name), x.kind, x.formula, *_numbers(x)) for x in self])

    def _narrow(self, width: int) -> Any:
        """Kind and formulas below the layer's name."""
        numbers = [_numbers(layer) for layer in self]
        room = max(16, width - sum(map(_render.width_of, _NUMBERS, zip(*numbers, strict=True))))

        def cell(layer: Layer) -> str:
            more = [text for text in (layer.kind, *layer.formula.split(", ")) if text]
            wrapped = [textwrap.fill(text, room, initial_indent="  ", subsequent_indent="      ") for text in more]
            return "\n".join([_render.escape(layer.name), *wrapped])

        rows = [(cell(layer), *cells) for layer, cells in zip(self, numbers, strict=True)]
        return _render.table("", [(f"layer: kind, {FORMULA}", "left"), *_NUMBERS], rows, narrow=True)

    def __str__(self) -> str:
        return _render.as_text(self)

    def __repr__(self) -> str:
        return f"<Description of {self.model}: {len(self)} layers, {self.parameters:,} parameters>"

    def to_dict(self) -> dict[str, Any]:
        """Everything as a dict for JSON."""
        return {
            "model": self.model, "input": self.input, "parameters": self.parameters, "flops": self.flops,
            "receptive_field": self.receptive_field, "layers": [dataclasses.asdict(layer) for layer in self],
        }  # fmt: skip

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything as JSON text, also written to ``path`` if one is given (OSError where that fails)."""
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text


FORMULA = "(N + 2·pad − F)/stride + 1"
_NUMBERS = (("output", "right"), ("parameters", "right"), ("MFLOP", "right"), ("receptive field", "right"))


def _numbers(layer: Layer) -> tuple[str, str, str, str]:
    return (
        _shape(layer.output), f"{layer.parameters:,}" if layer.parameters else "",
        f"{layer.flops / 1e6:,.1f}" if layer.flops else "", _shape(layer.receptive_field),
    )  # fmt: skip


def describe(
    model: str | torch.nn.Module, size: int | None = None, batch: int = 1, channels: int = 3, **options: Any
) -> Description:
    """The layers of a network as it classifies: output sizes, parameters, FLOPs and receptive fields.

    Args:
        model: One of ``cnnfast.models.list()``, or any module that takes images; it is neither run nor changed.
        size: Height and width of the images; None: what the network was published for, 224 for a module.
        batch, channels: Of the images, (batch, channels, size, size).
        options: The network's arguments, with a name only.

    Returns:
        A :class:`Description`: print it, iterate over its :class:`Layer` objects, or use ``to_json(path)``. Activations
        and dropout aren't listed; of layers that run several times each run is, the parameters once.

    Raises:
        ValueError: an unknown name; images that the network can't take.
        TypeError: ``model`` is neither a name nor a module; options beside a module.
    """
    if isinstance(model, str):
        entry = _registry.entry(model)
        size = size or entry.size
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            network = entry.build(**options)
        name = model
    elif isinstance(model, torch.nn.Module):
        if options:
            raise TypeError(f"describe: {', '.join(options)} go with a name, not with a module")
        network, name = _on_meta(model), type(model).__name__
    else:
        raise TypeError(f"describe: expected a name or a torch.nn.Module, got {type(model).__name__}")
    size = size or 224
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    x = torch.empty(batch, channels, size, size, dtype=dtype, device="meta")
    layers: list[Layer] = []
    handles = [
        module.register_forward_hook(_recorder(layers, path))
        for path, module in network.named_modules()
        if _is_layer(module)
    ]
    try:
        with torch.no_grad(), _Fields():
            network.eval()(x)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{name} on {_shape(x.shape)}: {str(error).splitlines()[0]}") from error
    finally:
        for handle in handles:
            handle.remove()
    total = sum(parameter.numel() for parameter in network.parameters())
    return Description(name, tuple(x.shape), layers, total)


def _on_meta(model: torch.nn.Module) -> torch.nn.Module:
    """A copy on the meta device; the original's values are not copied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = torch.nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, memo)


def receptive_fields(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, tuple[int, int]]:
    """By module, the receptive field of an element of its result, for a call with these arguments, which isn't made.

    Empty where the meta device can't run the model: it looks at values, say.
    """

    def meta(leaf: Any) -> Any:
        return leaf.detach().to("meta") if isinstance(leaf, Tensor) else leaf

    layers: list[Layer] = []
    try:
        network = _on_meta(model)
        for path, module in network.named_modules():
            if _is_layer(module):
                module.register_forward_hook(_recorder(layers, path))
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _Fields():
            network(*pytree.tree_map(meta, tuple(args)), **pytree.tree_map(meta, dict(kwargs)))
    except Exception:  # whatever another one's model may raise there
        return {}
    return {layer.name: layer.receptive_field for layer in layers}


# ---- fields ----------------------------------------------------------------------------------------------------------

_FIELD = "_cnnfast_field"


class _Fields(TorchFunctionMode):
    """Gives every result the widest field of its operands; a map that becomes a vector is seen as a whole.

    A convolution that is called as a function widens it; where a layer that is known calls it, that layer's hook comes last.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            operands = [a for arg in args for a in (arg if isinstance(arg, (list, tuple)) else (arg,))]
            seen = [_seen(a, out) for a in operands if isinstance(a, Tensor) and hasattr(a, _FIELD)]
            field = Field()
            if seen:
                sizes, steps = zip(*((field.size, field.step) for field in seen), strict=True)
                field = Field(_largest(sizes), _largest(steps))
            if func in _CONVOLUTIONS:
                field = _convolved(field, *args, **(kwargs or {}))
            if seen or func in _CONVOLUTIONS:
                setattr(out, _FIELD, field)
        return out


_CONVOLUTIONS = (torch.nn.functional.conv2d, functional.conv2d)  # conv2d's arguments in torch's order


def _convolved(field: Field, input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0,
               dilation: Any = 1, groups: int = 1) -> Field:  # fmt: skip
    extents = [d * (n - 1) + 1 for d, n in zip(_pair(dilation), weight.shape[2:], strict=True)]
    return field.through(extents, _pair(stride))


def _seen(operand: Tensor, out: Tensor) -> Field:
    field: Field = getattr(operand, _FIELD)
    vector = operand.dim() == 4 and out.dim() == 2
    return field.through(operand.shape[2:], (1, 1)) if vector else field


def _largest(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return max(h for h, _ in pairs), max(w for _, w in pairs)


# ---- layers ----------------------------------------------------------------------------------------------------------


def _is_layer(module: torch.nn.Module) -> bool:
    """Whether it is looked at as a whole: it has no parts, or is a layer whose forward uses some (to pad, say)."""
    return not list(module.children()) or isinstance(module, tuple(_KINDS.values()))


def _recorder(layers: list[Layer], name: str) -> Any:
    """A hook that appends a module's line, and sets the field of its result."""

    def hook(module: torch.nn.Module, args: tuple[Any, ...], out: Any) -> None:
        x = args[0] if args else None
        if not isinstance(x, Tensor) or not isinstance(out, Tensor):
            return
        field: Field = getattr(x, _FIELD, Field())
        window, stride, formula = _window(module, x, out)
        if window:
            field = field.through(window, stride)
            setattr(out, _FIELD, field)
        else:
            field = getattr(out, _FIELD, field)
        parameters = sum(p.numel() for p in module.parameters()) if all(layer.name != name for layer in layers) else 0
        if window or parameters:
            sees = round(field.size[0]), round(field.size[1])
            shapes = tuple(x.shape), tuple(out.shape)
            layers.append(Layer(name, _kind(module), *shapes, formula, parameters, _flops(module, x, out), sees))

    return hook


def _window(module: Any, x: Tensor, out: Tensor) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """Extent and stride of the window that a layer moves over its map, and its sizes' formula; empty where there is none."""
    if x.dim() != 4 or out.dim() != 4:
        return (), (), ""
    sizes = list(zip(x.shape[2:], out.shape[2:], strict=True))
    if isinstance(module, (pooling._AdaptiveAvgPoolNd, pooling._AdaptiveMaxPoolNd)):
        extents = [max(-(-(i + 1) * n // p) - i * n // p for i in range(p)) for n, p in sizes]
        steps = [(n - extent) / (p - 1) if p > 1 else n for (n, p), extent in zip(sizes, extents, strict=True)]
        return tuple(extents), tuple(steps), ""
    if not isinstance(module, (torch.nn.Conv2d, torch.nn.MaxPool2d, torch.nn.AvgPool2d)):
        return (), (), ""
    stride, kernel = _pair(module.stride), _pair(module.kernel_size)
    dilation = _pair(getattr(module, "dilation", 1))
    extent = (dilation[0] * (kernel[0] - 1) + 1, dilation[1] * (kernel[1] - 1) + 1)
    if isinstance(module.padding, str):
        return extent, stride, f"padding {module.padding!r}"
    pads, ceil = _pair(module.padding), bool(getattr(module, "ceil_mode", False))
    texts = []
    for i, (n, p) in enumerate(sizes):
        found, text = size(n, extent[i], stride[i], pads[i], ceil)
        texts.append(text if found == p else _padding_itself(n, p, extent[i], stride[i]))
    return extent, stride, texts[0] if texts[0] == texts[1] else ", ".join(texts)


def size(n: int, extent: int, stride: int, pad: int, ceil: bool = False) -> tuple[int, str]:
    """(N + 2·pad − F)/stride + 1, and how one writes that; F is the window's extent, dilation included.

    Rounded down, or with ``ceil`` up; then a window that would start in the padding behind the image isn't counted.
    """
    span = n + 2 * pad - extent
    result = (-(-span // stride) if ceil else span // stride) + 1
    text = f"({n} + 2·{pad} − {extent})/{stride}"
    if span % stride:
        text = f"⌈{text}⌉" if ceil else f"⌊{text}⌋"
    text += " + 1"
    if ceil and (result - 1) * stride >= n + pad:
        result, text = result - 1, f"{text} − 1"
    return result, f"{text} = {result}"


def _padding_itself(n: int, p: int, extent: int, stride: int) -> str:
    """The formula of a layer that pads its input in its forward: by so much in all, at least."""
    return f"({n} + {(p - 1) * stride + extent - n} − {extent})/{stride} + 1 = {p}"


def _pair(value: Any) -> tuple[Any, Any]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


_KINDS: dict[str, type[torch.nn.Module]] = {
    "conv": torch.nn.Conv2d, "max pool": torch.nn.MaxPool2d, "avg pool": torch.nn.AvgPool2d,
    "adaptive avg pool": pooling._AdaptiveAvgPoolNd, "adaptive max pool": pooling._AdaptiveMaxPoolNd,
    "batch norm": batchnorm._BatchNorm, "fully connected": torch.nn.Linear,
}  # fmt: skip


def _kind(module: Any) -> str:
    name = next((name for name, cls in _KINDS.items() if isinstance(module, cls)), type(module).__name__)
    if name not in ("conv", "max pool", "avg pool"):
        return name
    text = f"{name} {_shape(_pair(module.kernel_size))}"
    for attribute, prefix, usual in (("stride", "/", 1), ("padding", "pad ", 0), ("dilation", "dilation ", 1)):
        value = getattr(module, attribute, usual)
        pair = _pair(value)
        if pair != (usual, usual):
            text += f" {prefix}{pair[0] if pair[0] == pair[1] else _shape(pair)}"
    return text + (f" groups {module.groups}" if getattr(module, "groups", 1) != 1 else "")


def _flops(module: Any, x: Tensor, out: Tensor) -> int:
    if isinstance(module, conv._ConvNd):
        inner = module.weight[0].numel()  # of one filter, a group's share; of a transposed one, of one channel
        return 2 * (x if module.transposed else out).numel() * inner
    return 2 * out.numel() * module.in_features if isinstance(module, torch.nn.Linear) else 0


def _shape(sizes: Sequence[Any]) -> str:
    return "x".join(map(str, sizes))
