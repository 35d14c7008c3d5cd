"""A problem solved by each method, and the plan that a solution stands for.

The additive problem is a multiple-choice knapsack, solved to proven optimality as a HiGHS MILP:

    minimise  sum_uo loss_uo x_uo     subject to  sum_o x_uo = 1 for every unit,  sum_uo nbytes_uo x_uo <= budget

HiGHS works in floating point with tolerances, so its answer is checked in whole bytes and polished by exact single
and pair moves. Equal input gives an equal plan. The gap of the returned plan against HiGHS's dual bound is always
reported, also when the time limit ends the search first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import gcd

import numpy as np

from llmmpq.allocate.budget import describe, too_small
from llmmpq.allocate.milp import solve_linear
from llmmpq.allocate.problem import Problem, Unit
from llmmpq.allocate.quadratic import Program, solve_program
from llmmpq.allocate.shrink import believed
from llmmpq.errors import InfeasibleBudgetError
from llmmpq.records import Plan, PlannedLinear


@dataclass(frozen=True, kw_only=True)
class Solution:
    """An option index per unit, its loss, and how far from optimal it can be at most."""

    choice: tuple[int, ...]
    loss: float
    nbytes: int
    gap: float
    status: str = "gap"  # what ended the search: optimal, gap, time limit, interrupted


def solve(problem: Problem, budget_nbytes: int, *, time_limit_s: float) -> Solution:
    if budget_nbytes >= problem.largest_nbytes:
        return _solution(problem, [len(unit.losses) - 1 for unit in problem.units], bound=None)
    choice, bound = _solve_milp(problem, budget_nbytes, time_limit_s)
    if choice is None:
        choice = [0] * len(problem.units)
    _polish(problem, choice, budget_nbytes)
    return _solution(problem, choice, bound=bound)


def solve_quadratic(problem: Problem, budget_nbytes: int, *, target_gap: float, time_limit_s: float) -> Solution:
    """With all products between options; the plan measured around is one of the starts.

    What is minimised believes products by their reliability, and the gap is that program's. The loss is of all that was
    measured: the prediction for the probe.
    """
    assert problem.quadratic is not None
    program = to_program(problem, budget_nbytes)
    starts = [uniform(problem, budget_nbytes).choice]
    if (around := _measured_around(problem)) is not None:
        starts.append(around)
    solved = solve_program(program, target_gap=target_gap, time_limit_s=time_limit_s, starts=starts)
    choice = list(solved.choice)
    return Solution(
        choice=solved.choice,
        loss=_measured_loss(problem, choice),
        nbytes=_nbytes(problem, choice),
        gap=solved.gap,
        status=solved.status,
    )


def _measured_loss(problem: Problem, choice: Sequence[int]) -> float:
    quadratic = problem.quadratic
    assert quadratic is not None
    rows = [row for unit, option in zip(problem.units, choice, strict=True) for row in unit.rows[option]]
    return float(quadratic.constant + quadratic.linear_O[rows].sum() + quadratic.gram_OO[np.ix_(rows, rows)].sum())


def _measured_around(problem: Problem) -> tuple[int, ...] | None:
    """The plan that the quadratic model was measured around, as a choice: its rows are zero."""
    quadratic = problem.quadratic
    if quadratic is None or quadratic.base is None:
        return None
    zero_O = np.abs(quadratic.gram_OO).max(axis=1) == 0
    choice = [next((i for i, rows in enumerate(unit.rows) if zero_O[list(rows)].all()), None) for unit in problem.units]
    return None if None in choice else tuple(i for i in choice if i is not None)


def to_program(problem: Problem, budget_nbytes: int) -> Program:
    """The quadratic model over the units' options: members of a fused set move together."""
    quadratic = problem.quadratic
    assert quadratic is not None
    rows = [list(members) for unit in problem.units for members in unit.rows]
    gram_OO, linear_O = believed(quadratic)
    selection = np.zeros((len(rows), len(linear_O)))
    for position, members in enumerate(rows):
        selection[position, members] = 1.0
    return Program(
        sizes=tuple(len(unit.nbytes) for unit in problem.units),
        gram_OO=selection @ gram_OO @ selection.T,
        linear_O=selection @ linear_O,
        constant=quadratic.constant,
        costs_KO=np.array([[size for unit in problem.units for size in unit.nbytes]], dtype=np.int64),
        limits=(budget_nbytes,),
    )


def uniform(problem: Problem, budget_nbytes: int) -> Solution:
    """The widest width, or mean of widths, that fits everywhere (pinned units keep their pin)."""
    widths = sorted({bits for unit in problem.units for bits in unit.code_bits}, reverse=True)
    for bits in widths:
        choice = [max((i for i, own in enumerate(unit.code_bits) if own <= bits), default=0) for unit in problem.units]
        if _nbytes(problem, choice) <= budget_nbytes:
            return _solution(problem, choice, bound=None)
    return _solution(problem, [0] * len(problem.units), bound=None)


