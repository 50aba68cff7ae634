"""Any model's convolutions and poolings onto cnnfast's kernels, and back, by changing the class of its modules.

Nothing but ``__class__`` changes: parameters, buffers, hooks, flags, names, sharing and ``state_dict`` stay as they
are. A module of torch's exact class becomes cnnfast's. A subclass becomes a class that inherits from both, made once
for each:

    class Conv2dSame(theirs.Conv2dSame, cnnfast.Conv2d)

so that whatever it doesn't override, and all that it reaches through ``super()``, is cnnfast's. Where it has a forward
of its own, that runs under :class:`Redirect`, which hands its calls of ``torch.nn.functional.conv2d`` to cnnfast. The
report is a function of the model alone (:func:`conversion_report`): nothing is recorded that could go stale.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from cnnfast import _render, functional, nn

Model = TypeVar("Model", bound=torch.nn.Module)
Include = Callable[[str, torch.nn.Module], bool] | type | tuple[type, ...] | Sequence[str] | None

# Every module that cnnfast has: its class in torch.nn and cnnfast.nn, its function in torch.nn.functional and ours.
PAIRS = (
    ("Conv1d", "conv1d"),
    ("Conv2d", "conv2d"),
    ("ConvTranspose2d", "conv_transpose2d"),
    ("MaxPool2d", "max_pool2d"),
    ("AvgPool2d", "avg_pool2d"),
    ("AdaptiveAvgPool2d", "adaptive_avg_pool2d"),
    ("AdaptiveMaxPool2d", "adaptive_max_pool2d"),
    ("BatchNorm2d", "batch_norm"),
)
_OTHERWISE = {torch.batch_norm}  # of the same name, with other arguments

# What convert is about: one of these without a counterpart of ours is named in the report.
_KINDS = (
    torch.nn.modules.conv._ConvNd,
    torch.nn.modules.pooling._MaxPoolNd,
    torch.nn.modules.pooling._AvgPoolNd,
    torch.nn.modules.pooling._AdaptiveAvgPoolNd,
    torch.nn.modules.pooling._AdaptiveMaxPoolNd,
)

_PRESENT = [(module, function) for module, function in PAIRS if hasattr(nn, module)]
MODULES: dict[type, type] = {getattr(torch.nn, module): getattr(nn, module) for module, _ in _PRESENT}
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    getattr(namespace, function): getattr(functional, function)
    for _, function in _PRESENT
    for namespace in (torch.nn.functional, torch)
    if hasattr(namespace, function) and getattr(namespace, function) not in _OTHERWISE
}


def _with_indices(function: Callable[..., Any]) -> Callable[..., Any]:
    """A pooling as torch's dispatch by ``return_indices`` calls it where that is True."""
    position = list(inspect.signature(function).parameters).index("return_indices")

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args[:position], **{**kwargs, "return_indices": True})

    return call


FUNCTIONS.update(
    {
        getattr(torch.nn.functional, f"{name}_with_indices"): _with_indices(getattr(functional, name))
        for _, name in _PRESENT
        if hasattr(torch.nn.functional, f"{name}_with_indices")
    }
)
_BACK = {ours: theirs for theirs, ours in MODULES.items()}
_ORIGINAL = "_cnnfast_original"  # class attribute of the classes made here: the class that they stand for
_REDIRECTS = "_cnnfast_redirects"


class Redirect(TorchFunctionMode):
    """Within it torch's convolution and pooling functions are cnnfast's; everything else passes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls cnnfast's counterpart of ``func`` where there is one."""
        return FUNCTIONS.get(func, func)(*args, **(kwargs or {}))


# ---- classes ---------------------------------------------------------------------------------------------------------


def _family(cls: type) -> type | None:
    """The torch class in :data:`MODULES` that ``cls`` is or derives from."""
    return next((base for base in cls.__mro__ if base in MODULES), None)


