"""GPTQ (Frantar et al., 2022): round column by column, moving each error into the columns not yet rounded.

With H the second moment of the layer's input and H^-1 = U'U (U upper triangular), rounding column i leaves the error
e_i = (w_i - dq_i) / U_ii, and the remaining columns change by -e_i U_i,rest; the sum of e_i^2 is the damped output
error. Columns are visited by falling diagonal of H (activation order); groups stay where they are in the stored
matrix (static groups), so the order leaves no trace in the format.

U comes from one Cholesky factor of H with rows and columns reversed and one triangular inverse, both in place,
instead of inverting H and factoring the inverse: less memory and better conditioned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmmpq.quantize.grid import Grid

# Each step multiplies the damping; after the last one the matrix is given up and the caller must say so.
DAMPING_LADDER = (1.0, 3.0, 10.0, 30.0, 100.0)
INVERSE_BASE = 128


@dataclass(frozen=True, kw_only=True)
class Factor:
    """U of the damped second moment in visiting order, shared by all matrices with the same input."""

    upper_KK: torch.Tensor
    order_K: torch.Tensor
    moment_KK: torch.Tensor  # the second moment itself, in the order of the matrix
    ridge_K: torch.Tensor  # what was added to its diagonal
    damping: float  # share of the mean diagonal that was needed
    num_dead: int  # channels that were always zero


def factorize(moment_KK: torch.Tensor, *, damping: float, activation_order: bool) -> Factor | None:
    """None when no damping of the ladder makes the moment positive definite."""
    diagonal = moment_KK.diagonal()
    if not bool(torch.isfinite(diagonal).all()) or float(diagonal.max()) <= 0:
        return None
    dead = diagonal <= 0
    mean = float(diagonal.double().mean())
    order = torch.arange(len(diagonal), device=diagonal.device)
    if activation_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    backwards = order.flip(0)
    for step in DAMPING_LADDER:
        matrix = moment_KK[backwards[:, None], backwards]
        # A dead channel has no neighbours; the damping alone would give it a vanishing pivot.
        matrix.diagonal().add_(mean * damping * step + dead[backwards] * mean)
        lower, info = torch.linalg.cholesky_ex(matrix)
        del matrix
        if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            _invert_lower_(lower)
            upper = lower.flip(0, 1)
            return Factor(
                upper_KK=upper,
                order_K=order,
                moment_KK=moment_KK,
                ridge_K=mean * damping * step + dead * mean,
                damping=damping * step,
                num_dead=int(dead.sum()),
            )
    return None


def _invert_lower_(lower: torch.Tensor) -> None:
    """Invert a lower triangular matrix in place, by halves, so that nearly all of the work is matrix products."""
    size = len(lower)
    if size <= INVERSE_BASE:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = size // 2
    head, tail, below = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    _invert_lower_(head)
    _invert_lower_(tail)
    below.copy_(torch.mm(tail, torch.mm(below, head)).neg_())


def gptq(
    weight_NK: torch.Tensor,
    grid: Grid,
    factor: Factor,
    *,
    column_block: int,
    losses_K: torch.Tensor | None = None,
) -> torch.Tensor:
    """The codes (uint8) of the matrix; `losses_K`, where given, receives the sum of e_i^2 over the rows."""
    upper, order, tops = factor.upper_KK, factor.order_K, grid.largest_codes
    num_rows, num_columns = weight_NK.shape
    rest_KN = weight_NK.float().t()[order]  # a copy, in visiting order
    codes_KN = torch.empty(num_columns, num_rows, dtype=torch.uint8, device=weight_NK.device)
    scales_GN, zeros_GN = grid.scales_NG.t().contiguous(), grid.zeros_NG.t().contiguous()
    group_of = (order // grid.scheme.group_size).tolist()
    column_of = order.tolist()
    for start in range(0, num_columns, column_block):
        stop = min(start + column_block, num_columns)
        block_KN = rest_KN[start:stop]
        block_upper = upper[start:stop, start:stop]
        pivots = block_upper.diagonal().tolist()
        errors_KN = torch.empty_like(block_KN)
        for i in range(stop - start):
            group = group_of[start + i]
            scale, zero, row = scales_GN[group], zeros_GN[group], block_KN[i]
            codes = torch.div(row, scale).round_().add_(zero).clamp_(0.0, tops[group])
            codes_KN[column_of[start + i]] = codes
            error = torch.addcmul(row, codes.sub_(zero), scale, value=-1).div_(pivots[i])
            errors_KN[i] = error
            if i + 1 < stop - start:
                block_KN[i + 1 :].addr_(block_upper[i, i + 1 :], error, alpha=-1)
        if losses_K is not None:
            losses_K[order[start:stop]] = errors_KN.square().sum(1)
        if stop < num_columns:
            rest_KN[stop:].addmm_(upper[start:stop, stop:].t(), errors_KN, alpha=-1)
    return codes_KN.t().contiguous()
