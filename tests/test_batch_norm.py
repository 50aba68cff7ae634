"""batch_norm, batch_norm_act, add_act and conv_bn_act as torch has them: what is accepted, values, statistics, modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import oracle, process
from support.verdict import outcome
from torch import nn
from torch.testing import assert_close

import cnnfast
from cnnfast import dispatch, functional, settings
from cnnfast.functional import add_act, batch_norm, batch_norm_act, conv_bn_act

pytestmark = pytest.mark.skipif(
    process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it"
)
CL, CL3 = torch.channels_last, torch.channels_last_3d
GENERATOR = torch.Generator().manual_seed(0)


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


X, M, W, B = _randn(2, 4, 6, 5), _randn(4), _randn(4), _randn(4)
V = _randn(4).abs() + 0.2
H, BF = torch.float16, torch.bfloat16
ACTS: dict[str, Any] = {"none": lambda z: z, "relu": torch.relu, "relu6": F.relu6, "leaky_relu": F.leaky_relu}

ACCEPTED: dict[str, tuple[Any, ...]] = {  # input, mean, var, weight, bias, training, momentum, eps
    "evaluated": (X, M, V, W, B),
    "training": (X, M, V, W, B, True),
    "training without statistics": (X, None, None, W, B, True),
    "without affine": (X, M, V, None, None, True),
    "weight alone": (X, M, V, W),
    "bias alone": (X, M, V, None, B, True),
    "momentum 0": (X, M, V, W, B, True, 0.0),
    "momentum 1, large eps": (X, M, V, W, B, True, 1, 0.5),
    "eps 0, evaluated": (X, M, V, W, B, False, 0.1, 0),
    "channels_last": (X.to(memory_format=CL), M, V, W, B, True),
    "sliced channels_last": (_randn(2, 8, 6, 5).to(memory_format=CL)[:, :4], M, V, W, B, True),
    "transposed": (X.transpose(2, 3), M, V, W, B, True),
    "expanded": (X[:1].expand(3, 4, 6, 5), M, V, W, B, True),
    "2-D": (_randn(7, 4), M, V, W, B, True),
    "2-D transposed": (_randn(4, 7).t(), M, V, W, B, True),
    "3-D": (_randn(3, 4, 5), M, V, W, B, True),
    "3-D transposed": (_randn(3, 5, 4).transpose(1, 2), M, V, W, B, True),
    "5-D": (_randn(2, 4, 3, 2, 5), M, V, W, B, True),
    "5-D channels_last": (_randn(2, 4, 3, 2, 5).to(memory_format=CL3), M, V, W, B, True),
    "6-D": (_randn(2, 4, 3, 2, 2, 2), M, V, W, B, True),
    "empty batch": (X[:0], M, V, W, B),
    "empty batch, training": (X[:0], M, V, W, B, True),
    "empty image, training": (X[:, :, :0], M, V, W, B, True),
    "no channels": (X[:, :0], M[:0], V[:0], None, None, True),
    "one pixel": (X[:1, :, :1, :1], M, V, W, B),
    "a weight of two dimensions": (X, M, V, W[None], B),
    "float64": tuple(t.double() for t in (X, M, V, W, B)),
    "bfloat16, float32 vectors": (X.bfloat16(), M, V, W, B, True),
    "float16, float32 vectors": (X.half(), M, V, W, B, True),
    "bfloat16 all": (*(t.bfloat16() for t in (X, M, V, W, B)), True),
    "float16 all": (*(t.half() for t in (X, M, V, W, B)), True),
    "bfloat16, float32 statistics alone": (X.bfloat16(), M, V),
}
REJECTED: dict[str, tuple[Any, ...]] = {
    "1-D": (X[0, :, 0, 0], M, V),
    "one value a channel": (X[:1, :, :1, :1], M, V, None, None, True),
    "evaluated without statistics": (X, None, None),
    "evaluated with half the statistics": (X, M, None),
    "training with half the statistics": (X, M, None, None, None, True),
    "wrong weight": (X, M, V, W[:3], B),
    "wrong mean": (X, M[:3], V, W, B),
    "weight float64": (X, M, V, W.double(), B.double()),
    "statistics float64": (X, M.double(), V.double(), W, B),
    "weight bfloat16": (X, M, V, W.bfloat16(), B.bfloat16()),
    "float64 with float32 vectors": (X.double(), M, V, W, B),
    "bfloat16 weight, float32 statistics": (X.bfloat16(), M, V, W.bfloat16(), B.bfloat16()),
    "float32 weight, bfloat16 statistics": (X.bfloat16(), M.bfloat16(), V.bfloat16(), W, B),
    "bfloat16 with float16 weight": (X.bfloat16(), M, V, W.half(), B.half()),
    "integers": (X.long(), M, V, W, B),
    "momentum None": (X, M, V, W, B, True, None),
    "eps 0 in training": (X, M, V, W, B, True, 0.1, 0),
    "no tensor": ([1.0], M, V),
}


def _own(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """With running statistics of its own, which training writes."""
    return (args[0], *(None if t is None else t.clone() for t in args[1:3]), *args[3:])


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    ours, torchs = _own(ACCEPTED[name]), _own(ACCEPTED[name])
    a, b = batch_norm(*ours), F.batch_norm(*torchs)
    tolerance = {BF: 4e-2, H: 4e-3, torch.float32: 2e-5, torch.float64: 1e-12}[a.dtype]
    assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert a.stride() == b.stride()
    for one, other in zip(ours[1:3], torchs[1:3], strict=True):
        if one is not None:
            assert_close(one, other, rtol=min(tolerance, 1e-2), atol=min(tolerance, 1e-2))


@pytest.mark.parametrize("name", REJECTED)
def test_rejected(name: str) -> None:
    if name == "eps 0 in training" and not isinstance(outcome(F.batch_norm, _own(REJECTED[name]), {}), Exception):
        pytest.skip("older torches accept it")
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        F.batch_norm(*_own(REJECTED[name]))
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        batch_norm(*_own(REJECTED[name]) if isinstance(REJECTED[name][0], torch.Tensor) else REJECTED[name])


def test_the_error_says_all() -> None:
    with pytest.raises(ValueError, match=r"batch_norm: expected weight to have C = 4 .*\(2, 4, 6, 5\).*weight \(3,\)"):
        batch_norm(X, M, V, W[:3], B)
    with pytest.raises(ValueError, match="more than 1 value per channel when training"):
        batch_norm(X[:1, :, :1, :1], None, None, training=True)
    with pytest.raises(ValueError, match="activation out of none, relu, relu6, leaky_relu, got 'tanh'"):
        batch_norm_act(X, W, B, M, V, activation="tanh")
    with pytest.raises(ValueError, match=r"residual of the input's shape.*\(2, 4, 6, 4\)"):
        batch_norm_act(X, W, B, M, V, X[..., :4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BF, H], ids=str)
@pytest.mark.parametrize("format", [CL, torch.contiguous_format], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("value", [7.3, -1e-3, 6e4])
def test_constant_channels_give_their_bias(value: float, format: torch.memory_format, dtype: torch.dtype) -> None:
    x = torch.full((3, 5, 7, 11), value).to(dtype).contiguous(memory_format=format)
    bias, var = torch.linspace(-2, 2, 5, dtype=dtype), torch.ones(5, dtype=dtype)
    mean = torch.zeros(5, dtype=dtype)
    y = batch_norm(x, mean, var, torch.ones(5, dtype=dtype), bias, True, 1.0)
    assert torch.equal(y, bias.reshape(1, -1, 1, 1).expand_as(y))
    assert torch.equal(mean, x[0, :, 0, 0])
    assert torch.equal(var, torch.zeros(5, dtype=dtype))


def test_large_values() -> None:
    """Squares beyond float32, and a mean that is huge beside the deviation, are normalised as in float64."""
    for x in (_randn(4, 6, 5, 5) * 1e30, _randn(4, 6, 5, 5) + 1e3, _randn(4, 6, 5, 5) * 1e-15):
        eps = 1e-5 if x.abs().max() > 1 else 1e-35
        x = x.to(memory_format=CL).requires_grad_()
        wide = x.detach().double().requires_grad_()
        y, ref = (
            batch_norm(x, None, None, training=True, eps=eps),
            F.batch_norm(wide, None, None, training=True, eps=eps),
        )
        assert_close(y.double(), ref, rtol=1e-4, atol=1e-4)
        g = _randn(*y.shape)
        (dx,), (dref,) = torch.autograd.grad(y, x, g), torch.autograd.grad(ref, wide, g.double())
        scale = dref.abs().max()
        assert_close(dx.double() / scale, dref / scale, rtol=1e-3, atol=1e-4)


def test_an_outlier_first() -> None:
    """The sums' origin is no single element: one far from all others costs no accuracy."""
    x = _randn(4, 3, 40, 40)
    x[0, :, 0, 0] = 1e6
    assert_close(
        batch_norm(x, None, None, training=True).double(), F.batch_norm(x.double(), None, None, training=True),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTS)
