"""Rounds of the shift's barrier and the relaxation in turn, the barrier falling: the tightest convex form found.

In between, P may be a rounding error off positive: those relaxations guide the next round and offer choices, and only
the last, made positive and relaxed to the end, is believed as a bound.
"""

from __future__ import annotations

import numpy as np

from llmmpq.allocate.best import Search
from llmmpq.allocate.program import Part, Reduced
from llmmpq.allocate.relax import Convex, Relaxed, relax
from llmmpq.allocate.search import mend, polish
from llmmpq.allocate.shift import Shifter, barrier_weights, make_convex, make_positive

# More of them close less per second than branching does.
FIRST_ROUNDS = 6
LATER_ROUNDS = 4
ROUND_SWEEPS = 10
LAST_SWEEPS = 40
FIRST_BARRIER = 0.02  # of the loss of an average unit
LATER_BARRIER = 0.0025  # where the blocks come from an earlier tightening
BARRIER_FALL = 0.5  # faster, and the steps lose track: 0.35 ended with a third more gap
# A pass over every option costs the cube of their number; above this many, most passes are over the few that matter.
ALWAYS_ALL = 700
ALL_ROUND = 2
ACTIVE_OPTIONS = 5


def tighten(search: Search, part: Part, convex: Convex, relaxed: Relaxed, *, first: bool) -> tuple[Convex, Relaxed]:
    """The certified convex program of the better bound, the given one or a new one, and its relaxation."""
    reduced = part.reduced
    change = convex.linear_N + np.diag(convex.matrix_NN)
    matrix = convex.matrix_NN.copy()
    # Rows of the reference choice and of padding are zero.
    live = np.flatnonzero(matrix.any(axis=1))
    latest, constant = relaxed, convex.constant
    barrier = (FIRST_BARRIER if first else LATER_BARRIER) * max(abs(search.loss), search.rounding) / reduced.num_units
    weight, shifter, shifted_all = None, None, False
    for number in range(FIRST_ROUNDS if first else LATER_ROUNDS):
        if search.done() or search.late(spare_s=search.certify_s):
            break
        fresh = barrier_weights(reduced, point_N=latest.point_BN[0], reduced_N=latest.reduced_BN[0], barrier=barrier)
        weight = fresh if weight is None else 0.5 * (weight + fresh)
        shift_all = len(live) <= ALWAYS_ALL or number == ALL_ROUND
        if shifter is None or shift_all != shifted_all:
            active = np.full(len(live), True) if shift_all else _heaviest(reduced, weight)[live]
            shifter, shifted_all = Shifter(matrix, live_L=live, active=active, unit_of_N=reduced.unit_of), shift_all
        saved = matrix.copy()
        if not shifter.sweep(weight_N=weight, barrier=barrier):
            matrix = saved
            break
        between = make_convex(reduced, constant=constant, matrix_NN=matrix, change_N=change)
        latest = relax_root(search, part, between, latest, sweeps=ROUND_SWEEPS)
        barrier *= BARRIER_FALL
    make_positive(matrix, live)
    tightened = make_convex(reduced, constant=constant, matrix_NN=matrix, change_N=change)
    latest = relax_root(search, part, tightened, latest, sweeps=LAST_SWEEPS)
    search.raise_bound(float(latest.bound_B[0]))
    return (tightened, latest) if latest.bound_B[0] > relaxed.bound_B[0] else (convex, relaxed)


def relax_root(search: Search, part: Part, convex: Convex, begin: Relaxed, *, sweeps: int) -> Relaxed:
    """The whole relaxation from where another left off; its rounding is a candidate."""
    reduced = part.reduced
    relaxed = relax(
        convex,
        allowed_BN=reduced.allowed_UW.reshape(1, -1),
        point_BN=begin.point_BN,
        prices_BK=begin.prices_BK,
        penalty=penalty_of(begin, reduced.num_units),
        sweeps=sweeps,
    )
    found = mend(reduced, round_point(reduced, relaxed))
    if found is not None:
        search.offer(part.lift(polish(reduced, found, stop=search.late)))
    return relaxed


def round_point(reduced: Reduced, relaxed: Relaxed) -> np.ndarray:
    return reduced.firsts + relaxed.point_BN[0].reshape(-1, reduced.width).argmax(axis=1)


def penalty_of(relaxed: Relaxed, num_units: int) -> float:
    """One unit more or less of an average unit's cost moves a price by a fifth; ten times as much slows every pass."""
    return 0.2 * num_units * float(relaxed.prices_BK.max(initial=0.0))


def _heaviest(reduced: Reduced, weight_N: np.ndarray) -> np.ndarray:
    """The few options of each unit that the relaxation leans to."""
    rank = np.argsort(np.argsort(-weight_N.reshape(-1, reduced.width), axis=1, kind="stable"), axis=1)
    return rank.reshape(-1) < ACTIVE_OPTIONS
