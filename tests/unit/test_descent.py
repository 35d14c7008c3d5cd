"""Descent after GPTQ: what it promises of every code and scale, against the definition of the error."""

import pytest
import torch

from llmmpq.quantize import descent
from llmmpq.quantize.descent import descend
from llmmpq.quantize.gptq import factorize, gptq
from llmmpq.quantize.grid import combine_grids, find_grid
from llmmpq.quantize.linear import LinearQuantizer, dequantized
from llmmpq.quantize.scales import stored_scales_for
from llmmpq.records import Scheme

SIZE, SHAPE = 16, (24, 72)  # the last group is short


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(400, SHAPE[1], generator=generator) @ torch.randn(SHAPE[1], SHAPE[1], generator=generator)
    weight = torch.randn(SHAPE, generator=generator)
    moment = inputs.t() @ inputs / len(inputs)
    return weight, moment, factorize(moment, damping=0.01, activation_order=True)


PLAIN = Scheme(bits=2, group_size=SIZE)


def start(scheme=PLAIN):
    weight, moment, factor = problem()
    if scheme.mixed:
        stored = stored_scales_for(weight, scheme, 2)
        grids = [find_grid(weight, scheme, moment.diagonal(), bits=bits, stored=stored) for bits in (2, 3)]
        grid = combine_grids(grids, [0, 1, 0, 1, 0])
    else:
        grid = find_grid(weight, scheme, moment.diagonal())
    return weight, gptq(weight, grid, factor, column_block=32), grid, factor


def values(codes, grid):
    expand = [part.repeat_interleave(SIZE, dim=1)[:, : SHAPE[1]] for part in (grid.scales_NG, grid.zeros_NG)]
    return (codes.float() - expand[1]) * expand[0]


def errors(weight, codes, grid, factor):
    """r H r' of each row, in float64, from the definition."""
    rest = (weight - values(codes, grid)).double()
    damped = factor.moment_KK.double() + torch.diag(factor.ridge_K.double())
    return ((rest @ damped) * rest).sum(1)


SCHEMES = {
    "2": Scheme(bits=2, group_size=SIZE),
    "4 symmetric": Scheme(bits=4, group_size=SIZE, symmetric=True),
    "8 float8": Scheme(bits=8, group_size=SIZE, scale_dtype="float8"),
    "mixed": Scheme(bits=None, runs=((2, 3), (3, 2)), group_size=SIZE, scale_dtype="float8"),
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_every_row_gets_better_with_every_sweep(scheme):
    weight, codes, grid, factor = start(scheme)
    before = errors(weight, codes, grid, factor)
    for sweeps in (1, 2, 4):
        found, improved = descend(weight, codes, grid, factor, sweeps=sweeps, column_block=32)
        after = errors(weight, found, improved, factor)
        assert (after <= before * (1 + 1e-6)).all()
        before = after
    assert before.sum() < 0.95 * errors(weight, codes, grid, factor).sum()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_codes_stay_in_range_and_scales_can_be_stored(scheme):
    weight, codes, grid, factor = start(scheme)
    found, improved = descend(weight, codes, grid, factor, sweeps=3, column_block=32)
    assert found.dtype == torch.uint8
    for group, columns in enumerate(found.split(SIZE, dim=1)):
        assert int(columns.max()) <= grid.largest_codes[group]
    assert torch.equal(grid.stored.round(improved.scales_NG), improved.scales_NG)
    assert torch.equal(improved.zeros_NG, grid.zeros_NG)
    assert torch.equal(improved.widths_G, grid.widths_G)


def test_in_the_end_no_code_and_no_scale_can_be_improved_alone():
    weight, codes, grid, factor = start()
    found, improved = descend(weight, codes, grid, factor, sweeps=60, column_block=32)
    best = errors(weight, found, improved, factor)
    for column in range(SHAPE[1]):
        for step in (-1, 1):
            other = found.clone().int()
            other[:, column] = (other[:, column] + step).clamp(0, 3)
            assert (errors(weight, other, improved, factor) >= best * (1 - 1e-5)).all()
    for group in range(grid.scales_NG.shape[1]):
        for share in (0.98, 1.02):
            scales = improved.scales_NG.clone()
            scales[:, group] *= share
            changed = type(improved)(**{**vars(improved), "scales_NG": scales})
            assert (errors(weight, found, changed, factor) >= best * (1 - 1e-5)).all()


def test_nothing_that_was_given_is_changed():
    weight, codes, grid, factor = start()
    given = [weight, codes, grid.scales_NG, grid.zeros_NG, factor.moment_KK]
    before = [tensor.clone() for tensor in given]
    descend(weight, codes, grid, factor, sweeps=2, column_block=32)
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(given, before, strict=True))


def test_no_sweep_changes_nothing():
    weight, codes, grid, factor = start()
    found, same = descend(weight, codes, grid, factor, sweeps=0, column_block=32)
    assert torch.equal(found, codes)
    assert torch.equal(same.scales_NG, grid.scales_NG)


@pytest.mark.parametrize("column_block", [1, 5, 16, 100])
def test_the_column_block_is_only_a_matter_of_speed(column_block):
    weight, codes, grid, factor = start()
    expected, _ = descend(weight, codes, grid, factor, sweeps=1, column_block=SIZE)
    found, _ = descend(weight, codes, grid, factor, sweeps=1, column_block=column_block)
    assert (found != expected).float().mean() < 0.01  # a value half-way may fall to the other side


def test_rows_do_not_depend_on_their_chunk(monkeypatch):
    weight, codes, grid, factor = start()
    expected, wanted = descend(weight, codes, grid, factor, sweeps=2, column_block=32)
    monkeypatch.setattr(descent, "CHUNK_ELEMENTS", 7 * SHAPE[1])
    found, improved = descend(weight, codes, grid, factor, sweeps=2, column_block=32)
    assert (found != expected).float().mean() < 0.01
    error, other = errors(weight, found, improved, factor).sum(), errors(weight, expected, wanted, factor).sum()
    assert float(error) == pytest.approx(float(other), rel=0.01)


def test_a_row_of_zeros_stays_one():
    weight, moment, factor = problem()
    weight[3] = 0
    quantizer = LinearQuantizer(weight, importance_K=moment.diagonal(), factor=factor, column_block=32, sweeps=3)
    packed = quantizer.quantize(Scheme(bits=2, group_size=SIZE, scale_dtype="float8")).packed
    assert not dequantized(packed, torch.float32)[3].any()


def test_schemes_of_one_matrix_do_not_depend_on_each_other():
    """Losses of groups are shared between the schemes of a matrix; each comes out as it does alone."""
    weight, moment, factor = problem()

    def quantizer():
        return LinearQuantizer(weight, importance_K=moment.diagonal(), factor=factor, column_block=32, sweeps=1)

    together = quantizer()
    for scheme in (*SCHEMES.values(), Scheme(bits=None, runs=((2, 4), (3, 1)), group_size=SIZE)):
        alone, shared = quantizer().quantize(scheme).packed, together.quantize(scheme).packed
        for key, tensor in alone.tensors().items():
            assert torch.equal(tensor, shared.tensors()[key])
