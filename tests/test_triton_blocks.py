"""The Triton kernels that memory bounds, without a launch: the blocks that their launchers select are those that make static
compiles, none beside them and none for nothing. (Those of products: test_tuning.py.)"""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from support import process, static

from cnnfast.kernels import (
    _common,
    _maximum,
    _windows,
    adaptive_avg_pool2d,
    adaptive_max_pool2d,
    add_act,
    avg_pool2d,
    batch_norm,
    max_pool2d,
)

pytestmark = pytest.mark.skipif(
    process.EMULATED or process.INTERPRETED, reason="looks at launches only, whose blocks the interpreter has larger"
)
MODES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
NAMES = ("TAPS", "BLOCK_M", "BLOCK_T", "BLOCK_PHASE", "BLOCK_N", "BLOCK_S", "BLOCK_C")
COLLECT = ("_merge_stats", "_add_sums")  # of fp64 and fp32, whatever is normed
CHANNELS = (1, 3, 4, 8, 16, 24, 32, 48, 64, 80, 195, 2048)
WINDOWS = ((1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (5, 5))
FAR = 2**31  # an image's stride that takes offsets of 64 bits


def blocks(fn: Any, mode: str, constants: dict[str, Any], num_warps: int) -> tuple[Any, ...]:
    """What tells two compilations of a call apart."""
    name = fn.__name__
    return name, "" if name in COLLECT else mode, num_warps, *((n, constants[n]) for n in NAMES if n in constants)


def problems(far: bool, images: int, side: int, window: tuple[int, int], stride: int) -> Iterator[Any]:
    """One for each number of channels, with the fields that any of these kernels reads."""
    (r, s), wide = window, max(window)
    out = (side - wide) // stride + 1
    for channels in CHANNELS:
        p = {"N": images, "C": channels, "H": side, "W": side, "R": r, "S": s, "P": out, "Q": out}
        p |= {"stride_h": stride, "stride_w": stride, "dilation_h": 1, "dilation_w": 1, "pad_h": 0, "pad_w": 0}
        p |= {"count_include_pad": 1, "divisor_override": 0, "act": 1, "training": 1, "eps_bits": 0}
        for name, across in (*((name, side) for name in "xrtgu"), ("y", out), ("i", out)):
            p |= {f"{name}_n": FAR if far else across * across * channels, f"{name}_c": 1}
            p |= {f"{name}_h": across * channels, f"{name}_w": channels}
        yield types.SimpleNamespace(**p)


def pooled(p: Any, x: torch.Tensor) -> None:
    """All directions of all poolings."""
    index = torch.empty(0, dtype=torch.int64)
    adaptive = types.SimpleNamespace(**{**vars(p), "P": -(-p.H // p.R), "Q": -(-p.W // p.S)})
    for problem, average, maximum in (
        (p, avg_pool2d, max_pool2d),
        (adaptive, adaptive_avg_pool2d, adaptive_max_pool2d),
    ):
        average.fprop(problem, x, x)
        average.dgrad(problem, x, x)
        maximum.fprop(problem, x, x)
        maximum.indices(problem, x, x, index)
        maximum.jvp(problem, x, x, None, x)
    max_pool2d.dgrad(p, x, x, None, x)
    workspace = torch.empty(adaptive_max_pool2d.dgrad_workspace(adaptive), dtype=torch.uint8, device="meta")
    adaptive_max_pool2d.dgrad(adaptive, x, x, None, x, workspace=workspace)


def mapped(p: Any, x: torch.Tensor) -> None:
    """add_act and batch_norm: each operand in rows of channels, in one run, and across the other."""
    across = {"y_n": p.C * p.H * p.W, "y_c": p.H * p.W, "y_h": p.W, "y_w": 1}
    rows = {f"{name}_{axis}": getattr(p, f"x_{axis}") for name in "ryg" for axis in "nchw"}
    q = types.SimpleNamespace(**{**vars(p), **rows})
    add_act.fprop(q, x, x, x)
    add_act.fprop(types.SimpleNamespace(**{**vars(q), **{f"{name}_n": 2 * q.x_n for name in "xry"}}), x, x, x)
    add_act.dgrad(types.SimpleNamespace(**{**vars(q), **across}), None, None, x, x, x)
    sizes = (batch_norm.stats_workspace(q), batch_norm.sums_workspace(q))
    stats, sums = (torch.empty(size, dtype=torch.uint8, device="meta") for size in sizes)
    batch_norm.stats(q, x, None, None, x, x, None, None, x, workspace=stats)
    batch_norm.fprop(q, x, None, None, x, x, None, x)
    batch_norm.backward(q, x, None, None, x, x, None, x, None, x, x, x, workspace=sums)


def test_what_is_launched_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: set[tuple[Any, ...]] = set()

    def launch(kernel: Any, programs: int, *arguments: Any, num_warps: int, **constants: Any) -> None:
        assert programs > 0
        launched.add(blocks(kernel, MODES.get(arguments[0].dtype, ""), constants, num_warps))

    for module in (_windows, _maximum, max_pool2d, add_act, batch_norm):
        monkeypatch.setattr(module, "launch", launch)
    for dtype in MODES:
        x = torch.empty(0, dtype=dtype)
        for far, window, stride in itertools.product((False, True), WINDOWS, (1, 2, 3)):
            for p in (*problems(far, 2, 20, window, stride), *problems(far, 2, 21, window, stride)):
                pooled(p, x)
        for far, images, side in itertools.product((False, True), (1, 2, 32), (3, 14, 56)):
            for p in problems(far, images, side, (1, 1), 1):
                mapped(p, x)
    names = {name for name, *_ in launched}
    for architecture in static.ARCHITECTURES:
        compiled = {
            blocks(v.fn, v.name.split(".")[1], dict(v.constexprs), v.num_warps)
            for v in static.variants(architecture)
            if v.fn.__name__ in names
        }
        assert launched - compiled == set(), "launched, not compiled"
        assert compiled - launched == set(), "compiled, never launched"
    assert len(names) == 10
    assert _common.block_channels(3) == 4
    assert [_common.block_channels(c) for c in (8, 16, 32, 33, 80)] == [4, 16, 16, 64, 64]
