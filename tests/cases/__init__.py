"""The case tables, shared by tests and benchmarks: one module an operation, found by its file."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

MODULES: tuple[ModuleType, ...] = tuple(
    importlib.import_module(f"cases.{path.stem}") for path in sorted(Path(__file__).parent.glob("[a-z]*.py"))
)
