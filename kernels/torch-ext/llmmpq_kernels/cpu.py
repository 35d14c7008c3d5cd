"""Matrix times activations on a CPU, by the compiled loops of `cpu.c`.

Few rows are multiplied straight from the words, four at a time; matrices with one input can share a call
(`multiply_together`): one way in, and one waking of threads. For more rows, blocks of rows of the matrix are made
float32 in the second-level cache and multiplied there by torch. Both use as many threads as torch does; sums are in
float32, in an order that depends on the number of threads no more than torch's own do.

Shape suffixes: M rows of activations, N output rows, K input columns, G groups.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from . import native
from .layout import CODES_PER_CHUNK
from .operands import MOST_RUNS, MisfitError, Operands
from .reference import CPU_BLOCK_WEIGHTS
from .runs import Runs

FLOAT_NBYTES = 4
# Up to here each four rows unpack the matrix anew; from there on making it float32 once costs less.
MOST_ROWS = 16
# Fewer weights than this are done before another thread has woken up.
THREAD_WEIGHTS = 1 << 20

Fact = tuple[torch.dtype, tuple[int, ...], str, bool]  # dtype, shape, device, whether contiguous


class Matrix(ctypes.Structure):
    """`struct matrix` of `cpu.c`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("words", "scales", "zeros", "order", "scale_base")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "groups", "group_size", "row_words", "num_runs")),
        *((name, ctypes.c_int64 * MOST_RUNS) for name in ("bits", "run_groups", "run_chunks")),
    )


class Member(ctypes.Structure):
    """`struct member` of `cpu.c`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("matrix", "stored", "sums", "out")),
        ("width", ctypes.c_int64),
    )


def multiply(x_MK: torch.Tensor, operands: Operands) -> torch.Tensor:
    """`x @ weight.T + bias` in x's dtype."""
    if x_MK.shape[0] <= MOST_ROWS:
        return multiply_together(x_MK, [operands])[0]
    return _multiply_blocks(_library_for(x_MK, [operands]), _matrix_of(operands), x_MK, operands)


def multiply_together(x_MK: torch.Tensor, members: Sequence[Operands]) -> list[torch.Tensor]:
    """What `multiply` gives for each matrix, for few rows."""
    library, num_rows = _library_for(x_MK, members), x_MK.shape[0]
    if num_rows > MOST_ROWS:
        raise ValueError(f"1 to {MOST_ROWS} rows are multiplied straight from the words, {num_rows} given")
    widths = [sum(operands.chunks) * CODES_PER_CHUNK for operands in members]
    groups = [operands.scales.shape[1] for operands in members]
    matrices = [_matrix_of(operands) for operands in members]  # each holds what its address stands for
    outs = [torch.empty((num_rows, operands.shape[0]), dtype=torch.float32) for operands in members]
    scratch = torch.empty(num_rows * (sum(widths) + sum(groups)), dtype=torch.float32)
    place, rows = scratch.data_ptr(), []
    for matrix, out_MN, width, count in zip(matrices, outs, widths, groups, strict=True):
        sums = place + FLOAT_NBYTES * num_rows * width
        rows.append(Member(ctypes.addressof(matrix), place, sums, out_MN.data_ptr(), width))
        place = sums + FLOAT_NBYTES * num_rows * count
    table, x = (Member * len(rows))(*rows), x_MK.to(torch.float32).contiguous()
    address = ctypes.addressof(table)
    library.llmmpq_prepare(address, len(rows), x.data_ptr(), num_rows)

    def part(first: int, last: int) -> None:
        library.llmmpq_multiply(address, len(rows), num_rows, first, last)

    heights = [operands.shape[0] for operands in members]
    weights = sum(height * width for height, width in zip(heights, widths, strict=True))
    _share_rows(part, sum(heights), weights=weights)
    for out_MN, operands in zip(outs, members, strict=True):
        if operands.bias is not None:
            out_MN += operands.bias
    return [out_MN.to(x_MK.dtype) for out_MN in outs]


def dequantize(operands: Operands) -> torch.Tensor:
    """The matrix [N, K] in float32, as the reference gives it."""
    library = native.load().handle
    assert library is not None, native.load().problem
    weights_NK = torch.empty(operands.shape, dtype=torch.float32)
    _dequantize_rows(library, _matrix_of(operands), weights_NK, 0)
    return weights_NK


def _library_for(x_MK: torch.Tensor, members: Sequence[Operands]) -> ctypes.CDLL:
    library = native.load().handle
    if library is None:
        raise RuntimeError(f"no compiled loops: {native.load().problem}")
    for operands in members:
        if not x_MK.is_cpu or x_MK.shape[1] != operands.shape[1]:
            raise MisfitError(
                f"activations are {list(x_MK.shape)} on {x_MK.device}, the matrix {list(operands.shape)} takes"
                f" {operands.shape[1]} columns on the CPU"
            )
    return library


def _matrix_of(operands: Operands) -> Matrix:
    stored = (operands.words, operands.scales, operands.zeros, operands.order, operands.scale_base)
    pointers = tuple([None if tensor is None else tensor.data_ptr() for tensor in stored])
    facts = tuple([None if t is None else (t.dtype, tuple(t.shape), t.device.type, t.is_contiguous()) for t in stored])
    return _matrix(pointers, facts, operands.shape, operands.runs, operands.group_size, operands.chunks)


