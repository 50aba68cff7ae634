"""How near the kernels that are bound by memory come to a copy of as many bytes: ours against torch's.

    python benchmarks/bandwidth.py                    on the GPU, if there is one
    python benchmarks/bandwidth.py --device cpu --batch 1 --backend cpu --dtype f32
    python benchmarks/bandwidth.py --backend cuda     pins the CUDA C++ kernels

A row is an operation and a direction on a layer's shape. Bytes are those of every operand and result, once; a gradient
that has to read its operands twice is still charged once. The limit is torch's own copy_ of a large tensor, measured
here. Tensors of a call exceed the caches at the default batch, but for the 7 x 7 maps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

import cnnfast
from cnnfast import functional, ops

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
EPS = 1e-5
Call = Callable[[], object]


def milliseconds(call: Call, device: str, rounds: int) -> float:
    """The median of single calls, each timed on its device."""
    times = []
    for i in range(rounds + 3):
        if device == "cpu":
            begin = time.perf_counter()
            call()
            elapsed = 1e3 * (time.perf_counter() - begin)
        else:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(500_000)  # the call is queued before the device gets to it
            start.record()
            call()
            end.record()
            end.synchronize()
            elapsed = start.elapsed_time(end)
        if i >= 3:
            times.append(elapsed)
    return statistics.median(times)


def size(*tensors: torch.Tensor) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def rows(batch: int, dtype: torch.dtype, device: str, backend: str) -> Iterator[tuple[str, int, Call, Call]]:
    """(name, bytes, ours, torch's) of every operation and direction."""

    def image(c: int, h: int) -> torch.Tensor:
        return torch.randn(batch, c, h, h, device=device).to(dtype).to(memory_format=torch.channels_last)

    for c, h in ((64, 112), (256, 56), (2048, 7)):
        x, r, g = image(c, h), image(c, h), image(c, h)
        w, b = torch.ones(c, device=device), torch.zeros(c, device=device)
        m, v, _ = ops.batch_norm_stats(x, EPS, backend, True)
        variance, shape = (1 / v.square() - EPS).abs(), f"{c}x{h}x{h}"
        tail = ("relu", True, EPS, backend, True)
        yield (
            f"add_act {shape}", size(x, r, g), lambda x=x, r=r: functional.add_act(x, r),
            lambda x=x, r=r: F.relu(x + r),
        )  # fmt: skip
        yield (
            f"batch_norm stats {shape}", size(x), lambda x=x: ops.batch_norm_stats(x, EPS, backend, True),
            lambda x=x: torch.var_mean(x, (0, 2, 3)),
        )  # fmt: skip
        yield (
            f"batch_norm fprop {shape}", size(x, g), lambda a=(x, w, b, m, v, None), t=tail: ops.batch_norm(*a, *t),
            lambda x=x, m=m, s=variance, w=w, b=b: F.relu(F.batch_norm(x, m, s, w, b)),
        )  # fmt: skip
        yield (
            f"batch_norm fprop + residual {shape}", size(x, r, g),
            lambda a=(x, w, b, m, v, r), t=tail: ops.batch_norm(*a, *t),
            lambda x=x, r=r, m=m, s=variance, w=w, b=b: F.relu(F.batch_norm(x, m, s, w, b) + r),
        )  # fmt: skip
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        out = F.relu(F.batch_norm(leaf, None, None, w.clone().requires_grad_(), b, True))
        yield (
            f"batch_norm backward {shape}", size(x, g, x),
            lambda a=(x, w, b, m, v, None, g), t=tail: ops.batch_norm_backward(*a, *t),
            lambda out=out, leaf=leaf, g=g: torch.autograd.grad(out, leaf, g, retain_graph=True),
        )  # fmt: skip
    poolings: tuple[tuple[str, int, int, Call, Call], ...] = (
        ("max_pool2d 3x3/2", 64, 112, lambda x: functional.max_pool2d(x, 3, 2, 1), lambda x: F.max_pool2d(x, 3, 2, 1)),
        ("avg_pool2d 3x3/1", 256, 28, lambda x: functional.avg_pool2d(x, 3, 1, 1), lambda x: F.avg_pool2d(x, 3, 1, 1)),
        ("avg_pool2d 2x2/2", 128, 56, lambda x: functional.avg_pool2d(x, 2), lambda x: F.avg_pool2d(x, 2)),
        (
            "adaptive_avg_pool2d to 1x1", 2048, 7, lambda x: functional.adaptive_avg_pool2d(x, 1),
            lambda x: F.adaptive_avg_pool2d(x, 1),
        ),
        (
            "adaptive_max_pool2d to 7x7", 512, 28, lambda x: functional.adaptive_max_pool2d(x, 7),
            lambda x: F.adaptive_max_pool2d(x, 7),
        ),
    )  # type: ignore[assignment]  # fmt: skip
    filters = [
        (f"depthwise {k}x{k}/{s}", c, h, k, s) for c, h, k, s in ((144, 56, 3, 1), (144, 56, 3, 2), (96, 56, 7, 1))
    ]
    for name, c, h, ours, theirs in poolings:
        yield from both(f"{name} {c}x{h}x{h}", image(c, h), None, ours, theirs)
    for name, c, h, k, s in filters:
        weight = torch.randn(c, 1, k, k, device=device).to(dtype)
        yield from both(
            f"{name} {c}x{h}x{h}", image(c, h), weight,
            lambda x, w, k=k, s=s, c=c: functional.conv2d(x, w, None, s, k // 2, 1, c),
            lambda x, w, k=k, s=s, c=c: F.conv2d(x, w, None, s, k // 2, 1, c),
        )  # fmt: skip


def both(
    name: str, x: torch.Tensor, w: torch.Tensor | None, ours: Callable[..., torch.Tensor],
    theirs: Callable[..., torch.Tensor],
) -> Iterator[tuple[str, int, Call, Call]]:  # fmt: skip
    """Forward, and the gradient of each operand."""
    given = (x,) if w is None else (x, w)
    y = theirs(*given)
    yield f"{name} fprop", size(*given, y), lambda: ours(*given), lambda: theirs(*given)
    reads_x = 0 if name.startswith(("avg", "adaptive_avg")) or w is not None else size(x)
    for i, role in enumerate(("dgrad", "wgrad")[: len(given)]):
        calls = []
        for function in (ours, theirs):
            leaves = [t.detach().clone(memory_format=torch.preserve_format) for t in given]
            leaves[i].requires_grad_()
            out = function(*leaves)
            g = torch.ones_like(out)
            calls.append(lambda out=out, leaf=leaves[i], g=g: torch.autograd.grad(out, leaf, g, retain_graph=True))
        yield f"{name} {role}", size(x, y) + reads_x, calls[0], calls[1]


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dtype", action="append", choices=list(DTYPES))
    options = parser.parse_args()
    large = torch.empty(2**28 if options.device == "cuda" else 2**24, dtype=torch.uint8, device=options.device)
    copy = torch.empty_like(large)
    limit = 2 * large.numel() / milliseconds(lambda: copy.copy_(large), options.device, options.rounds) / 1e6
    print(f"a copy: {limit:.0f} GB/s")
    print(f"{'':4} {'':44} {'us':>9} {'GB/s':>7} {'of copy':>8} {'x torch':>8}")
    for dtype in options.dtype or ["bf16", "f32"]:
        with cnnfast.backend(options.backend):
            for name, bytes, ours, theirs in rows(options.batch, DTYPES[dtype], options.device, options.backend):
                own, other = (milliseconds(call, options.device, options.rounds) for call in (ours, theirs))
                rate = bytes / own / 1e6
                print(f"{dtype:4} {name:44} {1e3 * own:9.1f} {rate:7.0f} {rate / limit:8.0%} {other / own:7.2f}x")


if __name__ == "__main__":
    main()
