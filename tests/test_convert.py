"""convert and revert: any model, nothing changed but where its convolutions run."""

import copy
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import cnnfast
from cnnfast import settings
from cnnfast.convert import MODULES, PAIRS, conversion_report, convert, revert
from cnnfast.dispatch import Event


class Plain(nn.Conv2d):
    """Overrides only its constructor."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1)
        self.note = "kept"


class Same(nn.Conv2d):
    """Its own forward, which calls F.conv2d."""

    def forward(self, x):
        x = F.pad(x, (0, 1, 0, 1))
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Standardised(nn.Conv2d):
    """Its own forward, which ends in torch's _conv_forward."""

    def forward(self, x):
        w = self.weight
        return self._conv_forward(x, (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True), self.bias)


class Super(Same):
    """Calls up through two levels, one of which calls F.conv2d."""

    def forward(self, x):
        return super().forward(x) * 2


class Slotted(nn.Conv2d):
    __slots__ = ("extra",)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.plain = Plain(8)
        self.same = Same(8, 8, 2)
        self.standardised = Standardised(8, 8, 3, padding="same")
        self.up = Super(8, 8, 2)
        self.circular = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.shared = nn.Conv2d(8, 8, 1)
        self.again = self.shared
        self.tied = nn.Conv2d(8, 8, 1)
        self.tied.weight = self.shared.weight
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = self.pool(torch.relu(self.bn(self.stem(x))))
        for layer in (self.plain, self.same, self.standardised, self.up, self.circular, self.shared, self.tied):
            x = torch.tanh(layer(x))
        return self.drop(self.again(x))


def net():
    torch.manual_seed(0)
    return Net()


X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def classes(model):
    return [type(m) for m in model.modules()]


def convolutions(function, *args):
    """How many convolutions cnnfast served within a call."""
    with settings.observe() as events:
        function(*args)
    return sum(isinstance(e, Event) and e.selection.problem.op == "conv2d" for e in events)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_outputs_names_and_state_stay():
    model = net().eval()
    converted = convert(model)
    assert converted is not model
    assert classes(model) == classes(net())
    with torch.no_grad():
        close(converted(X), model(X))
    assert list(converted.state_dict()) == list(model.state_dict())
    assert repr(converted) == repr(model)
    assert convolutions(converted, X) == 9
    assert converted.plain.note == "kept"
    assert converted.again is converted.shared
    assert converted.tied.weight is converted.shared.weight
    assert isinstance(converted.same, cnnfast.Conv2d)
    assert isinstance(converted.same, Same)
    converted.load_state_dict(model.state_dict())
    model.load_state_dict(converted.state_dict())


def test_functions_named_like_their_modules():
    import cnnfast.convert
    import cnnfast.explain

    assert callable(cnnfast.convert)
    assert callable(cnnfast.explain)


def test_every_pair_is_served():
    assert torch.nn.Conv2d in MODULES
    for module, function in PAIRS:
        assert hasattr(cnnfast.nn, module) == hasattr(cnnfast.functional, function), module


@pytest.mark.parametrize("name", ["plain", "same", "standardised", "up"])
def test_subclasses(name):
    layer = getattr(net(), name)
    converted = convert(layer)
    x = torch.randn(2, 8, 6, 6)
    close(converted(x), layer(x))
    assert convolutions(converted, x) == 1
    assert type(converted).__name__ == type(layer).__name__
    assert type(converted) is type(convert(getattr(net(), name)))  # one class for each, not one a module
    assert type(revert(converted)) is type(layer)


def test_idempotent_and_back():
    model = net()
    converted = convert(model)
    assert classes(convert(converted)) == classes(converted)
    assert classes(convert(converted, inplace=True)) == classes(converted)
    assert classes(revert(converted)) == classes(model)
    for travelled in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted)), copy.copy(converted)):
        assert classes(travelled) == classes(converted)
        assert classes(revert(travelled)) == classes(model)
    untouched = net()
    assert revert(untouched, inplace=True) is untouched
    assert classes(untouched) == classes(model)


