"""Other people's networks, torchvision's and timm's: what goes through ``convert`` and ``fuse`` unchanged in result.

``aten`` names what torch runs between the plans of a fused network, and ``why`` what about it another network doesn't have.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import torch
from torch.utils import _pytree as pytree

import cnnfast
from cnnfast.report import networks


@dataclasses.dataclass(frozen=True)
class Model:
    """A network by its name in a package; ``a.b.c`` is part c of torchvision's ``models.a.b``."""

    name: str
    source: str
    why: str
    aten: tuple[str, ...] = ()  # operators of torch's between the plans, at most
    size: int = 64

    def __str__(self) -> str:
        return f"{self.source}-{self.name}"

    def build(self) -> torch.nn.Module:
        """In evaluation; parameters that begin alike (1, 0, 1e-6) are told apart, and batch norms fit their inputs."""
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            model = self._make().eval()
            for parameter in model.parameters():
                if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
                    parameter.uniform_(*((0.5, 1.5) if parameter.flatten()[0] else (-0.3, 0.3)))
            networks.calibrate(model, self.images(8))
        return model

    def _make(self) -> torch.nn.Module:
        if self.source == "timm":
            import timm

            return timm.create_model(self.name, pretrained=False)
        import torchvision

        options: dict[str, Any] = {"weights": None}
        folder, _, rest = self.name.rpartition("/")
        if self.name in ("googlenet", "inception_v3"):
            options.update(aux_logits=False, init_weights=False)
        name, _, part = rest.partition(".")
        if folder:
            options["weights_backbone"] = None
        module = getattr(torchvision.models, folder) if folder else torchvision.models
        model = getattr(module, name)(**options)
        return model.get_submodule(part) if part else model

    def images(self, batch: int = 2) -> torch.Tensor:
        """Noise, which is smooth, as photographs are."""
        generator = torch.Generator().manual_seed(1)
        smooth = torch.randn(batch, 3, self.size // 8, self.size // 8, generator=generator)
        noise = torch.randn(batch, 3, self.size, self.size, generator=generator)
        return torch.nn.functional.interpolate(smooth, size=(self.size, self.size), mode="bilinear") + 0.2 * noise


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a network. Errors are distances from its results in fp64 by their norm."""

    layers: int  # convolutions and poolings among its modules
    converted: int
    kernels: int
    plans: int
    aten: dict[str, str]  # operator of torch's -> reason
    torch_error: float
    converted_error: float
    fused_error: float

    @property
    def allowed(self) -> float:
        """An error is the sum of the layers': of each at most 3 times torch's, and a rounding of what it hands on."""
        return 3 * self.torch_error + (self.kernels + len(self.aten)) * 2.0**-24


def examine(case: Model) -> Outcome:
    """Runs a network as it is, converted, and fused.

    The reference is the converted network in fp64, whose kernels take a tenth of torch's time; that torch's fp32 results are
    near it says that it is the same function.
    """
    model, x = case.build(), case.images()
    converted = cnnfast.convert(copy.deepcopy(model))
    report = cnnfast.conversion_report(converted)
    with torch.no_grad():
        exact = _flat(copy.deepcopy(converted).double()(x.double()))
        errors = [_error(_flat(network(x)), exact) for network in (model, converted)]
        fused = cnnfast.fuse(model)
        errors.append(_error(_flat(fused(x)), exact))
    (program,) = fused.programs
    aten = {call.name.split(".")[1]: call.reason for call in program.calls if call.reason}
    plans = len(program.steps) - len(program.calls)
    return Outcome(len(report), len(report.converted), len(program.kernels), plans, aten, *errors)


def _flat(result: Any) -> torch.Tensor:
    """All of a network's results as one vector."""
    return torch.cat([t.double().flatten() for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)])


def _error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return float((result - exact).norm() / exact.norm())


def _torchvision(why: str, *names: str, **more: Any) -> tuple[Model, ...]:
    return tuple(Model(name, "torchvision", why, **more) for name in names)


def _timm(why: str, *names: str, **more: Any) -> tuple[Model, ...]:
    return tuple(Model(name, "timm", why, **more) for name in names)


