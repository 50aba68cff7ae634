"""What the functionals share: normalising arguments, reading the settings, and what goes to torch."""

from __future__ import annotations

import operator as python_operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cnnfast import dispatch, settings
from cnnfast.errors import ShapeError
from cnnfast.ops import _operator

has_torch_function = torch._C._has_torch_function_variadic
_tracing = torch._C._get_tracing_state
any_autocast = torch._C._is_any_autocast_enabled
_is_compiling = torch.compiler.is_compiling
_direct = _operator.direct
_TYPES = tuple(dispatch.DTYPES)
PLAIN_TYPES = (Tensor, torch.nn.Parameter)
OPTIONAL_TYPES = (*PLAIN_TYPES, type(None))


def pair(op: str, name: str, value: Any) -> tuple[int, int]:
    """An int or a sequence of one or two ints, as torch takes it, as a pair of plain ints."""
    if type(value) is tuple and len(value) == 2:
        a, b = value
        if type(a) is int and type(b) is int:
            return value
    if type(value) is int:
        return (value, value)
    items = list(value) if isinstance(value, (tuple, list, torch.Size)) else [value]
    if len(items) not in (1, 2):
        raise ShapeError(f"{op}: expected {name} to be a single integer or a sequence of 2 integers, got {value!r}")
    out = [integer(op, name, v) for v in items]
    return (out[0], out[-1])


def single(op: str, name: str, value: Any) -> tuple[int]:
    """An int or a sequence of one int as a tuple of one plain int."""
    items = list(value) if isinstance(value, (tuple, list, torch.Size)) else [value]
    if len(items) != 1:
        raise ShapeError(f"{op}: expected {name} to be a single integer or a sequence of 1 integer, got {value!r}")
    return (integer(op, name, items[0]),)


def integer(op: str, name: str, value: Any) -> Any:
    """A plain int, or a SymInt where shapes are symbolic."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    try:
        if isinstance(value, (bool, float)) or (isinstance(value, Tensor) and value.is_floating_point()):
            raise TypeError
        return python_operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: expected {name} to be an integer or integers, got {value!r}") from None


def check_tensors(op: str, **tensors: Any) -> None:
    """Raises TypeError for the first that isn't a Tensor."""
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: expected {name} to be a Tensor, got {type(t).__name__}")


def resolve_precision(device: torch.device) -> tuple[str, str, bool]:
    """The ambient settings as an operator takes them: precision, backend, strict."""
    backend, precision, strict = settings._state
    if precision is None:
        precision = "fp32"
        if device.type == "cuda" and _torch_allows_tf32():
            precision = "high"
    return precision, backend, strict


def _torch_allows_tf32() -> bool:
    conv = getattr(torch.backends.cudnn, "conv", None)
    value = getattr(conv, "fp32_precision", None)
    return value == "tf32" if value not in (None, "none") else bool(torch.backends.cudnn.allow_tf32)


# What torch.compiler.assume_constant_result does, without importing Dynamo, which can't trace these flags: a graph holds
# their values as it was traced, like cuDNN's own convolution in it.
_torch_allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as autocast wants them: float tensors of an eligible device in the autocast dtype."""
    return tuple(None if t is None else t.to(autocast_dtype(t)) for t in tensors)


def autocast_dtype(t: Tensor) -> torch.dtype:
    """The dtype that autocast gives a tensor."""
    if not any_autocast() or not t.is_floating_point() or t.dtype == torch.float64:
        return t.dtype
    device = t.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else t.dtype


def torch_serves(op: str, reason: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Lets torch serve what no operator of ours takes: never silently, never under strict() or a forced backend."""
    backend, _, strict = settings._state
    if strict or backend not in (settings.AUTO, "aten"):
        raise NotImplementedError(
            f"{op}: {reason}; backend {backend!r}{' under strict()' if strict else ''} has nothing else"
        )
    settings.note(dispatch.Unserved(op, reason))
    return function(*args, **kwargs)


def plain() -> bool:
    """Whether the call may take the short way: nobody compiles, traces, transforms or watches."""
    return not _is_compiling() and _direct()


def scripting() -> bool:
    """Whether the call is recorded for TorchScript or ONNX, which know standard operators only."""
    return _tracing() is not None or torch.onnx.is_in_onnx_export()


def not_ours(input: Tensor, weight: Tensor | None = None) -> str:
    """Why no operator of ours takes these tensors; empty where one does."""
    if input.dtype not in _TYPES:
        return f"dtype {input.dtype} (ours: {', '.join(map(str, _TYPES))})"
    if input.layout is not torch.strided or (weight is not None and weight.layout is not torch.strided):
        return f"layout {input.layout}{'' if weight is None else f', {weight.layout}'} (ours: torch.strided)"
    if input.device.type not in ("cpu", "cuda", "meta"):
        return f"device {input.device} (ours: cpu, cuda)"
    if weight is not None and (0 in weight.shape or (input.dim() == 4 and input.shape[1] == 0)):
        return "no input channels, or an empty weight"
    return ""


def named_padding(
    op: str, padding: str, weight: Tensor, stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """``"valid"`` or ``"same"`` as (first, last) of each spatial dimension."""
    if padding == "valid":
        return (0, 0) * len(stride)
    if padding != "same":
        raise ShapeError(f"{op}: expected padding 'same' or 'valid', got {padding!r}")
    if any(s != 1 for s in stride):
        raise ShapeError(f"{op}: padding='same' is not supported for strided convolutions, got stride {tuple(stride)}")
    if weight.dim() != len(stride) + 2:
        raise ShapeError(f"{op}: expected a {len(stride) + 2}-D weight, got shape {tuple(weight.shape)}")
    totals = [d * (n - 1) for d, n in zip(dilation, weight.shape[2:], strict=True)]
    return tuple(part for total in totals for part in (total // 2, total - total // 2))


def adaptive_size(op: str, input: Tensor, value: Any) -> tuple[Any, Any]:
    """An adaptive pooling's output size: an int, or a pair in which None is the input's own size."""
    if isinstance(value, (tuple, list, torch.Size)):
        if len(value) != 2:
            raise ShapeError(f"{op}: expected output_size to be an integer or 2 integers or None, got {value!r}")
        if input.dim() < 3:
            raise ShapeError(f"{op}: expected a 3-D (unbatched) or 4-D (batched) input, got shape {tuple(input.shape)}")
        sizes = zip(value, input.shape[-2:], strict=True)
        return tuple(own if v is None else integer(op, "output_size", v) for v, own in sizes)  # type: ignore[return-value]
    size = integer(op, "output_size", value)
    return (size, size)