def _original(cls: type) -> type | None:
    """The class that a converted class stands for; None where ``cls`` isn't one of ours."""
    if cls in _BACK:
        return _BACK[cls]
    if _ORIGINAL in cls.__dict__:
        return cls.__dict__[_ORIGINAL]
    if _is_parametrized(cls):
        base = _original(cls.__bases__[0])
        return None if base is None else _rebased(cls, base)
    return None


def _is_parametrized(cls: type) -> bool:
    """Whether ``torch.nn.utils.parametrize`` made the class: it holds properties and its base the computation."""
    return cls.__name__.startswith("Parametrized") and cls.__name__ == f"Parametrized{cls.__bases__[0].__name__}"


def _rebased(cls: type, base: type) -> type:
    """A parametrized class over another base, so that removing the parametrization leaves that base."""
    body = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, (base,), body)


def _overridden(cls: type) -> bool:
    """Whether a class computes in a way of its own instead of torch's."""
    family = _family(cls)
    before = cls.__mro__[: cls.__mro__.index(family)] if family else ()
    return any(name in c.__dict__ for c in before for name in ("forward", "_conv_forward"))


def _converted(cls: type, redirect: bool) -> type:
    """The class that ``cls`` is converted to."""
    family = _family(cls)
    assert family is not None
    if cls is family and not redirect:
        return MODULES[family]
    if _is_parametrized(cls):
        return _rebased(cls, _converted(cls.__bases__[0], redirect))
    known: type
    for known in (MODULES[family] if cls is family else cls).__subclasses__():  # made before: one class for each
        if known.__dict__.get(_ORIGINAL) is cls and known.__dict__[_REDIRECTS] == redirect:
            return known

    def body(namespace: dict[str, Any]) -> None:
        namespace.update({
            "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__,
            "__reduce_ex__": _reduce_ex,
        })  # fmt: skip
        if redirect:
            namespace["forward"] = _redirected(cls)
        becomes = getattr(cls, "cls_to_become", None)  # a lazy module turns into that class at its first call
        if becomes in MODULES:
            namespace["cls_to_become"] = MODULES[becomes]
        if "__slots__" in cls.__dict__:
            namespace["__slots__"] = ()

    bases = (MODULES[family],) if cls is family else (cls, MODULES[family])
    made = types.new_class(cls.__name__, bases, {}, body)
    # marked last: a class that __init_subclass__ refused is still among __subclasses__() for a while
    setattr(made, _REDIRECTS, redirect)
    setattr(made, _ORIGINAL, cls)
    return made


def _redirected(cls: Any) -> Callable[..., Any]:
    original = cls.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with Redirect():
            return original(self, *args, **kwargs)

    forward.__doc__ = original.__doc__
    return forward


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """Pickles (and copies) by the original class, which can be imported, and converts again on loading."""
    cls: Any = next(c for c in type(self).__mro__ if _ORIGINAL in c.__dict__)
    reduced = super(cls, self).__reduce_ex__(max(int(protocol), 2))
    if isinstance(reduced, str):
        return reduced
    function, args, *rest = reduced
    original, redirects = cls.__dict__[_ORIGINAL], cls.__dict__[_REDIRECTS]
    plain = tuple(original if a is cls else a for a in args)
    return (_rebuild, (function, plain, redirects), *rest)


def _rebuild(function: Callable[..., Any], args: tuple[Any, ...], redirect: bool) -> Any:
    module = function(*args)
    if _original(type(module)) is None:
        module.__class__ = _converted(type(module), redirect)
    return module


# ---- what is converted, and why not ----------------------------------------------------------------------------------


