"""The operations that memory bounds, where sizes, threads and processes matter: large results, many elements, forks."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import oracle, process
from test_processes import run_python

import cnnfast
from cnnfast import functional
from cnnfast.backends import cpu

pytestmark = [
    pytest.mark.skipif(
        process.EMULATED or process.INTERPRETED, reason="the CPU's kernels: the plain process runs them"
    ),
    pytest.mark.skipif(cpu.MODULE is None, reason=f"no CPU kernels here: {cpu.ABSENT}"),
]
CL = torch.channels_last
Function = Callable[..., torch.Tensor]
# name -> ours, torch's; each of an image alone, so that one list serves every test
OPERATIONS: dict[str, tuple[Function, Function]] = {
    "max_pool2d": (lambda x: functional.max_pool2d(x, 3, 2, 1), lambda x: F.max_pool2d(x, 3, 2, 1)),
    "max_pool2d 1": (lambda x: functional.max_pool2d(x, 3, 1, 1), lambda x: F.max_pool2d(x, 3, 1, 1)),
    "avg_pool2d": (lambda x: functional.avg_pool2d(x, 3, 1, 1), lambda x: F.avg_pool2d(x, 3, 1, 1)),
    "adaptive_avg_pool2d": (lambda x: functional.adaptive_avg_pool2d(x, 5), lambda x: F.adaptive_avg_pool2d(x, 5)),
    "adaptive_max_pool2d": (lambda x: functional.adaptive_max_pool2d(x, 5), lambda x: F.adaptive_max_pool2d(x, 5)),
    "batch_norm": (
        lambda x: functional.batch_norm(x, None, None, training=True),
        lambda x: F.batch_norm(x, None, None, training=True),
    ),
    "batch_norm_act": (
        lambda x: functional.batch_norm_act(x, None, None, None, None, x, "relu", True),
        lambda x: F.relu(F.batch_norm(x, None, None, training=True) + x),
    ),
    "add_act": (lambda x: functional.add_act(x, x), lambda x: F.relu(x + x)),
}


def _both(function: Function, x: torch.Tensor) -> list[torch.Tensor]:
    """The result, and the gradient of x for one made of it, by an operation that torch keeps serial where it is small:
    in a forked child it would hang."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = function(x)
    return [y.detach(), *torch.autograd.grad(y, x, 1 - y.detach())]


# 2 * 64 * 193 * 193 floats are 19 MB, more than goes through the caches; 74498 pixels leave a shorter row at the end.
# 2 * 1024 * 33 * 33 are 9 MB, just so many, in rows that meet in the same lines of a cache; 31 * 31 stay in the caches.
LARGE_SHAPES = ((2, 64, 193, 193), (2, 1024, 33, 33), (2, 1024, 31, 31))


@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("name", ["batch_norm", "batch_norm_act", "add_act"])
def test_large_results(name: str, isa: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape).to(memory_format=CL)
    ours, theirs = OPERATIONS[name]
    op = "add_act" if name == "add_act" else "batch_norm"
    with cnnfast.backend(f"cpu.{op}.{isa}"):
        found = _both(ours, x)
    for a, b in zip(found, _both(theirs, x.double()), strict=True):
        # a sum that rounding put on the other side of relu's 0 has another gradient
        wrong = (a - b).abs() > 1e-5 * (1 + b.abs())
        assert int(wrong.sum()) <= (4 if "act" in name else 0)


@pytest.mark.parametrize("side", [17, 97])  # in the caches and past them
@pytest.mark.parametrize("isa", cpu.isas())
def test_rows_unequally_far_apart(isa: str, side: int) -> None:
    """A residual, and a gradient, that are channels of wider tensors: no one offset serves all operands."""
    torch.manual_seed(0)
    x, wide = (torch.randn(2, c, side, side).to(memory_format=CL) for c in (120, 240))
    residual, g = wide[:, :120], wide[:, 120:]

    def both(function: Function, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, residual)]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, g.to(dtype))]

    with cnnfast.backend(f"cpu.batch_norm.{isa}"):
        found = both(lambda x, r: functional.batch_norm_act(x, None, None, None, None, r, "leaky_relu", True), x.dtype)
    expected = both(lambda x, r: F.leaky_relu(F.batch_norm(x, None, None, training=True) + r), torch.float64)
    for a, b in zip(found, expected, strict=True):
        wrong = (a - b).abs() > 1e-5 * (1 + b.abs())  # as above
        assert int(wrong.sum()) <= 4


