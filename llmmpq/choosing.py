"""From a budget to a plan: measure as the method asks, solve, and measure again around the plan while that helps.

Where a plan is measured around, what it is worth is its KL on the probe, measured with everything quantized one after
the other as it will be in the end; of all plans met on the way the one with the least measured KL is kept. Where no
more is done to the final model than to the plan that is measured around, that pass gives the figure too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from llmmpq.allocate.problem import Problem, build_problem
from llmmpq.allocate.solve import Solution, check_feasible, solve, solve_quadratic, to_plan, uniform
from llmmpq.budgets import budget_of
from llmmpq.job import Job
from llmmpq.measuring import (
    measure_around,
    measure_every_pair,
    measure_locally,
    measure_pairs,
    measured_as_final,
)
from llmmpq.planning import unmeasured_problem
from llmmpq.quantizing import probe_kl
from llmmpq.records import Plan, Sensitivity

# What is measured for each method, and whether the pairs count. `uniform` measures nothing.
METHODS: dict[str, tuple[Callable[[Job], Sensitivity], bool]] = {
    "iqp": (measure_pairs, True),
    "pairs": (measure_every_pair, True),
    "additive": (measure_pairs, False),
    "local": (measure_locally, False),
}

SEARCH_KNOBS = ("target_gap", "time_limit_s")


def choose_plan(job: Job, budget: dict[str, Any] | None = None) -> Plan:
    """The plan for the recipe's budget, or for another one, as `budget_of` gives it."""
    session, allocation = job.session, job.session.recipe.allocation
    budget = budget or budget_of(session)
    nbytes = budget["nbytes"]
    sensitivity = measured(job, budget)
    if sensitivity is None:
        problem = unmeasured_problem(session)
        solution = uniform(problem, nbytes)
        if budget["kind"] == "bits":
            budget["nbytes"] = solution.nbytes  # pins may ask for more or less than the width itself
        return to_plan(problem, solution, method="uniform", budget=budget, measured=False)
    for warning in sensitivity.warnings:
        job.progress.note(warning)
    plan = _solved(job, sensitivity, nbytes, budget, with_pairs=METHODS[allocation.method][1])
    # Refining goes by the quadratic model that `pairs` is there to be held against.
    refines = allocation.method == "iqp" and allocation.refine
    return _refined(job, plan, nbytes, budget) if refines else plan


def measured(job: Job, budget: dict[str, Any] | None = None) -> Sensitivity | None:
    """What the recipe's method measures, taken from the work folder the second time; None where nothing is measured."""
    method = job.session.recipe.allocation.method
    if (budget or budget_of(job.session))["kind"] == "bits" or method == "uniform":
        return None
    return METHODS[method][0](job)


def _solved(job: Job, sensitivity: Sensitivity, nbytes: int, budget: dict[str, object], *, with_pairs: bool) -> Plan:
    allocation = job.session.recipe.allocation
    problem = build_problem(sensitivity, pins=job.session.pins(), fuse=allocation.fuse, with_pairs=with_pairs)
    check_feasible(problem, nbytes, budget)
    solution = _solve_once(job, problem, nbytes, measured=sensitivity.digest)
    return to_plan(problem, solution, method=allocation.method, budget=budget)


def _solve_once(job: Job, problem: Problem, nbytes: int, *, measured: str) -> Solution:
    """The answer is kept: a search that the clock ended would end elsewhere the next time."""
    allocation = job.session.recipe.to_dict()["allocation"]
    inputs = {"measurement": measured, "pairs": problem.quadratic is not None, "nbytes": nbytes}
    inputs |= {"pins": job.session.pins()} | {key: allocation[key] for key in ("fuse", *SEARCH_KNOBS)}
    stage = job.work.stage("solve", inputs)
    known = stage.load_result()
    with suppress(TypeError, KeyError):  # none, or one that cannot be understood: solved again
        kept = Solution(**{**(known or {}), "choice": tuple((known or {})["choice"])})
        if len(kept.choice) == len(problem.units):
            return kept
    solution = job.session.ranks.from_first(lambda: _solve(job, problem, nbytes))
    if solution.status == "interrupted":
        job.progress.note(
            f"The search was interrupted: going on with the best plan so far, at most {solution.gap:.2%} from the "
            "best. Interrupt again to stop."
        )
        return solution
    if solution.status == "time limit":
        job.progress.note(
            f"The search was stopped after {allocation['time_limit_s']:g} s (allocation.time_limit_s): the plan is at "
            f"most {solution.gap:.2%} from the best for what was measured."
        )
    stage.save_result(dataclasses.asdict(solution))
    return solution


def _solve(job: Job, problem: Problem, nbytes: int) -> Solution:
    allocation = job.session.recipe.allocation
    if problem.quadratic is None:
        return solve(problem, nbytes, time_limit_s=allocation.time_limit_s)
    with job.progress.task("solve", 1, "program") as advance:
        solution = solve_quadratic(
            problem, nbytes, target_gap=allocation.target_gap, time_limit_s=allocation.time_limit_s
        )
        advance(1)
    return solution


def _refined(job: Job, plan: Plan, nbytes: int, budget: dict[str, object]) -> Plan:
    best, best_kl = plan, float("inf")
    for _ in range(job.session.recipe.allocation.refine):
        sensitivity = measure_around(job, plan)
        assert sensitivity.quadratic is not None
        measured = sensitivity.quadratic.base_kl if measured_as_final(job) else probe_kl(job, plan)
        if measured < best_kl:
            best, best_kl = replace(plan, measured_kl=measured), measured
        following = _solved(job, sensitivity, nbytes, budget, with_pairs=True)
        if _schemes(following) == _schemes(plan):
            return best
        plan = following
    measured = probe_kl(job, plan)
    return replace(plan, measured_kl=measured) if measured < best_kl else best


def _schemes(plan: Plan) -> dict[str, object]:
    return {name: linear.scheme for name, linear in plan.linears.items()}
