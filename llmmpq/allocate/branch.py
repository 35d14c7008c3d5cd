"""Branch and bound on a convexified program, many nodes at a time.

A node is a set of allowed options. Its relaxation is bounded, options whose reduced loss lifts the bound over the best
known loss are struck out, and the unit whose mixture gives most away in the relaxation (diag(P)'z - z'Pz) is split into
one child per option. Nodes of least bound come first. The order depends on iterations only, never on the clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from llmmpq.allocate.program import Reduced
from llmmpq.allocate.relax import Convex, Relaxed, relax
from llmmpq.allocate.search import mend, polish

NODES_AT_A_TIME = 64
SWEEPS_PER_NODE = 3
MEMORY_NUMBERS = 2 * 10**8  # single-precision numbers the open nodes may hold: 0.8 GB


@dataclass(frozen=True, kw_only=True)
class Node:
    bound: float
    allowed_N: np.ndarray
    point_N: np.ndarray
    prices_K: np.ndarray


def branch(
    reduced: Reduced,
    convex: Convex,
    root: Node,
    *,
    penalty: float,
    cutoff: float,
    offer: Callable[[np.ndarray], float],
    stop: Callable[[float], bool],
) -> float:
    """A lower bound of the losses below the cutoff. Bounds at or above the cutoff need no further splitting;
    `offer` takes a choice that fits and returns the cutoff from then on. `stop` is told the bound so far."""
    queue: list[tuple[float, int, Node]] = [(root.bound, 0, root)]
    closed, count = np.inf, 1
    while queue and queue[0][0] < cutoff:
        if stop(min(queue[0][0], closed)) or len(queue) * reduced.num_slots > MEMORY_NUMBERS:
            break
        children: list[Node] = []
        while queue and len(children) < NODES_AT_A_TIME and queue[0][0] < cutoff:
            children += _split(reduced, convex, heappop(queue)[2])
        if not children:
            continue
        solved = relax(
            convex,
            allowed_BN=np.stack([child.allowed_N for child in children]),
            point_BN=np.stack([child.point_N for child in children]),
            prices_BK=np.stack([child.prices_K for child in children]),
            penalty=penalty,
            sweeps=SWEEPS_PER_NODE,
        )
        for index in _worth_rounding(reduced, solved):
            found = mend(reduced, _taken(reduced, solved.point_BN[index]))
            if found is not None:
                cutoff = offer(polish(reduced, found, stop=lambda: False))
        for index, child in enumerate(children):
            bound = max(child.bound, float(solved.bound_B[index]))
            if bound >= cutoff:
                closed = min(closed, bound)
                continue
            useless = float(solved.bound_B[index]) + solved.reduced_BN[index] >= cutoff
            if (child.allowed_N & useless).any():
                closed = min(closed, cutoff)
            rows = (child.allowed_N & ~useless).reshape(reduced.num_units, reduced.width)
            if not _can_fit(reduced, rows):
                continue
            if (rows.sum(axis=1) == 1).all():
                only = reduced.firsts + rows.argmax(axis=1)
                if reduced.fits(only):
                    cutoff = offer(only)
                    closed = min(closed, reduced.loss(only))
                continue
            node = Node(
                bound=bound,
                allowed_N=rows.reshape(-1),
                point_N=within(solved.point_BN[index], rows).astype(np.float32),
                prices_K=solved.prices_BK[index],
            )
            heappush(queue, (bound, count, node))
            count += 1
    return float(min(queue[0][0] if queue else np.inf, closed))


def _taken(reduced: Reduced, point_N: np.ndarray) -> np.ndarray:
    return reduced.firsts + point_N.reshape(-1, reduced.width).argmax(axis=1)


def _worth_rounding(reduced: Reduced, solved: Relaxed) -> list[int]:
    """The child of least bound, and those that are all but integral."""
    certain = solved.point_BN.reshape(len(solved.point_BN), -1, reduced.width).max(axis=2).min(axis=1)
    return sorted({int(solved.bound_B.argmin()), *np.flatnonzero(certain > 0.99).tolist()})


def _split(reduced: Reduced, convex: Convex, node: Node) -> list[Node]:
    shape = (reduced.num_units, reduced.width)
    point, rows = node.point_N.astype(np.float64), node.allowed_N.reshape(shape)
    given = np.full(reduced.num_units, -1.0)
    for unit in np.flatnonzero(rows.sum(axis=1) > 1).tolist():
        here = slice(unit * reduced.width, (unit + 1) * reduced.width)
        block, mine = convex.matrix_NN[here, here], point[here]
        given[unit] = np.diag(block) @ mine - mine @ block @ mine + 1e-6 * (1 - mine.max())
    unit = int(given.argmax())
    children = []
    for option in np.flatnonzero(rows[unit]).tolist():
        allowed = rows.copy()
        allowed[unit] = False
        allowed[unit, option] = True
        if not _can_fit(reduced, allowed):
            continue
        children.append(
            Node(
                bound=node.bound,
                allowed_N=allowed.reshape(-1),
                point_N=within(point, allowed),
                prices_K=node.prices_K,
            )
        )
    return children


def within(point_N: np.ndarray, allowed_UW: np.ndarray) -> np.ndarray:
    """The point without what is not allowed, each unit again adding up to one."""
    grid = np.where(allowed_UW, point_N.reshape(allowed_UW.shape), 0.0)
    heaviest = np.where(allowed_UW, grid, -1.0).argmax(axis=1)
    grid[np.arange(len(grid)), heaviest] += 1.0 - grid.sum(axis=1)
    return grid.reshape(-1)


def _can_fit(reduced: Reduced, allowed_UW: np.ndarray) -> bool:
    if not allowed_UW.any(axis=1).all():
        return False
    largest = np.iinfo(np.int64).max
    for k, limit in enumerate(reduced.limits):
        if int(np.where(allowed_UW, reduced.costs_KN[k].reshape(allowed_UW.shape), largest).min(axis=1).sum()) > limit:
            return False
    return True
