"""The quadratic program solved: a feasible choice, and a certificate of how far from optimal it can be.

    minimise  constant + linear'x + x' gram x   over one option per unit within the limits      (see `program`)

1. Fold and pad (`program`); refuse what cannot fit.
2. Choices by annealing and exact moves (`search`); no products between units: HiGHS's MILP, and done (`milp`).
3. The tightest convex form (`shift`, `tighten`), options that its relaxation (`relax`) proves useless struck out, and
   both again on what is left, while that halves the gap.
4. Annealing on what is left, then branch and bound until the gap or the time is reached (`branch`).

Every bound is recomputed here from a point and prices, so it holds whatever stops the search: the gap, the clock or
the keyboard. An interrupt before the first relaxation leaves no bound: the gap is then infinite. The clock is looked at
between steps; the shortest run is one factorisation and one relaxation. Not used: HiGHS's MILP on the product
linearisation (in a prototype 6 to 110 s at 35 units of 4 options, against under a second here).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from time import monotonic

import numpy as np

from llmmpq.allocate.best import Search
from llmmpq.allocate.branch import Node, branch, within
from llmmpq.allocate.milp import solve_linear
from llmmpq.allocate.program import Part, Program, Solved, narrow
from llmmpq.allocate.relax import Convex, Relaxed, limit_shares, relax, settle_prices
from llmmpq.allocate.search import anneal, cheapest_start, mend, polish
from llmmpq.allocate.shift import centre, live_options, make_convex, make_positive
from llmmpq.allocate.tighten import (
    penalty_of,
    relax_root,
    round_point,
    tighten,
)
from llmmpq.errors import InfeasibleBudgetError

__all__ = ["Program", "Solved", "solve_program"]

PLAIN_SWEEPS = 10  # of a relaxation with the blocks at hand; more of them raise its bound hardly further
ANNEAL_SEEDS = 4
FIRST_ANNEAL_SWEEPS = 40
LAST_ANNEAL_SWEEPS = 200
# Tighten again while the last time left at most this part of the gap; after that, branching closes it faster.
WORTH_ANOTHER = 0.5


def solve_program(
    program: Program,
    *,
    target_gap: float,
    time_limit_s: float,
    starts: Sequence[Sequence[int]] = (),
    on_progress: Callable[[float, float], None] | None = None,
) -> Solved:
    """The best choice found; `starts` are choices to begin from, `on_progress` is told (loss, gap) at each gain."""
    search = Search(program, target_gap=target_gap, deadline=monotonic() + time_limit_s, on_progress=on_progress)
    try:
        _refuse_infeasible(program, search)
        status = _run(search, starts)
    except KeyboardInterrupt:
        if search.picked_U is None:
            raise
        status = "interrupted"
    return search.solved(status)


def _refuse_infeasible(program: Program, search: Search) -> None:
    over = [
        f"limit {k} is {limit:,}, but the smallest choice costs {int(program.smallest(k).sum()):,}"
        for k, limit in enumerate(program.limits)
        if int(program.smallest(k).sum()) > limit
    ]
    if over:
        raise InfeasibleBudgetError("; ".join(over) + ". Raise the limit to that, or allow cheaper options.")
    reduced = search.whole
    search.offer(cheapest_start(reduced))
    if search.picked_U is not None:
        return
    options, bound = solve_linear(
        objective_N=(reduced.costs_KN / np.maximum(np.asarray(reduced.limits), 1)[:, None]).sum(axis=0),
        costs_KN=reduced.costs_KN,
        limits=reduced.limits,
        allowed_UW=reduced.allowed_UW,
        time_limit_s=60.0,
    )
    if bound == np.inf or options is None:
        smallest = ", ".join(
            f"limit {k} is {limit:,} and needs {int(program.smallest(k).sum()):,}"
            for k, limit in enumerate(program.limits)
        )
        raise InfeasibleBudgetError(
            f"each limit can be met alone, but not all together: {smallest}. Raise one of them."
        )
    search.offer(reduced.firsts + options)


def _run(search: Search, starts: Sequence[Sequence[int]]) -> str:
    whole = search.whole
    for start in starts:
        search.offer(mend(whole, whole.firsts + np.asarray(start, dtype=np.int64)))
    part = narrow(whole, search.allowed_UW)
    assert part is not None
    if part.reduced.num_units == 0:
        search.offer(part.lift(np.zeros(0, dtype=np.int64)))
        search.raise_bound(search.loss)
        return "optimal"
    _first_choices(search, part)
    if not part.reduced.pair_NN.any():
        _solve_separable(search, part)
    else:
        _solve_coupled(search, part)
    if search.gap() == 0.0:
        return "optimal"
    return "time limit" if search.late() and not search.done() else "gap"


def _first_choices(search: Search, part: Part) -> None:
    """The best choice at prices that ignore products between units, and the best known so far, polished."""
    reduced = part.reduced
    shares = limit_shares(reduced)
    alone = np.where(reduced.allowed_UW.reshape(-1), reduced.self_N, np.inf)[None]
    prices = settle_prices(alone, shares_KN=shares, prices_BK=np.zeros((1, len(reduced.limits))), width=reduced.width)
    taken = (alone + prices @ shares).reshape(-1, reduced.width).argmin(axis=1)
    _offer(search, part, reduced.firsts + taken)
    assert search.picked_U is not None
    search.offer(polish(search.whole, search.picked_U, stop=search.late))


def _offer(search: Search, part: Part, picked_U: np.ndarray) -> None:
    mended = mend(part.reduced, picked_U)
    if mended is not None:
        search.offer(part.lift(polish(part.reduced, mended, stop=search.late)))


def _solve_separable(search: Search, part: Part) -> None:
    """No products between units: a multiple-choice knapsack, which HiGHS solves outright."""
    reduced = part.reduced
    taken, bound = solve_linear(
        objective_N=reduced.self_N,
        costs_KN=reduced.costs_KN,
        limits=reduced.limits,
        allowed_UW=reduced.allowed_UW,
        time_limit_s=search.deadline - monotonic(),
    )
    if taken is not None:
        _offer(search, part, reduced.firsts + taken)
    search.raise_bound(reduced.constant + bound)


def _solve_coupled(search: Search, part: Part) -> None:
    convex, relaxed = _relax_plainly(search, part)
    _anneal(search, part, relaxed, sweeps=FIRST_ANNEAL_SWEEPS)
    if search.done() or search.late():
        return
    first = True
    while True:
        before = search.gap()
        convex, relaxed = tighten(search, part, convex, relaxed, first=first)
        if search.done() or search.late():
            return
        smaller = _strike(search, part, convex, relaxed)
        if smaller is None:
            search.raise_bound(np.inf)
            return
        if smaller.reduced.num_units == 0:
            search.offer(smaller.lift(np.zeros(0, dtype=np.int64)))
            search.raise_bound(search.loss)
            return
        begin, part = _carried(part, relaxed, smaller), smaller
        convex, relaxed = _relax_plainly(search, part, begin=begin)
        if search.gap() > WORTH_ANOTHER * before:
            break
        first = False
    _anneal(search, part, relaxed, sweeps=LAST_ANNEAL_SWEEPS)
    _branch(search, part, convex, relaxed)


def _anneal(search: Search, part: Part, relaxed: Relaxed, *, sweeps: int) -> None:
    """From the rounded relaxation at its prices."""
    for seed in range(ANNEAL_SEEDS):
        if search.done() or search.late():
            return
        drawn = anneal(
            part.reduced,
            picked_U=round_point(part.reduced, relaxed),
            prices_K=relaxed.prices_BK[0],
            sweeps=sweeps,
            seed=seed,
            stop=search.late,
        )
        _offer(search, part, drawn)


def _carried(part: Part, relaxed: Relaxed, smaller: Part) -> np.ndarray:
    """The relaxed point on what is left; what weighed on struck options goes to the heaviest of their unit."""
    weight = np.zeros(int(max(part.slot_N.max(), smaller.slot_N.max())) + 1)
    weight[part.slot_N] = relaxed.point_BN[0]
    return within(weight[smaller.slot_N], smaller.reduced.allowed_UW)


def _relax_plainly(search: Search, part: Part, *, begin: np.ndarray | None = None) -> tuple[Convex, Relaxed]:
    """The relaxation with the blocks at hand, from the reference choice or the point `begin`."""
    reduced, begun = part.reduced, monotonic()
    reference = cheapest_start(reduced) if search.picked_U is None else _nearest(part, search.picked_U)
    matrix, change = centre(reduced, reference)
    make_positive(matrix, live_options(reduced, reference))
    convex = make_convex(reduced, constant=reduced.loss(reference), matrix_NN=matrix, change_N=change)
    point = np.zeros((1, reduced.num_slots))
    point[0, reference] = 1.0
    if begin is not None:
        point[0] = begin
    relaxed = relax(
        convex,
        allowed_BN=reduced.allowed_UW.reshape(1, -1),
        point_BN=point,
        prices_BK=np.zeros((1, len(reduced.limits))),
        penalty=0.0,
        sweeps=0,
    )
    relaxed = relax_root(search, part, convex, relaxed, sweeps=PLAIN_SWEEPS)
    search.raise_bound(float(relaxed.bound_B[0]))
    search.certify_s = max(search.certify_s, monotonic() - begun)
    return convex, relaxed


def _nearest(part: Part, whole_U: np.ndarray) -> np.ndarray:
    """The choice of the part that agrees with the whole's wherever that is still allowed."""
    reduced = part.reduced
    kept = (part.slot_N.reshape(-1, reduced.width) == whole_U[part.units][:, None]) & reduced.allowed_UW
    return reduced.firsts + kept.argmax(axis=1)