def _plan(module: torch.nn.Module) -> tuple[type | None, str]:
    """The class to give a module and a remark, or None and why it is left; ``(None, "")`` for what isn't concerned."""
    cls = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        if module.original_name in {c.__name__ for c in MODULES}:
            return None, "compiled by TorchScript, which can't be changed: convert before scripting or tracing"
        return None, ""
    if cls.__module__.startswith(("torch.ao.nn.", "torch.nn.quantized", "torch.nn.qat", "torch.nn.intrinsic")):
        if "quantized" in cls.__module__ and ("Conv" in cls.__name__ or "Pool" in cls.__name__):
            return None, "quantised: runs on integer kernels"
        if _family(cls) is not None:
            return None, "prepared for quantisation, which finds its modules by their exact class"
        return None, ""
    family = _family(cls)
    if family is None:
        if isinstance(module, _KINDS):
            return None, "cnnfast has no kernels for it"
        return None, ""
    if getattr(module, "qconfig", None) is not None:
        return None, "prepared for quantisation, which finds its modules by their exact class"
    if issubclass(cls, MODULES[family]):
        return None, f"derives from cnnfast.{MODULES[family].__name__} already"
    redirect = _overridden(cls) or "_conv_forward" in module.__dict__
    try:
        target = _converted(cls, redirect)
        _check_layout(module, target)
    except Exception as error:  # a metaclass, __init_subclass__ or __slots__ may forbid it in any way
        return None, f"its class can't be extended: {type(error).__name__}: {error}"
    return target, ""


def _check_layout(module: torch.nn.Module, target: type) -> None:
    """Raises TypeError where Python can't give the module that class; tried on a shell, not on the module."""
    shell = object.__new__(type(module))
    shell.__class__ = target


def _names(model: torch.nn.Module) -> Iterator[tuple[list[str], torch.nn.Module]]:
    """Every module once, with all its names, first name first."""
    names: dict[int, tuple[list[str], torch.nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), ([], module))[0].append(name)
    return iter(names.values())


def _selector(include: Include) -> Callable[[list[str], torch.nn.Module], bool]:
    if include is None:
        return lambda names, module: True
    if isinstance(include, type) or (isinstance(include, tuple) and all(isinstance(i, type) for i in include)):
        classes = include
        return lambda names, module: isinstance(module, classes)
    if isinstance(include, str):
        include = [include]
    if isinstance(include, Sequence):
        patterns = [p for p in include if isinstance(p, str)]
        if len(patterns) == len(include):
            return lambda names, module: any(fnmatch.fnmatchcase(name, p) for name in names for p in patterns)
    elif callable(include):
        function = include
        return lambda names, module: any(function(name, module) for name in names)
    raise TypeError(f"convert: expected include to be a function, types or names, got {include!r}")


# ---- convert and revert ----------------------------------------------------------------------------------------------


def convert(
    model: Model,
    *,
    include: Include = None,
    memory_format: torch.memory_format | None = torch.channels_last,
    inplace: bool = False,
) -> Model:
    """Puts a model's convolutions and poolings on cnnfast's kernels.

    Works on any ``torch.nn.Module``, also one that is compiled, parametrized, lazy or on another device; converting
    twice changes nothing more. :func:`conversion_report` says what was converted, what wasn't and why; :func:`revert`
    goes back.

    Args:
        model: The model, or a single module.
        include: Which modules: None for all; ``(name, module) -> bool``; a type or tuple of types; a list of names, in
            which ``*`` stands for anything (``["layer1.*"]``). A module with several names counts under each.
        memory_format: 4-D parameters of the converted modules are laid out so, the Parameter objects staying the same;
            None leaves them. With ``channels_last`` (fastest) activations become channels_last from the first
            convolution on. Parameters that share storage with other tensors are left.
        inplace: Convert the model itself instead of a copy. Its optimizers stay valid: parameters are the same objects.

    Returns:
        The converted copy, or ``model`` itself if ``inplace``. Outputs are torch's within the precision setting.

    Raises:
        TypeError: ``model`` isn't a module, or ``include`` is none of the above.
        ValueError: ``include`` names what isn't there; ``model`` holds a DistributedDataParallel and ``inplace`` isn't
            set.
        RuntimeError: the model can't be copied (``inplace=True`` needs no copy).
    """
    _check(model, "convert")
    selected = _selector(include)
    distributed = any(isinstance(m, torch.nn.parallel.DistributedDataParallel) for m in model.modules())
    if distributed and not inplace:
        raise ValueError(
            "convert: a DistributedDataParallel can't be copied; convert the model before wrapping it, or in place"
        )
    by_name = isinstance(include, Sequence) and not isinstance(include, tuple)
    if by_name and not any(selected(names, module) for names, module in _names(model)):
        raise ValueError(f"convert: no module of {type(model).__name__} is named {include!r}")
    if not inplace:
        model = _copied(model)
    shared = _shared_storages(model)
    for names, module in _names(model):
        if not selected(names, module):
            continue
        target, _ = _plan(module) if _original(type(module)) is None else (type(module), "")
        if target is None:
            continue
        if target is not type(module):
            module.__class__ = target
        if memory_format is not None and not distributed:  # DDP's buckets hold the layout that it was built with
            for parameter in module.parameters():
                _lay_out(parameter, memory_format, shared)
    return model


