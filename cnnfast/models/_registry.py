"""Networks by name, and their weights: from a state dict, a file, a URL, or torchvision's published ones."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

Network = TypeVar("Network", bound=torch.nn.Module)


class Builder(Protocol):
    """A function that makes a network."""

    def __call__(self, *, weights: Any = None, progress: bool = True, **options: Any) -> torch.nn.Module: ...


@dataclasses.dataclass(frozen=True)
class Entry:
    """A network's builder and the images that it was published for, (3, size, size)."""

    build: Builder
    size: int


_ENTRIES: dict[str, Entry] = {}
_PUBLISHED_NAME = re.compile(r"(\w+\.)?(DEFAULT|IMAGENET1K_\w+)")


def network(
    size: int = 224,
    loaded: Mapping[str, Any] | None = None,
    published: Mapping[str, Any] | None = None,
    heads: tuple[str, ...] = (),
) -> Callable[[Callable[..., Network]], Callable[..., Network]]:
    """Registers the function below it as a builder, and gives it ``weights`` and ``progress``.

    Args:
        size: Height and width of the images that the network was published for.
        loaded: Arguments where there are weights and the caller doesn't say: initialising is in vain then.
        published: The same where the weights are torchvision's.
        heads: Beginnings of the names of auxiliary heads, which weights may hold although the network was built without.
    """

    def decorate(build: Callable[..., Network]) -> Callable[..., Network]:
        name = build.__name__

        @functools.wraps(build)
        def builder(*, weights: Any = None, progress: bool = True, **options: Any) -> Network:
            if weights is None:
                return build(**options)
            state, is_published = resolve(name, weights, progress)
            if is_published and options.setdefault("num_classes", 1000) != 1000:
                raise ValueError(f"{name}: these weights are for num_classes=1000, not {options['num_classes']}")
            model = build(**{**(loaded or {}), **(published or {} if is_published else {}), **options})
            without = tuple(head for head in heads if not hasattr(model, head) or getattr(model, head) is None)
            model.load_state_dict(_without(state, without))
            return model

        vars(builder).pop("__wrapped__")  # the signature is this one, with the weights
        _ENTRIES[name] = Entry(builder, size)
        return builder

    return decorate


def names() -> list[str]:
    """The names that :func:`create` takes, sorted, numbers by their value."""
    return sorted(_ENTRIES, key=lambda name: [(text, int(n or 0)) for text, n in re.findall(r"(\D+)(\d*)", name)])


def entry(name: str) -> Entry:
    """What is registered under a name; ValueError with the closest names where nothing is."""
    if name not in _ENTRIES:
        close = difflib.get_close_matches(name, _ENTRIES) if isinstance(name, str) else []
        known = f"meant: {', '.join(close)}?" if close else f"expected one of {', '.join(names())}"
        raise ValueError(f"unknown network {name!r}; {known}")
    return _ENTRIES[name]


def create(name: str, *, weights: Any = None, progress: bool = True, **options: Any) -> torch.nn.Module:
    """A network by its name, in training mode, as its builder (``cnnfast.models.<name>``) makes it.

    Args:
        name: One of ``cnnfast.models.list()``.
        weights: None (initialised at random, as torchvision does it), or

            - a state dict;
            - a path of a file with one, or of a checkpoint with one under ``"model"`` or ``"state_dict"``;
            - a URL, kept in torch's cache after the first time;
            - torchvision's name (``"IMAGENET1K_V1"``, ``"ResNet50_Weights.DEFAULT"``) or member of its enumeration: with
              them googlenet and inception_v3 also transform their input (``transform_input``).

            They are loaded strictly: every parameter must be there, and no other.
        progress: Show a progress bar while a URL is downloaded.
        options: The network's own arguments, with torchvision's names and meaning: ``num_classes``, ``dropout`` and so
            on.

    Raises:
        ValueError: an unknown name, or weights that are nothing of the above.
        TypeError: an argument that the network doesn't have.
        RuntimeError: weights that don't fit.
        ImportError: torchvision's weights without torchvision.
    """
    return entry(name).build(weights=weights, progress=progress, **options)


# ---- weights ---------------------------------------------------------------------------------------------------------


def resolve(name: str, weights: Any, progress: bool = True) -> tuple[Mapping[str, Any], bool]:
    """The state dict that ``weights`` (see :func:`create`) of a network mean, and whether it is torchvision's own."""
    if isinstance(weights, Mapping):
        return _state(weights, "weights"), False
    if isinstance(weights, str) and "://" in weights:
        # torch's cache goes by the file's name alone, and two sites may use one
        mark = hashlib.sha256(weights.encode()).hexdigest()[:10]
        loaded = torch.hub.load_state_dict_from_url(
            weights, map_location="cpu", progress=progress, file_name=f"{mark}-{os.path.basename(weights)}",
            weights_only=True,
        )  # fmt: skip
        return _state(loaded, weights), False
    if hasattr(weights, "url") or (isinstance(weights, str) and _PUBLISHED_NAME.fullmatch(weights)):
        member = _published(name, weights)
        state = torch.hub.load_state_dict_from_url(
            member.url, map_location="cpu", progress=progress, check_hash=True, weights_only=True
        )
        return _state(state, member.url), True
    if isinstance(weights, (str, os.PathLike)):
        path = Path(weights)
        if not path.is_file():
            raise ValueError(
                f"{name}: no file {str(path)!r}; weights are a path, a URL, a state dict or torchvision's name"
            )
        return _state(torch.load(path, map_location="cpu", weights_only=True), str(path)), False
    raise ValueError(
        f"{name}: expected weights as a path, a URL, a state dict or torchvision's name, got {type(weights).__name__}"
    )


def _published(name: str, weights: Any) -> Any:
    """The member of torchvision's enumeration of a network's weights."""
    try:
        from torchvision import models
    except ImportError as error:
        raise ImportError("weights by torchvision's name need torchvision: pip install torchvision") from error
    try:
        members = models.get_model_weights(name)
    except ValueError:
        raise ValueError(f"{name}: torchvision has no weights for it; give a path, a URL or a state dict")
    text = str(weights)
    for key, member in members.__members__.items():
        if weights is member or (isinstance(weights, str) and text in (key, f"{members.__name__}.{key}")):
            return member
    raise ValueError(f"{name}: no weights {text}; torchvision has {', '.join(members.__members__)}")


def _without(state: Mapping[str, Any], modules: tuple[str, ...]) -> Mapping[str, Any]:
    """A state dict less some modules, with what else it carries (the versions of its modules)."""
    left = OrderedDict((k, v) for k, v in state.items() if k.split(".")[0] not in modules)
    left._metadata = getattr(state, "_metadata", None)  # type: ignore[attr-defined]
    return left


def _state(loaded: Any, source: str) -> Mapping[str, Any]:
    """A state dict as it is, or the one within a checkpoint."""
    for key in ("model", "state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise ValueError(f"{source}: expected a state dict, or a checkpoint with one as 'model' or 'state_dict'")
    return loaded
