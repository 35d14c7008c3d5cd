"""Rows of `qbench.py` as a CSV that is also its memory, a table for the terminal, Markdown, and a plot."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

FIELDS = (
    "key",  # digest of everything that decides the figures but the code: a row with it is not made again
    "name",
    "tool",
    "version",
    "bits",
    "settings",
    "true_bits",
    "nbytes",
    "counted",
    "extra_nll",
    "extra_nll_error",
    "kl",
    "top1",
    "seconds",
    "notes",
    "model",
    "calibration",
    "evaluation",
    "commit",
    "torch",
    "transformers",
    "python",
    "machine",
    "date",
)
COLUMNS = ("competitor", "asked", "true bits", "extra NLL", "KL", "same top token", "seconds")
COLOURS = ("#1f6fb4", "#c1440e", "#2e8b57", "#8a2be2", "#b8860b", "#444444", "#d1478c", "#17a2a2", "#7f7f00", "#000080")
MARKERS = "osD^vP*Xh<>d8"  # of another length, so that no two of many curves look the same


def read_rows(path: Path) -> list[dict[str, str]]:
    """In the file's order, the last one of each key: a setting that was run again counts once."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        rows = {row["key"]: row for row in csv.DictReader(stream)}
    return list(rows.values())


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    is_new = not path.is_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=FIELDS)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def by_curve(rows: Sequence[Mapping[str, str]]) -> dict[str, list[Mapping[str, str]]]:
    """Curves in the order in which they first appear, points by true bits."""
    curves: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        curves.setdefault(row["name"], []).append(row)
    return {name: sorted(points, key=lambda row: float(row["true_bits"])) for name, points in curves.items()}


def _cells(row: Mapping[str, str]) -> tuple[str, ...]:
    number = lambda key: float(row[key])  # noqa: E731
    return (
        f"{row['name']} ({row['version']})",
        f"{number('bits'):g}",
        f"{number('true_bits'):.3f}",
        f"{number('extra_nll'):+.4f} ± {number('extra_nll_error'):.4f}",
        f"{number('kl'):.5f}",
        f"{100 * number('top1'):.1f} %",
        f"{number('seconds'):.0f}",
    )


def show(rows: Sequence[Mapping[str, str]], missing: Mapping[str, str], *, heading: str) -> None:
    console = Console(width=None if Console().is_terminal else 120)
    table = Table(title=heading, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == COLUMNS[0] else "right")
    for points in by_curve(rows).values():
        for row in points:
            table.add_row(*_cells(row))
        table.add_section()
    console.print(table)
    for what, reason in missing.items():
        console.print(f"missing: {what}: {reason}", markup=False, highlight=False)


def markdown(
    rows: Sequence[Mapping[str, str]], missing: Mapping[str, str], *, command: str, facts: Mapping[str, str]
) -> str:
    lines = [f"    {command}", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * (len(COLUMNS) - 1)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for points in by_curve(rows).values() for row in points]
    if missing:
        lines += ["", "Missing:", "", *(f"- {what}: {reason}" for what, reason in missing.items())]
    lines += ["", "Bytes counted:", ""]
    counted = {row["tool"]: row["counted"] for row in rows}
    lines += [f"- {tool}: {how}" for tool, how in counted.items()]
    notes = dict.fromkeys(f"{row['name']} at {row['bits']} bits: {note}" for row in rows for note in _notes(row))
    if notes:
        lines += ["", "Notes:", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def _notes(row: Mapping[str, str]) -> list[str]:
    return list(json.loads(row["notes"] or "[]"))


def draw(path: Path, rows: Sequence[Mapping[str, str]], *, title: str, floor_kl: float) -> None:
    """Extra NLL and KL against true bits, both on logarithmic axes, one curve for each name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5.4), layout="constrained")
    num_hidden = 0
    for number, (name, points) in enumerate(by_curve(rows).items()):
        ours = points[0]["tool"] == "ours"
        style = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "lw": 2.0 if ours else 1.0,
            "ms": 6 if ours else 4,
        }
        for axis, key in zip(axes, ("extra_nll", "kl"), strict=True):
            shown = [(float(row["true_bits"]), float(row[key])) for row in points if float(row[key]) > 0]
            num_hidden += len(points) - len(shown)
            axis.plot(*zip(*shown, strict=True) if shown else ([], []), label=name, **style)
    axes[1].axhline(floor_kl, lw=0.8, ls=":", color="black", label="original in bfloat16")
    labels = ("extra NLL (nats per token)", "KL from the original (nats per token)")
    for axis, label in zip(axes, labels, strict=True):
        axis.set(xlabel="true bits per weight, scales and zeros included", ylabel=label, yscale="log")
        axis.grid(visible=True, which="both", lw=0.3, alpha=0.5)
    axes[1].legend(frameon=False, fontsize=8)
    hidden = f"; not drawn, because not above zero: {num_hidden}" if num_hidden else ""
    figure.suptitle(title + hidden, fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
