"""Matrix times a few rows of activations, where time is the reading of the words.

    out[m, n] = bias[n] + sum over groups g of scale[n, g] * (sum over k in g of (code[n, k] - zero[n, g]) * x[m, k])

A program holds BLOCK_N output rows and walks over its share of the chunks of 32 codes, BLOCK_C at a time. A warp's
lanes lie along a row, each with 16 bytes of it, so a row is read once and whole. The products of a chunk are summed in
the lane that holds it; lanes meet once, after the last chunk. The zero and the offset of `tiles.py` are taken off once
for each chunk, by the sums of its activations.

Matrices with runs of several widths are walked through run by run; `order` names the columns of a stored group, so
activations are gathered a group at a time. Blocks of chunks are dealt out to the `split` programs of a row block in
turn, over all runs, so that all are equally long. Their sums go to a buffer [S, M, N] and are added by a second
kernel in a fixed order: equal inputs give equal bits.

Rejected: float atomics (their order is not fixed), tensor cores (a warp would have to exchange every word), a row of
activations for each program (the words would be read once for each row).

Shape suffixes: M rows of activations, N output rows, K input columns, C chunks, L = 32 codes of a chunk, S splits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .operands import Operands
from .tiles import columns_of, load_scales, load_words, load_zeros, offsets, split_fields

# 4 rows of a mixed matrix take 136 of 255 registers on sm_90, 8 rows take 254 and soon spill: tensor cores take over.
MOST_ROWS = 4
ONE_BITS = 0x3F800000  # of 1.0 in float32
ADD_BLOCK = 512  # outputs whose partial sums a program adds


@dataclass(frozen=True, kw_only=True)
class GemvConfig:
    """How the work is cut. `block_n` output rows and `block_c` chunks at a time, shared by `split` programs."""

    block_n: int
    block_c: int
    split: int
    num_warps: int


@triton.jit
def _add_run(
    acc_MNC,
    x_ptr,
    row_N,
    scales_ptr,
    base_ptr,
    zeros_ptr,
    order_ptr,
    n_N,
    num_m,
    num_n,
    num_k,
    num_groups,
    stride_x,
    one_bits,
    part,
    split,
    first_word,
    first_group,
    first_zero,
    first_block,
    num_chunks,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    MIXED: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
):
    PER_GROUP: tl.constexpr = GROUP // 32
    PLANE: tl.constexpr = 2 if BITS == 3 else BITS
    num_blocks = tl.cdiv(num_chunks, BLOCK_C)
    for block in range((part + split - first_block % split) % split, num_blocks, split):
        chunk = block * BLOCK_C
        words = load_words(row_N, first_word, chunk, num_chunks, PLANE, BLOCK_C)
        fields_NCL = split_fields(words, one_bits, PLANE, 0, BLOCK_N, BLOCK_C)
        if BITS == 3:
            words = load_words(row_N, first_word + 2 * num_chunks, chunk, num_chunks, 1, BLOCK_C)
            fields_NCL += split_fields(words, one_bits, 1, 2, BLOCK_N, BLOCK_C)

        # Activations [M * C, 32], in the order of the words.
        mc = tl.arange(0, M * BLOCK_C)
        m, c = mc // BLOCK_C, chunk + mc % BLOCK_C
        k = columns_of(order_ptr, first_group, c, num_chunks, GROUP, MIXED)[:, None] + tl.arange(0, 32)[None, :]
        inside = (k < num_k) & ((c < num_chunks) & (m < num_m))[:, None]
        x = tl.load(x_ptr + (m.to(tl.int64) * stride_x)[:, None] + k, mask=inside, other=0.0).to(tl.float32)
        sums_MC = tl.reshape(tl.sum(x, 1), (M, BLOCK_C))
        offset_L = offsets(PLANE, 0)
        if BITS == 3:
            offset_L += offsets(1, 2)
        offsets_MC = tl.reshape(tl.sum(x * offset_L[None, :], 1), (M, BLOCK_C))
        x_MCL = tl.reshape(x, (M, BLOCK_C, 32))[:, None, :, :]
        dots_MNC = tl.sum(tl.reshape(fields_NCL, (1, BLOCK_N, BLOCK_C, 32)) * x_MCL, 3)

        chunk_C = (chunk + tl.arange(0, BLOCK_C))[None, :]
        group_C = chunk_C // PER_GROUP
        here = chunk_C < num_chunks
        places = n_N.to(tl.int64)[:, None] * num_groups + (first_group + group_C)
        scales_NC = load_scales(scales_ptr, base_ptr, places, here, EIGHT_BIT)
        if HAS_ZEROS:
            zeros_NC = load_zeros(zeros_ptr, first_zero, group_C, n_N[:, None], num_n, here, BITS)
            corrected_MNC = dots_MNC - offsets_MC[:, None, :] - zeros_NC[None, :, :] * sums_MC[:, None, :]
        else:
            ZERO: tl.constexpr = 1 << (BITS - 1)
            corrected_MNC = dots_MNC - (offsets_MC + sums_MC * ZERO)[:, None, :]
        acc_MNC += scales_NC[None, :, :] * corrected_MNC
    return acc_MNC


@triton.jit
def _multiply_tile(
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
    tile,
    part,
    split,
    WIDTHS: tl.constexpr,
    FIRST_RUN: tl.constexpr,
    NUM_RUNS: tl.constexpr,
    ALIGN: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MIXED: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
):
    """Rows `tile * BLOCK_N` on, the share `part` of `split` of their chunks.

    The matrix has NUM_RUNS of the WIDTHS, from FIRST_RUN on; the others are of matrices that share the launch.
    `chunksR` and `row_words` count units of ALIGN, which tells the compiler how long its loads may be. A size of 1
    reaches a kernel as a constant, not a tensor: no method of a tensor is called on a size.
    """
    n_N = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end read the last one again: no mask in the loop, and nothing of them is stored.
    safe_N = tl.minimum(n_N, num_n - 1)
    row_N = words_ptr + safe_N.to(tl.int64) * row_words * ALIGN
    zero_words = (num_n + 31) // 32
    acc_MNC = tl.zeros((M, BLOCK_N, BLOCK_C), tl.float32)
    first_word = 0
    first_group = 0
    first_zero = tl.full((), 0, tl.int64)
    first_block = 0
    for run in tl.static_range(NUM_RUNS):
        units = chunks0 if run == 0 else (chunks1 if run == 1 else (chunks2 if run == 2 else chunks3))
        num_chunks = units * ALIGN
        acc_MNC = _add_run(
            acc_MNC,
            x_ptr,
            row_N,
            scales_ptr,
            base_ptr,
            zeros_ptr,
            order_ptr,
            safe_N,
            num_m,
            num_n,
            num_k,
            num_groups,
            stride_x,
            one_bits,
            part,
            split,
            first_word,
            first_group,
            first_zero,
            first_block,
            num_chunks,
            WIDTHS[FIRST_RUN + run],
            GROUP,
            M,
            BLOCK_N,
            BLOCK_C,
            HAS_ZEROS,
            MIXED,
            EIGHT_BIT,
        )
        run_groups = tl.cdiv(num_chunks, GROUP // 32)
        first_word += WIDTHS[FIRST_RUN + run] * num_chunks
        first_group += run_groups
        first_zero += run_groups.to(tl.int64) * (WIDTHS[FIRST_RUN + run] * zero_words)
        first_block += tl.cdiv(num_chunks, BLOCK_C)
    out_MN = tl.sum(acc_MNC, 2)
    m_M = tl.arange(0, M)
    inside = (m_M < num_m)[:, None] & (n_N < num_n)[None, :]
    if HAS_BIAS:
        out_MN += tl.load(bias_ptr + safe_N).to(tl.float32)[None, :]
    row_M = part * num_m + m_M
    places = row_M.to(tl.int64)[:, None] * num_n + n_N[None, :]
    tl.store(out_ptr + places, out_MN.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_m", "num_groups", "chunks0", "chunks1", "chunks2", "chunks3", "one_bits", "split"])
def gemv_kernel(
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
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MIXED: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
):
    """A program for each block of rows and each share of their chunks."""
    _multiply_tile(
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
        tl.program_id(0),
        tl.program_id(1),
        split,
        WIDTHS,
        0,
        len(WIDTHS),
        ALIGN,
        GROUP,
        M,
        BLOCK_N,
        BLOCK_C,
        HAS_ZEROS,
        HAS_BIAS,
        MIXED,
        EIGHT_BIT,
    )


@triton.jit
def _add_block(
    partial_ptr,
    bias_ptr,
    out_ptr,
    num_n,
    plane,
    block,
    split,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Partial sums [S, M, N] -> a block of out [M, N], first to last; `plane` is M * N."""
    place = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < plane
    total = tl.zeros((BLOCK,), tl.float32)
    source = place
    for _ in range(split):
        total += tl.load(partial_ptr + source, mask=inside, other=0.0)
        source += plane
    if HAS_BIAS:
        total += tl.load(bias_ptr + place % num_n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["split"])