def _strike(search: Search, part: Part, convex: Convex, relaxed: Relaxed) -> Part | None:
    """The part without the options that the relaxation proves useless; its blocks are those of the convex program."""
    reduced, whole = part.reduced, search.whole
    cutoff = search.cutoff(search.loss)
    useless = relaxed.bound_B[0] + relaxed.reduced_BN[0] >= cutoff
    kept = part.slot_N[reduced.allowed_UW.reshape(-1) & ~useless]
    search.struck_at = min(search.struck_at, cutoff)
    allowed, blocks = np.zeros_like(whole.allowed_UW), whole.blocks_UWW.copy()
    allowed.reshape(-1)[kept] = True
    allowed.reshape(-1)[part.settled_U[part.settled_U >= 0]] = True
    for unit, row in enumerate(part.units):
        here = slice(unit * reduced.width, (unit + 1) * reduced.width)
        options = part.slot_N[here] - row * whole.width
        blocks[row][np.ix_(options, options)] = convex.matrix_NN[here, here]
    return narrow(replace(whole, blocks_UWW=blocks), allowed)


def _branch(search: Search, part: Part, convex: Convex, relaxed: Relaxed) -> None:
    reduced = part.reduced
    assert search.picked_U is not None
    root = Node(
        bound=float(relaxed.bound_B[0]),
        allowed_N=reduced.allowed_UW.reshape(-1),
        point_N=relaxed.point_BN[0].astype(np.float32),
        prices_K=relaxed.prices_BK[0],
    )

    def stop(bound: float) -> bool:
        search.raise_bound(bound)
        return search.late()

    def offer(picked_U: np.ndarray) -> float:
        search.offer(part.lift(picked_U))
        return search.cutoff(search.loss)

    bound = branch(
        reduced,
        convex,
        root,
        penalty=penalty_of(relaxed, reduced.num_units),
        cutoff=search.cutoff(search.loss),
        offer=offer,
        stop=stop,
    )
    search.raise_bound(bound)
