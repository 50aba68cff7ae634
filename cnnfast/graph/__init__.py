"""Whole networks as native plans."""

from cnnfast.graph.fuse import Fused, fuse
from cnnfast.graph.plan import Plan, Shared, Value

__all__ = ["Fused", "Plan", "Shared", "Value", "fuse"]
