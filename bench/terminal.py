"""Terminal output: with rich if it is installed, otherwise as plain text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

try:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    RICH = True
except ImportError:
    RICH = False

WIDTH = 170
"""Line width if the output is not a terminal."""


class Line(NamedTuple):
    """One row of a table; `new`: whether it starts a section."""

    cells: tuple[str, ...]
    new: bool = False
    bold: bool = False


class Terminal:
    """Prints lines, tables and progress."""

    def __init__(self) -> None:
        self._console = Console(width=None if sys.stdout.isatty() else WIDTH) if RICH else None

    def print(self, text: str, style: str | None = None) -> None:
        if self._console is None:
            print(text, flush=True)
        else:
            self._console.print(text, style=style)

    def table(self, title: str, headings: tuple[str, ...], words: int, lines: list[Line]) -> None:
        """The first `words` columns contain words and are left-aligned; the others contain numbers."""
        if self._console is None:
            print(_plain(title, headings, words, lines), flush=True)
            return
        table = Table(title=title, title_justify="left")
        for i, heading in enumerate(headings):
            table.add_column(heading, justify="left" if i < words else "right")
        for line in lines:
            if line.new:
                table.add_section()
            table.add_row(*line.cells, style="bold" if line.bold else None)
        self._console.print(table)

    @contextmanager
    def progress(self, total: int) -> Iterator[Callable[[str], None]]:
        """Yields a function to call with a description at the start of each of `total` items."""
        if self._console is None:
            yield lambda what: print(f"{what} ...", flush=True)
            return
        with Progress(console=self._console, transient=True) as progress:
            task = progress.add_task("", total=total)
            begun = 0

            def begin(what: str) -> None:
                nonlocal begun
                progress.update(task, description=what, completed=begun)
                begun += 1

            yield begin


def _plain(title: str, headings: tuple[str, ...], words: int, lines: list[Line]) -> str:
    rows = [headings, *(line.cells for line in lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = [title]
    for row in rows:
        cells = (
            f"{cell:<{width}}" if i < words else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)
