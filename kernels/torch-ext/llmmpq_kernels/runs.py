"""Groups of several widths: where each run of a mixed matrix lies, and packing by runs.

Groups of equal width form one run, runs in rising order of width. Stored position p of a group is `order_G[p]`, its
index in the matrix. A run is packed as a layout-1 row of its own, so an aligned reader needs nothing new inside it.
Which run the short last group is in is known only with the order; so that sizes follow from the scheme alone, every
group of a mixed matrix is stored full, and the columns that the short one lacks are zero codes at the end of its run.

Rejected: interleaving the widths in the order of the matrix. A reader would look up the width of every group it meets,
and words of one width would no longer be contiguous.

Shape suffixes: N rows, K columns, G groups, W words.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch

from .layout import CODES_PER_CHUNK, pack

Runs = tuple[tuple[int, int], ...]  # (bits, number of groups), in stored order


class Run(NamedTuple):
    """Where the groups of one width lie in the stored tensors."""

    bits: int
    groups: slice  # of scales and order
    num_columns: int  # codes in a row of this run, padding to whole words not counted
    words: slice  # of each row of words
    zeros: slice  # of the one dimension of zeros


def locate_runs(runs: Runs, *, group_size: int, shape: tuple[int, int]) -> list[Run]:
    """The place of every run of a matrix [N, K]; one run is a matrix of layout 1."""
    num_rows, num_columns = shape
    num_groups = -(-num_columns // group_size)
    if sum(count for _, count in runs) != num_groups or any(count < 1 for _, count in runs):
        raise ValueError(f"runs {runs} must share out the {num_groups} groups of {num_columns} columns")
    if any(narrow >= wide for (narrow, _), (wide, _) in pairwise(runs)):
        raise ValueError(f"runs {runs} must rise in width")
    located: list[Run] = []
    group = word = zero = 0
    for bits, count in runs:
        columns = num_columns if len(runs) == 1 else count * group_size
        words = bits * _chunks(columns)
        zeros = count * bits * _chunks(num_rows)
        located.append(
            Run(bits, slice(group, group + count), columns, slice(word, word + words), slice(zero, zero + zeros))
        )
        group, word, zero = group + count, word + words, zero + zeros
    return located


def pack_runs(codes_NK: torch.Tensor, order_G: torch.Tensor, *, runs: Runs, group_size: int) -> torch.Tensor:
    """The words [N, W] of a mixed matrix, from its codes in the order of the matrix."""
    shape = (codes_NK.shape[0], codes_NK.shape[1])
    located = locate_runs(runs, group_size=group_size, shape=shape)
    missing = len(order_G) * group_size - shape[1]
    groups_NGg = torch.nn.functional.pad(codes_NK, (0, missing)).unflatten(1, (len(order_G), group_size))
    stored_NGg = groups_NGg[:, order_G.long()]
    return torch.cat([pack(stored_NGg[:, run.groups].flatten(1), bits=run.bits) for run in located], dim=1)


def pack_zeros(zeros_GN: torch.Tensor, order_G: torch.Tensor, *, runs: Runs) -> torch.Tensor:
    """The zeros [W] of a mixed matrix, from zeros in the order of its groups."""
    stored_GN = zeros_GN[order_G.long()]
    pieces = torch.split(stored_GN, [count for _, count in runs])
    return torch.cat([pack(piece, bits=bits).flatten() for piece, (bits, _) in zip(pieces, runs, strict=True)])


def _chunks(num_codes: int) -> int:
    return -(-num_codes // CODES_PER_CHUNK)
