"""Rich tables as text: coloured on a terminal, plain where the output goes elsewhere."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any


def terminal_width() -> int:
    """The terminal's, or what the variable COLUMNS says; 200 where the output goes elsewhere."""
    return shutil.get_terminal_size((200, 50)).columns


def escape(text: str) -> str:
    """Text as markup that shows it as it is."""
    from rich.markup import escape

    return escape(text)


def as_text(renderable: Any, width: int | None = None, markup: bool = True) -> str:
    """A rich renderable as a string; ``width`` is by default :func:`terminal_width`."""
    from rich.console import Console

    terminal = sys.stdout is not None and sys.stdout.isatty()
    out = io.StringIO()
    console = Console(
        file=out, width=width or terminal_width(), force_terminal=terminal, legacy_windows=False, markup=markup,
        highlight=False,
    )  # fmt: skip
    console.print(renderable)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def width_of(column: tuple[str, str], cells: Sequence[str]) -> int:
    """Of a column of numbers with its separator, where headings and cells stand on as many lines as they have words."""
    return 3 + max(len(word) for text in (column[0], *cells) for word in text.split(" "))


class Fitted:
    """A rich table that is made narrower where it must be: numbers are broken at spaces only, text at any width."""

    def __init__(
        self, title: str, columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], caption: str, narrow: bool
    ) -> None:
        self.title, self.columns, self.rows, self.caption, self.narrow = title, columns, rows, caption, narrow

    def table(self, narrow: bool) -> Any:
        """The rich table; with ``narrow`` headings and numbers stand on as many lines as they have words."""
        from rich import box
        from rich.table import Table

        out = Table(
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            show_edge=False,
            show_header=any(heading for heading, _ in self.columns),
        )
        right = [justify == "right" for _, justify in self.columns]

        def cell(text: str, number: bool) -> str:
            return text.replace(" ", "\n") if number and narrow else text

        for (heading, _), number in zip(self.columns, right, strict=True):
            justify: Any = "right" if number else "left"
            out.add_column(cell(heading, number), justify=justify, no_wrap=number, overflow="fold")
        for row in self.rows:
            out.add_row(*(cell(text, number) for text, number in zip(row, right, strict=True)))
        return out

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """Title and caption as wide as the console; the table narrow where text would have less than a third of that."""
        from rich.text import Text

        needed = sum(
            max(console.measure(text).maximum for text in (heading, *(row[i] for row in self.rows))) + 3
            for i, (heading, justify) in enumerate(self.columns)
            if justify == "right"
        )
        if self.title:
            yield Text(self.title, style="bold")
        yield self.table(self.narrow or needed > options.max_width * 2 / 3)
        if self.caption:
            yield Text(self.caption)


def table(
    title: str,
    columns: Sequence[tuple[str, str]],
    rows: Sequence[Sequence[str]],
    caption: str = "",
    narrow: bool = False,
) -> Fitted:
    """A table for rich.

    Args:
        title: Above it, if any.
        columns: (heading, "left" for text | "right" for numbers); without any heading there is no head.
        rows: Cells, as markup.
        caption: Below it, if any.
        narrow: Break numbers and their headings at spaces, even where there is room.
    """
    return Fitted(title, columns, rows, caption, narrow)