def test_pickle_keeps_everything():
    converted = convert(net().eval())
    converted.same.weight.requires_grad_(False)
    converted.same.eval()
    loaded = pickle.loads(pickle.dumps(converted))
    assert not loaded.same.weight.requires_grad
    assert loaded.tied.weight is loaded.shared.weight
    assert not loaded.same.training
    with torch.no_grad():
        assert torch.equal(loaded(X), converted(X))
    file = io.BytesIO()
    torch.save(converted, file)
    file.seek(0)
    assert classes(torch.load(file, weights_only=False)) == classes(converted)


def test_inplace_keeps_parameters_hooks_flags_and_optimizer():
    model, twin = net(), net()
    calls = []
    model.same.register_forward_hook(lambda *_: calls.append("hook"))
    model.stem.weight.requires_grad_(False)
    twin.stem.weight.requires_grad_(False)
    model.bn.eval()
    twin.bn.eval()
    for m in (model, twin):
        m.drop.p = 0.0  # torch draws its mask in memory order: another layout, another mask
    parameters = list(model.parameters())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, twin)]
    for step in range(3):
        if step == 1:  # with a momentum buffer and a gradient already there
            assert convert(model, inplace=True) is model
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            torch.manual_seed(step)
            m(X).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=step == 1)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)
    assert calls == ["hook"] * 3
    assert not model.stem.weight.requires_grad
    assert not model.bn.training
    assert model.drop.training


def test_gradients_have_the_parameters_strides():
    model = convert(net())
    model(X).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad.stride() == p.stride(), name


def test_weights_are_read_at_every_call():
    model = convert(net().eval())
    with torch.no_grad():
        before = model(X)
        model.same.weight.data.mul_(2)
        assert not torch.equal(model(X), before)
        model.load_state_dict(net().state_dict())
        assert torch.equal(model(X), before)


def test_memory_format():
    model = net()
    converted = convert(model)
    assert converted.stem.weight.stride() == (27, 1, 9, 3)
    assert converted.shared.weight.stride() == (8, 1, 8, 8)
    assert model.stem.weight.is_contiguous()
    kept = convert(model, memory_format=None)
    assert kept.stem.weight.is_contiguous()
    a, b = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
    b.weight = nn.Parameter(a.weight.data)  # two parameters in one storage: laying out one would part them
    both = convert(nn.Sequential(a, b), inplace=True)
    assert both[0].weight.data_ptr() == both[1].weight.data_ptr()
    flat = nn.Parameter(torch.zeros(2, 8, 8, 3, 3)[1])  # a view into something larger
    a.weight = flat
    convert(a, inplace=True)
    assert a.weight.storage_offset() == 576


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        (lambda name, module: name == "stem", {"stem"}),
        (Same, {"same", "up"}),
        ((Plain, Standardised), {"plain", "standardised"}),
        (["st*", "again"], {"stem", "standardised", "shared"}),
        ("same", {"same"}),
    ],
)
def test_include(include, expected):
    converted = convert(net(), include=include)
    assert {r.name for r in conversion_report(converted).converted} == expected


def test_errors():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        convert(lambda x: x)
    with pytest.raises(TypeError, match="include"):
        convert(net(), include=3)
    with pytest.raises(ValueError, match="no module"):
        convert(net(), include=["layer9.*"])
    model = net()
    model.cached = model.stem(X)  # no leaf: can't be copied
    with pytest.raises(RuntimeError, match="inplace=True"):
        convert(model)
    convert(model, inplace=True)


