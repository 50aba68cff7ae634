"""``cnnfast.models``: torchvision's networks in names, values, initialisation and arguments; fused."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import process
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import cnnfast
from cnnfast import models, settings
from cnnfast.models import _registry
from cnnfast.models.googlenet import Inception, InceptionAux

pytestmark = pytest.mark.skipif(
    process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it"
)
torchvision = pytest.importorskip("torchvision")

OURS_ALONE = ("inception_v2", "zfnet")
SHARED = [name for name in models.list() if name not in OURS_ALONE]
INIT = {name: {"init_weights": True} for name in ("googlenet", "inception_v3")}  # torchvision warns without it
SIZES = {"alexnet": 63, "inception_v3": 75, "zfnet": 47}


def theirs(name: str, **options: Any) -> Any:
    return torchvision.models.get_model(name, **{**INIT.get(name, {}), **options})


def on_meta(build: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        return build()


def shapes(model: torch.nn.Module) -> dict[str, tuple[Any, ...]]:
    return {k: (tuple(v.shape), v.dtype) for k, v in model.state_dict().items()}


def values(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A state dict that keeps activations in range, quickly, and leaves no parameter at a value that others have."""
    torch.manual_seed(1)
    noise = torch.randn(1_000_003)
    state = {}
    for i, (key, like) in enumerate(model.state_dict().items()):
        n = like.numel()
        t = noise.roll(i * 7919).repeat(-(-n // len(noise)))[:n].view(like.shape)
        if like.dim() > 1:
            t = t * math.sqrt(2 / like[0].numel())
        elif key.endswith(("running_var", "weight")):
            t = 1 + 0.2 * t.tanh()
        elif not like.is_floating_point():
            t = torch.full_like(t, 3)
        else:
            t = 0.1 * t
        state[key] = t.to(dtype if like.is_floating_point() else like.dtype)
    return state


def pair(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    """Our network and torchvision's over one set of values, each loaded into the other's names, strictly."""
    a, b = (on_meta(lambda build=build: build(name, **options)) for build in (models.create, theirs))
    a.load_state_dict(values(b, dtype), strict=True, assign=True)
    b.load_state_dict(copy.deepcopy(a.state_dict()), strict=True, assign=True)
    return a, b


def images(size: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2)).to(dtype)


# ---- beside torchvision ----------------------------------------------------------------------------------------------


def test_list() -> None:
    assert models.list() == [
        "alexnet", "googlenet", "inception_v2", "inception_v3", "resnet18", "resnet34", "resnet50", "resnet101",
        "resnet152", "resnext50_32x4d", "resnext101_32x8d", "vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn",
        "vgg19", "vgg19_bn", "wide_resnet50_2", "wide_resnet101_2", "zfnet",
    ]  # fmt: skip
    for name in models.list():
        assert getattr(models, name).__name__ == name
        assert list(inspect.signature(getattr(models, name)).parameters) == ["weights", "progress", "options"]
    assert "list" not in models.__all__


@pytest.mark.parametrize("name", SHARED)
def test_names_and_shapes(name: str) -> None:
    """Names, their order, shapes and dtypes of parameters and buffers; and what is convolution or norm is ours."""
    ours = on_meta(lambda: models.create(name))
    assert list(shapes(ours).items()) == list(shapes(on_meta(lambda: theirs(name))).items())
    for module in ours.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.MaxPool2d, torch.nn.AvgPool2d)):
            assert type(module).__module__.startswith("cnnfast."), module


# One of each kind, and others in turn: what they have more of the same, names and shapes say (above).
KINDS = ("alexnet", "vgg11", "vgg11_bn", "googlenet", "inception_v3", "resnet18", "resnet50", "resnext50_32x4d")
OTHERS = sorted(set(SHARED) - set(KINDS), key=lambda name: process.stable_hash("logits", name))


@pytest.mark.parametrize(
    "name", [*KINDS, *OTHERS[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS[2:])]
)
def test_logits(name: str) -> None:
    """In evaluation, through the fused operations, fp32; loaded strictly both ways. NCHW and channels_last."""
    ours, torchvisions = pair(name)
    x = images(SIZES.get(name, 64), 1)
    with torch.no_grad():
        expected = torchvisions.eval()(x)
        for layout in (torch.contiguous_format, torch.channels_last):
            y = ours.eval()(x.contiguous(memory_format=layout))
            assert float((y - expected).abs().max() / expected.abs().max()) < 2e-5


