"""The continuous relaxation of a convexified program, for many subproblems at once, with bounds that hold.

A `Convex` program equals the original on every one-hot x:

    loss(x) = constant + linear'x + x' P x,   P positive semidefinite

Relaxed to the simplices of the units, its minimum is a lower bound, and so is every linearisation of it at any z with
any prices >= 0 on the limits (costs are divided by their limit):

    loss(x) >= constant - z'Pz + sum over units of min over options (g + prices costs) - sum of prices,
    g = linear + 2Pz

which is how bounds are computed here: from z and the prices alone, whatever became of the iterations that found them.
Those are block coordinate descent: one unit at a time moves weight from its worst used to its best option by the exact
step, for all subproblems of the batch together; the limits stand in an augmented Lagrangian. Projected
gradients and Frank-Wolfe would treat all units at once, but every step of theirs is a pass over P.

Shapes: B subproblems, N = U W options, K limits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmmpq.allocate.program import Reduced

PAIR_STEPS = 2  # moves within a unit before the gradient of the others is renewed
PRICE_STEPS = 30  # halvings of the bracket of a price
SETTLED = 1e-7  # a pass that moves no more weight than this, and no price by a larger part, is the last


@dataclass(frozen=True, kw_only=True)
class Convex:
    num_units: int
    width: int
    matrix_NN: np.ndarray
    linear_N: np.ndarray
    constant: float
    shares_KN: np.ndarray  # costs divided by their limit


@dataclass(frozen=True, kw_only=True)
class Relaxed:
    point_BN: np.ndarray
    prices_BK: np.ndarray
    bound_B: np.ndarray
    reduced_BN: np.ndarray  # how far the bound rises when the option is forced; inf where it is not allowed


def limit_shares(reduced: Reduced) -> np.ndarray:
    limits = np.maximum(np.asarray(reduced.limits, dtype=np.float64), 1.0)
    return reduced.costs_KN / limits[:, None]


def relax(
    convex: Convex, *, allowed_BN: np.ndarray, point_BN: np.ndarray, prices_BK: np.ndarray, penalty: float, sweeps: int
) -> Relaxed:
    """At most `sweeps` passes over the units from `point_BN`, which must be one of the allowed mixtures."""
    matrix, shares, width = convex.matrix_NN, convex.shares_KN, convex.width
    point, prices = point_BN.copy(), prices_BK.copy()
    rows = np.arange(len(point))
    gradient = convex.linear_N + 2 * point @ matrix
    excess = point @ shares.T - 1.0
    barred = np.where(allowed_BN, 0.0, np.inf)
    places = [slice(start, start + width) for start in range(0, convex.num_units * width, width)]
    curves = [2 * matrix[at, at] + penalty * (shares[:, at].T @ shares[:, at]) for at in places] if sweeps else []
    for _ in range(sweeps):
        furthest = 0.0
        for here, curve in zip(places, curves, strict=True):
            mine = point[:, here].copy()
            slope = gradient[:, here] + np.maximum(prices + penalty * excess, 0.0) @ shares[:, here]
            for _ in range(PAIR_STEPS):
                best = (slope + barred[:, here]).argmin(axis=1)
                worst = np.where(mine > 0, slope, -np.inf).argmax(axis=1)
                drop = slope[rows, worst] - slope[rows, best]
                bend = curve[best, best] + curve[worst, worst] - 2 * curve[best, worst]
                held = mine[rows, worst]
                step = np.where(bend * held > drop, drop / np.maximum(bend, 1e-300), held)
                mine[rows, worst] -= step
                mine[rows, best] += step
                slope += step[:, None] * (curve[best] - curve[worst])
            moved = mine - point[:, here]
            if moved.any():
                gradient += 2 * (moved @ matrix[here])
                excess += moved @ shares[:, here].T
                point[:, here] = mine
                furthest = max(furthest, float(np.abs(moved).max()))
        before, prices = prices, np.maximum(prices + penalty * excess, 0.0)
        if furthest <= SETTLED and (np.abs(prices - before) <= SETTLED * prices).all():
            break
    return _certify(convex, allowed_BN=allowed_BN, point_BN=point, prices_BK=prices)


def _certify(convex: Convex, *, allowed_BN: np.ndarray, point_BN: np.ndarray, prices_BK: np.ndarray) -> Relaxed:
    """The bound of the linearisation at the point, each price in turn set to its best."""
    product = point_BN @ convex.matrix_NN
    gradient = np.where(allowed_BN, convex.linear_N + 2 * product, np.inf)
    offset = convex.constant - (point_BN * product).sum(axis=1)
    prices = settle_prices(gradient, shares_KN=convex.shares_KN, prices_BK=prices_BK, width=convex.width)
    priced = gradient + prices @ convex.shares_KN
    grid = priced.reshape(len(priced), convex.num_units, convex.width)
    lowest = grid.min(axis=2)
    return Relaxed(
        point_BN=point_BN,
        prices_BK=prices,
        bound_B=offset + lowest.sum(axis=1) - prices.sum(axis=1),
        reduced_BN=(grid - lowest[:, :, None]).reshape(priced.shape),
    )


def settle_prices(gradient_BN: np.ndarray, *, shares_KN: np.ndarray, prices_BK: np.ndarray, width: int) -> np.ndarray:
    """Each price in turn at its best for the linear problem, the others held; a single price is then exact."""
    prices = prices_BK.copy()
    for k in range(len(shares_KN)):
        others = prices.copy()
        others[:, k] = 0.0
        base = (gradient_BN + others @ shares_KN).reshape(len(prices), -1, width)
        prices[:, k] = _best_price(base, shares_KN[k].reshape(-1, width), prices[:, k])
    return prices


def _best_price(base_BUW: np.ndarray, share_UW: np.ndarray, start_B: np.ndarray) -> np.ndarray:
    """Halving on the slope of the concave dual: use of the limit at the cheapest options, less the limit."""
    units = np.arange(len(share_UW))

    def value_and_use(price_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        priced = base_BUW + price_B[:, None, None] * share_UW
        taken = priced.argmin(axis=2)
        lowest = np.take_along_axis(priced, taken[:, :, None], axis=2)[:, :, 0]
        return lowest.sum(axis=1) - price_B, share_UW[units, taken].sum(axis=1)

    best = np.zeros_like(start_B)
    best_value, use = value_and_use(best)
    if not (use > 1.0).any():
        return best
    finite = np.where(np.isfinite(base_BUW), base_BUW, 0.0)
    smallest = 1e-9 * float(np.abs(finite).max()) + 1e-300
    low, high = np.zeros_like(start_B), np.maximum(start_B * 1.05, smallest)
    near = start_B * 0.95
    for _ in range(60):
        over = value_and_use(high)[1] > 1.0
        if not over.any():
            break
        low, high = np.where(over, high, low), np.where(over, high * 4, high)
    low = np.where(value_and_use(near)[1] > 1.0, np.maximum(low, near), low)
    for _ in range(PRICE_STEPS):
        middle = 0.5 * (low + high)
        value, use = value_and_use(middle)
        better = value > best_value
        best, best_value = np.where(better, middle, best), np.where(better, value, best_value)
        low, high = np.where(use > 1.0, middle, low), np.where(use > 1.0, high, middle)
    for price in (start_B, high):
        value = value_and_use(price)[0]
        better = value > best_value
        best, best_value = np.where(better, price, best), np.where(better, value, best_value)
    return best
