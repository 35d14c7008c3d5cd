"""Matrices of several widths, and 8-bit scales, from the weight to what is stored."""

from dataclasses import replace

import pytest
import torch

from llmmpq.errors import CheckpointError
from llmmpq.quantize.gptq import factorize, gptq
from llmmpq.quantize.grid import find_grid
from llmmpq.quantize.groups import group_losses
from llmmpq.quantize.linear import dequantized, quantize_linear
from llmmpq.quantize.scales import SMALLEST_BASE, stored_scales_for
from llmmpq.records import PackedTensor, Scheme
from llmmpq.runtime.contents import content_problems
from llmmpq.runtime.linear import PackedLinear

SIZE = 16
MIXED = Scheme(bits=None, runs=((2, 4), (4, 2)), group_size=SIZE)
SHAPE = (24, 6 * SIZE - 5)  # the last group is short
either_kind = pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
either_scale = pytest.mark.parametrize("scale_dtype", ["float16", "float8"])
either_algorithm = pytest.mark.parametrize("with_factor", [False, True], ids=["rtn", "gptq"])


def inputs_of(num_columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(300, num_columns, generator=generator) @ torch.randn(
        num_columns, num_columns, generator=generator
    )
    return inputs * torch.exp(torch.randn(num_columns, generator=generator))


def problem(shape=SHAPE, seed: int = 0):
    """A weight, the second moment of its input, and the factor of that."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    inputs = inputs_of(shape[1], seed)
    moment = inputs.t() @ inputs / len(inputs)
    return weight, moment, factorize(moment, damping=0.01, activation_order=True)


def quantized(weight, scheme, moment, factor, *, with_factor=True) -> PackedTensor:
    return quantize_linear(
        weight, scheme, importance_K=moment.diagonal(), factor=factor if with_factor else None, column_block=32
    ).packed


def output_error(weight, packed: PackedTensor, moment) -> float:
    change = (weight - dequantized(packed, torch.float32)).double()
    return float(((change @ moment.double()) * change).sum())


@either_algorithm
@either_scale
@either_kind
def test_what_comes_out_is_what_the_scheme_says(symmetric, scale_dtype, with_factor):
    weight, moment, factor = problem()
    scheme = replace(MIXED, symmetric=symmetric, scale_dtype=scale_dtype)
    packed = quantized(weight, scheme, moment, factor, with_factor=with_factor)
    stored = packed.tensors()
    seen = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in stored.items()}
    assert seen == scheme.tensors(SHAPE)
    assert sum(t.nbytes for t in stored.values()) == scheme.nbytes(SHAPE)
    assert content_problems(stored, scheme, SHAPE) == []
    again = PackedTensor.from_tensors(stored, scheme, SHAPE)
    assert again.tensors().keys() == stored.keys()

    values = dequantized(packed, torch.float32)
    wide = set(packed.order[4:].tolist())
    levels = [max(len(row.unique()) for row in group) for group in values.split(SIZE, dim=1)]
    assert all(found <= (16 if group in wide else 4) for group, found in enumerate(levels))
    assert max(levels) > 4
    linear = PackedLinear.from_packed(packed)
    assert torch.equal(linear.dequantize(), values)
    x = torch.randn(3, SHAPE[1], generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(linear(x), x @ values.T)


@either_algorithm
def test_the_error_lies_between_those_of_its_widths(with_factor):
    weight, moment, factor = problem()
    schemes = [Scheme(bits=2, group_size=SIZE), MIXED, Scheme(bits=4, group_size=SIZE)]
    errors = [
        output_error(weight, quantized(weight, scheme, moment, factor, with_factor=with_factor), moment)
        for scheme in schemes
    ]
    assert errors[0] > errors[1] > errors[2]


def test_the_groups_that_matter_are_wide():
    """One group's channels carry a hundred times the energy of the others."""
    weight, moment, _ = problem((24, 6 * SIZE))
    strong = torch.ones(6 * SIZE)
    strong[3 * SIZE : 4 * SIZE] = 10.0
    moment = moment / moment.diagonal().sqrt().outer(moment.diagonal().sqrt()) * strong.outer(strong)
    factor = factorize(moment, damping=0.01, activation_order=True)
    scheme = replace(MIXED, runs=((2, 5), (4, 1)))
    for known in (factor, None):
        packed = quantized(weight, scheme, moment, known)
        assert packed.order.tolist() == [0, 1, 2, 4, 5, 3]


def test_all_groups_of_one_width_are_the_uniform_matrix():
    """A mixed grid whose widths agree rounds as the plain one: only the packing differs."""
    weight, moment, factor = problem()
    uniform = quantized(weight, Scheme(bits=4, group_size=SIZE), moment, factor)
    grid = find_grid(weight, Scheme(bits=4, group_size=SIZE), moment.diagonal())
    again = find_grid(weight, MIXED, moment.diagonal(), bits=4, stored=stored_scales_for(weight, MIXED, 2))
    assert torch.equal(grid.scales_NG, again.scales_NG)
    codes = gptq(weight, again, factor, column_block=32)
    zeros = again.zeros_NG.repeat_interleave(SIZE, dim=1)[:, : SHAPE[1]]
    values = (codes - zeros) * again.scales_NG.repeat_interleave(SIZE, dim=1)[:, : SHAPE[1]]
    assert torch.equal(values, dequantized(uniform, torch.float32))


def test_the_losses_of_the_groups_are_the_output_error():
    weight, moment, factor = problem()
    grid = find_grid(weight, Scheme(bits=3, group_size=SIZE), moment.diagonal())
    losses = group_losses(weight, grid, factor=factor, importance_K=moment.diagonal(), column_block=32)
    packed = quantized(weight, Scheme(bits=3, group_size=SIZE), moment, factor)
    damped = moment + factor.damping * moment.diagonal().mean() * torch.eye(SHAPE[1])
    assert losses.shape == (6,)
    assert losses.sum() == pytest.approx(output_error(weight, packed, damped), rel=1e-3)


def test_the_losses_without_a_factor_are_weighted_rounding_errors():
    weight, moment, _ = problem()
    grid = find_grid(weight, Scheme(bits=3, group_size=SIZE), moment.diagonal())
    losses = group_losses(weight, grid, factor=None, importance_K=moment.diagonal(), column_block=32)
    values = dequantized(quantized(weight, grid.scheme, moment, None), torch.float32)
    error = ((weight - values).square() * moment.diagonal()).sum(0)
    expected = [float(part.sum()) for part in error.split(SIZE)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


# 8-bit scales


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@either_kind
def test_8_bit_scales_cost_little(symmetric, bits):
    weight, moment, factor = problem()
    errors = {}
    for scale_dtype in ("float16", "float8"):
        scheme = Scheme(bits=bits, group_size=SIZE, symmetric=symmetric, scale_dtype=scale_dtype)
        packed = quantized(weight, scheme, moment, factor)
        errors[scale_dtype] = output_error(weight, packed, moment)
        if scale_dtype == "float8":
            assert (packed.scales > 0).all()
    # Steps of 1/16 at most, and symmetric grids lose the choice of the side that has one more level.
    assert errors["float8"] < (1.6 if symmetric or bits == 8 else 1.2) * errors["float16"]


@either_kind
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-42, 1e4])
def test_weights_that_are_all_alike(value, symmetric):
    weight = torch.full((4, 40), value)
    scheme = Scheme(bits=3, group_size=SIZE, symmetric=symmetric, scale_dtype="float8")
    packed = quantize_linear(weight, scheme, importance_K=torch.ones(40), factor=None, column_block=8).packed
    assert content_problems(packed.tensors(), scheme, (4, 40)) == []
    values = dequantized(packed, torch.float32)
    assert torch.isfinite(values).all()
    assert float(packed.scale_base) >= SMALLEST_BASE
    if value in (0.0, 1e4):
        torch.testing.assert_close(values, weight, rtol=0.07, atol=0)


@either_scale
def test_scales_beyond_float16_are_refused(scale_dtype):
    weight = 1e7 * torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    with pytest.raises(CheckpointError, match="does not fit into float16"):
        find_grid(weight, Scheme(bits=2, group_size=SIZE, scale_dtype=scale_dtype), torch.ones(40))


@either_kind
def test_every_scale_on_the_grid_is_one_that_is_stored(symmetric):
    weight, moment, _ = problem()
    grid = find_grid(weight, replace(MIXED, symmetric=symmetric, scale_dtype="float8"), moment.diagonal(), bits=2)
    codes = grid.stored.encode(grid.scales_NG)
    assert codes.dtype == torch.uint8
    assert torch.equal(grid.stored.round(grid.scales_NG), grid.scales_NG)


def test_a_grid_of_a_mixed_scheme_needs_a_width():
    with pytest.raises(ValueError, match="give bits"):
        find_grid(torch.zeros(2, 96), MIXED, torch.ones(96))
