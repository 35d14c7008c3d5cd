"""The oracle: dequantize a packed matrix in plain torch, and multiply with it.

    weight[n, k] = (code[n, k] - zero[n, g]) * scale[n, g],   g = k // group_size

in float32, cast to the wanted dtype last. Symmetric matrices have zero = 2^(bits - 1) everywhere. The last group
is short where group_size does not divide K. A matrix of one run is stored as in layout 1; one of several has an order
(`runs.py`). 8-bit scales have a base (`scales.py`).

Shape suffixes: N output rows, K input columns, G groups in a row, g columns of a group, W words in a row.
"""

from __future__ import annotations

import torch

from .layout import unpack
from .runs import Run, Runs, locate_runs
from .scales import widen_scales

# Rows are dequantized in blocks of about this many weights. On a CPU the float32 block (1 MiB) stays in the
# second-level cache, ten times as fast as the whole matrix at once; elsewhere the block only bounds the memory held.
CPU_BLOCK_WEIGHTS = 1 << 18
DEVICE_BLOCK_WEIGHTS = 1 << 24


def dequantize(
    words_NW: torch.Tensor,
    scales_NG: torch.Tensor,
    zeros: torch.Tensor | None,
    *,
    order: torch.Tensor | None = None,
    scale_base: torch.Tensor | None = None,
    runs: Runs,
    group_size: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The matrix [N, K] that the packed tensors stand for."""
    if (order is None) != (len(runs) == 1):
        raise ValueError(f"runs {runs} {'have no order' if order is None else 'of one width take no order'}")
    if (scale_base is None) != (scales_NG.dtype != torch.uint8):
        raise ValueError(f"{scales_NG.dtype} scales {'need' if scale_base is None else 'take no'} scale_base")
    located = locate_runs(runs, group_size=group_size, shape=shape)
    num_rows, num_columns = shape
    zeros_NG = _unpack_zeros(zeros, located, scales_NG)
    weights_NK = torch.empty(shape, dtype=dtype, device=words_NW.device)
    block_weights = CPU_BLOCK_WEIGHTS if words_NW.device.type == "cpu" else DEVICE_BLOCK_WEIGHTS
    block_rows = max(1, block_weights // max(1, num_columns))
    for start in range(0, num_rows, block_rows):
        rows = slice(start, start + block_rows)
        scales = widen_scales(scales_NG[rows], scale_base)
        block_zeros = zeros_NG[rows].to(torch.float32)
        if order is None:
            weights_NK[rows] = _dequantize_run(words_NW[rows], scales, block_zeros, located[0], group_size)
        else:
            block_NGg = scales.new_empty(*scales.shape, group_size)
            for run in located:
                words, groups = words_NW[rows, run.words], run.groups
                part = _dequantize_run(words, scales[:, groups], block_zeros[:, groups], run, group_size)
                block_NGg[:, order[groups].long()] = part.unflatten(1, (-1, group_size))
            weights_NK[rows] = block_NGg.flatten(1)[:, :num_columns]
    return weights_NK


def _unpack_zeros(zeros: torch.Tensor | None, located: list[Run], scales_NG: torch.Tensor) -> torch.Tensor:
    """Zeros (uint8) like the scales, in stored order."""
    zeros_NG = torch.empty(scales_NG.shape, dtype=torch.uint8, device=scales_NG.device)
    for run in located:
        if zeros is None:
            zeros_NG[:, run.groups] = 1 << (run.bits - 1)
        else:
            zeros_GW = zeros if len(located) == 1 else zeros[run.zeros].unflatten(0, (_length(run.groups), -1))
            zeros_NG[:, run.groups] = unpack(zeros_GW, bits=run.bits, num_columns=len(zeros_NG)).T
    return zeros_NG


def _dequantize_run(
    words_NW: torch.Tensor, scales_NG: torch.Tensor, zeros_NG: torch.Tensor, run: Run, group_size: int
) -> torch.Tensor:
    block = unpack(words_NW, bits=run.bits, num_columns=run.num_columns).to(torch.float32)
    num_full = run.num_columns // group_size
    split = num_full * group_size
    if num_full:
        groups = block[:, :split].unflatten(1, (num_full, group_size))
        groups.sub_(zeros_NG[:, :num_full, None]).mul_(scales_NG[:, :num_full, None])
    if split < run.num_columns:
        block[:, split:].sub_(zeros_NG[:, num_full:]).mul_(scales_NG[:, num_full:])
    return block


def _length(groups: slice) -> int:
    return int(groups.stop - groups.start)


def packed_linear(
    x: torch.Tensor,
    words_NW: torch.Tensor,
    scales_NG: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    order: torch.Tensor | None = None,
    scale_base: torch.Tensor | None = None,
    runs: Runs,
    group_size: int,
) -> torch.Tensor:
    """`x @ weight.T + bias` for x of shape [..., K], in x's dtype."""
    weights_NK = dequantize(
        words_NW,
        scales_NG,
        zeros,
        order=order,
        scale_base=scale_base,
        runs=runs,
        group_size=group_size,
        shape=(words_NW.shape[0], x.shape[-1]),
        dtype=x.dtype,
    )
    return torch.nn.functional.linear(x, weights_NK, None if bias is None else bias.to(x.dtype))
