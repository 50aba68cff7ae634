"""Reads Triton's IR: which loads and stores could leave their tensor because no mask depends on where they go.

An address is made of program numbers, scalars and ranges (``tl.arange``), one a dimension of the block. A tail is where a
range passes the end of its dimension, so the mask of an access must depend on every range that its address depends on.
What needs none says why: see ``PROVEN``. Whether a mask compares with the right number is for the guard bands of the
interpreter's tests; here it is about masks that aren't there.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

# Kernel -> (constant that is set, constant with the length of the range that needs no mask, why); one range an access.
PROVEN: dict[str, tuple[tuple[str, str, str], ...]] = {
    "_gather_gemm": (("EVEN_K", "BLOCK_K", "EVEN_K: blocks of the reduction divide the channels"),),
    "_multiply": (
        ("BLOCK_K", "BLOCK_K", "blocks of the reduction divide its depth, which transforms fill with zeros"),
    ),
}
SAFE = ("tt.descriptor_load", "tt.descriptor_store", "tt.descriptor_gather")  # the hardware knows the tensor's bounds
_VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")


@dataclasses.dataclass(eq=False)
class Value:
    """A result or an argument, and what it depends on."""

    text: str
    operands: list[Value] = dataclasses.field(default_factory=list)

    def ranges(self) -> set[Value]:
        """The ranges that it depends on."""
        found, seen, open_ = set(), {id(self)}, [self]
        while open_:
            value = open_.pop()
            if "tt.make_range" in value.text:
                found.add(value)
            for operand in value.operands:
                if id(operand) not in seen:
                    seen.add(id(operand))
                    open_.append(operand)
        return found


@dataclasses.dataclass(frozen=True)
class Access:
    """A load or a store."""

    text: str
    address: Value
    mask: Value | None


class _Reader:
    """Goes through the lines of a module once; a region is a scope of its own, whose names others may have, too."""

    def __init__(self, text: str) -> None:
        self._lines = [line.strip() for line in text.splitlines()]
        self._at = 0
        self.accesses: list[Access] = []
        self.safe = 0

    def region(self, scope: Mapping[str, Value]) -> list[list[Value]]:
        """Reads until its brace closes; returns what each of its yields passes on."""
        names = dict(scope)
        yields: list[list[Value]] = []
        while self._at < len(self._lines):
            line = self._lines[self._at]
            self._at += 1
            if line.startswith("}"):
                self._at -= line != "}" and "{" in line  # "} else {" opens the next one
                return yields
            if line.startswith(("scf.yield", "tt.reduce.return", "tt.scan.return", "scf.condition")):
                yields.append(self._values(line, names))
            elif line.startswith("^bb"):
                names.update((name, Value(line)) for name in re.findall(r"(%[\w$.-]+):", line))
            elif line:
                self._operation(line, names)
        return yields

    def _values(self, text: str, names: Mapping[str, Value]) -> list[Value]:
        found = []
        for name in _VALUE.findall(text):
            if name not in names:
                raise ValueError(f"{name} isn't defined where it is used: {text}")
            found.append(names[name])
        return found

    def _operation(self, line: str, names: dict[str, Value]) -> None:
        match = re.match(r"(%[\w$.-]+)(?::(\d+))? = (.*)", line)
        name, count, body = (match[1], int(match[2] or 1), match[3]) if match else ("", 0, line)
        kind = body.split()[0].strip('"')
        if kind in ("module", "tt.func"):
            inner = {**names, **{argument: Value(argument) for argument in re.findall(r"(%[\w$.-]+):", body)}}
            self.region(inner)
            return
        if kind == "scf.for":
            results = self._loop(body, names)
        elif kind == "scf.if":
            results = self._branches(body, names, count)
        else:
            results = self._plain(kind, body, names, count)
        for i, result in enumerate(results):
            names[name if count == 1 else f"{name}#{i}"] = result

    def _loop(self, line: str, names: Mapping[str, Value]) -> list[Value]:
        head = re.match(r"scf\.for (?:unsigned )?(%[\w$.-]+) = (\S+) to (\S+) step (\S+)(.*)", line)
        assert head, line
        bounds = self._values(" ".join(head.groups()[1:4]), names)
        carried = re.findall(r"(%[\w$.-]+) = (%[\w$.-]+(?:#\d+)?)", head[5])
        inner = {**names, head[1]: Value("loop", bounds)}
        arguments = [Value(argument, [names[start]]) for argument, start in carried]
        inner.update((argument, value) for (argument, _), value in zip(carried, arguments, strict=True))
        for passed in self.region(inner):
            for value, after in zip(arguments, passed, strict=True):
                value.operands.append(after)
        return arguments

    def _branches(self, line: str, names: Mapping[str, Value], count: int) -> list[Value]:
        results = [Value(line, self._values(line.split("->")[0], names)) for _ in range(count)]
        while True:
            for passed in self.region(names):
                for result, value in zip(results, passed, strict=True):
                    result.operands.append(value)
            if self._at < len(self._lines) and self._lines[self._at].startswith("} else {"):
                self._at += 1
                continue
            return results

    def _plain(self, kind: str, body: str, names: Mapping[str, Value], count: int) -> list[Value]:
        operands = self._values(body.split(" : ")[0], names)
        if kind in SAFE:
            self.safe += 1
        elif kind in ("tt.load", "tt.store") or kind.startswith("tt.atomic"):
            at = 1 if kind == "tt.load" else 2
            self.accesses.append(Access(body, operands[0], operands[at] if len(operands) > at else None))
        if body.endswith("{") or body.endswith("({"):  # a reduction: its region combines operands
            self.region(names)
        return [Value(body, operands) for _ in range(count)]


def accesses(text: str) -> tuple[list[Access], int]:
    """The loads and stores of a module, and the number of those that need no mask by their kind."""
    reader = _Reader(text)
    reader.region({})
    return reader.accesses, reader.safe


def _length(value: Value) -> int:
    match = re.search(r"end = (\d+)", value.text)
    return int(match[1]) if match else 0


def unmasked(text: str, kernel: str = "", constants: Mapping[str, Any] | None = None) -> Iterator[str]:
    """A sentence for every access of a module that could leave its tensor, and where there is none to check."""
    found, safe = accesses(text)
    if not found and not safe:
        yield "reads and writes nothing"
    constants = constants or {}
    proven = [constants[length] for flag, length, _ in PROVEN.get(kernel, ()) if constants.get(flag)]
    for access in found:
        held = access.mask.ranges() if access.mask is not None else set()
        free = sorted(_length(value) for value in access.address.ranges() - held)
        for length in proven:
            if length in free:
                free.remove(length)
        if free:
            yield f"no mask for the range(s) of {', '.join(map(str, free))}: {access.text}"
        elif access.mask is None and not access.address.ranges():
            yield f"a scalar without a mask: {access.text}"
