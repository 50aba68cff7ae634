"""What the backends with a native module share: turning a kernel table into implementations and plans."""

from __future__ import annotations

import importlib
import importlib.util
import struct
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

from cnnfast.dispatch import Implementation, Kernel, Packing, Problem


def load(name: str, path: str = "") -> ModuleType:
    """The native module ``cnnfast.<name>``, or the one built at ``path``; ImportError where it can't be loaded."""
    if not path:
        return importlib.import_module(f"cnnfast.{name}")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Table:
    """A native module's kernel table: (stem, direction, dtype, variant) -> id, and how to pack its parameters."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.structs: dict[str, tuple[int, list[tuple[str, int]]]] = module.structs()
        self.ids: dict[tuple[str, str, str, str], int] = {}
        self.params: dict[int, str] = {}
        for id, (name, params) in enumerate(module.kernels()):
            stem, direction, dtype, *variant = name.split(".")
            self.ids[stem, direction, dtype, ".".join(variant)] = id
            self.params[id] = params

    def dtypes(self, stem: str, direction: str, variant: str = "") -> tuple[str, ...]:
        """The dtypes that a kernel is compiled for."""
        return tuple(k[2] for k in self.ids if k[0] == stem and k[1] == direction and k[3] == variant)

    def has(self, entry: str, stem: str, direction: str, variant: str = "") -> bool:
        """Whether a kernel has an entry beside its own: "pack", "unpack"."""
        return any(k[0] == stem and k[1] == direction and k[3] == _beside(entry, variant) for k in self.ids)

    def directions(self, stem: str) -> tuple[str, ...]:
        """The directions of a stem, each once, in the table's order."""
        return tuple(dict.fromkeys(k[1] for k in self.ids if k[0] == stem))

    def pack(self, id: int, fields: Mapping[str, int]) -> bytes:
        """The parameter struct of a kernel, packed by name from its field table."""
        size, layout = self.structs[self.params[id]]
        out = bytearray(size)
        for name, offset in layout:
            struct.pack_into("=q", out, offset, fields[name])
        return bytes(out)


def _beside(entry: str, variant: str) -> str:
    return f"{entry}.{variant}" if variant else entry


def implementation(
    table: Table,
    backend: str,
    op: str,
    stem: str,
    direction: str,
    variant: str,
    unsupported: Callable[[Problem], list[str]],
    caller: Callable[[Any, Problem], Kernel],
    **options: Any,
) -> Implementation:
    """An implementation over one stem and direction of a kernel table, for all dtypes it is compiled for.

    ``caller(call, problem)`` turns a native Call into a function over operands: how a backend gives stream, threads and
    workspace.
    """

    def node(problem: Problem, fields: Mapping[str, int]) -> tuple[int, bytes]:
        id = table.ids[stem, direction, problem.dtype, variant]
        return id, table.pack(id, fields)

    def bind(problem: Problem, fields: Mapping[str, int]) -> Kernel:
        return caller(table.module.Call(*node(problem, fields)), problem)

    def beside(entry: str, problem: Problem, fields: Mapping[str, int]) -> Any:
        id = table.ids[stem, direction, problem.dtype, _beside(entry, variant)]
        return table.module.Call(id, table.pack(id, fields))

    def prepare(problem: Problem, fields: Mapping[str, int]) -> Packing:
        call = beside("pack", problem, fields)

        def pack(operands: Sequence[torch.Tensor | None]) -> torch.Tensor:
            device = next(t.device for t in operands if t is not None)
            # the entry's workspace is its result; zeros, so that equal weights are equal bytes
            packed = torch.zeros(call.workspace, dtype=torch.uint8, device=device)
            call(addresses(operands), packed.data_ptr(), 0, torch.get_num_threads())
            return packed

        def unpack(packed: torch.Tensor, operands: Sequence[torch.Tensor | None]) -> None:
            given = addresses(operands)
            given += [0] * (table.module.PACKED_OPERAND - len(given)) + [packed.data_ptr()]
            beside("unpack", problem, fields)(given, 0, 0, torch.get_num_threads())

        return Packing(call.workspace, pack, unpack if table.has("unpack", stem, direction, variant) else None)

    return Implementation(
        name=".".join(part for part in (backend, stem, variant) if part),
        op=op,
        backend=backend,
        stem=stem,
        direction=direction,
        dtypes=table.dtypes(stem, direction, variant),
        unsupported=unsupported,
        bind=bind,
        node=node,
        prepare=prepare if table.has("pack", stem, direction, variant) else None,
        **options,
    )


def addresses(operands: Sequence[torch.Tensor | None]) -> list[int]:
    """The operands' addresses as a native Call takes them: 0 where absent."""
    return [0 if t is None else t.data_ptr() for t in operands]
