"""What Triton's convolutions have beside the tiles of implicit GEMM: products that tensor descriptors feed, and Winograd's choice."""

from __future__ import annotations

import dataclasses
import itertools
import math
import types
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from cases import conv2d
from support import oracle, process
from support.memory import Guarded, place, registered

from cnnfast import dispatch, ops, settings, tuning
from cnnfast.backends import triton

pytest.importorskip("triton")

from cnnfast.kernels import _cards, _conv2d_descriptor, _tiles
from cnnfast.kernels import _conv2d_implicit_gemm_configs as configs
from cnnfast.kernels import conv2d_implicit_gemm as kernels

CARD = process.GPU and torch.cuda.get_device_capability()[0] in (9, 10)
runs = [
    pytest.mark.interpreter if process.INTERPRETED else pytest.mark.gpu,
    pytest.mark.skipif(not (process.INTERPRETED or CARD) or bool(triton.ABSENT), reason="runs Triton kernels on sm_90"),
]
DEVICE = "cpu" if process.INTERPRETED or not process.GPU else "cuda"
Case = conv2d.Case
# "cut": rows and columns of a larger map
LAYERS = (
    Case(
        "1x1: rows and columns around tiles, a depth that no block divides, several tiles a program",
        3,
        80,
        9,
        7,
        144,
        1,
        1,
    ),
    Case("1x1: less than a tile", 1, 16, 5, 5, 16, 1, 1),
    Case("1x1: two tiles of channels, five blocks of depth", 2, 272, 16, 9, 272, 1, 1),
    Case("1x1 of places that lie at no one distance", 2, 24, 6, 5, 40, 1, 1, x_layout="cut"),
    Case("1x1 with padding", 2, 16, 4, 5, 24, 1, 1, padding=(2, 1)),
    Case("3x3: prime map, channels off every block, several tiles a program", 3, 72, 7, 17, 136, 3, 3, padding=(1, 1)),
    Case(
        "3x3: an odd batch in boxes of two and four images", 5, 24, 7, 7, 40, 3, 3, padding=(1, 1), x_layout="channels"
    ),
    Case("padding beyond the filter", 2, 16, 5, 6, 24, 2, 3, padding=(4, 5), w_layout="channels"),
    Case("padding on one side", 1, 8, 9, 8, 32, 3, 3, padding=(0, 2, 1, 0), x_layout="cut"),
    Case("dilation", 1, 40, 17, 9, 16, 3, 2, padding=(2, 1), dilation=(2, 3)),
    Case("1x7, a depth of whole blocks", 2, 64, 6, 19, 64, 1, 7, padding=(0, 3)),
    Case("7x1", 2, 48, 17, 5, 32, 7, 1, padding=(3, 0), x_layout="channels"),
    Case("5x5 leaves one place", 3, 16, 5, 5, 40, 5, 5),
)
SMALL = Case("a batch, a map and channels that no box divides", 3, 24, 3, 4, 40, 3, 2, padding=(1, 1), x_layout="cut")


def _problem(case: Case, strides: dict[str, tuple[int, ...]] | None = None, **fields: Any) -> Any:
    """In NHWC, weights too, or with these strides; the residual lies as the result does where none are given for it."""
    dense = {name: torch.empty(shape, device="meta").to(memory_format=torch.channels_last).stride()
             for name, shape in case.shapes.items() if len(shape) == 4}  # fmt: skip
    strides = {**dense, **(strides or {})}
    r = strides.setdefault("r", strides["y"])
    p = dispatch.parameters(conv2d.problem(case, "fprop", torch.bfloat16, "fp32"), strides)
    return types.SimpleNamespace(**{**p, "r_n": r[0], "r_h": r[2], "r_w": r[3], "precision": "fp32", **fields})


def _placed(values: torch.Tensor, layout: str) -> Guarded:
    """The values amid NaNs."""
    if layout != "cut":
        return place(values, layout)
    n, c, h, w = values.shape
    larger = torch.full((n, c, h + 3, w + 2), float("nan"), dtype=values.dtype)
    larger[:, :, 1:-2, 1:-1] = values
    one = place(larger, "nhwc")
    return dataclasses.replace(one, tensor=one.tensor[:, :, 1:-2, 1:-1])


