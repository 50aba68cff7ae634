"""Tensors of any layout inside poisoned buffers, and guarded allocations for what the code under test allocates."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from support import interpreter, process

GUARD = 64  # elements on either side: a multiple of what any kernel wants an address to be aligned to


def _strided(shape: Sequence[int], order: Sequence[int], extra: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor whose dimensions lie in memory in this order (outermost first), each ``extra`` larger."""
    strides, step = [0] * len(shape), 1
    for d in reversed(order):
        strides[d] = step
        step *= max(shape[d], 1) + extra[d]
    return tuple(strides)


NCHW, NHWC = (0, 1, 2, 3), (0, 2, 3, 1)

# layout -> (order in memory, extra size of each dimension, first index in each dimension, expanded dimensions, shift)
LAYOUTS: dict[str, tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int], int]] = {
    "nchw": (NCHW, (0, 0, 0, 0), (0, 0, 0, 0), (), 0),
    "nhwc": (NHWC, (0, 0, 0, 0), (0, 0, 0, 0), (), 0),
    "sliced": (NHWC, (0, 3, 1, 2), (0, 1, 0, 1), (), 0),  # channels, rows and columns of a larger channels_last tensor
    "channels": (NHWC, (0, 8, 0, 0), (0, 8, 0, 0), (), 0),  # the second part of a concatenation, still well aligned
    "sliced_nchw": (NCHW, (0, 2, 1, 2), (0, 1, 1, 1), (), 0),
    "transposed": ((0, 1, 3, 2), (0, 0, 0, 0), (0, 0, 0, 0), (), 0),
    "expanded": (NHWC, (0, 0, 0, 0), (0, 0, 0, 0), (0,), 0),  # along the first dimension
    "expanded_nchw": (NCHW, (0, 0, 0, 0), (0, 0, 0, 0), (0,), 0),
    "expanded_c": (NCHW, (0, 0, 0, 0), (0, 0, 0, 0), (1,), 0),
    "constant": (NCHW, (0, 0, 0, 0), (0, 0, 0, 0), (0, 1, 2, 3), 0),  # what sum() sends back: all strides are 0
    "misaligned": (NHWC, (0, 0, 0, 0), (0, 0, 0, 0), (), 1),
    "misaligned_nchw": (NCHW, (0, 0, 0, 0), (0, 0, 0, 0), (), 1),
}


@dataclasses.dataclass(frozen=True)
class Guarded:
    """A tensor and the buffer of NaNs that it lies in."""

    tensor: torch.Tensor
    buffer: torch.Tensor
    before: torch.Tensor

    def check(self, what: str) -> None:
        """Fails if anything of the buffer, the tensor included, has been written."""
        changed = (bits(self.buffer) != bits(self.before)).nonzero()
        assert not len(changed), (
            f"{what}: an input or its surroundings were written, first at element {int(changed[0])}"
        )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bit patterns, for comparisons that tell NaNs and signed zeros apart."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def place(values: torch.Tensor, layout: str = "nchw", dtype: torch.dtype | None = None, device: str = "cpu") -> Guarded:
    """The values, rounded to dtype, in a layout (four dimensions; others are contiguous), amid NaNs.

    An expanded layout repeats the first of its dimension, so read the values back from the tensor.
    """
    dtype, shape = dtype or values.dtype, values.shape
    order, extra, first, expanded, shift = (
        LAYOUTS[layout] if len(shape) == 4 else (range(len(shape)), *[(0,) * len(shape)] * 2, (), 0)
    )
    base = [1 if d in expanded else n for d, n in enumerate(shape)]
    strides = _strided(base, order, extra)
    span = 1
    for d in range(len(shape)):
        span += (max(base[d], 1) + extra[d] - 1) * strides[d]
    poison = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
    buffer = torch.full((span + 2 * GUARD + shift,), poison, dtype=dtype, device=device)
    offset = GUARD + shift + sum(f * s for f, s in zip(first, strides, strict=True))
    view = buffer.as_strided(base, strides, offset)
    view.copy_(values[tuple(slice(0, n) for n in base)])
    return Guarded(view.expand(shape), buffer, buffer.clone())


