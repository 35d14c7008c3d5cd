"""Grids of any data: storable, no worse than plain rounding, and deaf to what must not matter."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmmpq.quantize.grid import find_grid
from llmmpq.quantize.linear import dequantized, quantize_linear
from llmmpq.quantize.rtn import round_to_nearest
from llmmpq.scheme import WIDTHS, Scheme

quick = settings(deadline=None, max_examples=60)
schemes = st.builds(
    Scheme, bits=st.sampled_from(WIDTHS), group_size=st.sampled_from([1, 8, 32, 64]), symmetric=st.booleans()
)


@st.composite
def weights(draw) -> torch.Tensor:
    """Rows of very different kinds and sizes side by side."""
    num_columns = draw(st.integers(1, 80))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        row = torch.randn(num_columns, generator=generator)
        kind = draw(st.sampled_from(["normal", "cubed", "constant", "zero", "one spike", "positive", "few values"]))
        if kind == "cubed":
            row = row**3
        elif kind == "constant":
            row = row[:1].expand(num_columns)
        elif kind == "zero":
            row = torch.zeros(num_columns)
        elif kind == "one spike":
            row = torch.where(torch.arange(num_columns) == draw(st.integers(0, num_columns - 1)), 50.0, 0.01 * row)
        elif kind == "positive":
            row = row.abs() + 1
        elif kind == "few values":
            row = row.sign() * 0.5
        rows.append(row * 10.0 ** draw(st.integers(-9, 3)))
    return torch.stack(rows)


def error_of(weight, scales, zeros, importance, scheme) -> torch.Tensor:
    """Per row and group, in float64."""
    group_of = torch.arange(weight.shape[1]) // scheme.group_size
    scale, zero = scales[:, group_of].double(), zeros[:, group_of].double()
    codes = (torch.round(weight.double() / scale) + zero).clamp(0, 2**scheme.bits - 1)
    error = importance.double() * (weight - (codes - zero) * scale).square()
    return torch.zeros(scales.shape, dtype=torch.float64).index_add_(1, group_of, error)


def min_max(weight, scheme):
    groups = weight.split(scheme.group_size, dim=1)
    low = torch.stack([group.amin(1) for group in groups], 1).clamp_max(0)
    high = torch.stack([group.amax(1) for group in groups], 1).clamp_min(0)
    if scheme.symmetric:
        levels = 2 ** (scheme.bits - 1)
        scales = torch.maximum(-low, high) / levels
        zeros = torch.full_like(scales, levels)
    else:
        scales, zeros = (high - low) / (2**scheme.bits - 1), None
    scales = scales.clamp_min(2.0**-24).half().float()
    return scales, torch.round(-low / scales).clamp(0, 2**scheme.bits - 1) if zeros is None else zeros


@quick
@given(weights(), schemes)
def test_grids_can_be_stored_and_are_no_worse_than_min_max(weight, scheme):
    importance = torch.ones(weight.shape[1])
    grid = find_grid(weight, scheme, importance)
    assert grid.scales_NG.shape == (len(weight), scheme.num_groups(weight.shape[1]))
    assert torch.equal(grid.scales_NG.half().float(), grid.scales_NG)
    assert torch.isfinite(grid.scales_NG).all()
    assert (grid.scales_NG != 0).all()
    assert torch.equal(grid.zeros_NG.clamp(0, max(grid.largest_codes)).round(), grid.zeros_NG)
    found = error_of(weight, grid.scales_NG, grid.zeros_NG, importance, scheme)
    plain = error_of(weight, *min_max(weight, scheme), importance, scheme)
    # In float32 an error far below the weights themselves cannot be told from another.
    noise = 1e-11 * weight.double().square().amax(1, keepdim=True) * scheme.group_size
    assert (found <= plain * (1 + 1e-3) + noise).all()


@quick
@given(weights(), schemes, st.integers(-3, 3))
def test_the_unit_of_importance_does_not_matter(weight, scheme, exponent):
    importance = torch.linspace(0.5, 2.0, weight.shape[1])
    one = find_grid(weight, scheme, importance)
    two = find_grid(weight, scheme, importance * 4.0**exponent)
    # Powers of two are exact, but for errors so small that they are subnormal.
    assume(float(weight.abs().max()) > 1e-6)
    big = weight.abs().amax(1) > 1e-6
    assert torch.equal(one.scales_NG[big], two.scales_NG[big])
    assert torch.equal(one.zeros_NG[big], two.zeros_NG[big])


@quick
@given(weights(), schemes)
def test_rows_do_not_know_each_other(weight, scheme):
    importance = torch.linspace(0.5, 2.0, weight.shape[1])
    whole = find_grid(weight, scheme, importance)
    for position in range(len(weight)):
        alone = find_grid(weight[position : position + 1], scheme, importance)
        torch.testing.assert_close(alone.scales_NG[0], whole.scales_NG[position], rtol=0, atol=0)
        torch.testing.assert_close(alone.zeros_NG[0], whole.zeros_NG[position], rtol=0, atol=0)


@quick
@given(weights(), schemes)
def test_a_negated_symmetric_matrix_is_the_negative(weight, scheme):
    assume(scheme.symmetric)
    importance = torch.ones(weight.shape[1])
    one, two = (find_grid(w, scheme, importance) for w in (weight, -weight))
    errors = [error_of(w, g.scales_NG, g.zeros_NG, importance, scheme) for w, g in ((weight, one), (-weight, two))]
    assert errors[0].sum() == pytest.approx(float(errors[1].sum()), rel=1e-3, abs=1e-12)


@quick
@given(weights(), schemes)
def test_what_is_packed_is_what_was_rounded(weight, scheme):
    importance = torch.ones(weight.shape[1])
    packed = quantize_linear(weight, scheme, importance_K=importance, factor=None, column_block=1).packed
    grid = find_grid(weight, scheme, importance)
    codes = round_to_nearest(weight, grid)
    group_of = torch.arange(weight.shape[1]) // scheme.group_size
    expected = (codes.float() - grid.zeros_NG[:, group_of]) * grid.scales_NG[:, group_of]
    assert torch.equal(dequantized(packed, torch.float32), expected)
    nbytes = sum(tensor.nbytes for tensor in packed.tensors().values())
    assert nbytes == scheme.nbytes((weight.shape[0], weight.shape[1]))
