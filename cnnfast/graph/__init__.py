"""Whole networks as native plans."""

from cnnfast.graph.plan import Plan, Value

__all__ = ["Plan", "Value"]