def test_report():
    model = net()
    model.other = nn.Conv3d(1, 1, 1)
    before = conversion_report(model)
    assert not before.converted
    assert "not included" in before.left[0].reason
    report = conversion_report(convert(model))
    assert {r.name: r.action for r in report if r.name in ("stem", "same", "plain")} == {
        "stem": "converted", "same": "redirected", "plain": "converted",
    }  # fmt: skip
    assert report.left[-1].name == "other"
    text = str(report)
    assert all(word in text for word in ("stem", "Same", "redirected", "also again", "no kernels"))


def test_parametrized():
    for parametrization in (parametrizations.spectral_norm, parametrizations.weight_norm):
        for layer in (nn.Conv2d(4, 4, 3), Same(4, 4, 3)):
            model = parametrization(layer).eval()
            x = torch.randn(1, 4, 5, 5)
            converted = convert(model)
            close(converted(x), model(x))
            assert convolutions(converted, x) == 1
            assert parametrize.is_parametrized(converted, "weight")
            assert classes(convert(converted)) == classes(converted)
            back = revert(converted)
            assert type(back).__mro__[1:] == type(model).__mro__[1:]
            close(back(x), model(x))
            parametrize.remove_parametrizations(converted, "weight")
            close(converted(x), model(x))
            assert type(revert(converted)) is type(layer).__mro__[1]
    late = parametrizations.weight_norm(convert(nn.Conv2d(4, 4, 3)))
    assert type(revert(late)).__mro__[1] is nn.Conv2d


def test_old_weight_norm_and_hooks():
    with pytest.warns(FutureWarning):
        model = nn.utils.weight_norm(nn.Conv2d(4, 4, 3))
    x = torch.randn(1, 4, 5, 5)
    expected = model(x)
    close(convert(model, inplace=True)(x), expected)


def test_lazy():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU())
    converted = convert(model)
    assert converted(X).shape == (2, 4, 10, 10)
    assert type(converted[0]) is cnnfast.Conv2d
    assert type(revert(converted)[0]) is nn.Conv2d
    assert type(revert(convert(model))[0]) is nn.LazyConv2d


def test_replaced_on_the_module():
    layer = nn.Conv2d(8, 8, 3)
    layer._conv_forward = lambda x, w, b: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), w, b)
    x = torch.randn(1, 8, 6, 6)
    converted = convert(layer, inplace=True)
    assert convolutions(converted, x) == 1
    assert converted(x).shape == x.shape
    assert type(revert(converted, inplace=True)) is nn.Conv2d
    layer = nn.Conv2d(8, 8, 3)
    layer.forward = lambda x: x + 1
    assert torch.equal(convert(layer, inplace=True)(x), x + 1)
    assert "replaced on this module" in conversion_report(layer)[0].reason


def test_what_is_left():
    scripted = nn.Sequential(torch.jit.trace(nn.Conv2d(3, 3, 1), X), nn.Conv2d(3, 3, 1))
    report = conversion_report(convert(scripted))
    assert [r.action for r in report] == ["left", "converted"]
    assert "TorchScript" in report[0].reason
    prepared = nn.Conv2d(3, 3, 1)
    prepared.qconfig = object()
    assert type(convert(prepared)) is nn.Conv2d
    assert "quantisation" in conversion_report(prepared)[0].reason

    class Sealed(nn.Conv2d):
        def __init_subclass__(cls):
            raise TypeError("sealed")

    sealed = Sealed(3, 3, 1)
    assert type(convert(sealed)) is Sealed
    assert "sealed" in conversion_report(sealed)[0].reason


def test_slots():
    layer = Slotted(3, 3, 1)
    layer.extra = 5
    converted = convert(layer, inplace=True)
    assert converted.extra == 5
    assert isinstance(converted, cnnfast.Conv2d)
    assert type(revert(converted, inplace=True)) is Slotted


def test_graph_modules():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x):
            return F.conv2d(self.conv(x), self.conv.weight)

    graph = torch.fx.symbolic_trace(Functional())
    converted = convert(graph)
    close(converted(X), graph(X))
    report = conversion_report(converted)
    assert [(r.name, r.ours) for r in report] == [("conv2d", False), ("conv", True)]
    traced = torch.fx.symbolic_trace(convert(net().eval()))
    close(traced(X), net().eval()(X))
    assert convolutions(traced, X) == 9


