"""What Triton's convolutions have beside the tiles of implicit GEMM: products that tensor descriptors feed, and Winograd's choice."""

from __future__ import annotations

import itertools
import types
from typing import Any

import pytest
import torch
from cases import conv2d
from support import oracle, process
from support.memory import place, registered

from cnnfast import dispatch, tuning
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
# rows and columns around tiles, a depth that no block divides, several tiles a program
SHAPES = ((3, 80, 9, 7, 144), (1, 16, 5, 5, 16), (2, 272, 16, 9, 272))


def _problem(n: int, c: int, h: int, w: int, k: int, **fields: Any) -> Any:
    case = conv2d.Case("", n, c, h, w, k, 1, 1)
    strides = {
        "x": (h * w * c, 1, w * c, c),
        "w": (c, 1, 1, 1),
        "y": (h * w * k, 1, w * k, k),
        "r": (h * w * k, 1, w * k, k),
    }
    p = dispatch.parameters(conv2d.problem(case, "fprop", torch.bfloat16, "fp32"), strides)
    residual = {"r_n": h * w * k, "r_h": w * k, "r_w": k}
    return types.SimpleNamespace(**{**p, **residual, "precision": "fp32", **fields})


@pytest.mark.parametrize(
    "tile", _tiles.PERSISTENT_CONFIGS, ids=lambda t: f"triton.conv2d_implicit_gemm.{t.block_m}x{t.block_n}x{t.block_k}"
)
class TestProducts:
    pytestmark = runs

    @pytest.mark.parametrize("epilogue", [False, True], ids=["plain", "epilogue"])
    def test_fprop(self, tile: Any, epilogue: bool) -> None:
        if epilogue and tile not in _tiles.persistent(90, True):
            pytest.skip("no tile of a residual's")
        dtype = torch.float16 if epilogue else torch.bfloat16
        for n, c, h, w, k in SHAPES:
            g = torch.Generator().manual_seed(0)
            x, weight, r = (torch.randn(s, generator=g).to(dtype) for s in ((n, c, h, w), (k, c, 1, 1), (n, k, h, w)))
            b, scale, shift = (torch.randn(k, generator=g) for _ in range(3))
            given = [place(x, "nhwc"), place(weight, "nhwc"), place(r, "nhwc")]
            out = place(torch.zeros(n, k, h, w), "nhwc", dtype)
            p = _problem(n, c, h, w, k, act=int(epilogue))
            more = (scale, shift, given[2].tensor) if epilogue else (None, None, None)
            operands = (given[0].tensor, given[1].tensor, b.to(dtype) if epilogue else None, out.tensor, *more)
            _launch(kernels.fprop, p, operands, out, tile)

            def exact(like: torch.dtype, *parts: Any) -> torch.Tensor:
                z = torch.nn.functional.conv2d(parts[0].to(like), parts[1].to(like))
                if not epilogue:
                    return z
                bias, by, on_top = (v.to(like).reshape(1, -1, 1, 1) for v in (parts[2].to(dtype), *parts[3:5]))
                z = (z + bias) * by + on_top
                return z + parts[5].to(like)

            parts = (x, weight, b, scale, shift, r)
            reference, magnitude = exact(torch.double, *parts), exact(torch.double, *(t.abs() for t in parts))
            own = exact(torch.float, *parts).to(dtype)
            if epilogue:
                reference, own = reference.relu(), own.relu()
            oracle.check(f"{tile}, {n, c, h, w, k}", out.tensor.cpu(), reference, own, magnitude, depth=c)
            for one in given:
                one.check("an operand")

    def test_dgrad(self, tile: Any) -> None:
        for n, c, h, w, k in SHAPES:
            g = torch.Generator().manual_seed(0)
            y, weight = (torch.randn(s, generator=g).to(torch.bfloat16) for s in ((n, k, h, w), (k, c, 1, 1)))
            given, out = (
                [place(y, "nhwc"), place(weight, "nhwc")],
                place(torch.zeros(n, c, h, w), "nhwc", torch.bfloat16),
            )
            p = _problem(n, c, h, w, k)
            _launch(kernels.dgrad, p, (out.tensor, given[1].tensor, None, given[0].tensor), out, tile)
            turned = weight.transpose(0, 1)
            exact = [torch.nn.functional.conv2d(y.to(t), turned.to(t)) for t in (torch.double, torch.float)]
            magnitude = torch.nn.functional.conv2d(y.double().abs(), turned.double().abs())
            what = f"{tile}, {n, c, h, w, k}"
            oracle.check(what, out.tensor.cpu(), exact[0], exact[1].to(torch.bfloat16), magnitude, depth=k)


