"""Matrices of random words for the benchmark of the kernels, as many copies as exceed a cache.

Needs torch, triton and `kernels/torch-ext` alone, which it puts on the path for all that import it first.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "kernels" / "torch-ext"))

from llmmpq_kernels import dequantize  # noqa: E402
from llmmpq_kernels.operands import Operands  # noqa: E402

# Name -> (width, share of the groups). The two mixed ones are 2.5 and 3.5 bits of code on average.
FORMATS = {
    "2": ((2, 1.0),),
    "3": ((3, 1.0),),
    "4": ((4, 1.0),),
    "8": ((8, 1.0),),
    "mixed 2.5": ((2, 0.625), (3, 0.25), (4, 0.125)),
    "mixed 3.5": ((2, 0.125), (3, 0.375), (4, 0.4375), (8, 0.0625)),
}
GROUP_SIZE = 128
ROTATED_NBYTES = 256 * 2**20  # four times the second-level cache of an H200
MOST_COPIES = 64


def random_operands(shape: tuple[int, int], name: str, device: torch.device, *, seed: int = 0) -> Operands:
    """A matrix of random words, with zeros and float16 scales."""
    num_n, num_k = shape
    generator = torch.Generator(device).manual_seed(seed)
    num_groups = num_k // GROUP_SIZE
    runs = share_out(FORMATS[name], num_groups)
    mixed = len(runs) > 1

    def words(*dims: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, dims, generator=generator, device=device, dtype=torch.int64).to(
            torch.int32
        )

    chunks_n = -(-num_n // 32)
    order = None
    if mixed:
        parts = torch.randperm(num_groups, generator=generator, device=device).split([count for _, count in runs])
        order = torch.cat([part.sort().values for part in parts]).to(torch.int32)
    zeros = words(sum(bits * count for bits, count in runs) * chunks_n)
    return Operands(
        words=words(num_n, sum(bits * count for bits, count in runs) * GROUP_SIZE // 32),
        scales=torch.rand(num_n, num_groups, generator=generator, device=device).mul_(0.01).add_(0.001).half(),
        zeros=zeros if mixed else zeros.view(num_groups, -1),
        order=order,
        scale_base=None,
        bias=None,
        runs=runs,
        group_size=GROUP_SIZE,
        shape=shape,
    )


def share_out(shares: tuple[tuple[int, float], ...], num_groups: int) -> tuple[tuple[int, int], ...]:
    counts = [max(1, round(share * num_groups)) for _, share in shares]
    counts[0] += num_groups - sum(counts)
    return tuple((bits, count) for (bits, _), count in zip(shares, counts, strict=True))


def stored_nbytes(operands: Operands) -> int:
    stored = (operands.words, operands.scales, operands.zeros, operands.order)
    return sum(tensor.nbytes for tensor in stored if tensor is not None)


def num_copies(nbytes: int) -> int:
    """So many that they do not stay in the cache from one call to the next."""
    return min(MOST_COPIES, max(1, -(-ROTATED_NBYTES // nbytes)))


def copies_of(members: list[Operands]) -> list[list[Operands]]:
    """The matrices themselves and further copies of all of them."""
    num = num_copies(sum(map(stored_nbytes, members)))
    return [members] + [[copy_of(each) for each in members] for _ in range(num - 1)]


def copy_of(operands: Operands) -> Operands:
    return dataclasses.replace(
        operands,
        words=operands.words.clone(),
        scales=operands.scales.clone(),
        zeros=None if operands.zeros is None else operands.zeros.clone(),
    )


def weights_of(operands: Operands, dtype: torch.dtype) -> torch.Tensor:
    return dequantize(
        operands.words,
        operands.scales,
        operands.zeros,
        order=operands.order,
        runs=operands.runs,
        group_size=operands.group_size,
        shape=operands.shape,
        dtype=dtype,
    )