@functools.lru_cache(maxsize=4096)  # of addresses and what lies there, which say all that it holds: never stale
def _matrix(
    pointers: tuple[int | None, ...],
    facts: tuple[Fact | None, ...],
    shape: tuple[int, int],
    runs: Runs,
    group_size: int,
    chunks: tuple[int, ...],
) -> Matrix:
    _check(facts, shape, runs, group_size, chunks)
    row_words = sum(bits * count for (bits, _), count in zip(runs, chunks, strict=True))
    widths = (sum(groups for _, groups in runs), group_size, row_words)

    def row(numbers: Iterable[int]) -> ctypes.Array[ctypes.c_int64]:
        return (ctypes.c_int64 * MOST_RUNS)(*numbers)

    columns = (row(bits for bits, _ in runs), row(groups for _, groups in runs), row(chunks))
    return Matrix(*pointers, *shape, *widths, len(runs), *columns)


def _check(
    facts: tuple[Fact | None, ...], shape: tuple[int, int], runs: Runs, group_size: int, chunks: tuple[int, ...]
) -> None:
    """Compiled loops trust their pointers, so what they would read is compared with what there is."""
    num_rows, num_columns = shape
    num_groups = -(-num_columns // group_size)
    if sum(groups for _, groups in runs) != num_groups:
        raise MisfitError(f"runs {runs} must share out the {num_groups} groups of {num_columns} columns")
    row_words = sum(bits * count for (bits, _), count in zip(runs, chunks, strict=True))
    row_chunks = -(-num_rows // CODES_PER_CHUNK)
    zeros = (sum(bits * groups for bits, groups in runs) * row_chunks,)
    eight_bit = facts[4] is not None
    wanted = {
        "words": (torch.int32, (num_rows, row_words)),
        "scales": (torch.uint8 if eight_bit else torch.float16, (num_rows, num_groups)),
        "zeros": (torch.int32, zeros if len(runs) > 1 else (num_groups, runs[0][0] * row_chunks)),
        "order": (torch.int32, (num_groups,)),
        "scale_base": (torch.float32, (1,)),
    }
    for (name, (dtype, dims)), fact in zip(wanted.items(), facts, strict=True):
        if fact is None:
            if name == "order" and len(runs) > 1:
                raise MisfitError(f"no order is given, which a matrix with runs {runs} needs")
            continue
        found, found_dims, device, contiguous = fact
        if device != "cpu":
            raise MisfitError(f"{name} is on {device}, the activations are on the CPU: load the matrix there first")
        if (found, found_dims) != (dtype, dims):
            raise MisfitError(
                f"{name} is {found} {list(found_dims)}, a matrix {list(shape)} with runs {runs} in groups of"
                f" {group_size} needs {dtype} {list(dims)}"
            )
        if not contiguous:
            raise MisfitError(f"{name} must lie in memory as it does in a file: call .contiguous() on it")


def _multiply_blocks(library: ctypes.CDLL, matrix: Matrix, x_MK: torch.Tensor, operands: Operands) -> torch.Tensor:
    (num_n, num_k), bias = operands.shape, operands.bias
    out_MN = torch.empty((x_MK.shape[0], num_n), dtype=x_MK.dtype)
    block_rows = max(1, torch.get_num_threads() * CPU_BLOCK_WEIGHTS // num_k)
    block_NK = torch.empty((min(block_rows, num_n), num_k))
    for start in range(0, num_n, block_rows):
        stop = min(start + block_rows, num_n)
        weights_NK = block_NK[: stop - start]
        _dequantize_rows(library, matrix, weights_NK, start)
        part_N = None if bias is None else bias[start:stop].to(x_MK.dtype)
        out_MN[:, start:stop] = torch.nn.functional.linear(x_MK, weights_NK.to(x_MK.dtype), part_N)
    return out_MN


def _dequantize_rows(library: ctypes.CDLL, matrix: Matrix, weights_NK: torch.Tensor, start: int) -> None:
    address, out, num_k = ctypes.addressof(matrix), weights_NK.data_ptr(), weights_NK.shape[1]

    def part(first: int, last: int) -> None:
        library.llmmpq_dequantize(address, out + FLOAT_NBYTES * first * num_k, start + first, start + last)

    _share_rows(part, weights_NK.shape[0], weights=weights_NK.numel())


def _share_rows(part: Callable[[int, int], None], num_rows: int, *, weights: int) -> None:
    """`part(first, last)` for all rows, in as many threads as pay: ctypes lets go of the interpreter's lock."""
    num_parts = min(torch.get_num_threads(), num_rows, 1 + weights // THREAD_WEIGHTS)
    if num_parts == 1:
        part(0, num_rows)
        return
    cuts = [num_rows * index // num_parts for index in range(num_parts + 1)]
    others = [_pool(num_parts).submit(part, cuts[index], cuts[index + 1]) for index in range(1, num_parts)]
    part(cuts[0], cuts[1])
    for other in others:
        other.result()


@functools.cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads - 1, thread_name_prefix="llmmpq")
