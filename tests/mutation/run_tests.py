"""The tests of one mutant, in a process of their own: the first failure ends it with pytest's exit code 1.

    python -m mutation.run_tests SELECTION COUNT SEED FILE...

COUNT tests are chosen by a hash with the seed; 0: all of the selection.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest


class MutantFinder(importlib.abc.MetaPathFinder):
    """Imports cnnfast.kernels.NAME from the mutated file: Triton reads a function's source from the file that it is in."""

    def __init__(self, path: Path) -> None:
        self._name, self._path = f"cnnfast.kernels.{path.stem}", path

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The mutant's, of its name."""
        return importlib.util.spec_from_file_location(name, self._path) if name == self._name else None


class Sample:
    """Keeps some of the collected tests."""

    def __init__(self, count: int, seed: str) -> None:
        self._count, self._seed = count, seed

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """In the order of a hash, so that every kind of test comes early; after the selection, whose tests are counted."""
        items.sort(key=lambda item: zlib.crc32(f"{self._seed}{item.nodeid}".encode()))
        if self._count:
            del items[self._count :]


def main() -> int:
    """See the head of this file."""
    selection, count, seed, *files = sys.argv[1:]
    if "CNNFAST_MUTANT" in os.environ:
        sys.meta_path.insert(0, MutantFinder(Path(os.environ["CNNFAST_MUTANT"])))
    options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-k", selection]
    return int(pytest.main([*options, *files], plugins=[Sample(int(count), seed)]))


if __name__ == "__main__":
    sys.exit(main())
