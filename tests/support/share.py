"""A pytest plugin: of the collected tests only a share, CNNFAST_TEST_SHARE="2/5": every fifth, beginning with the second."""

from __future__ import annotations

import os
from typing import Any


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Deselects the other shares."""
    share = os.environ.get("CNNFAST_TEST_SHARE", "")
    if not share:
        return
    which, of = map(int, share.split("/"))
    kept = items[which - 1 :: of]
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % of != which - 1])
    items[:] = kept
