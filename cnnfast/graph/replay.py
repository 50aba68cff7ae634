"""A program on a GPU as a CUDA graph: recorded at the second call of a kind, launched as a whole from then on.

A recording holds addresses, so it reads copies of its inputs, and its results are copied for the caller; constants lie where
they lie. Parameters that are inputs (``torch.compile``'s) are read in place: their addresses are a part of the kind.

The recordings of one network share a memory pool: what one of them works in is used by the others, too. So their launches
follow each other, on whatever stream each is called. What can't be recorded, or isn't worth it, runs step by step, and
:meth:`Replayed.lines` says why.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from cnnfast import settings
from cnnfast.graph.program import Program

MOST_RECORDINGS = 8  # of one network; the one that has been longest without a call goes first
_MOST_KINDS = 64  # that a program remembers
_SEEN = ""  # a kind that was called once: many sizes never come again
_one = threading.Lock()  # recording in this process at a time
_Result = TypeVar("_Result")


class Gpu:
    """What recording needs of ``torch.cuda``; tests put another in its place."""

    kind = "cuda"

    def recording(self) -> bool:
        """Whether somebody records the current stream already."""
        return torch.cuda.is_current_stream_capturing()

    def stream(self, device: torch.device) -> Any:
        """The current stream."""
        return torch.cuda.current_stream(device)

    def side_stream(self, device: torch.device) -> Any:
        """Another one."""
        return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def pool(self) -> Any:
        """Memory for recordings that never run at once."""
        return torch.cuda.graph_pool_handle()

    def warm_up(self, stream: Any, run: Callable[[], Any]) -> None:
        """Runs on a side stream, in order with the current one, so that compiling and the like isn't recorded."""
        current = torch.cuda.current_stream(stream.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            run()
        current.wait_stream(stream)

    def record(self, stream: Any, pool: Any, run: Callable[[], _Result]) -> tuple[Callable[[], None], _Result]:
        """What ``run`` launches as one launch, and the results, whose memory each launch writes."""
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(stream.device),
            torch.cuda.stream(torch.cuda.current_stream(stream.device)),  # restores it where recording fails
            # thread_local: other threads may do meanwhile what a recording may not
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            results = run()
        return graph.replay, results

    def mark(self, stream: Any) -> Any:
        """The present end of a stream."""
        return stream.record_event()

    def wait(self, stream: Any, mark: Any) -> None:
        """What follows on a stream comes after the mark."""
        stream.wait_event(mark)

    def uses(self, stream: Any, tensors: Sequence[torch.Tensor]) -> None:
        """Keeps the memory of tensors, once they are gone, until a stream is done with them."""
        for tensor in tensors:
            tensor.record_stream(stream)


@dataclasses.dataclass
class _Recording:
    launch: Callable[[], None]
    copies: list[tuple[int, torch.Tensor]]  # of which of the inputs
    results: list[Any]
    streams: set[Any]  # that it was called on


class Replays:
    """What the recordings of one network share: memory, an order, and how many there may be."""

    def __init__(self, gpu: Gpu | None = None) -> None:
        self.gpu = Gpu() if gpu is None else gpu
        self._lock = threading.Lock()
        # by device a stream to record on and a memory pool, which are one: memory of another stream isn't used again
        self._places: dict[torch.device, tuple[Any, Any]] = {}
        self._last: tuple[Any, Any] | None = None  # the stream of the last launch, and its end
        # weak, so that the memory goes with the network, not with the next collection of cycles
        self._recent: collections.OrderedDict[tuple[int, Any], weakref.ref[Replayed]] = collections.OrderedDict()

    def of(self, program: Program, fixed: Sequence[int] = ()) -> Program | Replayed:
        """The program as it is to be called; ``fixed``: inputs that are mostly the same tensors."""
        return Replayed(program, self, fixed) if program.device.type == self.gpu.kind else program

    def forget(self, replayed: Replayed) -> None:
        """Lets the recordings of a program go."""
        with self._lock:
            for key in [k for k in self._recent if k[0] == id(replayed)]:
                del self._recent[key]

    def call(self, owner: Replayed, kind: Any, inputs: Sequence[Any]) -> list[Any] | None:
        """The results of a call of a kind that is recorded, or is now; None where it can't be, and why is noted."""
        with self._lock, torch.no_grad():
            found = owner.kinds.get(kind)
            if found == _SEEN:
                found = owner.kinds[kind] = self._recorded(owner.program, owner.copied, inputs)
                if isinstance(found, _Recording):
                    self._keep(owner, kind)
            if not isinstance(found, _Recording):
                return None
            if (id(owner), kind) in self._recent:
                self._recent.move_to_end((id(owner), kind))
            return self._launch(owner.program, found, inputs)

    def _keep(self, owner: Replayed, kind: Any) -> None:
        self._recent[id(owner), kind] = weakref.ref(owner)
        if len(self._recent) > MOST_RECORDINGS:
            (_, oldest), ref = self._recent.popitem(last=False)
            its = ref()
            if its is not None:
                its.kinds[oldest] = f"{MOST_RECORDINGS} other kinds of input have been called since"

    def _recorded(self, program: Program, copied: Sequence[int], inputs: Sequence[Any]) -> _Recording | str:
        device, given, copies = program.device, list(inputs), []
        try:
            with torch.inference_mode(False), torch.no_grad():  # copies made under it could be written only under it
                for i in copied:
                    given[i] = torch.empty_like(inputs[i]).copy_(inputs[i])
                    copies.append((i, given[i]))
                if device not in self._places:
                    self._places[device] = self.gpu.side_stream(device), self.gpu.pool()
                stream, pool = self._places[device]
                with _one:
                    self.gpu.warm_up(stream, lambda: program(*given))
                    launch, results = self.gpu.record(stream, pool, lambda: program(*given))
        except Exception as error:  # whatever it is, running step by step shows it, or works
            self._places.pop(device, None)
            return f"{type(error).__name__} while recording: {str(error).strip().partition(chr(10))[0]}"
        return _Recording(launch, copies, results, {self.gpu.stream(device)})

    def _launch(self, program: Program, recording: _Recording, inputs: Sequence[Any]) -> list[Any]:
        stream = self.gpu.stream(program.device)
        if self._last is not None and self._last[0] != stream:
            self.gpu.wait(stream, self._last[1])
        if stream not in recording.streams:
            recording.streams.add(stream)
            self.gpu.uses(stream, [copy for _, copy in recording.copies])
        for i, copy in recording.copies:
            copy.copy_(inputs[i])
        recording.launch()
        results: dict[int, Any] = {}  # by place: what is returned twice is one tensor
        for (is_place, place), result in zip(program.outputs, recording.results, strict=True):
            if is_place and place not in results:
                results[place] = inputs[place] if place < len(inputs) else _copy(result)
        self._last = stream, self.gpu.mark(stream)
        return [results[value] if is_place else value for is_place, value in program.outputs]


def _copy(result: Any) -> Any:
    return result.clone() if isinstance(result, torch.Tensor) else result


class Replayed:
    """A program, called like it; any number of threads may."""

    def __init__(self, program: Program, replays: Replays, fixed: Sequence[int] = ()) -> None:
        self.program, self._replays = program, replays
        self._fixed = [i for i in program.reads if i in set(fixed)]
        self.copied = [i for i in program.reads if i not in set(fixed)]
        self.kinds: dict[Any, _Recording | str] = {}  # by strides and addresses: a recording, or why there is none

    def __call__(self, *inputs: Any) -> list[Any]:
        """The program's outputs, which are the caller's."""
        if self.program.waits or settings._observer is not None or self._replays.gpu.recording():
            return self.program(*inputs)
        strides = [inputs[i].stride() for i in self.copied]
        kind = (*strides, *[(inputs[i].data_ptr(), inputs[i].stride()) for i in self._fixed])
        state, results = self.kinds.get(kind), None
        if state is None:
            if len(self.kinds) >= _MOST_KINDS:
                self.kinds = {k: v for k, v in self.kinds.items() if isinstance(v, _Recording)}
            self.kinds[kind] = _SEEN
        elif state == _SEEN or isinstance(state, _Recording):
            results = self._replays.call(self, kind, inputs)
        return self.program(*inputs) if results is None else results

    def lines(self) -> Iterator[str]:
        """How it is called, and why not as a CUDA graph."""
        states = list(self.kinds.values())
        reasons = [self.program.waits] if self.program.waits else [s for s in states if isinstance(s, str) and s]
        recorded = sum(isinstance(s, _Recording) for s in states)
        if recorded:
            yield f"launched as a CUDA graph{'' if recorded == 1 else f', {recorded} by strides'}"
        elif not reasons:
            yield "a CUDA graph from the second call on"
        for reason in dict.fromkeys(reasons):
            yield f"no CUDA graph: {reason}"
