"""Triton's interpreter without work that it does again and again: a third of its time, none of what it checks."""

from __future__ import annotations

import contextlib
import functools
import types
from typing import Any


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
