"""Which calls of a fused model are recorded and launched as CUDA graphs, on a CPU: another thing stands for torch.cuda."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from support import process
from support.running import in_threads
from torch import nn

import cnnfast
from cnnfast import settings
from cnnfast.graph import Fused, replay
from cnnfast.graph import backend as backend_module
from cnnfast.graph.replay import Gpu, Replayed, Replays

pytestmark = pytest.mark.skipif(process.EMULATED or process.INTERPRETED, reason="plans are the plain process's")


class StandIn(Gpu):
    """Records a function by keeping it: a launch runs it again over the same copies, and writes the same results."""

    kind = "cpu"

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.current = "first stream"
        self.busy = False
        self.fails: Exception | None = None

    def recording(self) -> bool:
        return self.busy

    def stream(self, device: torch.device) -> Any:
        return self.current

    def side_stream(self, device: torch.device) -> Any:
        return "side stream"

    def pool(self) -> Any:
        self.events.append("pool")
        return object()

    def warm_up(self, stream: Any, run: Callable[[], Any]) -> None:
        assert stream == "side stream"
        self.events.append("warm-up")
        run()

    def record(self, stream: Any, pool: Any, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        assert stream == "side stream"
        self.events.append("record")
        results = run()
        if self.fails is not None:
            raise self.fails

        def launch() -> None:
            self.events.append("launch")
            for old, new in zip(results, run(), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)

        return launch, results

    def mark(self, stream: Any) -> Any:
        return f"end on {stream}"

    def wait(self, stream: Any, mark: Any) -> None:
        self.events.append(f"{stream} waits for {mark}")

    def uses(self, stream: Any, tensors: Sequence[torch.Tensor]) -> None:
        self.events.append(f"{stream} uses {len(tensors)}")

    def counts(self) -> tuple[int, int]:
        """Recordings and launches so far."""
        return self.events.count("record"), self.events.count("launch")


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(True), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    ).eval()  # fmt: skip


def _fused(model: nn.Module | None = None) -> tuple[Fused, StandIn]:
    fused, gpu = cnnfast.fuse(_model() if model is None else model), StandIn()
    fused._replays = Replays(gpu)
    return fused, gpu


@functools.cache
def _plain() -> Fused:
    """The same, step by step; one for all tests, which so plan a shape once."""
    return cnnfast.fuse(_model(), cuda_graph=False)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_the_second_call_of_a_kind_records() -> None:
    """The first plans and runs; results are those of the program run step by step, and the caller's."""
    (fused, gpu), plain = _fused(), _plain()
    x = torch.randn(2, 3, 9, 9)
    results, counts = [], []
    for i in range(4):
        x += i  # what is recorded is the computation, not the values
        results.append((fused(x), plain(x)))
        counts.append(gpu.counts())
    assert counts == [(0, 0), (1, 1), (1, 2), (1, 3)]
    assert gpu.events[:4] == ["pool", "warm-up", "record", "launch"]
    for found, expected in results:
        assert torch.equal(found, expected)
    assert "launched as a CUDA graph" in fused.report()
    assert "CUDA graph" not in plain.report()
    assert plain._replays is None


def test_shapes_and_strides_are_kinds() -> None:
    fused, gpu = _fused()
    plain = _plain()
    x = torch.randn(2, 3, 9, 10)
    kinds = [x, x.to(memory_format=torch.channels_last), x[:, :, :, ::2], x[:1].expand(3, 3, 9, 10), x[:1]]
    for _ in range(3):
        for each in kinds:
            assert torch.equal(fused(each), plain(each))
    assert gpu.counts() == (len(kinds), 2 * len(kinds))
    assert gpu.events.count("pool") == 1, "all of them share one"
    assert len(fused.programs) == 4
    assert "launched as a CUDA graph, 2 by strides" in fused.report()


def test_the_least_recent_recording_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And isn't made again: sizes that change all the time run step by step, with the reason."""
    monkeypatch.setattr(replay, "MOST_RECORDINGS", 2)
    (fused, gpu), plain = _fused(), _plain()
    sizes = {name: torch.randn(1, 3, 8 + i, 9) for i, name in enumerate("abc")}
    for name in "aabbacc":  # c takes the place of b, because a was called since
        assert torch.equal(fused(sizes[name]), plain(sizes[name]))
    assert gpu.counts() == (3, 4)
    for name in "abcbb":
        assert torch.equal(fused(sizes[name]), plain(sizes[name]))
    assert gpu.counts() == (3, 6)
    (reason,) = [line for line in fused.report().splitlines() if "no CUDA graph" in line]
    assert reason == "  no CUDA graph: 2 other kinds of input have been called since"


