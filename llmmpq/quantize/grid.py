"""Scales and zeros of a matrix, found by an error-weighted search.

In: the weight (rows = outputs), a scheme, and the importance h of each input channel (the diagonal of the input's
second moment). Out: a `Grid` whose scales are already rounded to what is stored. For every group of every row it
approximately minimises

    sum_k h_k (w_k - s (q_k - z))^2,    q_k = clamp(round(w_k / s) + z, 0, 2^b - 1)

by trying shrunken ranges, then refitting s in closed form with the codes fixed and requantizing. Symmetric grids fix
z at 2^(b-1) and may have negative scales, so that the extra level falls on whichever side needs it. Plain min/max
(no search) was rejected: at 2 bits it loses more than all of GPTQ gains.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from llmmpq.errors import CheckpointError
from llmmpq.records import Scheme

# Legend: N rows (outputs), K columns (inputs), G groups, g columns of a group.
# Ranges tried: (number, narrowest as a share of min..max). Clipping pays at two bits and hardly at eight.
SHRINKS = {2: (12, 0.4), 3: (10, 0.5), 4: (6, 0.75), 8: (2, 0.97)}
# Closed-form refits of the scale; in the first the zero may also move by one step.
NUM_REFITS = 2
# The smallest positive float16. Subnormal scales are coarse, but the search sees the scale as it will be stored.
SMALLEST_SCALE = 2.0**-24
LARGEST_SCALE = 65504.0
CHUNK_ELEMENTS = 1 << 19


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Scales (float32, exactly representable in the stored dtype) and zeros (whole numbers) per row and group."""

    scales_NG: torch.Tensor
    zeros_NG: torch.Tensor
    scheme: Scheme

    @property
    def largest_code(self) -> int:
        return 2**self.scheme.bits - 1


def find_grid(weight_NK: torch.Tensor, scheme: Scheme, importance_K: torch.Tensor) -> Grid:
    num_rows, num_columns = weight_NK.shape
    if _widest_scale(weight_NK, scheme) > LARGEST_SCALE:
        raise CheckpointError(
            f"weights of a {num_rows} x {num_columns} layer reach {float(weight_NK.abs().max()):.3g}: their scale "
            "does not fit into float16. Name the layer with --keep to leave it unquantized."
        )
    num_groups = scheme.num_groups(num_columns)
    scales = weight_NK.new_empty(num_rows, num_groups, dtype=torch.float32)
    zeros = torch.empty_like(scales)
    for rows, groups in _pieces(num_rows, num_columns, scheme.group_size):
        piece = weight_NK[rows, groups.start * scheme.group_size : groups.stop * scheme.group_size].float()
        weight_NGg = piece.reshape(piece.shape[0], groups.stop - groups.start, -1)
        columns = slice(groups.start * scheme.group_size, groups.start * scheme.group_size + piece.shape[1])
        importance_Gg = importance_K[columns].float().reshape(weight_NGg.shape[1:])
        scales[rows, groups], zeros[rows, groups] = _search(weight_NGg, importance_Gg, scheme)
    return Grid(scales_NG=scales, zeros_NG=zeros, scheme=scheme)


def _widest_scale(weight_NK: torch.Tensor, scheme: Scheme) -> float:
    low, high = min(float(weight_NK.min()), 0.0), max(float(weight_NK.max()), 0.0)
    return max(high, -low) / 2 ** (scheme.bits - 1) if scheme.symmetric else (high - low) / (2**scheme.bits - 1)


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


def _stored(scales: torch.Tensor) -> torch.Tensor:
    """Round to the nearest float16 within range, never to zero, keeping the sign."""
    magnitude = scales.abs().clamp(SMALLEST_SCALE, LARGEST_SCALE).half().float()
    return torch.where(scales < 0, -magnitude, magnitude)


def _error(
    weight: torch.Tensor, importance: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted squared error per group, and the centred codes q - z."""
    spread, shift = scales.unsqueeze(-1), zeros.unsqueeze(-1)
    centred = torch.div(weight, spread).round_().add_(shift).clamp_(0, top).sub_(shift)
    residual = torch.addcmul(weight, centred, spread, value=-1)
    return residual.square_().mul_(importance).sum(-1), centred


def _search(weight: torch.Tensor, importance: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    top = 2**scheme.bits - 1
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

    for scales, zeros in _starting_points(weight, scheme, top):
        consider(scales, zeros)
    for refit in range(NUM_REFITS):
        scales, zeros = best_scales, best_zeros
        for shift in (0, -1, 1) if refit == 0 and not scheme.symmetric else (0,):
            shifted = (zeros + shift).clamp(0, top)
            centred = consider(scales, shifted)
            weighted = centred * importance
            denominator = (weighted * centred).sum(-1)
            fitted = torch.where(
                denominator > 0, (weighted * weight).sum(-1) / denominator.clamp_min(torch.finfo().tiny), scales
            )
            consider(_stored(fitted), shifted)
    return best_scales, best_zeros


def _starting_points(weight: torch.Tensor, scheme: Scheme, top: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    low = weight.amin(-1).clamp_max(0)
    high = weight.amax(-1).clamp_min(0)
    num_steps, narrowest = SHRINKS[scheme.bits]
    for step in range(num_steps):
        shrink = 1 - (1 - narrowest) * step / (num_steps - 1)
        if scheme.symmetric:
            zeros = torch.full_like(low, 2 ** (scheme.bits - 1))
            reach = torch.maximum(high, -low) * shrink / 2 ** (scheme.bits - 1)
            yield _stored(reach), zeros
            yield _stored(-reach), zeros
        else:
            scales = _stored((high - low) * shrink / top)
            yield scales, torch.round(-low * shrink / scales).clamp(0, top)
    if scheme.symmetric:
        # Wide enough for both ends: exact for weights that are -1, 0 and 1, as ternary models have them.
        levels = 2 ** (scheme.bits - 1)
        yield _stored(torch.maximum(high, -low) / (levels - 1)), torch.full_like(low, levels)
