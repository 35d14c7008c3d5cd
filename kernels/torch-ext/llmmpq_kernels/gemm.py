"""Matrix times many rows of activations on tensor cores, and the whole matrix dequantized for a library to multiply.

    out[m, n] = bias[n] + sum over k of x[m, k] * weight[n, k],   weight in x's dtype, sums in float32

A program holds a tile of outputs, walks over the chunks of 32 codes as `gemv.py` does, dequantizes a tile of weights
in registers and multiplies it with `tl.dot`. Weights are rounded to x's dtype, as the reference's are.

Each tile of rows dequantizes the matrix anew. From a few hundred rows on it is faster to write the matrix out once
and leave the product to cuBLAS, which `multiply_dequantized` does; what is written is thrown away after the product.

Rejected: scaling sums in place of weights (a group is 32 to 128 columns: one product with few columns for each group).

Shape suffixes: M rows of activations, N output rows, K input columns, S splits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .gemv import ONE_BITS, add_splits
from .operands import Operands
from .tiles import columns_of, dequantize_tile


@dataclass(frozen=True, kw_only=True)
class GemmConfig:
    """How the work is cut: tiles of `block_m` x `block_n` outputs, `block_c` chunks at a time, `split` ways along K."""

    block_m: int
    block_n: int
    block_c: int
    split: int
    num_warps: int
    num_stages: int


UNSPECIALIZED = ["num_m", "num_groups", "chunks0", "chunks1", "chunks2", "chunks3", "one_bits", "split"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gemm_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    base_ptr,
    zeros_ptr,
    order_ptr,
    bias_ptr,
    out_ptr,
    num_m,
    num_n,
    num_k,
    num_groups,
    stride_x,
    row_words,
    chunks0,
    chunks1,
    chunks2,
    chunks3,
    one_bits,
    split,
    WIDTHS: tl.constexpr,
    ALIGN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MIXED: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    """Tiles of rows that share weights are neighbours, so that words come from the cache for all but the first."""
    num_row_tiles = tl.cdiv(num_m, BLOCK_M)
    m_M = tl.program_id(0) % num_row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n_N = tl.program_id(0) // num_row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_N = tl.minimum(n_N, num_n - 1)
    safe_M = tl.minimum(m_M, num_m - 1)
    row_N = words_ptr + safe_N.to(tl.int64) * row_words * ALIGN
    x_row_M = x_ptr + safe_M.to(tl.int64) * stride_x
    zero_words = (num_n + 31) // 32
    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first_word = 0
    first_group = 0
    first_zero = tl.full((), 0, tl.int64)
    first_block = 0
    for run in tl.static_range(len(WIDTHS)):
        units = chunks0 if run == 0 else (chunks1 if run == 1 else (chunks2 if run == 2 else chunks3))
        num_chunks = units * ALIGN
        num_blocks = tl.cdiv(num_chunks, BLOCK_C)
        for block in range((tl.program_id(1) + split - first_block % split) % split, num_blocks, split):
            chunk = block * BLOCK_C
            weights_NK = dequantize_tile(
                row_N,
                safe_N,
                scales_ptr,
                base_ptr,
                zeros_ptr,
                num_n,
                num_groups,
                one_bits,
                first_word,
                first_group,
                first_zero,
                chunk,
                num_chunks,
                WIDTHS[run],
                GROUP,
                BLOCK_N,
                BLOCK_C,
                HAS_ZEROS,
                EIGHT_BIT,
                False,
            ).to(x_ptr.dtype.element_ty)
            place_K = tl.arange(0, BLOCK_C * 32)
            c_K = chunk + place_K // 32
            k_K = columns_of(order_ptr, first_group, c_K, num_chunks, GROUP, MIXED) + place_K % 32
            inside = (k_K < num_k) & (c_K < num_chunks)
            x_MK = tl.load(x_row_M[:, None] + k_K[None, :], mask=inside[None, :], other=0.0)
            if IN_FLOAT32:
                # Triton's interpreter multiplies bfloat16 wrongly; the operands keep their rounding.
                acc_MN += tl.dot(x_MK.to(tl.float32), tl.trans(weights_NK.to(tl.float32)), input_precision="ieee")
            else:
                acc_MN = tl.dot(x_MK, tl.trans(weights_NK), acc_MN)
        run_groups = tl.cdiv(num_chunks, GROUP // 32)
        first_word += WIDTHS[run] * num_chunks
        first_group += run_groups
        first_zero += run_groups.to(tl.int64) * (WIDTHS[run] * zero_words)
        first_block += num_blocks
    if HAS_BIAS:
        acc_MN += tl.load(bias_ptr + safe_N).to(tl.float32)[None, :]
    row_M = tl.program_id(1) * num_m + m_M
    places = row_M.to(tl.int64)[:, None] * num_n + n_N[None, :]
    inside = (m_M < num_m)[:, None] & (n_N < num_n)[None, :]
    tl.store(out_ptr + places, acc_MN.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dequantize_kernel(
    words_ptr,
    scales_ptr,
    base_ptr,
    zeros_ptr,
    order_ptr,
    out_ptr,
    num_n,
    num_k,
    num_groups,
    row_words,
    chunks0,
    chunks1,
    chunks2,
    chunks3,
    one_bits,
    WIDTHS: tl.constexpr,
    ALIGN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    MIXED: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
):
    """One tile of BLOCK_N rows and BLOCK_C chunks, the tiles of a run after those of the run before."""
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_N = tl.minimum(n_N, num_n - 1)
    row_N = words_ptr + safe_N.to(tl.int64) * row_words * ALIGN
    zero_words = (num_n + 31) // 32
    block = tl.program_id(1)
    first_word = 0
    first_group = 0
    first_zero = tl.full((), 0, tl.int64)
    for run in tl.static_range(len(WIDTHS)):
        units = chunks0 if run == 0 else (chunks1 if run == 1 else (chunks2 if run == 2 else chunks3))
        num_chunks = units * ALIGN
        num_blocks = tl.cdiv(num_chunks, BLOCK_C)
        if (block >= 0) & (block < num_blocks):
            chunk = block * BLOCK_C
            weights_NK = dequantize_tile(
                row_N,
                safe_N,
                scales_ptr,
                base_ptr,
                zeros_ptr,
                num_n,
                num_groups,
                one_bits,
                first_word,
                first_group,
                first_zero,
                chunk,
                num_chunks,
                WIDTHS[run],
                GROUP,
                BLOCK_N,
                BLOCK_C,
                HAS_ZEROS,
                EIGHT_BIT,
                True,
            )
            place_K = tl.arange(0, BLOCK_C * 32)
            c_K = chunk + place_K // 32
            k_K = columns_of(order_ptr, first_group, c_K, num_chunks, GROUP, MIXED) + place_K % 32
            inside = (k_K < num_k) & (c_K < num_chunks)
            places = n_N.to(tl.int64)[:, None] * num_k + k_K[None, :]
            tl.store(
                out_ptr + places,
                weights_NK.to(out_ptr.dtype.element_ty),
                mask=inside[None, :] & (n_N < num_n)[:, None],
            )
        run_groups = tl.cdiv(num_chunks, GROUP // 32)
        block -= num_blocks
        first_word += WIDTHS[run] * num_chunks
        first_group += run_groups
        first_zero += run_groups.to(tl.int64) * (WIDTHS[run] * zero_words)


def multiply(x_MK: torch.Tensor, operands: Operands, config: GemmConfig) -> torch.Tensor:
    """`x @ weight.T + bias` for rows whose columns lie side by side, in x's dtype."""
    num_rows = x_MK.shape[0]
    num_n, num_k = operands.shape
    out_MN = torch.empty((num_rows, num_n), dtype=x_MK.dtype, device=x_MK.device)
    target, bias = out_MN, operands.bias
    if config.split > 1:
        target = torch.empty((config.split, num_rows, num_n), dtype=torch.float32, device=x_MK.device)
        bias = None
    tiles = triton.cdiv(num_rows, config.block_m) * triton.cdiv(num_n, config.block_n)
    gemm_kernel[(tiles, config.split)](
        x_MK,
        *operands.pointers,
        operands.words if bias is None else bias,
        target,
        num_rows,
        num_n,
        num_k,
        operands.scales.shape[1],
        x_MK.stride(0),
        *operands.extents,
        ONE_BITS,
        config.split,
        **operands.constants,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_C=config.block_c,
        HAS_BIAS=bias is not None,
        IN_FLOAT32=not isinstance(gemm_kernel, triton.JITFunction),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if config.split > 1:
        add_splits(target, operands.bias, out_MN)
    return out_MN


# One tile: 16 rows of 1,024 columns, as much as the registers of four warps hold without spilling at any width.
DEQUANTIZE_ROWS, DEQUANTIZE_CHUNKS, DEQUANTIZE_WARPS = 16, 32, 4


def dequantize(operands: Operands, dtype: torch.dtype, *, block_c: int = DEQUANTIZE_CHUNKS) -> torch.Tensor:
    """The matrix [N, K] in `dtype`, as the reference gives it."""
    weights_NK = torch.empty(operands.shape, dtype=dtype, device=operands.words.device)
    num_blocks = sum(triton.cdiv(chunks, block_c) for chunks in operands.chunks)
    dequantize_kernel[(triton.cdiv(operands.shape[0], DEQUANTIZE_ROWS), num_blocks)](
        *operands.pointers,
        weights_NK,
        *operands.shape,
        operands.scales.shape[1],
        *operands.extents,
        ONE_BITS,
        **operands.constants,
        BLOCK_N=DEQUANTIZE_ROWS,
        BLOCK_C=block_c,
        num_warps=DEQUANTIZE_WARPS,
    )
    return weights_NK


def multiply_dequantized(x_MK: torch.Tensor, operands: Operands) -> torch.Tensor:
    """`x @ weight.T + bias` by torch's own product, from a matrix in x's dtype that is thrown away after it."""
    bias = None if operands.bias is None else operands.bias.to(x_MK.dtype)
    return torch.nn.functional.linear(x_MK, dequantize(operands, x_MK.dtype), bias)
