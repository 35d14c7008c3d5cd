"""Second moments of layer inputs, one per shared input: E[x x'], and E[e x'] of an error e that goes with x.

The cross moment is what a layer needs to repair an error (see `quantize/correct.py`): with x the input that it really
gets, e is x0 - x, x0 being the input before anything was quantized, or what its output should have added.

Rows (tokens) that hold a NaN or inf are left out and counted: one bad token must not cost the whole layer.

Products of a batch are formed in float32 and added up in float64, where adding float32 numbers of like size is exact:
so the order of the sum, and with it how many processes share it, leaves no trace. Summed in float32 it does, and GPTQ
makes different codes of it (up to 3 % in Q). Only the upper triangle of the symmetric sum is kept, in bands of rows:
what float64 costs in memory it saves again.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from llmmpq.errors import CalibrationError
from llmmpq.ranks import ALONE, Ranks

BAND = 512  # rows of a sum that are formed at a time


class Moment:
    """Accumulates over tokens; where several processes share them, the means are over all."""

    def __init__(self, num_features: int, *, device: torch.device, num_errors: int = 0, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self.num_features, self.num_errors, self.device = num_features, num_errors, device
        # Row `start` + i of a band of the symmetric sum begins at column `start`.
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.bands = [zeros(rows, num_features - start) for start, rows in _bands(num_features)]
        self.cross_bands = [zeros(rows, num_features) for _, rows in _bands(num_errors)]
        self.num_rows = 0
        self.num_excluded = 0
        self.num_without_errors = 0

    def add(self, inputs: torch.Tensor, errors: torch.Tensor | None = None) -> None:
        rows_TK = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        errors_TE = None
        if self.cross_bands and errors is not None:
            errors_TE = errors.detach().reshape(len(rows_TK), self.num_errors).float()
        if not _all_finite(rows_TK) or (errors_TE is not None and not _all_finite(errors_TE)):
            finite = torch.isfinite(rows_TK).all(dim=1)
            if errors_TE is not None:
                finite &= torch.isfinite(errors_TE).all(dim=1)
                errors_TE = errors_TE[finite]
            self.num_excluded += int((~finite).sum())
            rows_TK = rows_TK[finite]
        for band, (start, rows) in zip(self.bands, _bands(self.num_features), strict=True):
            band.add_(rows_TK[:, start : start + rows].t() @ rows_TK[:, start:])
        if errors_TE is not None:
            for band, (start, rows) in zip(self.cross_bands, _bands(self.num_errors), strict=True):
                band.add_(errors_TE[:, start : start + rows].t() @ rows_TK)
        elif self.cross_bands:
            self.num_without_errors += len(rows_TK)
        self.num_rows += len(rows_TK)

    def means(self, where: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """E[x x'] and E[e x'], in float32, in place of the sums: the accumulator is used up."""
        self._sum_over_ranks()
        if self.num_rows == 0:
            raise CalibrationError(
                f"every activation entering {where} is NaN or infinite ({self.num_excluded} tokens): the model "
                "diverges on this text. Try --dtype float32 or other calibration text."
            )
        # The cross moment first: its bands are the larger ones, and go as they are read.
        cross_EK = self._empty(self.num_errors) if self.cross_bands else None
        if cross_EK is not None:
            for start, rows in _bands(self.num_errors):
                cross_EK[start : start + rows] = self.cross_bands.pop(0).div_(self.num_rows)
        mean_KK = self._empty(self.num_features)
        for start, rows in _bands(self.num_features):
            band = self.bands.pop(0).div_(self.num_rows)
            mean_KK[start : start + rows, start:] = band
            mean_KK[start + rows :, start : start + rows] = band[:, rows:].t()
        return mean_KK, cross_EK

    def _empty(self, num_rows: int) -> torch.Tensor:
        return torch.empty(num_rows, self.num_features, dtype=torch.float32, device=self.device)

    def _sum_over_ranks(self) -> None:
        for band in (*self.bands, *self.cross_bands):
            self.ranks.sum_(band)
        numbers = self.ranks.sum_numbers(self.num_rows, self.num_excluded, self.num_without_errors)
        self.num_rows, self.num_excluded, self.num_without_errors = map(int, numbers)


def _bands(num_rows: int) -> list[tuple[int, int]]:
    """Where each band begins, and its number of rows."""
    return [(start, min(BAND, num_rows - start)) for start in range(0, num_rows, BAND)]


def _all_finite(rows: torch.Tensor) -> bool:
    # A finite norm proves every entry finite, and costs one pass without a mask.
    return math.isfinite(float(torch.linalg.vector_norm(rows)))
