"""Packed matrices to test kernels with, drawn from a seed, and what they stand for."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from hypothesis import strategies as st

from llmmpq_kernels import dequantize, nearest_scale_codes, pack, pack_runs, pack_zeros
from llmmpq_kernels.operands import Operands
from llmmpq_kernels.scales import widen_scales

MIXES = [(2,), (3,), (4,), (8,), (2, 3), (3, 8), (2, 4, 8), (2, 3, 4, 8)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """`widths` of several numbers are runs: the groups are shared out by the seed."""

    rows: int
    shape: tuple[int, int]
    widths: tuple[int, ...]
    group_size: int
    dtype: torch.dtype = torch.float16
    eight_bit: bool = False
    symmetric: bool = False
    has_bias: bool = True
    seed: int = 0

    @property
    def num_groups(self) -> int:
        return -(-self.shape[1] // self.group_size)

    def operands(self) -> Operands:
        num_n, num_k = self.shape
        generator = torch.Generator().manual_seed(self.seed)
        widths_G, order = self._share_out(generator)
        top_G = 2**widths_G
        group_K = torch.arange(num_k) // self.group_size
        codes_NK = (torch.rand(self.shape, generator=generator) * top_G[group_K]).to(torch.uint8)
        zeros_GN = (torch.rand(self.num_groups, num_n, generator=generator) * top_G[:, None]).to(torch.uint8)
        runs = tuple((width, len(list(same))) for width, same in itertools.groupby(sorted(widths_G.tolist())))
        if order is None:
            words, zeros = pack(codes_NK, bits=self.widths[0]), pack(zeros_GN, bits=self.widths[0])
        else:
            words = pack_runs(codes_NK, order, runs=runs, group_size=self.group_size)
            zeros = pack_zeros(zeros_GN, order, runs=runs)
        scales = torch.rand(num_n, self.num_groups, generator=generator) * 0.1 + 0.01
        base = torch.tensor([0.06])
        bias = torch.randn(num_n, generator=generator).to(self.dtype)
        stored = {
            "words": words,
            "scales": nearest_scale_codes(scales, base) if self.eight_bit else scales.to(torch.float16),
            "zeros": None if self.symmetric else zeros,
            "order": order,
            "scale_base": base if self.eight_bit else None,
            "bias": bias if self.has_bias else None,
        }
        moved = {name: None if tensor is None else tensor.to(DEVICE) for name, tensor in stored.items()}
        return Operands(**moved, runs=runs, group_size=self.group_size, shape=self.shape)

    def x(self) -> torch.Tensor:
        """Activations with a mean, as those behind a nonlinearity have: sums of equal signs are the hard ones."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return (torch.randn(self.rows, self.shape[1], generator=generator) + 0.5).to(self.dtype).to(DEVICE)

    def _share_out(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The width of each group in the matrix, each at least once, and their order in storage."""
        if len(self.widths) == 1:
            return torch.full((self.num_groups,), self.widths[0]), None
        picked = torch.randint(0, len(self.widths), (self.num_groups,), generator=generator)
        places = torch.randperm(self.num_groups, generator=generator)[: len(self.widths)]
        picked[places] = torch.arange(len(self.widths))
        widths_G = torch.tensor(self.widths)[picked]
        return widths_G, torch.argsort(widths_G, stable=True).to(torch.int32)


def weights_of(operands: Operands, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The matrix by the reference."""
    return dequantize(
        operands.words,
        operands.scales,
        operands.zeros,
        order=operands.order,
        scale_base=operands.scale_base,
        runs=operands.runs,
        group_size=operands.group_size,
        shape=operands.shape,
        dtype=dtype,
    )


def relative_error(y_MN: torch.Tensor, x_MK: torch.Tensor, operands: Operands) -> float:
    """The largest error of a row against float64, as a share of the row's length. NaN stays NaN.

    A row whose sums cancel is measured by the length that they would have with random signs, one of a matrix that is
    (nearly) zero by one step of its codes: a code and its zero cancel only as far as rounding lets them.
    """
    x, weights_NK = x_MK.double(), weights_of(operands).double()
    wanted_MN, squares_MN = x @ weights_NK.T, x**2 @ (weights_NK**2).T
    if operands.bias is not None:
        wanted_MN += operands.bias.double()
    length_M = torch.maximum(wanted_MN.norm(dim=1), squares_MN.sum(dim=1).sqrt())
    step = float(widen_scales(operands.scales, operands.scale_base).max())
    length_M = torch.maximum(length_M, step * x.norm(dim=1)).clamp(min=torch.finfo(torch.float32).tiny)
    return float(((y_MN.double() - wanted_MN).norm(dim=1) / length_M).max())


@st.composite
def cases(draw: st.DrawFn, *, most_rows: int = 16) -> Case:
    """Shapes that fill no block, groups that may be longer than the matrix is wide."""
    num_k, group_size = draw(st.integers(1, 500)), draw(st.sampled_from([32, 64, 96, 128, 256]))
    num_groups = -(-num_k // group_size)
    widths = draw(st.lists(st.sampled_from([2, 3, 4, 8]), min_size=1, max_size=min(4, num_groups), unique=True))
    return Case(
        rows=draw(st.integers(1, most_rows)),
        shape=(draw(st.integers(1, 70)), num_k),
        widths=tuple(sorted(widths)),
        group_size=group_size,
        dtype=draw(st.sampled_from([torch.float16, torch.bfloat16])),
        eight_bit=draw(st.booleans()),
        symmetric=draw(st.booleans()),
        has_bias=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )
