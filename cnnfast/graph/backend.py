"""``torch.compile(model, backend="cnnfast")``: what Dynamo captures, by the passes of :func:`cnnfast.fuse`.

Parameters are inputs of a graph there, so their changes are seen. ``options={"freeze": True}`` promises that they don't
change: then they are folded and packed as ``fuse`` does it, in graphs that record no gradients. A graph that records
gradients runs operator by operator on ours, forward and backward.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from cnnfast.graph.capture import value
from cnnfast.graph.constants import Constants
from cnnfast.graph.lower import erase_unused, lower
from cnnfast.graph.passes import optimise
from cnnfast.graph.program import Program, build
from cnnfast.graph.replay import Replayed, Replays
from cnnfast.graph.shared import Shared
from cnnfast.graph.training import train

_MOST_PROGRAMS = 32  # of a graph with symbolic shapes


def backend(
    module: fx.GraphModule, example_inputs: Sequence[Any], options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend that ``torch.compile`` knows as "cnnfast".

    Args:
        module: What Dynamo captured.
        example_inputs: Its inputs, parameters among them.
        options: ``{"freeze": True}``: the parameters never change again. Only graphs that record no gradients are frozen:
            call the compiled model under ``torch.no_grad()``. ``{"cuda_graph": False}``: on a GPU such graphs aren't
            recorded as CUDA graphs, see :func:`cnnfast.fuse`.
    """
    from torch._dynamo.backends.common import aot_autograd  # here, because it takes seconds to import

    given = {"freeze": False, "cuda_graph": True, **(options or {})}
    unknown = set(given) - {"freeze", "cuda_graph"}
    if unknown:
        raise ValueError(
            f"backend cnnfast: expected options out of freeze, cuda_graph, got {', '.join(sorted(unknown))}"
        )
    own = [*module.parameters(), *module.buffers()]  # they come first among the inputs of the lowered graph
    inputs = [*own, *example_inputs]

    def inference(graph_module: fx.GraphModule, fakes: Sequence[Any]) -> Callable[..., Any]:
        fixed = {}
        if len(fakes) == len(inputs):
            fixed = {i: t for i, t in enumerate(inputs) if i < len(own) or _is_parameter(t)}
        frozen = fixed if given["freeze"] else {}
        return _boxed(Compiled(graph_module, frozen, list(fixed), Replays() if given["cuda_graph"] else None))

    def recording(graph_module: fx.GraphModule, fakes: Sequence[Any]) -> Callable[..., Any]:
        train(graph_module.graph)
        graph_module.recompile()
        return _boxed(graph_module)

    compiler = aot_autograd(fw_compiler=recording, bw_compiler=recording, inference_compiler=inference)
    return compiler(module, example_inputs)


def _is_parameter(tensor: Any) -> bool:
    """A parameter or buffer of a module, as Dynamo marks them."""
    from torch._dynamo.utils import get_static_address_type

    return isinstance(tensor, torch.nn.Parameter) or (
        isinstance(tensor, torch.Tensor) and get_static_address_type(tensor) is not None
    )


def _boxed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Takes its arguments as one list, which it empties: so AOTAutograd lets go of them early."""

    def run(arguments: list[Any]) -> Any:
        given = list(arguments)
        arguments.clear()
        return function(*given)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


class Compiled:
    """A graph without gradients, planned at its first call; with symbolic shapes, for every set of them."""

    def __init__(
        self, module: fx.GraphModule, frozen: Mapping[int, torch.Tensor], fixed: Sequence[int] = (),
        replays: Replays | None = None,
    ) -> None:  # fmt: skip
        self._module, self._frozen = module, frozen
        self._fixed, self._replays = fixed, replays  # see Replays.of
        self._constants, self._shared = Constants(), Shared()
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        self._varying = [i for i, n in enumerate(placeholders) if _is_symbolic(n)]
        self._programs: dict[Any, tuple[Program | Replayed, list[Any]]] = {}
        self._lock = threading.Lock()

    def __call__(self, *inputs: Any) -> list[Any]:
        """The graph's outputs."""
        key = tuple(t.shape if isinstance(t := inputs[i], torch.Tensor) else t for i in self._varying)
        found = self._programs.get(key)
        if found is None:
            found = self._planned(key, inputs)
        run, strides = found
        return [_laid_out(t, s) for t, s in zip(run(*inputs), strides, strict=True)]

    def _planned(self, key: Any, inputs: Sequence[Any]) -> tuple[Program | Replayed, list[Any]]:
        with self._lock, torch.no_grad():
            found = self._programs.get(key)
            if found is None:
                graph = _concrete(self._module, inputs)
                strides = [_strides(n) for n in list(graph.nodes)[-1].args[0]]
                self._freeze(graph)
                reasons = lower(graph, self._constants)
                optimise(graph, self._constants)
                frozen = bool(self._frozen)
                program = build(graph, self._constants, reasons, self._shared, frozen, "backend cnnfast")
                if len(self._programs) >= _MOST_PROGRAMS:
                    for run, _ in self._programs.values():
                        if isinstance(run, Replayed) and self._replays is not None:
                            self._replays.forget(run)
                    self._programs.clear()
                run = program if self._replays is None else self._replays.of(program, self._fixed)
                found = self._programs[key] = run, strides
            return found

    def _freeze(self, graph: fx.Graph) -> None:
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        for i, node in enumerate(placeholders):
            if i in self._frozen and node.users:
                name = self._constants.add(f"input {i}", self._frozen[i].detach())
                with graph.inserting_after(placeholders[-1]):
                    constant = graph.get_attr(name)
                constant.meta["val"] = value(node)
                node.replace_all_uses_with(constant)
        for node in graph.nodes:
            if node.op == "get_attr" and str(node.target) not in self._constants:
                tensor = getattr(self._module, str(node.target))
                node.target = self._constants.add_unnamed(str(node.target), tensor)
        erase_unused(graph)


class _Recorder(fx.Interpreter):
    """Runs a graph and notes every value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def _concrete(module: fx.GraphModule, inputs: Sequence[Any]) -> fx.Graph:
    """A copy of the graph for inputs of these shapes, with numbers in the place of symbols."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    recorder = _Recorder(module)
    with mode:
        recorder.run(*[mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in inputs])
    numbers = (bool, int, float)
    copied = fx.Graph()
    names: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        found = recorder.values[node]
        if node.op == "placeholder" or node.op == "output" or not isinstance(found, numbers):
            names[node] = copied.node_copy(node, lambda n: names[n])
            names[node].meta["val"] = found
        if node.op != "output" and isinstance(found, numbers):
            names[node] = found
    return copied


def _is_symbolic(node: fx.Node) -> bool:
    val = node.meta.get("val")
    if isinstance(val, torch.Tensor):
        return any(not isinstance(n, int) for n in val.shape)
    return True


def _strides(output: Any) -> Any:
    return value(output).stride() if isinstance(output, fx.Node) and isinstance(value(output), torch.Tensor) else None


def _laid_out(result: Any, strides: Any) -> Any:
    """A result as eager torch would lay it out, which code after the graph may rely on."""
    if strides is None or not isinstance(result, torch.Tensor) or result.stride() == strides:
        return result
    if all(n <= 1 or a == b for n, a, b in zip(result.shape, result.stride(), strides, strict=True)):
        return result
    return torch.empty_strided(result.shape, strides, dtype=result.dtype, device=result.device).copy_(result)
