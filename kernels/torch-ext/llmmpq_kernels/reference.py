"""The oracle: dequantize a packed matrix in plain torch, and multiply with it.

    weight[n, k] = (code[n, k] - zero[n, g]) * scale[n, g],   g = k // group_size

in float32, cast to the wanted dtype last. Symmetric matrices have zero = 2^(bits - 1) everywhere. The last group
is short where group_size does not divide K.

Shape suffixes: N output rows, K input columns, G groups in a row, W words in a row.
"""

from __future__ import annotations

import torch

from .layout import unpack

# Rows are dequantized in blocks of about this many weights. On a CPU the float32 block (1 MiB) stays in the
# second-level cache, ten times as fast as the whole matrix at once; elsewhere the block only bounds the memory held.
CPU_BLOCK_WEIGHTS = 1 << 18
DEVICE_BLOCK_WEIGHTS = 1 << 24


def dequantize(
    words_NW: torch.Tensor,
    scales_NG: torch.Tensor,
    zeros_GW: torch.Tensor | None,
    *,
    bits: int,
    group_size: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The matrix [N, K] that the packed tensors stand for."""
    num_rows, num_columns = shape
    num_full = num_columns // group_size
    split = num_full * group_size
    if zeros_GW is not None:
        zeros_NG = unpack(zeros_GW, bits=bits, num_columns=num_rows).T
    weights_NK = torch.empty(shape, dtype=dtype, device=words_NW.device)
    block_weights = CPU_BLOCK_WEIGHTS if words_NW.device.type == "cpu" else DEVICE_BLOCK_WEIGHTS
    block_rows = max(1, block_weights // max(1, num_columns))
    for start in range(0, num_rows, block_rows):
        rows = slice(start, start + block_rows)
        block = unpack(words_NW[rows], bits=bits, num_columns=num_columns).to(torch.float32)
        scales = scales_NG[rows].to(torch.float32)
        zeros = torch.full_like(scales, 1 << (bits - 1)) if zeros_GW is None else zeros_NG[rows].to(torch.float32)
        if num_full:
            groups = block[:, :split].unflatten(1, (num_full, group_size))
            groups.sub_(zeros[:, :num_full, None]).mul_(scales[:, :num_full, None])
        if split < num_columns:
            block[:, split:].sub_(zeros[:, num_full:]).mul_(scales[:, num_full:])
        weights_NK[rows] = block
    return weights_NK


def packed_linear(
    x: torch.Tensor,
    words_NW: torch.Tensor,
    scales_NG: torch.Tensor,
    zeros_GW: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    """`x @ weight.T + bias` for x of shape [..., K], in x's dtype."""
    shape = (words_NW.shape[0], x.shape[-1])
    weights_NK = dequantize(words_NW, scales_NG, zeros_GW, bits=bits, group_size=group_size, shape=shape, dtype=x.dtype)
    return torch.nn.functional.linear(x, weights_NK, None if bias is None else bias.to(x.dtype))
