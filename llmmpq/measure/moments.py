"""Second moments of layer inputs, E[x x'], one per shared input.

Rows (tokens) that hold a NaN or inf are left out and counted: one bad token must not cost the whole layer.
"""

from __future__ import annotations

import math

import torch

from llmmpq.errors import CalibrationError


class Moment:
    """Accumulates x'x over tokens in float32."""

    def __init__(self, num_features: int, *, device: torch.device) -> None:
        self.sum_KK = torch.zeros(num_features, num_features, dtype=torch.float32, device=device)
        self.num_rows = 0
        self.num_excluded = 0

    def add(self, inputs: torch.Tensor) -> None:
        rows_TK = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        # A finite sum of squares proves every entry finite; only otherwise is each row looked at.
        if not math.isfinite(float(torch.linalg.vector_norm(rows_TK))):
            finite = torch.isfinite(rows_TK).all(dim=1)
            self.num_excluded += int((~finite).sum())
            rows_TK = rows_TK[finite]
        self.sum_KK.addmm_(rows_TK.t(), rows_TK)
        self.num_rows += len(rows_TK)

    def mean(self, where: str) -> torch.Tensor:
        """E[x x'], in place of the sum: the accumulator is used up."""
        if self.num_rows == 0:
            raise CalibrationError(
                f"every activation entering {where} is NaN or infinite ({self.num_excluded} tokens): the model "
                "diverges on this text. Try --dtype float32 or other calibration text."
            )
        return self.sum_KK.div_(self.num_rows)
