"""``torch.nn.functional``'s signatures, served by cnnfast's kernels.

Each function first lets ``__torch_function__`` have its say, then normalises its arguments, reads the settings and
calls the differentiable operator. What no operator of ours takes (integer and complex dtypes, other devices, inputs
without channels) goes to torch, is reported to ``explain`` with its reason, and is an error under ``strict()``.
"""

from __future__ import annotations

import operator as python_operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from cnnfast import dispatch, ops, settings
from cnnfast.errors import ShapeError
from cnnfast.ops import _operator

_has_torch_function = torch._C._has_torch_function_variadic
_tracing = torch._C._get_tracing_state
_any_autocast = torch._C._is_any_autocast_enabled
_is_compiling = torch.compiler.is_compiling
_direct = _operator.direct
_TYPES = tuple(dispatch.DTYPES)
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_OPTIONAL_TYPES = (*_PLAIN_TYPES, type(None))


# ---- arguments -------------------------------------------------------------------------------------------------------


def _pair(op: str, name: str, value: Any) -> tuple[int, int]:
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
    out = [_int(op, name, v) for v in items]
    return (out[0], out[-1])


def _int(op: str, name: str, value: Any) -> Any:  # an int, or a SymInt where shapes are symbolic
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    try:
        if isinstance(value, (bool, float)) or (isinstance(value, Tensor) and value.is_floating_point()):
            raise TypeError
        return python_operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: expected {name} to be an integer or integers, got {value!r}") from None


def _check_tensors(op: str, **tensors: Any) -> None:
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: expected {name} to be a Tensor, got {type(t).__name__}")


def _resolve_precision(device: torch.device) -> tuple[str, str, bool]:
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


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as autocast wants them: float tensors of an eligible device in the autocast dtype."""
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 and t.dtype != dtype else t
        for t in tensors
    )


def _torch_serves(op: str, reason: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Lets torch serve what no operator of ours takes: never silently, never under strict() or a forced backend."""
    backend, _, strict = settings._state
    if strict or backend not in (settings.AUTO, "aten"):
        raise NotImplementedError(
            f"{op}: {reason}; backend {backend!r}{' under strict()' if strict else ''} has nothing else"
        )
    settings.note(dispatch.Unserved(op, reason))
    return function(*args, **kwargs)


def _plain() -> bool:
    """Whether the call may take the short way: nobody compiles, traces, transforms, casts or watches."""
    return not _is_compiling() and _direct()


def _scripting() -> bool:
    """Whether the call is recorded for TorchScript or ONNX, which know standard operators only."""
    return _tracing() is not None or torch.onnx.is_in_onnx_export()


# ---- conv2d ----------------------------------------------------------------------------------------------------------


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """A 2-D convolution (cross-correlation), as :func:`torch.nn.functional.conv2d`.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, bfloat16 or float16, any strides. channels_last is fastest.
        weight: (K, C/groups, R, S), of the input's dtype.
        bias: (K,) or None.
        stride, dilation: An int or a pair (height, width).
        padding: An int, a pair, ``"valid"``, or ``"same"`` (stride 1 only; an odd total puts the extra row or column
            below or to the right).
        groups: C and K are divided into that many independent convolutions.

    Returns:
        (N, K, P, Q) or (K, P, Q) with P = (H + 2*padding - dilation*(R-1) - 1) // stride + 1; channels_last where the
        input's or the weight's strides suggest it. NaN and Inf propagate as the sum has them; padding contributes nothing.

    Raises:
        ShapeError: (a ValueError and RuntimeError) shapes or values that torch rejects.
        DtypeError: (a TypeError and RuntimeError) dtypes that don't go together.
        NotImplementedError: nothing serves under ``strict()`` or a forced backend; lists every backend's reason.
    """
    if _has_torch_function(input, weight, bias):
        return handle_torch_function(
            conv2d, (input, weight, bias), input, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups
        )  # fmt: skip
    if type(input) is not Tensor or type(weight) not in _PLAIN_TYPES or type(bias) not in _OPTIONAL_TYPES:
        _check_tensors("conv2d", input=input, weight=weight, **({} if bias is None else {"bias": bias}))
    plain = _plain()
    if not plain:
        if _scripting():
            return torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups)
        if _any_autocast():
            input, weight, bias = _autocast(input, weight, bias)  # type: ignore[assignment]
    stride, dilation = _pair("conv2d", "stride", stride), _pair("conv2d", "dilation", dilation)
    groups = _int("conv2d", "groups", groups)
    if type(padding) is str:
        pad = _named_padding(padding, weight, stride, dilation)
    else:
        h, w = _pair("conv2d", "padding", padding)
        pad = (h, h, w, w)
    params = (stride, pad, dilation, groups, *_resolve_precision(input.device))
    dims = input.dim()
    if dims == 4 and plain:
        tensors = (input, weight, bias)
        run = ops.conv2d.find(tensors, params)
        if run is not None:
            return ops.conv2d.apply(run, tensors, params)
    if dims != 4 and dims != 3:
        raise ShapeError(f"conv2d: expected a 3-D (unbatched) or 4-D (batched) input, got shape {tuple(input.shape)}")
    reason = _not_ours(input, weight)
    if reason:
        torch_args = (input, weight, bias, stride, padding, dilation, groups)
        return _torch_serves("conv2d", reason, torch.nn.functional.conv2d, *torch_args)
    if dims == 3:
        return ops.conv2d(input.unsqueeze(0), weight, bias, *params).squeeze(0)
    return ops.conv2d(input, weight, bias, *params)


