"""The case tables, shared by tests and benchmarks: one module an operation, found by its file; models.py, whole networks."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

_FILES = sorted(path for path in Path(__file__).parent.glob("[a-z]*.py") if path.stem != "models")
MODULES: tuple[ModuleType, ...] = tuple(importlib.import_module(f"cases.{path.stem}") for path in _FILES)
