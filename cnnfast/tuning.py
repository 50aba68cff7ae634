"""Tiles measured on this machine: where they are kept, and how a call finds its own.

``python -m cnnfast tune NETWORK`` (:mod:`cnnfast.report.tune`) measures and writes; nothing else does. A call looks its
problem up once, when its kernel is launched for the first time; the launches after it repeat that one, so tuning costs a
call nothing. The file is read once a process.

A file holds what was found on one kind of card with one torch, Triton, cnnfast and one state of the kernels' source: another
card or version has another file. It is written whole and moved into place, under a lock, with what others wrote meanwhile;
so processes share it. One that can't be read, or isn't what it should be, is as good as none, with a warning; where none
can be written, what was found holds for the process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cnnfast import settings

FORMAT = 1
VARIABLE = "CNNFAST_TUNING"  # "off": what was measured isn't used


@dataclasses.dataclass(frozen=True)
class Entry:
    """What was found for one bucket of problems: the tile as its kernel's ``dump`` writes it, and seconds a call."""

    tile: Sequence[int]
    seconds: float
    before: float  # of the tile that was used until then

    @classmethod
    def of(cls, data: Any) -> Entry:
        """From JSON; ValueError where it is none."""
        try:
            tile, seconds, before = data["tile"], float(data["seconds"]), float(data["before"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"no entry: {error}") from error
        if not isinstance(tile, list):
            raise ValueError(f"no tile: {tile!r}")
        return cls(tile, seconds, before)


# ---- where it is kept ------------------------------------------------------------------------------------------------


def folder() -> Path:
    """The folder of the files."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("cnnfast")) / "tuning"


@functools.cache
def versions() -> Mapping[str, str]:
    """What an entry holds for beside the card."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    digest = hashlib.sha256()
    for path in sorted((Path(__file__).parent / "kernels").glob("*.py")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return {
        "torch": torch.__version__, "triton": triton, "cnnfast": sys.modules["cnnfast"].__version__, "kernels": digest.hexdigest()[:16],
    }  # fmt: skip


def file(card: str) -> Path:
    """The file of a card, by its name, and of these versions."""
    slug = re.sub(r"[^a-z0-9]+", "-", card.lower().replace("nvidia", "")).strip("-") or "card"
    mark = hashlib.sha256(json.dumps([card, FORMAT, versions()], sort_keys=True).encode()).hexdigest()[:12]
    return folder() / f"{slug}-{mark}.json"


def _header(card: str) -> dict[str, Any]:
    return {"format": FORMAT, "card": card, **versions()}


def _read(path: Path, card: str) -> dict[str, Entry]:
    """The entries of a file; none where there is no file, and, with a warning, where it isn't what it should be."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        for name, value in _header(card).items():
            if data[name] != value:
                raise ValueError(f"holds for {name} {data[name]!r}, not {value!r}")
        return {str(key): Entry.of(entry) for key, entry in data["entries"].items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        settings.warn_once(
            f"cnnfast: ignores the tuning file {path}: {reason}. `python -m cnnfast tune` writes it anew."
        )
        return {}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time, where the file system has locks; without one the last writer's merge counts."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path.with_suffix(".lock"), "a", encoding="utf-8") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield  # closing releases it


def store(card: str, found: Mapping[str, Entry]) -> bool:
    """Adds entries to a card's file, for this process at once; False, with a warning, where no file can be written."""
    _entries(card).update(found)
    path = file(card)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            merged = {**_read(path, card), **found}
            data = {**_header(card), "entries": {key: dataclasses.asdict(merged[key]) for key in sorted(merged)}}
            unfinished = path.with_suffix(f".{os.getpid()}.tmp")
            try:
                unfinished.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
                os.replace(unfinished, path)
            finally:
                unfinished.unlink(missing_ok=True)
    except OSError as error:
        settings.warn_once(f"cnnfast: what tuning found can't be kept in {path}: {error}. It holds for this process.")
        return False
    return True


_loaded: dict[str, dict[str, Entry]] = {}


def _entries(card: str) -> dict[str, Entry]:
    found = _loaded.get(card)
    if found is None:
        found = _loaded[card] = _read(file(card), card)
    return found


def lookup(card: str, key: str) -> Entry | None:
    """What was measured for a bucket on a card; None where nothing was, or CNNFAST_TUNING is off."""
    if os.environ.get(VARIABLE, "") in ("off", "0"):
        return None
    return _entries(card).get(key)


def forget() -> None:
    """Reads the files anew at the next look-up. Calls that were served before keep their tiles."""
    _loaded.clear()


def summary() -> dict[str, Any]:
    """For ``info``: the folder, and how many problems are kept there, for these versions and for others."""
    counts = {"entries": 0, "outdated": 0}
    for path in sorted(folder().glob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            current = path == file(str(data["card"]))
            counts["entries" if current else "outdated"] += len(data["entries"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            continue
    return {"path": str(folder()), **counts}


# ---- what can be tuned -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Task:
    """One kind of call that tuning may measure, as the backend noted it while a network ran.

    ``operands``: shape, strides, dtype and device of each, or None; ``bind(tile)``: the call in a tile, over operands.
    """

    key: str
    card: str
    label: str
    tiles: tuple[Any, ...]  # best first, as predicted
    before: Any  # the tile that serves now
    operands: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device] | None, ...]
    output: int  # which of the operands the call writes
    bind: Callable[[Any], Callable[[Sequence[torch.Tensor | None]], Any]]
    dump: Callable[[Any], list[int]]
    predicted: float  # seconds


_tasks: list[Task] | None = None


@contextlib.contextmanager
def collecting() -> Iterator[list[Task]]:
    """Collects the tunable calls of this process, of every thread: autograd has its own."""
    global _tasks
    before, _tasks = _tasks, []
    try:
        yield _tasks
    finally:
        _tasks = before


def note(task: Callable[[], Task]) -> None:
    """Notes a call for whoever collects."""
    if _tasks is not None:
        _tasks.append(task())
