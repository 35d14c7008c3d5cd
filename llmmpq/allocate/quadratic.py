"""The quadratic program solved: a feasible choice, and a certificate of how far from optimal it can be.

    minimise  constant + linear'x + x' gram x   over one option per unit within the limits      (see `program`)

1. Fold and pad (`program`); refuse what cannot fit.   2. Incumbents by annealing and exact moves (`search`).
3. The tightest convex form by a barrier (`shift`), bounded in between (`relax`), measured from the incumbent.
4. Branch and bound until the gap or the time is reached (`branch`).

Every bound is recomputed here from a point and prices, so it holds whatever stops the search: the gap, the clock or
the keyboard. Rejected: HiGHS's MILP on the product linearisation (exact, but minutes at 35 units of 4 options) and its
QP solver for the nodes (no batches, no warm start).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic

import numpy as np

from llmmpq.allocate.branch import Node, branch
from llmmpq.allocate.milp import solve_linear
from llmmpq.allocate.program import Program, Reduced, Solved, reduce_program
from llmmpq.allocate.relax import Convex, Relaxed, relax, settle_prices
from llmmpq.allocate.search import anneal, cheapest_start, mend, polish
from llmmpq.allocate.shift import Shifter, barrier_weights, centre, live_options, make_convex, make_positive
from llmmpq.errors import InfeasibleBudgetError

__all__ = ["Program", "Solved", "solve_program"]

# Losses that differ by less than this part are one loss: float64 sums of a few hundred thousand products.
SAME = 1e-9
ANNEAL_SEEDS = 3
ANNEAL_SWEEPS = 40
SHIFT_ROUNDS = 12
DEBUG = False


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


class Search:
    """What is known so far: the best choice, the best bound, and when to stop."""

    def __init__(
        self,
        program: Program,
        *,
        target_gap: float,
        deadline: float,
        on_progress: Callable[[float, float], None] | None,
    ) -> None:
        self.program = program
        self.reduced = reduce_program(program)
        self.target_gap = max(target_gap, 0.0)
        self.deadline = deadline
        self.on_progress = on_progress
        self.picked_U: np.ndarray | None = None
        self.loss = np.inf
        self.bound = -np.inf
        self.rounding = 0.0

    def late(self) -> bool:
        return monotonic() >= self.deadline

    def offer(self, picked_U: np.ndarray | None) -> None:
        if picked_U is None or not self.reduced.fits(picked_U):
            return
        loss = self.reduced.loss(picked_U)
        if self.picked_U is not None and loss > self.loss - 1e-13 * abs(self.loss):
            # Equal to rounding: the lexicographically smaller choice is the answer.
            if loss > self.loss + 1e-13 * abs(self.loss) or tuple(picked_U) >= tuple(self.picked_U):
                return
        self.picked_U, self.loss = picked_U.copy(), loss
        reduced = self.reduced
        terms = np.abs(reduced.self_N[picked_U]).sum() + np.abs(reduced.pair_NN[np.ix_(picked_U, picked_U)]).sum()
        self.rounding = 1e-14 * float(terms + abs(reduced.constant))
        self.tell()

    def raise_bound(self, bound: float) -> None:
        if bound > self.bound:
            self.bound = bound
            self.tell()

    def tell(self) -> None:
        if self.on_progress is not None and self.picked_U is not None:
            self.on_progress(self.loss, self.gap())

    def gap(self) -> float:
        away = self.loss - self.bound
        return 0.0 if away <= self.same(self.loss) else float(away / max(abs(self.loss), np.finfo(np.float64).tiny))

    def same(self, loss: float) -> float:
        return SAME * abs(loss) + self.rounding

    def cutoff(self, loss: float) -> float:
        """Bounds from here up leave nothing to look for."""
        return loss - max(self.target_gap * abs(loss), 0.5 * self.same(loss))

    def done(self) -> bool:
        return self.bound >= self.cutoff(self.loss)

    def solved(self, status: str) -> Solved:
        assert self.picked_U is not None
        choice = self.reduced.expand(self.picked_U, len(self.program.sizes))
        gap = self.gap()
        loss = self.program.loss(choice)
        if gap == 0.0:
            status = "optimal"
        return Solved(
            choice=choice, loss=loss, bound=float(min(self.bound, loss)), gap=gap, proven=gap == 0.0, status=status
        )


def _refuse_infeasible(program: Program, search: Search) -> None:
    over = [
        f"limit {k} is {limit:,}, but the smallest choice costs {int(program.smallest(k).sum()):,}"
        for k, limit in enumerate(program.limits)
        if int(program.smallest(k).sum()) > limit
    ]
    if over:
        raise InfeasibleBudgetError("; ".join(over) + ". Raise the limit to that, or allow cheaper options.")
    reduced = search.reduced
    if not len(reduced.free):
        return
    if reduced.allowed_UW.any(axis=1).all():
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
    reduced = search.reduced
    if reduced.num_units == 0:
        search.offer(np.zeros(0, dtype=np.int64))
        search.raise_bound(search.loss)
        return "optimal"
    barred = np.where(reduced.allowed_UW.reshape(-1), 0.0, np.inf)
    prices = np.zeros((1, len(reduced.limits)))
    shares = reduced.costs_KN / np.maximum(np.asarray(reduced.limits, dtype=np.float64), 1.0)[:, None]
    prices = settle_prices((reduced.self_N + barred)[None], shares_KN=shares, prices_BK=prices, width=reduced.width)
    separate = (reduced.self_N + barred + prices[0] @ shares).reshape(-1, reduced.width).argmin(axis=1)
    search.offer(mend(reduced, reduced.firsts + separate))
    for start in starts:
        search.offer(mend(reduced, reduced.shrink(start)))
    assert search.picked_U is not None
    search.offer(polish(reduced, search.picked_U, stop=search.late))
    if not reduced.pair_NN.any():
        return _run_separable(search)
    return _run_quadratic(search)


def _run_separable(search: Search) -> str:
    """No products between units: a multiple-choice knapsack, which HiGHS solves outright."""
    reduced = search.reduced
    options, bound = solve_linear(
        objective_N=reduced.self_N,
        costs_KN=reduced.costs_KN,
        limits=reduced.limits,
        allowed_UW=reduced.allowed_UW,
        time_limit_s=search.deadline - monotonic(),
    )
    if options is not None:
        found = mend(reduced, reduced.firsts + options)
        if found is not None:
            search.offer(polish(reduced, found, stop=lambda: False))
    search.raise_bound(reduced.constant + bound)
    return _status(search)


def _run_quadratic(search: Search) -> str:
    reduced = search.reduced
    assert search.picked_U is not None
    reference = search.picked_U
    matrix, change = centre(reduced, reference)
    live = live_options(reduced, reference)
    make_positive(matrix, live)
    convex = make_convex(reduced, picked_U=reference, matrix_NN=matrix, change_N=change)
    allowed = reduced.allowed_UW.reshape(1, -1)
    point = np.zeros((1, reduced.num_options))
    point[0, reference] = 1.0
    prices = settle_prices(
        np.where(allowed, convex.linear_N + 2 * matrix[reference].sum(axis=0), np.inf),
        shares_KN=convex.shares_KN,
        prices_BK=np.zeros((1, len(reduced.limits))),
        width=reduced.width,
    )
    relaxed = _relax_root(search, convex, allowed=allowed, point=point, prices=prices, sweeps=10)
    for seed in range(ANNEAL_SEEDS):
        if search.done() or search.late():
            return _status(search)
        found = anneal(
            reduced,
            picked_U=_rounded(reduced, relaxed),
            prices_K=relaxed.prices_BK[0],
            sweeps=ANNEAL_SWEEPS,
            seed=seed,
            stop=search.late,
        )
        mended = mend(reduced, found)
        if mended is not None:
            search.offer(polish(reduced, mended, stop=search.late))
    convex, relaxed = _tighten(search, convex, relaxed, live=live)
    if search.done() or search.late():
        return _status(search)
    _branch(search, convex, relaxed)
    return _status(search)


def _status(search: Search) -> str:
    if search.gap() == 0.0:
        return "optimal"
    return "gap" if search.done() or not search.late() else "time limit"


def _rounded(reduced: Reduced, relaxed: Relaxed) -> np.ndarray:
    return reduced.firsts + relaxed.point_BN[0].reshape(-1, reduced.width).argmax(axis=1)


def _penalty(relaxed_prices: np.ndarray, num_units: int) -> float:
    """One unit more or less of an average unit's cost moves the price by about twice itself."""
    return 2.0 * num_units * float(relaxed_prices.max(initial=0.0))


