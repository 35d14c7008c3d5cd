"""Scales and zeros of a matrix, found by an error-weighted search.

In: the weight (rows = outputs), a scheme, and the importance h of each input channel (the diagonal of the input's
second moment). Out: a `Grid` whose scales are already such as are stored. For every group of every row it
approximately minimises

    sum_k h_k (w_k - s (q_k - z))^2,    q_k = clamp(round(w_k / s) + z, 0, 2^b - 1)

by trying shrunken ranges, then refitting s in closed form with the codes fixed and requantizing. Symmetric grids fix
z at 2^(b-1) and may have negative scales, so that the extra level falls on whichever side needs it. Plain min/max
(no search) was rejected: at 2 bits it loses more than all of GPTQ gains.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from llmmpq.quantize.scales import StoredScales, stored_scales_for
from llmmpq.records import Scheme

# Legend: N rows (outputs), K columns (inputs), G groups, g columns of a group.
# Ranges tried: (number, narrowest as a share of min..max). Clipping pays at two bits and hardly at eight.
SHRINKS = {2: (12, 0.4), 3: (10, 0.5), 4: (6, 0.75), 8: (2, 0.97)}
# Closed-form refits of the scale; in the first the zero may also move by one step.
NUM_REFITS = 2
CHUNK_ELEMENTS = 1 << 19


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Scales (float32, exactly such as can be stored), zeros (whole numbers) per row and group; widths per group."""

    scales_NG: torch.Tensor
    zeros_NG: torch.Tensor
    widths_G: torch.Tensor  # uint8, in the order of the matrix
    stored: StoredScales
    scheme: Scheme

    @property
    def largest_codes(self) -> list[float]:
        """Of each group."""
        return [float(2**bits - 1) for bits in self.widths_G.tolist()]

    def values(self, codes_NK: torch.Tensor) -> torch.Tensor:
        """What the codes stand for."""
        size, num_columns = self.scheme.group_size, codes_NK.shape[1]
        scales_NK = self.scales_NG.repeat_interleave(size, dim=1)[:, :num_columns]
        zeros_NK = self.zeros_NG.repeat_interleave(size, dim=1)[:, :num_columns]
        return (codes_NK - zeros_NK).mul_(scales_NK)


def find_grid(
    weight_NK: torch.Tensor,
    scheme: Scheme,
    importance_K: torch.Tensor,
    *,
    bits: int | None = None,
    stored: StoredScales | None = None,
) -> Grid:
    """The grid with `bits` in every group, the scheme's own unless given; scales from `stored`, or the width's own."""
    bits = bits or scheme.bits
    if bits is None:
        raise ValueError(f"a scheme of several widths has no one grid: give bits, {scheme}")
    stored = stored or stored_scales_for(weight_NK, scheme, bits)
    num_rows, num_columns = weight_NK.shape
    num_groups = scheme.num_groups(num_columns)
    scales = weight_NK.new_empty(num_rows, num_groups, dtype=torch.float32)
    zeros = torch.empty_like(scales)
    for rows, groups in _pieces(num_rows, num_columns, scheme.group_size):
        piece = weight_NK[rows, groups.start * scheme.group_size : groups.stop * scheme.group_size].float()
        weight_NGg = piece.reshape(piece.shape[0], groups.stop - groups.start, -1)
        columns = slice(groups.start * scheme.group_size, groups.start * scheme.group_size + piece.shape[1])
        importance_Gg = importance_K[columns].float().reshape(weight_NGg.shape[1:])
        found = _search(weight_NGg, importance_Gg, stored, bits=bits, symmetric=scheme.symmetric)
        scales[rows, groups], zeros[rows, groups] = found
    widths_G = torch.full((num_groups,), bits, dtype=torch.uint8)
    return Grid(scales_NG=scales, zeros_NG=zeros, widths_G=widths_G, stored=stored, scheme=scheme)


