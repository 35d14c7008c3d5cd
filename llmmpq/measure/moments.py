"""Second moments of layer inputs, one per shared input: E[x x'], and how far x is from the original model's input.

With x the input that the layer really gets and x0 the one it had before anything was quantized, the cross moment
E[(x0 - x) x'] is what a layer needs to repair the error it receives (see `quantize/correct.py`).

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

    def __init__(
        self, num_features: int, *, device: torch.device, with_cross: bool = False, ranks: Ranks = ALONE
    ) -> None:
        self.ranks = ranks
        self.num_features, self.device = num_features, device
        bands = [(start, min(BAND, num_features - start)) for start in range(0, num_features, BAND)]
        # Row `start` + i of a band of the symmetric sum begins at column `start`.
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.bands = [zeros(rows, num_features - start) for start, rows in bands]
        self.cross_bands = [zeros(rows, num_features) for _, rows in bands] if with_cross else None
        self.num_rows = 0
        self.num_excluded = 0

    def add(self, inputs: torch.Tensor, originals: torch.Tensor | None = None) -> None:
        rows_TK = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        change_TK = None
        if self.cross_bands is not None and originals is not None:
            change_TK = originals.detach().reshape(rows_TK.shape).float() - rows_TK
        if not _all_finite(rows_TK) or (change_TK is not None and not _all_finite(change_TK)):
            finite = torch.isfinite(rows_TK).all(dim=1)
            if change_TK is not None:
                finite &= torch.isfinite(change_TK).all(dim=1)
                change_TK = change_TK[finite]
            self.num_excluded += int((~finite).sum())
            rows_TK = rows_TK[finite]
        for number, band in enumerate(self.bands):
            start, end = number * BAND, number * BAND + len(band)
            band.add_(rows_TK[:, start:end].t() @ rows_TK[:, start:])
            if self.cross_bands is not None and change_TK is not None:
                self.cross_bands[number].add_(change_TK[:, start:end].t() @ rows_TK)
        self.num_rows += len(rows_TK)

    def means(self, where: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """E[x x'] and E[(x0 - x) x'], in float32, in place of the sums: the accumulator is used up."""
        self._sum_over_ranks()
        if self.num_rows == 0:
            raise CalibrationError(
                f"every activation entering {where} is NaN or infinite ({self.num_excluded} tokens): the model "
                "diverges on this text. Try --dtype float32 or other calibration text."
            )
        # The cross moment first: its bands are the larger ones, and go as they are read.
        cross_KK = None if self.cross_bands is None else self._empty()
        if cross_KK is not None:
            assert self.cross_bands is not None
            for number in range(len(self.cross_bands)):
                band = self.cross_bands.pop(0).div_(self.num_rows)
                cross_KK[number * BAND : number * BAND + len(band)] = band
        mean_KK = self._empty()
        for number in range(len(self.bands)):
            band = self.bands.pop(0).div_(self.num_rows)
            start, end = number * BAND, number * BAND + len(band)
            mean_KK[start:end, start:] = band
            mean_KK[end:, start:end] = band[:, len(band) :].t()
        return mean_KK, cross_KK

    def _empty(self) -> torch.Tensor:
        return torch.empty(self.num_features, self.num_features, dtype=torch.float32, device=self.device)

    def _sum_over_ranks(self) -> None:
        for band in (*self.bands, *(self.cross_bands or ())):
            self.ranks.sum_(band)
        num_rows, num_excluded = self.ranks.sum_numbers(self.num_rows, self.num_excluded)
        self.num_rows, self.num_excluded = int(num_rows), int(num_excluded)


def _all_finite(rows: torch.Tensor) -> bool:
    # A finite norm proves every entry finite, and costs one pass without a mask.
    return math.isfinite(float(torch.linalg.vector_norm(rows)))
