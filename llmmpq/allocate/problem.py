"""The allocation problem: units that choose one option each, what an option costs and what it loses.

A unit is one linear, or a fused set whose members must agree. Pins narrow a unit to one width. Without a quadratic
model the losses of the units add up; with one, the products between the options of all units count too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from llmmpq.errors import InfeasibleBudgetError, RecipeError
from llmmpq.patterns import matches
from llmmpq.records import LinearSpec, Quadratic, Scheme, Sensitivity


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Linears that take the same width, and their common options in rising order of bytes."""

    members: tuple[LinearSpec, ...]
    schemes: tuple[Scheme, ...]
    nbytes: tuple[int, ...]
    losses: tuple[float, ...]
    rows: tuple[tuple[int, ...], ...] = field(default=(), compare=False)  # each option's, in the quadratic model
    pinned: bool = False

    @property
    def code_bits(self) -> tuple[float, ...]:
        """Of each option; a mean where its groups have several widths."""
        return tuple(scheme.code_bits(self.members[0].shape) for scheme in self.schemes)

    @property
    def name(self) -> str:
        return self.members[0].name if len(self.members) == 1 else self.members[0].fused_set


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Choose one option of every unit: least loss within a number of bytes."""

    units: tuple[Unit, ...]
    quadratic: Quadratic | None = None

    @property
    def num_weights(self) -> int:
        return sum(member.num_weights for unit in self.units for member in unit.members)

    @property
    def smallest_nbytes(self) -> int:
        return sum(min(unit.nbytes) for unit in self.units)

    @property
    def largest_nbytes(self) -> int:
        return sum(max(unit.nbytes) for unit in self.units)


def build_problem(
    sensitivity: Sensitivity, *, pins: Mapping[str, int], fuse: bool, with_pairs: bool = False
) -> Problem:
    pinned = match_pins(sensitivity.linears, pins)
    sets: dict[str, list[LinearSpec]] = {}
    for spec in sensitivity.linears:
        sets.setdefault(spec.fused_set if fuse else spec.name, []).append(spec)
    starts, total = {}, 0
    for spec in sensitivity.linears:
        starts[spec.name] = total
        total += len(sensitivity.options[spec.name])
    return Problem(
        units=tuple(
            _build_unit(tuple(members), sensitivity, pinned, starts, with_pairs=with_pairs) for members in sets.values()
        ),
        quadratic=sensitivity.quadratic if with_pairs else None,
    )


def match_pins(linears: Iterable[LinearSpec], pins: Mapping[str, int]) -> dict[str, int]:
    """Linear name -> pinned width. Later patterns win; one that matches nothing is an error.

    A pattern may name the whole linear or leave out what stands before the list of blocks: `layers.0.*`.
    """
    specs = list(linears)
    pinned: dict[str, int] = {}
    for pattern, bits in pins.items():
        matching = [spec.name for spec in specs if matches(pattern, spec.name)]
        if not matching:
            raise RecipeError(f"pin {pattern!r} matches no linear; names look like {specs[0].name!r}")
        pinned |= dict.fromkeys(matching, bits)
    return pinned


def _build_unit(
    members: tuple[LinearSpec, ...],
    sensitivity: Sensitivity,
    pinned: Mapping[str, int],
    starts: Mapping[str, int],
    *,
    with_pairs: bool,
) -> Unit:
    wanted = {pinned[spec.name] for spec in members if spec.name in pinned}
    if len(wanted) > 1:
        raise InfeasibleBudgetError(
            f"{members[0].fused_set} must agree on one width, but its members are pinned to {sorted(wanted)}. "
            "Pin them alike, or leave out --fuse."
        )
    by_width = []
    for spec in members:
        options = sensitivity.options[spec.name]
        by_width.append({scheme.code_bits(spec.shape): position for position, scheme in enumerate(options)})
    shared = set.intersection(*(set(widths) for widths in by_width))
    if not wanted <= shared:
        raise InfeasibleBudgetError(
            f"{members[0].fused_set} must agree on one width, but not all of its members were measured at the pinned "
            f"{sorted(wanted)[0]} bits. Pin them alike, or leave out --fuse."
        )
    common = sorted(wanted or shared)
    schemes: list[Scheme] = []
    nbytes: list[int] = []
    losses: list[float] = []
    rows: list[tuple[int, ...]] = []
    for bits in common:
        chosen = [widths[bits] for widths in by_width]
        loss = sum(sensitivity.losses[spec.name][position] for spec, position in zip(members, chosen, strict=True))
        # An option that costs more and loses no less is never the answer (pairs may say otherwise): dropping it also
        # settles ties.
        if losses and loss >= losses[-1] and not with_pairs:
            continue
        schemes.append(sensitivity.options[members[0].name][chosen[0]])
        nbytes.append(
            sum(
                sensitivity.options[spec.name][position].nbytes(spec.shape)
                for spec, position in zip(members, chosen, strict=True)
            )
        )
        losses.append(loss)
        rows.append(tuple(starts[spec.name] + position for spec, position in zip(members, chosen, strict=True)))
    return Unit(
        members=members,
        schemes=tuple(schemes),
        nbytes=tuple(nbytes),
        losses=tuple(losses),
        rows=tuple(rows),
        pinned=bool(wanted),
    )
