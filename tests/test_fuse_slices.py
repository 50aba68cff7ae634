"""Plans that compute in slices: a large convolution with its pooling, band by band; split and chunked tensors as views."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import process
from torch import nn

import cnnfast
from cnnfast.graph import planner

pytestmark = pytest.mark.skipif(process.EMULATED or process.INTERPRETED, reason="plans are the plain process's")

# channels, filters, size, convolution's arguments, pooling's arguments
BANDS = {
    "vgg": ((5, 16, (37, 22)), {"kernel_size": 3, "padding": 1}, {"kernel_size": 2}),
    "ceil": ((3, 8, (37, 23)), {"kernel_size": 3, "padding": 1}, {"kernel_size": 2, "ceil_mode": True}),
    "prime window": ((3, 8, (47, 19)), {"kernel_size": 5, "padding": 2}, {"kernel_size": (3, 2)}),
    "strided": ((8, 16, (41, 20)), {"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": 2}),
    "stride > kernel": ((8, 16, (41, 20)), {"kernel_size": 1, "stride": 3}, {"kernel_size": 2}),
    "dilated": ((4, 8, (33, 20)), {"kernel_size": 3, "dilation": 2, "padding": (4, 1)}, {"kernel_size": 2}),
    "no padding, even kernel": ((4, 8, (33, 20)), {"kernel_size": 4}, {"kernel_size": 2}),
    "grouped": ((8, 16, (33, 20)), {"kernel_size": 3, "groups": 4, "padding": 1}, {"kernel_size": 2}),
    "depthwise": ((8, 8, (33, 20)), {"kernel_size": 3, "groups": 8, "padding": 1}, {"kernel_size": 2}),
    "gaps": ((4, 8, (83, 20)), {"kernel_size": 3}, {"kernel_size": 2, "stride": 3}),
    "overlap": ((4, 8, (183, 20)), {"kernel_size": 3}, {"kernel_size": 3, "stride": 2}),
    "overlap, ceil": ((4, 8, (184, 21)), {"kernel_size": 3}, {"kernel_size": 3, "stride": 2, "ceil_mode": True}),
    "overlap of three": ((4, 8, (331, 20)), {"kernel_size": 3, "padding": 1}, {"kernel_size": 5, "stride": 2}),
}


class _Pooled(nn.Module):
    """Convolution, batch norm, sum, ReLU, pooling; the sum's other addend is strided alike."""

    def __init__(self, channels: tuple[Any, ...], conv: dict[str, Any], pool: dict[str, Any], residual: bool) -> None:
        super().__init__()
        c, k, _ = channels
        self.first = nn.Conv2d(c, c, 3, padding=1)
        self.conv, self.norm, self.pool = nn.Conv2d(c, k, **conv), nn.BatchNorm2d(k), nn.MaxPool2d(**pool)
        self.other = nn.Conv2d(c, k, **conv) if residual else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        y = self.norm(self.conv(x))
        y = y if self.other is None else y + self.other(x)
        return self.pool(y.relu())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", BANDS)
def test_bands(name: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if at once, in a smaller arena; the last band is shorter, the first and the last have the padding."""
    torch.manual_seed(0)
    channels, conv, pool = BANDS[name]
    model = _Pooled(channels, conv, pool, residual=batch == 1).eval()
    x = torch.randn(batch, channels[0], *channels[2])
    with torch.no_grad():
        exact = model.double()(x.double())
        model.float()
        whole = cnnfast.fuse(model, x)
        monkeypatch.setattr(planner, "_BAND", 16384 if "overlap" in name else 2048)
        banded = cnnfast.fuse(model, x)
        error = (banded(x) - exact).norm() / exact.norm()
    assert float(error) <= 1e-5
    (plan,), (before,) = ([s.plan for s in fused.programs[0].steps] for fused in (banded, whole))
    assert len(plan) > len(before) + batch - 1, "several bands"
    assert plan.arena_bytes < before.arena_bytes
    assert set(plan.kernels) >= {k for k in before.kernels if "pool" in k}


def test_what_others_read_or_overlaps_much_is_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "_BAND", 256)
    x = torch.randn(1, 3, 20, 20)

    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.conv(x)
            return nn.functional.max_pool2d(y, 2), y

    for model in (
        Read(),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(3, 2)),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2, padding=1)),
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=3), nn.MaxPool2d(2)),
    ):
        with torch.no_grad():
            fused, expected = cnnfast.fuse(model.eval(), x), model(x)
            torch.testing.assert_close(fused(x), expected)
        assert len(fused.programs[0].kernels) == 2


class _Split(nn.Module):
    """Pieces that are convolved, summed, concatenated and returned; channels shuffled, by function and written out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 1), nn.Conv2d(5, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.a(x)
        p, q, r = y.split([4, 5, 3], 1)
        left, right = torch.cat((p, self.b(q), r[:, :2]), 1).chunk(2, -3)
        z = torch.cat((left, self.c(right + left).relu()), 1)
        n, c, h, w = z.shape
        z = z.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        first, second = z.chunk(2, 1)
        last = torch.channel_shuffle(torch.cat((first, self.c(second)), 1), 3)
        return last, torch.cat([self.c(part) for part in last.split(6, 1)], 1), [part + 1 for part in y.unbind(0)]


@pytest.mark.parametrize("shape", [(1, 3, 7, 5), (2, 3, 8, 1), (3, 3, 1, 1)])
def test_split_and_shuffled_in_one_plan(shape: tuple[int, ...]) -> None:
    """Views, and for what is shuffled as many copies as there are groups; NaN stays where it is."""
    torch.manual_seed(0)
    model, x = _Split().eval(), torch.randn(shape)
    with torch.no_grad():
        fused = cnnfast.fuse(model, x)
        for expected, found in zip(
            torch.utils._pytree.tree_leaves(model(x)), torch.utils._pytree.tree_leaves(fused(x)), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    plans = [s for s in fused.programs[0].steps if hasattr(s, "plan")]
    assert len(plans) == 1, fused.report()
    assert not {c.name for c in fused.programs[0].calls if c.reason} & {"aten.chunk.default", "aten.transpose.int"}


def test_split_that_torch_keeps() -> None:
    """Rows and pieces of matrices: slices, by torch, between the plans; the same results."""
    torch.manual_seed(0)

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> Any:
            top, bottom = self.a(x).chunk(2, 2)
            left, right = self.b(x[:, :, 0, :3]).split(2, -1)
            return self.a(top[:, :3]) - bottom, left * right

    model, x = Rows().eval(), torch.randn(2, 3, 6, 5)
    with torch.no_grad():
        for found, expected in zip(cnnfast.fuse(model, x)(x), model(x), strict=True):
            torch.testing.assert_close(found, expected)
