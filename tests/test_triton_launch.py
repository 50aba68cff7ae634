"""Repeated launches of Triton kernels: the arguments of the first call, with the tensors of this one."""

from __future__ import annotations

import gc
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from cnnfast.backends import triton as backend
from cnnfast.kernels import _common


class _Kernel:
    """Stands for a JIT function and for what it compiles to: remembers how it was launched."""

    arg_names = ("x", "y", "n", "BLOCK")
    function, packed_metadata = 11, (4, 1, 0)

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **meta: Any) -> _Kernel:
            self.calls.append((grid, arguments, meta))
            return self

        return run

    def run(self, x: int, y: int, z: int, *launch: Any) -> None:
        """The compiled kernel's own launch, past what __getitem__ asks."""
        assert launch[:6] == (5, self.function, self.packed_metadata, None, None, None)
        self.calls.append(((x, y, z), launch[6:], {}))


def _launcher(kernel: _Kernel) -> Any:
    def launcher(p: Any, x: torch.Tensor, y: torch.Tensor, workspace: torch.Tensor | None = None) -> None:
        _common.launch(
            kernel, 7, x, y if workspace is None else workspace.view(torch.float32)[4:], 5, BLOCK=64, num_warps=4
        )

    return launcher


def _bound(kernel: _Kernel, monkeypatch: pytest.MonkeyPatch, workspace: int = 0) -> Any:
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 5, raising=False)
    problem = type("P", (), {"precision": "fp32", "capability": (9, 0)})()
    return backend._binder(_launcher(kernel), (lambda p: workspace) if workspace else None)(problem, {"N": 1})


def test_second_call_repeats_the_first_with_its_own_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = _Kernel()
    call = _bound(kernel, monkeypatch)
    x, y, x2, y2 = (torch.zeros(64) for _ in range(4))
    call([x, y])
    call([x2, y2])
    (grid, first, meta), (again, second, _) = kernel.calls
    assert grid == (7,)
    assert meta == {"BLOCK": 64, "num_warps": 4}
    assert again == (7, 1, 1)
    assert first[0] is x
    assert first[1] is y
    assert second[:2] == (x2.data_ptr(), y2.data_ptr())
    assert second[2:] == (5, 64)  # every argument of the kernel, constants too, but no launch option
    dead = weakref.ref(x)
    del x, y, first
    kernel.calls.clear()
    gc.collect()
    assert dead() is None, "a recorded launch keeps the first call's tensors alive"


def test_workspace_is_this_calls_own(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = _Kernel()
    call = _bound(kernel, monkeypatch, workspace=256)
    made: list[torch.Tensor] = []
    empty = torch.empty

    def spy(*arguments: Any, **options: Any) -> torch.Tensor:
        made.append(empty(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(torch, "empty", spy)
    for _ in range(2):
        call([torch.zeros(64), torch.zeros(64)])
    first, second = (arguments[1] for _, arguments, _ in kernel.calls)
    assert [t.numel() for t in made] == [256, 256]
    assert first.numel() * first.element_size() == 240
    assert (first.data_ptr(), second) == (made[0].data_ptr() + 16, made[1].data_ptr() + 16)


def test_what_triton_specialises_on_is_recorded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = _Kernel()
    call = _bound(kernel, monkeypatch)
    call([torch.zeros(64), torch.zeros(64)])
    call([torch.zeros(65)[1:], torch.zeros(64)])  # no longer 16-byte aligned: another compilation
    assert [grid for grid, _, _ in kernel.calls] == [(7,), (7,)]


def test_one_tensor_in_two_places_isn_t_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = _Kernel()
    call = _bound(kernel, monkeypatch)
    x, y = torch.zeros(64), torch.zeros(64)
    call([x, x])
    call([x, y])
    assert kernel.calls[1][1][1] is y
    assert [grid for grid, _, _ in kernel.calls] == [(7,), (7,)]


def test_every_launcher_goes_through_launch() -> None:
    """What is launched beside it wouldn't be recorded, and so not be repeated."""
    for path in sorted((Path(__file__).parent.parent / "kernels").glob("*.py")):
        found = re.findall(r"^\s+_\w+\[.+\]\($", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert not found, f"{path.name}: {found}"