MODELS: tuple[Model, ...] = (
    *_torchvision("large windows and strides, three fully connected layers", "alexnet"),
    *_torchvision("plain 3x3, with batch norm", "vgg11_bn"),
    *_torchvision("residuals; in groups", "resnet50", "resnext50_32x4d"),
    *_torchvision("concatenations of two, no fully connected layer", "squeezenet1_1"),
    *_torchvision("concatenations of all that came before", "densenet121"),
    *_torchvision("branches of unlike windows, 1x7 and 7x1", "googlenet"),
    *_torchvision("branches of unlike windows, 1x7 and 7x1", "inception_v3", size=96),
    *_torchvision("depthwise, ReLU6", "mobilenet_v2", "mnasnet0_5"),
    *_torchvision("depthwise, hardswish, squeeze-and-excite", "mobilenet_v3_large"),
    *_torchvision("depthwise, SiLU, squeeze-and-excite", "efficientnet_b0"),
    *_torchvision("fused and depthwise blocks", "efficientnet_v2_s"),
    *_torchvision("groups of 16 channels; with squeeze-and-excite", "regnet_x_400mf", "regnet_y_400mf"),
    *_torchvision("7x7 depthwise, layer norm over channels, GELU", "convnext_tiny", aten=("gelu", "layer_norm", "linear", "permute")),
    *_torchvision("channels shuffled", "shufflenet_v2_x0_5"),
    *_torchvision("segmentation: dilation, bilinear enlargement", "segmentation/fcn_resnet50", aten=("upsample_bilinear2d",)),
    *_torchvision("segmentation: atrous pyramid", "segmentation/deeplabv3_mobilenet_v3_large", aten=("upsample_bilinear2d",)),
    *_torchvision("segmentation: two scales, a gate", "segmentation/lraspp_mobilenet_v3_large", aten=("upsample_bilinear2d",)),
    *_torchvision("detection: feature pyramid", "detection/fasterrcnn_resnet50_fpn_v2.backbone", aten=("upsample_nearest2d",)),
    *_torchvision("detection: a pyramid with extra maps", "detection/retinanet_resnet50_fpn_v2.backbone", aten=("upsample_nearest2d",)),
    *_torchvision("detection: vgg16 with dilation, normed features", "detection/ssd300_vgg16.backbone",
                  aten=("clamp_min", "div", "expand_as", "linalg_vector_norm"), size=300),
    *_torchvision("detection: depthwise, extra blocks", "detection/ssdlite320_mobilenet_v3_large.backbone"),
    *_timm("squeeze-and-excite in a ResNet", "seresnet50"),
    *_timm("blur pooling: reflected padding, depthwise", "resnetblur50", aten=("pad",)),
    *_timm("average pooling against aliasing", "resnetaa50"),
    *_timm("weight-standardised convolutions, group norm", "resnetv2_50x1_bit", aten=("group_norm", "pad")),
    *_timm("weight-standardised convolutions with gains, no norm", "nf_resnet26", "nfnet_l0"),
    *_timm("Conv2dSame", "tf_efficientnet_b0", "tf_efficientnetv2_b0"),
    *_timm("Conv2dSame of several windows side by side", "tf_mixnet_s", aten=("split_with_sizes",)),
    *_timm("a stem, depthwise and plain blocks", "mobilenetv4_conv_small"),
    *_timm("hardswish, squeeze-and-excite, pooled before the head", "mobilenetv3_large_100"),
    *_timm("groups, squeeze-and-excite", "regnety_002"),
    *_timm("7x7 depthwise, layer norm over channels, GELU", "convnext_atto", aten=("gelu", "layer_norm", "permute")),
    *_timm("half of the channels made of the other half", "ghostnet_100"),
    *_timm("branches weighted by a softmax", "skresnet18", aten=("mul", "softmax", "split", "stack", "sum")),
    *_timm("split attention", "resnest14d", aten=("mul", "softmax", "sum", "transpose")),
    *_timm("channel attention by a 1-D convolution", "ecaresnet26t", aten=("conv1d", "expand_as", "mul", "sigmoid")),
    *_timm("three branches summed", "repvgg_a0"),
    *_timm("many parallel branches of depthwise and 1x1", "mobileone_s0"),
    *_timm("maps of four scales, summed", "hrnet_w18_small", aten=("upsample_nearest2d",)),
    *_timm("trees of aggregated maps", "dla34"),
    *_timm("one concatenation at each stage's end", "ese_vovnet19b_dw"),
    *_timm("channels split, and summed one after the other", "res2net50_14w_8s"),
    *_timm("half of the channels pass a stage by", "cspresnet50", aten=("split",)),
    *_timm("leaky ReLU", "darknet53"),
    *_timm("residuals and concatenations at once", "dpn68"),
    *_timm("branches of unlike windows; with residuals", "inception_v4", "inception_resnet_v2", size=96),
    *_timm("separable convolutions", "xception41", "legacy_xception"),
    *_timm("channels that grow by a few at each block", "rexnet_100"),
    *_timm("a stem of two branches, concatenations of six", "hgnet_tiny"),
    *_timm("convolutions of a quarter of the channels", "fasternet_t0", aten=("gelu", "split_with_sizes")),
    *_timm("products of two branches", "starnet_s1", aten=("mul",)),
)  # fmt: skip
