"""The correction solves the least-squares problem it claims to solve, and a share of it goes that share of the way."""

import pytest
import torch

from llmmpq.measure.moments import Moment
from llmmpq.quantize.correct import corrected_weight, correction_target
from llmmpq.quantize.gptq import factorize

CPU = torch.device("cpu")


def problem(num_rows: int = 400, num_features: int = 20):
    generator = torch.Generator().manual_seed(0)
    originals = torch.randn(num_rows, num_features, generator=generator)
    mixing = torch.eye(num_features) + 0.2 * torch.randn(num_features, num_features, generator=generator)
    inputs = originals @ mixing + 0.1 * torch.randn(num_rows, num_features, generator=generator)
    weight = torch.randn(12, num_features, generator=generator)
    return weight, inputs, originals


def moments(inputs, originals):
    moment = Moment(inputs.shape[1], device=CPU, num_errors=inputs.shape[1])
    for part, original in zip(inputs.split(64), originals.split(64), strict=True):
        moment.add(part, original - part)
    return moment.means("here")


def corrected(weight, cross, factor, *, share: float) -> torch.Tensor:
    return corrected_weight(weight, correction_target(weight, cross), factor, share=share)


@pytest.mark.parametrize("activation_order", [False, True])
def test_the_full_step_is_the_least_squares_solution(activation_order):
    weight, inputs, originals = problem()
    mean, cross = moments(inputs, originals)
    factor = factorize(mean, damping=1e-7, activation_order=activation_order)
    found = corrected(weight, cross, factor, share=1.0)
    # min over W' of |x W'^T - x0 W^T|
    expected = torch.linalg.lstsq(inputs.double(), originals.double() @ weight.double().t()).solution.t()
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    before = (inputs @ weight.t() - originals @ weight.t()).square().mean()
    after = (inputs @ found.t() - originals @ weight.t()).square().mean()
    assert after < 0.2 * before


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5])
def test_a_share_goes_that_share_of_the_way(share):
    weight, inputs, originals = problem()
    mean, cross = moments(inputs, originals)
    factor = factorize(mean, damping=0.01, activation_order=True)
    whole = corrected(weight, cross, factor, share=1.0)
    found = corrected(weight, cross, factor, share=share)
    torch.testing.assert_close(found, weight + share * (whole - weight), rtol=1e-5, atol=1e-5)


def test_damping_is_ridge_regression_around_the_original_weight():
    weight, inputs, originals = problem()
    mean, cross = moments(inputs, originals)
    factor = factorize(mean, damping=0.5, activation_order=True)
    ridge = mean.double() + 0.5 * mean.diagonal().double().mean() * torch.eye(20, dtype=torch.float64)
    expected = weight.double() + weight.double() @ cross.double() @ torch.linalg.inv(ridge)
    torch.testing.assert_close(corrected(weight, cross, factor, share=1.0).double(), expected, rtol=1e-4, atol=1e-4)


def test_without_an_error_coming_in_nothing_changes():
    weight, inputs, _ = problem()
    mean, cross = moments(inputs, inputs)
    factor = factorize(mean, damping=0.01, activation_order=True)
    assert torch.equal(corrected(weight, cross, factor, share=1.0), weight)


def test_the_weight_is_left_as_it_was_and_the_result_is_float32():
    weight, inputs, originals = problem()
    weight = weight.bfloat16()
    before = weight.clone()
    mean, cross = moments(inputs, originals)
    factor = factorize(mean, damping=0.01, activation_order=True)
    found = corrected(weight, cross, factor, share=0.5)
    assert found.dtype == torch.float32
    assert torch.equal(weight, before)
    torch.testing.assert_close(found, corrected(before.float(), cross, factor, share=0.5))
