"""Round to nearest on a given grid."""

from __future__ import annotations

import torch

from llmmpq.quantize.grid import Grid


def round_to_nearest(weight_NK: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes (uint8) of every weight."""
    size = grid.scheme.group_size
    num_columns = weight_NK.shape[1]
    codes_NK = torch.empty(weight_NK.shape, dtype=torch.uint8, device=weight_NK.device)
    for group, top in enumerate(grid.largest_codes):
        columns = slice(group * size, min((group + 1) * size, num_columns))
        scaled = weight_NK[:, columns].float() / grid.scales_NG[:, group, None]
        codes = (torch.round(scaled) + grid.zeros_NG[:, group, None]).clamp_(0, top)
        codes_NK[:, columns] = codes.to(torch.uint8)
    return codes_NK
