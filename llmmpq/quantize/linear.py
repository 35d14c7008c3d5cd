"""One matrix and the second moment of its input, to exactly what is stored on disk."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmmpq.quantize.gptq import Factor, gptq
from llmmpq.quantize.grid import Grid, find_grid
from llmmpq.quantize.rtn import round_to_nearest
from llmmpq.records import PackedTensor, Scheme
from llmmpq_kernels.layout import pack
from llmmpq_kernels.reference import dequantize


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """The packed matrix and the algorithm that really ran."""

    packed: PackedTensor
    algorithm: str


def quantize_linear(
    weight_NK: torch.Tensor,
    scheme: Scheme,
    *,
    importance_K: torch.Tensor,
    factor: Factor | None,
    column_block: int,
) -> Quantized:
    """GPTQ when a factor is given, otherwise round to nearest on the same kind of grid."""
    if not bool(torch.isfinite(importance_K).all()):
        importance_K = torch.ones_like(importance_K)
    grid = find_grid(weight_NK, scheme, importance_K)
    if factor is None:
        return Quantized(packed=_packed(round_to_nearest(weight_NK, grid), grid), algorithm="rtn")
    codes_NK = gptq(weight_NK, grid, factor, column_block=column_block)
    return Quantized(packed=_packed(codes_NK, grid), algorithm="gptq")


def _packed(codes_NK: torch.Tensor, grid: Grid) -> PackedTensor:
    bits = grid.scheme.bits
    zeros_GN = grid.zeros_NG.t().to(torch.uint8).contiguous()
    return PackedTensor(
        words=pack(codes_NK, bits=bits),
        scales=grid.scales_NG.half(),
        zeros=None if grid.scheme.symmetric else pack(zeros_GN, bits=bits),
        scheme=grid.scheme,
        shape=(codes_NK.shape[0], codes_NK.shape[1]),
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