TRAINED = {
    "resnet18": (64, {"num_classes": 5, "zero_init_residual": True}),
    "resnext50_32x4d": (32, {"num_classes": 5, "replace_stride_with_dilation": (False, True, False)}),
    "googlenet": (64, {"num_classes": 5}),
    "inception_v3": (75, {"num_classes": 5, "transform_input": True, "aux_logits": False}),
}


@pytest.mark.parametrize("name", TRAINED)
def test_training(name: str) -> None:
    """Outputs, every gradient and the running statistics of a training step, with dropout, in fp64."""
    size, options = TRAINED[name]
    ours, torchvisions = pair(name, torch.float64, **options)
    x = images(size, dtype=torch.float64)
    results = []
    for model in (ours, torchvisions):
        torch.manual_seed(3)
        out = model(x)
        outs = list(out) if isinstance(out, tuple) else [out]
        sum(y.sin().sum() for y in outs).backward()
        grads = {k: p.grad for k, p in model.named_parameters()}
        results.append((outs, grads, dict(model.named_buffers())))
    (a, ga, ba), (b, gb, bb) = results
    assert_close(a, b, rtol=1e-9, atol=1e-9)
    scale = max(float(g.abs().max()) for g in gb.values())
    assert_close(ga, gb, rtol=1e-5, atol=1e-8 * scale)  # of few values, batch norm is badly conditioned
    assert_close(ba, bb, rtol=1e-9, atol=1e-9)


def test_vgg_with_batch_norm_trains() -> None:
    """Its convolutions alone: the classifier is 120 million parameters of torch's own."""
    ours = models.vgg.features((1, 1, 1, 1, 1), batch_norm=True).double()
    other = cnnfast.revert(ours)
    assert not any(type(m).__module__.startswith("cnnfast.nn") for m in other.modules())
    x = images(32, dtype=torch.float64)
    grads = []
    for model in (ours, other):
        model(x).sin().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert_close(*grads, rtol=1e-7, atol=1e-10)


# ---- initialisation --------------------------------------------------------------------------------------------------


SEEDED = ("alexnet", "googlenet", "inception_v3", "resnet18", "resnext50_32x4d", "vgg11_bn")  # one of each kind: quick


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(v, w) for v, w in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "name", [name if name in SEEDED else pytest.param(name, marks=pytest.mark.slow) for name in SHARED]
)
def test_one_seed_initialises_as_torchvision(name: str) -> None:
    """From one seed the same values, bit by bit: then their distributions are the same, too."""
    made = []
    for build in (models.create, theirs):
        torch.manual_seed(5)
        made.append(build(name))
    assert same(*made)


def test_initialisation_options() -> None:
    for options in ({"init_weights": False}, {"init_weights": True}):
        made = []
        for build in (models.create, torchvision.models.get_model):
            torch.manual_seed(5)
            made.append(build("googlenet", **options))
        assert same(*made)
    for name, norm in (("resnet18", "bn2"), ("resnet50", "bn3")):
        assert not on_cpu_norms(models.create(name, zero_init_residual=True), norm).any()
        assert (on_cpu_norms(models.create(name), norm) == 1).all()


def on_cpu_norms(model: Any, norm: str) -> torch.Tensor:
    return torch.cat(
        [m.weight.detach() for n, m in model.named_modules() if n.startswith("layer") and n.endswith(norm)]
    )


