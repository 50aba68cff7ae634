"""cnnfast.Conv2d is torch.nn.Conv2d: construction, state, copies, hooks, parametrizations, padding, fresh weights."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from support import process
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing import assert_close

import cnnfast

pytestmark = pytest.mark.skipif(
    process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it"
)

ARGUMENTS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((4, 6, 3), {}),
    ((4, 6, (3, 2)), {"stride": (2, 1), "padding": (1, 0), "bias": False}),
    ((4, 8, 3), {"groups": 4, "dilation": 2, "padding": 2}),
    ((4, 6, 4), {"padding": "same"}),
    ((4, 6, (2, 3)), {"padding": "same", "dilation": (3, 1)}),
    ((4, 6, 3), {"padding": "valid"}),
    ((4, 6, 3), {"padding": 2, "padding_mode": "reflect"}),
    ((4, 6, 3), {"padding": (2, 1), "padding_mode": "replicate"}),
    ((4, 6, 3), {"padding": (0, 2), "padding_mode": "circular", "stride": 2}),
    ((4, 6, 4), {"padding": "same", "padding_mode": "circular"}),
    ((4, 6, (2, 5)), {"padding": "same", "padding_mode": "reflect", "groups": 2}),
    ((4, 6, 3), {"dtype": torch.float64}),
]


def _pair(args: tuple[Any, ...] = (4, 6, 3), **kwargs: Any) -> tuple[nn.Conv2d, nn.Conv2d]:
    torch.manual_seed(0)
    ours = cnnfast.Conv2d(*args, **kwargs)
    torch.manual_seed(0)
    return ours, nn.Conv2d(*args, **kwargs)


def _x(module: nn.Conv2d, n: int = 2, size: int = 9) -> torch.Tensor:
    return torch.randn(n, module.in_channels, size, size - 1, dtype=module.weight.dtype)


@pytest.mark.parametrize(("args", "kwargs"), ARGUMENTS, ids=str)
def test_same_module(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Same initial values from the same seed, same repr, same results and gradients, batched or not."""
    ours, theirs = _pair(args, **kwargs)
    assert isinstance(ours, nn.Conv2d)
    assert repr(ours) == repr(theirs)
    for (a, p), (b, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert a == b
        assert torch.equal(p, q)
    for x in (_x(theirs), _x(theirs)[0], _x(theirs).to(memory_format=torch.channels_last)):
        results = []
        for module in (ours, theirs):
            module.zero_grad()
            a = x.clone().requires_grad_()
            out = module(a)
            out.square().sum().backward()
            results.append([out.detach(), a.grad, *[p.grad.clone() for p in module.parameters()]])  # type: ignore[union-attr]
        assert_close(*results, rtol=1e-4, atol=1e-4)


def test_signature_is_torchs() -> None:
    assert inspect.signature(cnnfast.Conv2d.__init__) == inspect.signature(nn.Conv2d.__init__)
    assert (
        inspect.signature(cnnfast.Conv2d.forward).parameters.keys()
        == inspect.signature(nn.Conv2d.forward).parameters.keys()
    )
    ours = inspect.signature(cnnfast.functional.conv2d).parameters
    assert list(ours) == ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
    assert [p.default for p in ours.values()][2:] == [None, 1, 0, 1, 1]


@pytest.mark.parametrize(
    "kwargs",
    [{"groups": 3}, {"padding": "full"}, {"padding_mode": "wrap"}, {"padding": "same", "stride": 2}],
    ids=str,
)
def test_rejects_what_torch_rejects(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        nn.Conv2d(4, 6, 3, **kwargs)
    with pytest.raises(ValueError):  # noqa: PT011
        cnnfast.Conv2d(4, 6, 3, **kwargs)


# ---- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_state_dict_both_ways(last: bool) -> None:
    """Strictly, in both directions, through a file, in either memory format of the parameters."""
    torch.manual_seed(1)
    ours, theirs = cnnfast.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3)
    if last:
        ours = ours.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = _x(theirs)
    for source, target in ((ours, theirs), (theirs, ours)):
        with torch.no_grad():
            source.weight.add_(1)
        buffer = io.BytesIO()
        torch.save(source.state_dict(), buffer)
        buffer.seek(0)
        assert list(source.state_dict()) == list(target.state_dict())
        assert target.load_state_dict(torch.load(buffer, weights_only=True), strict=True) == ([], [])
        assert_close(target(x), source(x))
    assert target.load_state_dict(source.state_dict(), strict=True, assign=True) == ([], [])
    assert_close(target(x), source(x))


def test_copies() -> None:
    """deepcopy, pickle and torch.save of the whole module keep class, values, mode and independence."""
    module = nn.Sequential(cnnfast.Conv2d(4, 6, 3, padding="same"), nn.ReLU()).eval()
    module[0].weight.requires_grad_(False)
    x = torch.randn(2, 4, 6, 6)
    module(x)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)):
        assert type(other[0]) is cnnfast.Conv2d
        assert not other.training
        assert not other[0].weight.requires_grad
        assert_close(other(x), module(x), rtol=0, atol=0)
        with torch.no_grad():
            other[0].weight.zero_()
        assert float(module[0].weight.abs().sum()) > 0
    shallow = copy.copy(module[0])
    assert shallow.weight is module[0].weight


