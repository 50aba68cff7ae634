"""``fuse``: any model in evaluation as plans of native kernels, its weights frozen, folded and packed."""

from __future__ import annotations

import collections
import copy
import gc
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from cnnfast import settings
from cnnfast.graph.capture import capture
from cnnfast.graph.constants import Constants
from cnnfast.graph.lower import lower
from cnnfast.graph.passes import optimise
from cnnfast.graph.program import Program, build
from cnnfast.graph.replay import Replayed, Replays
from cnnfast.graph.shared import Shared

_MOST_PROGRAMS = 32  # for so many kinds of input; the oldest goes first


class Fused(torch.nn.Module):
    """What :func:`fuse` returns: called like the model, for inference.

    For every kind of input (shapes, dtypes, other arguments, autocast, cnnfast's settings) the model is captured and planned
    at its first call. Its weights are those of the moment when the first kind was planned; from then on it holds them in the
    forms that its plans read, and no other. Any number of threads may call it, on any stream.
    """

    _source: torch.nn.Module

    def __init__(self, source: torch.nn.Module, constants: Constants, cuda_graph: bool = True) -> None:
        super().__init__()
        # not a submodule: its parameters are hollow, and in no state_dict
        object.__setattr__(self, "_source", source)
        self._programs: collections.OrderedDict[Any, tuple[Program | Replayed, pytree.TreeSpec]]
        self._programs = collections.OrderedDict()
        self._constants, self._shared = constants, Shared()
        self._replays = Replays() if cuda_graph else None
        self._lock = threading.Lock()
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result. It records no gradients; tensors of four dimensions come in channels_last.

        Raises:
            RuntimeError: a gradient is asked for.
            NotImplementedError: the model can't be captured; says why.
        """
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [t for t in leaves if isinstance(t, torch.Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise RuntimeError(
                "fuse: a fused model records no gradients; call it under torch.no_grad(), or the model itself"
            )
        key = (spec, tuple(_kind(leaf) for leaf in leaves), settings.state(), _autocast())
        found = self._programs.get(key)
        if found is None:
            found = self._planned(key, args, kwargs)
        run, out_spec = found
        with torch.no_grad():
            return pytree.tree_unflatten(run(*tensors), out_spec)

    def _planned(self, key: Any, args: Sequence[Any], kwargs: Any) -> tuple[Program | Replayed, pytree.TreeSpec]:
        with self._lock:
            found = self._programs.get(key)
            if found is None:
                program, out_spec = _program(self._source, args, kwargs, self._constants, self._shared)
                run = program if self._replays is None else self._replays.of(program)
                found = self._programs[key] = run, out_spec
                if len(self._programs) > _MOST_PROGRAMS:
                    _, (oldest, _) = self._programs.popitem(last=False)
                    if isinstance(oldest, Replayed) and self._replays is not None:
                        self._replays.forget(oldest)
            return found

    # ---- what became of the model

    @property
    def programs(self) -> list[Program]:
        """What was planned, one for each kind of input so far."""
        return [run.program if isinstance(run, Replayed) else run for run, _ in self._programs.values()]

    def launches(self) -> list[str]:
        """On a GPU: whether calls are launched as CUDA graphs, and why not."""
        found = [line for run, _ in self._programs.values() if isinstance(run, Replayed) for line in run.lines()]
        return list(dict.fromkeys(found))

    @property
    def weight_bytes(self) -> int:
        """What the weights take in all the forms that are held; before anything is planned, as the model had them."""
        return self._constants.bytes

    def report(self) -> str:
        """For each kind of input so far the plans, their kernels, and what runs between them, with the reason."""
        if not self._programs:
            return "nothing planned yet: call the fused model once"
        lines = [f"weights: {self.weight_bytes / 2**20:.1f} MiB"]
        for (_, kinds, *_), (run, _), program in zip(
            self._programs, self._programs.values(), self.programs, strict=True
        ):
            shapes = ", ".join(str(tuple(k[0])) if len(k) == 3 else repr(k[1]) for k in kinds)
            lines.append(f"{shapes}: {program.summary}")
            lines += [f"  {line}" for line in (run.lines() if isinstance(run, Replayed) else ())]
            lines += [f"  {line}" for line in program.lines()]
        return "\n".join(lines)

    # ---- a module's other abilities

    def train(self, mode: bool = True) -> Fused:
        """Only evaluation is possible."""
        if mode:
            raise RuntimeError(
                "fuse: a fused model can't be trained; train the model that was fused, then fuse it again"
            )
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Fused:
        raise RuntimeError(
            "fuse: the weights of a fused model are packed where they lie; move or cast the model, then fuse it"
        )

    def extra_repr(self) -> str:
        """The model's class, and how many kinds of input are planned."""
        return f"{type(self._source).__name__}, {len(self._programs)} planned"

    def __getstate__(self) -> dict[str, Any]:
        """The model's structure, and the weights as tensors: plans are native, and made again where they are needed."""
        with self._lock:
            hollow = [t for _, t in _named(self._source) if _is_hollow(t)]
            bare = {
                id(t): _like(t, torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")) for t in hollow
            }
            devices = {name: t.device for name, t in _named(self._source) if _is_hollow(t)}
            return {
                "source": copy.deepcopy(self._source, bare),
                "devices": devices,
                "weights": self._constants.state(),
                "cuda_graph": self._replays is not None,
            }

    def __setstate__(self, state: dict[str, Any]) -> None:
        source, constants = state["source"], Constants()
        _exchange(source, {id(t): _hollow(t, state["devices"][name]) for name, t in _named(source) if t.is_meta})
        constants.load(state["weights"])
        self.__init__(source, constants, state["cuda_graph"])  # type: ignore[misc]

    def __deepcopy__(self, memo: Any) -> Fused:
        twin = Fused(self._source, self._constants)  # of what never changes, there is one
        twin._shared, twin._lock, twin._programs = self._shared, self._lock, self._programs
        twin._replays = self._replays
        return twin


# ---- the model without its weights ------------------------------------------------------------------------------------


def _named(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers, by each of their names."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _like(tensor: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """A parameter where the other is one."""
    return torch.nn.Parameter(made, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else made


def _hollow(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Shape, strides and dtype of a tensor, without memory: all that capturing a model looks at."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    made.untyped_storage().resize_(0)
    return _like(tensor, made)


def _is_hollow(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.untyped_storage().nbytes() == 0 < tensor.numel()
    )


def _exchange(model: torch.nn.Module, others: dict[int, torch.Tensor]) -> None:
    """Puts other tensors in the places of a model's."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if id(tensor) in others:
                    tensors[name] = others[id(tensor)]  # type: ignore[assignment]


def _taken(model: torch.nn.Module, constants: Constants, inplace: bool) -> torch.nn.Module:
    """The model without its weights, which go to the constants; in place, or a copy."""
    hollow: dict[int, torch.Tensor] = {}
    for name, tensor in _named(model):
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
        if plain and tensor.is_floating_point() and not tensor.is_meta and tensor.numel():
            if id(tensor) not in hollow:
                hollow[id(tensor)] = _hollow(tensor, tensor.device)
            constants.lend(name, tensor.detach(), None if inplace else tensor)
    if not inplace:
        return copy.deepcopy(model, dict(hollow))
    _exchange(model, hollow)
    return model


# ---- planning ---------------------------------------------------------------------------------------------------------


def _kind(leaf: Any) -> Any:
    """What of an input decides the plan."""
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else (type(leaf), leaf)


def _autocast() -> Any:
    if not torch._C._is_any_autocast_enabled():
        return None
    return tuple((d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d))


def _program(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Any, constants: Constants, shared: Shared
) -> tuple[Program, pytree.TreeSpec]:
    with torch.inference_mode(False), torch.no_grad():
        captured = capture(model, args, kwargs, constants)
        gc.collect()  # what torch.export leaves lies in cycles, and is as large as many a layer
        reasons = lower(captured.graph, constants)
        optimise(captured.graph, constants)
        program = build(captured.graph, constants, reasons, shared, frozen=True, who="fuse")
    return program, captured.out_spec


def fuse(model: torch.nn.Module, example_inputs: Any = None, inplace: bool = False, cuda_graph: bool = True) -> Fused:
    """A model for inference: captured as a graph, merged into few kernels, run as native plans.

    Batch norm goes into the weights; activations, biases and residuals into the convolutions; concatenations are written
    in place; fully connected layers are ours, too. What no kernel of ours does is torch's, between the plans:
    ``print(fused.report())``.

    On a GPU plans hold the CUDA kernels; where Triton's are predicted to be faster, or there are no others, operators of
    ours run one by one. Either way the second call of a kind (shapes, strides, dtypes) records a CUDA graph, and later ones
    launch that; results are the caller's. A few kinds are recorded for a model, those that were called last; a model that
    waits for values on the host isn't, nor is a call within somebody else's recording. The first call of a kind
    plans: make it before any recording.

    Weights are read when the first kind of input is planned; the fused model then holds them as its kernels read them, in
    about as many bytes as the model's, and never sees a later change. ``model = cnnfast.fuse(model)`` so leaves one set of
    weights. Other shapes are planned from what is held. Another dtype (autocast) needs the model itself, alive and unchanged.

    Args:
        model: Any module in evaluation (``model.eval()``), converted or not.
        example_inputs: A tensor, or a tuple of arguments, to plan for at once; otherwise the first call does. Other shapes
            are planned when they come.
        inplace: Takes the weights out of the model, which is of no use afterwards, and frees each as soon as it is packed:
            there is never more than one set and a layer. Otherwise the model isn't touched, and there are two sets until
            it is dropped.
        cuda_graph: False: every call on a GPU launches its kernels one by one.

    Returns:
        A module that takes what the model takes and returns what it returns.

    Raises:
        ValueError: the model, or a part of it, is in training mode.
        NotImplementedError: ``torch.export`` can't capture it; says why.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"fuse: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, Fused):
        return model
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        part = f"its part {training!r} is" if training else "it is"
        raise ValueError(f"fuse: expected a model in evaluation, but {part} in training mode; call model.eval() first")
    constants = Constants()
    fused = Fused(_taken(model, constants, inplace), constants, cuda_graph)
    if example_inputs is not None:
        given = example_inputs if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
        with torch.no_grad():
            fused(*given)
    return fused