@pytest.mark.parametrize("name", OURS_ALONE)
def test_initialisation_of_ours(name: str) -> None:
    """Mean 0 and the deviation that the formula says, over all weights of a layer."""
    model = models.create(name, **({"filters": (16, 16, 16)} if name == "zfnet" else {}))
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            std = 0.01 if name == "inception_v2" else 1 / math.sqrt(3 * module.weight[0].numel())
            w = module.weight.detach()
            assert abs(float(w.std()) / std - 1) < 6 / math.sqrt(w.numel())
            assert abs(float(w.mean())) < 6 * std / math.sqrt(w.numel())


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_googlenet_heads() -> None:
    model = models.googlenet(num_classes=4, init_weights=False)
    out = model(images(64))
    assert type(out).__name__ == "GoogLeNetOutputs"
    assert out._fields == torchvision.models.GoogLeNetOutputs._fields
    assert [tuple(t.shape) for t in out] == [(2, 4)] * 3
    assert model.eval()(images(64)).shape == (2, 4)
    without = models.googlenet(num_classes=4, aux_logits=False, init_weights=False)
    assert without.aux1 is None
    assert without(images(32)).shape == (2, 4)
    assert [m.p for m in models.googlenet(dropout=0.1, dropout_aux=0.3).modules() if hasattr(m, "p")] == [0.3, 0.3, 0.1]


def test_inception_heads() -> None:
    """Its head needs images of 299: the shapes without values, and the head alone with them."""
    model = on_meta(lambda: models.inception_v3(num_classes=4))
    out = model(torch.empty(2, 3, 299, 299, device="meta"))
    assert type(out).__name__ == "InceptionOutputs"
    assert out._fields == torchvision.models.InceptionOutputs._fields
    assert [tuple(t.shape) for t in out] == [(2, 4)] * 2
    assert model.eval()(torch.empty(2, 3, 75, 75, device="meta")).shape == (2, 4)
    ours, torchvisions = pair("inception_v3", num_classes=4)
    x = torch.randn(2, 768, 17, 17)
    assert_close(ours.AuxLogits(x), torchvisions.AuxLogits(x), rtol=1e-4, atol=1e-4)


def test_blocks() -> None:
    """Convolutions of the caller's make other networks, as with torchvision."""

    class Plain(torch.nn.Sequential):
        def __init__(self, channels: int, filters: int, **options: Any) -> None:
            super().__init__(torch.nn.Conv2d(channels, filters, **options), torch.nn.Tanh())

    def inception(*args: int) -> Any:
        return Inception(*args, conv_block=Plain)

    model = models.googlenet(num_classes=3, init_weights=False, blocks=[Plain, inception, InceptionAux])
    assert not any(k.startswith("inception") and "bn" in k for k in model.state_dict())
    assert model.eval()(images(32)).shape == (2, 3)
    for build, word in ((models.googlenet, "3 blocks"), (models.inception_v3, "7 blocks")):
        option = "blocks" if build is models.googlenet else "inception_blocks"
        with pytest.raises(ValueError, match=word):
            build(**{option: [Plain]})