def test_moves_and_casts() -> None:
    ours, theirs = _pair()
    x = _x(theirs)
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float32):
        a, b = copy.deepcopy(ours).to(dtype), copy.deepcopy(theirs).to(dtype)
        out, expected = a(x.to(dtype)), b(x.to(dtype))
        assert out.dtype == dtype
        assert_close(
            out, expected, rtol=0.02 if dtype.itemsize == 2 else 1e-4, atol=0.02 if dtype.itemsize == 2 else 1e-5
        )
    assert ours.to("meta")(x.to("meta")).shape == theirs(x).shape
    empty = cnnfast.Conv2d(4, 6, 3, device="meta").to_empty(device="cpu")
    empty.load_state_dict(theirs.state_dict())
    assert_close(empty(x), theirs(x))


def test_hooks() -> None:
    """Forward, pre-forward and backward hooks, of the module and of parameters, fire as torch's do, in its order."""
    logs = []
    for module in _pair():
        log: list[Any] = []
        module.register_forward_pre_hook(lambda m, args, log=log: log.append("pre"))
        module.register_forward_hook(lambda m, args, out, log=log: log.append(("forward", tuple(out.shape))))
        module.register_full_backward_hook(
            lambda m, gi, go, log=log: log.append(("backward", len(gi), gi[0].shape, go[0].shape))
        )
        module.register_full_backward_pre_hook(lambda m, go, log=log: log.append("backward_pre"))
        module.weight.register_hook(lambda g, log=log: log.append(("weight", g.shape)))
        module.weight.register_post_accumulate_grad_hook(lambda p, log=log: log.append(("accumulated", p.shape)))
        module(_x(module).requires_grad_()).sum().backward()
        logs.append(log)
    assert sorted(map(str, logs[0])) == sorted(map(str, logs[1]))
    assert [e for e in logs[0] if e in ("pre", "backward_pre")] == ["pre", "backward_pre"]
    replaced = cnnfast.Conv2d(4, 6, 3)
    replaced.register_forward_hook(lambda m, args, out: out * 0)
    assert float(replaced(_x(replaced)).abs().sum()) == 0


# ---- what computes the weight anew -----------------------------------------------------------------------------------

WEIGHTS: dict[str, Any] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "pruning": lambda m: prune.l1_unstructured(m, "weight", amount=0.5),
    "pruned filters": lambda m: prune.ln_structured(m, "weight", amount=0.5, n=2, dim=0),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_parametrized_weights(name: str) -> None:
    """Three training steps through a parametrization: results and parameters stay torch's."""
    runs = []
    for module in _pair(padding=1):
        torch.manual_seed(5)
        WEIGHTS[name](module)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        torch.manual_seed(6)
        outs = []
        for _ in range(3):
            optimizer.zero_grad()
            out = module(torch.randn(2, 4, 6, 6))
            out.square().mean().backward()
            optimizer.step()
            outs.append(out.detach())
        module.eval()
        outs.append(module(torch.ones(1, 4, 6, 6)).detach())
        runs.append((outs, [p.detach() for p in module.parameters()]))
    assert_close(*runs, rtol=1e-4, atol=1e-5)


def test_parametrization_by_hand() -> None:
    class Standardize(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)

    results = []
    for module in _pair():
        parametrize.register_parametrization(module, "weight", Standardize())
        x = torch.ones(1, 4, 5, 5) * torch.arange(5)
        with parametrize.cached():
            a = module(x) + module(x)
        a.sum().backward()
        results.append((a.detach(), module.parametrizations.weight.original.grad))
    assert_close(*results, rtol=1e-4, atol=1e-4)


