"""Which groups of a matrix get which width, when the numbers of both are given.

In: what each group loses at each width. Out: the assignment with the least total loss that has just those numbers of
groups per width: a transportation problem. It is solved exactly: all groups start in the first width, which is the
best there is for those counts, and are moved one at a time along the cheapest chain of moves (a from b to c, another
from c to d) to a width that lacks groups. Each step keeps the assignment optimal for the counts it has (successive
shortest paths), and with at most four widths a chain is one of a few. For two widths this is taking the groups in
the order of what they gain.

The loss of a group is the part of GPTQ's own error sum that falls into its columns, so a group counts with how well its
channels' neighbours can make up for it (SliM-LLM, Huang et al., 2024, takes the same sum for a salience). Without a
factor it is the rounding error, weighted by the energy of the inputs. Rejected: a general assignment solver, G x G in
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, permutations

import numpy as np
import torch

from llmmpq.quantize.gptq import Factor, gptq
from llmmpq.quantize.grid import Grid
from llmmpq.quantize.rtn import round_to_nearest

# Legend: N rows (outputs), K columns (inputs), G groups, B widths.


def group_losses(
    weight_NK: torch.Tensor,
    grid: Grid,
    *,
    factor: Factor | None,
    importance_K: torch.Tensor,
    column_block: int,
) -> np.ndarray:
    """What each group loses on the grid, summed over its columns and all rows (losses_G, float64)."""
    if factor is None:
        losses_K = _rounding_losses(weight_NK, grid) * importance_K.float()
    else:
        losses_K = torch.empty(weight_NK.shape[1], dtype=torch.float32, device=weight_NK.device)
        gptq(weight_NK, grid, factor, column_block=column_block, losses_K=losses_K)
    starts = range(0, weight_NK.shape[1], grid.scheme.group_size)
    return np.add.reduceat(losses_K.double().cpu().numpy(), starts)


def _rounding_losses(weight_NK: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Squared error of plain rounding, summed over the rows, group by group: copies of the matrix may not fit."""
    codes_NK = round_to_nearest(weight_NK, grid)
    losses = []
    for group, codes in enumerate(codes_NK.split(grid.scheme.group_size, dim=1)):
        start = group * grid.scheme.group_size
        values = (codes.float() - grid.zeros_NG[:, group, None]) * grid.scales_NG[:, group, None]
        losses.append((weight_NK[:, start : start + codes.shape[1]].float() - values).square().sum(0))
    return torch.cat(losses)


def assign_widths(losses_GB: np.ndarray, counts: Sequence[int]) -> list[int]:
    """For each group the position of its width, `counts[b]` groups at width b; of equal ones the first group moves."""
    num_groups, num_widths = losses_GB.shape
    if sum(counts) != num_groups or min(counts) < 0:
        raise ValueError(f"counts {tuple(counts)} must share out {num_groups} groups")
    choice_G = np.zeros(num_groups, dtype=np.int64)
    missing = [0, *counts[1:]]
    chains = [
        (0, *between, last)
        for last in range(1, num_widths)
        for length in range(num_widths - 1)
        for between in permutations([width for width in range(1, num_widths) if width != last], length)
    ]
    for _ in range(num_groups - counts[0]):
        moves = {}
        for start in range(num_widths):
            inside = np.flatnonzero(choice_G == start)
            for stop in range(num_widths):
                if len(inside) and stop != start:
                    gains = losses_GB[inside, stop] - losses_GB[inside, start]
                    first = int(np.argmin(gains))
                    moves[start, stop] = (float(gains[first]), int(inside[first]))
        usable = [chain for chain in chains if missing[chain[-1]] and all(step in moves for step in pairwise(chain))]
        best = min(usable, key=lambda chain: sum(moves[step][0] for step in pairwise(chain)))
        for start, stop in pairwise(best):
            choice_G[moves[start, stop][1]] = stop
        missing[best[-1]] -= 1
    return [int(position) for position in choice_G]