def test_norm_layers() -> None:
    """A norm of another kind is called as it is: GroupNorm, torch's own batch norm."""

    def group(channels: int) -> torch.nn.Module:
        return torch.nn.GroupNorm(8, channels)

    for norm in (group, torch.nn.BatchNorm2d):
        torch.manual_seed(0)
        ours = models.resnet18(norm_layer=norm, num_classes=3)
        torch.manual_seed(0)
        other = torchvision.models.resnet18(norm_layer=norm, num_classes=3)
        assert same(ours, other)
        for training in (True, False):
            assert_close(ours.train(training)(images(64)), other.train(training)(images(64)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dilate", [(False, False, True), (False, True, True), (True, True, True)])
def test_dilation(dilate: tuple[bool, ...]) -> None:
    options = {"replace_stride_with_dilation": dilate, "num_classes": 3}
    ours, other = (on_meta(lambda b=b: b("resnet50", **options)) for b in (models.create, theirs))

    def geometry(model: Any) -> list[Any]:
        convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
        return [(m.stride, m.padding, m.dilation, m.groups) for m in convs]

    assert geometry(ours) == geometry(other)
    assert ours(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 3)


def test_widths() -> None:
    block = models.Bottleneck
    for options in ({"groups": 4, "width_per_group": 8}, {"width_per_group": 32}):
        ours = on_meta(lambda o=options: models.ResNet(block, (1, 1, 1, 1), **o))
        other = on_meta(
            lambda o=options: torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], **o)
        )
        assert shapes(ours) == shapes(other)


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "unknown": (lambda: models.create("resnet17"), ValueError, "unknown network 'resnet17'; meant: resnet1"),
    "far off": (lambda: models.create("x"), ValueError, "expected one of alexnet, googlenet"),
    "no string": (lambda: models.create(18), ValueError, "unknown network 18"),  # type: ignore[arg-type]
    "unknown argument": (lambda: models.vgg11(widths=3), TypeError, "widths"),
    "positional": (lambda: models.resnet18(True), TypeError, "positional"),  # type: ignore[call-arg]
    "dilation": (
        lambda: models.resnet50(replace_stride_with_dilation=(True,)), ValueError, r"None or three booleans, got \(True",
    ),
    "dilated basic": (
        lambda: models.resnet18(replace_stride_with_dilation=(False, True, True)), NotImplementedError, "dilation=1, got 2",
    ),
    "grouped basic": (lambda: models.resnet18(groups=2), ValueError, "groups=1 and base_width=64, got 2 and 64"),
    "other groups": (lambda: models.resnext50_32x4d(groups=16), ValueError, "groups: expected 32"),
    "zfnet": (lambda: models.zfnet(filters=(1, 2)), ValueError, "three convolutions"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, error, sentence = ERRORS[name]
    with pytest.raises(error, match=sentence), torch.device("meta"):
        call()


def test_zfnet() -> None:
    """The paper's sizes; its filters, and those that others have published."""
    sizes = [layer.output[1:3] for layer in models.describe("zfnet") if layer.kind.startswith(("conv", "max"))]
    assert sizes == [(96, 110), (96, 55), (256, 26), (256, 13), (512, 13), (512, 13), (1024, 13), (1024, 6)]
    for filters in ((384, 384, 256), (512, 1024, 512)):
        model = on_meta(lambda f=filters: models.zfnet(filters=f, num_classes=7, dropout=0.1))
        assert [m.out_channels for m in model.features if isinstance(m, torch.nn.Conv2d)][2:] == list(filters)
        assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 7)


def test_inception_v2() -> None:
    """Channels as in the paper's figure 5, for both numbers that it can mean."""
    for projection, width in ((96, 576), (128, 608)):
        out = {layer.name: layer.input[1] for layer in models.describe("inception_v2", projection=projection)}
        names = [f"inception{n}.branch2.0.conv" for n in ("3a", "3b", "3c", "4a", "4b", "4c", "4d", "4e", "5a", "5b")]
        assert [out[n] for n in names] == [192, 256, 320, 576, 576, 576, width, width, width + 448, 1024]
        assert out["fc"] == 1024
    model = models.inception_v2(num_classes=3, transform_input=True)
    other = cnnfast.revert(model)
    for training in (True, False):
        assert_close(model.train(training)(images(64)), other.train(training)(images(64)), rtol=1e-3, atol=1e-3)


# ---- fused, and what must not be -------------------------------------------------------------------------------------


def operations(model: torch.nn.Module, size: int = 64) -> dict[str, int]:
    with settings.observe() as events, torch.no_grad():
        model(images(size))
    found: dict[str, int] = {}
    for event in events:
        op = event.selection.problem.op if hasattr(event, "selection") else "torch"
        found[op] = found.get(op, 0) + 1
    return found


