"""A plan runs several kernels in one native call, on every backend that has a native module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import process

from cnnfast import dispatch
from cnnfast.graph import Plan
from cnnfast.ops import conv2d as _conv2d  # noqa: F401  (registers the contract)
from cnnfast.ops.conv2d import problem as conv2d_problem
from cnnfast.ops.max_pool2d import problem as max_pool2d_problem

BACKEND = "cuda" if process.EMULATED else "cpu"
CPU = torch.device("cpu")


def _two_nodes(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> tuple[Plan, Any]:
    plan = Plan(CPU, BACKEND)
    n, _, h, wide = x.shape
    conv = (n, w.shape[0], h, wide)
    pool = (n, w.shape[0], (h + 1) // 2, (wide + 1) // 2)
    given = plan.input(tuple(x.shape), x.dtype)
    p = conv2d_problem("fprop", x.shape, w.shape, conv, x.dtype, CPU, ((1, 1), (1, 1, 1, 1), (1, 1), 1, "fp32"))
    (y,) = plan.node(p, {"x": given, "w": plan.constant(w), "b": plan.constant(b)}, {"y": conv})
    params = ((3, 3), (2, 2), (1, 1), (1, 1), False)
    (z,) = plan.node(max_pool2d_problem("fprop", conv, x.dtype, CPU, params), {"x": y}, {"y": pool})
    plan.finish([z])
    return plan, y


@process.mark_of_this_process
@pytest.mark.skipif(process.INTERPRETED, reason="Triton has no native module: its launches are Python's")
def test_two_nodes_in_one_native_call() -> None:
    x, w, b = torch.randn(2, 5, 9, 8), torch.randn(7, 5, 3, 3), torch.randn(7)
    plan, _ = _two_nodes(x, w, b)
    assert len(plan) == 2

    calls = []
    native = plan._native

    class Counting:
        workspace = native.workspace

        def run(self, *args: Any) -> None:
            calls.append(args)
            native.run(*args)

    plan._native = Counting()
    (out,) = plan(x)
    assert len(calls) == 1
    torch.testing.assert_close(out, F.max_pool2d(F.conv2d(x, w, b, padding=1), 3, 2, 1), rtol=1e-4, atol=1e-5)
    w.mul_(2)  # a constant isn't copied
    torch.testing.assert_close(plan(x)[0], F.max_pool2d(F.conv2d(x, w, b, padding=1), 3, 2, 1), rtol=1e-4, atol=1e-5)
    assert torch.isfinite(out).all(), "a result is the caller's: later runs don't touch it"


@process.mark_of_this_process
@pytest.mark.skipif(process.INTERPRETED, reason="Triton has no native module: its launches are Python's")
def test_what_a_plan_refuses() -> None:
    x, w, b = torch.randn(2, 5, 9, 8), torch.randn(7, 5, 3, 3), torch.randn(7)
    plan, _ = _two_nodes(x, w, b)
    with pytest.raises(ValueError, match="the plan was made for"):
        plan(x[:1])
    with pytest.raises(ValueError, match="takes 1 tensors"):
        plan(x, x)
    with pytest.raises(NotImplementedError, match="at least one node"):
        Plan(CPU).finish([])
    aten = Plan(CPU, "aten")
    p = max_pool2d_problem("fprop", (1, 2, 4, 4), torch.float32, CPU, ((2, 2), (2, 2), (0, 0), (1, 1), False))
    with pytest.raises(NotImplementedError):
        aten.node(p, {"x": aten.input((1, 2, 4, 4), torch.float32)}, {"y": (1, 2, 2, 2)})


@process.mark_of_this_process
@pytest.mark.skipif(process.INTERPRETED, reason="Triton has no native module: its launches are Python's")
def test_arena_is_used_again() -> None:
    """A chain of six poolings needs the room of two of its values."""
    plan = Plan(CPU, BACKEND)
    value = plan.input((1, 16, 20, 20), torch.float32)
    params = ((3, 3), (1, 1), (1, 1), (1, 1), False)
    for _ in range(6):
        (value,) = plan.node(
            max_pool2d_problem("fprop", (1, 16, 20, 20), torch.float32, CPU, params),
            {"x": value},
            {"y": (1, 16, 20, 20)},
        )
    plan.finish([value])
    assert plan.arena_bytes <= 2 * (16 * 20 * 20 * 4 + 256)
    x = torch.randn(1, 16, 20, 20)
    expected = x
    for _ in range(6):
        expected = F.max_pool2d(expected, 3, 1, 1)
    assert torch.equal(plan(x)[0], expected)
    assert dispatch.backends()[BACKEND].plan is not None
