"""The measured losses against a direct computation with one matrix replaced."""

import pytest
import torch

from llmmpq.measure import block_loss
from llmmpq.measure.block_loss import MeasureSettings, measure_block
from llmmpq.model.checkpoint import Checkpoint
from llmmpq.model.skeleton import build_skeleton
from llmmpq.model.stream import BlockStream
from llmmpq.quantize.linear import dequantized, quantize_linear
from llmmpq.records import Scheme
from tests import tiny

CPU = torch.device("cpu")
OPTIONS = tuple(Scheme(bits=bits, group_size=32) for bits in (2, 3, 4, 8))
RTN = MeasureSettings(
    use_gptq=False, damping=0.01, activation_order=True, column_block=64, sweeps=0, num_probe_tokens=10_000
)
GPTQ = MeasureSettings(
    use_gptq=True, damping=0.01, activation_order=True, column_block=64, sweeps=0, num_probe_tokens=10_000
)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = tiny.save("llama", tmp_path_factory.mktemp("llama"))
    checkpoint = Checkpoint.open(folder)
    return build_skeleton(folder, checkpoint), checkpoint


@pytest.fixture
def blocks(opened):
    """The blocks one after the other; closed at the end of the test."""
    windows = tiny.token_ids(6, 16)
    blocks = iter(BlockStream(*opened, windows, device=CPU, dtype=torch.float32, batch=2))
    yield blocks
    blocks.close()


def all_options(block):
    return {spec.name: OPTIONS for spec in block.linears}


def measure(block, settings, options=None):
    count = []
    losses, warnings = measure_block(
        block, options or all_options(block), settings, on_candidate=lambda: count.append(1)
    )
    return losses, warnings, len(count)


def direct_loss(block, spec, scheme, num_batches: int = 3) -> float:
    """Rounded to nearest with the true input energies; the mean over tokens of the relative squared error."""
    rows = torch.cat([inputs.reshape(-1, spec.shape[1]) for inputs, _ in block.inputs_of(spec)])
    before = torch.cat(list(block.run())[:num_batches]).double()
    linear = block.linear(spec)
    original = linear.weight.data
    importance = rows.square().mean(0)
    packed = quantize_linear(original, scheme, importance_K=importance, factor=None, column_block=1).packed
    linear.weight.data = dequantized(packed, original.dtype)
    after = torch.cat(list(block.run())[:num_batches]).double()
    linear.weight.data = original
    return float(((after - before).square().sum(-1) / before.square().sum(-1)).mean())


def test_losses_are_the_mean_relative_error_of_the_block_output(blocks):
    block = next(blocks)
    losses, warnings, count = measure(block, RTN)
    assert warnings == []
    assert count == len(block.linears) * len(OPTIONS)
    assert losses.keys() == {spec.name for spec in block.linears}
    for spec in block.linears:
        for position, scheme in enumerate(OPTIONS):
            assert losses[spec.name][position] == pytest.approx(direct_loss(block, spec, scheme), rel=1e-3)


@pytest.mark.parametrize("settings", [RTN, GPTQ], ids=["rtn", "gptq"])
def test_losses_fall_with_the_width_and_come_in_the_order_of_the_options(blocks, settings):
    next(blocks)
    block = next(blocks)
    losses, _, _ = measure(block, settings)
    for values in losses.values():
        assert values[0] > values[1] > values[2] > values[3] > 0
    shuffled = {name: options[::-1] for name, options in all_options(block).items()}
    backwards, _, _ = measure(block, settings, shuffled)
    assert {name: values[::-1] for name, values in backwards.items()} == losses


def test_gptq_losses_are_below_those_of_rounding(blocks):
    block = next(blocks)
    plain, _, _ = measure(block, RTN)
    better, _, _ = measure(block, GPTQ)
    # GPTQ minimises the layer's output error, not the block's: on the whole, not for each.
    for position in range(3):
        assert sum(v[position] for v in better.values()) < 0.9 * sum(v[position] for v in plain.values())