def add_splits_kernel(
    partial_ptr,
    bias_ptr,
    out_ptr,
    num_n,
    plane,
    split,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    _add_block(partial_ptr, bias_ptr, out_ptr, num_n, plane, tl.program_id(0), split, BLOCK, HAS_BIAS)


def multiply(x_MK: torch.Tensor, operands: Operands, config: GemvConfig) -> torch.Tensor:
    """`x @ weight.T + bias` for 1 to 4 rows whose columns lie side by side, in x's dtype."""
    num_rows = x_MK.shape[0]
    if num_rows > MOST_ROWS:
        raise ValueError(f"gemv takes 1 to {MOST_ROWS} rows, {num_rows} given: gemm takes any number")
    num_n, num_k = operands.shape
    out_MN = torch.empty((num_rows, num_n), dtype=x_MK.dtype, device=x_MK.device)
    target, bias = out_MN, operands.bias
    if config.split > 1:
        target = torch.empty((config.split, num_rows, num_n), dtype=torch.float32, device=x_MK.device)
        bias = None
    gemv_kernel[(triton.cdiv(num_n, config.block_n), config.split)](
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
        M=triton.next_power_of_2(num_rows),
        BLOCK_N=config.block_n,
        BLOCK_C=config.block_c,
        HAS_BIAS=bias is not None,
        num_warps=config.num_warps,
    )
    if config.split > 1:
        add_splits(target, operands.bias, out_MN)
    return out_MN


def add_splits(partial_SMN: torch.Tensor, bias_N: torch.Tensor | None, out_MN: torch.Tensor) -> None:
    """The sum over the first axis, first to last, plus bias, into `out_MN`."""
    plane = out_MN.numel()
    add_splits_kernel[(triton.cdiv(plane, ADD_BLOCK),)](
        partial_SMN,
        partial_SMN if bias_N is None else bias_N,
        out_MN,
        out_MN.shape[1],
        plane,
        partial_SMN.shape[0],
        BLOCK=ADD_BLOCK,
        HAS_BIAS=bias_N is not None,
    )