def _relax_root(
    search: Search, convex: Convex, *, allowed: np.ndarray, point: np.ndarray, prices: np.ndarray, sweeps: int
) -> Relaxed:
    reduced = search.reduced
    relaxed = relax(
        convex,
        allowed_BN=allowed,
        point_BN=point,
        prices_BK=prices,
        penalty=_penalty(prices, reduced.num_units),
        sweeps=sweeps,
    )
    search.raise_bound(float(relaxed.bound_B[0]))
    found = mend(reduced, _rounded(reduced, relaxed))
    if found is not None:
        search.offer(polish(reduced, found, stop=search.late))
    return relaxed


def _tighten(search: Search, convex: Convex, relaxed: Relaxed, *, live: np.ndarray) -> tuple[Convex, Relaxed]:
    """Barrier rounds; the convex program of the best bound, which branch and bound then uses."""
    reduced = search.reduced
    allowed = reduced.allowed_UW.reshape(1, -1)
    reference = np.setdiff1d(np.arange(reduced.num_options)[reduced.allowed_UW.reshape(-1)], live)
    change = convex.linear_N + np.diag(convex.matrix_NN)
    matrix = convex.matrix_NN.copy()
    best, best_relaxed = convex, relaxed
    shifter = Shifter(matrix, live, reduced.unit_of)
    barrier = 0.02 * max(abs(search.loss), search.rounding) / reduced.num_units
    weight = None
    for round_ in range(SHIFT_ROUNDS):
        if search.done() or search.late():
            break
        fresh = barrier_weights(reduced, point_N=relaxed.point_BN[0], reduced_N=relaxed.reduced_BN[0], barrier=barrier)
        weight = fresh if weight is None else 0.5 * (weight + fresh)
        shifter.sweep(weight_N=weight, barrier=barrier)
        proven = matrix.copy()
        make_positive(proven, live)
        convex = make_convex(reduced, picked_U=reference, matrix_NN=proven, change_N=change)
        relaxed = _relax_root(
            search, convex, allowed=allowed, point=relaxed.point_BN, prices=relaxed.prices_BK, sweeps=10
        )
        if relaxed.bound_B[0] > best_relaxed.bound_B[0]:
            best, best_relaxed = convex, relaxed
        if DEBUG:
            print(
                "  round",
                round_,
                f"mu {barrier:.3g} bound {relaxed.bound_B[0]:.6g} gap {search.gap():.5f}",
                monotonic(),
            )
        barrier *= 0.5
    return best, best_relaxed


def _branch(search: Search, convex: Convex, relaxed: Relaxed) -> None:
    reduced = search.reduced
    assert search.picked_U is not None

    def stop(bound: float, picked_U: np.ndarray, loss: float) -> bool:
        search.offer(picked_U)
        search.raise_bound(min(bound, search.cutoff(search.loss)) if bound > search.bound else bound)
        return search.late()

    root = Node(
        bound=float(relaxed.bound_B[0]),
        allowed_N=reduced.allowed_UW.reshape(-1),
        point_N=relaxed.point_BN[0].astype(np.float32),
        prices_K=relaxed.prices_BK[0],
    )
    picked, _, bound = branch(
        reduced,
        convex,
        root,
        penalty=_penalty(relaxed.prices_BK, reduced.num_units),
        incumbent_U=search.picked_U,
        incumbent_loss=search.loss,
        cutoff=search.cutoff,
        stop=stop,
    )
    search.offer(picked)
    search.raise_bound(bound)