@pytest.mark.parametrize("settings", [RTN, GPTQ], ids=["rtn", "gptq"])
def test_the_block_is_left_as_it_was(blocks, settings):
    block = next(blocks)
    weights = {name: value.clone() for name, value in block.module.state_dict().items()}
    states = [state.clone() for state in block.states]
    measure(block, settings)
    assert all(torch.equal(value, weights[name]) for name, value in block.module.state_dict().items())
    assert all(torch.equal(one, two) for one, two in zip(block.states, states, strict=True))
    assert not any(module._forward_pre_hooks for module in block.module.modules())


@pytest.mark.parametrize(("num_probe_tokens", "num_batches"), [(1, 1), (32, 1), (33, 2), (65, 3)])
def test_probe_tokens_are_rounded_up_to_whole_batches(blocks, num_probe_tokens, num_batches):
    block = next(blocks)
    settings = MeasureSettings(
        use_gptq=False,
        damping=0.01,
        activation_order=True,
        column_block=64,
        sweeps=0,
        num_probe_tokens=num_probe_tokens,
    )
    spec = block.linears[0]
    losses, _, _ = measure(block, settings, {other.name: OPTIONS[:1] for other in block.linears})
    # The energies still come from all tokens.
    expected = direct_loss(block, spec, OPTIONS[0], num_batches)
    assert losses[spec.name][0] == pytest.approx(expected, rel=1e-3)


def test_a_few_tokens_with_massive_activations_do_not_drown_the_rest(blocks):
    block = next(blocks)
    reference = [torch.ones(1, 4, 8)]
    reference[0][0, 0] *= 1e4
    changed = [reference[0] * 1.1]
    block.run = lambda states: iter(changed)
    assert block_loss._relative_error(block, reference) == pytest.approx(0.01, rel=1e-3)


def test_tokens_that_are_bad_without_any_quantization_do_not_count(blocks):
    block = next(blocks)
    reference = [torch.ones(1, 4, 8)]
    changed = [reference[0] * 1.1]
    reference[0][0, 2, 3] = changed[0][0, 2, 3] = float("nan")
    block.run = lambda states: iter(changed)
    assert block_loss._relative_error(block, reference) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", ["one", "all"])
def test_an_option_that_breaks_the_block_is_never_the_best(blocks, bad, tokens):
    """Activations that overflow only when quantized: left out of the mean, they would make the option look perfect."""
    block = next(blocks)
    reference = [torch.ones(1, 4, 8)]
    changed = [reference[0] * 1.01]
    changed[0][0, slice(None) if tokens == "all" else 2, 3] = bad
    block.run = lambda states: iter(changed)
    # A token that is lost counts as wrong at least as a whole.
    assert block_loss._relative_error(block, reference) >= (1.0 if tokens == "all" else 0.25)


def test_a_linear_that_no_token_reaches_is_named(blocks, monkeypatch):
    block = next(blocks)
    lost = block.linears[-1]
    groups = [[spec for spec in group if spec != lost] for group in block.input_groups()]
    monkeypatch.setattr(block, "input_groups", lambda: [group for group in groups if group])
    losses, warnings, _ = measure(block, RTN)
    assert len(losses[lost.name]) == 4  # rounded to nearest, and measured like the others
    (warning,) = warnings
    assert warning.startswith(f"{lost.name}: no calibration token reached it")


def test_bad_tokens_are_left_out_and_named(blocks):
    block = next(blocks)
    block.states[0][1, 5] = float("nan")
    losses, warnings, _ = measure(block, GPTQ)
    assert all(0 < value < 1 for values in losses.values() for value in values)
    assert len(warnings) == 4
    assert "q_proj: 1 tokens with NaN or inf left out" in warnings[0]
    # Attention multiplies what it masks by 0, and 0 * NaN is NaN: the whole window is lost from there on.
    assert "o_proj: 16 tokens with NaN or inf left out" in warnings[1]
