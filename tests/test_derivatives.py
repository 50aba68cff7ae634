"""Derivatives of every order, in every way that torch has: backward, forward mode, batched, functorch's transforms."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from support import process
from support.functions import FUNCTIONS, Function
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.testing import assert_close

import cnnfast

pytestmark = [
    pytest.mark.skipif(process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]
each = pytest.mark.parametrize("f", FUNCTIONS, ids=str)


@each
def test_gradcheck(f: Function) -> None:
    """Numerically, in backward, forward and batched modes; nondeterminism isn't tolerated."""
    assert gradcheck(
        f.ours, f.tensors(grad=True), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True,
        nondet_tol=0.0, fast_mode=not process.FULL,
    )  # fmt: skip


@each
def test_gradgradcheck(f: Function) -> None:
    """Second derivatives, also forward over reverse, where tangents must lie as their primals do."""
    assert gradgradcheck(
        f.ours, f.tensors(grad=True), check_fwd_over_rev=True, nondet_tol=0.0, fast_mode=not process.FULL
    )


@each
def test_second_derivatives_are_torchs(f: Function) -> None:
    results = []
    for function in (f.ours, f.torchs):
        tensors = f.tensors(grad=True)
        first = torch.autograd.grad(function(*tensors).sin().sum(), tensors, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), tensors, create_graph=True)
        third = torch.autograd.grad(sum(g.cos().sum() for g in second), tensors)
        results.append((*first, *second, *third))
    assert_close(*results)


@each
def test_third_derivative_of_one_operand_alone(f: Function) -> None:
    """Operands that need no gradient, in every combination: what isn't asked for isn't computed, nor missed."""
    n = len(f.shapes)
    for chosen in range(1, 2**n):
        results = []
        for function in (f.ours, f.torchs):
            tensors = [t.requires_grad_(bool(chosen >> i & 1)) for i, t in enumerate(f.tensors())]
            leaves = [t for t in tensors if t.requires_grad]
            out = function(*tensors)
            first = torch.autograd.grad(out.exp().sum(), leaves, create_graph=True)
            results.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)])
        assert_close(*results)


