"""A packed matrix as the kernels take it, and what its shape allows: runs in chunks, and how far its loads are aligned.

A row of words is its runs side by side, each of `bits * chunks` words; a chunk is 32 codes. The kernels need a group to
be whole chunks, so that a chunk has one scale.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .layout import CODES_PER_CHUNK
from .runs import Runs

MOST_RUNS = 4
# Of matrices that share a launch. Each run is code of its own in the one kernel, and every mix of runs another kernel.
MOST_RUNS_TOGETHER = 8
WORDS_PER_LOAD = 4  # 16 bytes, the longest load of a thread


class MisfitError(ValueError):
    """Tensors that are not what their shape, runs and group size call for, or not where they can be read."""


@dataclass(frozen=True, kw_only=True)
class Operands:
    """The stored tensors of a matrix [N, K]; `runs` is (bits, groups) in stored order, one pair where it is uniform."""

    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    order: torch.Tensor | None
    scale_base: torch.Tensor | None
    bias: torch.Tensor | None
    runs: Runs
    group_size: int
    shape: tuple[int, int]

    @property
    def chunks(self) -> tuple[int, ...]:
        """Chunks of each run. A mixed matrix stores every group in full, a uniform one ends with its last column."""
        return _chunks(self.runs, self.group_size, self.shape[1])

    @property
    def alignment(self) -> int:
        """The largest of 4, 2 and 1 that divides every run's chunks, and with them the words of a row."""
        return math.gcd(WORDS_PER_LOAD, *self.chunks)

    @property
    def pointers(self) -> tuple[torch.Tensor, ...]:
        """Words, scales, base, zeros, order. A pointer that is not read must still be one: the words stand in."""
        others = (self.scale_base, self.zeros, self.order)
        return (self.words, self.scales, *(self.words if tensor is None else tensor for tensor in others))

    @property
    def extents(self) -> tuple[int, ...]:
        """The words of a row and the chunks of four runs, in units of `alignment`."""
        align = self.alignment
        chunks = [count // align for count in self.chunks]
        return (self.words.shape[1] // align, *chunks, *[0] * (MOST_RUNS - len(chunks)))

    @property
    def constants(self) -> dict[str, Any]:
        """What a kernel is compiled for."""
        return {
            "WIDTHS": tuple(bits for bits, _ in self.runs),
            "ALIGN": self.alignment,
            "GROUP": self.group_size,
            "HAS_ZEROS": self.zeros is not None,
            "MIXED": self.order is not None,
            "EIGHT_BIT": self.scale_base is not None,
        }


@functools.lru_cache(maxsize=4096)
def _chunks(runs: Runs, group_size: int, num_columns: int) -> tuple[int, ...]:
    if len(runs) == 1:
        return (-(-num_columns // CODES_PER_CHUNK),)
    return tuple(groups * group_size // CODES_PER_CHUNK for _, groups in runs)


def refusal(runs: Runs, group_size: int) -> str | None:
    """Why no Triton kernel takes such a matrix; None where one does."""
    if group_size % CODES_PER_CHUNK:
        return (
            f"groups of {group_size} are not a multiple of {CODES_PER_CHUNK}, the codes that a kernel unpacks at once"
        )
    if len(runs) > MOST_RUNS:
        return f"{len(runs)} runs of widths, at most {MOST_RUNS}"
    return None


def refusal_together(members: Sequence[tuple[tuple[int, int], Runs, int]]) -> str | None:
    """Why matrices of these shapes, runs and group sizes cannot share a launch; None where they can."""
    for _, runs, group_size in members:
        if (problem := refusal(runs, group_size)) is not None:
            return problem
    columns, sizes = {shape[1] for shape, *_ in members}, {group_size for *_, group_size in members}
    if len(columns) > 1:
        return f"they have {_listed(columns)} columns, and one input has one number of them"
    if len(sizes) > 1:
        return f"groups of {_listed(sizes)}, a launch takes one size"
    if (num_runs := sum(len(runs) for _, runs, _ in members)) > MOST_RUNS_TOGETHER:
        return f"{num_runs} runs of widths together, at most {MOST_RUNS_TOGETHER}"
    return None


def _listed(numbers: set[int]) -> str:
    return " and ".join(map(str, sorted(numbers)))
