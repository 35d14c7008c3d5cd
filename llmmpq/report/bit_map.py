"""Grids of blocks x roles, cut into panels that stand side by side on a screen and below each other on a phone.

A cell holds runs, each a width and its share of the cell's weights, and is drawn as stripes of those shares. A matrix
of one width is one run; matrices of one block that have the same role share a cell.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmmpq.bitmap import bits_text, mean_bits, outside_blocks, short_names, width_shares

Linear = Mapping[str, Any]

MAX_PANEL_ROWS = 27  # three panels for 80 blocks: as many as fit beside each other


@dataclass(frozen=True, kw_only=True)
class Run:
    """A part of a matrix that has one width."""

    bits: int
    share: float


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is drawn for the matrices of one role in one block."""

    text: str
    title: str
    kind: str = ""  # a class of the style sheet
    runs: tuple[Run, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Neighbouring blocks: a label and a cell (or none) per role for each."""

    rows: tuple[tuple[int, tuple[Cell | None, ...]], ...]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All blocks, and the matrices that lie outside them (an output head)."""

    roles: tuple[str, ...]
    headers: tuple[str, ...]
    panels: tuple[Panel, ...]
    outside: tuple[tuple[str, Cell], ...] = ()


def bits_cell(linears: Sequence[Linear]) -> Cell:
    runs = runs_of(linears)
    text = str(runs[0].bits) if len(runs) == 1 else f"{sum(run.bits * run.share for run in runs):.1f}"
    title = "; ".join(f"{one['name']}: {bits_of(one)} bits, groups of {one['group_size']}" for one in linears)
    return Cell(text=text, title=title, kind=f"w{runs[0].bits}" if len(runs) == 1 else "", runs=runs)


def runs_of(linears: Iterable[Linear]) -> tuple[Run, ...]:
    """The widths of some matrices and the share of their weights that has each, the narrowest first."""
    weights: dict[int, float] = defaultdict(float)
    for linear in linears:
        for bits, share in width_shares(linear):
            weights[bits] += share * num_weights(linear)
    total = sum(weights.values())
    return tuple(Run(bits=bits, share=count / total) for bits, count in sorted(weights.items()))


def bits_of(linear: Linear) -> str:
    """The width of a matrix; where it has several, their mean and what share of the groups has each."""
    shares = width_shares(linear)
    if len(shares) == 1:
        return str(shares[0][0])
    parts = ", ".join(f"{100 * share:.0f} % {bits}" for bits, share in shares)
    return f"{bits_text(mean_bits(linear))} ({parts})"


def num_weights(linear: Linear) -> int:
    num_rows, num_columns = linear["shape"]
    return int(num_rows * num_columns)


def grid_of(linears: Sequence[Linear], make_cell: Callable[[Sequence[Linear]], Cell | None]) -> Grid:
    """Rows are blocks, columns are roles in the order of the model."""
    blocks: dict[int, dict[str, list[Linear]]] = defaultdict(lambda: defaultdict(list))
    for linear in linears:
        blocks[linear["block"]][linear["role"]].append(linear)
    outside = outside_blocks(blocks)
    roles = list(dict.fromkeys(linear["role"] for linear in linears if linear["block"] not in outside))
    rows = [
        (block, tuple(make_cell(cells[role]) if role in cells else None for role in roles))
        for block, cells in sorted(blocks.items())
        if block not in outside
    ]
    num_panels = -(-len(rows) // MAX_PANEL_ROWS)
    num_rows = -(-len(rows) // num_panels)
    apart = [(role, make_cell(found)) for block in outside for role, found in blocks[block].items()]
    return Grid(
        roles=tuple(roles),
        headers=tuple(short_names(roles)),
        panels=tuple(Panel(rows=tuple(rows[first : first + num_rows])) for first in range(0, len(rows), num_rows)),
        outside=tuple((role, cell) for role, cell in apart if cell is not None),
    )