def test_classes_are_collected():
    class Local(Same):
        pass

    reference = weakref.ref(Local)
    convert(Local(3, 3, 1))
    del Local
    import gc

    gc.collect()
    assert reference() is None


def test_compile_and_export():
    model = net().eval()
    converted = convert(model)
    expected = model(X)
    with torch.no_grad():
        compiled = torch.compile(converted, backend="aot_eager", fullgraph=True)
        close(compiled(X), expected)
        program = torch.export.export(converted, (X,))
    assert sum("cnnfast.conv2d" in str(n.target) for n in program.graph.nodes) == 9
    close(program.module()(X), expected)


def test_converting_a_compiled_model():
    model = net().eval()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        expected = compiled(X)
        converted = convert(compiled)
        assert type(converted) is type(compiled)
        assert type(converted._orig_mod.stem) is cnnfast.Conv2d
        close(converted(X), expected)
        convert(compiled, inplace=True)  # recompiles: the class is guarded
        close(compiled(X), expected)
        close(revert(compiled, inplace=True)(X), expected)


def test_distributed(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Conv2d(3, 4, 3), Same(4, 4, 3)))
        expected = wrapped(X)
        with pytest.raises(ValueError, match="in place"):
            convert(wrapped)
        convert(wrapped, inplace=True)
        close(wrapped(X), expected)
        assert wrapped.module[0].weight.is_contiguous()
        wrapped(X).sum().backward()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_and_autocast(dtype):
    model = net().eval().to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(convert(model)(X.to(dtype)), model(X.to(dtype)), rtol=0.05, atol=0.05)
    model = net().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out, expected = convert(model)(X), model(X)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)


def test_meta():
    with torch.device("meta"):
        model = Net()
    assert convert(model)(X.to("meta")).shape == (2, 8, 6, 6)


NETWORKS = {
    "resnet18": {}, "googlenet": {"init_weights": False, "aux_logits": True}, "resnext50_32x4d": {}, "mobilenet_v2": {},
}  # fmt: skip


@pytest.mark.parametrize("name", [*NETWORKS, "efficientnet_lite0"])
def test_networks(name):
    torch.manual_seed(0)
    if name in NETWORKS:
        models = pytest.importorskip("torchvision").models
        model = models.get_model(name, weights=None, **NETWORKS[name])
    else:
        package = pytest.importorskip("efficientnet_lite_pytorch")
        model = package.EfficientNet.from_name("efficientnet-lite0")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model.train()(x)  # statistics that keep activations in range
        model.eval()
        expected = model(x)
        converted = convert(model)
        out = converted(x)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert list(converted.state_dict()) == list(model.state_dict())
    assert [n for n, _ in converted.named_modules()] == [n for n, _ in model.named_modules()]
    assert not [r for r in conversion_report(converted).left if "Conv2d" in r.cls]
    assert classes(revert(converted)) == classes(model)


@pytest.mark.parametrize("name", ["max_pool2d", "adaptive_max_pool2d"])
def test_redirected_poolings_with_indices(name):
    """torch calls another function where return_indices is set: it is ours, too."""

    class Pooling(getattr(torch.nn, {"max_pool2d": "MaxPool2d", "adaptive_max_pool2d": "AdaptiveMaxPool2d"}[name])):
        def forward(self, x):
            return getattr(torch.nn.functional, name)(x, 2, return_indices=True)

    theirs = Pooling(2)
    ours = convert(theirs)
    x = torch.randn(1, 3, 6, 6)
    with settings.observe() as events:
        results = ours(x)
    assert [type(e).__name__ for e in events] == ["Event"]
    for a, b in zip(results, theirs(x), strict=True):
        torch.testing.assert_close(a, b)
