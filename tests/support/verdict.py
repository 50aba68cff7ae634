"""Whether a function of ours and torch's come to the same verdict on a call, valid or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


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
