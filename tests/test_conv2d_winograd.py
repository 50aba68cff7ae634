"""What only Winograd's kernels could get wrong: tiles share transforms, so one bad value may not spoil its neighbours."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support import oracle, process

from cnnfast import dispatch, ops
from cnnfast.ops.conv2d import problem

FOUND = {i.name: i for i in dispatch.implementations("conv2d") if i.stem.startswith("conv2d_winograd")}
HERE = [name for name in sorted(FOUND) if not process.not_here(FOUND[name])]
OF_CPU = [name for name in sorted(FOUND) if FOUND[name].backend == "cpu"]
WITH_WGRAD = [
    name for name in OF_CPU if any(i.name == name for i in dispatch.implementations("conv2d") if i.direction == "wgrad")
]
WGRAD_OF_GPU = [
    pytest.param(i.name, dispatch.TORCH_DTYPES[dtype], marks=process.marks(i), id=f"{i.name}-{dtype}")
    for i in dispatch.implementations("conv2d")
    if i.backend == "cuda"
    and i.direction == "wgrad"
    and i.stem.startswith("conv2d_winograd")
    and not process.not_here(i)
    for dtype in i.dtypes
]
CL = torch.channels_last


def _filters(kernel: str) -> list[tuple[int, int]]:
    """The sizes of filters that it serves: (5, 5) of conv2d_winograd_f2x2_5x5, 1x7 and 7x1 of conv2d_winograd_f3_1x7."""
    found = re.search(
        r"_(\d)x(\d)$", FOUND[kernel].stem.removesuffix("_f2x2").removesuffix("_f4x4").removesuffix("_f3x3_stride2")
    )
    r, s = (int(found[1]), int(found[2])) if found else (3, 3)
    return [(r, s)] if r == s else [(r, s), (s, r)]


def _with_filters(kernels: list[str]) -> list[Any]:
    """Parameters (kernel, direction, taps)."""
    return [
        pytest.param(k, direction, (r, s), marks=process.marks(FOUND[k]), id=f"{k}-{direction}-{r}x{s}")
        for k in kernels
        for r, s in _filters(k)
        for direction in ("fprop", "dgrad")
        if any((i.name, i.direction) == (k, direction) for i in dispatch.implementations("conv2d"))
    ]


def _geometry(r: int, s: int, stride: int = 1) -> tuple[Any, ...]:
    """Padding that keeps the size, or halves it."""
    return (stride, stride), (r // 2, r // 2, s // 2, s // 2), (1, 1), 1


def _stride(kernel: str) -> int:
    return 2 if FOUND[kernel].stem.endswith("stride2") else 1


GEOMETRY = _geometry(3, 3)


def _run(kernel: str, direction: str, t: torch.Tensor, w: torch.Tensor, geometry: tuple[Any, ...]) -> Any:
    if direction == "fprop":
        return ops.conv2d(t, w, None, *geometry, "fp32", kernel, True)
    size = (t.shape[0], w.shape[1] * geometry[3], *t.shape[2:])
    return ops.conv2d_dgrad(w, t, size, True, *geometry, "fp32", kernel, True)


def _dtype(kernel: str) -> torch.dtype:
    """One that a kernel has."""
    return torch.float32 if "f32" in FOUND[kernel].dtypes else dispatch.TORCH_DTYPES[FOUND[kernel].dtypes[0]]


def _summed(kernel: str, direction: str) -> int:
    """Channels to sum over: no multiple of a tile, and as many as the kernel asks for."""
    return 134 if (kernel, direction) == ("triton.conv2d_winograd_f4x4", "dgrad") else 70


def _operands(
    kernel: str, direction: str, dtype: torch.dtype, taps: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    generator, summed = torch.Generator().manual_seed(0), _summed(kernel, direction)
    t = torch.randn(2, summed, 19, 18, generator=generator).to(dtype).contiguous(memory_format=CL)
    w = torch.randn(*((37, summed) if direction == "fprop" else (summed, 37)), *taps, generator=generator).to(dtype)
    return t, w


@pytest.mark.parametrize(("kernel", "direction", "taps"), _with_filters(HERE))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_bad_values_stay_where_they_are(kernel: str, direction: str, taps: tuple[int, int], dtype: torch.dtype) -> None:
    """Infinities, NaNs, and finite values that overflow in the transforms: as the direct sum has them, and only there."""
    device, geometry = process.device(FOUND[kernel]), _geometry(*taps, _stride(kernel))

    def run(t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return _run(kernel, direction, t.to(device), w.to(device), geometry).cpu()

    dtypes = {dispatch.TORCH_DTYPES[d] for d in FOUND[kernel].dtypes}
    if dtype not in dtypes:
        pytest.skip(f"{kernel} has no {dtype}")
    half = process.stable_hash(kernel, direction) % 2 == 0
    if process.INTERPRETED and not process.FULL and torch.bfloat16 in dtypes and half != (dtype == torch.bfloat16):
        pytest.skip("takes seconds in the interpreter: the other dtype's turn")
    values = (float("inf"), -float("inf"), float("nan"), 2e38)
    places: Any = [
        ("t", (0, 33, 9, 8)),
        ("t", (1, 69, 0, 17)),
        ("t", (0, 0, 3, 4)),
        ("w", (36, 36, taps[0] // 2, taps[1] - 1)),
    ]
    if process.INTERPRETED and not process.FULL:  # a direct sum takes it seconds: one place and value of each
        turn = process.stable_hash(kernel, direction, dtype)
        values, places = (values[turn % 4],), [places[turn // 4 % 3], places[3]]
    for operand, index in places:
        for value in values:
            t, w = _operands(kernel, direction, dtype, taps)
            (t if operand == "t" else w)[index] = value
            if operand == "t":
                w.clamp_(-1, 1)  # a direct sum with 2e38 is finite
                clean = run(_operands(kernel, direction, dtype, taps)[0], w)
            out, expected = run(t, w), _run("cpu.conv2d_direct", direction, t, w, geometry)
            what = f"{kernel} {direction}, {value} in {operand} at {index}"
            oracle.check_nonfinite(what, out, expected)
            if operand == "t":  # tiles that don't see the value are computed as before
                n, _, h, c = index
                rows, columns = (
                    [i for i in range(s) if abs(i * _stride(kernel) - at) > 8]
                    for s, at in zip(out.shape[2:], (h, c), strict=True)
                )
                assert torch.equal(out[1 - n], clean[1 - n]), what
                assert torch.equal(out[n][:, rows], clean[n][:, rows]), what
                assert torch.equal(out[n][:, :, columns], clean[n][:, :, columns]), what
            if value != 2e38:  # which leaves a tile's other sums that much less exact
                finite = torch.isfinite(expected)
                tolerance = 2e-3 if dtype == torch.float32 else 0.5
                torch.testing.assert_close(
                    out[finite].float(), expected[finite].float(), rtol=2e-2, atol=tolerance, msg=what
                )


@pytest.mark.parametrize(("kernel", "direction", "taps"), _with_filters(OF_CPU))
def test_thread_count_changes_nothing(kernel: str, direction: str, taps: tuple[int, int]) -> None:
    t, w = _operands(kernel, direction, _dtype(kernel), taps)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 4, 7):
            torch.set_num_threads(count)
            results.append(_run(kernel, direction, t, w, _geometry(*taps, _stride(kernel))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0], other)


@pytest.mark.parametrize(("kernel", "direction", "taps"), _with_filters(OF_CPU))
def test_each_group_is_a_convolution(kernel: str, direction: str, taps: tuple[int, int]) -> None:
    """The bits of a group are those of a call with that group alone, with one thread, and with more threads than groups."""
    generator = torch.Generator().manual_seed(0)
    groups, c, k = 3, 64, 72
    x = torch.randn(2, groups * (c if direction == "fprop" else k), 15, 21, generator=generator)
    x, bias = x.contiguous(memory_format=CL), torch.randn(groups * k, generator=generator)
    w = torch.randn(groups * k, c, *taps, generator=generator)
    x, w, bias = (t.to(_dtype(kernel)) for t in (x, w, bias))

    def run(t: torch.Tensor, w: torch.Tensor, b: torch.Tensor, groups: int) -> torch.Tensor:
        params = (*_geometry(*taps, _stride(kernel))[:3], groups, "fp32", kernel, True)
        if direction == "fprop":
            y: torch.Tensor = ops.conv2d(t, w, b, *params)
            return y
        dx: torch.Tensor = ops.conv2d_dgrad(w, t, (2, groups * c, 15, 21), True, *params)
        return dx

    one_by_one = [
        run(*operands, 1) for operands in zip(x.chunk(groups, 1), w.chunk(groups), bias.chunk(groups), strict=True)
    ]
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            assert torch.equal(run(x, w, bias, groups), torch.cat(one_by_one, 1))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("channels", [8, 16, 32])
@pytest.mark.parametrize(
    ("kernel", "direction", "taps"),
    [
        p
        for p in _with_filters([k for k in OF_CPU if "f16" in FOUND[k].dtypes and _stride(k) == 1])
        if p.values[2] == (3, 3)
    ],
)
def test_few_channels_a_group(kernel: str, direction: str, taps: tuple[int, int], channels: int) -> None:
    """Groups share a vector, or are one or two: the same bits for any thread count, and bad values stay in their group."""
    generator, groups = torch.Generator().manual_seed(0), 6
    least = 32 if "portable" in kernel else 16  # that F(4x4) needs of fp32
    kinds = [torch.float16] if "f4x4" in kernel and channels < least else [torch.float16, torch.float32]
    t = torch.randn(3, groups * channels, 23, 26, generator=generator).contiguous(memory_format=CL)
    w = torch.randn(groups * channels, channels, *taps, generator=generator)
    geometry, before = (*_geometry(*taps)[:3], groups), torch.get_num_threads()
    for kind in kinds:
        x, v = t.to(kind), w.to(kind)
        clean = _run(kernel, direction, x, v, geometry)
        try:
            for count in (1, 2, 3, 4, 7):
                torch.set_num_threads(count)
                assert torch.equal(_run(kernel, direction, x, v, geometry), clean)
        finally:
            torch.set_num_threads(before)
        for index, value in (
            ((0, 0, 9, 8), float("inf")),
            ((1, 3 * channels - 1, 0, 25), float("nan")),
            ((2, 3 * channels, 22, 4), -float("inf")),
        ):
            bad = x.clone()
            bad[index] = value
            out, expected = (_run(k, direction, bad, v, geometry) for k in (kernel, "cpu.conv2d_direct"))
            oracle.check_nonfinite(f"{kernel} {direction} {kind}, {value} at {index}", out, expected)
            others = [g for g in range(groups) if g != index[1] // channels]
            # of groups that share a vector with it, the tiles around are summed directly
            far = torch.ones(26, dtype=torch.bool)
            far[max(0, index[3] - 8) : index[3] + 9] = False
            split, whole = (r.unflatten(1, (groups, channels))[:, others][..., far] for r in (out, clean))
            assert torch.equal(split, whole)


def _wgrad(kernel: str, x: torch.Tensor, g: torch.Tensor, channels_last: bool = False) -> torch.Tensor:
    size = (g.shape[1], x.shape[1], 3, 3)
    out: torch.Tensor = ops.conv2d_wgrad(x, g, size, channels_last, *GEOMETRY, "fp32", kernel, True)
    return out


def _wgrad_operands(n: int, c: int, k: int, h: int, w: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(n, channels, h, w, generator=generator) for channels in (c, k))
    return x.contiguous(memory_format=CL), g.contiguous(memory_format=CL)


@pytest.mark.parametrize("kernel", WITH_WGRAD)
def test_wgrad_of_bad_values(kernel: str) -> None:
    """A sum that isn't finite, by an operand or by what the transforms make of it, is the direct kernel's, and all others."""
    isa = kernel.rsplit(".", 1)[1]
    for operand, index in (("x", (0, 33, 9, 8)), ("x", (2, 0, 0, 0)), ("g", (1, 36, 18, 31))):
        for value in (float("inf"), -float("inf"), float("nan"), 2e38):
            x, g = _wgrad_operands(3, 34, 37, 19, 32)
            (x if operand == "x" else g)[index] = value
            (g if operand == "x" else x).clamp_(-1, 1)
            out, expected = _wgrad(kernel, x, g), _wgrad(f"cpu.conv2d_direct.{isa}", x, g)
            torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True, msg=f"{kernel} {operand} {value}")


@pytest.mark.parametrize(("kernel", "dtype"), WGRAD_OF_GPU)
def test_wgrad_of_bad_values_on_a_gpu(kernel: str, dtype: torch.dtype) -> None:
    """A tap's sum that isn't finite, by an operand or by what the transforms make of it, is the direct sum."""
    device, large = process.device(FOUND[kernel]), 6e4 if dtype == torch.float16 else 2e38
    unit = torch.finfo(dtype).eps / 2
    for operand, index, value in (
        ("x", (0, 33, 9, 8), float("inf")),
        ("x", (1, 0, 0, 0), float("nan")),
        ("g", (1, 36, 10, 12), -float("inf")),
        ("g", (0, 0, 22, 23), large),
    ):
        x, g = (t.to(dtype) for t in _wgrad_operands(2, 34, 38, 23, 24))
        (x if operand == "x" else g)[index] = value
        (g if operand == "x" else x).clamp_(-1, 1)
        out, expected = _wgrad(kernel, x.to(device), g.to(device)).cpu(), _wgrad("cpu.conv2d_direct", x, g)
        what = f"{kernel}, {value} in {operand} at {index}"
        oracle.check_nonfinite(what, out, expected)
        if value != large:  # which leaves other sums that much less exact
            finite = torch.isfinite(expected)
            # 288 tiles, each with a deviation of 5.7 roundings of 0.4 units: five deviations of the sum are 192 units
            atol, rtol = max(1e-4, 192 * unit), max(1e-4, 4 * unit)
            torch.testing.assert_close(out[finite], expected[finite], rtol=rtol, atol=atol, msg=what)


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "dtype"), WGRAD_OF_GPU)
def test_wgrad_in_chains_on_a_gpu(kernel: str, dtype: torch.dtype) -> None:
    """264 slices of more tiles than a chain of sums has; of numbers above 0, so that what one chain adds is no rounding."""
    if process.CHECKED:
        pytest.skip("takes minutes where each access is checked")
    generator = torch.Generator().manual_seed(0)
    x, g = (
        (torch.rand(1, 2, 1048, 1040, generator=generator) / 4).to(dtype).contiguous(memory_format=CL) for _ in range(2)
    )
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])
    reference = torch.ops.aten.convolution_backward(
        g.double(), x.double(), x.new_zeros(2, 2, 3, 3).double(), None, *geometry
    )[1]
    device = process.device(FOUND[kernel])
    out = _wgrad(kernel, x.to(device), g.to(device)).cpu()
    # twice the result's rounding, as those of a million products average out, or what sums in f32 lose; a slice's last
    # chain has 1.5 % of it
    bound = max(torch.finfo(dtype).eps, 1e-4)
    torch.testing.assert_close(out.double(), reference, rtol=bound, atol=0, msg=f"{kernel} {dtype}")


@pytest.mark.parametrize("kernel", WITH_WGRAD)
def test_wgrad_in_chunks_of_tiles(kernel: str) -> None:
    """More tiles than are transformed at a time: accuracy, and the same bits for any thread count."""
    n, c, k, h, w = 4, 71, 40, 62, 63
    x, g = _wgrad_operands(n, c, k, h, w)
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])

    def torchs(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        grad: torch.Tensor = torch.ops.aten.convolution_backward(g, x, x.new_zeros(k, c, 3, 3), None, *geometry)[1]
        return grad

    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(_wgrad(kernel, x, g, channels_last=count == 3))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0], other)
    reference, magnitude = torchs(x.double(), g.double()), torchs(x.double().abs(), g.double().abs())
    oracle.check(kernel, results[0], reference, torchs(x, g), magnitude)


def test_when_it_may_serve() -> None:
    """Never under "ieee", nor where a filter, a step or the accuracy forbids it; the reasons say why."""
    kernel = next(
        i
        for i in dispatch.implementations("conv2d")
        if i.backend == "cpu" and i.stem == "conv2d_winograd_f4x4" and i.direction == "fprop"
    )

    def reasons(
        c: int = 64, size: int = 28, taps: int = 3, stride: int = 1, precision: str = "fp32", groups: int = 1
    ) -> str:
        p = size // stride
        params = ((stride, stride), (1, 1, 1, 1), (1, 1), groups, precision)
        shapes = (1, c, size, size), (64, c // groups, taps, taps), (1, 64, p, p)
        return "; ".join(kernel.unsupported(problem("fprop", *shapes, torch.float32, torch.device("cpu"), params)))

    assert reasons() == reasons(precision="high") == ""
    assert "precision ieee" in reasons(precision="ieee")
    assert "3x3 filter, not 5x5" in reasons(taps=5)
    assert "stride 1" in reasons(stride=2)
    assert "not 16" in reasons(c=16, size=99)
    assert "20480" in reasons(size=14)
    assert reasons(groups=4) == ""
    assert "sums over 16 channels" in reasons(groups=8)
    assert "8 or more channels a group" in reasons(groups=16)


def test_when_it_may_serve_wgrad() -> None:
    """Few pixels are left to F(2x2): torch sums them too exactly for F(4x4)."""
    kernels = {
        i.stem: i
        for i in dispatch.implementations("conv2d")
        if i.backend == "cpu" and i.direction == "wgrad" and "winograd" in i.stem
    }

    def reasons(stem: str, n: int) -> str:
        shapes = (n, 64, 14, 14), (64, 64, 3, 3), (n, 64, 14, 14)
        params = ((1, 1), (1, 1, 1, 1), (1, 1), 1, "fp32")
        p = problem("wgrad", *shapes, torch.float32, torch.device("cpu"), params)
        return "; ".join(kernels[stem].unsupported(p))

    assert "sums over 1024 pixels" in reasons("conv2d_winograd_f4x4", 5)
    assert reasons("conv2d_winograd_f4x4", 6) == reasons("conv2d_winograd_f2x2", 1) == ""
