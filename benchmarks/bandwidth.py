"""How near the kernels that are bound by memory come to a copy of as many bytes: ours against torch's channels_last.

    python benchmarks/bandwidth.py                    on the GPU if there is one, batch 128; else on the CPU, batch 1 and 16
    python benchmarks/bandwidth.py --device cpu --batch 1 --dtype f32 --only max_pool2d
    python benchmarks/bandwidth.py --backend cuda     pins the CUDA C++ kernels

A row is an operation and a direction on a layer's shape. Its bytes are those that have to move: every operand and result
once, and once more what is read in two passes (batch norm in training, whose sums come first). Their floor is the time in
which a copy moves as many: on the CPU torch's own copy_ of half as many bytes, timed in turns with ours and torch's, so that
a row that fits the caches meets a copy that does; on a GPU one large copy.

On the CPU malloc keeps what is freed (memory.py, KEEP_FREED), and three calls go before each sample: a sample of a few
calls would else be mostly of the first one, whose operands the copy has driven out of the caches, as torch's call, which
always follows ours, doesn't find it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from memory import keep_freed

import cnnfast
from cnnfast import functional, ops
from cnnfast.report import timing

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
EPS = 1e-5
# of the result's norm: above any rounding, and an activation's argument near 0 that rounding put on its other side
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 4e-2, torch.float16: 2e-2}
Call = Callable[[], object]

# channels and height of batch norm's layers, of resnet50
NORMS = ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))
# operation, channels, height, arguments: poolings of resnet, vgg16, googlenet, inception_v3, alexnet and densenet121
POOLINGS = (
    ("max_pool2d", 64, 112, (3, 2, 1)),
    ("max_pool2d", 64, 224, (2, 2)),
    ("max_pool2d", 192, 28, (3, 1, 1)),
    ("max_pool2d", 192, 71, (3, 2)),
    ("avg_pool2d", 192, 35, (3, 1, 1)),
    ("avg_pool2d", 128, 56, (2, 2)),
    ("adaptive_avg_pool2d", 2048, 7, (1,)),
    ("adaptive_avg_pool2d", 256, 6, (6,)),
    ("adaptive_avg_pool2d", 512, 28, (7,)),
    ("adaptive_max_pool2d", 512, 28, (7,)),
)
# channels, height, filter, stride of depthwise convolutions: as near to memory's limit as a convolution comes (GPU only)
DEPTHWISE = ((144, 56, 3, 1), (144, 56, 3, 2), (96, 56, 7, 1))


class Row(NamedTuple):
    """One operation in one direction: what has to move, and two functions to time; ``right`` where torch's is wrong."""

    name: str
    bytes: int
    ours: Call
    theirs: Call
    right: Call | None = None


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


# ---- the rows ----------------------------------------------------------------------------------------------------------


def rows(batch: int, dtype: torch.dtype, device: str, backend: str) -> Iterator[Callable[[], Iterator[Row]]]:
    """The layers, each a function that makes its tensors and yields its rows."""

    def image(c: int, h: int) -> torch.Tensor:
        return torch.randn(batch, c, h, h, device=device).to(dtype).to(memory_format=torch.channels_last)

    for c, h in NORMS:
        yield lambda c=c, h=h: norms(f"{c}x{h}x{h}", *(image(c, h) for _ in range(3)), backend)
    for op, c, h, args in POOLINGS:
        yield lambda op=op, c=c, h=h, args=args: pooling(op, image(c, h), args)
    if device == "cuda":
        for c, h, k, s in DEPTHWISE:
            weight = torch.randn(c, 1, k, k, device=device).to(dtype)
            yield lambda c=c, h=h, k=k, s=s, w=weight: depthwise(image(c, h), w, s)


