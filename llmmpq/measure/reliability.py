"""How much of the measured products between linears is signal, and how much the chance of a short probe.

With c_ij = Q_ij / sqrt(Q_ii Q_jj) of the whole probe and c1, c2 the same products of its two halves, whose errors are
independent, sum c1 c2 / sum c^2 over many pairs estimates the share of the c^2 that another probe would show again. The
best estimate of a true product is then that share of the measured one (the mean of a normal prior around zero). The
share falls with the width, because the chance in a cosine is the same for all of them and the signal is not, and it is
higher within a block than between blocks. So pairs are put together by the levels a, b of their options, and one factor
per level, s_a s_b ~ share, is fitted by least squares of what it leaves:

    minimise  sum over a, b of  total_ab (s_a s_b)^2 - 2 signal_ab s_a s_b,   0 <= s <= 1

once for pairs between blocks and once for those within one. Factors of this form keep Q positive semidefinite: it is
multiplied entry by entry with a sum of outer products (Schur). Rejected: a factor for each pair from its own variance
over pieces, which does not.

Shapes: O options of all linears, L levels.
"""

from __future__ import annotations

import numpy as np

from llmmpq.records import Reliability

STEPS = np.linspace(0.0, 1.0, 201)  # finer than any estimate of it
SWEEPS = 100


def reliability_of(
    gram_OO: np.ndarray,
    half_OO: np.ndarray,
    *,
    half_share: float,
    linear_O: np.ndarray,
    block_O: np.ndarray,
    level_O: np.ndarray,
) -> Reliability:
    """`half_OO` is the Gram matrix of one half of the probe, which holds `half_share` of its tokens."""
    size_O = np.sqrt(np.diag(gram_OO))
    inverse_O = np.divide(1.0, size_O, out=np.zeros_like(size_O), where=size_O > 0)
    scale_OO = np.outer(inverse_O, inverse_O)
    first_OO, whole_OO = half_OO * scale_OO, gram_OO * scale_OO
    second_OO = (whole_OO - half_share * first_OO) / (1 - half_share)
    signal_OO, total_OO = first_OO * second_OO, whole_OO**2
    levels, at_O = np.unique(level_O, return_inverse=True)
    member_OL = np.eye(len(levels))[at_O]

    def factors(pairs_OO: np.ndarray) -> np.ndarray:
        signal_LL, total_LL = (member_OL.T @ (pairs_OO * each) @ member_OL for each in (signal_OO, total_OO))
        return fit_factors(signal_LL, total_LL)[at_O]

    same_block_OO = block_O[:, None] == block_O
    across_O = factors(~same_block_OO)
    within_O = factors(same_block_OO & (linear_O[:, None] != linear_O))
    # What the pairs of a block have beyond the others; none where they seem to have less.
    return Reliability(
        across_O=across_O,
        within_O=np.sqrt(np.maximum(within_O**2 - across_O**2, 0.0)),
        block_O=block_O.astype(np.int64),
    )


def fit_factors(signal_LL: np.ndarray, total_LL: np.ndarray) -> np.ndarray:
    """One factor of each level in turn, the others held, until none moves; 1 where a level has no pairs."""
    factors = np.ones(len(total_LL))
    for _ in range(SWEEPS):
        before = factors.copy()
        for level in range(len(factors)):
            others = np.arange(len(factors)) != level
            if not total_LL[level].any():
                continue
            total = float(total_LL[level, others] @ factors[others] ** 2)
            signal = float(signal_LL[level, others] @ factors[others])
            own = total_LL[level, level] * STEPS**4 - 2 * signal_LL[level, level] * STEPS**2
            factors[level] = STEPS[(own + 2 * total * STEPS**2 - 4 * signal * STEPS).argmin()]
        if np.array_equal(factors, before):
            break
    return factors
