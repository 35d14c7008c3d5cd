"""Second moments of layer inputs, one per shared input: E[x x'], and how far x is from the original model's input.

With x the input that the layer really gets and x0 the one it had before anything was quantized, the cross moment
E[(x0 - x) x'] is what a layer needs to repair the error it receives (see `quantize/correct.py`).

Rows (tokens) that hold a NaN or inf are left out and counted: one bad token must not cost the whole layer.
"""

from __future__ import annotations

import math

import torch

from llmmpq.errors import CalibrationError
from llmmpq.ranks import ALONE, Ranks


class Moment:
    """Accumulates over tokens in float32; where several processes share the tokens, the means are over all."""

    def __init__(
        self, num_features: int, *, device: torch.device, with_cross: bool = False, ranks: Ranks = ALONE
    ) -> None:
        self.ranks = ranks
        self.sum_KK = torch.zeros(num_features, num_features, dtype=torch.float32, device=device)
        self.cross_sum_KK = torch.zeros_like(self.sum_KK) if with_cross else None
        self.num_rows = 0
        self.num_excluded = 0

    def add(self, inputs: torch.Tensor, originals: torch.Tensor | None = None) -> None:
        rows_TK = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        change_TK = None
        if self.cross_sum_KK is not None and originals is not None:
            change_TK = originals.detach().reshape(rows_TK.shape).float() - rows_TK
        if not _all_finite(rows_TK) or (change_TK is not None and not _all_finite(change_TK)):
            finite = torch.isfinite(rows_TK).all(dim=1)
            if change_TK is not None:
                finite &= torch.isfinite(change_TK).all(dim=1)
                change_TK = change_TK[finite]
            self.num_excluded += int((~finite).sum())
            rows_TK = rows_TK[finite]
        self.sum_KK.addmm_(rows_TK.t(), rows_TK)
        if self.cross_sum_KK is not None and change_TK is not None:
            self.cross_sum_KK.addmm_(change_TK.t(), rows_TK)
        self.num_rows += len(rows_TK)

    def means(self, where: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """E[x x'] and E[(x0 - x) x'], in place of the sums: the accumulator is used up."""
        self._sum_over_ranks()
        if self.num_rows == 0:
            raise CalibrationError(
                f"every activation entering {where} is NaN or infinite ({self.num_excluded} tokens): the model "
                "diverges on this text. Try --dtype float32 or other calibration text."
            )
        cross = None if self.cross_sum_KK is None else self.cross_sum_KK.div_(self.num_rows)
        return self.sum_KK.div_(self.num_rows), cross

    def _sum_over_ranks(self) -> None:
        self.ranks.sum_(self.sum_KK)
        if self.cross_sum_KK is not None:
            self.ranks.sum_(self.cross_sum_KK)
        num_rows, num_excluded = self.ranks.sum_numbers(self.num_rows, self.num_excluded)
        self.num_rows, self.num_excluded = int(num_rows), int(num_excluded)


def _all_finite(rows: torch.Tensor) -> bool:
    # A finite norm proves every entry finite, and costs one pass without a mask.
    return math.isfinite(float(torch.linalg.vector_norm(rows)))