class Operators(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_fused() -> None:
    """In evaluation one kernel a convolution; in training no addition or activation of its own."""
    small: dict[str, Any] = {"num_classes": 3}
    for name, convolutions in (("resnet18", 20), ("resnet50", 53), ("googlenet", 57), ("inception_v2", 69)):
        model = models.create(name, **small, **({"aux_logits": False} if name == "googlenet" else {}))
        assert operations(model.eval())["conv_bn_act"] == convolutions
        with Operators() as seen:
            model.train()(images(64))
        assert not [f for f in seen.names if "relu" in f or "native_batch_norm" in f or f == "aten.add.Tensor"]
    assert operations(models.vgg.features((1, 1, 2, 2, 2), True).eval()) == {"conv_bn_act": 8, "max_pool2d": 5}


def test_explain_sees_what_runs() -> None:
    """Its hooks change nothing: fused as without, and named by the convolution."""
    model = models.resnet18(num_classes=3).eval()
    rows = cnnfast.explain(model, images(64), runs=1, limits=False)
    fused = [row.layer for row in rows if row.op == "conv_bn_act"]
    assert len(fused) == 20
    assert fused[:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    assert "layer2.0.downsample.0" in fused
    rows = cnnfast.explain(model.train(), images(64), runs=1, limits=False)
    assert "layer1.0.bn2" in [row.layer for row in rows if row.op == "batch_norm"]


def test_hooks_and_replaced_parts_run() -> None:
    model = models.resnet18(num_classes=3).eval()
    expected = model(images(64))
    seen: list[str] = []
    for part in ("bn1", "relu", "layer1.0.bn2", "layer2.0.downsample.1", "layer3.0.relu"):
        model.get_submodule(part).register_forward_hook(lambda m, args, out, part=part: seen.append(part))
    assert_close(model(images(64)), expected, rtol=1e-4, atol=1e-4)
    assert sorted(set(seen)) == ["bn1", "layer1.0.bn2", "layer2.0.downsample.1", "layer3.0.relu", "relu"]
    assert seen.count("layer3.0.relu") == 2
    model = models.resnet18(num_classes=3).eval()
    model.layer1[0].relu = torch.nn.Tanh()
    model.layer1[0].bn1 = torch.nn.Identity()
    model.layer1[1].conv1.forward = lambda x: x * 0
    other = torchvision.models.resnet18(num_classes=3).eval()
    other.layer1[0].relu = torch.nn.Tanh()
    other.layer1[0].bn1 = torch.nn.Identity()
    other.layer1[1].conv1.forward = lambda x: x * 0
    other.load_state_dict(model.state_dict())
    assert_close(model(images(64)), other(images(64)), rtol=1e-4, atol=1e-4)


def test_changed_weights_count() -> None:
    model, other = models.resnet18(num_classes=3).eval(), torchvision.models.resnet18(num_classes=3).eval()
    with torch.no_grad():
        model(images(64))
        for parameter in model.parameters():
            parameter.data = parameter.data * 1.25
        model.bn1.running_mean.add_(0.5)
    other.load_state_dict(model.state_dict())
    assert_close(model(images(64)), other(images(64)), rtol=1e-4, atol=1e-3)


def test_copied_pickled_sliced_converted() -> None:
    model = models.resnet18(num_classes=3).eval()
    expected = model(images(64))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), cnnfast.convert(model)):
        assert_close(other(images(64)), expected, rtol=1e-4, atol=1e-4)
    assert_close(cnnfast.revert(model)(images(64)), expected, rtol=1e-4, atol=1e-4)
    features = models.vgg.features((1, 1, 1, 1, 1), batch_norm=True).eval()
    assert_close(features[4:](features[:4](images(32))), features(images(32)))
    synchronised = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(synchronised.bn1) is torch.nn.SyncBatchNorm
    assert_close(synchronised(images(64)), expected, rtol=1e-4, atol=1e-4)


def test_compiled_and_exported() -> None:
    model = models.ResNet(models.BasicBlock, (1, 1, 1, 1), num_classes=3)
    x = images(32)
    for training in (True, False):
        other = copy.deepcopy(model.train(training))
        compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
        assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    exported = torch.export.export(model.eval(), (x,))
    assert_close(exported.module()(x), model(x), rtol=1e-4, atol=1e-4)


def test_traced_for_features() -> None:
    """By FX, whole and cut off at a stage, as detectors and torchvision's feature extraction do it."""
    from torchvision.models.feature_extraction import create_feature_extractor

    model = models.resnet18(num_classes=3).eval()
    x = images(64)
    assert_close(torch.fx.symbolic_trace(model)(x), model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that training and evaluation have other nodes
        features = create_feature_extractor(model, {"layer2": "map"})(x)["map"]
    assert_close(
        features, model.layer2(model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(x)))))), rtol=1e-4, atol=1e-4
    )


def test_half_precision_and_autocast() -> None:
    model = models.ResNet(models.Bottleneck, (1, 1, 1, 1), num_classes=3)
    x = images(32)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert model.eval().bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_registry_is_what_the_package_exports() -> None:
    assert set(_registry._ENTRIES) <= set(models.__all__)
