"""torchvision's and timm's networks (``cases/models.py``) converted and fused: the same results, and what torch still runs.

``make test`` takes a few, others for another CNNFAST_TEST_SEED; ``make test-all`` all.
"""

from __future__ import annotations

import pytest
from cases.models import MODELS, Model, examine
from support import process

pytestmark = pytest.mark.skipif(
    process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it"
)
SAMPLE = sorted(MODELS, key=lambda case: process.stable_hash("models", case))[:6]


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=str(c), marks=[] if c in SAMPLE else [pytest.mark.slow]) for c in MODELS]
)
def test_unchanged_in_result(case: Model) -> None:
    pytest.importorskip(case.source)
    found = examine(case)
    assert found.torch_error < 1e-3, "torch's fp32 results are those of another function"
    assert found.converted_error <= found.allowed
    assert found.fused_error <= found.allowed
    assert found.converted == found.layers
    assert set(found.aten) <= set(case.aten), found.aten


def test_the_table() -> None:
    """Forty and more, each once; of both packages."""
    names = [str(case) for case in MODELS]
    assert len(set(names)) == len(names) >= 40
    assert {case.source for case in MODELS} == {"torchvision", "timm"}
    assert all(case.why for case in MODELS)