# 2 * 64 * 257 * 257 floats are 34 MB; 132098 pixels are no multiple of any tile's
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("isa", cpu.isas())
def test_large_results_of_convolutions(isa: str, taps: int, dtype: torch.dtype) -> None:
    """Past the caches where the result's pixels are whole vectors, as they come where they aren't; both directions."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 257, 257, dtype=dtype).to(memory_format=CL)
    w, b = torch.randn(64, 8, taps, taps, dtype=dtype), torch.randn(64, dtype=dtype)
    padding = taps // 2
    with cnnfast.backend(f"cpu.conv2d_implicit_gemm.{isa}"):
        found = functional.conv2d(x, w, b, padding=padding)
        narrow = functional.conv2d(x, w[:63], b[:63], padding=padding)
        back = functional.conv_transpose2d(x, w.transpose(0, 1), b, padding=padding)
    eps = torch.finfo(dtype).eps
    for result, expected in (
        (found, F.conv2d(x.double(), w.double(), b.double(), padding=padding)),
        (narrow, F.conv2d(x.double(), w[:63].double(), b[:63].double(), padding=padding)),
        (back, F.conv_transpose2d(x.double(), w.transpose(0, 1).double(), b.double(), padding=padding)),
    ):
        # a sum of 8 * taps**2 products and a bias: each below 25, so many roundings at most
        assert (result - expected).abs().max() <= (8 * taps**2 + 1) * 25 * eps * (1 if dtype == torch.float32 else 2)


# kernel -> input channels, output channels, groups, taps, stride; results of an image below 3 MB, of three above
LAYERS = {
    "conv2d_implicit_gemm": (8, 64, 1, 3, 1),
    "conv2d_winograd_f4x4": (64, 64, 1, 3, 1),
    "conv2d_winograd_f4x4, groups": (128, 64, 4, 3, 1),
    "conv2d_winograd_f4x4, groups of 32": (64, 64, 2, 3, 1),
    "conv2d_winograd_f2x2": (32, 64, 1, 3, 1),
    "conv2d_winograd_f2x2, groups of 16": (64, 64, 4, 3, 1),
    "conv2d_winograd_f2x2, groups of 8": (64, 64, 8, 3, 1),
    "conv2d_winograd_f3x3_stride2": (32, 64, 1, 3, 2),
    "conv2d_winograd_f2x2_5x5": (64, 64, 1, 5, 1),
    "conv2d_grouped": (64, 64, 16, 3, 1),
    "conv2d_grouped, stride 2": (64, 64, 16, 3, 2),
}


# 101 rows and columns leave a part of a tile; the second residual is a slice of 73 channels, without aligned vectors
@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("name", LAYERS)
def test_large_results_are_those_of_their_images(name: str, isa: str) -> None:
    """Bit for bit, with and without an epilogue, whatever goes past the caches."""
    C, K, G, taps, stride = LAYERS[name]
    torch.manual_seed(0)
    x = torch.randn(3, C, 101 * stride, 101 * stride).to(memory_format=CL)
    r, w, b = torch.randn(3, K, 101, 101).to(memory_format=CL), torch.randn(K, C // G, taps, taps), torch.randn(K)
    mean, var = torch.randn(K), torch.rand(K) + 0.5
    wide = torch.empty(3, 101, 101, 73).permute(0, 3, 1, 2)[:, :K].copy_(r)

    def calls(x: torch.Tensor, *r: torch.Tensor) -> list[torch.Tensor]:
        bare = functional.conv2d(x, w, b, stride, taps // 2, 1, G)
        fused = [
            functional.conv_bn_act(x, w, b, mean, var, None, None, residual, stride=stride, padding=taps // 2, groups=G)
            for residual in r
        ]
        return [bare, *fused]

    with cnnfast.backend(f"cpu.{name.split(',')[0]}.{isa}"):
        whole = calls(x, r, wide)
        parts = [calls(x[i : i + 1], r[i : i + 1], wide[i : i + 1]) for i in range(3)]
    for result, *images in zip(whole, *parts, strict=True):
        assert torch.equal(result, torch.cat(images))
    torch.testing.assert_close(whole[0], F.conv2d(x, w, b, stride, taps // 2, 1, G), rtol=1e-4, atol=1e-3)
    expected = torch.relu(F.batch_norm(whole[0], mean, var) + r)
    torch.testing.assert_close(whole[1], expected, rtol=1e-5, atol=1e-5)


# 9 x 9 maps are copied as windows; 2106 pixels are more than one thread takes at a time, 480 channels several chunks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", cpu.isas())
def test_windows_of_many_channels(isa: str, dtype: torch.dtype) -> None:
    """Chunk by chunk, with the sums of all output channels waiting: forward, gradient, packed with an epilogue."""
    torch.manual_seed(0)
    x = torch.randn(26, 480, 17, 17).to(dtype, memory_format=CL)
    g = torch.randn(26, 480, 9, 9).to(dtype, memory_format=CL)
    w, b = (torch.randn(40, 480, 3, 3) / 66).to(dtype), torch.randn(40).to(dtype)
    v, results = w.transpose(0, 1).contiguous(), []
    conv = torch.nn.Conv2d(480, 40, 3, 2, 1).to(dtype)
    conv.weight.data, conv.bias.data = w, b  # type: ignore[union-attr]
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with cnnfast.backend(f"cpu.conv2d_implicit_gemm.{isa}"):
                forward = functional.conv2d(x, w, b, 2, 1)
                back = functional.conv_transpose2d(g, v, None, 1, 1)
                packed = cnnfast.fuse(torch.nn.Sequential(conv, torch.nn.ReLU()).eval(), x)(x)
            results.append((forward, back, packed))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))
    assert torch.equal(results[0][0].relu(), results[0][2])
    exact = (F.conv2d(x.double(), w.double(), b.double(), 2, 1), F.conv_transpose2d(g.double(), v.double(), None, 1, 1))
    own = (F.conv2d(x, w, b, 2, 1), F.conv_transpose2d(g, v, None, 1, 1))
    sizes = (
        F.conv2d(x.double().abs(), w.double().abs(), b.double().abs(), 2, 1),
        F.conv_transpose2d(g.double().abs(), v.double().abs(), None, 1, 1),
    )
    for found, reference, torchs, magnitude in zip(results[0], exact, own, sizes, strict=False):
        oracle.check(f"windows of many channels, {isa}", found, reference, torchs, magnitude)


@pytest.mark.parametrize("shape", [(3, 40, 29, 31), (2, 256, 65, 65)], ids=str)  # in the caches and past them
@pytest.mark.parametrize("name", OPERATIONS)
def test_thread_count_changes_nothing(name: str, shape: tuple[int, ...]) -> None:
    """1, 2, 3 or 7 threads: results equal bit by bit."""
    torch.manual_seed(0)
    before, results = torch.get_num_threads(), []
    x = torch.randn(shape).to(memory_format=CL)
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(_both(OPERATIONS[name][0], x))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


def test_many_threads() -> None:
    """Eight threads at once, different shapes: everybody gets their own results."""
    torch.manual_seed(0)
    jobs = [
        (ours, torch.randn(2, 24, 20 + i, 21).to(memory_format=CL)) for i, (ours, _) in enumerate(OPERATIONS.values())
    ]
    expected = [_both(*job) for job in jobs]
    start, failures = threading.Barrier(len(jobs)), list[str]()

    def work(i: int) -> None:
        try:
            start.wait()
            for _ in range(10):
                if not all(torch.equal(p, q) for p, q in zip(_both(*jobs[i]), expected[i], strict=True)):
                    failures.append(list(OPERATIONS)[i])
        except Exception as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


ALONE = [name for name in OPERATIONS if "act" not in name]  # x is used once: torch has nothing to add up
# What a process does: every operation, forward and backward, beside torch's.
WORK = """
    import os, signal, sys, torch
    sys.path.insert(0, TESTS)
    from test_memory_bound import CL, OPERATIONS, _both
    torch.manual_seed(0)
    x = torch.randn(2, 24, 20, 21).to(memory_format=CL)
    def work():
        return [t for ours, _ in OPERATIONS.values() for t in _both(ours, x)]
