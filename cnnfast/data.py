"""Augmentation of images as tensors: AlexNet's colour noise, random crops, translations and flips.

Each transform is a module: in training mode every image of a batch draws its own numbers, in evaluation mode nothing is
random. They take (C, H, W) or (N, C, H, W), keep dtype, device and memory format, and can be put in a
``torch.nn.Sequential``. Random numbers come from torch's default generator, or from the ``generator`` that was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cnnfast.errors import ShapeError

# Of ImageNet's pixels, from 0 to 1: the eigenvalues of RGB's covariance, and its eigenvectors, one a column (the numbers
# that fb.resnet.torch brought into use).
IMAGENET_EIGENVALUES = (0.2175, 0.0188, 0.0045)
IMAGENET_COMPONENTS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


class _Transform(torch.nn.Module):
    """What a transform does to a batch is :meth:`apply`; images without a batch are one of one image."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, images: Tensor) -> Tensor:
        """(C, H, W) or (N, C, H, W) to the same number of dimensions."""
        if images.dim() not in (3, 4):
            raise ShapeError(
                f"{type(self).__name__}: expected (C, H, W) or (N, C, H, W), got shape {tuple(images.shape)}"
            )
        return self.apply_to(images[None])[0] if images.dim() == 3 else self.apply_to(images)

    def apply_to(self, images: Tensor) -> Tensor:
        """(N, C, H, W), transformed."""
        raise NotImplementedError

    def _integers(self, low: int, high: int, count: int) -> Tensor:
        """``count`` integers from low to high, both included."""
        return torch.randint(low, high + 1, (count,), generator=self.generator)