def test_recordings_go_with_their_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[Fused.__module__], "_MOST_PROGRAMS", 2)
    fused, gpu = _fused()
    for n in (1, 2, 3):
        for _ in range(2):
            fused(torch.randn(n, 3, 8, 8))
    assert gpu.counts() == (3, 3)
    assert fused._replays is not None
    assert len(fused._replays._recent) == 2
    assert len(fused.programs) == 2
    refs = list(fused._replays._recent.values())
    gc.disable()
    try:
        del fused
        assert not any(ref() for ref in refs), "nor do they wait for the collector of cycles"
    finally:
        gc.enable()


def test_kinds_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_MOST_KINDS", 3)
    fused, gpu = _fused()
    for i in range(1, 8):
        fused(torch.randn(2, 3 * i, 8, 8)[:, ::i])
    ((run, _),) = fused._programs.values()
    assert isinstance(run, Replayed)
    assert len(run.kinds) <= 3
    assert gpu.counts() == (0, 0)


@pytest.mark.parametrize("why", ["busy", "fails", "watched"])
def test_what_runs_step_by_step(why: str) -> None:
    """Somebody records already, recording fails, somebody observes: equal results; why it failed is listed."""
    (fused, gpu), plain = _fused(), _plain()
    x = torch.randn(2, 3, 9, 9)
    if why == "busy":
        gpu.busy = True
    elif why == "fails":
        gpu.fails = RuntimeError("operation not permitted when stream is capturing\nmore")
    before, settings._observer = settings._observer, [] if why == "watched" else None
    try:
        for _ in range(4):
            assert torch.equal(fused(x), plain(x))
    finally:
        settings._observer = before
    assert gpu.counts() == (1 if why == "fails" else 0, 0)
    if why == "fails":
        reason = "no CUDA graph: RuntimeError while recording: operation not permitted when stream is capturing"
        assert f"  {reason}" in fused.report().splitlines()
        gpu.fails = None
        other = torch.randn(1, 3, 8, 8)
        for _ in range(2):
            assert torch.equal(fused(other), plain(other))
        assert gpu.events.count("pool") == 2, "the one that recording failed in is given up"
    else:
        assert "a CUDA graph from the second call on" in fused.report()
        gpu.busy = False
        fused(x), fused(x)
        assert gpu.counts() == (1, 1)


class _Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bincount((self.conv(x).flatten() > 0).long(), minlength=2)


def test_what_waits_for_the_host_is_not_recorded() -> None:
    model = _Counted().eval()
    fused, gpu = _fused(model)
    x = torch.randn(1, 3, 9, 9)
    for _ in range(3):
        assert torch.equal(fused(x), model(x))
    assert not gpu.events
    assert "no CUDA graph: aten.bincount.default waits for values on the host" in fused.report()


def test_streams() -> None:
    """A launch on another stream waits for the last one's end, and the copies outlive what that stream does with them."""
    fused, gpu = _fused()
    a, b = torch.randn(1, 3, 9, 9), torch.randn(2, 3, 9, 9)
    for x in (a, a, b, b):
        fused(x)
    gpu.events.clear()
    fused(a)
    assert gpu.events == ["launch"]
    gpu.current = "second stream"
    for x in (a, b, a):
        fused(x)
    waits = "second stream waits for end on first stream"
    assert gpu.events[1:] == [waits, "second stream uses 1", "launch", "second stream uses 1", "launch", "launch"]
    gpu.events.clear()
    gpu.current = "first stream"
    fused(b)
    assert gpu.events == ["first stream waits for end on second stream", "launch"]


class _Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.register_buffer("numbers", torch.arange(3.0))

    def forward(self, x: dict[str, Any], scale: float = 1.0) -> dict[str, Any]:
        y = self.conv(x["image"]) * scale
        return {
            "same": x["image"], "view": x["image"].flatten(2), "twice": [y, y], "part": y[:, :2], "numbers": self.numbers,
            "scale": scale, "unused": x["other"],
        }  # fmt: skip