# ---- never stale -----------------------------------------------------------------------------------------------------


def _set_(module: nn.Conv2d, new: torch.Tensor) -> None:
    with torch.no_grad():
        module.weight.set_(new.clone())


CHANGES: dict[str, Any] = {
    "in place": lambda m, new: m.weight.detach().copy_(new),
    ".data in place": lambda m, new: m.weight.data.copy_(new),
    ".data assigned": lambda m, new: setattr(m.weight, "data", new.clone()),
    ".data assigned, channels_last": lambda m, new: setattr(
        m.weight, "data", new.to(memory_format=torch.channels_last)
    ),
    "another Parameter": lambda m, new: setattr(m, "weight", nn.Parameter(new.clone())),
    "load_state_dict": lambda m, new: m.load_state_dict({"weight": new, "bias": m.bias}),
    "load_state_dict assigning": lambda m, new: m.load_state_dict({"weight": new, "bias": m.bias}, assign=True),
    "set_": _set_,
    "through numpy": lambda m, new: m.weight.detach().numpy().__setitem__(..., new.numpy()),
    "swap_tensors": lambda m, new: torch.utils.swap_tensors(m.weight, nn.Parameter(new.clone())),
    "an element": lambda m, new: [
        m.weight.data.view(-1).__setitem__(i, new.reshape(-1)[i]) for i in range(new.numel())
    ],
}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", CHANGES)
def test_changed_weights_are_seen(name: str, train: bool) -> None:
    """However a weight was changed, the next call computes with it; also under no_grad, autocast and inference mode."""
    module = cnnfast.Conv2d(4, 6, 3).train(train)
    x = torch.randn(2, 4, 6, 6)
    for number in range(3):
        module(x)
        with torch.no_grad():
            module(x)
        new = torch.full((6, 4, 3, 3), float(number + 1)) + torch.randn(6, 4, 3, 3)
        CHANGES[name](module, new)
        expected = torch.conv2d(x, new, module.bias)
        assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
        with torch.inference_mode():
            assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            assert_close(module(x).float(), expected, rtol=0.05, atol=0.5)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW], ids=lambda o: o.__name__)
@pytest.mark.parametrize("foreach", [False, True])
def test_training_is_torchs(optimizer: Any, foreach: bool) -> None:
    """Five optimizer steps from the same seed leave the same parameters."""
    ends = []
    for conv in (cnnfast.Conv2d, nn.Conv2d):
        torch.manual_seed(0)
        net = nn.Sequential(
            conv(3, 8, 3, padding=1), nn.ReLU(), conv(8, 8, 3, stride=2, groups=2), nn.Flatten(), nn.Linear(72, 5)
        )
        steps = optimizer(net.parameters(), lr=0.01, foreach=foreach)
        for _ in range(5):
            steps.zero_grad()
            torch.nn.functional.cross_entropy(net(torch.randn(4, 3, 8, 8)), torch.tensor([0, 1, 2, 3])).backward()
            steps.step()
        ends.append([p.detach() for p in net.parameters()])
    assert_close(*ends, rtol=1e-3, atol=1e-4)


def test_gradients_keep_the_weights_layout() -> None:
    """Contiguous and channels_last parameters get gradients of their own strides, without a copy by autograd."""
    for format in (torch.contiguous_format, torch.channels_last):
        for x_format in (torch.contiguous_format, torch.channels_last):
            module = cnnfast.Conv2d(4, 6, 3).to(memory_format=format)  # type: ignore[call-overload]
            seen: list[tuple[int, ...]] = []
            module.weight.register_hook(lambda g, seen=seen: seen.append(g.stride()))
            module(torch.randn(2, 4, 6, 6).contiguous(memory_format=x_format)).sum().backward()
            assert seen == [module.weight.stride()]
            assert module.weight.grad is not None
            assert module.weight.grad.stride() == module.weight.stride()


def test_subclass_with_its_own_conv_forward() -> None:
    """A subclass may change the weight on its way, as weight standardisation does, through torch's own hook."""

    class Scaled(cnnfast.Conv2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self._conv_forward(input, self.weight * 2, self.bias)

    module = Scaled(4, 6, 3, padding=1, padding_mode="reflect")
    x = torch.randn(1, 4, 5, 5)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
    assert_close(module(x), torch.conv2d(padded, module.weight * 2, module.bias), rtol=1e-4, atol=1e-5)
