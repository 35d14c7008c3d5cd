"""Pieces that all tables on the terminal are made of: columns, labelled lines, alarms, sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

NOTHING = "-"


def size(nbytes: int) -> str:
    return decimal(int(nbytes), precision=2)


def columns(*headers: str, right: Iterable[int] | None = None, no_wrap: bool = False) -> Table:
    numeric = range(1, len(headers)) if right is None else right
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index, header in enumerate(headers):
        table.add_column(
            Text(header), justify="right" if index in numeric else "left", no_wrap=no_wrap, overflow="fold"
        )
    return table


def show_rows(console: Console, rows: Mapping[str, str | None]) -> None:
    console.print()
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in rows.items():
        if value is not None:
            grid.add_row(label, Text(str(value)))
    console.print(grid)
    console.print()


def show_alarms(console: Console, kind: str, sentences: Iterable[str]) -> None:
    style = {"problem": "bold red"}.get(kind, "bold yellow")
    for sentence in sentences:
        console.print(Text(f"{kind}: {sentence}", style=style), soft_wrap=True)


def say(console: Console, sentence: str) -> None:
    """A sentence is never cut into lines: file names in it stay whole for copying."""
    console.print(Text(sentence), soft_wrap=True)