class Allocations:
    """What was allocated while guarded_allocations() was active."""

    def __init__(self, ranges: bool = False) -> None:
        self.ranges = ranges
        self._made: list[tuple[torch.Tensor, int]] = []

    def note(self, buffer: torch.Tensor, size: int) -> None:
        """Remembers an allocation of ``size`` bytes inside a buffer; lets an emulated GPU touch just these bytes."""
        self._made.append((buffer, size))
        if self.ranges and size:
            register(buffer[_BAND : _BAND + size], writable=True)

    def check(self, what: str) -> None:
        """Fails if a guard band around any allocation has been written."""
        for buffer, size in self._made:
            written = torch.cat([buffer[:_BAND], buffer[_BAND + size :]]) != _POISON
            if bool(written.any()):
                at = int(written.nonzero()[0])
                where = f"{_BAND - at} bytes before" if at < _BAND else f"{at - _BAND} bytes after"
                raise AssertionError(f"{what}: written {where} an allocation of {size} bytes")


_BAND = 512  # bytes
_POISON = 0xFF  # a NaN in every floating dtype


def register(tensor: torch.Tensor, writable: bool) -> None:
    """Lets kernels on an emulated GPU that checks, or in the interpreter, touch what a tensor spans, and nothing else."""
    if (process.CHECKED or process.INTERPRETED) and tensor.numel():
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        begin, size = tensor.data_ptr(), span * tensor.element_size()
        if process.CHECKED:
            process.cuda.MODULE.register_range(begin, size, writable)
        else:
            interpreter.RANGES.append((begin, begin + size))


@contextlib.contextmanager
def registered(ranges: Sequence[tuple[torch.Tensor | None, bool]]) -> Iterator[None]:
    """Within this context kernels on an emulated GPU that checks, or in the interpreter, may touch only these tensors (writable or not)."""
    for tensor, writable in ranges:
        if tensor is not None:
            register(tensor, writable)
    try:
        yield
    finally:
        if process.CHECKED:
            process.cuda.MODULE.clear_ranges()
        interpreter.RANGES.clear()


@contextlib.contextmanager
def guarded_allocations(ranges: bool = False) -> Iterator[Allocations]:
    """torch.empty and torch.empty_strided give memory full of NaNs between guard bands: results and workspaces alike.

    With ``ranges``, an emulated GPU that checks may touch what is allocated.
    """
    made = Allocations(ranges)
    empty, empty_strided = torch.empty, torch.empty_strided

    def allocate(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: Any) -> torch.Tensor:
        span = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        size = span * dtype.itemsize
        buffer = torch.full((size + 2 * _BAND + -size % 8,), _POISON, dtype=torch.uint8, device=device)
        made.note(buffer, size)
        return buffer[_BAND : _BAND + size + -size % 8].view(dtype).as_strided(shape, strides)

    def guarded_strided(
        size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        if torch.device(device or "cpu").type == "meta":
            return empty_strided(size, stride, dtype=dtype, device=device, **kwargs)
        return allocate(tuple(size), tuple(stride), dtype or torch.get_default_dtype(), device)

    def guarded_empty(*size: Any, dtype: Any = None, device: Any = None, **kwargs: Any) -> torch.Tensor:
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        format = kwargs.pop("memory_format", torch.contiguous_format)
        if torch.device(device or "cpu").type == "meta" or kwargs or any(not isinstance(n, int) for n in shape):
            return empty(shape, dtype=dtype, device=device, memory_format=format, **kwargs)
        strides = empty(shape, device="meta", memory_format=format).stride()
        return allocate(shape, strides, dtype or torch.get_default_dtype(), device)

    with mock.patch.object(torch, "empty", guarded_empty), mock.patch.object(torch, "empty_strided", guarded_strided):
        yield made
