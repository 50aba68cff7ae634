"""Real photographs that ship in packages, cut into crops."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch


@functools.cache
def _photographs() -> tuple[torch.Tensor, ...]:
    """(3, H, W) in 0 to 1; skips the test where a package is missing."""
    data = pytest.importorskip("skimage.data")
    datasets = pytest.importorskip("sklearn.datasets")
    arrays: list[Any] = [datasets.load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    arrays += [data.chelsea(), data.coffee(), data.rocket(), data.astronaut(), data.camera()]
    images = [torch.from_numpy(array.copy()).float() / 255 for array in arrays]
    return tuple(
        image.permute(2, 0, 1)[:3] if image.dim() == 3 else image.expand(3, *image.shape).contiguous()
        for image in images
    )


def crops(count: int, size: int) -> torch.Tensor:
    """(count, 3, size, size), normalised as ImageNet's: squares of the photographs in turn, of many sizes and places."""
    generator = torch.Generator().manual_seed(0)
    photographs = _photographs()
    found = []
    for i in range(count):
        image = photographs[i % len(photographs)]
        largest = min(image.shape[1:])
        side = int(largest * (0.3 + 0.7 * float(torch.rand((), generator=generator))))
        top, left = (int((n - side + 1) * float(torch.rand((), generator=generator))) for n in image.shape[1:])
        square = image[None, :, top : top + side, left : left + side]
        found.append(torch.nn.functional.interpolate(square, size=(size, size), mode="bilinear", antialias=True))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (torch.cat(found) - mean.view(3, 1, 1)) / std.view(3, 1, 1)
