"""``cnnfast.data``: augmentation as tensor transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import process
from torch.testing import assert_close

import cnnfast
from cnnfast import data

pytestmark = pytest.mark.skipif(
    process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it"
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 64, size: tuple[int, int] = (7, 5), channels: int = 3) -> torch.Tensor:
    """Every pixel of every image has a value of its own, none of them 0."""
    return 1 + torch.arange(n * channels * size[0] * size[1], dtype=torch.float32).view(n, channels, *size)


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "noise": data.ColourNoise,
    "crop": lambda **k: data.RandomCrop((4, 3), **k),
    "padded crop": lambda **k: data.RandomCrop((7, 5), padding=2, **k),
    "translation": lambda **k: data.RandomTranslation((2, 1), **k),
    "flip": data.RandomFlip,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform(name: str) -> None:
    """Reproducible; one image is a batch of one; layout, dtype and the input stay; nothing random in evaluation."""
    make, x = TRANSFORMS[name], images()
    before = x.clone()
    a, b = make(generator=generator())(x), make(generator=generator())(x)
    assert torch.equal(a, b)
    assert torch.equal(x, before)
    assert not torch.equal(a, make(generator=generator(1))(x))
    assert a.is_contiguous()
    assert_close(make(generator=generator())(x[0]), make(generator=generator())(x[:1])[0])
    laid_out = x.contiguous(memory_format=torch.channels_last)
    c = make(generator=generator())(laid_out)
    assert torch.equal(a, c)
    assert c.is_contiguous(memory_format=torch.channels_last)
    for dtype in (torch.float64, torch.bfloat16):
        assert make()(x.to(dtype)).dtype == dtype
    quiet = make().eval()
    assert torch.equal(quiet(x), quiet(x))
    assert make()(x[:0]).shape[0] == 0
    torch.manual_seed(3)
    d = make()(x)
    torch.manual_seed(3)
    assert torch.equal(make()(x), d)
    assert type(make()).__name__ in repr(make())
    with pytest.raises(cnnfast.ShapeError, match=r"expected \(C, H, W\) or \(N, C, H, W\), got shape \(3, 3\)"):
        make()(torch.zeros(3, 3))


def test_noise_is_along_the_components() -> None:
    """Of the right size along each, one colour for all pixels of an image; nothing else of it changes."""
    x = torch.rand(20_000, 3, 2, 2)
    noise = data.ColourNoise(std=0.1, generator=generator())(x) - x
    assert_close(noise, noise[:, :, :1, :1].expand_as(noise), rtol=0, atol=1e-6)
    components = torch.tensor(data.IMAGENET_COMPONENTS)
    along = noise[:, :, 0, 0] @ components
    assert_close(along.std(0), 0.1 * torch.tensor(data.IMAGENET_EIGENVALUES), rtol=0.03, atol=0)
    assert_close(along.mean(0), torch.zeros(3), rtol=0, atol=1e-3)
    assert_close(components.T @ components, torch.eye(3), rtol=0, atol=1e-3)


def test_noise_fitted() -> None:
    """What was put into the data is found again: directions and deviations, in any order; also of other channel counts."""
    for channels in (1, 2, 3, 5):
        q, _ = torch.linalg.qr(torch.randn(channels, channels, generator=generator(2)))
        scales = torch.arange(1.0, channels + 1)
        pixels = (torch.randn(40_000, channels, generator=generator(3)) * scales) @ q.T
        x = pixels.view(400, 10, 10, channels).permute(0, 3, 1, 2)
        fitted = data.ColourNoise.fit(x, std=0.5, generator=generator())
        assert_close(fitted.eigenvalues, scales**2, rtol=0.05, atol=0)
        assert_close((fitted.components.T @ q).abs(), torch.eye(channels), rtol=0, atol=0.1)
        assert fitted(x).shape == x.shape


def test_crops() -> None:
    """Windows of the image, every position drawn; zeros outside; in evaluation the middle."""
    x = images()
    out = data.RandomCrop((4, 3), generator=generator())(x)
    found = set()
    for image, crop in zip(x, out, strict=True):
        places = [
            (i, j) for i in range(4) for j in range(3) if torch.equal(image[:, i : i + 4, j : j + 3], crop)
        ]  # fmt: skip
        assert len(places) == 1
        found.update(places)
    assert found == {(i, j) for i in range(4) for j in range(3)}
    assert torch.equal(data.RandomCrop((4, 3)).eval()(x), x[:, :, 1:5, 1:4])
    assert torch.equal(data.RandomCrop((7, 5), padding=2).eval()(x), x)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    for image, crop in zip(padded, data.RandomCrop((7, 5), padding=1)(x), strict=True):
        assert any(torch.equal(image[:, i : i + 7, j : j + 5], crop) for i in range(3) for j in range(3))


def test_translations() -> None:
    x = images(200, (4, 4), 1)
    padded = torch.nn.functional.pad(x, (1, 1, 2, 2))
    found = set()
    for image, moved in zip(padded, data.RandomTranslation((2, 1), generator=generator())(x), strict=True):
        places = [(i, j) for i in range(5) for j in range(3) if torch.equal(image[:, i : i + 4, j : j + 4], moved)]
        assert len(places) == 1
        found.update(places)
    assert len(found) == 15
    assert torch.equal(data.RandomTranslation(0)(x), x)
    assert not data.RandomTranslation((100, 0), generator=generator())(x[:1]).isnan().any()


def test_flips() -> None:
    x = images(400)
    out = data.RandomFlip(0.25, generator=generator())(x)
    flipped = (out != x).flatten(1).any(1)
    assert torch.equal(out[flipped], x[flipped].flip(3))
    assert 60 <= int(flipped.sum()) <= 140
    assert torch.equal(data.RandomFlip(1)(x), x.flip(3))
    assert torch.equal(data.RandomFlip(0)(x), x)


def test_sequence_in_training_and_evaluation() -> None:
    augment = torch.nn.Sequential(data.RandomTranslation(1), data.RandomFlip(), data.RandomCrop(4), data.ColourNoise())
    x = images()
    assert augment(x).shape == (64, 3, 4, 4)
    assert torch.equal(augment.eval()(x), x[:, :, 1:5, 0:4])
    assert augment.state_dict() == {}


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "crop": (lambda: data.RandomCrop(8)(images()), cnnfast.ShapeError, "images of 8 x 8 or more with padding 0, got 7 x 5"),
    "translation": (lambda: data.RandomTranslation(-1), ValueError, "a distance of 0 or more, got -1"),
    "flip": (lambda: data.RandomFlip(1.5), ValueError, "a probability from 0 to 1, got 1.5"),
    "noise": (lambda: data.ColourNoise(-1), ValueError, "std >= 0, got -1"),
    "components": (lambda: data.ColourNoise(eigenvalues=[1, 2]), cnnfast.ShapeError, r"got \(2,\) and \(3, 3\)"),
    "channels": (lambda: data.ColourNoise()(images(channels=1)), cnnfast.ShapeError, "expected 3 channels"),
    "integers": (lambda: data.ColourNoise()(images().byte()), TypeError, "floating point images, got torch.uint8"),
    "one pixel": (lambda: data.ColourNoise.fit(torch.zeros(1, 3, 1, 1)), cnnfast.ShapeError, "two pixels"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, error, sentence = ERRORS[name]
    with pytest.raises(error, match=sentence):
        call()
