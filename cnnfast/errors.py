"""The errors that bad input raises. Each is also a RuntimeError, which is what torch raises for the same input."""

from __future__ import annotations


class ShapeError(ValueError, RuntimeError):
    """A shape, size or value that the operation doesn't accept."""


class DtypeError(TypeError, RuntimeError):
    """Dtypes that the operation doesn't accept, or that don't go together."""
