"""One definition of an operator gives its schema, kernels, meta function, derivatives, vmap rule and FLOP formula.

Two autograd Functions are made of one backward rule. *Light* serves eager calls, where every microsecond counts, and the
Autograd key (direct calls of ``torch.ops.cnnfast.*`` and compiled graphs). *Setup* has the ``setup_context`` form that
functorch transforms and forward-mode AD need; it is three times slower, so it is used only where one of them is active.
It takes the tensors and one opaque object with all other arguments: lists would be flattened, which breaks ``hessian``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch.utils.flop_counter import register_flop_formula

from cnnfast import dispatch, settings
from cnnfast.ops._memory import prefers_channels_last

library = torch.library.Library("cnnfast", "DEF")

_below_autograd = torch._C._AutoDispatchBelowAutograd
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_active = torch._C._are_functorch_transforms_active
_profiling = torch._C._autograd._profiler_enabled
_tracing = torch._C._get_tracing_state
_key_included = torch._C._dispatch_tls_is_dispatch_key_included
_VMAP_MODE: Any = torch._C._parse_dispatch_key("VmapMode")  # the older vmap of is_grads_batched, unknown to functorch
_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


def transforms_active() -> bool:
    """Whether a functorch transform or a forward-mode AD level is active."""
    return bool(_functorch_active()) or forward_ad._current_level >= 0


def direct() -> bool:
    """Whether a call may go straight to its kernel: nobody watches, traces or transforms. Autocast casts before, in functional."""
    return not (
        _dispatch_modes()
        or _functorch_active()
        or _key_included(_VMAP_MODE)
        or forward_ad._current_level >= 0
        or settings._observer is not None
        or _profiling()
        or _tracing() is not None
    )


def _plain(t: Any) -> bool:
    """Whether the memory of a tensor holds its values: no subclass, no lazy negation, no zero without memory."""
    return type(t) in _PLAIN and not t.is_neg() and not t._is_zerotensor()


@dataclasses.dataclass(frozen=True)
class TensorMeta:
    """What a backward rule needs to know of a tensor that isn't saved."""

    shape: Any
    channels_last: bool


def metas(tensors: Sequence[Any]) -> tuple[TensorMeta | None, ...]:
    """The metas of tensors; for the hot path they are computed once a kind of call."""
    return tuple(None if t is None else TensorMeta(t.shape, prefers_channels_last(t)) for t in tensors)


class Opaque:
    """Arguments that autograd and pytree pass on without looking inside."""

    __slots__ = ("values",)

    def __init__(self, values: tuple[Any, ...]) -> None:
        self.values = values


