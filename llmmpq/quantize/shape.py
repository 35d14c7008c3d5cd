"""Let the rows of a matrix share their errors, so that these fall where the model's output feels them least.

With H the second moment of a matrix's input and G that of the gradient of the model's log-likelihood by its output
(`measure/output_metric.py`), an error E of the matrix costs about tr(G E H E'). GPTQ and descent minimise it for G = 1:
each row by itself. Here rows are taken in parts, those that matter most first. When a part is on its grid, its error is
moved into the rows that are still to come, as GPTQ moves that of a column into later columns: with G^-1 = U'U (U upper
triangular, rows in visiting order) and E_a the error of part a,

    W_rest <- W_rest - U_a,rest' (U_aa')^-1 E_a.

That is the best that the others can do, were they not to be rounded. Within a part each row is by itself again. The
error of each output grows, that of the model shrinks. Feedback in both directions: YAQA (Tseng et al., 2025).

G may come in pieces, one for some rows after the other: rows of different pieces do not share. The first parts of all
pieces are quantized in one call, then the second parts, so that many pieces cost few calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from llmmpq.quantize.gptq import Factor, factorize

# Legend: N rows (outputs), K columns (inputs), n rows of a part, p rows of a piece.
# Figures in docs/log.md. A row of the last part finds nobody to help it: one in so many of the gain is lost.
NUM_PARTS = 16
DAMPING = 1e-6  # of G, which is mixed with the identity already: for what rounding may leave
SMALLEST_PART = 8  # rows: every part costs as many steps as the matrix has columns

# Given rows and what they should be, puts them on the grid and returns the values there.
QuantizeRows = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some consecutive rows that share their errors: U, and the rows in visiting order."""

    upper_pp: torch.Tensor
    rows_p: torch.Tensor

    def part(self, number: int) -> slice:
        """Places in visiting order; empty where the piece has fewer parts."""
        step = max(SMALLEST_PART, -(-len(self.rows_p) // NUM_PARTS))
        return slice(min(number * step, len(self.rows_p)), min((number + 1) * step, len(self.rows_p)))

    def pass_on_(self, weight_NK: torch.Tensor, part: slice, error_nK: torch.Tensor) -> None:
        """Move the error of a part into the rows after it."""
        if part.start == part.stop or part.stop == len(self.rows_p):
            return
        pivots_nn, coupling = self.upper_pp[part, part], self.upper_pp[part, part.stop :]
        scaled_nK = torch.linalg.solve_triangular(pivots_nn.t(), error_nK, upper=False)
        weight_NK.index_add_(0, self.rows_p[part.stop :], coupling.t() @ scaled_nK, alpha=-1)


def share_rows(metrics: Sequence[torch.Tensor]) -> list[Piece] | None:
    """Pieces from G of each, rows following one another; None when one of them has no factor."""
    pieces, start = [], 0
    for metric_pp in metrics:
        factor: Factor | None = factorize(metric_pp, damping=DAMPING, activation_order=True)
        if factor is None:
            return None
        pieces.append(Piece(upper_pp=factor.upper_KK, rows_p=factor.order_K + start))
        start += len(metric_pp)
    return pieces


def shape_errors(weight_NK: torch.Tensor, pieces: Sequence[Piece], quantize: QuantizeRows) -> torch.Tensor:
    """All rows through `quantize`; returns what each was asked to be."""
    target_NK = weight_NK.float().clone()
    for number in range(NUM_PARTS):
        parts = [piece.part(number) for piece in pieces]
        sizes = [part.stop - part.start for part in parts]
        if not sum(sizes):
            break
        rows_n = torch.cat([piece.rows_p[part] for piece, part in zip(pieces, parts, strict=True)])
        wanted_nK = target_NK[rows_n]
        errors = (wanted_nK - quantize(rows_n, wanted_nK)).split(sizes)
        for piece, part, error_nK in zip(pieces, parts, errors, strict=True):
            piece.pass_on_(target_NK, part, error_nK)
    return target_NK