def check_feasible(problem: Problem, budget_nbytes: int, budget: dict[str, object]) -> None:
    smallest = problem.smallest_nbytes
    if smallest <= budget_nbytes:
        return
    num_weights = problem.num_weights
    pinned = [unit for unit in problem.units if unit.pinned]
    if "reserved" in budget:
        raise InfeasibleBudgetError(too_small(budget, smallest, pinned=bool(pinned)))
    pinned_nbytes = sum(unit.nbytes[0] for unit in pinned)
    overhead = smallest - sum(
        min(unit.code_bits) * member.num_weights / 8 for unit in problem.units for member in unit.members
    )
    binds = f"scales and zeros take {8 * overhead / num_weights:.2f} of them"
    if pinned:
        binds += (
            f", and {sum(len(unit.members) for unit in pinned)} pinned layers {8 * pinned_nbytes / num_weights:.2f}"
        )
    # Rounded up, so that the figure named is one that works.
    needed = -(-smallest * 8 * 1000 // num_weights) / 1000
    raise InfeasibleBudgetError(
        f"{describe(budget)} cannot be met: the smallest plan needs {needed:.3f} true bits per weight "
        f"({smallest:,} bytes); {binds}. Raise --avg-bits to {needed:.3f} or more, "
        f"{'use larger groups, or loosen the pins' if pinned else 'or use larger groups'}."
    )


def to_plan(
    problem: Problem, solution: Solution, *, method: str, budget: dict[str, object], measured: bool = True
) -> Plan:
    """The plan that a solution stands for. Without a measurement its loss means nothing and is left out."""
    chosen = {
        member.name: (member, unit.schemes[position])
        for unit, position in zip(problem.units, solution.choice, strict=True)
        for member in unit.members
    }
    order = sorted(chosen.values(), key=lambda item: item[0].block)
    return Plan(
        linears={
            spec.name: PlannedLinear(shape=spec.shape, block=spec.block, role=spec.role, scheme=scheme)
            for spec, scheme in order
        },
        method=method,
        budget=budget,
        predicted_loss=solution.loss if measured else None,
        optimality_gap=solution.gap if measured else None,
    )


def _solve_milp(problem: Problem, budget_nbytes: int, time_limit_s: float) -> tuple[list[int] | None, float]:
    units = problem.units
    unit_nbytes = reduce(gcd, (size for unit in units for size in unit.nbytes))
    width = max(len(unit.losses) for unit in units)
    losses_UW = np.zeros((len(units), width))
    costs_UW = np.zeros((len(units), width), dtype=np.int64)
    allowed_UW = np.zeros((len(units), width), dtype=bool)
    for i, unit in enumerate(units):
        num_options = len(unit.losses)
        losses_UW[i, :num_options], allowed_UW[i, :num_options] = unit.losses, True
        costs_UW[i, :num_options] = np.asarray(unit.nbytes) // unit_nbytes
    choice_U, bound = solve_linear(
        objective_N=losses_UW.reshape(-1),
        costs_KN=costs_UW.reshape(1, -1),
        limits=(budget_nbytes // unit_nbytes,),
        allowed_UW=allowed_UW,
        time_limit_s=time_limit_s,
    )
    return (None if choice_U is None else choice_U.tolist()), bound


def _polish(problem: Problem, choice: list[int], budget_nbytes: int) -> None:
    """Make the choice fit in whole bytes, then take every single or pair move that lowers the loss."""
    units = problem.units
    while _nbytes(problem, choice) > budget_nbytes:
        steps = [
            ((unit.losses[at - 1] - unit.losses[at]) / (unit.nbytes[at] - unit.nbytes[at - 1]), i)
            for i, (unit, at) in enumerate(zip(units, choice, strict=True))
            if at > 0
        ]
        choice[min(steps)[1]] -= 1
    improved = True
    while improved:
        improved = False
        slack = budget_nbytes - _nbytes(problem, choice)
        for i, unit in enumerate(units):
            for option in range(choice[i] + 1, len(unit.losses)):
                gain = unit.losses[choice[i]] - unit.losses[option]
                need = unit.nbytes[option] - unit.nbytes[choice[i]] - slack
                partner = _cheapest_give_back(units, choice, need=need, below=gain, exclude=i)
                if need <= 0 or partner is not None:
                    choice[i] = option
                    if partner is not None:
                        choice[partner[0]] = partner[1]
                    slack = budget_nbytes - _nbytes(problem, choice)
                    improved = True
                    break


def _cheapest_give_back(
    units: Sequence[Unit], choice: list[int], *, need: int, below: float, exclude: int
) -> tuple[int, int] | None:
    """The (unit, lower option) that frees at least `need` bytes at a loss below `below`, if any."""
    if need <= 0:
        return None
    best: tuple[float, int, int] | None = None
    for j, unit in enumerate(units):
        if j == exclude:
            continue
        for option in range(choice[j]):
            freed = unit.nbytes[choice[j]] - unit.nbytes[option]
            loss = unit.losses[option] - unit.losses[choice[j]]
            if freed >= need and loss < below * (1 - 1e-12) and (best is None or loss < best[0]):
                best = (loss, j, option)
    return None if best is None else best[1:]


def _nbytes(problem: Problem, choice: Sequence[int]) -> int:
    return sum(unit.nbytes[option] for unit, option in zip(problem.units, choice, strict=True))


def _solution(problem: Problem, choice: Sequence[int], *, bound: float | None) -> Solution:
    loss = sum(unit.losses[option] for unit, option in zip(problem.units, choice, strict=True))
    gap = 0.0 if bound is None or loss <= 0 else max(0.0, (loss - bound) / loss)
    # HiGHS's own tolerance: below it the bound and the loss are the same number.
    return Solution(choice=tuple(choice), loss=loss, nbytes=_nbytes(problem, choice), gap=0.0 if gap < 1e-7 else gap)
