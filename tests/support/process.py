"""What this process can run: the CPU's kernels, the emulated GPU's, the interpreter's, or a card's.

A process is one of them by its environment (see cnnfast.backends): CNNFAST_EMULATE_CUDA=1, or TRITON_INTERPRET=1, or
neither of them.
"""

from __future__ import annotations

import os
import zlib
from typing import Any

import pytest
import torch

from cnnfast import dispatch
from cnnfast.backends import cuda, triton
from support import interpreter

FULL = os.environ.get("CNNFAST_TEST_FULL", "") not in ("", "0")
SEED = int(os.environ.get("CNNFAST_TEST_SEED", "0"))
# random calls of each operation: 5,000 in all in make test, 100,000 in make fuzz
FUZZ_CALLS = int(os.environ.get("CNNFAST_FUZZ_CALLS", "7000" if FULL else "700"))
EMULATED, INTERPRETED = cuda.EMULATED, triton.INTERPRETED
if INTERPRETED:
    interpreter.quicken()
GPU = torch.cuda.is_available()
# The check variant of the emulation knows every byte that a kernel may touch.
CHECKED = EMULATED and cuda.MODULE is not None and cuda.MODULE.device().get("checked") == "yes"
SCHEDULES = tuple((order, lazy) for order in ("ascending", "descending", "random") for lazy in (False, True))

PROCESSORS = (132, 1)  # with one, kernels choose the tiles that they choose for large problems


def not_here(implementation: dispatch.Implementation) -> str:
    """Why this process can't run an implementation; empty where it can."""
    backend = implementation.backend
    if backend == "aten":
        return "torch itself"
    if EMULATED or INTERPRETED:
        own = "cuda" if EMULATED else "triton"
        how = "emulated GPU" if EMULATED else "interpreter"
        return "" if backend == own else f"this process runs the {how}'s kernels"
    if backend == "cpu":
        return ""
    return "" if GPU else "no NVIDIA GPU on this machine (emulation and interpreter have processes of their own)"


def device(implementation: dispatch.Implementation) -> str:
    """The device of the tensors that an implementation takes in this process."""
    return "cuda" if implementation.backend in ("cuda", "triton") and not (EMULATED or INTERPRETED) else "cpu"


def marks(implementation: dispatch.Implementation) -> list[Any]:
    """The pytest marks of an implementation's tests."""
    if implementation.backend == "cpu":
        return []
    if EMULATED or INTERPRETED:
        return [pytest.mark.emulated if EMULATED else pytest.mark.interpreter]
    return [pytest.mark.gpu]


def mark_of_this_process(test: Any) -> Any:
    """Marks a test so that it runs in whatever process this is."""
    if EMULATED or INTERPRETED:
        return (pytest.mark.emulated if EMULATED else pytest.mark.interpreter)(test)
    return test


def stable_hash(*parts: object) -> int:
    """A hash that every process agrees on; CNNFAST_TEST_SEED turns the wheel."""
    return zlib.crc32("|".join(map(str, (*parts, SEED))).encode())


def schedule(*parts: object) -> str:
    """On the emulated GPU: the order of threads, the time of asynchronous copies, the processors; returns their name."""
    if not EMULATED or cuda.MODULE is None:
        return ""
    number = stable_hash(*parts)
    order, lazy = SCHEDULES[number % len(SCHEDULES)]
    processors = PROCESSORS[number // len(SCHEDULES) % len(PROCESSORS)]
    cuda.MODULE.configure(order=order, seed=number % 1000, lazy_async=lazy, processors=processors)
    return f"{order}, {'late' if lazy else 'early'} copies, seed {number % 1000}, {processors} processors"
