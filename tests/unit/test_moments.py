"""Second moments against the direct computation, with bad tokens left out and counted."""

import pytest
import torch

from llmmpq.errors import CalibrationError
from llmmpq.measure import moments
from llmmpq.measure.moments import Moment

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def direct(rows: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
    rows, other = rows.double(), (rows if other is None else other).double()
    return (other.t() @ rows / len(rows)).float()


def test_means_over_all_tokens_of_all_batches():
    batches = [randn(2, 5, 7, seed=0), randn(1, 5, 7, seed=1), randn(3, 7, seed=2)]
    moment = Moment(7, device=CPU)
    for batch in batches:
        moment.add(batch)
    mean, cross = moment.means("here")
    rows = torch.cat([batch.reshape(-1, 7) for batch in batches])
    torch.testing.assert_close(mean, direct(rows))
    assert cross is None
    assert (moment.num_rows, moment.num_excluded) == (18, 0)
    assert mean.dtype == torch.float32


def test_the_cross_moment_is_that_of_the_change_with_the_input():
    inputs, originals = randn(4, 6, 5), randn(4, 6, 5, seed=1)
    moment = Moment(5, device=CPU, num_errors=5)
    for one, two in zip(inputs, originals, strict=True):
        moment.add(one, two - one)
    mean, cross = moment.means("here")
    inputs, originals = inputs.reshape(-1, 5), originals.reshape(-1, 5)
    torch.testing.assert_close(mean, direct(inputs))
    torch.testing.assert_close(cross, direct(inputs, originals - inputs))
    assert not torch.allclose(cross, cross.t(), atol=1e-3)  # so that a transposed one would show


@pytest.mark.parametrize("band", [1, 3, 5, 6])
def test_bands_that_do_not_divide_the_features(monkeypatch, band):
    monkeypatch.setattr(moments, "BAND", band)
    inputs, originals = randn(9, 5), randn(9, 5, seed=1)
    moment = Moment(5, device=CPU, num_errors=5)
    moment.add(inputs, originals - inputs)
    mean, cross = moment.means("here")
    torch.testing.assert_close(mean, direct(inputs))
    torch.testing.assert_close(cross, direct(inputs, originals - inputs))


def test_the_order_of_the_batches_leaves_no_trace():
    inputs, originals = randn(40, 30, 64), randn(40, 30, 64, seed=1)
    found = []
    for order in (range(40), reversed(range(40)), [*range(0, 40, 3), *range(1, 40, 3), *range(2, 40, 3)]):
        moment = Moment(64, device=CPU, num_errors=64)
        for position in order:
            moment.add(inputs[position], originals[position] - inputs[position])
        found.append(torch.cat(moment.means("here")))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    inputs = (100 * randn(3, 400, 4)).to(dtype)
    moment = Moment(4, device=CPU)
    moment.add(inputs)
    mean, _ = moment.means("here")
    torch.testing.assert_close(mean, direct(inputs.reshape(-1, 4).float()), rtol=1e-4, atol=1)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_tokens_with_bad_values_are_left_out_and_counted(bad):
    inputs = randn(2, 5, 6)
    inputs[0, 3, 2] = inputs[1, 0, 0] = inputs[1, 0, 5] = bad
    moment = Moment(6, device=CPU)
    moment.add(inputs)
    moment.add(randn(1, 4, 6, seed=1))
    assert (moment.num_rows, moment.num_excluded) == (12, 2)
    rows = torch.cat([inputs.reshape(-1, 6), randn(4, 6, seed=1)])
    mean, _ = moment.means("here")
    torch.testing.assert_close(mean, direct(rows[torch.isfinite(rows).all(1)]))


@pytest.mark.parametrize("where", ["input", "original", "both"])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_token_bad_in_either_model_counts_once_and_in_neither_moment(where, bad):
    inputs, originals = randn(8, 3), randn(8, 3, seed=1)
    if where in ("input", "both"):
        inputs[2, 1] = bad
    if where in ("original", "both"):
        originals[2, 0] = bad
    originals[5, 0] = bad
    moment = Moment(3, device=CPU, num_errors=3)
    moment.add(inputs, originals - inputs)
    assert (moment.num_rows, moment.num_excluded) == (6, 2)
    good = [0, 1, 3, 4, 6, 7]
    mean, cross = moment.means("here")
    torch.testing.assert_close(mean, direct(inputs[good]))
    torch.testing.assert_close(cross, direct(inputs[good], originals[good] - inputs[good]))


def test_large_finite_tokens_are_kept():
    """Their squared norm overflows float32, which must not pass for a NaN."""
    moment = Moment(2, device=CPU)
    moment.add(torch.tensor([[1e18, 0.0], [0.0, 1e25], [1e25, 1e25]]))
    assert (moment.num_rows, moment.num_excluded) == (3, 0)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_only_bad_tokens_is_an_error_that_names_the_layer(bad):
    moment = Moment(4, device=CPU)
    moment.add(torch.full((3, 4), bad))
    with pytest.raises(CalibrationError, match=r"layers\.7\.up_proj is NaN or infinite \(3 tokens\)"):
        moment.means("layers.7.up_proj")


def test_adding_does_not_change_or_hold_the_inputs():
    inputs = randn(5, 4).requires_grad_(True)
    before = inputs.detach().clone()
    moment = Moment(4, device=CPU, num_errors=4)
    moment.add(inputs, torch.ones_like(inputs))
    assert torch.equal(inputs, before)
    assert not any(band.requires_grad for band in moment.bands)


def test_a_batch_without_tokens_adds_nothing():
    moment = Moment(3, device=CPU, num_errors=2)
    moment.add(torch.zeros(0, 3), torch.zeros(0, 2))
    moment.add(randn(4, 3), randn(4, 2, seed=1))
    mean, cross = moment.means("here")
    torch.testing.assert_close(mean, direct(randn(4, 3)))
    torch.testing.assert_close(cross, direct(randn(4, 3), randn(4, 2, seed=1)))


@pytest.mark.parametrize("shape", [(4, 3), (1, 6), (2, 2)])
def test_errors_of_another_shape_are_refused(shape):
    with pytest.raises(RuntimeError):
        Moment(3, device=CPU, num_errors=3).add(randn(1, 3), randn(*shape))


def test_tokens_without_errors_are_counted():
    moment = Moment(3, device=CPU, num_errors=3)
    moment.add(randn(4, 3), randn(4, 3, seed=1))
    moment.add(randn(2, 3), None)
    assert (moment.num_rows, moment.num_without_errors) == (6, 2)
    alone = Moment(3, device=CPU)
    alone.add(randn(2, 3))
    assert alone.num_without_errors == 0
