"""One matrix and the second moment of its input, to exactly what is stored on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llmmpq.quantize.descent import descend
from llmmpq.quantize.gptq import Factor, gptq
from llmmpq.quantize.grid import Grid, combine_grids, find_grid
from llmmpq.quantize.groups import assign_widths, group_losses
from llmmpq.quantize.rtn import round_to_nearest
from llmmpq.quantize.scales import StoredScales, stored_scales_for
from llmmpq.quantize.shape import Piece, shape_errors
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


@dataclass(frozen=True, kw_only=True)
class _Groups:
    """What all rows of a matrix have in common: the scales that can be stored and, of several widths, each group's."""

    scheme: Scheme
    stored: StoredScales
    widths: tuple[int, ...] = ()
    choice_G: Sequence[int] | None = None


class LinearQuantizer:
    """One matrix and what is known of its input. What several schemes of it have in common is computed once.

    With `pieces` its rows share their errors (`shape.py`); without them, each row is by itself.
    """

    def __init__(
        self,
        weight_NK: torch.Tensor,
        *,
        importance_K: torch.Tensor,
        factor: Factor | None,
        column_block: int,
        sweeps: int,
        pieces: Sequence[Piece] | None = None,
    ) -> None:
        self.weight_NK, self.factor, self.pieces = weight_NK, factor, pieces
        finite = bool(torch.isfinite(importance_K).all())
        self.importance_K = importance_K if finite else torch.ones_like(importance_K)
        self.column_block, self.sweeps = column_block, sweeps
        self._group_losses: dict[Scheme, np.ndarray] = {}

    def quantize(self, scheme: Scheme, *, to_be_tuned: bool = False) -> Quantized:
        """GPTQ and sweeps of descent when a factor is given, otherwise round to nearest on the same kind of grid."""
        weight_NK, factor = self.weight_NK, self.factor
        if factor is None:
            grid = self._grid(weight_NK, self._groups(scheme))
            codes_NK = round_to_nearest(weight_NK, grid)
        elif self.pieces is None:
            codes_NK, grid = self._round(weight_NK, self._groups(scheme), factor)
        else:
            weight_NK, codes_NK, grid = self._shaped(scheme, factor, self.pieces)
        return Quantized(
            packed=pack_codes(codes_NK, grid),
            algorithm="rtn" if factor is None else "gptq",
            rounded=begin_tuning(weight_NK, codes_NK, grid, factor) if to_be_tuned else None,
        )

    def _shaped(
        self, scheme: Scheme, factor: Factor, pieces: Sequence[Piece]
    ) -> tuple[torch.Tensor, torch.Tensor, Grid]:
        """Part by part: what each row was asked to be, its codes, and the grid of all."""
        groups = self._groups(scheme)
        codes_NK = torch.empty(self.weight_NK.shape, dtype=torch.uint8, device=self.weight_NK.device)
        shape = (len(codes_NK), scheme.num_groups(codes_NK.shape[1]))
        scales_NG = torch.empty(shape, dtype=torch.float32, device=codes_NK.device)
        zeros_NG = torch.empty_like(scales_NG)
        parts: list[Grid] = []

        def quantize(rows_n: torch.Tensor, wanted_nK: torch.Tensor) -> torch.Tensor:
            codes_nK, part = self._round(wanted_nK, groups, factor)
            codes_NK[rows_n], scales_NG[rows_n], zeros_NG[rows_n] = codes_nK, part.scales_NG, part.zeros_NG
            parts.append(part)
            return part.values(codes_nK)

        wanted_NK = shape_errors(self.weight_NK, pieces, quantize)
        return wanted_NK, codes_NK, dataclasses.replace(parts[0], scales_NG=scales_NG, zeros_NG=zeros_NG)

    def _round(self, weight_NK: torch.Tensor, groups: _Groups, factor: Factor) -> tuple[torch.Tensor, Grid]:
        grid = self._grid(weight_NK, groups)
        codes_NK = gptq(weight_NK, grid, factor, column_block=self.column_block)
        return descend(weight_NK, codes_NK, grid, factor, sweeps=self.sweeps, column_block=self.column_block)

    def _grid(self, weight_NK: torch.Tensor, groups: _Groups) -> Grid:
        def of_width(bits: int | None) -> Grid:
            return find_grid(weight_NK, groups.scheme, self.importance_K, bits=bits, stored=groups.stored)

        if groups.choice_G is None:
            return of_width(None)
        return combine_grids([of_width(bits) for bits in groups.widths], groups.choice_G)

    def _groups(self, scheme: Scheme) -> _Groups:
        """Where a scheme has several widths, the groups that lose most get the wide ones."""
        if scheme.bits is not None:
            stored = stored_scales_for(self.weight_NK, scheme, scheme.bits)
            return _Groups(scheme=scheme, stored=stored)
        runs = scheme.widths((self.weight_NK.shape[0], self.weight_NK.shape[1]))
        losses_GB = np.stack([self._losses(scheme, bits) for bits, _ in runs], axis=1)
        return _Groups(
            scheme=scheme,
            stored=stored_scales_for(self.weight_NK, scheme, runs[0][0]),
            widths=tuple(bits for bits, _ in runs),
            choice_G=assign_widths(losses_GB, [count for _, count in runs]),
        )

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
