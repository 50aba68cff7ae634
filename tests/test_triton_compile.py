"""torch.compile(fullgraph=True) of whole networks for the Triton backend, on fake tensors: no card, no kernel, no memory.

A graph of an eval network is traced for CUDA tensors; autograd's engine asks for a real card, so without one training is
traced for CPU tensors, with the backend that the operators in the graph are to use: their arguments say it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from support import process
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

import cnnfast

pytestmark = pytest.mark.skipif(
    process.EMULATED or process.INTERPRETED, reason="traces only: the plain process does it"
)
NETWORKS = ("resnet18", *(pytest.param(name, marks=pytest.mark.slow) for name in ("googlenet", "vgg11_bn")))
OURS = ("conv2d", "conv_bn_act", "batch_norm", "max_pool2d", "adaptive_avg_pool2d")
THEIRS = ("aten.convolution", "aten.native_batch_norm", "aten.max_pool2d", "aten._native_batch_norm", "aten.cudnn")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trace(model: torch.nn.Module, x: torch.Tensor, training: bool) -> list[torch.fx.GraphModule]:
    """The graph of a forward pass, and in training that of the backward pass."""
    graphs: list[torch.fx.GraphModule] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=look, bw_compiler=look), fullgraph=True)
    with torch.set_grad_enabled(training):
        out = compiled(x)
        out = out if isinstance(out, torch.Tensor) else out[0]
        assert out.shape == (x.shape[0], 10)
        if training:
            out.sum().backward()
    return graphs


def check(graphs: list[torch.fx.GraphModule]) -> Counter[str]:
    """How often each operator of ours occurs: all are to run on Triton, and none of torch's does their work."""
    found: Counter[str] = Counter()
    for node in (node for graph in graphs for node in graph.graph.nodes if node.op == "call_function"):
        name = str(node.target)
        assert not name.startswith(THEIRS), name
        if name.startswith("cnnfast."):
            found[name.split(".")[1]] += 1
            assert "triton" in node.args, node.format_node()
    return found


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_networks(name: str, training: bool) -> None:
    """One graph without breaks, under the default precision, which asks torch's own flags on CUDA."""
    device = "cuda" if not training or process.GPU else "cpu"
    with FakeTensorMode(), torch.device(device):
        options: dict[str, Any] = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
        model = cnnfast.models.create(name, num_classes=10, **options)
        x = torch.randn(2, 3, 64, 64, device=device).to(memory_format=torch.channels_last)
        with cnnfast.backend("triton"), cnnfast.strict():
            found = check(trace(model.train(training), x, training))
    assert found["conv2d"] + found["conv_bn_act"] >= 8
    if training:
        assert found["conv2d_wgrad"] >= found["conv2d_dgrad"] >= 7  # the first layer's input has no gradient


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_a_converted_network(training: bool) -> None:
    """torch's modules, converted."""
    device = "cuda" if not training or process.GPU else "cpu"
    with FakeTensorMode(), torch.device(device):
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.BatchNorm2d(16), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(16, 32, 3, stride=2, groups=2), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
            torch.nn.Linear(32, 10),
        )  # fmt: skip
        model = cnnfast.convert(model, inplace=True).train(training)
        with cnnfast.backend("triton"), cnnfast.strict():
            found = check(trace(model, torch.randn(2, 3, 17, 13, device=device), training))
    expected = {"conv2d": 2, "batch_norm": 1, "adaptive_avg_pool2d": 1}
    if training:
        expected |= {"conv2d_wgrad": 2, "conv2d_dgrad": 1, "conv2d_bgrad": 2, "adaptive_avg_pool2d_dgrad": 1}
    assert {key: found[key] for key in expected} == expected, found
    assert any(key.startswith("max_pool2d") for key in found)
