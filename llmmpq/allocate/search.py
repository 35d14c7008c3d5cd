"""Incumbents: heat-bath annealing at prices on the limits, then exact single and pair moves.

With field = self + 2 pair x (which leaves out a unit's own block), moving unit u from option p to a changes the loss
by field_a - field_p, and two moves together by their sum plus 2 (pair_ab - pair_aq - pair_pb + pair_pq). Annealing
draws each unit's option from exp(-(field + price cost) / temperature), by the Gumbel trick; prices follow the use of
the limits. The moves at the end keep to the limits in whole numbers. Seeds are fixed: equal input, equal answer.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llmmpq.allocate.program import Reduced
from llmmpq.allocate.relax import limit_shares

# Pair moves are tried among this many single moves of least priced change; all of them for small problems.
PAIR_CANDIDATES = 400
# Less than this part of the loss is rounding, not a gain.
SMALLEST_GAIN = 1e-12


def anneal(
    reduced: Reduced, *, picked_U: np.ndarray, prices_K: np.ndarray, sweeps: int, seed: int, stop: Callable[[], bool]
) -> np.ndarray:
    """A choice of low loss from `picked_U`; it may miss the limits by a little. Prices are of whole limits."""
    random = np.random.default_rng(seed)
    width, pair = reduced.width, reduced.pair_NN
    shares = limit_shares(reduced)
    barred = np.where(reduced.allowed_UW.reshape(-1), 0.0, np.inf)
    picked, prices = picked_U.copy(), prices_K.copy()
    field = reduced.self_N + 2 * pair[picked].sum(axis=0)
    used = shares[:, picked].sum(axis=1)
    priced = prices @ shares + barred
    # Where the loss of the best alternative is about this much above the choice's, both are drawn often.
    hottest = _typical_step(reduced, field + priced)
    for sweep in range(sweeps):
        if stop():
            break
        temperature = hottest * (1 - sweep / max(1, sweeps - 1)) ** 2
        noise = -temperature * np.log(-np.log(random.random(reduced.num_slots)))
        for unit in random.permutation(reduced.num_units):
            here = slice(unit * width, (unit + 1) * width)
            best = unit * width + int((field[here] + priced[here] - noise[here]).argmin())
            if best != picked[unit]:
                field += 2 * (pair[best] - pair[picked[unit]])
                used += shares[:, best] - shares[:, picked[unit]]
                picked[unit] = best
        prices = prices * np.exp(np.clip(10 * (used - 1.0), -0.05, 0.05))
        priced = prices @ shares + barred
    return picked


def _typical_step(reduced: Reduced, priced_field_N: np.ndarray) -> float:
    """Half the median over units of the priced change to the second-best option."""
    ordered = np.sort(priced_field_N.reshape(reduced.num_units, reduced.width), axis=1)
    steps = (ordered[:, 1] - ordered[:, 0])[np.isfinite(ordered[:, 1])]
    return 0.5 * float(np.median(steps)) if len(steps) else 0.0


def cheapest_start(reduced: Reduced) -> np.ndarray:
    """The choice of least cost on the first limit; it fits whenever a single limit can be met."""
    cost = reduced.costs_KN[0] if len(reduced.limits) else np.zeros(reduced.num_slots, dtype=np.int64)
    largest = np.iinfo(np.int64).max
    grid = np.where(reduced.allowed_UW, cost.reshape(reduced.num_units, reduced.width), largest)
    return reduced.firsts + grid.argmin(axis=1)


def mend(reduced: Reduced, picked_U: np.ndarray) -> np.ndarray | None:
    """Moves of least loss per unit of excess until the choice fits; None where no move lowers the excess."""
    picked = picked_U.copy()
    limits = np.asarray(reduced.limits, dtype=np.int64)
    unit_of, costs = reduced.unit_of, reduced.costs_KN
    weight = 1.0 / np.maximum(limits, 1)
    barred = ~reduced.allowed_UW.reshape(-1)
    field = reduced.self_N + 2 * reduced.pair_NN[picked].sum(axis=0)
    while True:
        used = costs[:, picked].sum(axis=1)
        excess = float((weight * np.maximum(used - limits, 0)).sum())
        if excess <= 0:
            return picked
        now = picked[unit_of]
        after = (weight[:, None] * np.maximum(used[:, None] + costs - costs[:, now] - limits[:, None], 0)).sum(axis=0)
        lowered = excess - after
        lowered[barred] = 0.0
        helps = lowered > 1e-15 * excess
        if not helps.any():
            return None
        change = field - field[now]
        # Moves that also lower the loss come first, the largest relief among them.
        rate = np.where(change <= 0, -lowered, change / np.maximum(lowered, 1e-300))
        best = int(np.where(helps, rate, np.inf).argmin())
        field += 2 * (reduced.pair_NN[best] - reduced.pair_NN[picked[unit_of[best]]])
        picked[unit_of[best]] = best


def polish(reduced: Reduced, picked_U: np.ndarray, *, stop: Callable[[], bool]) -> np.ndarray:
    """Best single move, else best pair of moves, until neither lowers the loss; `picked_U` must fit."""
    picked = picked_U.copy()
    limits = np.asarray(reduced.limits, dtype=np.int64)
    unit_of, costs, pair = reduced.unit_of, reduced.costs_KN, reduced.pair_NN
    barred = ~reduced.allowed_UW.reshape(-1)
    field = reduced.self_N + 2 * pair[picked].sum(axis=0)
    smallest = SMALLEST_GAIN * float(np.abs(reduced.self_N[picked]).sum())
    while not stop():
        now = picked[unit_of]
        change = field - field[now]
        more = costs - costs[:, now]
        room = limits - costs[:, picked].sum(axis=1)
        change[barred] = np.inf
        fitting = np.where((more <= room[:, None]).all(axis=0), change, np.inf)
        best = int(fitting.argmin())
        moves = [best] if fitting[best] < -smallest else _best_pair(reduced, picked, change, more, room, smallest)
        if not moves:
            break
        for move in moves:
            field += 2 * (pair[move] - pair[picked[unit_of[move]]])
            picked[unit_of[move]] = move
    return picked


def _best_pair(
    reduced: Reduced, picked: np.ndarray, change: np.ndarray, more: np.ndarray, room: np.ndarray, smallest: float
) -> list[int]:
    now = picked[reduced.unit_of]
    # The price at which giving back costs least makes the two halves of a swap comparable.
    share = more / np.maximum(np.asarray(reduced.limits), 1)[:, None]
    priced = change.copy()
    for k in range(len(share)):
        back = (share[k] < 0) & np.isfinite(change)
        price = max(0.0, float((change[back] / -share[k][back]).min())) if back.any() else 0.0
        priced += price / len(share) * share[k]
    priced[picked] = np.inf
    some = np.argsort(priced, kind="stable")[:PAIR_CANDIDATES]
    some = some[np.isfinite(priced[some])]
    if len(some) < 2:
        return []
    at = now[some]
    pair = reduced.pair_NN
    cross = pair[np.ix_(some, some)] - pair[np.ix_(some, at)] - pair[np.ix_(at, some)] + pair[np.ix_(at, at)]
    both = change[some][:, None] + change[some][None, :] + 2 * cross
    units = reduced.unit_of[some]
    both[units[:, None] == units[None, :]] = np.inf
    for k in range(len(room)):
        both[more[k, some][:, None] + more[k, some][None, :] > room[k]] = np.inf
    first, second = divmod(int(both.argmin()), len(some))
    return [int(some[first]), int(some[second])] if both[first, second] < -smallest else []
