"""Tuning: which tiles there are for a card, what is measured within a budget, what is kept, and how a call finds it.

Everything but the clock: times come from a table, cards from their names.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import multiprocessing
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import process, static

import cnnfast
from cnnfast import cli, ops, settings, tuning
from cnnfast.report import tune

pytest.importorskip("triton")

from cnnfast.backends import _tiles as backend_tiles
from cnnfast.backends import triton as backend
from cnnfast.kernels import _cards, _tiles
from cnnfast.kernels import _conv2d_implicit_gemm_configs as configs

plain = pytest.mark.skipif(process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it")
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
HALF = configs.Facts(2, "bf16")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own for each test, and nothing read before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    monkeypatch.setattr(settings, "_warned", set())
    tuning.forget()
    yield tmp_path / "cache"
    tuning.forget()


def problem(n: int, c: int, h: int, k: int, r: int = 3, stride: int = 1, groups: int = 1, **fields: Any) -> Any:
    """A convolution over dense NHWC operands, padded to keep the map's size."""
    q, cg = (h + 2 * (r // 2) - r) // stride + 1, c // groups
    values = {
        "N": n, "C": c, "H": h, "W": h, "K": k, "R": r, "S": r, "P": q, "Q": q, "G": groups, "act": 0,
        "stride_h": stride, "stride_w": stride, "pad_h": r // 2, "pad_w": r // 2, "dilation_h": 1, "dilation_w": 1,
        "x_n": h * h * c, "x_c": 1, "x_h": h * c, "x_w": c, "w_k": r * r * cg, "w_c": 1, "w_r": r * cg, "w_s": cg,
        "y_n": q * q * k, "y_c": 1, "y_h": q * k, "y_w": k, "r_n": 0, "r_h": 0, "r_w": 0, "precision": "high",
    }  # fmt: skip
    return types.SimpleNamespace(**{**values, **fields})


# ---- which tiles there are -------------------------------------------------------------------------------------------


@plain
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_lists_fit_their_cards(arch: int) -> None:
    """Every list has tiles left, all fit the limits of the programming guide, and those for tuning come on top."""
    limits = {80: (163, 64), 86: (99, 48), 89: (99, 48), 90: (227, 64), 100: (227, 64), 120: (99, 48)}[arch]
    for precision, itemsize, wide, residual in itertools.product(
        ("ieee", "fp32", "high"), (2, 4), (False, True), (False, True)
    ):
        usual = _tiles.untuned(precision, itemsize, wide, arch, residual)
        tiles = _tiles.candidates(precision, itemsize, wide, arch, residual)
        assert usual
        assert tiles[: len(usual)] == usual
        assert len(set(tiles)) == len(tiles)
        assert any(t.block_n == 16 for t in tiles)  # the narrowest products have one
        for tile in tiles:
            how = "half" if itemsize == 2 else _tiles.INPUT_PRECISION[precision]
            assert _cards.shared_bytes(tile, itemsize, arch, how) <= limits[0] * 1024
            assert _cards.registers(tile, itemsize, arch) <= 255
            assert _cards.resident(tile, itemsize, arch, how) * tile.num_warps <= limits[1]


@plain
def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too much shared memory for a small card, too many sums for a thread; with a residual, fewer."""
    deep, fat = _tiles.Config(128, 128, 64, 8, 5), _tiles.Config(256, 256, 64, 8, 2)
    monkeypatch.setitem(_tiles.HALF_CONFIGS, 80, (deep, fat, *_tiles.HALF_CONFIGS[80]))
    assert deep in _tiles.untuned("high", 2, True, 80)
    for arch in (86, 89, 120):
        assert deep not in _tiles.untuned("high", 2, True, arch)
    assert fat not in _tiles.untuned("high", 2, True, 80)
    assert _cards.seconds(_cards.Product(10**5, 256, 256), fat, _cards.CARDS["A100"]) == math.inf
    for arch in ARCHITECTURES:
        assert all(t.block_m * t.block_n // t.num_warps <= 2048 for t in _tiles.candidates("high", 2, True, arch, True))


@plain
@pytest.mark.parametrize(("arch", "as_if"), [(87, 87), (88, 87), (103, 100), (110, 100), (121, 120), (75, 80)])
def test_unknown_architectures_are_like_the_one_before(arch: int, as_if: int) -> None:
    assert _cards.known(arch) == as_if
    assert _tiles.candidates("high", 2, True, arch)


@plain
def test_cards_by_name() -> None:
    names = {
        "NVIDIA A100-SXM4-80GB": "A100", "NVIDIA H100 80GB HBM3": "H100", "NVIDIA L4": "L4",
        "NVIDIA GeForce RTX 4090": "RTX 4090",
    }  # fmt: skip
    for name, key in names.items():
        assert _cards.card(name, _cards.CARDS[key].arch) == _cards.CARDS[key]
    assert _cards.card("NVIDIA L40S", 89, 142) == _cards.Card(89, 142)  # no L4
    assert _cards.card("NVIDIA GeForce RTX 4090 Laptop GPU", 89, 76) == _cards.Card(89, 76)
    assert _cards.card("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 80, 42).multiprocessors == 42
    assert _cards.card("NVIDIA B300", 103).limits == _cards.LIMITS[100]


@plain
@pytest.mark.parametrize("card", _cards.CARDS.values(), ids=list(_cards.CARDS))
@pytest.mark.parametrize("direction", list(configs.DIRECTIONS))
def test_order(card: _cards.Card, direction: str) -> None:
    """The predicted fastest first, without doubles, none wider than the product, all cut to its depth."""
    for p in (
        problem(32, 64, 56, 64), problem(1, 512, 7, 512), problem(32, 3, 224, 64, 7, 2), problem(4, 128, 28, 128, groups=4),
        problem(8, 96, 14, 208, 1), problem(2, 40, 9, 24),
    ):  # fmt: skip
        for of in (
            HALF,
            configs.Facts(4, "f32"),
            configs.Facts(2, "f16", aligned=False),
            configs.Facts(2, "bf16", residual=True),
        ):
            tiles = configs.configs(p, direction, of, card)
            wanted = configs.product(p, direction, of)
            times = [_cards.seconds(wanted, tile, card) for tile in tiles]
            assert tiles
            assert times == sorted(times)
            assert math.isfinite(times[0])
            assert len(set(tiles)) == len(tiles)
            assert max(t.block_n for t in tiles) <= max(16, 2 * wanted.n)
            assert configs.usual(p, direction, of, card) in tiles
            assert all(configs.parse(json.loads(json.dumps(configs.dump(t)))) == t for t in tiles)


@plain
@pytest.mark.parametrize("arch", static.ARCHITECTURES)
def test_what_can_be_chosen_is_compiled(arch: int) -> None:
    """Every tile of a problem, tuned or not, is one that make static compiles for its direction; and none is for nothing."""
    there: dict[tuple[str, str], set[tuple[str, bool]]] = {}
    for variant in static.variants(arch):
        kind, mode, block = variant.name.split(".", 2)
        if static.product(variant) and not kind.endswith("_together"):  # whose tiles nobody chooses
            there.setdefault((kind.split("_")[0], mode), set()).add((block.split(".")[0], "_descriptor" in kind))
    chosen: dict[tuple[str, str], set[tuple[str, bool]]] = {}
    modes = {"bf16": (2, "high"), "tf32": (4, "high"), "tf32x3": (4, "fp32"), "ieee": (4, "ieee")}
    sizes = itertools.product((3, 16, 32, 48, 80, 256), (16, 24, 40, 64, 256), (1, 3))
    for (c, k, r), (mode, (itemsize, precision)) in itertools.product(sizes, modes.items()):
        p = problem(32, c, 28, k, r, precision=precision)
        for direction, (residual, normed) in itertools.product(configs.DIRECTIONS, ((0, 0), (1, 0), (1, 1))):
            if normed and direction == "dgrad":
                continue  # which normalises nothing that it reads
            of = configs.Facts(itemsize, mode, residual=bool(residual), normed=bool(normed))
            names = {(t.name, bool(t.persistent)) for t in configs.configs(p, direction, of, _cards.Card(arch, 132))}
            assert names <= there[direction, mode], f"{direction} {c} > {k}, {r}x{r}: {names - there[direction, mode]}"
            chosen.setdefault((direction, mode), set()).update(names)
    assert {key: there[key] - names for key, names in chosen.items() if there[key] - names} == {}


@plain
def test_groups_of_few_channels_have_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their tiles follow from their sizes; the launcher is given none, tuned or not."""
    p = problem(4, 128, 28, 128, groups=32)
    assert configs.configs(p, "fprop", HALF, _cards.CARDS["A100"]) == ()
    assert _call(monkeypatch, "NVIDIA A100", _cards.CARDS["A100"], p=p) == [None]


@plain
def test_large_products_get_large_tiles_and_small_ones_fill_the_card() -> None:
    for card in _cards.CARDS.values():
        large = configs.configs(problem(256, 256, 56, 256), "fprop", HALF, card)[0]
        assert large.block_m * large.block_n >= 64 * 64 * (4 if card.arch in (80, 90) else 1)
        small = problem(1, 256, 14, 256)
        best = configs.configs(small, "fprop", HALF, card)[0]
        largest = max(configs.configs(small, "fprop", HALF, card), key=lambda t: t.block_m * t.block_n)
        assert best.block_m * best.block_n < largest.block_m * largest.block_n


@plain
def test_more_of_a_card_is_never_slower() -> None:
    """The predicted time falls with multiprocessors and rises with the product."""
    wanted = configs.product(problem(8, 128, 28, 128), "fprop", HALF)
    for tile in _tiles.candidates("high", 2, True, 80):
        times = [_cards.seconds(wanted, tile, _cards.Card(80, count)) for count in (8, 16, 32, 64, 108)]
        assert times == sorted(times, reverse=True)
        deeper = dataclasses.replace(wanted, taps=2 * wanted.taps)
        assert _cards.seconds(deeper, tile, _cards.CARDS["A100"]) > _cards.seconds(wanted, tile, _cards.CARDS["A100"])


@plain
def test_buckets() -> None:
    """Pixels by powers of two; everything else that a tile depends on tells problems apart."""
    p = problem(32, 64, 56, 64)
    one = configs.bucket(p, "fprop", HALF)
    assert configs.bucket(problem(31, 64, 56, 64), "fprop", HALF) == one
    others = [
        configs.bucket(problem(64, 64, 56, 64), "fprop", HALF), configs.bucket(p, "dgrad", HALF),
        configs.bucket(p, "fprop", configs.Facts(2, "f16")), configs.bucket(p, "fprop", configs.Facts(4, "f32")),
        configs.bucket(problem(32, 64, 56, 64, precision="fp32"), "fprop", configs.Facts(4, "f32")),
        configs.bucket(p, "fprop", configs.Facts(2, "bf16", aligned=False)),
        configs.bucket(p, "fprop", configs.Facts(2, "bf16", residual=True)),
        configs.bucket(problem(32, 64, 56, 64, groups=4), "fprop", HALF),
        configs.bucket(problem(32, 64, 56, 128), "fprop", HALF), configs.bucket(problem(32, 64, 56, 64, 1), "fprop", HALF),
        configs.bucket(problem(64, 64, 56, 64, stride=2), "fprop", HALF),
    ]  # fmt: skip
    assert len({one, *others}) == 1 + len(others)


# ---- what is measured ------------------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass where somebody measures."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def tile(block_n: int) -> _tiles.Config:
    return _tiles.Config(64, block_n, 32, 4, 3)


def make(name: str, times: dict[int, float], clock: Clock, predicted: float = 1.0, wrong: int = 0) -> Any:
    """A task whose tiles take what the table says; the first is the one before. Also what measures it."""
    tiles = tuple(tile(n) for n in times)

    def bind(chosen: Any) -> Any:
        def call(operands: Any) -> None:
            if math.isinf(times[chosen.block_n]):
                raise RuntimeError("out of resources: shared memory\nand a long story")
            operands[1].copy_(operands[0] * (2 if chosen.block_n == wrong else 1))
            clock.now += times[chosen.block_n]

        return call

    meta = ((4, 4), (4, 1), torch.float32, torch.device("cpu"))
    return tuning.Task(
        name, "NVIDIA L4", f"fprop {name}", tiles, tiles[0], (meta, meta), 1, bind, configs.dump, predicted
    )


def measure(clock: Clock) -> tune.Measure:
    def timed(call: Any) -> float:
        begin = clock.now
        call()
        return clock.now - begin

    return timed


def run(tasks: list[Any], clock: Clock, seconds: float = 1e9, **options: Any) -> list[tune.Result]:
    pairs = [(task, 1) for task in tasks]
    return list(tune.tune(pairs, seconds, measure=measure(clock), clock=clock, **options))


@plain
def test_the_fastest_is_kept(cache: Path) -> None:
    clock = Clock()
    (result,) = run([make("a", {16: 5.0, 32: 2.0, 64: 3.0}, clock)], clock)
    assert (result.before, result.after, result.speedup, result.tried) == (tile(16), tile(32), 2.5, 3)
    tuning.forget()
    entry = tuning.lookup("NVIDIA L4", "a")
    assert entry == tuning.Entry(configs.dump(tile(32)), 2.0, 5.0)
    assert tuning.file("NVIDIA L4").is_relative_to(cache)
    assert tuning.summary() == {"path": str(tuning.folder()), "entries": 1, "outdated": 0}
    assert "128" not in tune.table([result], "T")
    assert "2.50" in tune.table([result], "T")


@plain
def test_noise_is_no_gain() -> None:
    clock = Clock()
    (result,) = run([make("a", {16: 1.0, 32: 0.99}, clock)], clock)
    assert (result.after, result.speedup) == (tile(16), 1.0)


@plain
def test_what_fails_or_is_wrong_is_left_out() -> None:
    """The fastest compute something else, or don't run at all: the others are still measured."""
    clock = Clock()
    (result,) = run([make("a", {16: 5.0, 32: 1.0, 64: math.inf, 128: 4.0}, clock, wrong=32)], clock)
    assert result.after == tile(128)
    assert [line.split(":")[0].split(",")[0] for line in result.failed] == ["64x32x32", "64x64x32"]
    assert "off by 1 of the norm" in result.failed[0]
    assert "long story" not in result.failed[1]


@plain
def test_the_budget_goes_to_what_takes_longest() -> None:
    """The most expensive problems first; when the time is over nothing more is started, and what was found is kept."""
    clock = Clock()
    tasks = [
        make(name, {16: 2.0, 32: 1.0, 64: 1.0}, clock, predicted)
        for name, predicted in (("a", 1.0), ("b", 3.0), ("c", 2.0))
    ]
    shares: list[float] = []
    results = run(tasks, clock, seconds=14.0, progress=lambda text, share: shares.append(share))
    assert [r.label for r in results] == ["fprop b", "fprop c"]  # 8 s, then 6 of c's 8
    assert [r.tried for r in results] == [3, 2]
    assert shares == sorted(shares)
    assert shares[-1] < 1
    assert tuning.lookup("NVIDIA L4", "a") is None
    assert tuning.lookup("NVIDIA L4", "c") is not None
    assert run(tasks, clock, seconds=4.0)[0].label == "fprop a"  # the same again goes on


@plain
def test_an_interruption_keeps_what_was_found() -> None:
    clock = Clock()
    tasks = [make("a", {16: 2.0, 32: 1.0}, clock, 2.0), make("b", {16: 2.0, 32: 1.0}, clock)]
    seen: list[str] = []

    def progress(text: str, share: float) -> None:
        seen.append(text)
        if len(seen) == 2:
            raise KeyboardInterrupt

    found: list[tune.Result] = []
    results = tune.tune([(t, 1) for t in tasks], 1e9, measure=measure(clock), clock=clock, progress=progress)
    with pytest.raises(KeyboardInterrupt):
        found.extend(results)
    assert [r.label for r in found] == ["fprop a"]
    tuning.forget()
    assert tuning.lookup("NVIDIA L4", "a") is not None
    assert tuning.lookup("NVIDIA L4", "b") is None


@plain
def test_operands_lie_as_the_calls_do() -> None:
    """Channels_last, a slice, an expanded gradient."""
    for shape, strides in (((2, 3, 4, 5), (60, 1, 15, 3)), ((2, 3), (8, 1)), ((4, 5), (0, 0)), ((1,), (7,))):
        made = tune._random(shape, strides, torch.bfloat16, torch.device("cpu"))
        assert (made.shape, made.stride()) == (torch.Size(shape), strides)
        assert made.isfinite().all()


@plain
def test_never_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="tune before"):
        run([make("a", {16: 2.0}, Clock())], Clock())


# ---- what is kept ----------------------------------------------------------------------------------------------------

CARD = "NVIDIA H100 80GB HBM3"
ENTRY = tuning.Entry([64, 64, 64, 4, 3, 8], 1e-3, 2e-3)


def _write(number: int) -> None:
    for i in range(20):
        tuning.store(CARD, {f"{number}.{i}": ENTRY})


@plain
def test_processes_share_a_file() -> None:
    """Four processes write twenty times each, all at once: nothing is lost, and no reader ever sees half a file."""
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write, args=(number,)) for number in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            tuning.forget()
            tuning.lookup(CARD, "0.0")
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    tuning.forget()
    missing = [f"{n}.{i}" for n in range(4) for i in range(20) if tuning.lookup(CARD, f"{n}.{i}") != ENTRY]
    assert not missing
    assert not list(tuning.folder().glob("*.tmp"))


