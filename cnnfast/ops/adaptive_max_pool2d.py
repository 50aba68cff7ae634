"""The contract of adaptive_max_pool2d: schema, validation, output shape and strides, derivatives.

    y[n,c,p,q] = max of x[n,c,h,w] over floor(p*H / P) <= h < ceil((p+1)*H / P), and w alike

The first of equal elements is the maximum; a window with NaNs gives NaN, its last NaN being the maximum (as in torch).
Operators: :mod:`cnnfast.ops._maximum`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cnnfast import dispatch
from cnnfast.dispatch import DTYPES
from cnnfast.ops import _maximum
from cnnfast.ops._operator import capability
from cnnfast.ops.adaptive_avg_pool2d import check, output_shape, sizes_of


def validate(x: Any, geometry: Sequence[Any]) -> None:
    """Raises what torch rejects."""
    check("adaptive_max_pool2d", x.shape, x.dtype, geometry[0])


def problem(
    direction: str, x: Any, dtype: torch.dtype, device: torch.device, geometry: Sequence[Any],
    layouts: tuple[tuple[str, str], ...] = (),
) -> dispatch.Problem:  # fmt: skip
    """The problem of a call, from the input's shape (N, C, H, W)."""
    return dispatch.Problem(
        op="adaptive_max_pool2d", direction=direction, dtype=DTYPES[dtype], device=device.type, precision="ieee",
        sizes=sizes_of(x, geometry[0]), layouts=layouts, capability=capability(device),
        bytes=_maximum.moved(direction, x, output_shape(x, geometry), dtype),
    )  # fmt: skip


(
    adaptive_max_pool2d,
    adaptive_max_pool2d_indices,
    adaptive_max_pool2d_dgrad,
    adaptive_max_pool2d_jvp,
    adaptive_max_pool2d_recorded,
) = _maximum.operators("adaptive_max_pool2d", "SymInt[2] output_size", validate, output_shape, problem)


def adaptive_max_pool2d_records(x: Any, params: Sequence[Any], backend: str) -> bool:
    """Whether a call of x, (N, C, H, W), goes to ``adaptive_max_pool2d_recorded``."""
    (h, w), (p, q) = x.shape[-2:], params[0]
    return _maximum.records("adaptive_max_pool2d", x, backend, lambda: _most(h, p) * _most(w, q))


def _most(size: Any, outputs: Any) -> Any:
    """The elements of a window along an axis, or, where there are several windows, one more.

    To ask whether all are alike, or for several, would guard a compiled graph: 2 * (n - 1) // n is 0 for one, else 1.
    """
    return -(-size // outputs) + 2 * (outputs - 1) // outputs if outputs else _maximum.MOST_TAPS + 1
