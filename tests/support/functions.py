"""The differentiable functions of cnnfast beside torch's, with arguments: what the tests of derivatives run over."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnfast import functional

CL = torch.channels_last


@dataclasses.dataclass(frozen=True)
class Function:
    """A function of tensors, ours and torch's, and the shapes and layouts of its tensors; the first is the input."""

    name: str
    ours: Callable[..., Any]
    torchs: Callable[..., Any]
    shapes: Sequence[tuple[int, ...]]
    channels_last: bool = False

    def tensors(self, dtype: torch.dtype = torch.float64, grad: bool = False, seed: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        made = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in self.shapes]
        if self.channels_last:
            made = [t.to(memory_format=CL) if t.dim() == 4 else t for t in made]
        return tuple(t.requires_grad_(grad) for t in made)

    def __str__(self) -> str:
        return self.name


def _conv2d(name: str, shapes: Sequence[tuple[int, ...]], channels_last: bool = False, **kwargs: Any) -> Function:
    return Function(
        f"conv2d {name}",
        lambda *t: functional.conv2d(*t, **kwargs),
        lambda *t: torch.nn.functional.conv2d(*t, **kwargs),
        shapes,
        channels_last,
    )


def _max_pool2d(name: str, shape: tuple[int, ...], channels_last: bool = False, **kwargs: Any) -> Function:
    return Function(
        f"max_pool2d {name}",
        lambda t: functional.max_pool2d(t, **kwargs),
        lambda t: torch.nn.functional.max_pool2d(t, **kwargs),
        [shape],
        channels_last,
    )


def _conv1d(name: str, shapes: Sequence[tuple[int, ...]], **kwargs: Any) -> Function:
    return Function(
        f"conv1d {name}",
        lambda *t: functional.conv1d(*t, **kwargs),
        lambda *t: torch.nn.functional.conv1d(*t, **kwargs),
        shapes,
    )


def _conv_transpose2d(
    name: str, shapes: Sequence[tuple[int, ...]], channels_last: bool = False, **kwargs: Any
) -> Function:
    return Function(
        f"conv_transpose2d {name}",
        lambda *t: functional.conv_transpose2d(*t, **kwargs),
        lambda *t: torch.nn.functional.conv_transpose2d(*t, **kwargs),
        shapes,
        channels_last,
    )


def _pool(op: str, name: str, shape: tuple[int, ...], channels_last: bool = False, **kwargs: Any) -> Function:
    ours, torchs = getattr(functional, op), getattr(torch.nn.functional, op)
    return Function(f"{op} {name}", lambda t: ours(t, **kwargs), lambda t: torchs(t, **kwargs), [shape], channels_last)


_ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z, "relu": torch.relu, "relu6": F.relu6, "leaky_relu": F.leaky_relu,
}  # fmt: skip


def _add_act(name: str, shape: tuple[int, ...], activation: str, channels_last: bool = False) -> Function:
    return Function(
        f"add_act {name}",
        lambda a, b: functional.add_act(a, b, activation),
        lambda a, b: _ACTS[activation](a + b),
        [shape, shape],
        channels_last,
    )


def _statistics(x: Tensor, c: int, training: bool) -> list[Tensor | None]:
    if training:
        return [None, None]
    return [torch.linspace(a, b, c, dtype=x.dtype, device=x.device) for a, b in ((-1, 1), (0.5, 2))]


def _normalised(x: Tensor, mean: Tensor | None, var: Tensor | None, w: Tensor, b: Tensor) -> Tensor:
    """torch's batch norm in its elementwise functions: its own operator has no third derivatives."""
    along, dims = (-1,) + (1,) * (x.dim() - 2), [d for d in range(x.dim()) if d != 1]
    if mean is None or var is None:
        mean, var = x.mean(dims), x.var(dims, correction=0)
    mean, var, w, b = (t.reshape(along) for t in (mean, var, w, b))
    return (x - mean) / (var + 1e-5).sqrt() * w + b


def _batch_norm(
    name: str,
    shape: tuple[int, ...],
    activation: str,
    training: bool,
    residual: bool = False,
    channels_last: bool = False,
) -> Function:
    """Over input, weight, bias and perhaps a residual; the running statistics aren't kept, or constant."""
    c = shape[1]

    def stats(x: Tensor) -> list[Tensor | None]:
        return _statistics(x, c, training)

    def ours(x: Tensor, w: Tensor, b: Tensor, *r: Tensor) -> Tensor:
        return functional.batch_norm_act(x, w, b, *stats(x), *(r or [None]), activation, training)

    def torchs(x: Tensor, w: Tensor, b: Tensor, *r: Tensor) -> Tensor:
        return _ACTS[activation](sum(r, _normalised(x, *stats(x), w, b)))

    return Function(f"batch_norm {name}", ours, torchs, [shape, (c,), (c,), *[shape] * residual], channels_last)