@pytest.mark.parametrize("dtype", [torch.float32, BF], ids=str)
def test_fused_is_the_sequence(dtype: torch.dtype, activation: str, residual: bool, training: bool) -> None:
    """Values, every gradient, strides, running statistics."""
    results = []
    for fused in (True, False):
        generator = torch.Generator().manual_seed(1)
        x, r = (torch.randn(3, 24, 9, 8, generator=generator).to(dtype).to(memory_format=CL) for _ in range(2))
        w, b = torch.linspace(0.5, 2, 24), torch.linspace(-1, 1, 24)
        leaves = [t.requires_grad_() for t in (x, w, b, *[r] * residual)]
        stats = [torch.zeros(24), torch.ones(24)]
        given = r if residual else None
        if fused:
            y = batch_norm_act(x, w, b, *stats, given, activation, training)
        else:
            z = F.batch_norm(x, *stats, w, b, training)
            y = ACTS[activation](z if given is None else z + given)
        g = torch.randn(y.shape, generator=generator).to(y).to(memory_format=CL)
        gradients = torch.autograd.grad(y, leaves, g)
        results.append((y.detach(), *gradients, *stats))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for ours, torchs in zip(*results, strict=True):
        assert (ours.dtype, ours.stride()) == (torchs.dtype, torchs.stride())
        if dtype == torch.float32:
            assert_close(ours, torchs, rtol=tolerance, atol=tolerance)
        else:  # a mask may differ where torch rounds between its steps
            assert float((ours.float() - torchs.float()).abs().mean()) < tolerance * float(
                torchs.float().abs().mean() + 1
            )