def _loss(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *t: function(*t).sin().sum()


@each
def test_func_grad_vjp_jvp(f: Function) -> None:
    tensors = f.tensors()
    everything = tuple(range(len(tensors)))
    tangents = f.tensors(seed=1)
    cotangent = torch.randn_like(f.torchs(*tensors))
    results = []
    for function in (f.ours, f.torchs):
        g = grad(_loss(function), everything)(*tensors)
        back = vjp(function, *tensors)[1](cotangent)
        forward = jvp(function, tensors, tangents)
        over = jvp(lambda *t, function=function: grad(_loss(function), everything)(*t), tensors, tangents)
        results.append((g, back, forward, over))
    assert_close(*results)


@each
def test_jacobians_and_hessian(f: Function) -> None:
    tensors = f.tensors()
    for i in range(len(tensors)):
        results = []
        for function in (f.ours, f.torchs):

            def one(t: Tensor, function: Any = function, i: int = i) -> Tensor:
                return function(*tensors[:i], t, *tensors[i + 1 :])

            jacobians = (jacrev(one)(tensors[i]), jacfwd(one)(tensors[i]))
            small = hessian(lambda t, one=one: one(t).sin().sum())(tensors[i])
            results.append((*jacobians, small))
        assert_close(*results)


@each
def test_vmap(f: Function) -> None:
    """Over the input, over the weights, over all, along other dimensions, nested; alone and under grad."""
    tensors = f.tensors()
    stacked = [torch.stack([t, t + 1, t * 2], dim=min(1, t.dim())) for t in tensors]
    for chosen in range(1, 2 ** len(tensors)):
        dims = tuple(min(1, t.dim()) if chosen >> i & 1 else None for i, t in enumerate(tensors))
        args = [stacked[i] if d is not None else tensors[i] for i, d in enumerate(dims)]
        assert_close(vmap(f.ours, dims)(*args), vmap(f.torchs, dims)(*args))
        everything = tuple(range(len(tensors)))
        assert_close(
            vmap(grad(_loss(f.ours), everything), dims)(*args), vmap(grad(_loss(f.torchs), everything), dims)(*args)
        )
    x = torch.stack([stacked[0], stacked[0] + 1])
    inner = [None] * (len(tensors) - 1)
    dims_in, dims_out = (min(1, tensors[0].dim()), *inner), (0, *inner)
    nested = [vmap(vmap(function, dims_in), dims_out)(x, *tensors[1:]) for function in (f.ours, f.torchs)]
    assert_close(*nested)


@each
def test_batched_gradients(f: Function) -> None:
    """is_grads_batched=True and jacobian(vectorize=True) come by an older vmap that functorch doesn't know of."""
    results = []
    for function in (f.ours, f.torchs):
        tensors = f.tensors(grad=True)
        out = function(*tensors)
        basis = torch.randn(3, *out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
        jacobian = torch.autograd.functional.jacobian(function, f.tensors(), vectorize=True)
        results.append((torch.autograd.grad(out, tensors, basis, is_grads_batched=True), jacobian))
    assert_close(*results)


@each
def test_forward_mode(f: Function) -> None:
    """Dual tensors through the function keep their tangents, whichever operands carry one."""
    tensors, tangents = f.tensors(), f.tensors(seed=1)
    for chosen in range(1, 2 ** len(tensors)):
        results = []
        for function in (f.ours, f.torchs):
            with forward_ad.dual_level():
                duals = [
                    forward_ad.make_dual(t, d) if chosen >> i & 1 else t
                    for i, (t, d) in enumerate(zip(tensors, tangents, strict=True))
                ]
                unpacked = forward_ad.unpack_dual(function(*duals))
                assert unpacked.tangent is not None
                results.append((unpacked.primal, unpacked.tangent))
        assert_close(*results)


@each
def test_vectors_times_hessian(f: Function) -> None:
    tensors, vectors = f.tensors(), f.tensors(seed=1)
    results = []
    for function in (f.ours, f.torchs):
        hvp = torch.autograd.functional.hvp(_loss(function), tensors, vectors)
        vhp = torch.autograd.functional.vhp(_loss(function), tensors, vectors)
        results.append((hvp, vhp))
    assert_close(*results)


def test_per_sample_gradients() -> None:
    """The usual recipe: vmap of grad over functional_call of a module."""
    torch.manual_seed(0)
    ours = torch.nn.Sequential(
        cnnfast.Conv2d(3, 4, 3), torch.nn.ReLU(), cnnfast.Conv2d(4, 5, 3, groups=1, stride=2)
    ).double()
    theirs = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 5, 3, stride=2)).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(6, 3, 9, 8, dtype=torch.float64)
    results = []
    for net in (ours, theirs):
        parameters = {k: p.detach() for k, p in net.named_parameters()}

        def loss(p: dict[str, Tensor], sample: Tensor, net: Any = net) -> Tensor:
            return functional_call(net, p, (sample[None],)).square().sum()

        results.append(vmap(grad(loss), (None, 0))(parameters, x))
    assert_close(*results)


def test_ensemble() -> None:
    """vmap over stacked parameters with one shared input."""
    torch.manual_seed(0)
    nets = [cnnfast.Conv2d(3, 4, 3, padding=1) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(nets)  # type: ignore[arg-type]
    x = torch.randn(2, 3, 6, 6)
    out = vmap(lambda p, b: functional_call(nets[0], (p, b), (x,)))(parameters, buffers)
    assert_close(out, torch.stack([net(x) for net in nets]))


def test_a_gradient_that_nobody_needs_is_undefined() -> None:
    f = FUNCTIONS[0]
    x, w, b = f.tensors(grad=True)
    out = f.ours(x.detach(), w.detach(), b)
    assert torch.autograd.grad(out.sum(), (x, w), allow_unused=True) == (None, None)


def test_double_use_and_accumulation() -> None:
    """One weight in two convolutions, two backward calls: gradients add up."""
    results = []
    for function in (FUNCTIONS[0].ours, FUNCTIONS[0].torchs):
        x, _, _ = FUNCTIONS[0].tensors(grad=True)
        w = torch.randn(3, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = function(function(x, w), w)
        out.sum().backward(retain_graph=True)
        out.square().sum().backward()
        results.append((x.grad, w.grad))
    assert_close(*results)


def test_changed_saved_tensors_are_noticed() -> None:
    """Autograd's version check works through our Functions: an in-place change before backward is an error."""
    x, w, b = FUNCTIONS[0].tensors(grad=True)
    held = w * 1
    out = FUNCTIONS[0].ours(x, held, b)
    held.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_nothing_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors = FUNCTIONS[0].tensors(torch.float32, grad=True)
        FUNCTIONS[0].ours(*tensors).sum().backward()
