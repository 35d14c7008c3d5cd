"""GPTQ against its definition: the factor inverts, the codes are those of step by step, plain rounding is beaten."""

import pytest
import torch

from llmmpq.quantize import gptq as module
from llmmpq.quantize.gptq import DAMPING_LADDER, factorize, gptq
from llmmpq.quantize.grid import find_grid
from llmmpq.quantize.linear import dequantized, quantize_linear
from llmmpq.quantize.rtn import round_to_nearest
from llmmpq.records import Scheme

either_order = pytest.mark.parametrize("activation_order", [False, True], ids=["stored order", "activation order"])


def correlated_inputs(num_rows: int, num_features: int, seed: int = 0) -> torch.Tensor:
    """Few strong directions, unequal channels: what the inputs of a transformer's linears look like."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(num_features // 4, num_features, generator=generator)
    inputs = torch.randn(num_rows, num_features // 4, generator=generator) @ directions
    inputs += 0.3 * torch.randn(num_rows, num_features, generator=generator)
    return inputs * torch.exp(torch.randn(num_features, generator=generator))


def moment_of(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.t() @ inputs / len(inputs)


def damped(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """In float64, with the rule for dead channels: they are given the mean diagonal and no neighbours."""
    matrix = moment.double()
    mean = matrix.diagonal().mean()
    dead = matrix.diagonal() <= 0
    return matrix + torch.diag(mean * damping + dead * mean)


def randn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dequantize(codes: torch.Tensor, grid) -> torch.Tensor:
    group_of = torch.arange(codes.shape[1]) // grid.scheme.group_size
    return (codes.double() - grid.zeros_NG[:, group_of]) * grid.scales_NG[:, group_of]


def quadratic(change: torch.Tensor, matrix: torch.Tensor) -> float:
    change = change.double()
    return float(((change @ matrix.double()) * change).sum())


def by_definition(weight: torch.Tensor, grid, matrix: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Round a column, let those that are left answer for its error as well as they can, and so on, in float64."""
    weight, codes = weight.double(), torch.empty(weight.shape, dtype=torch.uint8)
    for position, column in enumerate(order):
        left = order[position:]
        inverse = torch.linalg.inv(matrix[left][:, left])
        group = column // grid.scheme.group_size
        scale, zero = grid.scales_NG[:, group].double(), grid.zeros_NG[:, group].double()
        code = (weight[:, column] / scale).round().add(zero).clamp(0, 2**grid.scheme.bits - 1)
        error = (weight[:, column] - (code - zero) * scale) / inverse[0, 0]
        weight[:, left] -= error[:, None] * inverse[0]
        codes[:, column] = code
    return codes


def assert_same_rounding(codes: torch.Tensor, expected: torch.Tensor, *, losses: tuple[float, float]) -> None:
    # Float noise decides ties now and then, and each decision moves the columns after it.
    assert (codes == expected).double().mean() > 0.98
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


# The factor


@either_order
@pytest.mark.parametrize("size", [1, 2, 5, 128, 129, 300])
def test_the_factor_is_that_of_the_inverse(size, activation_order):
    moment = moment_of(correlated_inputs(4 * size + 8, max(size, 4))[:, :size])
    factor = factorize(moment, damping=0.01, activation_order=activation_order)
    upper, order = factor.upper_KK.double(), factor.order_K
    assert torch.equal(upper, upper.triu())
    assert (upper.diagonal() > 0).all()
    expected = damped(moment, factor.damping)[order][:, order]
    identity = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(upper.t() @ upper @ expected, identity, rtol=0, atol=2e-3)
    assert factor.damping == pytest.approx(0.01)
    assert factor.num_dead == 0


def test_activation_order_visits_the_strongest_channel_first():
    moment = moment_of(correlated_inputs(100, 20))
    factor = factorize(moment, damping=0.01, activation_order=True)
    visited = moment.diagonal()[factor.order_K]
    assert (visited[:-1] >= visited[1:]).all()
    assert sorted(factor.order_K.tolist()) == list(range(20))
    plain = factorize(moment, damping=0.01, activation_order=False)
    assert plain.order_K.tolist() == list(range(20))


def test_the_moment_is_left_as_it_was():
    moment = moment_of(correlated_inputs(100, 20))
    before = moment.clone()
    factorize(moment, damping=0.01, activation_order=True)
    assert torch.equal(moment, before)


@either_order
def test_the_triangular_inverse_by_halves(activation_order, monkeypatch):
    moment = moment_of(correlated_inputs(400, 77))
    whole = factorize(moment, damping=0.05, activation_order=activation_order)
    monkeypatch.setattr(module, "INVERSE_BASE", 3)
    halves = factorize(moment, damping=0.05, activation_order=activation_order)
    torch.testing.assert_close(halves.upper_KK, whole.upper_KK, rtol=1e-3, atol=1e-4)


