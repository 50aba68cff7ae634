"""PyTorch's own samples (OpInfo and ModuleInfo) for every function and module that cnnfast has: values, gradients, errors.

They live in ``torch.testing._internal``, which promises nothing: where it can't be imported the tests are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import process

from cnnfast import functional, nn

pytestmark = pytest.mark.skipif(
    process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it"
)
try:
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db
except ImportError as error:
    pytest.skip(f"torch's samples can't be imported: {error}", allow_module_level=True)

OPERATORS = {
    name: op
    for op in op_db
    for name in [op.name.removeprefix("nn.functional.")]
    if op.name.startswith("nn.functional.") and name in functional.__all__ and not op.variant_test_name
}
MODULES = {name: m for m in module_db for name in [m.name.removeprefix("nn.")] if name in nn.__all__}
# how far two sums in different orders may be apart, relative to the largest value
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def _close(ours: Any, theirs: Any, dtype: torch.dtype, what: str, exact: Any = None) -> None:
    """Equal within the tolerance, or no farther from the exact (float64) result than three times torch's."""
    if isinstance(theirs, (tuple, list)):
        assert len(ours) == len(theirs), what
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            _close(a, b, dtype, what, None if exact is None else exact[i])
        return
    if theirs is None:
        assert ours is None, what
        return
    assert ours.dtype == theirs.dtype, what
    assert ours.shape == theirs.shape, what
    if not theirs.numel():
        return
    allowed = TOLERANCE[dtype] * max(1.0, float(theirs.detach().abs().max()))
    if exact is not None and exact.is_floating_point():
        allowed = max(allowed, 3 * float((theirs.double() - exact).abs().max()))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=allowed, equal_nan=True, msg=lambda text: f"{what}: {text}")


def _results(function: Callable[..., Any], sample: Any, wide: bool = False) -> list[Any]:
    """The result and the gradients of every floating tensor of a sample."""
    leaves: list[torch.Tensor] = []

    def leaf(t: torch.Tensor) -> torch.Tensor:
        copy = t.detach().clone()  # running statistics are written
        copy = copy.double() if wide and copy.is_floating_point() else copy
        if t.requires_grad:
            leaves.append(copy.requires_grad_())
        return copy

    # not SampleInput.transform: it would change the layout of nothing, but drops what isn't a tensor in some versions
    def walk(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return leaf(value)
        return type(value)(walk(v) for v in value) if type(value) in (tuple, list) else value

    args = [walk(sample.input), *(walk(a) for a in sample.args)]
    out = function(*args, **{k: walk(v) for k, v in sample.kwargs.items()})
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]
    found = list(outs)
    if leaves and outs[0].requires_grad:
        # squares, so that the gradient that comes back has values of its own
        total = sum(o.square().sum() for o in outs if o.is_floating_point() and o.requires_grad)
        found += torch.autograd.grad(total, leaves, allow_unused=True)
    return found


def _cases() -> Iterator[Any]:
    for name in OPERATORS:
        for dtype in TOLERANCE:
            yield pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")


def test_there_are_samples() -> None:
    """Every function that torch has samples for is among them; the lists can't run empty unnoticed."""
    pools = {"avg_pool2d", "adaptive_avg_pool2d", "max_pool2d", "adaptive_max_pool2d"}
    assert {"conv1d", "conv2d", "conv_transpose2d", "batch_norm", *pools} <= set(OPERATORS)
    pools = {"AvgPool2d", "AdaptiveAvgPool2d", "MaxPool2d", "AdaptiveMaxPool2d"}
    assert {"Conv1d", "Conv2d", "ConvTranspose2d", "BatchNorm2d", *pools} <= set(MODULES)


@pytest.mark.parametrize(("name", "dtype"), list(_cases()))
def test_samples(name: str, dtype: torch.dtype) -> None:
    op = OPERATORS[name]
    ours, theirs = getattr(functional, name), getattr(torch.nn.functional, name)
    count = 0
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        what = f"{name} {dtype} sample {count}: {sample.summary()}"
        exact = _results(theirs, sample, wide=True)
        _close(_results(ours, sample), _results(theirs, sample), dtype, what, exact)
        count += 1
    assert count, "no sample"


@pytest.mark.parametrize("name", OPERATORS)
def test_error_samples(name: str) -> None:
    op = OPERATORS[name]
    if op.error_inputs_func is None:
        pytest.skip("torch has none")
    count = 0
    for case in op.error_inputs("cpu"):
        sample = case.sample_input
        with pytest.raises((case.error_type, ValueError, TypeError)) as raised:
            getattr(functional, name)(sample.input, *sample.args, **sample.kwargs)
        assert str(raised.value), case.error_regex
        count += 1
    assert count, "no sample"


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_of_samples(name: str) -> None:
    """gradcheck, gradgradcheck and forward mode on the smallest samples."""
    samples = [
        s for s in OPERATORS[name].sample_inputs("cpu", torch.float64, requires_grad=True) if 0 < s.input.numel() <= 200
    ][:3]
    assert samples
    for sample in samples:

        def differentiable(t: Any) -> bool:
            return isinstance(t, torch.Tensor) and t.requires_grad

        def function(*given: torch.Tensor, sample: Any = sample) -> Any:
            replaced = iter(given)
            args = [
                next(replaced) if differentiable(a) else a.clone() if isinstance(a, torch.Tensor) else a
                for a in (sample.input, *sample.args)
            ]
            out = getattr(functional, name)(*args, **sample.kwargs)
            return out[0] if isinstance(out, tuple) else out

        tensors = [t.detach().requires_grad_() for t in (sample.input, *sample.args) if differentiable(t)]
        assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_module_samples(name: str, training: bool) -> None:
    info = MODULES[name]
    inputs = info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=True, training=training)
    count = 0
    for sample in inputs:
        if sample.forward_input is None:
            continue
        results = []
        for cls in (getattr(nn, name), info.module_cls):
            torch.manual_seed(0)
            module = cls(*sample.constructor_input.args, **sample.constructor_input.kwargs).train(training)
            out = module(*sample.forward_input.args, **sample.forward_input.kwargs)
            outs = out if isinstance(out, tuple) else (out,)
            parameters = list(module.parameters())
            gradients = torch.autograd.grad(outs[0].square().sum(), parameters) if parameters else ()
            results.append([*outs, *gradients, *module.buffers()])
        _close(*results, torch.float32, f"{name} sample {count}: {sample.desc}")
        count += 1
    assert count, "no sample"
