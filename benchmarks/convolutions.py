"""A dozen convolutions on a GPU: the device's time of cuDNN at its best, our CUDA C++ and our Triton, in every direction.

    python benchmarks/convolutions.py --dtype bf16 --batch 64
    python benchmarks/convolutions.py --dtype f32 --precision fp32 --json results.json

Minutes cheaper than the whole benchmarks (pytest benchmarks), for work on kernels. ``floor`` is the larger of FLOPs over
the card's peak and bytes over its bandwidth (an H100's, given below); all operands channels_last, so that nobody converts
them. cuDNN chooses by measuring (cudnn.benchmark); with precision "fp32" it may not use tf32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from bandwidth import DTYPES, Call, milliseconds

from cnnfast import ops
from cnnfast.report import timing

PEAK_FLOPS = {("f32", "fp32"): 67e12, ("f32", "high"): 495e12, ("bf16", "fp32"): 990e12, ("f16", "fp32"): 990e12}
PEAK_BYTES = 3.35e12
DIRECTIONS = ("fprop", "dgrad", "wgrad")
BACKENDS = ("cuda", "triton")
TOO_SLOW_MS = 60.0  # slower ones would take the whole time

# name, C, H = W, K, R = S, stride, padding, groups
LAYERS: tuple[tuple[str, int, int, int, int, int, int, int], ...] = (
    ("resnet50 1x1", 64, 56, 256, 1, 1, 0, 1),
    ("resnet50 1x1", 1024, 14, 256, 1, 1, 0, 1),
    ("resnet50 1x1/2", 512, 28, 1024, 1, 2, 0, 1),
    ("resnet50 3x3", 64, 56, 64, 3, 1, 1, 1),
    ("resnet50 3x3", 256, 14, 256, 3, 1, 1, 1),
    ("resnet50 3x3/2", 128, 56, 128, 3, 2, 1, 1),
    ("resnet50 3x3", 512, 7, 512, 3, 1, 1, 1),
    ("vgg16 3x3", 64, 112, 128, 3, 1, 1, 1),
    ("resnet50 stem 7x7/2", 3, 224, 64, 7, 2, 3, 1),
    ("resnext50 3x3", 128, 56, 128, 3, 1, 1, 32),
    ("resnext50 3x3", 512, 14, 512, 3, 1, 1, 32),
    ("depthwise 3x3", 256, 28, 256, 3, 1, 1, 256),
)


@dataclass
class Row:
    """One layer in one direction."""

    layer: str
    direction: str
    floor_ms: float
    ms: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """cuDNN's time over that of the faster of ours; NaN where none of ours ran."""
        own = [t for name, t in self.ms.items() if name != "cuDNN"]
        return self.ms["cuDNN"] / min(own) if own else float("nan")

    def __str__(self) -> str:
        times = "".join(f"{self.ms[n]:9.3f}" if n in self.ms else f"{'-':>9}" for n in ("cuDNN", *BACKENDS))
        why = "; ".join(f"{name}: {reason}" for name, reason in self.missing.items())
        return f"{self.layer:36} {self.direction} {self.floor_ms:9.3f}{times} {self.ratio:7.2f}x  {why}"


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Every layer and direction, until the time is over."""
    dtype, precision, end = DTYPES[options.dtype], options.precision, time.monotonic() + options.seconds
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = precision == "high"
    for name, C, H, K, R, stride, padding, G in LAYERS:
        x = torch.randn(options.batch, C, H, H, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
        w = (torch.randn(K, C // G, R, R, device="cuda") / (C // G * R * R) ** 0.5).to(dtype)
        w = w.contiguous(memory_format=torch.channels_last)
        y = F.conv2d(x, w, None, stride, padding, 1, G)
        g = torch.randn_like(y)
        flops = 2 * y.numel() * (C // G) * R * R
        moved = sum(t.numel() for t in (x, w, y)) * x.element_size()
        floor = 1e3 * max(flops / PEAK_FLOPS[options.dtype, precision], moved / PEAK_BYTES)
        for direction in DIRECTIONS:
            row = Row(f"{name} {C}x{H}x{H} > {K}" + (f", {G} groups" if G > 1 else ""), direction, floor)
            mask = [direction == "dgrad", direction == "wgrad", False]
            args = ((stride, stride), (padding, padding), (1, 1))

            def cudnn(direction: str = direction) -> torch.Tensor:
                if direction == "fprop":
                    return F.conv2d(x, w, None, *args, G)  # noqa: B023
                outs = torch.ops.aten.convolution_backward(g, x, w, None, *args, False, [0, 0], G, mask)  # noqa: B023
                return outs[mask.index(True)]  # noqa: B023

            calls: dict[str, Call] = {"cuDNN": cudnn}
            expected = cudnn()
            for backend in BACKENDS:
                tail = ((stride, stride), (padding,) * 4, (1, 1), G, precision, backend, True)

                def ours(direction: str = direction, tail: tuple[object, ...] = tail) -> torch.Tensor:
                    if direction == "fprop":
                        return ops.conv2d(x, w, None, *tail)  # noqa: B023
                    if direction == "dgrad":
                        return ops.conv2d_dgrad(w, g, x.shape, True, *tail)  # noqa: B023
                    return ops.conv2d_wgrad(x, g, w.shape, True, *tail)  # noqa: B023

                try:
                    error = (ours().double() - expected.double()).norm() / expected.double().norm()
                    assert error < 2e-2, f"off by {error:.2g}"
                    once = milliseconds(ours, "cuda", 1)
                    assert once < TOO_SLOW_MS, f"{once:.0f} ms"
                    calls[backend] = ours
                except Exception as error:  # shown, not hidden: the others are still measured
                    row.missing[backend] = f"{type(error).__name__} {str(error).splitlines()[0][:70]}"
            samples: dict[str, list[float]] = {n: [] for n in calls}
            for _ in range(options.rounds):
                for n, call in calls.items():
                    samples[n].append(milliseconds(call, "cuda", 3))
            row.ms = {n: statistics.median(s) for n, s in samples.items()}
            yield row
            if time.monotonic() > end:
                print("the time is over")
                return


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--precision", choices=["fp32", "high"], default="fp32", help="of f32")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=300.0, help="stop after that many")
    parser.add_argument("--json", help="write the rows there, too")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "no GPU that torch can use\n")
    print(f"{torch.cuda.get_device_name()}, {options.dtype}, precision {options.precision}, batch {options.batch}, ms")
    print(f"{'layer':36} {'':5} {'floor':>9}{'cuDNN':>9}{'cuda':>9}{'triton':>9} {'x cuDNN':>8}")
    rows = []
    for row in measure(options):
        print(row, flush=True)
        rows.append(row)
    if options.json:
        found = {"machine": timing.machine(), "options": vars(options), "rows": [asdict(r) for r in rows]}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
