"""The tests of kernels find what they are there to find: kernels with planted faults, each of which must fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import test_kernels
import torch
from cases import conv2d
from support import oracle, process

from cnnfast import dispatch

pytestmark = pytest.mark.skipif(
    process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it"
)

CASE = conv2d.Case("the harness's own", 2, 8, 6, 6, 16, 3, 3, padding=(1, 1), bias=True)
Fault = Callable[[Sequence[Any], torch.Tensor], None]


def _beyond(t: torch.Tensor, element: int) -> torch.Tensor:
    """One element outside a tensor, or inside: as a kernel's pointer would reach it."""
    raw = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return raw[t.storage_offset() + element]


def _count(calls: list[int]) -> int:
    calls[0] += 1
    return calls[0]


def _faults() -> dict[str, tuple[Fault, str]]:
    calls = [0]
    return {
        "none": (lambda o, y: None, ""),
        "a wrong element": (lambda o, y: y[1, 3, 2, 4].add_(0.01), r"error .* worst at \(1, 3, 2, 4\)"),
        "an element left out": (lambda o, y: y[0, 15, 5, 5].fill_(float("nan")), "error nan"),
        "an element of another image": (lambda o, y: y[0, 0, 0, 0].copy_(y[1, 0, 0, 0]), r"worst at \(0, 0, 0, 0\)"),
        "small errors everywhere": (lambda o, y: y.mul_(1 + 3e-6), "error"),
        "a write before the result": (lambda o, y: _beyond(y, -1).fill_(0), "bytes before an allocation"),
        "a write behind the result": (lambda o, y: _beyond(y, y.numel()).fill_(0), "bytes after an allocation"),
        "a write into an input": (lambda o, y: _beyond(o[0], 5).fill_(0), "x: an input or its surroundings"),
        "a write behind an input": (lambda o, y: _beyond(o[1], o[1].numel()).fill_(0), "w: an input or its"),
        "a read behind an input": (lambda o, y: y[0, 0, 0, 0].add_(_beyond(o[0], o[0].numel()) * 0), "error nan"),
        "another result each time": (
            lambda o, y: y[0, 1].copy_(torch.nextafter(y[0, 1], torch.tensor(9e9))) if _count(calls) % 2 else None,
            "differ between two runs",
        ),
    }  # fmt: skip


def _plant(monkeypatch: pytest.MonkeyPatch, fault: Fault, keep_nan: bool = True) -> dispatch.Implementation:
    """A CPU backend whose one kernel is torch's convolution with a fault."""

    def bind(problem: dispatch.Problem, fields: Mapping[str, int]) -> dispatch.Kernel:
        def kernel(operands: Sequence[Any]) -> None:
            x, w, b, y = operands
            out = torch.nn.functional.conv2d(x, w, b, padding=1)
            y.copy_(out if keep_nan else torch.nan_to_num(out))
            fault(operands, y)

        return kernel

    planted = dispatch.Implementation(
        "cpu.conv2d_planted", "conv2d", "cpu", "conv2d_planted", "fprop", ("f32",), lambda p: [], bind,
        layouts={"x": "nhwc", "y": "nhwc"},
    )  # fmt: skip
    monkeypatch.setitem(dispatch._backends, "cpu", dispatch.Backend("cpu", lambda p: [], [planted]))
    return planted


class _Request:
    class node:
        nodeid = "planted"


@pytest.mark.parametrize("name", _faults())
def test_planted_fault_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, message = _faults()[name]
    planted = _plant(monkeypatch, fault)
    monkeypatch.setattr(test_kernels, "RAN", set())
    arguments: tuple[Any, ...] = ("conv2d", planted, "fprop", "f32", "fp32", CASE)
    if not message:
        test_kernels.test_kernel(*arguments, _Request)
        return
    with pytest.raises(AssertionError, match=message) as raised:
        test_kernels.test_kernel(*arguments, _Request)
    assert CASE.why in str(raised.value)


def test_lost_nan_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: tuple[Any, ...] = ("conv2d", _plant(monkeypatch, lambda o, y: None), "fprop", "f32", "fp32", CASE)
    test_kernels.test_nonfinite(*arguments)
    arguments = ("conv2d", _plant(monkeypatch, lambda o, y: None, keep_nan=False), "fprop", "f32", "fp32", CASE)
    with pytest.raises(AssertionError, match="NaN, infinite or finite where torch's aren't"):
        test_kernels.test_nonfinite(*arguments)


def test_write_beside_a_slice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With free strides the result lies in a slice; what stands beside it stays."""
    import dataclasses

    for fault, bad in ((lambda o, y: None, False), (lambda o, y: _beyond(y, 16).fill_(0), True)):
        planted = dataclasses.replace(_plant(monkeypatch, fault), layouts={})
        arguments: tuple[Any, ...] = ("conv2d", planted, "fprop", "f32", "fp32", CASE)
        if not bad:
            test_kernels.test_result_in_a_slice(*arguments)
            continue
        with pytest.raises(AssertionError, match="beside the result were written"):
            test_kernels.test_result_in_a_slice(*arguments)


def test_oracle_takes_torch_and_rejects_more() -> None:
    """torch's own result always passes; the modes differ by what they allow."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = {r: g.tensor for r, g in conv2d.inputs(CASE, "fprop", dtype).items()}
        wide = {r: t.double() for r, t in given.items()}
        own, ref = conv2d.reference(CASE, "fprop", given), conv2d.reference(CASE, "fprop", wide)
        magnitude = conv2d.magnitude(CASE, "fprop", wide)
        oracle.check("torch", own, ref, own, magnitude)
        with pytest.raises(AssertionError, match="shape"):
            oracle.check("cut", own[:1], ref, own, magnitude)
        with pytest.raises(AssertionError, match="dtype"):
            oracle.check("wide", own.double(), ref, own, magnitude)
    given = {r: g.tensor for r, g in conv2d.inputs(CASE, "fprop", torch.float32).items()}
    wide = {r: t.double() for r, t in given.items()}
    rounded = {r: (t.view(torch.int32) & -(1 << 13)).view(torch.float32) if r != "b" else t for r, t in given.items()}
    ref, own = conv2d.reference(CASE, "fprop", wide), conv2d.reference(CASE, "fprop", given)
    tf32, magnitude = conv2d.reference(CASE, "fprop", rounded), conv2d.magnitude(CASE, "fprop", wide)
    oracle.check("tf32", tf32, ref, own, magnitude, precision="high")
    for mode in ("fp32", "ieee"):
        with pytest.raises(AssertionError, match="error"):
            oracle.check("tf32", tf32, ref, own, magnitude, precision=mode, depth=72)


def test_every_layout_is_what_it_says() -> None:
    """The layouts of the cases: values survive, guards surround, strides are as named."""
    from support.memory import LAYOUTS, place

    values = torch.randn(3, 5, 4, 6, dtype=torch.float64)
    for name, (_, _, _, expanded, shift) in LAYOUTS.items():
        placed = place(values, name, torch.float32)
        t = placed.tensor
        assert tuple(t.shape) == (3, 5, 4, 6)
        assert not t.isnan().any(), name
        assert all(t.stride(d) == 0 for d in expanded), name
        assert (t.data_ptr() % 64 != 0) or not shift, name
        if not expanded:
            assert torch.equal(t, values.float()), name
        placed.check(name)
    assert place(values, "nhwc").tensor.is_contiguous(memory_format=torch.channels_last)
    assert place(values, "sliced").tensor.stride(1) == 1
    assert not place(values, "sliced").tensor.is_contiguous(memory_format=torch.channels_last)
