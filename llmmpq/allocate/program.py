"""The quadratic program: one option per unit, a convex quadratic loss, one or several limits on whole-number costs.

    minimise  constant + linear'x + x' gram x
    subject to  sum over the options of a unit x = 1,  costs[k] . x <= limits[k],  x binary

`Program` is what a caller states. `Reduced` is what the search works on: units are padded to one number of options (so
that a loop over units is array arithmetic), and the within-unit products, of which only the squares can ever be
nonzero, are folded into the linear term:

    loss(x) = constant + self'x + x' pair x,   pair = gram with zero within-unit blocks,  self = linear + diag(gram)

`narrow` makes a smaller one of it, equal in value on every choice that is still allowed: units with one option left are
folded into the constants, options that cannot fit beside the cheapest of all others and limits that cannot bind are
dropped.

Shapes: U units, O options of all units, K limits, W options per padded unit, N = U W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np

# Sums of costs stay exact in int64, and any single cost and limit is exact in float64.
LARGEST_TOTAL = 2**53


@dataclass(frozen=True, kw_only=True)
class Program:
    """Options of all units in unit order; validated when built."""

    sizes: tuple[int, ...]
    gram_OO: np.ndarray
    linear_O: np.ndarray
    constant: float
    costs_KO: np.ndarray
    limits: tuple[int, ...]

    def __post_init__(self) -> None:
        num_options = sum(self.sizes)
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"sizes is {self.sizes}; every unit needs at least one option")
        for name, array, shape in (
            ("gram_OO", self.gram_OO, (num_options, num_options)),
            ("linear_O", self.linear_O, (num_options,)),
            ("costs_KO", self.costs_KO, (len(self.limits), num_options)),
        ):
            if array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}; the sizes and limits ask for {shape}")
        if self.gram_OO.dtype != np.float64 or self.linear_O.dtype != np.float64:
            raise ValueError(f"gram_OO and linear_O are {self.gram_OO.dtype}, {self.linear_O.dtype}; float64 is needed")
        if not (np.isfinite(self.gram_OO).all() and np.isfinite(self.linear_O).all() and isfinite(self.constant)):
            raise ValueError("gram_OO, linear_O and constant must be finite")
        if not np.allclose(self.gram_OO, self.gram_OO.T, rtol=1e-9, atol=1e-12 * float(np.abs(self.gram_OO).max())):
            raise ValueError("gram_OO is not symmetric")
        if self.costs_KO.dtype != np.int64 or (self.costs_KO < 0).any():
            raise ValueError(f"costs_KO must be int64 and nonnegative, not {self.costs_KO.dtype}")
        if any(sum(int(cost) for cost in self.largest(limit)) > LARGEST_TOTAL for limit in range(len(self.limits))):
            raise ValueError(f"the costs of a limit add up to more than 2**53 = {LARGEST_TOTAL}; count in larger units")

    @property
    def starts(self) -> np.ndarray:
        """The first option of each unit."""
        return np.cumsum([0, *self.sizes[:-1]])

    def smallest(self, limit: int) -> np.ndarray:
        return np.minimum.reduceat(self.costs_KO[limit], self.starts)

    def largest(self, limit: int) -> np.ndarray:
        return np.maximum.reduceat(self.costs_KO[limit], self.starts)

    def loss(self, choice: Sequence[int]) -> float:
        picked = self.starts + np.asarray(choice, dtype=np.int64)
        return float(self.constant + self.linear_O[picked].sum() + self.gram_OO[np.ix_(picked, picked)].sum())

    def fits(self, choice: Sequence[int]) -> bool:
        picked = self.starts + np.asarray(choice, dtype=np.int64)
        return all(int(self.costs_KO[k, picked].sum()) <= limit for k, limit in enumerate(self.limits))


@dataclass(frozen=True, kw_only=True)
class Solved:
    """A choice that fits, its loss, and a certificate: no choice that fits has a loss below `bound`."""

    choice: tuple[int, ...]
    loss: float
    bound: float
    gap: float
    proven: bool
    status: str


@dataclass(frozen=True, kw_only=True)
class Reduced:
    """The padded pair form. A choice is the slot (0 <= slot < N) taken in each unit."""

    num_units: int
    width: int
    pair_NN: np.ndarray
    blocks_UWW: np.ndarray  # within-unit blocks that make pair positive semidefinite: what the shift starts from
    self_N: np.ndarray
    constant: float
    costs_KN: np.ndarray
    limits: tuple[int, ...]
    allowed_UW: np.ndarray

    @property
    def num_slots(self) -> int:
        return self.num_units * self.width

    @property
    def firsts(self) -> np.ndarray:
        return np.arange(self.num_units) * self.width

    @property
    def unit_of(self) -> np.ndarray:
        return np.repeat(np.arange(self.num_units), self.width)

    def loss(self, picked_U: np.ndarray) -> float:
        return float(self.constant + self.self_N[picked_U].sum() + self.pair_NN[np.ix_(picked_U, picked_U)].sum())

    def fits(self, picked_U: np.ndarray) -> bool:
        return all(int(self.costs_KN[k, picked_U].sum()) <= limit for k, limit in enumerate(self.limits))


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is left of a whole after options were struck out, and the way back."""

    reduced: Reduced
    settled_U: np.ndarray  # the whole's slot of each settled unit
    units: np.ndarray  # the whole's units that still have a choice
    slot_N: np.ndarray  # the whole's slot of each slot

    def lift(self, picked_U: np.ndarray) -> np.ndarray:
        whole = self.settled_U.copy()
        whole[self.units] = self.slot_N[picked_U]
        return whole


