"""From what a person asks for to a plan: budgets in bytes, feasibility before any work, plans from files."""

from __future__ import annotations

import json
from pathlib import Path

from llmmpq.allocate.problem import Problem, build_problem
from llmmpq.allocate.solve import check_feasible
from llmmpq.budgets import budget_of
from llmmpq.errors import RecipeError
from llmmpq.measure.pairs import MAX_NUM_PAIRS, count_pairs, count_passes
from llmmpq.model.checkpoint import write_text
from llmmpq.output import read_plan
from llmmpq.recipe import Budget
from llmmpq.records import EDITED, Plan, PlannedLinear, Sensitivity
from llmmpq.scheme import DTYPE_NBYTES
from llmmpq.session import Session


def check_budget(session: Session, wanted: Budget | None = None) -> None:
    """An error when no plan can meet the recipe's budget, or `wanted`."""
    budget = budget_of(session, wanted)
    if budget["kind"] != "bits":
        check_feasible(unmeasured_problem(session), budget["nbytes"], budget)
        if session.recipe.allocation.method == "pairs":
            check_every_pair(session)


def check_every_pair(session: Session) -> None:
    """Every pair by itself is only for few pairs, and for a model that fits in memory with all candidates."""
    if session.ranks.num > 1:
        raise RecipeError(
            f"allocation.method is pairs, which does not share its work, and {session.ranks.num} processes were "
            "started: start one, or use iqp"
        )
    if session.skeleton.head is not None:
        raise RecipeError("allocation.method is pairs, which does not try the output head: leave out --head-bits")
    measurement, linears, options = session.recipe.measurement, session.skeleton.linears, session.options()
    sizes = pair_sizes(session)
    num_pairs, num_forwards = count_pairs(sizes), count_passes(sizes) / len(sizes)
    itemsize = DTYPE_NBYTES["float32" if measurement.dtype == "auto" else measurement.dtype]
    nbytes = sum(spec.num_weights * (1 + len(options[spec.name])) * itemsize for spec in linears)
    allowed = measurement.memory_nbytes
    if num_pairs <= MAX_NUM_PAIRS and nbytes <= allowed:
        return
    reason = (
        f"at most {MAX_NUM_PAIRS:,} pairs are taken on"
        if num_pairs > MAX_NUM_PAIRS
        else f"weights and candidates take {nbytes / 1e9:.2g} GB, and measurement.memory is {allowed / 1e9:.2g} GB"
    )
    raise RecipeError(
        f"allocation.method is pairs, which runs every two candidates together: {len(linears)} linears with "
        f"{sum(map(sum, sizes))} options make {num_pairs:,} pairs, as much work as {num_forwards:,.0f} forwards of the "
        f"whole model over {measurement.tokens:,} tokens; {reason}. Use iqp, which gets all pairs from one forward per "
        "candidate, or --layer-only and fewer --widths."
    )


def pair_sizes(session: Session) -> list[list[int]]:
    """For each block, how many options each of its linears has."""
    options = session.options()
    return [[len(options[spec.name]) for spec in specs] for specs in session.skeleton.linears_by_block]


def unmeasured_problem(session: Session) -> Problem:
    """The problem with losses that only fall with the width: enough for sizes, feasibility and uniform plans."""
    options = session.options()
    budget, pins = session.recipe.budget, session.pins()
    if budget.bits is not None:
        pins = {"*": budget.bits} | dict(pins)
        options = {
            name: tuple(session.scheme(bits) for bits in sorted({budget.bits, *(s.bits for s in schemes if s.bits)}))
            for name, schemes in options.items()
        }
    sensitivity = Sensitivity(
        linears=session.skeleton.linears,
        options=options,
        losses={
            spec.name: tuple(4.0 ** -scheme.code_bits(spec.shape) for scheme in options[spec.name])
            for spec in session.skeleton.linears
        },
        num_tokens=0,
        digest="",
    )
    return build_problem(sensitivity, pins=pins, fuse=session.recipe.allocation.fuse)


def plan_from_file(path: Path, session: Session) -> Plan:
    plan = read_plan(path)
    specs = {spec.name: spec for spec in session.skeleton.linears}
    unknown, absent = sorted(set(plan.linears) - set(specs)), sorted(set(specs) - set(plan.linears))
    if unknown or absent:
        what = f"names {unknown[0]!r}, which the model lacks" if unknown else f"says nothing of {absent[0]!r}"
        raise RecipeError(f"{path} {what}: a plan must name every quantized linear of this model, and no other")
    for name, linear in plan.linears.items():
        if linear.shape != specs[name].shape:
            raise RecipeError(f"{path}: {name} has shape {list(linear.shape)}, in the model {list(specs[name].shape)}")
    # Only the schemes are a person's to change: where a linear lies is known from the model.
    ordered = {
        name: PlannedLinear(shape=spec.shape, block=spec.block, role=spec.role, scheme=plan.linears[name].scheme)
        for name, spec in specs.items()
    }
    budget = {"kind": "plan", "value": plan.bits_per_weight, "nbytes": plan.nbytes}
    return Plan(linears=ordered, method=EDITED, budget=budget)


def write_plan(path: Path, plan: Plan) -> None:
    write_text(path, json.dumps(plan.to_json(), indent=2) + "\n")