def _conv_bn_act(
    name: str,
    shapes: Sequence[tuple[int, ...]],
    activation: str,
    training: bool,
    channels_last: bool = False,
    **kwargs: Any,
) -> Function:
    """Over input, filters, the batch norm's weight and bias, and a residual."""
    k = shapes[1][0]

    def stats(x: Tensor) -> list[Tensor | None]:
        return _statistics(x, k, training)

    def ours(x: Tensor, w: Tensor, gamma: Tensor, beta: Tensor, r: Tensor) -> Tensor:
        return functional.conv_bn_act(x, w, None, *stats(x), gamma, beta, r, activation, training=training, **kwargs)

    def torchs(x: Tensor, w: Tensor, gamma: Tensor, beta: Tensor, r: Tensor) -> Tensor:
        return _ACTS[activation](_normalised(F.conv2d(x, w, **kwargs), *stats(x), gamma, beta) + r)

    return Function(f"conv_bn_act {name}", ours, torchs, shapes, channels_last)


FUNCTIONS: tuple[Function, ...] = (
    _conv2d("plain", [(2, 3, 5, 4), (4, 3, 3, 3), (4,)], padding=1),
    _conv2d(
        "strided, grouped, dilated", [(2, 4, 7, 6), (6, 2, 3, 2), (6,)],
        stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2,
    ),
    _conv2d("channels_last, without bias", [(2, 3, 5, 4), (4, 3, 3, 3)], True, stride=2, padding=1),
    _conv2d("depthwise, same", [(1, 4, 4, 5), (4, 1, 2, 3), (4,)], padding="same", groups=4),
    _max_pool2d("overlapping", (2, 3, 6, 7), kernel_size=3, stride=2, padding=1),
    _max_pool2d("channels_last, dilated, ceil", (1, 4, 7, 6), True, kernel_size=(2, 3), dilation=(2, 1), ceil_mode=True),
    _conv1d("strided, grouped", [(2, 4, 9), (6, 2, 3), (6,)], stride=2, padding=1, groups=2),
    _conv1d("same, unbatched", [(3, 7), (4, 3, 2), (4,)], padding="same"),
    _conv_transpose2d(
        "strided, grouped", [(2, 4, 4, 3), (4, 3, 3, 2), (6,)], stride=(2, 3), padding=(1, 0), groups=2,
    ),
    _conv_transpose2d("channels_last, dilated", [(2, 3, 4, 5), (3, 2, 3, 3)], True, padding=1, dilation=2),
    _pool("avg_pool2d", "overlapping, padded", (2, 3, 6, 7), kernel_size=3, stride=2, padding=1),
    _pool(
        "avg_pool2d", "channels_last, ceil, without padding's count", (1, 4, 7, 6), True,
        kernel_size=(2, 3), stride=(3, 2), padding=1, ceil_mode=True, count_include_pad=False,
    ),
    _pool("avg_pool2d", "unbatched, divisor", (3, 5, 4), kernel_size=2, stride=1, divisor_override=3),
    _pool("adaptive_avg_pool2d", "to 1x1", (2, 3, 4, 5), output_size=1),
    _pool("adaptive_avg_pool2d", "channels_last, overlapping", (2, 4, 7, 5), True, output_size=(4, 3)),
    _pool("adaptive_avg_pool2d", "unbatched, to more", (2, 3, 4), output_size=(5, None)),
    _pool("adaptive_max_pool2d", "overlapping", (2, 3, 6, 7), output_size=(4, 3)),
    _pool("adaptive_max_pool2d", "channels_last, to 1x1", (1, 4, 5, 6), True, output_size=1),
    _pool("adaptive_max_pool2d", "unbatched, to more", (2, 3, 4), output_size=(5, None)),
    _add_act("relu", (2, 3, 4, 5), "relu"),
    _add_act("relu6, channels_last", (2, 3, 4, 5), "relu6", True),
    _batch_norm("training", (2, 3, 3, 4), "none", True),
    _batch_norm("training, relu, channels_last", (2, 4, 3, 3), "relu", True, False, True),
    _batch_norm("training, residual, leaky", (3, 3, 2, 3), "leaky_relu", True, True),
    _batch_norm("evaluated, residual, relu6", (2, 3, 3, 4), "relu6", False, True, True),
    _batch_norm("evaluated", (2, 3, 3, 4), "none", False),
    _batch_norm("training, rows", (4, 3), "relu", True),
    _conv_bn_act(
        "evaluated, grouped", [(2, 4, 5, 4), (6, 2, 3, 3), (6,), (6,), (2, 6, 5, 4)], "relu", False, True,
        padding=1, groups=2,
    ),
    _conv_bn_act("training", [(2, 3, 4, 4), (4, 3, 1, 1), (4,), (4,), (2, 4, 4, 4)], "leaky_relu", True),
    _conv2d("1x1 unbatched", [(3, 4, 4), (5, 3, 1, 1), (5,)]),
)  # fmt: skip