def _damage(name: str, text: str) -> str:
    data = json.loads(text)
    if name == "empty":
        return ""
    if name == "torn":
        return text[: len(text) // 2]
    if name == "a list":
        return "[1, 2]"
    if name == "deep":
        return "[" * 100000
    if name == "no entries":
        del data["entries"]
    elif name == "another card's":
        data["card"] = "NVIDIA L4"
    elif name == "another format":
        data["format"] = 99
    elif name == "other kernels":
        data["kernels"] = "0" * 16
    elif name == "an entry without a tile":
        data["entries"]["a"] = {"seconds": 1.0}
    elif name == "a tile that is none":
        data["entries"]["a"]["tile"] = "large"
    return json.dumps(data)


DAMAGES = (
    "empty", "torn", "a list", "deep", "no entries", "another card's", "another format", "other kernels",
    "an entry without a tile", "a tile that is none",
)  # fmt: skip


@plain
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_none_is_ignored_with_a_warning(damage: str) -> None:
    assert tuning.store(CARD, {"a": ENTRY})
    path = tuning.file(CARD)
    path.write_text(_damage(damage, path.read_text()))
    tuning.forget()
    with pytest.warns(RuntimeWarning, match="ignores the tuning file"):
        assert tuning.lookup(CARD, "a") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.lookup(CARD, "a") is None  # said once
        tuning.summary()
        assert tuning.store(CARD, {"b": ENTRY})  # and written anew
    tuning.forget()
    assert tuning.lookup(CARD, "b") == ENTRY


@plain
def test_other_versions_have_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.store(CARD, {"a": ENTRY})
    versions = tuning.versions()
    for name in versions:
        with monkeypatch.context() as patch:
            patch.setattr(tuning, "versions", lambda changed=name: {**versions, changed: "9.9"})
            tuning.forget()
            assert tuning.lookup(CARD, "a") is None
            assert tuning.summary()["outdated"] == 1
    assert tuning.file(CARD) != tuning.file("NVIDIA L4")


@plain
def test_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home that can't be written (here: a file where the folder should be): it holds for the process, and says so."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="can't be kept"):
        assert not tuning.store(CARD, {"a": ENTRY})
    assert tuning.lookup(CARD, "a") == ENTRY
    assert tuning.summary()["entries"] == 0


# ---- how a call finds it ---------------------------------------------------------------------------------------------


def _call(monkeypatch: pytest.MonkeyPatch, name: str, of: _cards.Card, calls: int = 1, p: Any = None) -> list[Any]:
    """The tiles that the launcher of a convolution, by default a 3x3 of 64 channels, is given on a card."""
    given: list[Any] = []

    def launcher(p: Any, *operands: Any, tile: Any = None) -> None:
        given.append(tile)

    monkeypatch.setattr(backend_tiles, "card", lambda device: (name, of))
    monkeypatch.setattr(backend, "INTERPRETED", True)  # launches aren't recorded
    choose = backend_tiles.chooser("conv2d_implicit_gemm", "fprop")
    p = p or problem(32, 64, 56, 64)
    fields = {k: v for k, v in vars(p).items() if k != "precision"}
    bound = backend._binder(launcher, None, choose)(types.SimpleNamespace(precision="high", capability=(9, 0)), fields)  # type: ignore[arg-type]
    operands = [torch.zeros(16, dtype=torch.bfloat16) for _ in range(2)]
    for _ in range(calls):
        bound([operands[0], operands[1], None, operands[0]])
    return given


def _untuned(of: _cards.Card) -> Any:
    p = problem(32, 64, 56, 64)
    return configs.untuned(p, "fprop", HALF, of, configs.configs(p, "fprop", HALF, of))


def _key() -> str:
    return "conv2d_implicit_gemm " + configs.bucket(problem(32, 64, 56, 64), "fprop", HALF)


@plain
@pytest.mark.parametrize("name", list(_cards.CARDS))
def test_without_tuning_a_card_has_its_default(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's best; on an H100 of those that descriptors feed, and where they don't serve, or waste depth, the launcher's own."""
    of = _cards.CARDS[name]
    for p in (problem(32, 64, 56, 64), problem(32, 64, 56, 64, stride=2), problem(32, 96, 35, 96)):
        tiles = configs.configs(p, "fprop", HALF, of)
        best = tiles[0]
        if name == "H100":
            fed = p.stride_h == 1 and p.C % 64 == 0
            best = next(c for c in tiles if c.persistent) if fed else None
        assert _call(monkeypatch, name, of, p=p) == [best]


@plain
def test_what_was_tuned_serves_and_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    of = _cards.CARDS["H100"]
    best = configs.configs(problem(32, 64, 56, 64), "fprop", HALF, of)[-1]
    tuning.store(CARD, {_key(): tuning.Entry(configs.dump(best), 1e-3, 2e-3)})
    looked: list[str] = []
    found = tuning.lookup
    monkeypatch.setattr(tuning, "lookup", lambda card, key: (looked.append(key), found(card, key))[1])
    assert _call(monkeypatch, CARD, of, calls=3) == [best] * 3
    assert looked == [_key()]
    monkeypatch.setenv(tuning.VARIABLE, "off")
    assert _call(monkeypatch, CARD, of) == [_untuned(of)]


@plain
@pytest.mark.parametrize("values", [[512, 512, 64, 8, 3, 8], [64, 64, 64, 4], ["a"] * 6, [True] * 6])
def test_no_tile_that_was_never_compiled(values: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A file may hold anything: only tiles of the list are launched."""
    tuning.store(CARD, {_key(): tuning.Entry(values, 1e-3, 2e-3)})
    of = _cards.CARDS["H100"]
    assert _call(monkeypatch, CARD, of) == [_untuned(of)]


# ---- the command -----------------------------------------------------------------------------------------------------


@plain
@pytest.mark.skipif(process.GPU, reason="there is a GPU")
def test_the_command_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "resnet50"]) == 1
    assert capsys.readouterr().err == "cnnfast: tune measures on an NVIDIA GPU, and torch can use none here\n"


@pytest.mark.interpreter
@pytest.mark.skipif(not process.INTERPRETED, reason="runs Triton kernels on CPU tensors")
def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A small network in the interpreter, timed by the order of the calls; then its calls take what was found."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.Conv2d(16, 16, 1))
    x = torch.randn(1, 3, 7, 7)
    monkeypatch.setattr(cli, "workload", lambda *arguments: (model, x.to(arguments[2]), "random weights"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ticks = itertools.count(1)

    def earlier_is_slower(call: Any) -> float:
        call()
        return 1.0 / next(ticks)

    monkeypatch.setattr(tune, "device_seconds", earlier_is_slower)
    monkeypatch.setenv("COLUMNS", "250")
    assert cli.main(["tune", "small", "--direction", "both", "--seconds", "1000"]) == 0
    out = capsys.readouterr().out
    for label in ("fprop 3x7x7 > 16, 3x3", "wgrad 3x7x7 > 16, 3x3", "fprop 16x5x5 > 16, 1x1", "dgrad 16x5x5 > 16, 1x1"):
        assert label in out
    assert str(tuning.file("interpreter")) in out
    assert tuning.summary()["entries"] == 5
    after = cnnfast.convert(model).state_dict()
    assert all(torch.equal(after[name].float(), value.to(after[name].dtype).float()) for name, value in before.items())
    tuning.forget()
    with tuning.collecting() as tasks, settings.observe(), cnnfast.backend("triton"), torch.no_grad():
        cnnfast.convert(model)(x.to(torch.bfloat16).contiguous(memory_format=torch.channels_last))
    chosen = {task.key: tuning.lookup("interpreter", task.key) for task in tasks}
    assert len(chosen) == 2
    for task in tasks:
        entry = chosen[task.key]
        assert entry is not None
        assert task.dump(task.before) == list(entry.tile)
    assert cli.main(["tune", "small", "--seconds", "1e-9"]) == 0
    assert "problems are left: the 1e-09 seconds are over" in capsys.readouterr().out


@pytest.mark.interpreter
@pytest.mark.skipif(not process.INTERPRETED, reason="runs Triton kernels on CPU tensors")
def test_bn_act_conv_is_tuned() -> None:
    """Each direction notes its problem, with room for what it normalises; what it writes is the same in every tile."""
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, generator=g).to(torch.bfloat16) for s in ((2, 32, 5, 7), (64, 32, 1, 1)))
    x = x.contiguous(memory_format=torch.channels_last)
    mean, invstd, gamma, beta = (torch.rand(32, generator=g) for _ in range(4))
    rest = ((1, 1), (0, 0, 0, 0), (1, 1), 1, "relu", 1e-3, 1e-3, "fp32", "triton", True)
    with tuning.collecting() as tasks, settings.observe():
        y, *_ = ops.bn_act_conv(x, w, None, mean, invstd, gamma, beta, *rest)
        ops.bn_act_conv_dgrad(x, w, y, mean, invstd, gamma, beta, *rest)
        ops.bn_act_conv_wgrad(x, y, mean, invstd, gamma, beta, (64, 32, 1, 1), True, *rest)
    assert [task.key.split()[:2] for task in tasks] == [
        ["bn_act_conv_implicit_gemm", direction] for direction in ("fprop", "dgrad", "wgrad")
    ]
    assert [task.key.rsplit(" ", 1)[1] for task in tasks] == ["vlrn", "vlr", "vlrn"]
    for task in tasks:
        operands = [None if meta is None else tune._random(*meta).abs() for meta in task.operands]
        out = operands[task.output]
        assert out is not None
        results = []
        for tile in (task.before, task.tiles[1], task.tiles[-1]):
            task.bind(tile)(operands)
            results.append(out.double())
        assert len(set(task.tiles)) >= 3
        assert all(bool(r.isfinite().all()) and float(r.norm()) > 0 for r in results)
        for other in results[1:]:
            assert float((other - results[0]).norm()) <= 2e-2 * float(results[0].norm()), task.key


@plain
def test_registers_are_given_away_where_the_compiler_would_save_them() -> None:
    few, many = _tiles.Config(64, 64, 32, 4, 3), _tiles.Config(128, 128, 32, 8, 3)
    assert [few.options(arch).get("maxnreg") for arch in (80, 90, 100, 103, 120)] == [None, None, 255, 255, None]
    assert few.options(100) == {"num_warps": 4, "num_stages": 3, "maxnreg": 255}
    assert many.options(100) == {"num_warps": 8, "num_stages": 3}


@plain
def test_normalising_tiles_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes back to shared memory counts: a tile that fits a card without it may not with it."""
    deep = _tiles.Config(128, 128, 64, 8, 4)  # 96 KiB on an sm_86, and 18 more
    monkeypatch.setitem(_tiles.HALF_CONFIGS, 80, (deep, *_tiles.HALF_CONFIGS[80]))
    assert _cards.shared_bytes(deep, 2, 86) <= 99 * 1024 < _cards.shared_bytes(deep, 2, 86, normed=True)
    assert deep in _tiles.candidates("high", 2, True, 86, True)
    assert deep not in _tiles.candidates("high", 2, True, 86, True, normed=True)
    p = problem(8, 64, 28, 256, 1)
    of = dataclasses.replace(HALF, residual=True, sums=True, normed=True)
    assert deep not in configs.configs(p, "fprop", of, _cards.Card(86, 82))