""".replace("TESTS", repr(os.path.dirname(os.path.abspath(__file__))))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork_after_parallel_work() -> None:
    """A forked child runs them, though its parent used all threads: torch's own hang there."""
    code = (
        WORK
        + """
    from test_memory_bound import ALONE
    # large enough for threads; in the child nothing of torch's computes, neither sums of gradients nor comparisons
    x = torch.randn(2, 24, 40, 41).to(memory_format=CL).requires_grad_()
    calls = [OPERATIONS[name][0] for name in ALONE]
    gradients = [torch.ones_like(call(x)) for call in calls]
    def work():
        outs = [call(x) for call in calls]
        found = outs + [torch.autograd.grad(y, x, g)[0] for y, g in zip(outs, gradients)]
        return [t.detach().numpy().tobytes() for t in found]
    torch.relu(torch.randn(1 << 21))
    expected = work()
    child = os.fork()
    if not child:
        signal.alarm(30)
        os._exit(0 if work() == expected else 3)
    assert os.waitpid(child, 0)[1] == 0
    """
    )
    run_python(code, timeout=90)


@pytest.mark.skipif(shutil.which("taskset") is None, reason="no taskset here")
@pytest.mark.parametrize("threads", [None, "1", "7"])
def test_one_processor(threads: str | None) -> None:
    """With one processor, and with fewer or more threads than there are processors."""
    code = (
        WORK
        + """
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    found = work()
    torch.set_num_threads(1)
    assert all(torch.equal(p, q) for p, q in zip(work(), found))
    """
    )
    run_python(code, timeout=90, **({} if threads is None else {"OMP_NUM_THREADS": threads}))


