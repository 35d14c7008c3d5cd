"""One matrix and the second moment of its input, to exactly what is stored on disk."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from llmmpq.quantize.descent import descend
from llmmpq.quantize.gptq import Factor, gptq
from llmmpq.quantize.grid import Grid, combine_grids, find_grid
from llmmpq.quantize.groups import assign_widths, group_losses
from llmmpq.quantize.rtn import round_to_nearest
from llmmpq.quantize.scales import stored_scales_for
from llmmpq.quantize.tune import Rounded, begin_tuning
from llmmpq.records import PackedTensor, Scheme
from llmmpq_kernels.layout import pack
from llmmpq_kernels.reference import dequantize
from llmmpq_kernels.runs import pack_runs, pack_zeros


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """The packed matrix and the algorithm that really ran; `rounded` is what tuning begins with, where asked for."""

    packed: PackedTensor
    algorithm: str
    rounded: Rounded | None = None


class LinearQuantizer:
    """One matrix and what is known of its input. What several schemes of it have in common is computed once."""

    def __init__(
        self,
        weight_NK: torch.Tensor,
        *,
        importance_K: torch.Tensor,
        factor: Factor | None,
        column_block: int,
        sweeps: int,
    ) -> None:
        self.weight_NK, self.factor = weight_NK, factor
        finite = bool(torch.isfinite(importance_K).all())
        self.importance_K = importance_K if finite else torch.ones_like(importance_K)
        self.column_block, self.sweeps = column_block, sweeps
        self._group_losses: dict[Scheme, np.ndarray] = {}

    def quantize(self, scheme: Scheme, *, to_be_tuned: bool = False) -> Quantized:
        """GPTQ and sweeps of descent when a factor is given, otherwise round to nearest on the same kind of grid."""
        weight_NK, grid, factor = self.weight_NK, self._grid(scheme), self.factor
        if factor is None:
            codes_NK = round_to_nearest(weight_NK, grid)
        else:
            codes_NK = gptq(weight_NK, grid, factor, column_block=self.column_block)
            codes_NK, grid = descend(
                weight_NK, codes_NK, grid, factor, sweeps=self.sweeps, column_block=self.column_block
            )
        return Quantized(
            packed=pack_codes(codes_NK, grid),
            algorithm="rtn" if factor is None else "gptq",
            rounded=begin_tuning(weight_NK, codes_NK, grid, factor) if to_be_tuned else None,
        )

    def _grid(self, scheme: Scheme) -> Grid:
        """The grid of the scheme; where it has several widths, the groups that lose most get the wide ones."""
        if not scheme.mixed:
            return find_grid(self.weight_NK, scheme, self.importance_K)
        runs = scheme.widths((self.weight_NK.shape[0], self.weight_NK.shape[1]))
        stored = stored_scales_for(self.weight_NK, scheme, runs[0][0])
        grids = [find_grid(self.weight_NK, scheme, self.importance_K, bits=bits, stored=stored) for bits, _ in runs]
        losses_GB = np.stack([self._losses(scheme, bits) for bits, _ in runs], axis=1)
        return combine_grids(grids, assign_widths(losses_GB, [count for _, count in runs]))

    def _losses(self, scheme: Scheme, bits: int) -> np.ndarray:
        """What each group loses at this width, with scales of the width's own: the same for all mixtures."""
        alone = dataclasses.replace(scheme, bits=bits, runs=())
        if alone not in self._group_losses:
            self._group_losses[alone] = group_losses(
                self.weight_NK,
                find_grid(self.weight_NK, alone, self.importance_K),
                factor=self.factor,
                importance_K=self.importance_K,
                column_block=self.column_block,
            )
        return self._group_losses[alone]


def quantize_linear(
    weight_NK: torch.Tensor,
    scheme: Scheme,
    *,
    importance_K: torch.Tensor,
    factor: Factor | None,
    column_block: int,
    sweeps: int = 0,
) -> Quantized:
    """One matrix in one scheme."""
    quantizer = LinearQuantizer(
        weight_NK, importance_K=importance_K, factor=factor, column_block=column_block, sweeps=sweeps
    )
    return quantizer.quantize(scheme)


def pack_codes(codes_NK: torch.Tensor, grid: Grid) -> PackedTensor:
    """What is stored of a matrix."""
    scheme, shape = grid.scheme, (codes_NK.shape[0], codes_NK.shape[1])
    zeros_GN = grid.zeros_NG.t().to(torch.uint8).contiguous()
    scales, base = grid.stored.encode(grid.scales_NG), grid.stored.base
    if scheme.bits is not None:
        zeros = None if scheme.symmetric else pack(zeros_GN, bits=scheme.bits)
        return PackedTensor(
            words=pack(codes_NK, bits=scheme.bits),
            scales=scales,
            zeros=zeros,
            scale_base=base,
            scheme=scheme,
            shape=shape,
        )
    runs = scheme.widths(shape)
    order_G = torch.argsort(grid.widths_G, stable=True).to(codes_NK.device)
    return PackedTensor(
        words=pack_runs(codes_NK, order_G, runs=runs, group_size=scheme.group_size),
        scales=scales[:, order_G].contiguous(),
        zeros=None if scheme.symmetric else pack_zeros(zeros_GN, order_G, runs=runs),
        order=order_G.to(torch.int32),
        scale_base=base,
        scheme=scheme,
        shape=shape,
    )


def dequantized(packed: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight that the packed tensor stands for: what every runtime computes with."""
    return dequantize(
        packed.words,
        packed.scales,
        packed.zeros,
        order=packed.order,
        scale_base=packed.scale_base,
        runs=packed.scheme.widths(packed.shape),
        group_size=packed.scheme.group_size,
        shape=packed.shape,
        dtype=dtype,
    )