class ColourNoise(_Transform):
    """AlexNet's: to all pixels of an image a multiple of RGB's principal components is added.

    Image n gets ``components @ (alpha[n] * eigenvalues)`` with ``alpha`` drawn from a normal distribution: brightness and
    tint vary as they vary over the data, and what is in the image stays (Krizhevsky et al. 2012, section 4.1).

    Args:
        std: Of alpha; AlexNet's is 0.1.
        eigenvalues: (C,), of the covariance of the pixels' channels; default ImageNet's, for pixels from 0 to 1.
        components: (C, C), its eigenvectors, one a column. :meth:`fit` finds both in data of yours.
        generator: Of the random numbers.
    """

    def __init__(
        self, std: float = 0.1, eigenvalues: Any = IMAGENET_EIGENVALUES, components: Any = IMAGENET_COMPONENTS,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__(generator)
        if not std >= 0:
            raise ValueError(f"ColourNoise: expected std >= 0, got {std}")
        self.std = float(std)
        self.register_buffer("eigenvalues", torch.as_tensor(eigenvalues, dtype=torch.float32), persistent=False)
        self.register_buffer("components", torch.as_tensor(components, dtype=torch.float32), persistent=False)
        channels = len(self.eigenvalues)
        if self.eigenvalues.shape != (channels,) or self.components.shape != (channels, channels):
            raise ShapeError(
                f"ColourNoise: expected eigenvalues (C,) and components (C, C), got {tuple(self.eigenvalues.shape)} and "
                f"{tuple(self.components.shape)}"
            )

    eigenvalues: Tensor
    components: Tensor

    @classmethod
    def fit(cls, images: Tensor, std: float = 0.1, generator: torch.Generator | None = None) -> ColourNoise:
        """The noise for given data: from the covariance of the pixels'.

        Args:
            images: (N, C, H, W), as the transform will get them; at least two pixels.
            std, generator: The constructor's.
        """
        if images.dim() != 4 or images.numel() < 2 * images.shape[1]:
            raise ShapeError(f"ColourNoise.fit: expected (N, C, H, W) with two pixels, got shape {tuple(images.shape)}")
        pixels = images.transpose(0, 1).flatten(1).double()
        eigenvalues, components = torch.linalg.eigh(torch.cov(pixels).reshape(len(pixels), len(pixels)))
        return cls(std, eigenvalues.clamp(min=0), components, generator)

    def apply_to(self, images: Tensor) -> Tensor:
        """(N, C, H, W), floating point."""
        if images.shape[1] != len(self.eigenvalues):
            raise ShapeError(f"ColourNoise: expected {len(self.eigenvalues)} channels, got shape {tuple(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"ColourNoise: expected floating point images, got {images.dtype}")
        if not self.training:
            return images
        alpha = torch.randn(len(images), len(self.eigenvalues), generator=self.generator) * self.std
        noise = (alpha.to(self.eigenvalues.device) * self.eigenvalues) @ self.components.T
        return images + noise.to(images)[:, :, None, None]

    def extra_repr(self) -> str:
        """The deviation."""
        return f"std={self.std}"


class RandomCrop(_Transform):
    """A window of every image; in evaluation mode the one in the middle.

    Args:
        size: Height and width of the result.
        padding: Zeros put around the image before.
        generator: Of the random numbers.
    """

    def __init__(self, size: int | Sequence[int], padding: int = 0, generator: torch.Generator | None = None) -> None:
        super().__init__(generator)
        self.size = (size, size) if isinstance(size, int) else (size[0], size[1])
        self.padding = padding

    def apply_to(self, images: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, *size)."""
        (h, w), (p, q), pad = images.shape[2:], self.size, self.padding
        room = (h + 2 * pad - p, w + 2 * pad - q)
        if min(room) < 0:
            raise ShapeError(f"RandomCrop: expected images of {p} x {q} or more with padding {pad}, got {h} x {w}")
        if self.training:
            tops, lefts = (self._integers(0, r, len(images)) - pad for r in room)
        else:
            tops, lefts = (torch.full((len(images),), r // 2 - pad) for r in room)
        return _windows(images, tops, lefts, p, q)

    def extra_repr(self) -> str:
        """Size and padding."""
        return f"size={self.size}, padding={self.padding}"


class RandomTranslation(_Transform):
    """Every image moved by up to so many pixels in each direction, zeros behind it; nothing in evaluation mode.

    Args:
        distance: In pixels: vertically and horizontally, or both.
        generator: Of the random numbers.
    """

    def __init__(self, distance: int | Sequence[int], generator: torch.Generator | None = None) -> None:
        super().__init__(generator)
        self.distance = (distance, distance) if isinstance(distance, int) else (distance[0], distance[1])
        if min(self.distance) < 0:
            raise ValueError(f"RandomTranslation: expected a distance of 0 or more, got {distance}")

    def apply_to(self, images: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        if not self.training:
            return images
        tops, lefts = (self._integers(-d, d, len(images)) for d in self.distance)
        return _windows(images, tops, lefts, *images.shape[2:])

    def extra_repr(self) -> str:
        """The distance."""
        return f"distance={self.distance}"


class RandomFlip(_Transform):
    """Every image mirrored left to right with a probability; nothing in evaluation mode.

    Args:
        probability: Of mirroring.
        generator: Of the random numbers.
    """

    def __init__(self, probability: float = 0.5, generator: torch.Generator | None = None) -> None:
        super().__init__(generator)
        if not 0 <= probability <= 1:
            raise ValueError(f"RandomFlip: expected a probability from 0 to 1, got {probability}")
        self.probability = probability

    def apply_to(self, images: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        if not self.training:
            return images
        flipped = torch.rand(len(images), generator=self.generator) < self.probability
        return torch.where(flipped.to(images.device)[:, None, None, None], images.flip(3), images)

    def extra_repr(self) -> str:
        """The probability."""
        return f"probability={self.probability}"


def _windows(images: Tensor, tops: Tensor, lefts: Tensor, height: int, width: int) -> Tensor:
    """Of image n the window that begins at (tops[n], lefts[n]); 0 where that is outside: (N, C, height, width)."""
    device, (h, w) = images.device, images.shape[2:]
    rows = tops.to(device)[:, None] + torch.arange(height, device=device)
    columns = lefts.to(device)[:, None] + torch.arange(width, device=device)
    inside = ((rows >= 0) & (rows < h))[:, :, None] & ((columns >= 0) & (columns < w))[:, None, :]
    n = torch.arange(len(images), device=device)[:, None, None]
    picked = images.permute(0, 2, 3, 1)[n, rows.clamp(0, h - 1)[:, :, None], columns.clamp(0, w - 1)[:, None, :]]
    out = torch.where(inside[..., None], picked, 0).to(images.dtype).permute(0, 3, 1, 2)
    nhwc = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return out.contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)
