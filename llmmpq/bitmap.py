"""The bit map of a model, blocks by projections: its rows and names for any output, and a picture of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from llmmpq.errors import CheckpointError
from llmmpq.scheme import WIDTHS

Cells = tuple[frozenset[float], ...]
NOTHING = "-"
MAX_NUMBERED_BLOCKS = 100  # numbers in the cells of more rows than this could not be read


@dataclass(frozen=True, kw_only=True)
class BitMap:
    """The code widths of each block (a row) and role (a column), a mean for a matrix of several.

    A cell is empty where there is no quantized matrix.
    """

    roles: Sequence[str]
    blocks: Mapping[int, Cells]
    outside: Mapping[str, frozenset[float]]  # by role: an output head

    def merged(self) -> list[tuple[str, Cells]]:
        """Runs of equal blocks become one row, '4-11'."""
        merged = []
        for cells, run in groupby(self.blocks.items(), key=lambda item: item[1]):
            blocks = [block for block, _ in run]
            merged.append((str(blocks[0]) if len(blocks) == 1 else f"{blocks[0]}-{blocks[-1]}", cells))
        return merged


def bit_map(linears: Iterable[Mapping[str, Any]]) -> BitMap:
    """Blocks in rising order, roles in the order of the model."""
    roles: dict[str, None] = {}
    widths: dict[int, dict[str, set[float]]] = defaultdict(lambda: defaultdict(set))
    for linear in linears:
        roles[linear["role"]] = None
        widths[linear["block"]][linear["role"]].add(mean_bits(linear))
    apart = outside_blocks(widths)
    inside = {block: cells for block, cells in sorted(widths.items()) if block not in apart}
    columns = [role for role in roles if any(role in cells for cells in inside.values())]
    return BitMap(
        roles=columns,
        blocks={block: tuple(frozenset(cells[role]) for role in columns) for block, cells in inside.items()},
        outside={role: frozenset(found) for block in apart for role, found in widths[block].items()},
    )


def width_shares(linear: Mapping[str, Any]) -> list[tuple[int, float]]:
    """The widths in one matrix and the share of its groups that has each, the narrowest first."""
    bits = linear["bits"]
    if not isinstance(bits, Mapping):
        return [(bits, 1.0)]
    total = sum(bits.values())
    return sorted((int(width), count / total) for width, count in bits.items())


def mean_bits(linear: Mapping[str, Any]) -> float:
    """An int for a matrix of one width; six digits, so that it names an option as `report.json` does."""
    shares = width_shares(linear)
    return shares[0][0] if len(shares) == 1 else float(f"{sum(width * share for width, share in shares):.6g}")


def bits_text(bits: float) -> str:
    """A width, or a mean of widths with one decimal."""
    return str(bits) if isinstance(bits, int) else f"{bits:.1f}"


def narrower_width(bits: float) -> int:
    """The stored width whose colour a mean takes."""
    return max((width for width in WIDTHS if width <= bits), default=WIDTHS[0])


def outside_blocks(blocks: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """What a plan counts as one block after the last: it shares no role with any other."""
    last = max(blocks)
    others = {role for block, cells in blocks.items() if block != last for role in cells}
    return [last] if others and not others & set(blocks[last]) else []


def short_names(roles: Sequence[str]) -> list[str]:
    """Without a last part that they share: q_proj, down_proj -> q, down."""
    endings = {"_" + role.rpartition("_")[2] if "_" in role else "" for role in roles}
    short = [role.removesuffix(max(endings)) for role in roles] if len(endings) == 1 else []
    return short if all(short) and len(set(short)) == len(roles) > 1 else list(roles)


def as_text(shown: BitMap) -> str:
    """Lines of a fixed width, for a file."""
    rows = [["block", *short_names(shown.roles)]]
    rows += [[label, *map(_numbers, cells)] for label, cells in shown.merged()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines + [f"{role}: {_numbers(cell)}" for role, cell in shown.outside.items()])


def _numbers(widths: frozenset[float]) -> str:
    return "/".join(map(bits_text, sorted(widths))) or NOTHING


def draw(path: Path, shown: BitMap, *, title: str) -> bool:
    """Whether the picture was drawn: not without matplotlib."""
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure  # without pyplot: no window, no global state
    except ImportError:
        return False
    # Means, for cells with several matrices. Outside the map nothing is drawn where nothing is quantized.
    values = [[sum(cell) / len(cell) if cell else float("nan") for cell in cells] for cells in shown.blocks.values()]
    num_rows, num_columns = len(values), len(shown.roles)
    figure = Figure(figsize=(max(4.0, 1.5 + 0.7 * num_columns), min(30.0, 1.4 + 0.26 * num_rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="cividis", norm=LogNorm(2, 8), aspect="auto")  # cividis: the same to all eyes
    axes.set_xticks(range(num_columns), short_names(shown.roles))
    axes.xaxis.tick_top()
    step = max(1, round(num_rows / 40))
    axes.set_yticks(range(0, num_rows, step), [str(block) for block in list(shown.blocks)[::step]])
    axes.set_ylabel("block")
    axes.set_title(title)
    if num_rows <= MAX_NUMBERED_BLOCKS:
        for row, cells in enumerate(shown.blocks.values()):
            for column, cell in enumerate(cells):
                dark = bool(cell) and values[row][column] < 5  # the lower half of the colours is dark
                axes.text(
                    column,
                    row,
                    _numbers(cell),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if dark else "black",
                )
    else:
        figure.colorbar(image, label="bits")
    try:
        figure.savefig(path, dpi=120, metadata={"Software": None})  # without a version: equal maps, equal files
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from None
    return True