def combine_grids(grids: Sequence[Grid], choice_G: Sequence[int]) -> Grid:
    """The grid that takes each group from the grid of its choice; they must share their stored scales."""
    groups = list(range(len(choice_G)))
    stack_BNG = torch.stack([grid.scales_NG for grid in grids])
    zeros_BNG = torch.stack([grid.zeros_NG for grid in grids])
    widths_BG = torch.stack([grid.widths_G for grid in grids])
    return Grid(
        scales_NG=stack_BNG[choice_G, :, groups].t().contiguous(),
        zeros_NG=zeros_BNG[choice_G, :, groups].t().contiguous(),
        widths_G=widths_BG[choice_G, groups],
        stored=grids[0].stored,
        scheme=grids[0].scheme,
    )


def _pieces(num_rows: int, num_columns: int, group_size: int) -> Iterator[tuple[slice, slice]]:
    """Row blocks that stay in cache, full groups and a short last group apart."""
    full = num_columns // group_size
    num_groups = -(-num_columns // group_size)
    rows = max(1, CHUNK_ELEMENTS // num_columns)
    for start in range(0, num_rows, rows):
        if full:
            yield slice(start, min(start + rows, num_rows)), slice(0, full)
        if num_groups > full:
            yield slice(start, min(start + rows, num_rows)), slice(full, num_groups)


def _error(
    weight: torch.Tensor, importance: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted squared error per group, and the centred codes q - z."""
    spread, shift = scales.unsqueeze(-1), zeros.unsqueeze(-1)
    centred = torch.div(weight, spread).round_().add_(shift).clamp_(0, top).sub_(shift)
    residual = torch.addcmul(weight, centred, spread, value=-1)
    return residual.square_().mul_(importance).sum(-1), centred


def _search(
    weight: torch.Tensor, importance: torch.Tensor, stored: StoredScales, *, bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    top = 2**bits - 1
    best_error = weight.new_full(weight.shape[:-1], torch.inf)
    best_scales = torch.ones_like(best_error)
    best_zeros = torch.zeros_like(best_error)

    def consider(scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        nonlocal best_error, best_scales, best_zeros
        error, centred = _error(weight, importance, scales, zeros, top)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scales = torch.where(better, scales, best_scales)
        best_zeros = torch.where(better, zeros, best_zeros)
        return centred

    for scales, zeros in _starting_points(weight, stored, bits=bits, symmetric=symmetric):
        consider(scales, zeros)
    for refit in range(NUM_REFITS):
        scales, zeros = best_scales, best_zeros
        for shift in (0, -1, 1) if refit == 0 and not symmetric else (0,):
            shifted = (zeros + shift).clamp(0, top)
            centred = consider(scales, shifted)
            weighted = centred * importance
            denominator = (weighted * centred).sum(-1)
            fitted = torch.where(
                denominator > 0, (weighted * weight).sum(-1) / denominator.clamp_min(torch.finfo().tiny), scales
            )
            consider(stored.round(fitted), shifted)
    return best_scales, best_zeros


def _starting_points(
    weight: torch.Tensor, stored: StoredScales, *, bits: int, symmetric: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    low = weight.amin(-1).clamp_max(0)
    high = weight.amax(-1).clamp_min(0)
    num_steps, narrowest = SHRINKS[bits]
    shrinks = [1 - (1 - narrowest) * step / (num_steps - 1) for step in range(num_steps)]
    if stored.shortfall:
        # Else coarse scales clip the ends of about every other group, which at eight bits costs more than all rounding.
        shrinks.insert(0, 1 + stored.shortfall)
    for shrink in shrinks:
        if symmetric:
            zeros = torch.full_like(low, 2 ** (bits - 1))
            reach = torch.maximum(high, -low) * shrink / 2 ** (bits - 1)
            yield stored.round(reach), zeros
            if stored.signed:
                yield stored.round(-reach), zeros
        else:
            scales = stored.round((high - low) * shrink / (2**bits - 1))
            yield scales, torch.round(-low * shrink / scales).clamp(0, 2**bits - 1)
    if symmetric:
        # Wide enough for both ends: exact for weights that are -1, 0 and 1, as ternary models have them.
        levels = 2 ** (bits - 1)
        yield stored.round(torch.maximum(high, -low) / (levels - 1)), torch.full_like(low, levels)