def norms(shape: str, x: torch.Tensor, r: torch.Tensor, g: torch.Tensor, backend: str) -> Iterator[Row]:
    """add_act and batch_norm in every form; torch's activation and sum in place, as models have them."""
    c, wide = x.shape[1], torch.float32
    w, b = torch.rand(c, device=x.device) + 0.5, torch.randn(c, device=x.device)
    m, v = torch.randn(c, device=x.device) / 4, torch.rand(c, device=x.device) + 0.5
    yield Row(f"add_act fprop {shape}", size(x, r, x), lambda: functional.add_act(x, r), lambda: F.relu_(x + r))
    yield from gradients("add_act", shape, size(x, g, x), functional.add_act, lambda x, r: F.relu_(x + r), (x, r), g, 2)
    yield Row(
        f"batch_norm stats {shape}", size(x), lambda: ops.batch_norm_stats(x, EPS, backend, False),
        lambda: torch.batch_norm_stats(x, EPS) if x.is_cuda else torch.var_mean(x.to(wide), (0, 2, 3)),
    )  # fmt: skip
    yield Row(
        f"batch_norm eval {shape}", size(x, x), lambda: functional.batch_norm(x, m, v, w, b),
        lambda: F.batch_norm(x, m, v, w, b),
    )  # fmt: skip
    forms = (
        ("", False, lambda x, w, b: functional.batch_norm(x, None, None, w, b, True),
         lambda x, w, b: F.batch_norm(x, None, None, w, b, True)),
        (" + relu", False, lambda x, w, b: functional.batch_norm_act(x, w, b, None, None, None, "relu", True),
         lambda x, w, b: F.relu_(F.batch_norm(x, None, None, w, b, True))),
        (" + add + relu", True, lambda x, w, b, r: functional.batch_norm_act(x, w, b, None, None, r, "relu", True),
         lambda x, w, b, r: F.relu_(F.batch_norm(x, None, None, w, b, True).add_(r))),
    )  # fmt: skip
    yield Row(
        f"batch_norm + add + relu eval {shape}", size(x, r, x),
        lambda: functional.batch_norm_act(x, w, b, m, v, r, "relu"),
        lambda: F.relu_(F.batch_norm(x, m, v, w, b).add_(r)),
    )  # fmt: skip
    for what, residual, ours, theirs in forms:
        operands = (x, w, b, r) if residual else (x, w, b)
        more = size(r) if residual else 0
        yield Row(
            f"batch_norm{what} training {shape}", size(x, x, x) + more, lambda o=operands, f=ours: f(*o),
            lambda o=operands, f=theirs: f(*o),
        )  # fmt: skip
        # both passes read x and g; with a residual the first reads y and writes its gradient, which the second reads
        moved = size(x, g, x) + size(x, g) + 2 * more
        yield from gradients(f"batch_norm{what}", shape, moved, ours, theirs, operands, g, len(operands))


def pooling(op: str, x: torch.Tensor, args: tuple[int, ...]) -> Iterator[Row]:
    """Forward without gradients, forward that records them, and the gradient.

    Of a maximum's place a byte an output has to be kept (torch's maximum keeps 8); on a GPU we read x again instead.
    """
    ours, theirs = getattr(functional, op), getattr(F, op)
    y = theirs(x, *args)
    name = f"{'x'.join(map(str, x.shape[1:]))} {','.join(map(str, args))}"
    yield Row(f"{op} fprop {name}", size(x, y), lambda: ours(x, *args), lambda: theirs(x, *args))
    leaf = x.detach().requires_grad_()
    places = y.numel() if "max" in op and not x.is_cuda else 0
    yield Row(f"{op} recorded {name}", size(x, y) + places, lambda: ours(leaf, *args), lambda: theirs(leaf, *args))
    moved = size(y, x) + places + (size(x) if "max" in op and x.is_cuda else 0)
    g = torch.randn_like(y)
    for row in gradients(op, name, moved, lambda x: ours(x, *args), lambda x: theirs(x, *args), (x,), g, 1):
        # torch 2.11's gradient of an average in channels_last is wrong on some sizes on a GPU (192x35x35 3,1,1), in float64, too
        yield row._replace(right=lambda: _in_nchw(theirs, x, args, g)) if x.is_cuda and op == "avg_pool2d" else row