def revert(model: Model, *, inplace: bool = False) -> Model:
    """Gives every converted module its original class again, and leaves everything else as it is.

    Works on models that were copied, pickled or trained since, and does nothing to models without cnnfast's modules.
    ``cnnfast.Conv2d`` modules that you built yourself become ``torch.nn.Conv2d``, too: nothing of cnnfast is left in
    the model, except for subclasses of your own.

    Args:
        model: The model, or a single module.
        inplace: Revert the model itself instead of a copy.

    Returns:
        The reverted copy, or ``model`` itself if ``inplace``. Parameters keep the memory format that they have.

    Raises:
        TypeError: ``model`` isn't a module.
        RuntimeError: the model can't be copied.
    """
    _check(model, "revert")
    if not inplace:
        model = _copied(model)
    for module in model.modules():
        original = _original(type(module))
        if original is not None:
            module.__class__ = original
    return model


def _check(model: Any, what: str) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{what}: expected a torch.nn.Module, got {type(model).__name__}")


def _copied(model: Model) -> Model:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise RuntimeError(f"the model can't be copied ({type(error).__name__}: {error}); use inplace=True") from error


def _shared_storages(model: torch.nn.Module) -> set[int]:
    """Storages that more than one tensor of the model lies in."""
    seen: dict[int, set[int]] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storage = _storage(tensor)
        if storage is not None:
            seen.setdefault(storage, set()).add(id(tensor))
    return {storage for storage, tensors in seen.items() if len(tensors) > 1}


def _storage(tensor: torch.Tensor) -> int | None:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError, ValueError):  # no storage: lazy, wrapped or sparse
        return None


def _in_shared_memory(tensor: torch.Tensor) -> bool:
    return bool(tensor.untyped_storage().is_shared())


def _lay_out(parameter: torch.nn.Parameter, memory_format: torch.memory_format, shared: set[int]) -> None:
    """Lays a parameter, and its gradient, out in a format; leaves it where that could sever it from another tensor."""
    storage = None if torch.nn.parameter.is_lazy(parameter) else _storage(parameter)
    if storage is None or type(parameter.data) is not torch.Tensor or parameter.dim() != 4 or parameter.is_quantized:
        return
    own = parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
    if storage in shared or not own or (parameter.device.type == "cpu" and _in_shared_memory(parameter)):
        return
    for tensor in (parameter, parameter.grad):
        if tensor is not None:
            laid_out = torch.empty_like(tensor.data, memory_format=memory_format)  # exact strides, of 1 x 1 kernels too
            if laid_out.stride() != tensor.stride():
                tensor.data = laid_out.copy_(tensor.data)


# ---- the report ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ConvertedLayer:
    """One line of a :class:`ConversionReport`."""

    name: str
    cls: str  # the (original) class
    action: str  # "converted" | "redirected" (keeps its own forward) | "left"
    reason: str

    @property
    def ours(self) -> bool:
        """Whether cnnfast serves it."""
        return self.action != "left"