class Operator:
    """A differentiable operator ``torch.ops.cnnfast.<name>`` and its fast Python entry (call the object).

    Args:
        name: The operator's name.
        schema: What stands between the parentheses of its schema, and the result.
        tensors: How many leading arguments are tensors (some may be None).
        resolve: ``resolve(tensors, params) -> run``; called once for each kind of call (shapes, strides, dtypes,
            parameters), where it validates, selects and binds. ``run(*tensors)`` then computes.
        fake: The results' meta tensors, from (possibly fake) tensors and parameters.
        backward: ``backward(needs, gradients, saved, params, metas) -> gradients of the tensors``.
        saves: ``saves(needs) -> for each tensor whether backward reads it``.
        jvp: ``jvp(tangents, tensors, params) -> tangent(s) of the result(s)``.
        flops: FLOP formula over shapes, as torch's counter wants it; None: zero.
        fold: Positions of the tensors that may carry a vmap dimension inside their batch dimension, all the others
            being unbatched, and ``unfold_size``, see :meth:`_vmap`.
        differentiable: For each result whether it has a gradient.
        keeps: ``keeps(tensors, params) -> positions of the results`` that ``backward`` and ``jvp`` get after the tensors.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        tensors: int,
        resolve: Callable[[Sequence[Any], tuple[Any, ...]], Callable[..., Any]],
        fake: Callable[[Sequence[Any], tuple[Any, ...]], Any],
        backward: Callable[..., Sequence[Any]],
        jvp: Callable[..., Any],
        saves: Callable[[Sequence[bool]], Sequence[bool]],
        flops: Callable[..., int] | None = None,
        fold: tuple[int, ...] = (),
        fold_params: Callable[[tuple[Any, ...], int], tuple[Any, ...]] | None = None,
        differentiable: tuple[bool, ...] = (True,),
        keeps: Callable[[Sequence[Any], tuple[Any, ...]], tuple[int, ...]] | None = None,
    ) -> None:
        self.name, self.tensors = name, tensors
        self._resolve, self._fake, self._backward, self._jvp, self._saves = resolve, fake, backward, jvp, saves
        self._fold, self._fold_params = fold, fold_params
        self._runs: dict[Any, Callable[..., Any]] = {}
        library.define(f"{name}{schema}")
        self.op = getattr(torch.ops.cnnfast, name).default
        for key in ("CPU", "CUDA"):
            library.impl(name, self._kernel, key)
        torch.library.register_fake(f"cnnfast::{name}", self._fake_entry, lib=library)
        self.light, self.setup = _functions(self, differentiable, keeps)
        library.impl(name, self._autograd, "Autograd")
        torch.library.register_vmap(f"cnnfast::{name}", self._vmap, lib=library)
        register_flop_formula(getattr(torch.ops.cnnfast, name))(flops or (lambda *args, **kwargs: 0))

    # ---- kernels

    def find(self, tensors: Sequence[Any], params: tuple[Any, ...]) -> Callable[..., Any] | None:
        """The bound kernel of a kind of call that was served before; None at the first, or for unusual tensors.

        Only for callers that know :func:`direct` to hold.
        """
        try:
            for t in tensors:
                if t is not None and not _plain(t):
                    return None
            return self._runs.get(_key(tensors, params))
        except (RuntimeError, TypeError):  # a tensor without strides (sparse), an unhashable parameter
            return None

    def apply(self, run: Callable[..., Any], tensors: Sequence[Any], params: tuple[Any, ...]) -> Any:
        """A differentiable call of what :meth:`find` found."""
        if _grad_enabled():
            for t in tensors:
                if t is not None and t.requires_grad:
                    return self.light.apply(run, params, *tensors)
        return run(*tensors)

    def run(self, tensors: Sequence[Any], params: tuple[Any, ...]) -> Callable[..., Any]:
        """The bound kernel of a kind of call, from the cache or resolved now."""
        if settings._observer is not None:
            return self._resolve(tensors, params)
        key = _key(tensors, params)
        found = self._runs.get(key)
        if found is None:
            first = next(t for t in tensors if t is not None)
            served = first.device.type in ("cpu", "cuda")
            # others (meta) go through the dispatcher; the lambda gives each entry attributes of its own
            inner = self._resolve(tensors, params) if served else self._below(params)
            found = functools.partial(inner)
            found.metas = metas(tensors)  # type: ignore[attr-defined]
            if len(self._runs) >= _CACHE_LIMIT:
                self._runs.clear()  # bounded over ever changing shapes; a refill costs some 0.1 ms a kind
            self._runs[key] = found
        return found

    def _kernel(self, *args: Any) -> Any:
        tensors, params = args[: self.tensors], _hashable(args[self.tensors :])
        return self.run(tensors, params)(*tensors)

    def _fake_entry(self, *args: Any) -> Any:
        return self._fake(args[: self.tensors], args[self.tensors :])

    # ---- entries

    def __call__(self, *args: Any) -> Any:
        """The differentiable call: tensors first, then every other argument."""
        if _is_compiling():
            return self.op(*args)
        n = self.tensors
        tensors, params = args[:n], args[n:]
        if direct():
            run = self.find(tensors, params)
            if run is None and all(t is None or _plain(t) for t in tensors):
                run = self.run(tensors, params)
            if run is not None:
                return self.apply(run, tensors, params)
        elif transforms_active():
            return self.setup.apply(*tensors, Opaque(params))
        if _grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            return self.light.apply(self._below(params), params, *tensors)
        with _below_autograd():
            return self.op(*args)

    def _below(self, params: tuple[Any, ...]) -> Callable[..., Any]:
        def run(*tensors: Any) -> Any:
            with _below_autograd():
                return self.op(*tensors, *params)

        return run

    def _autograd(self, *args: Any) -> Any:
        """The Autograd key: direct calls of the raw operator, and compiled graphs."""
        n = self.tensors
        tensors, params = args[:n], _hashable(args[n:])
        if forward_ad._current_level >= 0 and any(
            t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
        ):
            return self.setup.apply(*tensors, Opaque(params))
        if _grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            return self.light.apply(self._below(params), params, *tensors)
        with _below_autograd():
            return self.op(*args)

    # ---- vmap

    def _vmap(self, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        """Folds the vmapped dimension into the batch where only foldable tensors carry one; else a loop over it."""
        n, size = self.tensors, info.batch_size
        tensors, params = args[:n], args[n:]
        batched = [i for i in range(n) if tensors[i] is not None and in_dims[i] is not None]
        foldable = [i for i in self._fold if tensors[i] is not None]
        if size and self._fold_params is not None and batched == foldable:
            moved = list(tensors)
            for i in batched:
                t = tensors[i].movedim(in_dims[i], 0)
                moved[i] = t.reshape(t.shape[0] * t.shape[1], *t.shape[2:])
            out = self.op(*moved, *self._fold_params(params, size))
            results = out if isinstance(out, tuple) else (out,)
            unfolded = tuple(r.reshape(size, r.shape[0] // size, *r.shape[1:]) for r in results)
        else:
            parts = []
            for b in range(size):
                one = [t if d is None or t is None else t.select(d, b) for t, d in zip(tensors, in_dims, strict=False)]
                out = self.op(*one, *params)
                parts.append(out if isinstance(out, tuple) else (out,))
            if not parts:
                raise ValueError(f"cnnfast::{self.name}: vmap over a dimension of size 0")
            unfolded = tuple(torch.stack(column) for column in zip(*parts, strict=True))
        dims: Any = tuple(0 for _ in unfolded)
        return (unfolded, dims) if len(unfolded) > 1 else (unfolded[0], 0)


_CACHE_LIMIT = 4096


def _key(tensors: Sequence[Any], params: tuple[Any, ...]) -> Any:
    return (params, *[None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors])


def _hashable(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(tuple(v) if isinstance(v, list) else v for v in values)


def _functions(operator: Operator, differentiable: tuple[bool, ...], keeps: Any) -> tuple[Any, Any]:
    n = operator.tensors
    constant = [i for i, d in enumerate(differentiable) if not d]

    def kept(out: Any, tensors: Sequence[Any], params: tuple[Any, ...]) -> list[Any]:
        results = out if isinstance(out, tuple) else (out,)
        return [results[i] for i in keeps(tensors, params)] if keeps else []

    class Light(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, run: Callable[..., Any], params: tuple[Any, ...], *tensors: Any) -> Any:
            saved = operator._saves(ctx.needs_input_grad[2:])
            ctx.params = params
            ctx.metas = getattr(run, "metas", None) or metas(tensors)
            out = run(*tensors)
            inputs = [t if s else None for t, s in zip(tensors, saved, strict=True)]
            ctx.save_for_backward(*inputs, *kept(out, tensors, params)) if keeps else ctx.save_for_backward(*inputs)
            if constant:
                ctx.mark_non_differentiable(*[out[i] for i in constant])
                ctx.set_materialize_grads(False)  # or autograd makes zeros for them, at every call
            return out

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            needs = ctx.needs_input_grad[2:]
            return (None, None, *operator._backward(needs, gradients, ctx.saved_tensors, ctx.params, ctx.metas))

    class Setup(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return operator.op(*args[:n], *args[n].values)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.params = inputs[n].values
            saved = (*inputs[:n], *kept(output, inputs[:n], ctx.params))
            ctx.save_for_backward(*saved)
            ctx.save_for_forward(*saved)
            ctx.metas = metas(inputs[:n])
            ctx.strides = [o.stride() for o in (output if isinstance(output, tuple) else (output,))]
            if constant:
                ctx.mark_non_differentiable(*[output[i] for i in constant])

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            needs = ctx.needs_input_grad[:n]
            return (*operator._backward(needs, gradients, ctx.saved_tensors, ctx.params, ctx.metas), None)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            out = operator._jvp(tangents[:n], ctx.saved_tensors, ctx.params)
            if isinstance(out, tuple):
                return tuple(_laid_out(t, s) for t, s in zip(out, ctx.strides, strict=True))
            return _laid_out(out, ctx.strides[0])

    Light.__name__ = Light.__qualname__ = f"{operator.name}_light"
    Setup.__name__ = Setup.__qualname__ = f"{operator.name}_setup"
    return Light, Setup


def layouts(inputs: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """How the four-dimensional operands lie in memory: part of the problem, for cost models and explain."""

    def layout(t: Any) -> str:
        if t.is_contiguous(memory_format=torch.channels_last):
            return "nhwc"
        return "nchw" if t.is_contiguous() else "strided"

    return tuple((name, layout(t)) for name, t in inputs.items() if t is not None and t.dim() == 4)


def serve(
    problem: dispatch.Problem,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, dispatch.Meta],
    backend: str,
    strict: bool,
) -> Callable[..., Any]:
    """Selects an implementation for a problem and binds it to the tensors' layouts: what ``resolve`` ends with."""
    selection = dispatch.select(problem, forced=backend, strict=strict)
    given = {
        name: None if t is None else dispatch.Meta(tuple(t.shape), tuple(t.stride()), t.dtype)
        for name, t in inputs.items()
    }
    device = next(t.device for t in inputs.values() if t is not None)
    return dispatch.observed(selection, dispatch.bind(selection, given, outputs, device))


def _laid_out(tangent: Any, strides: tuple[int, ...]) -> Any:
    """A tangent in its primal's layout, which forward mode insists on."""
    if tangent is None or all(
        n == 1 or a == b for n, a, b in zip(tangent.shape, tangent.stride(), strides, strict=True)
    ):
        return tangent
    out = torch.empty_strided(tangent.shape, strides, dtype=tangent.dtype, device=tangent.device)
    if _functorch_active() or _key_included(
        _VMAP_MODE
    ):  # where a vmapped tangent can't be copied into a tensor that isn't
        return out.zero_().add(tangent)
    return out.copy_(tangent)


@functools.cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a CUDA device; None for others."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None
