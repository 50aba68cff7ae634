"""Weights packed beforehand: the same bits as weights that come as they are, for every kernel that offers it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cases import conv2d
from support import process
from support.memory import bits, guarded_allocations

from cnnfast import dispatch
from cnnfast.dispatch import TORCH_DTYPES, Implementation
from cnnfast.graph import Plan

KERNELS = [i for i in dispatch.implementations() if i.prepare is not None and not process.not_here(i)]
SHARE = 3  # one case in so many of a kernel and dtype, unless everything runs


def _parameters() -> list[Any]:
    return [
        pytest.param(i, dtype, case, id=f"{i.name}-{i.direction}-{dtype}-{case}", marks=process.marks(i))
        for i, dtype, case in itertools.product(KERNELS, sorted(TORCH_DTYPES), conv2d.CASES)
        if i.op == conv2d.OP
        and (process.FULL or process.stable_hash(i.name, i.direction, dtype, case) % SHARE == 0)
        and not dispatch.reasons_against(
            i, conv2d.problem(case, i.direction, TORCH_DTYPES[dtype], "fp32", process.device(i))
        )
        and case.N
    ]


def _dtype(i: Implementation) -> torch.dtype:
    """One that a kernel has."""
    return torch.float32 if "f32" in i.dtypes else TORCH_DTYPES[i.dtypes[0]]


def _plan(i: Implementation, case: Any, dtype: torch.dtype, t: dict[str, torch.Tensor], frozen: bool) -> Plan:
    plan = Plan(torch.device("cpu"), i.name)
    inputs: dict[str, Any] = {"x": plan.input(case.shapes["x"], dtype)}
    inputs["w"] = plan.constant(t["w"], frozen)
    inputs["b"] = plan.constant(t["b"].contiguous(), frozen) if "b" in t else None
    plan.finish(plan.node(conv2d.problem(case, i.direction, dtype, "fp32"), inputs, {"y": case.shapes["y"]}))
    return plan


@pytest.mark.parametrize(("implementation", "dtype", "case"), _parameters())
def test_packed_is_unpacked(implementation: Implementation, dtype: str, case: Any) -> None:
    t = {r: g.tensor for r, g in conv2d.inputs(case, "fprop", TORCH_DTYPES[dtype]).items()}
    with guarded_allocations() as allocations:
        packed = _plan(implementation, case, TORCH_DTYPES[dtype], t, True)
    allocations.check(f"{implementation.name} packs {case} ({case.why})")
    plain = _plan(implementation, case, TORCH_DTYPES[dtype], t, False)
    assert packed._holds
    before = torch.get_num_threads()
    try:
        for threads in (before, 1, 3):
            torch.set_num_threads(threads)
            assert bool((bits(packed(t["x"])[0]) == bits(plain(t["x"])[0])).all()), f"{case} ({case.why})"
    finally:
        torch.set_num_threads(before)


def _served(implementation: Implementation, dtype: torch.dtype) -> Any:
    """A case that the kernel serves, with the size of filter and the stride that it has, padded to the size of the map."""
    sizes = itertools.product(
        ((3, 3), (5, 5), (1, 7), (1, 3)), ((33, 35, 1), (64, 35, 1), (40, 40, 5), (40, 40, 10)), (1, 2)
    )
    for (r, s), (c, k, groups), stride in sizes:
        case = conv2d.Case("", 1, c, 27, 25, k, r, s, (stride, stride), (r // 2, s // 2), groups=groups, bias=True)
        if not dispatch.reasons_against(implementation, conv2d.problem(case, "fprop", dtype, "fp32")):
            return case
    raise AssertionError(f"{implementation.name} serves none of these sizes")


@pytest.mark.parametrize("implementation", [i for i in KERNELS if i.op == conv2d.OP], ids=lambda i: i.name)
def test_packed_weights_that_are_not_finite(implementation: Implementation) -> None:
    """Padding contributes nothing, whoever packed the weights."""
    dtype = _dtype(implementation)
    case = _served(implementation, dtype)
    t = {r: g.tensor for r, g in conv2d.inputs(case, "fprop", dtype).items()}
    t["w"][3, 3, 0, case.S // 2 if case.R > 1 else 0], t["w"][34, 1, -1, -1] = float("inf"), float("nan")
    packed = _plan(implementation, case, dtype, t, True)(t["x"])[0]
    plain = _plan(implementation, case, dtype, t, False)(t["x"])[0]
    torch.testing.assert_close(packed, plain, rtol=0, atol=0, equal_nan=True)
    along, padding = (1, case.R // 2) if case.R > 1 else (2, case.S // 2)
    outside, inside = packed[:, 3].split([padding, packed.shape[1 + along] - padding], along)
    assert bool(torch.isfinite(outside).all()), "the tap lies in the padding there"
    assert not bool(torch.isfinite(inside).all())


def test_only_frozen_constants_are_packed() -> None:
    """An ordinary constant is seen as it is when the plan runs; one that isn't frozen keeps the others from being packed."""
    if not KERNELS:
        pytest.skip("no kernel here packs anything")
    case = conv2d.Case("", 1, 8, 9, 9, 8, 3, 3, padding=(1, 1), bias=True)
    t = {r: g.tensor for r, g in conv2d.inputs(case, "fprop", torch.float32).items()}
    for frozen in ((True, False), (False, True), (False, False)):
        plan = Plan(torch.device("cpu"), "cpu.conv2d_implicit_gemm")
        w, b = (plan.constant(t[r], f) for r, f in zip("wb", frozen, strict=True))
        x = plan.input(case.shapes["x"], torch.float32)
        problem = conv2d.problem(case, "fprop", torch.float32, "fp32")
        plan.finish(plan.node(problem, {"x": x, "w": w, "b": b}, {"y": case.shapes["y"]}))
        assert not plan._holds
        first = plan(t["x"])[0]
        t["w"].neg_(), t["b"].neg_()
        assert torch.equal(plan(t["x"])[0], -first)


