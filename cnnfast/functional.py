"""``torch.nn.functional``'s signatures, served by cnnfast's kernels.

Each function first lets ``__torch_function__`` have its say, then normalises its arguments, reads the settings and
calls the differentiable operator. What no operator of ours takes (integer and complex dtypes, other devices, inputs
without channels) goes to torch, is reported to ``explain`` with its reason, and is an error under ``strict()``.
"""

from __future__ import annotations

import math
import operator as python_operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from cnnfast import dispatch, ops, settings
from cnnfast.errors import DtypeError, ShapeError
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
    if _scripting():
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
    reason = _not_ours(input)
    if reason:
        return _torch_serves(
            "max_pool2d", reason, _torch_max_pool2d, input, *params[:4], ceil_mode=ceil_mode,
            return_indices=return_indices,
        )  # fmt: skip
    backend, _, strict = settings._state
    x = input.unsqueeze(0) if dims == 3 else input
    if return_indices:
        y, indices = ops.max_pool2d_indices(x, *params, backend, strict)
        return (y.squeeze(0), indices.squeeze(0)) if dims == 3 else (y, indices)
    y = ops.max_pool2d(x, *params, backend, strict)
    return y.squeeze(0) if dims == 3 else y


# ---- add_act ---------------------------------------------------------------------------------------------------------


def add_act(input: Tensor, other: Tensor, activation: str = "relu") -> Tensor:
    """``act(input + other)`` in one pass over memory, forward and backward: the end of a residual block.

    Args:
        input, other: Floating point tensors that can be broadcast to each other; any strides.
        activation: ``"none"``, ``"relu"``, ``"relu6"`` or ``"leaky_relu"`` (slope 0.01).

    Returns:
        The sum's shape, dtype and layout as ``input + other`` would have them. NaN propagates.
    """
    if _has_torch_function(input, other):
        return handle_torch_function(add_act, (input, other), input, other, activation=activation)
    _check_tensors("add_act", input=input, other=other)
    ops.activation_code("add_act", activation)
    backend, _, strict = settings._state
    if input.dim() == 4 and input.shape == other.shape and input.dtype == other.dtype and not _not_ours(input, other):
        return ops.add_act(input, other, activation, backend, strict)
    if _scripting():
        return ops.activate(input + other, activation)
    dtype = torch.result_type(input, other)
    a, b = torch.broadcast_tensors(input.to(dtype), other.to(dtype))  # type: ignore[no-untyped-call]
    reason = _not_ours(a, b) or (f"{a.dim()} dimensions (ours: up to 4)" if a.dim() > 4 else "")
    if not reason and a.numel() == 0:
        reason = "an empty tensor"
    if reason:
        return _torch_serves("add_act", reason, lambda: ops.activate(input + other, activation))
    shape, more = a.shape, (None,) * (4 - a.dim())
    return ops.add_act(a[more], b[more], activation, backend, strict).reshape(shape)


