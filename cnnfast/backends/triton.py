"""The Triton backend: kernels for CUDA tensors that need no compiler on the user's machine.

With ``TRITON_INTERPRET=1`` (read by Triton at import) the kernels are interpreted and ``backend("triton")`` takes CPU
tensors, through the same registrations.
"""

from __future__ import annotations

import importlib
import os
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cnnfast.dispatch import DTYPES, Backend, Implementation, Kernel, Problem

INTERPRETED = os.environ.get("TRITON_INTERPRET", "") not in ("", "0")

# kernel module -> (operation, capability, predicted seconds); in the order of preference
RULES: dict[str, tuple[str, Callable[[Problem], list[str]], Callable[[Problem], float]]] = {
    "conv2d_implicit_gemm": ("conv2d", lambda p: [], lambda p: 8e-6 + p.flops / 5e13),
}


def _implementations() -> tuple[list[Implementation], str]:
    found: list[Implementation] = []
    for stem, (op, unsupported, cost) in RULES.items():
        try:
            module = importlib.import_module(f"cnnfast.kernels.{stem}")
        except ImportError as error:
            return [], f"Triton kernels can't be imported: {error}"
        for direction, launcher in module.KERNELS.items():
            found.append(
                Implementation(
                    name=f"triton.{stem}", op=op, backend="triton", stem=stem, direction=direction,
                    dtypes=tuple(DTYPES[t] for t in module.DTYPES), unsupported=unsupported, bind=_binder(launcher, module), cost=cost,
                )  # fmt: skip
            )
    return found, ""


def _binder(launcher: Callable[..., None], module: Any) -> Callable[[Problem, Mapping[str, int]], Kernel]:
    def bind(problem: Problem, fields: Mapping[str, int]) -> Kernel:
        p = types.SimpleNamespace(**fields, precision=problem.precision, capability=problem.capability)

        def launch(operands: Sequence[Any]) -> None:
            launcher(p, *operands)

        return launch

    return bind


IMPLEMENTATIONS, ABSENT = _implementations()


def _unavailable(problem: Problem) -> list[str]:
    if ABSENT:
        return [ABSENT]
    expected = "cpu" if INTERPRETED else "cuda"
    if problem.device == expected:
        return []
    return [f"serves {'CPU tensors (interpreted)' if INTERPRETED else 'CUDA tensors'}, not {problem.device}"]


def _status() -> str:
    if ABSENT:
        return ABSENT
    import triton

    return f"triton {triton.__version__}{', interpreted (TRITON_INTERPRET)' if INTERPRETED else ''}"


BACKEND = Backend(
    name="triton",
    unavailable=_unavailable,
    implementations=IMPLEMENTATIONS,
    automatic=lambda problem: problem.device == "cuda" and not INTERPRETED,
    status=_status,
)
