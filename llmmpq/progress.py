"""How a long run speaks to a person: notes, and bars for tasks, on stderr so that stdout stays clean for results.

The library gets a `Progress` and never prints. `Silent` says nothing. `Terminal` draws bars where stderr is a
terminal; elsewhere (a log file, a pipe) it writes the notes alone, one line each, because redrawn bars would fill
a log with control characters. A task shows from its second second on, so that short ones never flicker.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars

SHOWN_AFTER_S = 1.0
MEMORY_EVERY_S = 0.5  # reading it costs a system call; nobody reads figures that change faster


class Progress(Protocol):
    """What a long-running function may say. Tasks may follow each other or be nested."""

    def note(self, text: str) -> None:
        """Something worth knowing that is not a warning about the result."""

    def task(self, label: str, total: int, unit: str = "") -> AbstractContextManager[Callable[[int], None]]:
        """`with progress.task("Quantizing", 32, "blocks") as advance:` and then `advance(n)` after n of them."""


class Silent:
    """Says nothing: for the library used from Python, and for --quiet."""

    def note(self, text: str) -> None:
        pass

    @contextmanager
    def task(self, label: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
        yield lambda num_done: None


class Once:
    """Hands everything on, but no note twice: several plans share one measurement and what it has to say."""

    def __init__(self, progress: Progress) -> None:
        self.task = progress.task
        self._progress = progress
        self._told: set[str] = set()

    def note(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._progress.note(text)


class Terminal:
    """Bars with count, time taken, time left and this process's memory; notes above them."""

    def __init__(self) -> None:
        self._bars: Bars | None = None  # shared by nested tasks: a terminal has room for one live display

    def note(self, text: str) -> None:
        if self._bars is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def task(self, label: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
        if not _draws_bars():
            yield lambda num_done: None
            return
        if self._bars is not None:
            with _bar(self._bars, label, total, unit) as advance:
                yield advance
            return
        started = time.monotonic()
        self._bars = _make_bars()
        try:
            with self._bars, _bar(self._bars, label, total, unit) as advance:
                yield advance
        finally:
            self._bars = None
        # The bar has gone; a line stays behind, so that the log of a run shows where its time went.
        if (seconds := time.monotonic() - started) >= SHOWN_AFTER_S:
            self.note(f"{label}: {_amount(total, unit)} in {duration(seconds)}")


def duration(seconds: float) -> str:
    """'8 s', '2 min 05 s', '3 h 07 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if seconds >= 10 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _amount(count: float, unit: str) -> str:
    from rich.filesize import decimal

    return decimal(int(count)) if unit == "bytes" else f"{count:.0f} {unit}".rstrip()


def _draws_bars() -> bool:
    # Not rich's own test: FORCE_COLOR makes it take a log file for a terminal.
    return sys.stderr.isatty() and not _console().is_dumb_terminal


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def _bar(bars: Bars, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    task = bars.add_task(label, total=total, unit=unit)
    try:
        yield lambda num_done: bars.advance(task, num_done)
    finally:
        bars.remove_task(task)


def _make_bars() -> Bars:
    import psutil
    from rich.filesize import decimal
    from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress
    from rich.table import Column, Table
    from rich.text import Text

    process = psutil.Process()

    class Memory(ProgressColumn):
        max_refresh = MEMORY_EVERY_S

        def render(self, task: Task) -> Text:
            return Text(decimal(process.memory_info().rss), style="dim")

    class Count(ProgressColumn):
        def render(self, task: Task) -> Text:
            unit = task.fields["unit"]
            return Text(
                f"{_amount(task.completed, 'bytes' if unit == 'bytes' else '')} of {_amount(task.total or 0, unit)}"
            )

    class Patient(RichProgress):
        """Draws the tasks that have been running for a while."""

        def get_renderables(self) -> Iterator[Table]:
            shown = [task for task in self.tasks if (task.elapsed or 0) >= SHOWN_AFTER_S]
            if shown:
                yield self.make_tasks_table(shown)

    return Patient(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=None),
        Count(Column(no_wrap=True)),
        TimeElapsedColumn(),
        TextColumn("left", style="dim"),
        TimeRemainingColumn(),
        Memory(Column(no_wrap=True)),
        console=_console(),
        transient=True,
        expand=True,
        redirect_stdout=False,  # rich would send what a caller prints to stdout to stderr
    )
