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
from llmmpq.allocate.relax import Convex, relax
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
    incumbent_U: np.ndarray,
    incumbent_loss: float,
    cutoff: Callable[[float], float],
    stop: Callable[[float, np.ndarray, float], bool],
) -> tuple[np.ndarray, float, float]:
    """(best choice, its loss, lower bound). `cutoff(loss)`: bounds at or above it need no further splitting."""
    queue: list[tuple[float, int, Node]] = [(root.bound, 0, root)]
    best_U, best, closed, count = incumbent_U, incumbent_loss, np.inf, 1
    while queue:
        if queue[0][0] >= cutoff(best):
            break
        if stop(min(queue[0][0], closed), best_U, best) or len(queue) * reduced.num_options > MEMORY_NUMBERS:
            break
        children: list[Node] = []
        while queue and len(children) < NODES_AT_A_TIME and queue[0][0] < cutoff(best):
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
        promising = int(np.argmin(solved.bound_B))
        for index, child in enumerate(children):
            bound = max(child.bound, float(solved.bound_B[index]))
            if bound >= cutoff(best):
                closed = min(closed, bound)
                continue
            point = solved.point_BN[index]
            grid = point.reshape(reduced.num_units, reduced.width)
            if index == promising or grid.max(axis=1).min() > 0.99:
                found = mend(reduced, reduced.firsts + grid.argmax(axis=1))
                if found is not None:
                    found = polish(reduced, found, stop=lambda: False)
                    loss = reduced.loss(found)
                    if loss < best:
                        best_U, best = found, loss
            limit = cutoff(best)
            struck = child.allowed_N & (float(solved.bound_B[index]) + solved.reduced_BN[index] >= limit)
            if struck.any():
                closed = min(closed, limit)
            allowed = child.allowed_N & ~struck
            rows = allowed.reshape(reduced.num_units, reduced.width)
            if not rows.any(axis=1).all() or not _can_fit(reduced, rows):
                continue
            if (rows.sum(axis=1) == 1).all():
                only = reduced.firsts + rows.argmax(axis=1)
                loss = reduced.loss(only)
                if loss < best and reduced.fits(only):
                    best_U, best = only, loss
                continue
            node = Node(
                bound=bound,
                allowed_N=allowed,
                point_N=_within(point, rows).astype(np.float32),
                prices_K=solved.prices_BK[index],
            )
            heappush(queue, (bound, count, node))
            count += 1
    open_bound = queue[0][0] if queue else np.inf
    return best_U, best, float(min(open_bound, closed, best))


def _split(reduced: Reduced, convex: Convex, node: Node) -> list[Node]:
    shape = (reduced.num_units, reduced.width)
    point, rows = node.point_N.astype(np.float64), node.allowed_N.reshape(shape)
    given = np.full(reduced.num_units, -1.0)
    for unit in np.flatnonzero(rows.sum(axis=1) > 1):
        here = slice(unit * reduced.width, (unit + 1) * reduced.width)
        block, mine = convex.matrix_NN[here, here], point[here]
        given[unit] = np.diag(block) @ mine - mine @ block @ mine + 1e-6 * (1 - mine.max())
    unit = int(given.argmax())
    children = []
    for option in np.flatnonzero(rows[unit]):
        allowed = rows.copy()
        allowed[unit] = False
        allowed[unit, option] = True
        if not _can_fit(reduced, allowed):
            continue
        children.append(
            Node(
                bound=node.bound,
                allowed_N=allowed.reshape(-1),
                point_N=_within(point, allowed),
                prices_K=node.prices_K,
            )
        )
    return children


def _within(point_N: np.ndarray, allowed_UW: np.ndarray) -> np.ndarray:
    """The point without what is not allowed, each unit again adding up to one."""
    grid = np.where(allowed_UW, point_N.reshape(allowed_UW.shape), 0.0)
    heaviest = np.where(allowed_UW, grid, -1.0).argmax(axis=1)
    grid[np.arange(len(grid)), heaviest] += 1.0 - grid.sum(axis=1)
    return grid.reshape(-1)


def _can_fit(reduced: Reduced, allowed_UW: np.ndarray) -> bool:
    largest = np.iinfo(np.int64).max
    for k, limit in enumerate(reduced.limits):
        if int(np.where(allowed_UW, reduced.costs_KN[k].reshape(allowed_UW.shape), largest).min(axis=1).sum()) > limit:
            return False
    return True
