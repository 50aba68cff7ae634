"""Process-wide settings, like torch's own flags: which backend serves, how precisely, and whether ATen may help.

They are plain module state, read once in :mod:`cnnfast.functional` and passed on as arguments of the operators. Nothing
below the operators reads them: a compiled graph holds the values it was traced with, and Dynamo guards on them.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

AUTO = "auto"
PRECISIONS = ("ieee", "fp32", "high")

# The one mutable state: (backend, precision, strict). A tuple, so that it is read at once and can be part of a key.
_state: tuple[str, str | None, bool] = (AUTO, None, False)
# Not None while somebody watches selections (explain): the hot path then takes the long way.
_observer: list[object] | None = None


def state() -> tuple[str, str | None, bool]:
    """The current (backend, precision, strict)."""
    return _state


@contextlib.contextmanager
def _setting(index: int, value: object) -> Iterator[None]:
    global _state
    before = _state
    _state = (*before[:index], value, *before[index + 1 :])  # type: ignore[assignment]
    try:
        yield
    finally:
        _state = before


def backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Within this context only the named backend serves, or a ``NotImplementedError`` says why it can't.

    Args:
        name: ``"auto"`` (the default: the first that fits, ATen last), ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"aten"``;
            or, to pin one kernel, its full name as ``explain`` prints it, or the head of it
            (``"cpu.conv2d_implicit_gemm"``, ``"cpu.conv2d_direct.avx2"``). Operations, and directions of one (a backward),
            that have no kernel of that stem are then served by any kernel of the same backend.

    The setting is process-wide: it holds for every thread.
    """
    if not isinstance(name, str) or name.split(".")[0] not in (AUTO, "cpu", "cuda", "triton", "aten"):
        raise ValueError(f"backend: expected 'auto', 'cpu', 'cuda', 'triton', 'aten' or a kernel's name, got {name!r}")
    return _setting(0, name)


def precision(mode: str | None) -> contextlib.AbstractContextManager[None]:
    """Within this context convolutions keep the named accuracy.

    Args:
        mode: ``None``: fp32 on a CPU; on CUDA ``"high"`` where torch's own convolution setting allows tf32, else
            ``"fp32"``. ``"ieee"``: fp32 multiply-adds only, in any order. ``"fp32"``: any algorithm whose error against
            float64 stays within 3 times torch's own fp32 error. ``"high"``: tf32-grade. bf16 and fp16 tensors
            accumulate in fp32 in every mode.
    """
    if mode is not None and mode not in PRECISIONS:
        raise ValueError(f"precision: expected None or one of {PRECISIONS}, got {mode!r}")
    return _setting(1, mode)


def strict(enabled: bool = True) -> contextlib.AbstractContextManager[None]:
    """Within this context ATen never serves: what no kernel of ours covers is a ``NotImplementedError`` with reasons."""
    return _setting(2, bool(enabled))


@contextlib.contextmanager
def observe() -> Iterator[list[object]]:
    """Collects every selection made within this context, in order of the calls (see :mod:`cnnfast.dispatch`)."""
    global _observer
    before, _observer = _observer, []
    try:
        yield _observer
    finally:
        _observer = before


def note(event: object) -> None:
    """Appends an event for whoever observes."""
    if _observer is not None:
        _observer.append(event)


def warn_once(message: str) -> None:
    """A warning with one text is shown once a process (the default filter's rule, kept under custom filters, too)."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


_warned: set[str] = set()
