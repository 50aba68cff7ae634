"""Triton's interpreter: without work that it does again and again, a third of its time; and with bounds where tests ask."""

from __future__ import annotations

import contextlib
import functools
import types
from typing import Any

import numpy as np

RANGES: list[tuple[int, int]] = []  # (begin, end) of the bytes that kernels may touch; empty: all of them


def _check(pointers: Any, mask: Any, itemsize: int) -> None:
    """Fails where one of the masked addresses lies beyond all ranges. (Of guard bands a read would leave no trace.)"""
    if RANGES:
        active = np.asarray(mask).astype(bool)
        touched = np.broadcast_to(np.asarray(pointers), active.shape)[active].astype(np.int64)
        inside = np.zeros(touched.shape, dtype=bool)
        for begin, end in RANGES:
            inside |= (touched >= begin) & (touched + itemsize <= end)
        assert inside.all(), f"out of bounds: {int((~inside).sum())} of {inside.size} elements of a load or a store"


def quicken() -> None:
    """Once a process. Where an interpreter is built otherwise it stays as it is.

    Every call of a helper searches triton.language for functions to replace, which the kernel's launch has replaced before;
    every operation builds a table of dtypes anew.
    """
    with contextlib.suppress(ImportError, AttributeError):
        import triton.language as tl
        from triton.runtime import interpreter

        patch, scalar = interpreter._patch_lang, functools.cache(interpreter._get_np_dtype)
        nothing = types.SimpleNamespace(restore=lambda: None)

        def patch_once(fn: Any) -> Any:
            seen = [module for module in fn.__globals__.values() if module is tl or module is tl.core]
            return patch(fn) if any(tl.core.is_builtin(module.load) for module in (tl, *seen)) else nothing

        def dtype(of: Any) -> Any:
            of = of.element_ty if isinstance(of, tl.block_type) else of
            return scalar(tl.uint64 if isinstance(of, tl.pointer_type) else of)

        interpreter._get_np_dtype, interpreter._patch_lang = dtype, patch_once
        builder = interpreter.InterpreterBuilder
        load, store = builder.create_masked_load, builder.create_masked_store

        def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
            _check(pointers.data, mask.data, np.dtype(dtype(pointers.get_element_ty())).itemsize)
            return load(self, pointers, mask, *rest, **named)

        def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
            _check(pointers.data, mask.data, value.data.itemsize)
            return store(self, pointers, value, mask, *rest, **named)

        builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