def test_results_of_any_structure() -> None:
    """What is passed through is the caller's own tensor; nothing that is returned changes with the next call."""
    model = _Structured().eval()
    fused, gpu = _fused(model)
    given = [{"image": torch.randn(2, 3, 5, 4), "other": torch.randn(3)} for _ in range(5)]
    results = [fused(x, scale=2.0) for x in given]
    assert gpu.counts() == (1, 4)
    for x, out in zip(given, results, strict=True):
        expected = model(x, scale=2.0)
        assert out["same"] is x["image"]
        assert out["unused"] is x["other"]
        assert out["scale"] == 2.0
        assert out["twice"][0] is out["twice"][1]
        assert torch.equal(out["view"], expected["view"])
        assert torch.equal(out["numbers"], expected["numbers"])
        for name in ("twice", "part"):
            a, b = (torch.stack(r[name]) if name == "twice" else r[name] for r in (out, expected))
            torch.testing.assert_close(a, b)


def test_inference_mode() -> None:
    """A recording made within it serves calls outside of it, and the other way round."""
    fused, gpu = _fused()
    x = torch.randn(2, 3, 9, 9)
    fused(x)
    with torch.inference_mode():
        y = fused(x)
        z = fused(x.clone())
    assert torch.equal(fused(x), y.clone())
    assert torch.equal(z, y)
    assert gpu.counts() == (1, 3)


def test_threads() -> None:
    fused, gpu = _fused()
    plain = _plain()
    inputs = [torch.randn(1 + i % 2, 3, 9, 9) for i in range(6)]
    expected = [plain(x) for x in inputs]

    def work(x: torch.Tensor, y: torch.Tensor) -> None:
        for _ in range(20):
            assert torch.equal(fused(x), y)

    with torch.no_grad():
        in_threads(work, zip(inputs, expected, strict=True))
    assert gpu.counts()[0] == 2


def test_explained() -> None:
    """Step by step, which is said."""
    fused, gpu = _fused()
    rows = cnnfast.explain(fused, torch.randn(2, 3, 9, 9), runs=2, limits=False)
    assert gpu.counts() == (1, 3), "what is timed as a whole"
    assert "Explained step by step; otherwise: launched as a CUDA graph." in rows.note
    assert [row.kernel for row in rows if row.ours] == fused.programs[0].kernels
    assert any(row.op == "aten.gelu.default" for row in rows)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_copies_keep_the_choice(cuda_graph: bool) -> None:
    fused = cnnfast.fuse(_model(), cuda_graph=cuda_graph)
    for twin in (pickle.loads(pickle.dumps(fused)), copy.deepcopy(fused)):
        assert (twin._replays is not None) == cuda_graph
    assert copy.deepcopy(fused)._replays is fused._replays


@pytest.mark.parametrize("options", [{}, {"freeze": True}, {"cuda_graph": False}])
def test_compile(options: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters that are inputs are read where they lie: changes are seen, and other ones are another kind."""
    gpu, made = StandIn(), []
    monkeypatch.setattr(backend_module, "Replays", lambda: made.append(Replays(gpu)) or made[-1])
    torch._dynamo.reset()
    model = _model()
    compiled = torch.compile(model, backend=backend_module.backend, options=options)
    for n in range(4):
        x = torch.randn(2, 3, 9, 9)
        if not options.get("freeze"):
            model[0].weight.mul_(1 + n)
        torch.testing.assert_close(compiled(x), model(x))
    assert gpu.counts() == ((1, 3) if options.get("cuda_graph", True) else (0, 0))
    if not options:
        launches = gpu.counts()[1]
        model[6].bias.data = torch.randn(4)
        for _ in range(3):
            torch.testing.assert_close(compiled(x), model(x))
        assert gpu.counts() == (2, launches + 2)
        recordings = [ref().kinds[kind] for replays in made for (_, kind), ref in replays._recent.items()]
        assert [len(r.copies) for r in recordings] == [1, 1], "the image alone is copied"
    torch._dynamo.reset()


def test_torch_has_what_recording_uses() -> None:
    """Names and parameters of torch.cuda, which this machine can't run."""
    assert {"pool", "stream", "capture_error_mode"} <= set(inspect.signature(torch.cuda.graph.__init__).parameters)
    for name in ("is_current_stream_capturing", "graph_pool_handle", "current_stream", "stream", "device", "CUDAGraph"):
        assert callable(getattr(torch.cuda, name))
    for name in ("wait_stream", "record_event", "wait_event"):
        assert callable(getattr(torch.cuda.Stream, name))
    assert callable(torch.Tensor.record_stream)
    assert callable(torch.cuda.CUDAGraph.replay)
