"""Make the codes and scales that GPTQ left better, one after the other, each as good as it can be alone.

GPTQ decides every column once, knowing nothing of the errors still to come. Afterwards everything is known: with
r = w - dq of one row and H the damped second moment of the input, the error r H r' is a quadratic function of each
code and of each scale while all others stay. Group by group, with p = H r' kept up to date,

    code k:    dq_k -> the value of the grid nearest to dq_k + p_k / H_kk
    scale g:   s_g  -> s_g + c'p / c'Hc,   c the group's centred codes (q - z), zero elsewhere

Both are exact minimisers in one variable, so the error falls at every step; a scale that would fall on no better
stored value stays. A sweep over all groups costs one product with H, about what GPTQ costs. QuIP (Chee et al., 2023)
and CDQuant (Nair and Suggala, 2024) descend on the codes alone.

Rejected: solving for all scales of a row at once, whose matrix costs more than a sweep. Moving zeros by whole steps:
nothing moved.
"""

from __future__ import annotations

import dataclasses

import torch

from llmmpq.quantize.gptq import Factor
from llmmpq.quantize.grid import Grid

# Legend: N rows (outputs), K columns (inputs), G groups, g columns of a group, b columns of a block, n rows of a chunk.
# Chunks are held transposed, so that a column of the matrix is contiguous.
CHUNK_ELEMENTS = 1 << 24  # of a chunk of rows: 64 MB, and a few copies
LOCAL_PASSES = 2  # through the codes of a group, its scale found again after each: cheap beside the product with H


def descend(
    weight_NK: torch.Tensor, codes_NK: torch.Tensor, grid: Grid, factor: Factor, *, sweeps: int, column_block: int
) -> tuple[torch.Tensor, Grid]:
    """Codes (uint8) and grid after so many sweeps over the matrix."""
    codes_NK, scales_NG = codes_NK.clone(), grid.scales_NG.clone()
    step = max(1, CHUNK_ELEMENTS // weight_NK.shape[1])
    for start in range(0, len(weight_NK), step) if sweeps else ():
        rows = slice(start, start + step)
        chunk = _Rows(weight_NK[rows], codes_NK[rows], grid, rows, factor)
        for _ in range(sweeps):
            chunk.sweep(column_block)
        codes_NK[rows] = chunk.codes_nK()
        scales_NG[rows] = chunk.scales_Gn.t()
    return codes_NK, dataclasses.replace(grid, scales_NG=scales_NG)


class _Rows:
    """Some rows of a matrix: centred codes, scales, and p = H r'."""

    def __init__(
        self, weight_nK: torch.Tensor, codes_nK: torch.Tensor, grid: Grid, rows: slice, factor: Factor
    ) -> None:
        self.grid, self.moment_KK, self.ridge_K = grid, factor.moment_KK, factor.ridge_K
        self.scales_Gn = grid.scales_NG[rows].t().contiguous()
        self.zeros_Gn = grid.zeros_NG[rows].t().contiguous()
        self.centred_Kn = codes_nK.t().float()
        rest_Kn = weight_nK.float().t().clone(memory_format=torch.contiguous_format)
        for group, columns in self._groups():
            self.centred_Kn[columns] -= self.zeros_Gn[group]
            rest_Kn[columns] -= self.centred_Kn[columns] * self.scales_Gn[group]
        self.products_Kn = torch.addmm(rest_Kn * self.ridge_K[:, None], self.moment_KK, rest_Kn)

    def sweep(self, column_block: int) -> None:
        for group, columns in self._groups():
            moment_gg = self.moment_KK[columns, columns] + torch.diag(self.ridge_K[columns])
            products_gn = self.products_Kn[columns].clone()
            before_gn = self.centred_Kn[columns] * self.scales_Gn[group]
            for _ in range(LOCAL_PASSES):
                self._improve_codes(group, moment_gg, products_gn, column_block)
                self._improve_scale(group, moment_gg, products_gn)
            change_gn = before_gn.sub_(self.centred_Kn[columns] * self.scales_Gn[group])
            self.products_Kn.addmm_(self.moment_KK[:, columns], change_gn)
            self.products_Kn[columns] += change_gn * self.ridge_K[columns, None]

    def codes_nK(self) -> torch.Tensor:
        codes_Kn = self.centred_Kn.clone()
        for group, columns in self._groups():
            codes_Kn[columns] += self.zeros_Gn[group]
        return codes_Kn.t().to(torch.uint8)

    def _groups(self) -> list[tuple[int, slice]]:
        size, num_columns = self.grid.scheme.group_size, len(self.moment_KK)
        return [
            (group, slice(start, min(start + size, num_columns)))
            for group, start in enumerate(range(0, num_columns, size))
        ]

    def _improve_codes(self, group: int, moment_gg: torch.Tensor, products_gn: torch.Tensor, column_block: int) -> None:
        scale, lowest = self.scales_Gn[group], -self.zeros_Gn[group]
        highest = lowest + self.grid.largest_codes[group]
        first = group * self.grid.scheme.group_size
        steps = moment_gg.diagonal().tolist()
        for start in range(0, len(moment_gg), column_block):
            stop = min(start + column_block, len(moment_gg))
            moment_bb, products_bn = moment_gg[start:stop, start:stop], products_gn[start:stop]
            changes_bn = torch.empty_like(products_bn)
            for i in range(stop - start):
                centred = self.centred_Kn[first + start + i]
                better = torch.div(products_bn[i], scale).div_(steps[start + i]).add_(centred).round_()
                better = torch.minimum(torch.maximum(better, lowest), highest)
                change = (better - centred).mul_(scale)
                centred.copy_(better)
                changes_bn[i] = change
                products_bn.addr_(moment_bb[i], change, alpha=-1)
            for others in (slice(0, start), slice(stop, len(moment_gg))):
                products_gn[others].addmm_(moment_gg[others, start:stop], changes_bn, alpha=-1)

    def _improve_scale(self, group: int, moment_gg: torch.Tensor, products_gn: torch.Tensor) -> None:
        scale = self.scales_Gn[group]
        first = group * self.grid.scheme.group_size
        centred_gn = self.centred_Kn[first : first + len(moment_gg)]
        spread_gn = moment_gg @ centred_gn
        curvature = (centred_gn * spread_gn).sum(0)
        slope = (centred_gn * products_gn).sum(0)
        # A group whose codes are all zero has no curvature, and no scale that is better than another.
        step = torch.where(curvature > 0, slope / curvature.clamp_min(torch.finfo().tiny), 0.0)
        change = self.grid.stored.round(scale + step) - scale
        change = torch.where(change * (change * curvature - 2 * slope) < 0, change, 0.0)
        scale += change
        products_gn -= spread_gn * change
