"""bf16 on a processor with AVX512-BF16: which kernels serve, and whole networks on them."""

from __future__ import annotations

import pytest
import torch
from cases import conv2d
from support import process
from test_processes import run_python

import cnnfast
from cnnfast import dispatch, settings
from cnnfast.backends import cpu
from cnnfast.dispatch import Event

KERNELS = [i for i in dispatch.implementations("conv2d") if i.backend == "cpu" and i.name.endswith(cpu.DOT)]
pytestmark = [
    pytest.mark.skipif(process.EMULATED or process.INTERPRETED, reason="the CPU's kernels: the plain process"),
    pytest.mark.skipif(not KERNELS, reason="no AVX512-BF16 here, or a compiler that doesn't know it"),
]

# (C, size, K, filter, stride, groups), what serves its forward pass and its input's gradient
LAYERS = {
    "stem": ((3, 224, 64, 7, 2, 1), "conv2d_implicit_gemm", None),
    "1x1": ((64, 56, 256, 1, 1, 1), "conv2d_implicit_gemm", "conv2d_implicit_gemm"),
    "3x3": ((64, 56, 64, 3, 1, 1), "conv2d_winograd_f2x2", "conv2d_winograd_f2x2"),
    "3x3, stride 2": ((128, 56, 128, 3, 2, 1), "conv2d_implicit_gemm", "conv2d_implicit_gemm"),
    "4 channels a group": ((128, 56, 128, 3, 1, 32), "conv2d_grouped", "conv2d_grouped"),
    "16 channels a group": ((512, 14, 512, 3, 1, 32), "conv2d_winograd_f2x2", "conv2d_winograd_f2x2"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_served_by_dot_products(name: str) -> None:
    (c, size, k, taps, stride, groups), forward, backward = LAYERS[name]
    case = conv2d.Case("", 1, c, size, size, k, taps, taps, (stride, stride), (taps // 2, taps // 2), groups=groups)
    for direction, stem in (("fprop", forward), ("dgrad", backward)):
        selection = dispatch.select(conv2d.problem(case, direction, torch.bfloat16, "fp32"))
        assert stem is None or selection.implementation.name == f"cpu.{stem}.{cpu.DOT}"
    other = dispatch.select(conv2d.problem(case, "fprop", torch.float32, "fp32")).implementation
    assert not other.name.endswith(cpu.DOT)


def test_capped() -> None:
    """A cap names an ISA, and takes what is beside the widest away."""
    code = """
        from cnnfast import dispatch
        from cnnfast.backends import cpu
        print(*cpu.variants(), *sorted({i.name.split(".")[-1] for i in dispatch.implementations("conv2d") if i.backend == "cpu"}))
    """
    assert cpu.DOT in run_python(code).stdout
    assert cpu.DOT not in run_python(code, CNNFAST_CPU_ISA="avx512").stdout


def test_fused_network() -> None:
    """Every convolution of a network runs on them but the classifier, which is bound by its weights' memory."""
    torch.manual_seed(0)
    model = cnnfast.models.create("resnet18", num_classes=10).eval()
    x = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        expected = model(x)
        own = model.bfloat16()(x.bfloat16()).float()
        fused = cnnfast.fuse(model, x.bfloat16())
        with settings.observe() as events:
            found = fused(x.bfloat16()).float()
    kernels = [e.selection.implementation for e in events if isinstance(e, Event)]
    convolutions = [i.name for i in kernels if i.op == "conv_bn_act" or i.op == "conv2d"]
    assert len(convolutions) == 21
    assert all(name.endswith(cpu.DOT) for name in convolutions[:-1]), convolutions
    assert float((found - expected).norm()) <= 3 * float((own - expected).norm()) + 1e-2 * float(expected.norm())