def _named_padding(
    padding: str, weight: Tensor, stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding != "same":
        raise ShapeError(f"conv2d: expected padding 'same' or 'valid', got {padding!r}")
    if stride != (1, 1):
        raise ShapeError(f"conv2d: padding='same' is not supported for strided convolutions, got stride {stride}")
    if weight.dim() != 4:
        raise ShapeError(f"conv2d: expected a 4-D weight (K, C/groups, R, S), got shape {tuple(weight.shape)}")
    h, w = dilation[0] * (weight.shape[2] - 1), dilation[1] * (weight.shape[3] - 1)
    return (h // 2, h - h // 2, w // 2, w - w // 2)


def _not_ours(input: Tensor, weight: Tensor | None = None) -> str:
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


# ---- max_pool2d ------------------------------------------------------------------------------------------------------

_torch_max_pool2d: Any = torch.nn.functional.max_pool2d  # its overloads take no bool that isn't a literal


def max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """A 2-D max pooling, as :func:`torch.nn.functional.max_pool2d`.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, bfloat16 or float16, any strides. channels_last is fastest.
        kernel_size, stride, padding, dilation: An int or a pair (height, width); stride defaults to kernel_size, padding
            is at most half of it.
        ceil_mode: Round the output size up; the last window still starts inside the image or its left padding.
        return_indices: Also return the offsets h*W + w of the maxima, int64.

    Returns:
        (N, C, P, Q) or (C, P, Q) with P = floor or ceil of (H + 2*padding - dilation*(kernel-1) - 1) / stride, + 1; or
        that and the indices. The first of equal elements is the maximum; a window with a NaN gives NaN (its last one
        is the maximum); a window that dilation leaves without any element gives -inf.

    Raises:
        ShapeError: (a ValueError and RuntimeError) shapes or values that torch rejects.
        NotImplementedError: nothing serves under ``strict()`` or a forced backend; lists every backend's reason.
    """
    if _has_torch_function(input):
        return handle_torch_function(
            max_pool2d, (input,), input, kernel_size, stride=stride, padding=padding, dilation=dilation,
            ceil_mode=ceil_mode, return_indices=return_indices,
        )  # fmt: skip
    if type(input) is not Tensor:
        _check_tensors("max_pool2d", input=input)
    plain = _plain()
    if not plain and _scripting():
        return _torch_max_pool2d(
            input, kernel_size, stride, padding, dilation, ceil_mode=ceil_mode, return_indices=return_indices
        )
    kernel = _pair("max_pool2d", "kernel_size", kernel_size)
    if stride is None or (isinstance(stride, (tuple, list)) and len(stride) == 0):
        stride = kernel
    if type(ceil_mode) is not bool:
        raise TypeError(f"max_pool2d: expected ceil_mode to be a bool, got {ceil_mode!r}")
    dims = input.dim()
    if dims != 4 and dims != 3:
        raise ShapeError(
            f"max_pool2d: expected a 3-D (unbatched) or 4-D (batched) input, got shape {tuple(input.shape)}"
        )
    params = (
        kernel, _pair("max_pool2d", "stride", stride), _pair("max_pool2d", "padding", padding),
        _pair("max_pool2d", "dilation", dilation), ceil_mode,
    )  # fmt: skip
    backend, _, strict = settings._state
    if dims == 4 and plain and not return_indices:
        run = ops.max_pool2d.find((input,), (*params, backend, strict))
        if run is not None:
            return ops.max_pool2d.apply(run, (input,), (*params, backend, strict))
    reason = _not_ours(input)
    if reason:
        return _torch_serves(
            "max_pool2d", reason, _torch_max_pool2d, input, *params[:4], ceil_mode=ceil_mode,
            return_indices=return_indices,
        )  # fmt: skip
    x = input.unsqueeze(0) if dims == 3 else input
    if return_indices:
        y, indices = ops.max_pool2d_indices(x, *params, backend, strict)
        return (y.squeeze(0), indices.squeeze(0)) if dims == 3 else (y, indices)
    y = ops.max_pool2d(x, *params, backend, strict)
    return y.squeeze(0) if dims == 3 else y


# ---- avg_pool2d ------------------------------------------------------------------------------------------------------

_torch_avg_pool2d: Any = torch.nn.functional.avg_pool2d


def avg_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """A 2-D average pooling, as :func:`torch.nn.functional.avg_pool2d`.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, bfloat16 or float16, any strides. channels_last is fastest.
        kernel_size, stride, padding: An int or a pair (height, width); stride defaults to kernel_size, padding is at
            most half of it.
        ceil_mode: Round the output size up; the last window still starts inside the image or its left padding.
        count_include_pad: Padding counts in the divisor.
        divisor_override: What each sum is divided by, not zero; None: the number of taps.

    Returns:
        (N, C, P, Q) or (C, P, Q) with P = floor or ceil of (H + 2*padding - kernel) / stride, + 1. Accumulated in
        float32 (float64 for float64). NaN and Inf propagate as the sum has them.

    Raises:
        ShapeError: (a ValueError and RuntimeError) shapes or values that torch rejects.
        NotImplementedError: nothing serves under ``strict()`` or a forced backend; lists every backend's reason.
    """
    if _has_torch_function(input):
        return handle_torch_function(
            avg_pool2d, (input,), input, kernel_size, stride=stride, padding=padding, ceil_mode=ceil_mode,
            count_include_pad=count_include_pad, divisor_override=divisor_override,
        )  # fmt: skip
    if type(input) is not Tensor:
        _check_tensors("avg_pool2d", input=input)
    plain = _plain()
    if not plain and _scripting():
        return _torch_avg_pool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    kernel = _pair("avg_pool2d", "kernel_size", kernel_size)
    if stride is None or (isinstance(stride, (tuple, list)) and len(stride) == 0):
        stride = kernel
    if type(ceil_mode) is not bool or type(count_include_pad) is not bool:
        raise TypeError(
            f"avg_pool2d: expected ceil_mode and count_include_pad to be bools, got {ceil_mode!r}, "
            f"{count_include_pad!r}"
        )
    backend, _, strict = settings._state
    params = (
        kernel, _pair("avg_pool2d", "stride", stride), _pair("avg_pool2d", "padding", padding), ceil_mode,
        count_include_pad,
        None if divisor_override is None else _int("avg_pool2d", "divisor_override", divisor_override), backend, strict,
    )  # fmt: skip
    dims = input.dim()
    if dims == 4 and plain:
        run = ops.avg_pool2d.find((input,), params)
        if run is not None:
            return ops.avg_pool2d.apply(run, (input,), params)
    if dims != 4 and dims != 3:
        raise ShapeError(
            f"avg_pool2d: expected a 3-D (unbatched) or 4-D (batched) input, got shape {tuple(input.shape)}"
        )
    reason = _not_ours(input)
    if reason:
        return _torch_serves("avg_pool2d", reason, _torch_avg_pool2d, input, *params[:-2])
    if dims == 3:
        return ops.avg_pool2d(input.unsqueeze(0), *params).squeeze(0)
    return ops.avg_pool2d(input, *params)


# ---- adaptive_avg_pool2d ---------------------------------------------------------------------------------------------

_torch_adaptive_avg_pool2d: Any = torch.nn.functional.adaptive_avg_pool2d


def _output_size(op: str, input: Tensor, value: Any) -> tuple[Any, Any]:
    """An adaptive pooling's output size: an int, or a pair in which None is the input's own size."""
    if isinstance(value, (tuple, list, torch.Size)):
        if len(value) != 2:
            raise ShapeError(f"{op}: expected output_size to be an integer or 2 integers or None, got {value!r}")
        if input.dim() < 3:
            raise ShapeError(f"{op}: expected a 3-D (unbatched) or 4-D (batched) input, got shape {tuple(input.shape)}")
        sizes = zip(value, input.shape[-2:], strict=True)
        return tuple(own if v is None else _int(op, "output_size", v) for v, own in sizes)  # type: ignore[return-value]
    size = _int(op, "output_size", value)
    return (size, size)


def adaptive_avg_pool2d(input: Tensor, output_size: int | Sequence[int | None] | None) -> Any:
    """A 2-D average pooling to a given size, as :func:`torch.nn.functional.adaptive_avg_pool2d`.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, bfloat16 or float16, any strides. channels_last is fastest.
        output_size: (P, Q) or an int for both; None in a pair keeps the input's size.

    Returns:
        (N, C, P, Q) or (C, P, Q): the means over rows floor(p*H / P) .. ceil((p+1)*H / P) - 1, and columns alike.
        Accumulated in float32 (float64 for float64). NaN and Inf propagate as the sum has them.

    Raises:
        ShapeError: (a ValueError and RuntimeError) shapes or values that torch rejects.
        NotImplementedError: nothing serves under ``strict()`` or a forced backend; lists every backend's reason.
    """
    if _has_torch_function(input):
        return handle_torch_function(adaptive_avg_pool2d, (input,), input, output_size)
    if type(input) is not Tensor:
        _check_tensors("adaptive_avg_pool2d", input=input)
    plain = _plain()
    if not plain and _scripting():
        return _torch_adaptive_avg_pool2d(input, output_size)
    size = _output_size("adaptive_avg_pool2d", input, output_size)
    backend, _, strict = settings._state
    params, dims = (size, backend, strict), input.dim()
    if dims == 4 and plain:
        run = ops.adaptive_avg_pool2d.find((input,), params)
        if run is not None:
            return ops.adaptive_avg_pool2d.apply(run, (input,), params)
    reason = _not_ours(input)
    if not reason and size == (1, 1) and (dims not in (3, 4) or 0 in input.shape[-3:]):
        reason = f"the mean of an input of shape {tuple(input.shape)} (ours: 3-D and 4-D, empty at most in the batch)"
    elif not reason and dims in (3, 4) and input.shape[-3] == 0:
        reason = "no channels"
    if reason:
        return _torch_serves("adaptive_avg_pool2d", reason, _torch_adaptive_avg_pool2d, input, output_size)
    if dims != 4 and dims != 3:
        raise ShapeError(
            f"adaptive_avg_pool2d: expected a 3-D (unbatched) or 4-D (batched) input, got shape {tuple(input.shape)}"
        )
    if dims == 3:
        return ops.adaptive_avg_pool2d(input.unsqueeze(0), *params).squeeze(0)
    return ops.adaptive_avg_pool2d(input, *params)


# ---- adaptive_max_pool2d ---------------------------------------------------------------------------------------------

_torch_adaptive_max_pool2d: Any = torch.nn.functional.adaptive_max_pool2d


def adaptive_max_pool2d(
    input: Tensor, output_size: int | Sequence[int | None] | None, return_indices: bool = False
) -> Any:
    """A 2-D max pooling to a given size, as :func:`torch.nn.functional.adaptive_max_pool2d`.

    Args:
        input: (N, C, H, W) or (C, H, W); float32, float64, bfloat16 or float16, any strides. channels_last is fastest.
        output_size: (P, Q) or an int for both; None in a pair keeps the input's size.
        return_indices: Also return the offsets h*W + w of the maxima, int64.

    Returns:
        (N, C, P, Q) or (C, P, Q): the maxima over rows floor(p*H / P) .. ceil((p+1)*H / P) - 1, and columns alike; or
        that and the indices. The first of equal elements is the maximum; a window with a NaN gives NaN (its last one is
        the maximum).

    Raises:
        ShapeError: (a ValueError and RuntimeError) shapes or values that torch rejects.
        NotImplementedError: nothing serves under ``strict()`` or a forced backend; lists every backend's reason.
    """
    if _has_torch_function(input):
        return handle_torch_function(
            adaptive_max_pool2d, (input,), input, output_size, return_indices=return_indices
        )  # fmt: skip
    if type(input) is not Tensor:
        _check_tensors("adaptive_max_pool2d", input=input)
    plain = _plain()
    if not plain and _scripting():
        return _torch_adaptive_max_pool2d(input, output_size, return_indices)
    backend, _, strict = settings._state
    params, dims = (_output_size("adaptive_max_pool2d", input, output_size), backend, strict), input.dim()
    if dims == 4 and plain and not return_indices:
        run = ops.adaptive_max_pool2d.find((input,), params)
        if run is not None:
            return ops.adaptive_max_pool2d.apply(run, (input,), params)
    if dims != 4 and dims != 3:
        raise ShapeError(
            f"adaptive_max_pool2d: expected a 3-D (unbatched) or 4-D (batched) input, got shape {tuple(input.shape)}"
        )
    reason = _not_ours(input)
    if reason:
        return _torch_serves(
            "adaptive_max_pool2d", reason, _torch_adaptive_max_pool2d, input, output_size, return_indices
        )
    x = input.unsqueeze(0) if dims == 3 else input
    if return_indices:
        y, indices = ops.adaptive_max_pool2d_indices(x, *params)
        return (y.squeeze(0), indices.squeeze(0)) if dims == 3 else (y, indices)
    y = ops.adaptive_max_pool2d(x, *params)
    return y.squeeze(0) if dims == 3 else y