def test_what_is_kept() -> None:
    """Without a residual nothing but x and vectors; with one the result, too, which the next layer keeps."""
    x = _randn(2, 8, 5, 5).requires_grad_()
    for residual, count in ((None, 1), (_randn(2, 8, 5, 5), 2)):
        y = batch_norm_act(x, None, None, None, None, residual, training=True)
        saved = y.grad_fn.saved_tensors  # type: ignore[union-attr]
        assert sum(t is not None and t.dim() == 4 for t in saved) == count


# ---- add_act ---------------------------------------------------------------------------------------------------------

SUMS: dict[str, tuple[torch.Tensor, torch.Tensor]] = {
    "alike": (X, X + 1),
    "channels_last": (X.to(memory_format=CL), (X * 2).to(memory_format=CL)),
    "mixed": (X, X.to(memory_format=CL)),
    "mixed, the other way": (X.to(memory_format=CL), X),
    "sliced": (X[..., ::2], X[..., 1::2][..., :3].repeat(1, 1, 1, 2)[..., :3]),
    "transposed": (X.transpose(1, 3), X.transpose(1, 3) * 2),
    "broadcast channels": (X, B.reshape(1, -1, 1, 1)),
    "broadcast both": (X[:, :1], X[:1]),
    "broadcast a scalar": (X, torch.tensor(0.5)),
    "1-D": (B, W),
    "3-D": (X[0], X[1]),
    "0-D": (B[0], W[0]),
    "5-D": (X[None], X[None] - 1),
    "empty": (X[:0], X[:0]),
    "promoted": (X.half(), X),
    "promoted from integers": (X, torch.arange(5)),
    "integers": (X.long(), X.long()),
}


@pytest.mark.parametrize("name", SUMS)
def test_add_act(name: str) -> None:
    a, b = SUMS[name]
    ours, torchs = add_act(a, b), torch.relu(a + b)
    assert_close(ours, torchs, rtol=0, atol=0)
    if a.dim() == 4 and a.shape == b.shape:
        assert ours.stride() == torchs.stride()


def test_add_act_gradients() -> None:
    for a, b in SUMS.values():
        if not a.is_floating_point() or not b.is_floating_point():
            continue
        results = []
        for function in (add_act, lambda a, b: torch.relu(a + b)):
            leaves = [a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()]
            results.append(torch.autograd.grad((function(*leaves) * 3).sum(), leaves))
        assert_close(*results)