# ---- more than 2^31 elements -------------------------------------------------------------------------------------------

full = pytest.mark.skipif(not process.FULL, reason="takes 10 GB: make test-all")
SIDE, BLOCK = 32832, 64  # 2 * 32832^2 elements are more than 2^31
LARGE: dict[str, tuple[Function, Function]] = {
    "max_pool2d": (lambda x: functional.max_pool2d(x, 2), lambda x: F.max_pool2d(x, 2)),
    "avg_pool2d": (lambda x: functional.avg_pool2d(x, 2), lambda x: F.avg_pool2d(x, 2)),
    "adaptive_avg_pool2d": (
        lambda x: functional.adaptive_avg_pool2d(x, 1), lambda x: F.adaptive_avg_pool2d(x.float(), 1)
    ),
    "batch_norm": (
        lambda x: functional.batch_norm(x, None, None, training=True),
        lambda x: F.batch_norm(x.float(), None, None, training=True),
    ),
    "add_act": (lambda x: functional.add_act(x, x), lambda x: F.relu(x + x)),
    "conv2d": (
        lambda x: functional.conv2d(x, torch.ones(1, 2, 1, 1, dtype=x.dtype)), lambda x: x.float().sum(1, keepdim=True)
    ),
}  # fmt: skip


@full
@pytest.mark.parametrize("name", LARGE)
def test_more_than_2_to_the_31_elements(name: str) -> None:
    """An image of blocks of rows that are alike: so are the result's, and each is the result for one block."""
    torch.manual_seed(0)
    ours, theirs = LARGE[name]
    block = torch.randn(1, 2, BLOCK, SIDE).bfloat16().to(memory_format=CL)
    x = torch.empty(1, 2, SIDE, SIDE, dtype=torch.bfloat16, memory_format=CL)
    for h in range(0, SIDE, BLOCK):
        x[:, :, h : h + BLOCK] = block
    expected, y = theirs(block), ours(x)
    rows = expected.shape[2]
    for h in {0, y.shape[2] // 2 // rows * rows, y.shape[2] - rows}:
        torch.testing.assert_close(y[:, :, h : h + rows].float(), expected.float(), rtol=2e-2, atol=2e-2)


@full
@pytest.mark.parametrize("name", [*OPERATIONS, "conv2d"])
def test_strides_beyond_2_to_the_31(name: str) -> None:
    """Two images 2^31 elements apart, of which only the pages that are touched take memory."""
    torch.manual_seed(0)
    conv: Any = (functional.conv2d, F.conv2d)
    w = torch.randn(8, 8, 3, 3, dtype=torch.bfloat16)
    ours, theirs = OPERATIONS.get(name) or tuple(lambda x, f=f: f(x, w, padding=1) for f in conv)
    far = torch.empty(2**31 + 10**4, dtype=torch.bfloat16).as_strided((2, 8, 9, 9), (2**31 + 8, 1, 72, 8))
    near = torch.randn(2, 8, 9, 9).bfloat16().to(memory_format=CL)
    far.copy_(near)
    a, b = far.detach().requires_grad_(), near.detach().requires_grad_()
    y, z = ours(a), ours(b)
    g = torch.randn_like(y)
    gradients = [torch.autograd.grad(out, leaf, g)[0] for out, leaf in ((y, a), (z, b))]
    for one, other in ((y, z), (y, theirs(near)), gradients):
        torch.testing.assert_close(one, other, rtol=5e-2, atol=5e-2)
