"""How implicit GEMMs are cut into blocks: a pure function, compiled here without a device."""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support import process
from support.occupancy import LIMITS, blocks_at_once

import cnnfast
from cnnfast.backends.cuda import RULES
from cnnfast.ops.conv2d import problem

REPOSITORY = Path(__file__).resolve().parents[1]
PLAN = REPOSITORY / "csrc" / "cuda" / "conv2d_implicit_gemm_plan.h"
TILES = ((128, 128), (128, 64), (64, 64))
# Compute capability and multiprocessors.
CARDS = {
    "A100": (80, 108), "RTX 3090": (86, 82), "L4": (89, 58), "RTX 4090": (89, 128), "H100": (90, 132), "B200": (100, 148),
    "RTX 5090": (120, 170), "a single one": (90, 1),
}  # fmt: skip

SOURCE = f"""
#include "{PLAN}"
using namespace cnnfast::cuda::implicit_gemm;
extern "C" int64_t tile(int64_t rows, int64_t columns, int64_t depth, int64_t products, int64_t processors, int64_t shared) {{
  return choose_tile(rows, columns, depth, products, processors, shared);
}}
extern "C" int64_t at_once(int64_t i, int64_t shared) {{ return blocks_at_once(kShapes[i], shared); }}
extern "C" void split(int64_t rows, int64_t columns, int64_t depth, int64_t products, int64_t* out) {{
  const Split s = choose_split(rows, columns, depth, products);
  out[0] = s.tile, out[1] = s.slices, out[2] = s.depth;
}}
extern "C" int64_t small_slices(int64_t rows, int64_t columns, int64_t depth, int64_t products) {{
  return choose_small_split(rows, columns, depth, products).slices;
}}
extern "C" void shape(int64_t i, int64_t* out) {{ out[0] = kShapes[i].rows, out[1] = kShapes[i].columns; }}
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("plan")
    (folder / "plan.cpp").write_text(SOURCE)
    library = folder / "plan.so"
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-o", str(library), str(folder / "plan.cpp")], check=True
    )
    return ctypes.CDLL(str(library))


def tile(plan: ctypes.CDLL, *sizes: int) -> tuple[int, int]:
    return TILES[plan.tile(*map(ctypes.c_int64, sizes))]


def split(plan: ctypes.CDLL, *sizes: int) -> tuple[tuple[int, int], int, int]:
    out = (ctypes.c_int64 * 3)()
    plan.split(*map(ctypes.c_int64, sizes), out)
    return TILES[out[0]], out[1], out[2]


def test_shapes(plan: ctypes.CDLL) -> None:
    for i, expected in enumerate(TILES):
        out = (ctypes.c_int64 * 2)()
        plan.shape(ctypes.c_int64(i), out)
        assert tuple(out) == expected


@pytest.mark.parametrize("capability", LIMITS)
def test_blocks_at_once(plan: ctypes.CDLL, capability: int) -> None:
    """As many as shared memory holds, by the rule that the static table's occupancy follows, too."""
    shared = LIMITS[capability].shared
    for i, (rows, columns) in enumerate(TILES):
        bounded = plan.at_once(ctypes.c_int64(i), ctypes.c_int64(1 << 40))  # by registers
        threads = 128
        expected = min(bounded, blocks_at_once(capability, threads, 32, (rows + columns) * 256))
        assert plan.at_once(ctypes.c_int64(i), ctypes.c_int64(shared)) == expected


@pytest.mark.parametrize("card", CARDS)
def test_tiles(plan: ctypes.CDLL, card: str) -> None:
    """ResNet-50's 3x3 layers at batch 64 (pixels, filters, depth): large tiles, as far as the filters fill them."""
    capability, processors = CARDS[card]
    shared = LIMITS[capability].shared
    assert tile(plan, 64 * 56 * 56, 64, 576, 1, processors, shared)[1] == 64
    assert tile(plan, 64 * 28 * 28, 128, 1152, 1, processors, shared) == (128, 128)
    assert tile(plan, 64 * 28 * 28, 512, 128, 1, processors, shared) == (128, 128)
    if processors > 1:  # a single image of 7x7: as many blocks as there can be
        assert tile(plan, 49, 512, 4608, 1, processors, shared) == (64, 64)


# What each card gets for ResNet-50's layers (pixels, filters, depth) at batch 1 and 32: a change is to be seen.
LAYERS = (
    (56 * 56, 64, 576), (28 * 28, 128, 1152), (14 * 14, 1024, 256), (7 * 7, 2048, 512),
    (32 * 56 * 56, 256, 64), (32 * 28 * 28, 128, 1152), (32 * 14 * 14, 256, 2304), (32 * 7 * 7, 512, 4608),
)  # fmt: skip
CHOSEN = {
    "A100": "SSSSLLLS", "RTX 3090": "SSSSLLLL", "L4": "SSMSLLLL", "RTX 4090": "SSSSLLLM", "H100": "SSSSLMLS",
    "B200": "SSSSLMLS", "RTX 5090": "SSSSLLLM", "a single one": "MLLSLLLL",
}  # fmt: skip