@pytest.mark.parametrize("implementation", [i for i in KERNELS if i.op == conv2d.OP], ids=lambda i: i.name)
def test_the_packed_form_is_what_the_kernel_reads(implementation: Implementation) -> None:
    """Equal bits alone would also come of a kernel that ignores what was packed: here the weights are gone."""
    dtype = _dtype(implementation)
    case = _served(implementation, dtype)
    t = {r: g.tensor for r, g in conv2d.inputs(case, "fprop", dtype).items()}
    plan = _plan(implementation, case, dtype, t, True)
    before = plan(t["x"])[0].clone()
    t["w"].zero_()
    assert torch.equal(plan(t["x"])[0], before)
    assert bool(before.any())


@pytest.mark.parametrize(("implementation", "dtype", "case"), _parameters())
def test_unpacked_is_what_was_packed(implementation: Implementation, dtype: str, case: Any) -> None:
    """Bit by bit, wherever a kernel says that it needs the packed form alone."""
    t = {r: g.tensor for r, g in conv2d.inputs(case, "fprop", TORCH_DTYPES[dtype]).items()}
    problem = conv2d.problem(case, implementation.direction, TORCH_DTYPES[dtype], "fp32")
    w, b = t["w"], t["b"].contiguous() if "b" in t else None
    assert implementation.prepare is not None
    strides = {"x": dispatch.channels_last_strides(t["x"].shape), "w": w.stride(), "y": (0,) * 4}
    packing = implementation.prepare(problem, dispatch.parameters(problem, strides))
    if packing.unpack is None:
        pytest.skip("reads the weights, too")
    packed = packing.pack([None, w, b])
    assert packed.numel() == packing.bytes
    if w.untyped_storage().nbytes() < w.numel() * w.itemsize:
        w = w.contiguous()  # an expanded weight can't be written
        strides["w"] = w.stride()
        packing = implementation.prepare(problem, dispatch.parameters(problem, strides))
        assert packing.unpack is not None
    out = torch.empty_strided(w.shape, w.stride(), dtype=w.dtype).fill_(7)
    packing.unpack(packed, [None, out])
    assert bool((bits(out) == bits(w)).all()), f"{case} ({case.why})"