@pytest.mark.parametrize("activation", ACTS)
def test_special_values(activation: str) -> None:
    special = torch.tensor([0.0, -0.0, 1.0, float("nan"), float("inf"), -float("inf"), 6.0, 7.0, -2.0])
    a, b = torch.meshgrid(special, special, indexing="ij")
    assert torch.equal(add_act(a, b, activation).nan_to_num(99), ACTS[activation](a + b).nan_to_num(99))
    results = []
    for function in (lambda x: add_act(x, b, activation), lambda x: ACTS[activation](x + b)):
        x = a.clone().requires_grad_()
        g = torch.autograd.grad(function(x).sum(), x)[0]
        results.append(g[~(a + b).isnan()])  # at a NaN torch's vectors and scalars disagree for relu6
    assert torch.equal(*results)


# ---- conv_bn_act and the modules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, BF], ids=str)
def test_conv_bn_act_is_one_kernel(dtype: torch.dtype) -> None:
    x, r = (t.to(dtype).to(memory_format=CL) for t in (_randn(2, 8, 7, 7), _randn(2, 16, 7, 7)))
    w, (m, b), v, g = _randn(16, 8, 3, 3).to(dtype), (_randn(16), _randn(16)), _randn(16).abs() + 0.1, _randn(16)
    with cnnfast.strict(), cnnfast.settings.observe() as events:
        y = conv_bn_act(x, w, None, m, v, g, b, r, padding=1)
    assert [e.selection.problem.op for e in events] == ["conv_bn_act"]
    z = F.batch_norm(F.conv2d(x.double(), w.double(), padding=1), m.double(), v.double(), g.double(), b.double())
    # the convolution's bound (ARCHITECTURE: Precision), which its scale multiplies, and one rounding of the result
    products = F.conv2d(x.double().abs(), w.double().abs(), padding=1) * (g / (v + 1e-5).sqrt()).abs().view(1, -1, 1, 1)
    expected, u = torch.relu(z + r.double()), oracle.ROUND_OFF[dtype]
    assert bool(((y.double() - expected).abs() <= 4 * u * products + 2 * u * (z.abs() + r.double().abs() + 1)).all())


def test_conv_bn_act_in_two_steps_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no kernel has the epilogue, conv2d's and batch_norm's serve, and explain gets the reason."""
    cpu = cnnfast.dispatch._backends["cpu"]
    kept = [i for i in cpu.implementations if i.op != "conv_bn_act"]
    fewer = cnnfast.dispatch.Backend(cpu.name, cpu.unavailable, kept, plan=cpu.plan)
    monkeypatch.setitem(cnnfast.dispatch._backends, "cpu", fewer)
    x, w = _randn(1, 5, 6, 6), _randn(7, 5, 3, 3)
    m, v = torch.zeros(7), torch.ones(7)
    with cnnfast.strict(), cnnfast.settings.observe() as events:
        y = conv_bn_act(x, w, None, m, v)
    assert_close(y, torch.relu(F.batch_norm(F.conv2d(x, w), m, v)), rtol=1e-4, atol=1e-5)
    ops = [e.op if isinstance(e, cnnfast.dispatch.Unserved) else e.selection.problem.op for e in events]
    assert ops == ["conv_bn_act", "conv2d", "batch_norm"]
    assert "conv2d and batch_norm in its place" in events[0].reason


CONSTRUCTIONS: tuple[dict[str, Any], ...] = (
    {}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"momentum": 0.3, "eps": 1e-2},
    {"affine": False, "track_running_stats": False},
)  # fmt: skip


@pytest.mark.parametrize("kwargs", CONSTRUCTIONS, ids=str)
def test_module(kwargs: dict[str, Any]) -> None:
    """Three steps of training, then evaluation: outputs, gradients, buffers are torch's."""
    ours, torchs = cnnfast.BatchNorm2d(6, **kwargs), nn.BatchNorm2d(6, **kwargs)
    assert repr(ours) == repr(torchs)
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    for step in range(4):
        if step == 3:
            ours.eval(), torchs.eval()
        x = _randn(3, 6, 5, 4) + step
        assert_close(ours(x), torchs(x), rtol=1e-5, atol=1e-5)
        assert_close(dict(ours.state_dict()), dict(torchs.state_dict()), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="expected 4D input"):
        ours(x[0])


