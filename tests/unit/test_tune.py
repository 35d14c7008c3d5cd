"""Tuning lowers the loss it is given, keeps to what can be stored, and changes nothing where it does not help."""

import pytest
import torch

from llmmpq.quantize.descent import descend
from llmmpq.quantize.gptq import factorize, gptq
from llmmpq.quantize.grid import combine_grids, find_grid
from llmmpq.quantize.linear import LinearQuantizer, dequantized, pack_codes
from llmmpq.quantize.rtn import round_to_nearest
from llmmpq.quantize.scales import stored_scales_for
from llmmpq.quantize.tune import (
    CODE_REACH,
    SCALE_REACH,
    Latent,
    Rounded,
    TuneSettings,
    Work,
    begin_tuning,
    tune_matrices,
)
from llmmpq.records import Scheme

GROUP = 16
SCHEMES = {
    "2 bits": Scheme(bits=2, group_size=GROUP),
    "3 bits, symmetric": Scheme(bits=3, group_size=GROUP, symmetric=True),
    "3 bits, 8-bit scales": Scheme(bits=3, group_size=GROUP, scale_dtype="float8"),
    "2 and 4 bits": Scheme(bits=None, runs=((2, 2), (4, 1)), group_size=GROUP),
}
schemes = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())


def draw(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(weight_NK, scheme) -> Rounded:
    ones_K = torch.ones(weight_NK.shape[1])
    quantizer = LinearQuantizer(weight_NK, importance_K=ones_K, factor=None, column_block=1, sweeps=0)
    quantized = quantizer.quantize(scheme, to_be_tuned=True)
    assert quantized.rounded is not None
    return quantized.rounded


class TwoLayers:
    """relu(x A') B' against what it was with the original weights; the last group of A is short."""

    def __init__(self, scheme, *, num_batches=8, rows=24):
        self.weights = [draw(12, 40, seed=1), draw(20, 12 * 4, seed=2)]
        self.inputs = [draw(rows, 40, seed=10 + i) @ draw(40, 40, seed=3) for i in range(num_batches)]
        self.matrices = [rounded(weight, scheme) for weight in self.weights]
        self.seen = []

    def __call__(self, weights, batch):
        self.seen.append(batch)
        return (self.run(weights, batch) - self.run(self.weights, batch)).square().mean()

    def run(self, weights, batch):
        hidden = torch.relu(self.inputs[batch] @ weights[0].t())
        return hidden.repeat(1, 4) @ weights[1].t()

    def tune(self, *, steps=60, seed=0):
        work = Work(loss_of=self, num_batches=len(self.inputs))
        return tune_matrices(self.matrices, work, TuneSettings(steps=steps, batches_per_step=3, seed=seed))


@schemes
def test_tuning_lowers_the_loss_on_batches_it_has_not_seen(scheme):
    layers = TwoLayers(scheme)
    tuned = layers.tune()
    assert tuned.kept
    assert tuned.loss_after < 0.85 * tuned.loss_before
    held = layers.seen[0]
    assert held not in layers.seen[1:-1]
    assert held == layers.seen[-1]
    weights = [dequantized(pack_codes(matrix.codes_NK, matrix.grid), torch.float32) for matrix in tuned.matrices]
    assert float(layers(weights, held)) == pytest.approx(tuned.loss_after, rel=1e-5)


@schemes
def test_codes_and_scales_can_be_stored_and_all_else_is_as_before(scheme):
    layers = TwoLayers(scheme)
    for old, new in zip(layers.matrices, layers.tune().matrices, strict=True):
        tops_K = (2 ** new.grid.widths_G.int() - 1).repeat_interleave(GROUP)[: new.codes_NK.shape[1]]
        assert new.codes_NK.dtype == torch.uint8
        assert bool((new.codes_NK <= tops_K).all())
        assert torch.equal(new.grid.stored.round(new.grid.scales_NG), new.grid.scales_NG)
        if scheme.scale_dtype == "float16":  # 8-bit scales lie too far apart for so few steps
            assert not torch.equal(new.grid.scales_NG, old.grid.scales_NG)
        assert not torch.equal(new.codes_NK, old.codes_NK)
        assert torch.equal(new.grid.zeros_NG, old.grid.zeros_NG)
        assert torch.equal(new.grid.widths_G, old.grid.widths_G)


def test_the_same_seed_gives_the_same_and_another_gives_another():
    one, two, other = (TwoLayers(SCHEMES["2 bits"]).tune(seed=seed) for seed in (0, 0, 1))
    for first, second in zip(one.matrices, two.matrices, strict=True):
        assert torch.equal(first.codes_NK, second.codes_NK)
        assert torch.equal(first.grid.scales_NG, second.grid.scales_NG)
    assert (one.loss_before, one.loss_after, one.changed_codes) == (two.loss_before, two.loss_after, two.changed_codes)
    assert not torch.equal(one.matrices[0].codes_NK, other.matrices[0].codes_NK)


def test_what_does_not_help_on_held_back_batches_is_dropped():
    layers = TwoLayers(SCHEMES["2 bits"])
    layers.tune(steps=1)
    held = layers.seen[0]

    def misleading(weights, batch):
        sign = 1.0 if batch == held else -1.0
        return sign * layers(weights, batch)

    work = Work(loss_of=misleading, num_batches=len(layers.inputs))
    tuned = tune_matrices(layers.matrices, work, TuneSettings(steps=20, batches_per_step=3, seed=0))
    assert not tuned.kept
    assert tuned.loss_after > tuned.loss_before
    assert all(new is old for new, old in zip(tuned.matrices, layers.matrices, strict=True))
    assert max(tuned.changed_codes) > 0


def test_one_batch_is_tuned_on_without_a_guard():
    tuned = TwoLayers(SCHEMES["2 bits"], num_batches=1).tune(steps=20)
    assert tuned.kept
    assert max(tuned.changed_codes) > 0


def test_a_matrix_that_no_batch_reaches_stays():
    layers = TwoLayers(SCHEMES["2 bits"])
    layers.run = lambda weights, batch: torch.relu(layers.inputs[batch] @ weights[0].t())
    tuned = layers.tune(steps=5)
    assert tuned.changed_codes[0] > 0
    assert torch.equal(tuned.matrices[1].codes_NK, layers.matrices[1].codes_NK)
    assert torch.equal(tuned.matrices[1].grid.scales_NG, layers.matrices[1].grid.scales_NG)


def test_gradients_are_summed_over_processes():
    """Two processes with the same batches do what one does: Adam does not see the size of a gradient."""
    alone = TwoLayers(SCHEMES["2 bits"]).tune(steps=5)
    layers = TwoLayers(SCHEMES["2 bits"])
    calls = []

    def sum_(*tensors):
        calls.append(len(tensors))
        for tensor in tensors:
            tensor.mul_(2)

    work = Work(loss_of=layers, num_batches=len(layers.inputs), sum_=sum_)
    tuned = tune_matrices(layers.matrices, work, TuneSettings(steps=5, batches_per_step=3, seed=0))
    assert calls == [1, 2, 2, 2, 2, 2, 1]
    assert tuned.loss_before == 2 * alone.loss_before
    for one, two in zip(alone.matrices, tuned.matrices, strict=True):
        assert torch.equal(one.codes_NK, two.codes_NK)


@schemes
def test_latents_begin_as_the_packed_matrix(scheme):
    weight = draw(10, 40)
    matrix = rounded(weight, scheme)
    latent = Latent(matrix)
    assert torch.equal(latent.weight(), dequantized(pack_codes(matrix.codes_NK, matrix.grid), torch.float32))
    assert float((latent.latents.value - matrix.codes_NK).abs().max()) < 0.5
    inside = (matrix.unrounded_NK - matrix.codes_NK).abs() < 0.49
    assert torch.equal(latent.latents.value[inside], matrix.unrounded_NK[inside])
    again = latent.rounded()
    assert torch.equal(again.codes_NK, matrix.codes_NK)
    assert torch.equal(again.grid.scales_NG, matrix.grid.scales_NG)


@schemes
def test_the_gradient_passes_straight_through_both_roundings(scheme):
    matrix = rounded(draw(10, 40), scheme)
    latent = Latent(matrix)
    latent.changes.value.copy_(draw(10, 3, seed=5) * 0.02)
    wanted = draw(10, 40, seed=6)
    latents = latent.latents.value.clone().requires_grad_()
    changes = latent.changes.value.clone().requires_grad_()

    def spread(values_NG):
        return values_NG.repeat_interleave(GROUP, dim=1)[:, :40]

    def through(smooth, rounded_):
        return smooth + (rounded_ - smooth).detach()

    grid = matrix.grid
    codes = through(latents, latent.codes())
    smooth = grid.scales_NG * (1 + changes)
    weight = (codes - spread(grid.zeros_NG)) * spread(through(smooth, latent.scales()))
    (weight - wanted).square().sum().backward()
    of_latents, of_changes = latent.gradients(2 * (latent.weight() - wanted))
    torch.testing.assert_close(of_latents, latents.grad)
    torch.testing.assert_close(of_changes, changes.grad)


def test_wider_codes_and_their_scales_move_less():
    latent = Latent(rounded(draw(10, 40), SCHEMES["2 and 4 bits"]))
    latent.latents.value.zero_().add_(1.0)
    latent.follow(torch.ones(10, 40), step=0, share=0.1)
    moved_K = (latent.latents.value - 1.0).abs().amax(0)
    wide_K = latent.tops_K == 15
    assert torch.allclose(moved_K[~wide_K], torch.tensor(0.1 * CODE_REACH))
    assert torch.allclose(moved_K[wide_K], torch.tensor(0.1 * CODE_REACH / 4))
    wide_G = latent.grid.widths_G == 4
    assert torch.allclose(latent.changes.value[:, wide_G].abs().max(), torch.tensor(0.1 * SCALE_REACH / 4))
    assert torch.allclose(latent.changes.value[:, ~wide_G].abs().max(), torch.tensor(0.1 * SCALE_REACH))


def test_latents_stay_where_one_step_back_changes_a_code():
    latent = Latent(rounded(draw(10, 40), SCHEMES["2 and 4 bits"]))
    for step in range(100):
        latent.follow(torch.full((10, 40), -1.0) * latent.grid.scales_NG.sign()[:, :1], step=step, share=2.0)
    tops_K = torch.tensor(latent.grid.largest_codes).repeat_interleave(GROUP)[:40]
    assert torch.equal(latent.codes(), tops_K.expand(10, 40))
    assert bool((latent.latents.value < tops_K + 0.5).all())
    assert bool((latent.scales() > 0).all())


@pytest.mark.parametrize("with_factor", [True, False])
def test_latents_begin_where_the_layers_own_error_would_have_each_code(with_factor):
    weight, inputs = draw(3, 20), draw(200, 20, seed=1)
    moment_KK = inputs.t() @ inputs / 200
    grid = find_grid(weight, SCHEMES["2 bits"], moment_KK.diagonal())
    factor = factorize(moment_KK, damping=0.01, activation_order=True) if with_factor else None
    codes_NK = round_to_nearest(weight, grid)
    found = begin_tuning(weight, codes_NK, grid, factor)
    damped_KK = torch.eye(20, dtype=torch.float64)
    if factor is not None:
        damped_KK = (moment_KK + torch.diag(factor.ridge_K)).double()
    for row, column in ((0, 0), (1, 7), (2, 19)):
        best = None
        for candidate in torch.linspace(-6, 9, 3001, dtype=torch.float64):
            values = codes_NK[row].double()
            values[column] = candidate
            groups = torch.arange(20) // GROUP
            rest = weight[row].double() - (values - grid.zeros_NG[row][groups]) * grid.scales_NG[row][groups]
            error = float(rest @ damped_KK @ rest)
            if best is None or error < best[0]:
                best = error, float(candidate)
        assert float(found.unrounded_NK[row, column]) == pytest.approx(best[1], abs=5e-3)


def test_after_descent_nearly_every_code_is_its_own_best():
    weight, inputs = draw(8, 40), draw(200, 40, seed=1)
    moment_KK = inputs.t() @ inputs / 200
    factor = factorize(moment_KK, damping=0.01, activation_order=True)
    grid = find_grid(weight, SCHEMES["2 bits"], moment_KK.diagonal())
    codes_NK = gptq(weight, grid, factor, column_block=16)
    codes_NK, grid = descend(weight, codes_NK, grid, factor, sweeps=20, column_block=16)
    found = begin_tuning(weight, codes_NK, grid, factor)
    assert torch.equal(found.unrounded_NK.round().clamp(0, 3).to(torch.uint8), codes_NK)


def test_groups_of_several_widths_share_one_matrix():
    scheme, weight = SCHEMES["2 and 4 bits"], draw(6, 40)
    stored = stored_scales_for(weight, scheme, 2)
    grids = [find_grid(weight, scheme, torch.ones(40), bits=bits, stored=stored) for bits in (2, 4)]
    grid = combine_grids(grids, [0, 1, 0])
    codes_NK = round_to_nearest(weight, grid)
    latent = Latent(begin_tuning(weight, codes_NK, grid, None))
    assert latent.tops_K.tolist() == [3.0] * 16 + [15.0] * 16 + [3.0] * 8
    assert torch.equal(latent.codes(), codes_NK.float())