# ---- batch_norm ------------------------------------------------------------------------------------------------------


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch normalisation, as :func:`torch.nn.functional.batch_norm`.

    Args:
        input: (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W); float32, float64, bfloat16 or float16. channels_last
            is fastest.
        running_mean, running_var: (C,); what evaluation normalises with, and training updates in place. None in
            training: they aren't kept.
        weight, bias: (C,) or None; of the input's dtype, like the running statistics, or all float32 beside 16-bit inputs.
        training: Normalise with the batch's own statistics: the biased variance; running_var gets the unbiased one.
        momentum: The share of the new value in the running averages.
        eps: Added to the variance.

    Returns:
        The input's shape and dtype. A channel that is constant gives exactly its bias. Sums are in float64 for every
        dtype, so that what the dtype can hold doesn't overflow when squared.

    Second derivatives and forward mode run on torch's elementwise operators: their formulas aren't worth kernels of
    their own.

    Raises:
        ShapeError: (a ValueError and RuntimeError) shapes or values that torch rejects.
        DtypeError: (a TypeError and RuntimeError) dtypes that don't go together.
        NotImplementedError: nothing serves under ``strict()`` or a forced backend; lists every backend's reason.
    """
    if _has_torch_function(input, running_mean, running_var, weight, bias):
        return handle_torch_function(
            batch_norm, (input, running_mean, running_var, weight, bias), input, running_mean, running_var, weight=weight,
            bias=bias, training=training, momentum=momentum, eps=eps,
        )  # fmt: skip
    return _batch_norm(
        "batch_norm", input, weight, bias, running_mean, running_var, None, "none", training, momentum, eps
    )


def batch_norm_act(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None = None,
    activation: str = "relu",
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``act(batch_norm(input) + residual)`` in one pass over memory (and one for the statistics, in training).

    Args:
        input, weight, bias, running_mean, running_var, training, momentum, eps: As :func:`batch_norm` takes them.
        residual: A tensor of the input's shape, or None; fused where it has the input's dtype.
        activation: ``"none"``, ``"relu"``, ``"relu6"`` or ``"leaky_relu"`` (slope 0.01).

    Returns:
        The input's shape and dtype. For the gradient the input is kept and, where there are a residual and an
        activation, the result; without a residual the activation's slope is found from the input again.
    """
    if _has_torch_function(input, weight, bias, running_mean, running_var, residual):
        return handle_torch_function(
            batch_norm_act, (input, weight, bias, running_mean, running_var, residual), input, weight, bias, running_mean,
            running_var, residual=residual, activation=activation, training=training, momentum=momentum, eps=eps,
        )  # fmt: skip
    ops.activation_code("batch_norm_act", activation)
    if residual is not None and residual.dtype != input.dtype:  # the sum is of the wider dtype
        return add_act(
            batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps), residual, activation
        )
    return _batch_norm(
        "batch_norm_act", input, weight, bias, running_mean, running_var, residual, activation, training, momentum, eps
    )


def _batch_norm(
    op: str, input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, residual: Tensor | None, activation: str, training: bool, momentum: float, eps: float,
) -> Tensor:  # fmt: skip
    backend, _, strict = settings._state
    params = (activation, training, eps, backend, strict)
    if type(training) is bool and type(eps) is float and _plain():  # a kind of call that was checked before
        if not training:
            tensors = (input, weight, bias, running_mean, running_var, residual)
            run = ops.batch_norm.find(tensors, params) if running_mean is not None and running_var is not None else None
            if run is not None:
                return ops.batch_norm.apply(run, tensors, params)
        elif momentum is not None and (running_mean is None) == (running_var is None):
            find_statistics = ops.batch_norm_stats.find((input,), (eps, backend, strict))
            if find_statistics is not None and input.numel() > input.shape[1]:
                given = [t for t in (weight, bias, running_mean, running_var) if t is not None]
                wide = dispatch.ACCUMULATORS.get(input.dtype, torch.float32)
                if all(t.dtype == wide and t.shape == input.shape[1:2] for t in given):
                    mean, invstd, unbiased = find_statistics(input)
                    tensors = (input, weight, bias, mean, invstd, residual)
                    run = ops.batch_norm.find(tensors, params)
                    if run is not None:
                        _update(running_mean, running_var, mean, unbiased, momentum)
                        return ops.batch_norm.apply(run, tensors, params)
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    _check_tensors(op, input=input, **{k: t for k, t in (*vectors.items(), ("residual", residual)) if t is not None})
    if _scripting():
        return _torch_batch_norm(
            input, weight, bias, running_mean, running_var, residual, activation, training, momentum, eps
        )
    _check_batch_norm(op, input, tuple(input.shape), vectors, training, momentum, eps)
    if residual is not None and residual.shape != input.shape:
        raise ShapeError(
            f"{op}: expected a residual of the input's shape {tuple(input.shape)}, got {tuple(residual.shape)}"
        )
    dims = input.dim()
    reason = _not_ours(input)
    if not reason and (dims > 5 or input.shape[1] == 0):
        reason = "more than 5 dimensions" if dims > 5 else "no channels"
    if reason:
        return _torch_serves(
            op, reason, _torch_batch_norm, input, weight, bias, running_mean, running_var, residual, activation, training,
            momentum, eps,
        )  # fmt: skip
    wide = dispatch.ACCUMULATORS.get(input.dtype, torch.float32)
    x = input if dims == 4 else _as_images(input)
    r = residual if residual is None or dims == 4 else _as_images(residual)
    w, b = _vector(weight, wide), _vector(bias, wide)
    training, eps = bool(training), float(eps)
    if not training:
        mean, var = _vector(running_mean, wide), _vector(running_var, wide)
    elif input.numel() == 0:  # there is nothing to normalise, and no statistics
        training, mean, var = False, None, None
    else:
        mean, var, unbiased = ops.batch_norm_stats(x.detach(), eps, backend, strict)
        _update(running_mean, running_var, mean, unbiased, momentum)
    y = ops.batch_norm(x, w, b, mean, var, r, activation, training, eps, backend, strict)
    if dims == 4:
        return y
    return y.reshape(input.shape) if dims == 5 else y.reshape(input.shape).contiguous()


