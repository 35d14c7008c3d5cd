"""Several matrices times the same few rows of activations in one launch: q, k and v, or gate and up.

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

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .gemv import ADD_BLOCK, ONE_BITS, GemvConfig, _add_block, _multiply_tile
from .operands import Operands, refusal_together

# Members of many widths take 255 registers with 2 rows already.
MOST_ROWS = 2


@triton.jit(do_not_specialize=["num_m", "extents", "one_bits"])
def gemv_together_kernel(
    x_ptr,
    pointers,
    sizes,
    extents,
    num_m,
    num_k,
    stride_x,
    one_bits,
    FORMS: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
):
    """Tuples hold an entry for each member, in the order in which `multiply` puts them together."""
    program = tl.program_id(0)
    for i in tl.static_range(len(FORMS)):
        tiles = tl.cdiv(sizes[i][0], FORMS[i][2])
        split = extents[i][1]
        num_programs = tiles * split
        if (program >= 0) & (program < num_programs):
            _multiply_tile(
                x_ptr,
                pointers[i][0],
                pointers[i][1],
                pointers[i][2],
                pointers[i][3],
                pointers[i][4],
                pointers[i][5],
                pointers[i][6],
                num_m,
                sizes[i][0],
                num_k,
                extents[i][0],
                stride_x,
                sizes[i][1],
                extents[i][2],
                extents[i][3],
                extents[i][4],
                extents[i][5],
                one_bits,
                program % tiles,
                program // tiles,
                split,
                FORMS[i][0],
                FORMS[i][1],
                GROUP,
                M,
                FORMS[i][2],
                FORMS[i][3],
                FORMS[i][4],
                FORMS[i][5],
                FORMS[i][6],
                FORMS[i][7],
            )
        program -= num_programs


@triton.jit(do_not_specialize=["splits"])
def add_splits_together_kernel(pointers, sizes, splits, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr):
    """`gemv.add_splits_kernel` for each member: its partial sums, bias and output, its rows N and outputs M * N."""
    block = tl.program_id(0)
    for i in tl.static_range(len(HAS_BIAS)):
        num_blocks = tl.cdiv(sizes[i][1], BLOCK)
        if (block >= 0) & (block < num_blocks):
            _add_block(
                pointers[i][0],
                pointers[i][1],
                pointers[i][2],
                sizes[i][0],
                sizes[i][1],
                block,
                splits[i],
                BLOCK,
                HAS_BIAS[i],
            )
        block -= num_blocks


def multiply(x_MK: torch.Tensor, members: Sequence[Operands], configs: Sequence[GemvConfig]) -> list[torch.Tensor]:
    """What `gemv.multiply` gives for each member and its cut, in x's dtype. All cuts have as many warps."""
    num_rows, num_k = x_MK.shape
    if num_rows > MOST_ROWS:
        raise ValueError(f"1 to {MOST_ROWS} rows share a launch, {num_rows} given: launch each matrix alone")
    problem = refusal_together([(each.shape, each.runs, each.group_size) for each in members])
    if problem is None and len({config.num_warps for config in configs}) > 1:
        problem = f"programs of {sorted({config.num_warps for config in configs})} warps, a launch has one number"
    if problem is not None:
        raise ValueError(f"these matrices cannot share a launch: {problem}")

    outs, targets, pointers, sizes, extents, forms, num_programs = [], [], [], [], [], [], 0
    for each, config in zip(members, configs, strict=True):
        num_n, split = each.shape[0], config.split
        out_MN = torch.empty((num_rows, num_n), dtype=x_MK.dtype, device=x_MK.device)
        target, bias = out_MN, each.bias
        if split > 1:
            target, bias = torch.empty((split, num_rows, num_n), dtype=torch.float32, device=x_MK.device), None
        row_words, *chunks = each.extents
        outs.append(out_MN)
        targets.append(target)
        pointers.append((*each.pointers, each.words if bias is None else bias, target))
        sizes.append((num_n, row_words))
        extents.append((each.scales.shape[1], split, *chunks))
        forms.append(_form(each, config, has_bias=bias is not None))
        num_programs += triton.cdiv(num_n, config.block_n) * split
    gemv_together_kernel[(num_programs,)](
        x_MK,
        tuple(pointers),
        tuple(sizes),
        tuple(extents),
        num_rows,
        num_k,
        x_MK.stride(0),
        ONE_BITS,
        FORMS=tuple(forms),
        GROUP=members[0].group_size,
        M=triton.next_power_of_2(num_rows),
        num_warps=configs[0].num_warps,
    )
    _add_splits([one for one in zip(targets, members, outs, strict=True) if one[0] is not one[2]])
    return outs


def _form(operands: Operands, config: GemvConfig, *, has_bias: bool) -> tuple[object, ...]:
    """What a member's branch is compiled for."""
    constants = operands.constants
    before = (constants["WIDTHS"], constants["ALIGN"], config.block_n, config.block_c)
    return (*before, constants["HAS_ZEROS"], has_bias, constants["MIXED"], constants["EIGHT_BIT"])


def _add_splits(parts: list[tuple[torch.Tensor, Operands, torch.Tensor]]) -> None:
    """Partial sums, their matrix and its output: first to last, plus bias."""
    if not parts:
        return
    biases = [operands.bias for _, operands, _ in parts]
    add_splits_together_kernel[(sum(triton.cdiv(out_MN.numel(), ADD_BLOCK) for *_, out_MN in parts),)](
        tuple(
            (partial, partial if bias is None else bias, out)
            for (partial, _, out), bias in zip(parts, biases, strict=True)
        ),
        tuple((out.shape[1], out.numel()) for *_, out in parts),
        tuple(partial.shape[0] for partial, *_ in parts),
        BLOCK=ADD_BLOCK,
        HAS_BIAS=tuple(bias is not None for bias in biases),
    )
