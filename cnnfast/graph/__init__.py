"""Whole networks as native plans."""

from cnnfast.graph.fuse import Fused, fuse
from cnnfast.graph.plan import Plan, Value
from cnnfast.graph.shared import Shared

__all__ = ["Fused", "Plan", "Shared", "Value", "fuse"]
