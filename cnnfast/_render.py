"""Rich tables as text: coloured on a terminal, plain where the output goes elsewhere."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence
from typing import Any


def as_text(renderable: Any, width: int | None = None, markup: bool = True) -> str:
    """A rich renderable as a string; ``width`` is the terminal's, or as wide as a pipe can take (200)."""
    from rich.console import Console

    terminal = sys.stdout is not None and sys.stdout.isatty()
    if width is None:
        width = shutil.get_terminal_size().columns if terminal else 200
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=terminal, legacy_windows=False, markup=markup).print(renderable)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def table(title: str, columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], caption: str = "") -> Any:
    """A rich table; ``columns`` are (heading, "left" | "right")."""
    from rich import box
    from rich.table import Table

    out = Table(
        title=title or None, caption=caption or None, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left",
        title_style="bold", pad_edge=False,
    )  # fmt: skip
    for heading, justify in columns:
        right = justify == "right"
        out.add_column(heading, justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in rows:
        out.add_row(*row)
    return out