@pytest.mark.parametrize("card", CHOSEN)
def test_tiles_of_a_network(plan: ctypes.CDLL, card: str) -> None:
    capability, processors = CARDS[card]
    names = {(128, 128): "L", (128, 64): "M", (64, 64): "S"}
    got = "".join(names[tile(plan, *layer, 1, processors, LIMITS[capability].shared)] for layer in LAYERS)
    assert got == CHOSEN[card]


def test_splits(plan: ctypes.CDLL) -> None:
    """Slices cover the depth exactly, in whole steps, and fill the card where the result alone doesn't."""
    for rows, columns, depth, products in (
        (64, 576, 64 * 56 * 56, 1), (512, 4608, 64 * 49, 1), (64, 64, 256 * 56 * 56, 1), (2048, 512, 49, 1), (8, 72, 1, 1),
        (8, 72, 0, 1), (32, 288, 56 * 56, 32),
    ):  # fmt: skip
        (tile_rows, tile_columns), slices, slice_depth = split(plan, rows, columns, depth, products)
        assert slices >= 1
        assert (slices - 1) * slice_depth < max(depth, 1) <= slices * slice_depth
        assert slices == 1 or slice_depth % 32 == 0
        assert slices == 1 or slices * rows * columns * products * 4 <= 2**27
        blocks = slices * products * -(-rows // tile_rows) * -(-columns // tile_columns)
        assert blocks >= 100 or depth < 32 * 8 * 100, "a long depth and few blocks"


def test_splits_of_small_maps(plan: ctypes.CDLL) -> None:
    """The last stage of a network at batch 1 is cut along its depth; what fills a card, or is soon summed, isn't."""

    def slices(*sizes: int) -> int:
        return int(plan.small_slices(*map(ctypes.c_int64, sizes)))

    assert slices(7 * 7, 512, 512 * 9, 1) > 4  # ResNet-18, batch 1
    assert slices(14 * 14, 256, 256 * 9, 1) > 1
    assert slices(56 * 56, 64, 64 * 9, 1) == 1
    assert slices(64 * 7 * 7, 512, 512 * 9, 1) == 1
    assert slices(7 * 7, 512, 64, 1) == 1
    assert slices(7 * 7, 512, 0, 1) == 1


@pytest.mark.parametrize(
    ("precision", "channels", "expected"),
    [
        ("high", 64, {"tf32", "tf32x3", "elements_tf32", "elements_tf32x3"}),
        ("fp32", 64, {"tf32x3", "elements_tf32x3"}),
        ("fp32", 6, {"elements_tf32x3"}),
        ("ieee", 64, set()),
    ],
)
def test_variants_by_precision(precision: str, channels: int, expected: set[str]) -> None:
    """Which products of tf32 a precision allows; vectors want channels in fours."""
    x, w, y = (2, channels, 8, 8), (16, channels, 3, 3), (2, 16, 6, 6)
    params = ((1, 1), (0, 0, 0, 0), (1, 1), 1, precision)
    p = dataclasses.replace(
        problem("fprop", x, w, y, torch.float32, torch.device("cpu"), params), device="cuda", capability=(9, 0)
    )
    serving = [name for name, rule in RULES.items() if "tf32" in name and rule[0] == "conv2d" and not rule[1](p)]
    assert {name.partition(".")[2] for name in serving} == expected
    assert not RULES["conv2d_direct"][1](p)
    costs = [RULES[name][2](p) for name in serving]
    assert costs == sorted(costs), "the order of preference isn't the order of cost"


@pytest.mark.skipif(not process.EMULATED, reason="needs the emulated GPU")
@pytest.mark.emulated
@pytest.mark.parametrize(("k", "c", "expected"), [(1280, 1024, (128, 128)), (768, 3072, (128, 64))])
def test_a_weight_gradient_in_large_tiles(plan: ctypes.CDLL, k: int, c: int, expected: tuple[int, int]) -> None:
    """As many weights as make them pay, which no case of the tables has; small integers, so exactly."""
    n = 2
    assert split(plan, k, c, n, 1) == (expected, 1, 32)
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randint(-3, 4, (n, size, 1, 1), generator=generator) for size in (c, k))
    w = torch.zeros(k, c, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    with cnnfast.backend("cuda.conv2d_implicit_gemm"), cnnfast.strict():
        cnnfast.functional.conv2d(x.bfloat16(), w).backward(g.bfloat16())
    assert w.grad is not None
    assert torch.equal(w.grad.double(), torch.einsum("nkij,ncij->kcij", g.double(), x.double()))