def _convolved(case: Case, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    top, bottom, left, right = case.pads
    return torch.nn.functional.conv2d(torch.nn.functional.pad(x, (left, right, top, bottom)), w, dilation=case.dilation)


def _check_fprop(case: Case, tile: Any, epilogue: bool) -> None:
    dtype = torch.float16 if epilogue else torch.bfloat16
    shapes, g = case.shapes, torch.Generator().manual_seed(0)
    x, weight, r = (torch.randn(shapes[name], generator=g).to(dtype) for name in ("x", "w", "y"))
    b, scale, shift = (torch.randn(case.K, generator=g) for _ in range(3))
    w_layout = "channels" if case.w_layout == "channels" else "nhwc"
    r_layout = "channels" if case.x_layout == "nhwc" else "nhwc"
    given = [_placed(x, case.x_layout), _placed(weight, w_layout), _placed(r, r_layout)]
    out = _placed(torch.zeros(shapes["y"], dtype=dtype), case.x_layout)
    lie = dict(zip("xwry", (t.tensor.stride() for t in (*given, out)), strict=True))
    more = (scale, shift, given[2].tensor) if epilogue else (None, None, None)
    operands = (given[0].tensor, given[1].tensor, b.to(dtype) if epilogue else None, out.tensor, *more)
    _launch(kernels.fprop, _problem(case, lie, act=int(epilogue)), operands, out, tile)

    def exact(like: torch.dtype, *parts: Any) -> torch.Tensor:
        z = _convolved(case, parts[0].to(like), parts[1].to(like))
        if not epilogue:
            return z
        bias, by, on_top = (v.to(like).reshape(1, -1, 1, 1) for v in (parts[2].to(dtype), *parts[3:5]))
        return (z + bias) * by + on_top + parts[5].to(like)

    parts = (x, weight, b, scale, shift, r)
    reference, magnitude = exact(torch.double, *parts), exact(torch.double, *(t.abs() for t in parts))
    own = exact(torch.float, *parts).to(dtype)
    if epilogue:
        reference, own = reference.relu(), own.relu()
    oracle.check(f"{tile}, {case}", out.tensor.cpu(), reference, own, magnitude)
    for one in given:
        one.check("an operand")


def _check_dgrad(case: Case, tile: Any) -> None:
    shapes, g = case.shapes, torch.Generator().manual_seed(0)
    y, weight = (torch.randn(shapes[name], generator=g).to(torch.bfloat16) for name in ("y", "w"))
    w_layout = "channels" if case.w_layout == "channels" else "nhwc"
    given = [_placed(y, case.x_layout), _placed(weight, w_layout)]
    out = _placed(torch.zeros(shapes["x"], dtype=torch.bfloat16), case.x_layout)
    lie = {"x": out.tensor.stride(), "w": given[1].tensor.stride(), "y": given[0].tensor.stride()}
    _launch(kernels.dgrad, _problem(case, lie), (out.tensor, given[1].tensor, None, given[0].tensor), out, tile)

    def exact(like: torch.dtype, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = torch.zeros(shapes["x"], dtype=like, requires_grad=True)
        return torch.autograd.grad(_convolved(case, x, weight.to(like)), x, y.to(like))[0]

    reference, own = exact(torch.double, y, weight), exact(torch.float, y, weight).to(torch.bfloat16)
    oracle.check(f"{tile}, {case}", out.tensor.cpu(), reference, own, exact(torch.double, y.abs(), weight.abs()))
    for one in given:
        one.check("an operand")


def _turns(of: Iterable[Any]) -> list[Any]:
    """Each with every tile, or in make test with one by turns."""
    return [
        pytest.param(one, tile, id=f"triton.conv2d_implicit_gemm.{tile.block_m}x{tile.block_n}x{tile.block_k}-{one}")
        for one in of
        for turn, tile in enumerate(_tiles.PERSISTENT_CONFIGS)
        if process.FULL or process.stable_hash(one, "descriptor") % len(_tiles.PERSISTENT_CONFIGS) == turn
    ]


def _shared() -> list[Case]:
    """The cases of all kernels that descriptors can feed in NHWC; in make test one in sixteen by turns."""
    dense = {
        str(c): c for c in (dataclasses.replace(c, x_layout="nhwc", w_layout="nhwc", g_layout="") for c in conv2d.CASES)
    }
    of = configs.Facts(2, "bf16", residual=True)
    return [
        case for name, case in dense.items()
        if (process.FULL or process.stable_hash(name, "shared") % 16 == 0) and configs._described(_problem(case), "fprop", of)
    ]  # fmt: skip


class TestProducts:
    pytestmark = runs

    @pytest.mark.parametrize(("case", "tile"), _turns(_shared()))
    def test_shared_case(self, case: Case, tile: Any) -> None:
        _check_fprop(case, tile, True)
        _check_dgrad(case, tile)

    @pytest.mark.parametrize(("case", "tile"), _turns(LAYERS))
    def test_fprop(self, case: Case, tile: Any) -> None:
        _check_fprop(case, tile, False)

    @pytest.mark.parametrize(("case", "tile"), _turns(LAYERS))
    def test_fprop_with_an_epilogue(self, case: Case, tile: Any) -> None:
        _check_fprop(case, tile, True)

    @pytest.mark.parametrize(("case", "tile"), _turns(LAYERS))
    def test_dgrad(self, case: Case, tile: Any) -> None:
        _check_dgrad(case, tile)

    @pytest.mark.parametrize(("number", "tile"), _turns(range(len(_conv2d_descriptor.boxes(128)))))
    def test_every_box(self, number: int, tile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_conv2d_descriptor, "box", lambda block_m, *_: _conv2d_descriptor.boxes(block_m)[number])
        _check_fprop(SMALL, tile, True)
        _check_dgrad(SMALL, tile)


def _launch(launcher: Any, p: Any, operands: Any, out: Any, tile: Any) -> None:
    """Nothing beside the operands is read, nothing beside the result written."""
    moved = [t if t is None else _moved(t) for t in operands]
    written = next(m for m, t in zip(moved, operands, strict=True) if t is out.tensor)
    with registered([(t, t is written) for t in moved]):
        launcher(p, *moved, tile=tile)
    if DEVICE == "cuda":
        out.buffer.copy_(written.as_strided(out.buffer.shape, out.buffer.stride(), 0))
    inside = torch.zeros_like(out.buffer, dtype=torch.bool)
    inside.as_strided(out.tensor.shape, out.tensor.stride(), out.tensor.storage_offset()).fill_(True)
    assert bool(out.buffer[~inside].isnan().all()), "written beside the result"
    assert not bool(out.tensor.isnan().any())


def _moved(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as it lies amid its buffer, on the device."""
    if DEVICE == "cpu":
        return tensor
    buffer = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0).to(DEVICE)
    return buffer.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


plain = pytest.mark.skipif(process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it")


@plain
def test_only_tuning_takes_them_where_they_serve() -> None:
    """On sm_90 and sm_100, of aligned 16-bit floats at stride 1: among the candidates, and no launcher's own choice."""
    half, h100 = configs.Facts(2, "bf16"), _cards.CARDS["H100"]
    plain_product = Case("", 32, 256, 28, 28, 256, 1, 1)
    layer = Case("", 32, 256, 28, 28, 256, 3, 3, padding=(1, 1))
    rows, pixels = (28 * 28 * 320, 1, 28 * 320, 320), (28 * 40 * 256, 1, 40 * 256, 256)
    taken = [_problem(plain_product), _problem(layer), _problem(layer, {"x": rows, "y": pixels, "w": (9 * 264, 1, 3 * 264, 264)}),
             _problem(layer, dilation_h=2), _problem(Case("", 32, 72, 28, 28, 200, 1, 7)),
             _problem(plain_product, {"x": pixels})]  # fmt: skip
    for p, direction, residual in itertools.product(taken, ("fprop", "dgrad"), (False, True)):
        if residual and direction == "dgrad":
            continue
        of = configs.Facts(2, "bf16", residual=residual)
        assert any(t.persistent for t in configs.configs(p, direction, of, h100))
        assert not configs.usual(p, direction, of, h100).persistent
    p, odd = _problem(layer), (28 * 28 * 260, 1, 28 * 260, 260)
    refused = [
        (p, "wgrad", half, h100), (p, "fprop", configs.Facts(4, "f32"), h100), (p, "fprop", half, _cards.CARDS["A100"]),
        (p, "fprop", configs.Facts(2, "bf16", aligned=False), h100), (p, "fprop", half, _cards.Card(120, 170)),
        (p, "fprop", configs.Facts(2, "bf16", sums=True, residual=True), h100), (p, "fprop", configs.Facts(2, "bf16", normed=True), h100),
        (_problem(layer, stride_h=2), "fprop", half, h100), (_problem(layer, stride_w=2), "dgrad", half, h100),
        (_problem(Case("", 32, 256, 28, 28, 256, 3, 3, groups=2)), "fprop", half, h100),
        (_problem(Case("", 32, 68, 28, 28, 256, 3, 3)), "fprop", half, h100),
        (_problem(Case("", 32, 256, 28, 28, 132, 3, 3)), "fprop", half, h100),
        (_problem(Case("", 32, 8, 28, 28, 256, 3, 3)), "fprop", half, h100), (_problem(layer, {"w": (2304, 9, 3, 1)}), "fprop", half, h100),
        (_problem(layer, {"x": odd}), "fprop", half, h100), (_problem(layer, {"y": odd}), "fprop", half, h100),
        (_problem(layer, {"x": (256 * 784, 784, 28, 1)}), "fprop", half, h100),
        (_problem(layer, {"x": (0, 1, 28 * 256, 256)}), "fprop", half, h100),
        (_problem(layer, {"w": (9 * 260, 1, 3 * 260, 260)}), "fprop", half, h100),
        (_problem(layer, {"r": (256, 1, 0, 0)}), "fprop", configs.Facts(2, "bf16", residual=True), h100),
    ]  # fmt: skip
    assert not [r for r in refused if any(t.persistent for t in configs.configs(*r))]
    for arch in (90, 100):
        for tile in _tiles.persistent(arch):
            assert _cards.shared_bytes(tile, 2, arch) <= _cards.LIMITS[arch].shared_block


@plain
def test_the_box_that_wastes_the_fewest_places() -> None:
    """By the map and the batch; every box is the best of some, holds all places, and no side is more than TMA's 256."""
    best = {
        (1, 7, 7): (1, 8, 16), (8, 7, 7): (2, 8, 8), (32, 7, 7): (16, 8, 1), (128, 7, 7): (128, 1, 1), (32, 14, 14): (32, 2, 2),
        (8, 28, 28): (8, 4, 4), (32, 56, 56): (2, 8, 8), (1, 112, 112): (1, 8, 16), (1, 1, 32 * 784): (1, 1, 128),
    }  # fmt: skip
    assert {covered: _conv2d_descriptor.box(128, *covered) for covered in best} == best
    assert set(best.values()) == set(_conv2d_descriptor.boxes(128))
    for block_m in {t.block_m for t in _tiles.PERSISTENT_CONFIGS}:
        for one in _conv2d_descriptor.boxes(block_m):
            assert math.prod(one) == block_m
            assert max(one) <= 256

    def wasted(*covered: int) -> float:
        places = 128 * _conv2d_descriptor.tiles(_conv2d_descriptor.box(128, *covered), *covered)
        return round(100 - 100 * math.prod(covered) / places)

    found = [[wasted(n, side, side) for side in (7, 14, 28, 56)] for n in (1, 32, 128)]
    assert found == [[62, 23, 23, 12], [12, 0, 0, 0], [0, 0, 0, 0]]


@plain
def test_wasted_places_are_in_the_prediction() -> None:
    """A map of which a tile has much in vain is predicted to take as long as one that fills it."""
    h100, half = _cards.CARDS["H100"], configs.Facts(2, "bf16")
    for n, side, direction in ((1, 9, "fprop"), (3, 9, "dgrad"), (32, 16, "fprop")):
        p = _problem(Case("", n, 256, side, side + 1, 256, 3, 3))
        covered = (n, side, side + 1) if direction == "dgrad" else (n, side - 2, side - 1)
        for block_m in {t.block_m for t in _tiles.PERSISTENT_CONFIGS}:
            number = _conv2d_descriptor.tiles(_conv2d_descriptor.box(block_m, *covered), *covered)
            assert configs._places(p, direction, half, block_m) == number * block_m >= math.prod(covered)
    plain_product = _problem(Case("", 3, 64, 7, 7, 64, 1, 1))
    assert configs._places(plain_product, "fprop", half, 128) == 256
    small = _problem(Case("", 1, 256, 7, 7, 256, 3, 3, padding=(1, 1)))
    assert not configs.configs(small, "fprop", half, h100)[0].persistent


@plain
def test_absent_descriptors_are_no_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "SUPPORTED", False)
    p = _problem(Case("", 32, 64, 28, 28, 256, 3, 3))
    found = configs.configs(p, "fprop", configs.Facts(2, "bf16"), _cards.CARDS["H100"])
    assert found
    assert not any(t.persistent for t in found)


@plain
def test_a_launch_is_repeated_over_other_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded descriptor gets the base of the call at hand, and keeps no tensor of the first one alive."""
    from triton import knobs
    from triton.tools.tensor_descriptor import TensorDescriptor

    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 5, raising=False)
    first, second = (torch.zeros(8, 16, dtype=torch.bfloat16) for _ in range(2))
    scratch, another = (torch.zeros(64, dtype=torch.uint8) for _ in range(2))
    direct: list[Any] = []
    hooked: list[Any] = []

    class Compiled(dict[Any, Any]):
        function, packed_metadata = 11, (4, 1, 0)

        def run(self, *arguments: Any) -> None:
            direct.append(arguments)

    recorded = types.SimpleNamespace(
        compiled=Compiled({(3, 1, 1): lambda *a: hooked.append(a)}), grid=(3, 1, 1),
        arguments=[TensorDescriptor(first, [8, 16], [16, 1], [8, 16]), first, 7, scratch[16:]],
    )  # fmt: skip
    repeat = triton._Repeat.of([recorded], [first], scratch)
    assert repeat is not None
    assert repeat._launches[0][2][0].base is None
    assert repeat._launches[0][2][1] is None
    repeat([second], another)
    ((*grid, stream, function, metadata, no_metadata, enter, leave, descriptor, address, number, inside),) = direct
    assert (grid, stream, function, metadata) == ([3, 1, 1], 5, 11, (4, 1, 0))
    assert (no_metadata, enter, leave) == (None, None, None)
    assert descriptor.base is second
    assert (descriptor.shape, descriptor.block_shape) == ([8, 16], [8, 16])
    assert (address, number, inside) == (second.data_ptr(), 7, another.data_ptr() + 16)
    # a profiler's hook sees the launch
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", lambda metadata: None)
    repeat([second], another)
    assert len(direct) == 1
    assert [a[1:] for a in hooked] == [(second.data_ptr(), 7, another.data_ptr() + 16)]


@plain
def test_tiles_are_kept_and_read() -> None:
    for tile in _tiles.PERSISTENT_CONFIGS:
        assert configs.parse(configs.dump(tile)) == tile
    assert tuning.Entry.of({"tile": configs.dump(tile), "seconds": 1, "before": 2}).tile == list(configs.dump(tile))
    assert _conv2d_descriptor.SUPPORTED


# ---- Winograd --------------------------------------------------------------------------------------------------------


def _choice(n: int, c: int, h: int, direction: str, dtype: torch.dtype = torch.float32, precision: str = "fp32") -> str:
    """Triton's cheapest kernel of a 3x3 convolution, by prediction."""
    case = conv2d.Case("", n, c, h, h, c, 3, 3, padding=(1, 1))
    p = conv2d.problem(case, direction, dtype, precision)
    fitting = [
        i for i in triton.IMPLEMENTATIONS
        if (i.op, i.direction) == ("conv2d", direction) and not dispatch.reasons_against(i, p)
    ]  # fmt: skip
    return min(fitting, key=lambda i: i.cost(p)).stem


@plain
@pytest.mark.parametrize("direction", ["fprop", "dgrad", "wgrad"])
def test_winograd_is_chosen_where_products_outweigh_its_transforms(direction: str) -> None:
    """Wide layers in fp32 on large maps; not in 16 bits, at 64 channels, or for one small image, nor in tf32, but for the
    weights' gradient, whose products as an implicit GEMM were measured to be slow.
    """
    assert _choice(256, 512, 28, direction) == "conv2d_winograd_f4x4"
    for other in (
        _choice(256, 512, 28, direction, torch.bfloat16), _choice(256, 64, 56, direction), _choice(1, 512, 7, direction),
        _choice(256, 512, 28, direction, precision="ieee"),
        *(_choice(256, 512, 28, direction, precision="high") for _ in range(direction != "wgrad")),
    ):  # fmt: skip
        assert other == "conv2d_implicit_gemm"


@plain
@pytest.mark.parametrize("m", [2, 4])
def test_winograds_workspace_is_bounded(m: int) -> None:
    """By a chunk of tiles and the transformed weights, however large the batch; what would need more is refused."""
    from cnnfast.kernels import _conv2d_winograd as winograd

    for n, c, h, k in ((256, 512, 28, 512), (256, 64, 224, 64), (1, 1, 3, 1), (64, 3, 224, 64)):
        case = conv2d.Case("", n, c, h, h, k, 3, 3, padding=(1, 1))
        p: Any = types.SimpleNamespace(**dict(conv2d.problem(case, "fprop", torch.float32, "fp32").sizes), **dict.fromkeys(
            ("x_n", "x_h", "x_w", "y_n", "y_h", "y_w", "w_k", "w_c", "w_r", "w_s"), 0))  # fmt: skip
        weights = 4 * (m + 2) ** 2 * (k + 63) * (c + 63)
        tiles = 4 * (m + 2) ** 2 * 64 * (c + k + 128)
        for size in winograd.workspaces(m).values():
            assert 0 < size(p) <= weights + max(tiles, winograd.CHUNK_BYTES)
    refused = conv2d.problem(conv2d.Case("", 1, 4096, 9, 9, 4096, 3, 3, padding=(1, 1)), "fprop", torch.float32, "fp32")
    assert "transformed weights of" in " ".join(triton._winograd(refused, m))


# ---- the strides that kernels see --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [
        ((64, 32, 1, 1), (32, 1, 1, 1), (32, 1, 32, 32)),  # a 1x1 convolution's weights, as torch makes them
        ((8, 32, 1, 1), (32, 1, 7, 5), (32, 1, 32, 32)),
        ((1, 32, 5, 4), (3, 1, 128, 32), (640, 1, 128, 32)),  # one image
        ((2, 1, 5, 4), (40, 20, 8, 2), (40, 1, 8, 2)),  # one channel of two
        ((2, 3, 5, 4), (60, 20, 4, 1), (60, 20, 4, 1)),
        ((0, 3, 1, 4), (12, 4, 4, 1), (12, 4, 12, 1)),
        ((5,), (1,), (1,)),
        ((1,), (3,), (1,)),
        ((), (), ()),
    ],
)
def test_dimensions_of_one_have_dense_strides(
    shape: tuple[int, ...], strides: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    """torch leaves them to chance; a stride of 1 there would hide from the compiler that rows are aligned."""
    assert dispatch.canonical_strides(shape, strides) == expected


@pytest.mark.interpreter
@pytest.mark.parametrize("direction", ["fprop", "dgrad"])
@pytest.mark.parametrize("taps", [1, 3])
def test_weights_are_read_in_rows(direction: str, taps: int) -> None:
    """As torch makes them, R·S elements lie between channels: kernels get them in channels_last, with aligned strides."""
    x = torch.randn(2, 32, 6, 6).contiguous(memory_format=torch.channels_last)
    w = torch.randn(16, 32, taps, taps)
    pads, tail = (taps // 2,) * 4, ((1, 1), 1, "fp32", "triton", True)
    expected = torch.nn.functional.conv2d(x, w, None, 1, taps // 2)
    with settings.observe(), tuning.collecting() as tasks:
        if direction == "fprop":
            out = ops.conv2d(x, w, None, (1, 1), pads, *tail)
        else:
            out = ops.conv2d_dgrad(w, expected, x.shape, True, (1, 1), pads, *tail)
            expected = torch.nn.grad.conv2d_input(x.shape, w, expected, 1, taps // 2)
    assert torch.allclose(out, expected, rtol=1e-4, atol=1e-4)
    operands = [o for o in tasks[0].operands if o is not None]
    found = next(strides for shape, strides, *_ in operands if shape == w.shape)
    assert taps == 1 or found == dispatch.channels_last_strides(w.shape)
