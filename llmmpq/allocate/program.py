"""The quadratic program: one option per unit, a convex quadratic loss, one or several limits on whole-number costs.

    minimise  constant + linear'x + x' gram x
    subject to  sum over the options of a unit x = 1,  costs[k] . x <= limits[k],  x binary

`Program` is what a caller states. `Reduced` is what the search works on, equal in value on every choice it keeps:
units with a single option are folded into the constants, limits that cannot bind are dropped, units are padded to one
number of options (so that a loop over units is array arithmetic), and the within-unit products, of which only the
squares can ever be nonzero, are folded into the linear term:

    loss(x) = constant + self'x + x' pair x,   pair = gram with zero within-unit blocks,  self = linear + diag(gram)

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
    """The padded pair form; `free` are the units of the program with a choice, in order."""

    num_units: int
    width: int
    pair_NN: np.ndarray
    blocks_UWW: np.ndarray  # the within-unit blocks of the Gram matrix: where the shift may start from
    self_N: np.ndarray
    constant: float
    costs_KN: np.ndarray
    limits: tuple[int, ...]
    allowed_UW: np.ndarray
    free: tuple[int, ...]

    @property
    def num_options(self) -> int:
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

    def expand(self, picked_U: np.ndarray, num_units: int) -> tuple[int, ...]:
        """The choice in the program's units; the folded ones have only option 0."""
        choice = np.zeros(num_units, dtype=np.int64)
        choice[list(self.free)] = picked_U - self.firsts
        return tuple(int(option) for option in choice)

    def shrink(self, choice: Sequence[int]) -> np.ndarray:
        return self.firsts + np.asarray(choice, dtype=np.int64)[list(self.free)]


def reduce_program(program: Program) -> Reduced:
    sizes, starts = np.asarray(program.sizes), program.starts
    fixed = starts[sizes == 1]
    free = np.flatnonzero(sizes > 1)
    gram, width = program.gram_OO, int(sizes.max())
    limits = [limit - int(program.costs_KO[k, fixed].sum()) for k, limit in enumerate(program.limits)]

    slots = starts[free][:, None] + np.arange(width)[None, :]
    allowed = np.arange(width)[None, :] < sizes[free][:, None]
    source = np.where(allowed, slots, starts[free][:, None]).reshape(-1)
    pair = 0.5 * (gram + gram.T)
    linear = program.linear_O + 2 * pair[:, fixed].sum(axis=1)
    constant = program.constant + program.linear_O[fixed].sum() + pair[np.ix_(fixed, fixed)].sum()
    self_N = (linear + np.diag(gram))[source]
    padded = ~allowed.reshape(-1)
    if not np.array_equal(source, np.arange(len(pair))):
        pair = pair[np.ix_(source, source)]
    pair[padded, :] = 0.0
    pair[:, padded] = 0.0
    blocks = np.zeros((len(free), width, width))
    for unit in range(len(free)):
        here = slice(unit * width, (unit + 1) * width)
        blocks[unit] = pair[here, here]
        pair[here, here] = 0.0
    costs = program.costs_KO[:, source]

    # An option that cannot fit beside the smallest of all others is no option.
    for k, limit in enumerate(limits):
        grid = np.where(allowed, costs[k].reshape(-1, width), np.iinfo(np.int64).max)
        if len(free):
            smallest = grid.min(axis=1)
            allowed = allowed & (grid <= limit - int(smallest.sum()) + smallest[:, None])
    binding = [k for k, limit in enumerate(limits) if _largest_total(costs[k], allowed) > limit]
    return Reduced(
        num_units=len(free),
        width=width,
        pair_NN=pair,
        blocks_UWW=blocks,
        self_N=self_N,
        constant=float(constant),
        costs_KN=costs[binding],
        limits=tuple(limits[k] for k in binding),
        allowed_UW=allowed,
        free=tuple(int(unit) for unit in free),
    )


def _largest_total(costs_N: np.ndarray, allowed_UW: np.ndarray) -> int:
    return int(np.where(allowed_UW, costs_N.reshape(allowed_UW.shape), 0).max(axis=1, initial=0).sum())
