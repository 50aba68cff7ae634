"""Modules of a function, and functions in several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn


class Applied(nn.Module):
    """Layers by name, and a function of them."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = forward

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def in_threads(work: Callable[..., None], arguments: Iterable[tuple[Any, ...]]) -> None:
    """Calls ``work`` with each of the arguments, all at once; what one of them raises is raised here."""
    failures: list[BaseException] = []

    def guarded(*given: Any) -> None:
        try:
            work(*given)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=given) for given in arguments]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if failures:
        raise failures[0]