@either_order
def test_dead_channels_are_counted_and_get_pivots_of_ordinary_size(activation_order):
    inputs = correlated_inputs(200, 30)
    inputs[:, [3, 17]] = 0
    moment = moment_of(inputs)
    factor = factorize(moment, damping=0.01, activation_order=activation_order)
    assert factor.num_dead == 2
    order, upper = factor.order_K, factor.upper_KK.double()
    expected = damped(moment, factor.damping)[order][:, order]
    torch.testing.assert_close(upper.t() @ upper @ expected, torch.eye(30, dtype=torch.float64), rtol=0, atol=2e-3)
    mean = float(moment.diagonal().mean())
    for place in (order.tolist().index(3), order.tolist().index(17)):
        assert float(upper[place, place]) == pytest.approx((mean * 1.01) ** -0.5, rel=1e-3)
        assert upper[place].count_nonzero() == upper[:, place].count_nonzero() == 1


def test_a_singular_moment_climbs_the_damping_ladder():
    direction = randn(64, 1)
    moment = direction @ direction.t()
    moment[0, 1] = moment[1, 0] = 1.05 * moment[0, 0].mul(moment[1, 1]).sqrt()  # indefinite, by rounding gone wrong
    factor = factorize(moment, damping=0.01, activation_order=True)
    assert factor is not None
    assert factor.damping > 0.01
    assert any(factor.damping == pytest.approx(0.01 * step) for step in DAMPING_LADDER[1:])


def test_each_step_of_the_ladder_is_tried():
    """-e on the diagonal needs damping above e: the factor says which share of the mean it took."""
    for needed, expected in ((0.005, 0.01), (0.02, 0.03), (0.05, 0.1), (0.2, 0.3), (0.7, 1.0)):
        moment = torch.eye(50)
        moment[0, 1] = moment[1, 0] = 1 + needed
        factor = factorize(moment, damping=0.01, activation_order=False)
        assert factor.damping == pytest.approx(expected)


@pytest.mark.parametrize("activation_order", [False, True])
def test_what_cannot_be_factored_is_given_up(activation_order):
    good = moment_of(correlated_inputs(100, 12))
    indefinite, diagonal_nan, corner_nan, infinite = (good.clone() for _ in range(4))
    indefinite[0, 1] = indefinite[1, 0] = 100 * good.diagonal().max()
    diagonal_nan[4, 4] = float("nan")
    corner_nan[2, 9] = corner_nan[9, 2] = float("nan")
    infinite[5, 5] = float("inf")
    for moment in (indefinite, diagonal_nan, corner_nan, infinite, torch.zeros(12, 12)):
        assert factorize(moment, damping=0.01, activation_order=activation_order) is None


# Rounding


@either_order
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_codes_are_those_of_the_definition(bits, symmetric, activation_order):
    moment = moment_of(correlated_inputs(400, 100))
    factor = factorize(moment, damping=0.01, activation_order=activation_order)
    weight, matrix = randn(24, 100), damped(moment, factor.damping)
    grid = find_grid(weight, Scheme(bits=bits, group_size=32, symmetric=symmetric), moment.diagonal())
    codes = gptq(weight, grid, factor, column_block=32)
    expected = by_definition(weight, grid, matrix, factor.order_K.tolist())
    losses = tuple(quadratic(weight - dequantize(found, grid), matrix) for found in (codes, expected))
    assert_same_rounding(codes, expected, losses=losses)


def test_dead_channels_are_rounded_to_nearest():
    inputs = correlated_inputs(400, 60)
    inputs[:, [0, 31, 59]] = 0
    moment = moment_of(inputs)
    factor = factorize(moment, damping=0.01, activation_order=True)
    weight = randn(10, 60)
    grid = find_grid(weight, Scheme(bits=3, group_size=20), moment.diagonal())
    codes = gptq(weight, grid, factor, column_block=16)
    expected = by_definition(weight, grid, damped(moment, factor.damping), factor.order_K.tolist())
    assert (codes == expected).double().mean() > 0.98
    # Nothing is moved into or out of a channel that never fires: it is rounded to nearest.
    nearest = round_to_nearest(weight, grid)
    assert torch.equal(codes[:, [0, 31, 59]], nearest[:, [0, 31, 59]])