def _in_nchw(theirs: Call, x: torch.Tensor, args: tuple[int, ...], g: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaf = x.detach().contiguous().requires_grad_()
    return torch.autograd.grad(theirs(leaf, *args), leaf, g.contiguous())


def depthwise(x: torch.Tensor, w: torch.Tensor, stride: int) -> Iterator[Row]:
    """A depthwise convolution and both gradients."""
    c, k = x.shape[1], w.shape[2]

    def ours(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, w, None, stride, k // 2, 1, c)

    def theirs(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, w, None, stride, k // 2, 1, c)

    y, name = theirs(x, w), f"{k}x{k}/{stride} {'x'.join(map(str, x.shape[1:]))}"
    yield Row(f"depthwise fprop {name}", size(x, y), lambda: ours(x, w), lambda: theirs(x, w))
    for i, role in enumerate(("dgrad", "wgrad")):
        yield from gradients(f"depthwise {role}", name, size(x, y), ours, theirs, (x, w), torch.randn_like(y), i + 1, i)


def gradients(
    op: str, shape: str, moved: int, ours: Callable[..., torch.Tensor], theirs: Callable[..., torch.Tensor],
    operands: tuple[torch.Tensor, ...], g: torch.Tensor, end: int, begin: int = 0,
) -> Iterator[Row]:  # fmt: skip
    """The gradients of operands[begin:end], from a forward pass made before."""
    calls = []
    for function in (ours, theirs):
        leaves = [t.detach().clone(memory_format=torch.preserve_format) for t in operands]
        for t in leaves[begin:end]:
            t.requires_grad_()
        y = function(*leaves)
        calls.append(
            lambda y=y, wanted=leaves[begin:end]: torch.autograd.grad(y, wanted, g, retain_graph=True)  # type: ignore[misc]
        )
    yield Row(f"{op} backward {shape}", moved, *calls)


# ---- measuring ---------------------------------------------------------------------------------------------------------


def check(row: Row, dtype: torch.dtype) -> None:
    """Raises where ours isn't torch's: nothing wrong is timed."""
    own, other = row.ours(), (row.right or row.theirs)()
    for a, b in zip(*(o if isinstance(o, tuple) else (o,) for o in (own, other)), strict=False):
        if a.shape == b.shape and "stats" not in row.name:
            wide = b.detach().double()
            error = float((a.detach().double() - wide).norm() / wide.norm().clamp_min(1e-30))
            assert error < TOLERANCE[dtype], f"{row.name}: off by {error:.2g} of the result's norm"


def on_cpu(row: Row, rounds: int) -> tuple[float, float, float]:
    """Milliseconds of ours, torch's and a copy of as many bytes, in turns."""
    source, target = (torch.zeros(max(row.bytes // 2, 1), dtype=torch.uint8) for _ in range(2))
    functions: dict[str, Call] = {"ours": row.ours, "theirs": row.theirs, "copy": lambda: target.copy_(source)}
    found = timing.interleaved(functions, rounds=rounds, warmup=3, pause_s=0.001, lead=3)
    return tuple(1e3 * found[name].median for name in functions)  # type: ignore[return-value]


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--batch", type=int, nargs="+", help="default: 128 on a GPU, 1 and 16 on the CPU")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU; default: 2")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES))
    parser.add_argument("--only", default="", help="rows with this in their name")
    parser.add_argument("--json", type=Path, help="where the JSON goes, too")
    options = parser.parse_args()
    cpu = options.device == "cpu"
    if cpu:
        keep_freed()
    torch.set_num_threads(options.threads)
    machine, limit = timing.machine(), 0.0
    print(timing.describe(machine) + f"; backend {options.backend}: {machine['backends']['cpu']}" * cpu)
    if not cpu:
        large = torch.empty(2**28, dtype=torch.uint8, device=options.device)
        copy = torch.empty_like(large)
        limit = 2 * large.numel() / milliseconds(lambda: copy.copy_(large), options.device, options.rounds) / 1e6
        print(f"a copy: {limit:.0f} GB/s")
    print(f"{'':4} {'batch':>5} {'':48} {'us':>9} {'floor':>9} {'GB/s':>7} {'of copy':>8} {'x torch':>8}")
    found = []
    for dtype in options.dtype or (["f32", "bf16"] if cpu else ["bf16", "f32"]):
        for batch in options.batch or ([1, 16] if cpu else [128]):
            with cnnfast.backend(options.backend):
                for layer in rows(batch, DTYPES[dtype], options.device, options.backend):
                    for row in layer():
                        if options.only not in row.name:
                            continue
                        check(row, DTYPES[dtype])
                        if cpu:
                            own, other, floor = on_cpu(row, options.rounds)
                        else:
                            own, other = (
                                milliseconds(c, options.device, options.rounds) for c in (row.ours, row.theirs)
                            )
                            floor = row.bytes / limit / 1e6
                        found.append({
                            "dtype": dtype, "batch": batch, "row": row.name, "bytes": row.bytes, "ours_us": 1e3 * own,
                            "torch_us": 1e3 * other, "copy_us": 1e3 * floor, "of_copy": floor / own, "ratio": other / own,
                        })  # fmt: skip
                        print(
                            f"{dtype:4} {batch:5} {row.name:48} {1e3 * own:9.1f} {1e3 * floor:9.1f} {row.bytes / own / 1e6:7.1f} "
                            f"{floor / own:8.0%} {other / own:7.2f}x",
                            flush=True,
                        )  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
