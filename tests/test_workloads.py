"""The benchmarks' table of layers is what torchvision's networks have."""

from __future__ import annotations

import pytest
import torch
import workloads
from support import process

pytestmark = pytest.mark.skipif(
    process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it"
)


@pytest.mark.parametrize("network", workloads.NETWORKS)
def test_table(network: str) -> None:
    pytest.importorskip("torchvision")
    assert workloads.extract(network) == workloads.NETWORKS[network]
    assert workloads.extract_poolings(network) == workloads.POOLINGS[network]


@pytest.mark.parametrize("network", workloads.DEPTHWISE)
def test_depthwise(network: str) -> None:
    pytest.importorskip("torchvision")
    found = {layer: count for layer, count in workloads.extract(network).items() if layer.kind == "depthwise"}
    assert found == workloads.DEPTHWISE[network]


def test_distinct() -> None:
    layers = workloads.distinct()
    assert len(layers) == len({(*vars(layer).values(),) for layer in layers})
    assert {layer for rows in workloads.NETWORKS.values() for layer in rows} == set(layers)
    assert {layer.kind for layer in workloads.representative()} == {layer.kind for layer in layers}


def test_poolings() -> None:
    layers = workloads.poolings()
    assert len(layers) == 23 == len(set(layers))
    assert {layer.kind for layer in workloads.representative_poolings()} == {layer.kind for layer in layers}
    for layer in layers:
        out = torch.nn.functional.max_pool2d(
            torch.empty(1, layer.C, layer.H, layer.H, device="meta"), layer.kernel, layer.stride, layer.padding,
            ceil_mode=layer.ceil_mode,
        )  # fmt: skip
        assert out.shape == (1, layer.C, layer.output, layer.output), str(layer)
        assert layer.bytes(2, 4) == 4 * 2 * (layer.C * layer.H**2 + out.numel())


def test_flops() -> None:
    """Twice the multiply-adds that the papers state, convolutions alone."""
    total = {
        name: sum(layer.flops() * count for layer, count in rows.items()) for name, rows in workloads.NETWORKS.items()
    }
    assert total["resnet50"] == pytest.approx(8.17e9, rel=1e-2)
    assert total["vgg16"] == pytest.approx(30.7e9, rel=1e-2)
    assert total["resnet18"] == pytest.approx(3.63e9, rel=1e-2)
