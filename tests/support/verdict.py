"""Whether a function of ours and torch's come to the same verdict on a call, valid or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from support import oracle


def outcome(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result, or the error that was raised."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return error


def same(
    function: Callable[..., Any], torchs: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Both accept with equal shape, strides, dtype and values, or both reject with related classes."""
    theirs, ours = outcome(torchs, args, kwargs), outcome(function, args, kwargs)
    if isinstance(theirs, Exception):
        assert isinstance(ours, Exception), f"torch rejects ({str(theirs)[:200]}), cnnfast gives {tuple(ours.shape)}"
        assert isinstance(ours, (ValueError, TypeError, NotImplementedError, RuntimeError)), repr(ours)
        assert isinstance(ours, (type(theirs), ValueError, TypeError)), f"{theirs!r} became {ours!r}"
        return ours
    if isinstance(ours, Exception):
        raise AssertionError(f"torch accepts and gives {tuple(theirs.shape)}, cnnfast: {ours}") from ours
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    if theirs.layout is torch.strided:
        assert ours.stride() == theirs.stride(), f"strides {ours.stride()}, torch {theirs.stride()}"
    torch.testing.assert_close(ours, theirs)
    return ours


def with_gradients(function: Callable[..., Any], operands: Sequence[Any], kwargs: dict[str, Any], g: Any) -> Any:
    """The result and the gradients of the operands (those that aren't None), g(result) being its own; or the error."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in operands]
    y = outcome(function, tuple(leaves), kwargs)
    if isinstance(y, Exception):
        return y
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], g(y))]


def check_convolution(
    call: str, torchs: Callable[..., Any], ours: Sequence[torch.Tensor], operands: Sequence[Any],
    kwargs: dict[str, Any], g: torch.Tensor,
) -> None:  # fmt: skip
    """That ours, made by :func:`with_gradients` with the gradient g, are sums of products as float64 has them.

    Not as torch has them: 2.14 leaves gradients of some transposed convolutions uninitialised. The same function of
    absolute values gives the sums of absolute products, and of ones their number.
    """
    if not ours[0].numel():  # which torch's float64 rejects
        assert not any(bool(t.any()) for t in ours), f"{call}: gradients of nothing"
        return
    wide = [None if t is None else t.double().contiguous() for t in operands]
    versions = []
    for change in (lambda t: t, torch.abs, torch.ones_like):
        changed = [None if t is None else change(t) for t in wide]
        made = with_gradients(torchs, changed, kwargs, lambda y, change=change: change(g.double()))
        assert not isinstance(made, Exception), f"{call}: torch's float64 raises {made}"
        versions.append(made)
    for what, out, ref, magnitude, terms in zip(("result", "dx", "dw", "db"), ours, *versions):  # noqa: B905 (no db)
        assert out.shape == ref.shape, f"{call}: {what} of shape {tuple(out.shape)}, torch {tuple(ref.shape)}"
        oracle.check_sums(f"{call}: {what}", out, ref, magnitude, terms)
