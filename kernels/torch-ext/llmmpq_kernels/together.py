"""Several matrices times the same row of activations in one launch: q, k and v, or gate and up.

A launch costs some microseconds and its last programs leave cores idle; a step of decoding is hundreds of launches.
Here one grid covers the programs of all members, one member after the other. A program finds its member by counting
theirs off, and then does what `gemv.py` would have done for it: the same cut, the same order of sums, the same bits.
Members may differ in rows, widths, runs, order, kind of scale, zeros and bias; each is compiled in as a branch.
Where members are split along K, their partial sums are added by a second launch, again one for all.

Rejected: one cut for all members together (fewer splits, but other bits than each alone); a table of addresses in
device memory (every program would wait for it, and the compiler would not know how pointers are aligned); the same for
`gemm.py`, where a launch is long.

Shape suffixes: M rows of activations, N output rows, K input columns, S splits.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .gemv import ADD_BLOCK, ONE_BITS, GemvConfig, _add_block, _multiply_tile
from .operands import Operands, refusal_together

# With 2 rows three members of 3 and 4 bits spill on sm_90, and two take all 255 registers (Triton 3.9).
MOST_ROWS = 1


@triton.jit(do_not_specialize=["num_m", "num_groups", "splits", "chunks0", "chunks1", "chunks2", "chunks3", "one_bits"])
def gemv_together_kernel(
    x_ptr,
    words,
    scales,
    bases,
    zeros,
    orders,
    biases,
    outs,
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
    splits,
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
    """`gemv.gemv_kernel` for each member. All but x, num_m, num_k, stride_x, one_bits, GROUP and M are tuples.

    They have an entry for each member, but for WIDTHS: it has all their widths in one row, as Triton 3.6 reads
    no tuples in tuples of constants.
    """
    program = tl.program_id(0)
    for i in tl.static_range(len(NUM_RUNS)):
        tiles = tl.cdiv(num_n[i], BLOCK_N[i])
        num_programs = tiles * splits[i]
        if (program >= 0) & (program < num_programs):
            _multiply_tile(
                x_ptr,
                words[i],
                scales[i],
                bases[i],
                zeros[i],
                orders[i],
                biases[i],
                outs[i],
                num_m,
                num_n[i],
                num_k,
                num_groups[i],
                stride_x,
                row_words[i],
                chunks0[i],
                chunks1[i],
                chunks2[i],
                chunks3[i],
                one_bits,
                program % tiles,
                program // tiles,
                splits[i],
                WIDTHS,
                FIRST_RUN[i],
                NUM_RUNS[i],
                ALIGN[i],
                GROUP,
                M,
                BLOCK_N[i],
                BLOCK_C[i],
                HAS_ZEROS[i],
                HAS_BIAS[i],
                MIXED[i],
                EIGHT_BIT[i],
            )
        program -= num_programs


@triton.jit(do_not_specialize=["splits"])
def add_splits_together_kernel(
    partials, biases, outs, num_n, planes, splits, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """`gemv.add_splits_kernel` for each member: tuples have an entry for each."""
    block = tl.program_id(0)
    for i in tl.static_range(len(HAS_BIAS)):
        num_blocks = tl.cdiv(planes[i], BLOCK)
        if (block >= 0) & (block < num_blocks):
            _add_block(partials[i], biases[i], outs[i], num_n[i], planes[i], block, splits[i], BLOCK, HAS_BIAS[i])
        block -= num_blocks


def multiply(x_MK: torch.Tensor, members: Sequence[Operands], configs: Sequence[GemvConfig]) -> list[torch.Tensor]:
    """What `gemv.multiply` gives for each member and its cut, in x's dtype. All cuts have as many warps."""
    num_rows, num_k = x_MK.shape
    if num_rows > MOST_ROWS:
        raise ValueError(
            f"{num_rows} rows of activations given, a shared launch takes {MOST_ROWS}: launch each matrix alone"
        )
    problem = refusal_together([(each.shape, each.runs, each.group_size) for each in members])
    if problem is None and len({config.num_warps for config in configs}) > 1:
        problem = f"programs of {sorted({config.num_warps for config in configs})} warps, a launch has one number"
    if problem is not None:
        raise ValueError(f"these matrices cannot share a launch: {problem}")

    num_n, splits = tuple(each.shape[0] for each in members), tuple(config.split for config in configs)
    outs = [torch.empty((num_rows, rows), dtype=x_MK.dtype, device=x_MK.device) for rows in num_n]
    targets = [
        out_MN if split == 1 else torch.empty((split, *out_MN.shape), dtype=torch.float32, device=x_MK.device)
        for out_MN, split in zip(outs, splits, strict=True)
    ]
    # With partial sums the bias comes last.
    biases = [each.bias if split == 1 else None for each, split in zip(members, splits, strict=True)]
    row_words, *chunks = zip(*(each.extents for each in members), strict=True)
    constants = [each.constants for each in members]
    num_runs = [len(each.runs) for each in members]
    gemv_together_kernel[(sum(map(_num_programs, num_n, configs)),)](
        x_MK,
        *zip(*(each.pointers for each in members), strict=True),
        tuple(each.words if bias is None else bias for each, bias in zip(members, biases, strict=True)),
        tuple(targets),
        num_rows,
        num_n,
        num_k,
        tuple(each.scales.shape[1] for each in members),
        x_MK.stride(0),
        row_words,
        *chunks,
        ONE_BITS,
        splits,
        WIDTHS=tuple(bits for each in members for bits, _ in each.runs),
        FIRST_RUN=(0, *itertools.accumulate(num_runs[:-1])),
        NUM_RUNS=tuple(num_runs),
        GROUP=members[0].group_size,
        M=triton.next_power_of_2(num_rows),
        BLOCK_N=tuple(config.block_n for config in configs),
        BLOCK_C=tuple(config.block_c for config in configs),
        HAS_BIAS=tuple(bias is not None for bias in biases),
        **{name: tuple(each[name] for each in constants) for name in ("ALIGN", "HAS_ZEROS", "MIXED", "EIGHT_BIT")},
        num_warps=configs[0].num_warps,
    )
    _add_splits([one for one in zip(targets, members, outs, strict=True) if one[0] is not one[2]])
    return outs


def _num_programs(num_n: int, config: GemvConfig) -> int:
    return triton.cdiv(num_n, config.block_n) * config.split


def _add_splits(parts: list[tuple[torch.Tensor, Operands, torch.Tensor]]) -> None:
    """Partial sums, their matrix and its output: first to last, plus bias."""
    if not parts:
        return
    partials, members, outs = zip(*parts, strict=True)
    planes = tuple(out_MN.numel() for out_MN in outs)
    add_splits_together_kernel[(sum(triton.cdiv(plane, ADD_BLOCK) for plane in planes),)](
        partials,
        tuple(partial if each.bias is None else each.bias for partial, each in zip(partials, members, strict=True)),
        outs,
        tuple(out_MN.shape[1] for out_MN in outs),
        planes,
        tuple(partial.shape[0] for partial in partials),
        BLOCK=ADD_BLOCK,
        HAS_BIAS=tuple(each.bias is not None for each in members),
    )