def _update(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, unbiased: Tensor, momentum: float
) -> None:
    """The running averages' step, in place."""
    if running_mean is None or running_var is None:
        return
    with torch.no_grad():
        running_mean.lerp_(mean if mean.dtype == running_mean.dtype else mean.to(running_mean.dtype), momentum)
        running_var.lerp_(unbiased if unbiased.dtype == running_var.dtype else unbiased.to(running_var.dtype), momentum)


def _as_images(t: Tensor) -> Tensor:
    """(N, C), (N, C, L) or (N, C, D, H, W) as (N, C, H, W)."""
    return t[:, :, None, None] if t.dim() == 2 else t.unsqueeze(2) if t.dim() == 3 else t.flatten(2, 3)


def _vector(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if t is None or (t.dtype == dtype and t.dim() == 1):
        return t
    return t.to(dtype).reshape(-1)


def _check_batch_norm(
    op: str, input: Tensor, shape: tuple[Any, ...], vectors: dict[str, Tensor | None], training: bool, momentum: Any,
    eps: Any,
) -> None:  # fmt: skip
    """Raises what torch rejects of an input of this shape."""

    def fail(expected: str, error: type[Exception] = ShapeError) -> None:
        listed = ", ".join(f"{k} {tuple(t.shape)} {t.dtype}" for k, t in vectors.items() if t is not None)
        raise error(f"{op}: {expected}; got input {shape} {input.dtype}, {listed or 'no vectors'}")

    for name, value in (("momentum", momentum), ("eps", eps)):
        if not isinstance(value, (int, float, torch.SymFloat)):
            raise TypeError(f"{op}: expected {name} to be a number, got {value!r}")
    if len(shape) < 2:
        fail("expected an input (N, C, ...) of at least 2 dimensions")
    mean, var = vectors["running_mean"], vectors["running_var"]
    if training:
        if eps <= 0:
            fail(f"expected a positive eps in training, not {eps}")
        if math.prod(shape) == shape[1] > 0:
            fail("expected more than 1 value per channel when training")
        if (mean is None) != (var is None):
            fail("expected both running_mean and running_var, or neither")
    elif mean is None or var is None:
        fail("expected running_mean and running_var where training is False")
    dtypes = set()
    for name, t in vectors.items():
        if t is None:
            continue
        dtypes.add(t.dtype)
        if t.numel() != shape[1]:
            fail(f"expected {name} to have C = {shape[1]} elements")
        if t.device != input.device:
            fail(f"expected {name} on {input.device}, not {t.device}", DtypeError)
    allowed = {input.dtype} if input.dtype not in (torch.bfloat16, torch.float16) else {input.dtype, torch.float32}
    if len(dtypes) > 1 or not dtypes <= allowed:
        fail(f"expected all vectors to be {' or all '.join(sorted(map(str, allowed)))}", DtypeError)


def _torch_batch_norm(
    input: Tensor, weight: Any, bias: Any, mean: Any, var: Any, residual: Any, activation: str, training: bool,
    momentum: float, eps: float,
) -> Tensor:  # fmt: skip
    z = torch.nn.functional.batch_norm(input, mean, var, weight, bias, training, momentum, eps)
    return ops.activate(z if residual is None else z + residual, activation)


# ---- conv_bn_act -----------------------------------------------------------------------------------------------------


def conv_bn_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "relu",
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``act(batch_norm(conv2d(input, weight, bias)) + residual)``.

    In evaluation it is one kernel: the convolution applies everything else to its results before they leave for memory.
    In training, and where the gradient of bn_weight is asked for, it is :func:`conv2d` and :func:`batch_norm_act`.

    Args:
        input, weight, bias, stride, padding, dilation, groups: As :func:`conv2d` takes them; the input with its batch.
        running_mean, running_var, bn_weight, bn_bias, training, momentum, eps: As :func:`batch_norm` takes them.
        residual: A tensor of the result's shape and dtype, or None.
        activation: ``"none"``, ``"relu"``, ``"relu6"`` or ``"leaky_relu"`` (slope 0.01).

    Returns:
        (N, K, P, Q).
    """
    tensors = (input, weight, bias, running_mean, running_var, bn_weight, bn_bias, residual)
    if _has_torch_function(*tensors):
        return handle_torch_function(
            conv_bn_act, tensors, *tensors, activation=activation, stride=stride, padding=padding, dilation=dilation,
            groups=groups, training=training, momentum=momentum, eps=eps,
        )  # fmt: skip
    ops.activation_code("conv_bn_act", activation)
    if input.dim() != 4:
        raise ShapeError(f"conv_bn_act: expected a 4-D input (N, C, H, W), got shape {tuple(input.shape)}")
    fused = not (training or _scripting() or _not_ours(input, weight)) and running_mean is not None
    if bn_weight is not None and bn_weight.requires_grad and torch.is_grad_enabled():
        fused = False
    if _any_autocast():
        input, weight, bias = _autocast(input, weight, bias)  # type: ignore[assignment]
    if not fused or (residual is not None and residual.dtype != input.dtype):
        z = conv2d(input, weight, bias, stride, padding, dilation, groups)
        return batch_norm_act(
            z, bn_weight, bn_bias, running_mean, running_var, residual, activation, training, momentum, eps
        )
    stride, dilation = _pair("conv_bn_act", "stride", stride), _pair("conv_bn_act", "dilation", dilation)
    if isinstance(padding, str):
        pad = _named_padding(padding, weight, stride, dilation)
    else:
        h, w = _pair("conv_bn_act", "padding", padding)
        pad = (h, h, w, w)
    vectors = {"weight": bn_weight, "bias": bn_bias, "running_mean": running_mean, "running_var": running_var}
    _check_batch_norm("conv_bn_act", input, (1, weight.shape[0]), vectors, False, momentum, eps)
    wide = dispatch.ACCUMULATORS.get(input.dtype, torch.float32)
    mean, var, gamma, beta = (_vector(t, wide) for t in (running_mean, running_var, bn_weight, bn_bias))
    assert mean is not None
    assert var is not None
    scale = torch.add(var, eps).rsqrt()
    scale = scale if gamma is None else scale * gamma
    shift = -mean * scale if beta is None else torch.addcmul(beta, mean, scale, value=-1)
    params = (stride, pad, dilation, _int("conv_bn_act", "groups", groups), activation)
    return ops.conv_bn_act(input, weight, bias, scale, shift, residual, *params, *_resolve_precision(input.device))