def reduce_program(program: Program) -> Reduced:
    sizes, starts = np.asarray(program.sizes), program.starts
    width = int(sizes.max())
    allowed = np.arange(width)[None, :] < sizes[:, None]
    source = np.where(allowed, starts[:, None] + np.arange(width)[None, :], starts[:, None]).reshape(-1)
    pair = 0.5 * (program.gram_OO + program.gram_OO.T)
    if not allowed.all():
        pair = pair[np.ix_(source, source)]
    _clear(pair, ~allowed.reshape(-1))
    blocks = np.zeros((len(sizes), width, width))
    for unit in range(len(sizes)):
        here = slice(unit * width, (unit + 1) * width)
        blocks[unit] = pair[here, here]
        pair[here, here] = 0.0
    return Reduced(
        num_units=len(sizes),
        width=width,
        pair_NN=pair,
        blocks_UWW=blocks,
        self_N=(program.linear_O + np.diag(program.gram_OO))[source],
        constant=program.constant,
        costs_KN=program.costs_KO[:, source],
        limits=program.limits,
        allowed_UW=allowed,
    )


def narrow(whole: Reduced, allowed_UW: np.ndarray) -> Part | None:
    """The whole with only these options; None when nothing that fits is left."""
    grids = whole.costs_KN.reshape(-1, whole.num_units, whole.width)
    allowed = allowed_UW & whole.allowed_UW
    while True:
        if not allowed.any(axis=1).all():
            return None
        kept = allowed.copy()
        for grid, limit in zip(grids, whole.limits, strict=True):
            smallest = np.where(allowed, grid, np.iinfo(np.int64).max).min(axis=1)
            kept &= grid <= limit - int(smallest.sum()) + smallest[:, None]
        if np.array_equal(kept, allowed):
            break
        allowed = kept
    counts = allowed.sum(axis=1)
    settled = np.where(counts == 1, whole.firsts + allowed.argmax(axis=1), -1)
    done, units = settled[counts == 1], np.flatnonzero(counts > 1)
    width = int(counts.max()) if len(units) else 1
    order = np.argsort(~allowed[units], axis=1, kind="stable")[:, :width]
    slots = (whole.firsts[units][:, None] + order).reshape(-1)
    rows = np.arange(width)[None, :] < counts[units][:, None]

    same = np.array_equal(slots, np.arange(whole.num_slots))
    pair = whole.pair_NN if same else whole.pair_NN[np.ix_(slots, slots)]
    if not rows.all():
        pair = pair.copy() if same else pair
        _clear(pair, ~rows.reshape(-1))
    limits = [limit - int(whole.costs_KN[k, done].sum()) for k, limit in enumerate(whole.limits)]
    costs = whole.costs_KN[:, slots]
    binding = [
        k
        for k, limit in enumerate(limits)
        if int(np.where(rows, costs[k].reshape(rows.shape), 0).max(axis=1, initial=0).sum()) > limit
    ]
    own = np.arange(len(units))[:, None, None]
    reduced = Reduced(
        num_units=len(units),
        width=width,
        pair_NN=pair,
        blocks_UWW=whole.blocks_UWW[units][own, order[:, :, None], order[:, None, :]],
        self_N=whole.self_N[slots] + 2 * whole.pair_NN[np.ix_(done, slots)].sum(axis=0),
        constant=whole.loss(done),
        costs_KN=costs[binding],
        limits=tuple(limits[k] for k in binding),
        allowed_UW=rows,
    )
    return Part(reduced=reduced, settled_U=settled, units=units, slot_N=slots)


def _clear(matrix_NN: np.ndarray, dead_N: np.ndarray) -> None:
    if dead_N.any():
        matrix_NN[dead_N, :] = 0.0
        matrix_NN[:, dead_N] = 0.0