@either_order
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "at_most"), [(2, 0.5), (3, 0.5), (4, 0.5)])
def test_the_true_output_error_is_below_that_of_rounding(bits, at_most, symmetric, activation_order):
    inputs = correlated_inputs(1000, 128)
    unseen = inputs[500:]
    moment = moment_of(inputs[:500])
    weight = randn(48, 128)
    scheme = Scheme(bits=bits, group_size=32, symmetric=symmetric)
    grid = find_grid(weight, scheme, moment.diagonal())
    factor = factorize(moment, damping=0.01, activation_order=activation_order)
    codes = gptq(weight, grid, factor, column_block=128)
    errors = [
        float((unseen.double() @ (weight - dequantize(found, grid)).t()).square().mean())
        for found in (codes, round_to_nearest(weight, grid))
    ]
    assert errors[0] < at_most * errors[1]


@pytest.mark.parametrize("column_block", [1, 7, 32, 99, 100, 1000])
@either_order
def test_the_column_block_is_only_a_matter_of_speed(column_block, activation_order):
    moment = moment_of(correlated_inputs(400, 100))
    factor = factorize(moment, damping=0.01, activation_order=activation_order)
    weight = randn(24, 100)
    grid = find_grid(weight, Scheme(bits=3, group_size=32), moment.diagonal())
    expected = gptq(weight, grid, factor, column_block=100)
    codes = gptq(weight, grid, factor, column_block=column_block)
    matrix = damped(moment, factor.damping)
    losses = tuple(quadratic(weight - dequantize(found, grid), matrix) for found in (codes, expected))
    assert_same_rounding(codes, expected, losses=losses)


def test_activation_order_leaves_no_trace_in_the_stored_matrix():
    """The same numbers with columns permuted beforehand and visited in that order: a round trip."""
    moment = moment_of(correlated_inputs(400, 64))
    weight = randn(16, 64)
    factor = factorize(moment, damping=0.01, activation_order=True)
    order = factor.order_K
    assert order.tolist() != list(range(64))
    scheme = Scheme(bits=4, group_size=64)  # one group, so that permuting keeps the grid
    grid = find_grid(weight, scheme, moment.diagonal())
    codes = gptq(weight, grid, factor, column_block=64)
    permuted = factorize(moment[order][:, order], damping=0.01, activation_order=False)
    expected = gptq(weight[:, order], grid, permuted, column_block=64)
    assert torch.equal(codes[:, order], expected)


def test_uncorrelated_channels_are_rounded_to_nearest():
    factor = factorize(torch.diag(randn(40).square() + 0.1), damping=0.01, activation_order=True)
    weight = randn(16, 40)
    grid = find_grid(weight, Scheme(bits=4, group_size=16), torch.ones(40))
    codes = gptq(weight, grid, factor, column_block=8)
    assert torch.equal(codes, round_to_nearest(weight, grid))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_stay_within_the_width_when_errors_pile_up(bits):
    moment = moment_of(correlated_inputs(100, 64))
    factor = factorize(moment, damping=1e-3, activation_order=False)
    weight = 3 * randn(16, 64) ** 3
    grid = find_grid(0.1 * weight, Scheme(bits=bits, group_size=16), moment.diagonal())  # far too narrow
    codes = gptq(weight, grid, factor, column_block=16)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) <= 2**bits - 1


def test_the_weight_is_left_as_it_was():
    moment = moment_of(correlated_inputs(100, 32))
    factor = factorize(moment, damping=0.01, activation_order=True)
    weight = randn(8, 32)
    before = weight.clone()
    gptq(weight, find_grid(weight, Scheme(bits=2, group_size=8), moment.diagonal()), factor, column_block=8)
    assert torch.equal(weight, before)


# One matrix, start to end


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("with_factor", [False, True])
def test_what_is_packed_is_what_was_decided(bits, symmetric, with_factor):
    moment = moment_of(correlated_inputs(400, 72))
    factor = factorize(moment, damping=0.01, activation_order=True) if with_factor else None
    weight, scheme = randn(33, 72), Scheme(bits=bits, group_size=32, symmetric=symmetric)
    quantized = quantize_linear(weight, scheme, importance_K=moment.diagonal(), factor=factor, column_block=32)
    assert quantized.algorithm == ("gptq" if with_factor else "rtn")
    grid = find_grid(weight, scheme, moment.diagonal())
    codes = gptq(weight, grid, factor, column_block=32) if with_factor else round_to_nearest(weight, grid)
    found = dequantized(quantized.packed, torch.float32)
    torch.testing.assert_close(found, dequantize(codes, grid).float(), rtol=1e-6, atol=0)
    stored = {name: tuple(tensor.shape) for name, tensor in quantized.packed.tensors().items()}
    assert stored == {name: shape for name, (_, shape) in scheme.tensors((33, 72)).items()}
    assert sum(tensor.nbytes for tensor in quantized.packed.tensors().values()) == scheme.nbytes((33, 72))