def _launch(launcher: Any, p: Any, operands: Any, out: Any, tile: Any) -> None:
    """Nothing beside the operands is read, nothing beside the result written."""
    moved = [t if t is None else t.to(DEVICE) for t in operands] if DEVICE == "cuda" else list(operands)
    with registered([(t, t is out.tensor) for t in moved]):
        launcher(p, *moved, tile=tile)
    if DEVICE == "cuda":
        out.tensor.copy_(next(a for a, t in zip(moved, operands, strict=True) if t is out.tensor))
    inside = torch.zeros_like(out.buffer, dtype=torch.bool)
    inside.as_strided(out.tensor.shape, out.tensor.stride(), out.tensor.storage_offset()).fill_(True)
    assert bool(out.buffer[~inside].isnan().all()), "written beside the result"
    assert not bool(out.tensor.isnan().any())


plain = pytest.mark.skipif(process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it")


@plain
def test_only_tuning_takes_them_where_they_serve() -> None:
    """On sm_90 and sm_100, of a plain product of aligned 16-bit floats: among the candidates, and no launcher's own choice."""
    half, h100 = configs.Facts(2, "bf16"), _cards.CARDS["H100"]
    p = _problem(32, 256, 28, 28, 256)
    for direction in ("fprop", "dgrad"):
        assert any(t.persistent for t in configs.configs(p, direction, half, h100))
        assert not configs.usual(p, direction, half, h100).persistent
    refused = [
        (p, "wgrad", half, h100), (p, "fprop", configs.Facts(4, "f32"), h100), (p, "fprop", half, _cards.CARDS["A100"]),
        (p, "fprop", configs.Facts(2, "bf16", aligned=False), h100), (p, "fprop", half, _cards.Card(120, 170)),
        (p, "fprop", configs.Facts(2, "bf16", sums=True, residual=True), h100),
        (_problem(32, 72, 28, 28, 256), "fprop", half, h100), (_problem(32, 64, 28, 28, 256, stride_h=2), "fprop", half, h100),
        (_problem(32, 64, 28, 28, 256, w_c=256, w_k=1), "fprop", half, h100),
        (_problem(32, 64, 28, 28, 256, x_h=28 * 64 + 64), "fprop", half, h100),
        (_problem(32, 64, 28, 28, 256, r_h=0), "fprop", configs.Facts(2, "bf16", residual=True), h100),
    ]  # fmt: skip
    assert not [r for r in refused if any(t.persistent for t in configs.configs(*r))]
    for arch, residual in itertools.product((90, 100), (False, True)):
        for tile in _tiles.persistent(arch, residual):
            assert _cards.shared_bytes(tile, 2, arch) <= _cards.LIMITS[arch].shared_block


@plain
def test_absent_descriptors_are_no_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "SUPPORTED", False)
    p = _problem(32, 64, 28, 28, 256)
    found = configs.configs(p, "fprop", configs.Facts(2, "bf16"), _cards.CARDS["H100"])
    assert found
    assert not any(t.persistent for t in found)


@plain
def test_a_launch_is_repeated_over_other_tensors() -> None:
    """A recorded descriptor gets the base of the call at hand, and keeps no tensor of the first one alive."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    first, second = (torch.zeros(8, 16, dtype=torch.bfloat16) for _ in range(2))
    seen: list[Any] = []
    recorded = types.SimpleNamespace(
        compiled={(1, 1, 1): lambda *a: seen.append(a)}, grid=(1, 1, 1),
        arguments=[TensorDescriptor(first, [8, 16], [16, 1], [8, 16]), first, 7],
    )  # fmt: skip
    repeat = triton._Repeat.of([recorded], [first], None)
    assert repeat is not None
    repeat([second], None)
    ((descriptor, plain_argument, number),) = seen
    assert descriptor.base is second
    assert (descriptor.shape, descriptor.block_shape) == ([8, 16], [8, 16])
    assert plain_argument is second
    assert number == 7
    assert repeat._launches[0][1][0].base is None


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
    """Wide layers in fp32 on large maps; never with tf32 or 16-bit products, at 64 channels, or for one small image."""
    assert _choice(256, 512, 28, direction) == "conv2d_winograd_f4x4"
    for other in (
        _choice(256, 512, 28, direction, precision="high"), _choice(256, 512, 28, direction, torch.bfloat16),
        _choice(256, 64, 56, direction), _choice(1, 512, 7, direction), _choice(256, 512, 28, direction, precision="ieee"),
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
