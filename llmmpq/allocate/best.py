"""What is known so far: the best choice, the best bound, what may still be taken, and when to stop."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

import numpy as np

from llmmpq.allocate.program import Program, Solved, reduce_program

# Losses that differ by less than this part are one loss: float64 sums of a few hundred thousand products.
SAME = 1e-9
# Aim a little below the gap that was asked for, so that rounding does not end above it.
BELOW_TARGET = 0.999


class Search:
    """Changed by every stage; each holds for the whole program."""

    def __init__(
        self,
        program: Program,
        *,
        target_gap: float,
        deadline: float,
        on_progress: Callable[[float, float], None] | None,
    ) -> None:
        self.program = program
        self.whole = reduce_program(program)
        self.allowed_UW = self.whole.allowed_UW
        self.target_gap = max(target_gap, 0.0)
        self.deadline = deadline
        self.on_progress = on_progress
        self.picked_U: np.ndarray | None = None
        self.loss = np.inf
        self.bound = -np.inf
        self.struck_at = np.inf
        self.rounding = 0.0
        self.certify_s = 0.0  # what making one bound certain took: kept free before the deadline

    def late(self, *, spare_s: float = 0.0) -> bool:
        return monotonic() + spare_s >= self.deadline

    def offer(self, picked_U: np.ndarray | None) -> None:
        if picked_U is None or not self.whole.fits(picked_U):
            return
        loss = self.whole.loss(picked_U)
        if self.picked_U is not None:
            # Equal to rounding: the lexicographically smaller choice is the answer.
            rounding = 1e-13 * abs(self.loss)
            earlier = tuple(picked_U) < tuple(self.picked_U)
            if loss > self.loss + rounding or (loss > self.loss - rounding and not earlier):
                return
        self.picked_U, self.loss = picked_U.copy(), loss
        reduced = self.whole
        terms = np.abs(reduced.self_N[picked_U]).sum() + np.abs(reduced.pair_NN[np.ix_(picked_U, picked_U)]).sum()
        self.rounding = 1e-14 * float(terms + abs(reduced.constant))
        self.tell()

    def raise_bound(self, bound: float) -> None:
        """`bound` holds for what is still allowed; what was struck out is no better than `struck_at`."""
        bound = min(bound, self.struck_at)
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
        return loss - max(BELOW_TARGET * self.target_gap * abs(loss), 0.5 * self.same(loss))

    def done(self) -> bool:
        return self.bound >= self.cutoff(self.loss)

    def solved(self, status: str) -> Solved:
        assert self.picked_U is not None
        choice = tuple(int(option) for option in self.picked_U - self.whole.firsts)
        gap = self.gap()
        loss = self.program.loss(choice)
        if gap == 0.0:
            status = "optimal"
        return Solved(
            choice=choice, loss=loss, bound=float(min(self.bound, loss)), gap=gap, proven=gap == 0.0, status=status
        )
