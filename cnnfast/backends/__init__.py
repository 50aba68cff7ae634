"""The backends. Loading this package registers them; the order below is the policy for automatic selection.

A CPU tensor is served by ``cpu``; a CUDA tensor by ``cuda`` and ``triton`` in the order their costs say (the ownership
matrix in ARCHITECTURE.md); ``aten`` serves what nothing of ours covers, with its reason.
"""

from __future__ import annotations

from cnnfast import dispatch
from cnnfast.backends import aten, cpu, cuda, triton

ORDER = ("cpu", "triton", "cuda", "aten")

for _module in (cpu, triton, cuda, aten):
    dispatch.register_backend(_module.BACKEND, ORDER)