def test_converted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.SyncBatchNorm(8))
    ours = cnnfast.convert(model)
    assert type(ours[1]) is cnnfast.BatchNorm2d
    assert type(ours[3]) is nn.SyncBatchNorm
    x = _randn(2, 3, 9, 9)
    assert_close(ours[:3](x), model[:3](x), rtol=1e-4, atol=1e-5)
    assert_close(ours[1].running_var, model[1].running_var, rtol=1e-4, atol=1e-5)
    assert type(cnnfast.revert(ours)[1]) is nn.BatchNorm2d


def test_a_subclass_with_its_own_forward() -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias) * 2

    module = cnnfast.convert(Own(4))
    with cnnfast.settings.observe() as events:
        y = module(X)
    assert [e.selection.problem.op for e in events] == ["batch_norm"]
    assert_close(y, F.batch_norm(X, torch.zeros(4), torch.ones(4)) * 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTS)
def test_conv_bn_act_module(activation: str, residual: bool) -> None:
    torch.manual_seed(0)
    layer = cnnfast.ConvBNAct(6, 16, 3, activation=activation, groups=2)
    assert list(layer.state_dict()) == [
        "conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked",
    ]  # fmt: skip
    other = copy.deepcopy(layer)

    def sequence(x: torch.Tensor, r: torch.Tensor | None) -> torch.Tensor:
        z = other.bn(F.conv2d(x, other.conv.weight, None, 1, 1, 1, 2))
        return ACTS[activation](z if r is None else z + r)

    for step in range(3):
        if step == 2:
            layer.eval(), other.eval()
        x, r = _randn(2, 6, 7, 5).requires_grad_(), _randn(2, 16, 7, 5).requires_grad_() if residual else None
        results = []
        for function, module in ((layer, layer), (sequence, other)):
            y = function(x, r)
            leaves = [x, *module.parameters(), *([r] if residual else [])]
            results.append((y, *torch.autograd.grad(y.sin().sum(), leaves)))
        assert_close(*results, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        layer.bn.weight.mul_(2)
        layer.bn.running_mean.add_(1)
        other.load_state_dict(layer.state_dict())
        assert_close(layer(x, r), sequence(x, r), rtol=1e-3, atol=1e-4)


def test_conv_bn_act_module_keeps_hooks() -> None:
    layer = cnnfast.ConvBNAct(3, 8, 3).eval()
    seen = []
    layer.bn.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    layer(_randn(1, 3, 6, 6))
    assert seen == [(1, 8, 6, 6)]


def test_autocast() -> None:
    layer = cnnfast.ConvBNAct(3, 8, 3)
    x, r = _randn(2, 3, 6, 6), _randn(2, 8, 6, 6)
    for training in (True, False):
        layer.train(training)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            assert layer(x, r.bfloat16()).dtype == BF
            assert layer(x, r).dtype == torch.float32  # as a sum of both is


def test_compiled() -> None:
    layer = cnnfast.ConvBNAct(3, 8, 3)
    x = _randn(2, 3, 6, 6)
    for training in (True, False):
        layer.train(training)
        other = copy.deepcopy(layer)
        compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
        a, b = layer(x), compiled(x)
        assert_close(a, b)
        assert_close(layer.bn.running_var, other.bn.running_var)
        ga = torch.autograd.grad(a.sin().sum(), list(layer.parameters()))
        gb = torch.autograd.grad(b.sin().sum(), list(other.parameters()))
        assert_close(ga, gb)


def test_add_act_module() -> None:
    assert torch.equal(cnnfast.AddAct()(X, X * 2), torch.relu(X * 3))
    assert repr(cnnfast.AddAct("relu6")) == "AddAct(relu6)"
    assert functional.add_act(X, X, "none").equal(X + X)


def test_torchs_kernel_where_there_is_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device without a kernel of ours torch's batch norm serves, not a composition of elementwise operators."""
    assert dispatch.served("batch_norm", "cpu")
    monkeypatch.setattr(dispatch, "served", lambda op, device: False)
    x, mean, var = torch.randn(2, 3, 4, 4), torch.zeros(3), torch.ones(3)
    theirs = [mean.clone(), var.clone()]
    with settings.observe() as events:
        out = functional.batch_norm_act(x, None, None, mean, var, None, "relu", True)
    assert [(type(e), e.reason) for e in events] == [(dispatch.Unserved, "no kernel of ours on cpu")]
    torch.testing.assert_close(out, torch.relu(torch.nn.functional.batch_norm(x, *theirs, training=True)))
    torch.testing.assert_close([mean, var], theirs)