class ConversionReport(Sequence[ConvertedLayer]):
    """What of a model runs on cnnfast, line by line; printable, and a sequence of :class:`ConvertedLayer`."""

    def __init__(self, model: str, layers: Sequence[ConvertedLayer]) -> None:
        self.model, self._layers = model, tuple(layers)

    def __getitem__(self, index: Any) -> Any:
        return self._layers[index]

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def converted(self) -> list[ConvertedLayer]:
        """The layers that cnnfast serves."""
        return [layer for layer in self if layer.ours]

    @property
    def left(self) -> list[ConvertedLayer]:
        """The layers that torch serves, with the reason."""
        return [layer for layer in self if not layer.ours]

    def __rich__(self) -> Any:
        columns = [("layer", "left"), ("class", "left"), ("", "left"), ("remark", "left")]
        rows = [(r.name or "(the model)", r.cls, r.action, r.reason) for r in self]
        title = f"{self.model}: {len(self.converted)} of {len(self)} convolutions and poolings on cnnfast"
        return _render.table(title, columns, rows)

    def __str__(self) -> str:
        return _render.as_text(self)

    def __repr__(self) -> str:
        return f"<ConversionReport of {self.model}: {len(self.converted)} converted, {len(self.left)} left>"


def conversion_report(model: torch.nn.Module) -> ConversionReport:
    """What of a model runs on cnnfast and what doesn't, and why: read from the model as it is now.

    Args:
        model: Any model, converted or not.

    Returns:
        A :class:`ConversionReport`: print it, or iterate over its lines (name, class, action, reason). It lists every
        convolution and pooling module, and function calls recorded in FX graphs. What a module's forward calls by
        itself (``F.conv2d`` in a block) only :func:`cnnfast.explain` sees, which runs the model.

    Raises:
        TypeError: ``model`` isn't a module.
    """
    _check(model, "conversion_report")
    layers = [row for names, module in _names(model) for row in _report(names, module)]
    return ConversionReport(type(model).__name__, layers)


def _report(names: list[str], module: torch.nn.Module) -> Iterator[ConvertedLayer]:
    cls = type(module)
    original = _original(cls)
    if original is not None:
        redirects = any(c.__dict__.get(_REDIRECTS, False) for c in cls.__mro__)
        reasons = []
        if redirects:
            reasons.append(f"keeps its forward; its calls of {', '.join(sorted(f for _, f in _PRESENT))} are cnnfast's")
        if "forward" in module.__dict__:
            reasons.append("forward is replaced on this module: cnnfast serves only where that ends in the class's own")
        if len(names) > 1:
            reasons.append("also " + ", ".join(names[1:]))
        action = "redirected" if redirects else "converted"
        yield ConvertedLayer(names[0], original.__name__, action, "; ".join(reasons))
        return
    target, reason = _plan(module)
    if target is not None:
        yield ConvertedLayer(names[0], cls.__name__, "left", "not converted: not included, or added since")
    elif reason and "derives from cnnfast" in reason:
        yield ConvertedLayer(names[0], cls.__name__, "converted", reason)
    elif reason:
        yield ConvertedLayer(names[0], getattr(module, "original_name", cls.__name__), "left", reason)
    if isinstance(module, torch.fx.GraphModule):
        for node in module.graph.nodes:
            if node.op == "call_function" and (node.target in FUNCTIONS or _is_aten(node.target)):
                name = ".".join(part for part in (names[0], node.name) if part)
                reason = "a function call in an FX graph: convert before tracing"
                yield ConvertedLayer(name, getattr(node.target, "__name__", str(node.target)), "left", reason)


def _is_aten(target: Any) -> bool:
    names = {"convolution", *(function for _, function in _PRESENT)}
    return isinstance(target, torch._ops.OpOverload) and target._schema.name in {f"aten::{n}" for n in names}
