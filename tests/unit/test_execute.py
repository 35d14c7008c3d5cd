"""Plans carried out: resumed blocks change no bit, each setting does what it says, and fallbacks are named."""

from types import SimpleNamespace

import pytest
import torch

from llmmpq.errors import CalibrationError
from llmmpq.execute import ExecuteSettings, apply_result, fallbacks, quantize_block
from llmmpq.measure.moments import Moment
from llmmpq.measure.output_metric import BlockMetric, mixed_metric
from llmmpq.model.stream import BlockStream
from llmmpq.quantize.gptq import factorize
from llmmpq.quantize.linear import LinearQuantizer, dequantized, quantize_linear
from llmmpq.quantize.shape import share_rows
from llmmpq.quantizing import execute_settings
from llmmpq.recipe import Recipe
from llmmpq.records import PackedTensor, Plan, PlannedLinear, Scheme
from llmmpq.tuning import tune_block
from llmmpq.workdir import WorkDir
from tests import tiny

CPU = torch.device("cpu")
WINDOWS = tiny.token_ids(5, 32)
# For tuning: one batch, of which none is held back. On random text nothing is learned for text held back, and tuning
# that does not help there is not kept.
ONE_BATCH = WINDOWS[:2]


def settings_of(**changes) -> ExecuteSettings:
    defaults = {
        "use_gptq": True,
        "damping": 0.01,
        "activation_order": True,
        "column_block": 64,
        "sweeps": 0,
        "sequential": True,
        "correction": 0.5,
    }
    return ExecuteSettings(**(defaults | changes))


VARIANTS = {
    "corrected": settings_of(),
    "layer corrected": settings_of(correct_stream=False),
    "sequential": settings_of(correction=0.0),
    "not sequential": settings_of(sequential=False),
    "rtn": settings_of(use_gptq=False),
    "tuned": settings_of(tune=20),
    "tuned, not sequential": settings_of(sequential=False, tune=5),
    "tuned rtn": settings_of(use_gptq=False, tune=5),
    "stored order": settings_of(activation_order=False, correction=1.0),
}
variants = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())


def plan_of(skeleton) -> Plan:
    """Every width, and both kinds of scheme, somewhere in each block."""
    schemes = [
        Scheme(bits=bits, group_size=32, symmetric=symmetric) for bits in (3, 4, 2, 8) for symmetric in (False, True)
    ]
    return Plan(
        linears={
            spec.name: PlannedLinear(
                shape=spec.shape, block=spec.block, role=spec.role, scheme=schemes[position % len(schemes)]
            )
            for position, spec in enumerate(skeleton.linears)
        },
        method="test",
        budget={},
    )


def stream_of(opened, settings, *, dtype=torch.float32) -> BlockStream:
    windows = ONE_BATCH if settings.tune else WINDOWS
    return BlockStream(*opened, windows, device=CPU, dtype=dtype, batch=2, follow_original=settings.follow_original)


def run(opened, settings, *, dtype=torch.float32, known=None):
    """States entering each block, the last block's output, and the results; `known` are blocks done before."""
    plan, states, results = plan_of(opened[0]), [], []
    for block in stream_of(opened, settings, dtype=dtype):
        states.append(torch.cat(block.states))
        if known is not None and block.index in known:
            results.append(known[block.index])
            if settings.sequential:
                apply_result(block, known[block.index])
        else:
            results.append(quantize_block(block, plan, settings, on_linear=lambda _spec: None))
        last = torch.cat(list(block.run()))
    return [*states, last], results


def roundings(block):
    quantized = {
        spec.name: LinearQuantizer(
            block.original_weights[spec.name],
            importance_K=torch.ones(spec.shape[1]),
            factor=None,
            column_block=1,
            sweeps=0,
        ).quantize(Scheme(bits=2, group_size=32), to_be_tuned=True)
        for spec in block.linears
    }
    return {name: found.rounded for name, found in quantized.items()}


def assert_same_result(one, two) -> None:
    assert one.notes == two.notes
    assert list(one.packed) == list(two.packed)
    for name, packed in one.packed.items():
        for key, tensor in packed.tensors().items():
            assert torch.equal(tensor, two.packed[name].tensors()[key]), (name, key)


@pytest.fixture(scope="module")
def in_one_go(opened):
    """Runs of the llama without interruption, each made once."""
    known = {}

    def run_once(settings, dtype=torch.float32):
        if (settings, dtype) not in known:
            known[settings, dtype] = run(opened(), settings, dtype=dtype)
        return known[settings, dtype]

    return run_once


RESUMED = [
    ("corrected", {0}, torch.float32),
    ("corrected", {0, 1, 2}, torch.float32),
    ("corrected", {1}, torch.float32),
    ("corrected", {0, 1}, torch.bfloat16),
    ("tuned", {0, 1}, torch.bfloat16),
    *((name, {0, 1}, torch.float32) for name in VARIANTS),
]


@pytest.mark.parametrize(("name", "done", "dtype"), RESUMED)
def test_a_resumed_run_is_bit_for_bit_the_run_in_one_go(opened, in_one_go, name, done, dtype):
    settings = VARIANTS[name]
    whole_states, whole = in_one_go(settings, dtype)
    known = {index: whole[index] for index in done}
    states, results = run(opened(), settings, dtype=dtype, known=known)
    for one, two in zip(states, whole_states, strict=True):
        assert torch.equal(one, two)
    for one, two in zip(results, whole, strict=True):
        assert_same_result(one, two)


def test_a_resumed_run_through_the_work_folder(opened, in_one_go, tmp_path):
    settings = VARIANTS["corrected"]
    whole_states, whole = in_one_go(settings)
    with WorkDir(tmp_path / "work") as work:
        stage = work.stage("quantize", {})
        for index, result in enumerate(whole[:2]):
            flat = {f"{n}.{k}": t for n, packed in result.packed.items() for k, t in packed.tensors().items()}
            stage.save_block(index, result.notes, flat)
        known = {}
        for index in range(2):
            notes, tensors = stage.load_block(index)
            packed = {
                name: PackedTensor(
                    words=tensors[f"{name}.words"],
                    scales=tensors[f"{name}.scales"],
                    zeros=tensors.get(f"{name}.zeros"),
                    scheme=done.scheme,
                    shape=done.shape,
                )
                for name, done in whole[index].packed.items()
            }
            known[index] = type(whole[index])(packed=packed, notes=notes)
    states, results = run(opened(), settings, known=known)
    assert all(torch.equal(one, two) for one, two in zip(states, whole_states, strict=True))
    for one, two in zip(results, whole, strict=True):
        assert_same_result(one, two)


@variants
def test_every_linear_gets_what_the_plan_says(opened, settings):
    skeleton, _ = opened()
    plan, seen = plan_of(skeleton), []
    for block in stream_of(opened(), settings):
        result = quantize_block(block, plan, settings, on_linear=lambda spec: seen.append(spec.name))
        assert list(result.packed) == list(result.notes) == [spec.name for spec in block.linears]
        for spec in block.linears:
            packed = result.packed[spec.name]
            assert (packed.scheme, packed.shape) == (plan.linears[spec.name].scheme, spec.shape)
            assert result.notes[spec.name]["algorithm"] == ("gptq" if settings.use_gptq else "rtn")
            assert "fallback" not in result.notes[spec.name]
    assert sorted(seen) == sorted(plan.linears)
    assert fallbacks([]) == []


@pytest.mark.parametrize("name", ["llama", "opt", "gpt_neox"])
def test_sequential_leaves_the_quantized_weights_in_the_block(opened, name):
    settings = settings_of()
    for block in stream_of(opened(name), settings):
        result = quantize_block(block, plan_of(opened(name)[0]), settings, on_linear=lambda _spec: None)
        for spec in block.linears:
            assert torch.equal(block.linear(spec).weight.data, dequantized(result.packed[spec.name], torch.float32))


def test_not_sequential_every_layer_sees_the_original_model(opened, in_one_go):
    settings = VARIANTS["not sequential"]
    states, results = in_one_go(settings)
    plain = []
    for block in stream_of(opened(), settings_of(correction=0.0)):
        plain.append(torch.cat(block.states))
        before = {spec.name: block.linear(spec).weight.data.clone() for spec in block.linears}
        quantize_block(block, plan_of(opened()[0]), settings, on_linear=lambda _spec: None)
        assert all(torch.equal(block.linear(spec).weight.data, before[spec.name]) for spec in block.linears)
    assert all(torch.equal(one, two) for one, two in zip(states[:-1], plain, strict=True))
    # With the original's inputs, a block does not depend on what was done to those before it.
    for block in stream_of(opened(), settings_of(correction=0.0)):
        if block.index == 2:
            alone = quantize_block(block, plan_of(opened()[0]), settings, on_linear=lambda _spec: None)
    assert_same_result(alone, results[2])


def test_each_layer_is_gptq_on_its_own_weight_and_moment(opened, in_one_go):
    _, results = in_one_go(VARIANTS["not sequential"])
    plan = plan_of(opened()[0])
    for block in stream_of(opened(), settings_of(correction=0.0)):
        for spec in block.linears:
            moment = Moment(spec.shape[1], device=CPU)
            for inputs, _ in block.inputs_of(spec):
                moment.add(inputs)
            mean, _ = moment.means(spec.name)
            expected = quantize_linear(
                block.linear(spec).weight.data,
                plan.linears[spec.name].scheme,
                importance_K=mean.diagonal(),
                factor=factorize(mean, damping=0.01, activation_order=True),
                column_block=64,
            ).packed
            for key, tensor in expected.tensors().items():
                assert torch.equal(results[block.index].packed[spec.name].tensors()[key], tensor)
            energy = float(mean.diagonal().double().sum())
            assert results[block.index].notes[spec.name]["input_energy"] == pytest.approx(energy, rel=1e-6)


def test_sequential_layers_see_the_quantized_ones_before_them(opened):
    """The second moment of down_proj is that of the input it has once all others of the block are quantized."""
    settings = settings_of(correction=0.0)
    blocks = iter(stream_of(opened(), settings))
    block = next(blocks)
    down = next(spec for spec in block.linears if spec.role == "down_proj")

    def energy() -> float:
        return sum(float(inputs.double().square().sum()) for inputs, _ in block.inputs_of(down)) / WINDOWS.numel()

    original = energy()
    result = quantize_block(block, plan_of(opened()[0]), settings, on_linear=lambda _spec: None)
    assert result.notes[down.name]["input_energy"] == pytest.approx(energy(), rel=1e-4)
    assert energy() != pytest.approx(original, rel=1e-3)
    blocks.close()


def test_rtn_rounds_the_original_weight(opened, in_one_go):
    _, results = in_one_go(VARIANTS["rtn"])
    plan, original = plan_of(opened()[0]), tiny.build("llama").state_dict()
    for result in results:
        for name, packed in result.packed.items():
            weight = original[f"{name}.weight"]
            scheme = plan.linears[name].scheme
            ones = torch.ones(weight.shape[1])
            plain = quantize_linear(weight, scheme, importance_K=ones, factor=None, column_block=1)
            # Other energies move the grid a little, but no weight farther than a step or two.
            step = packed.scales.float().abs().amax()
            change = (dequantized(packed, torch.float32) - dequantized(plain.packed, torch.float32)).abs().max()
            assert change <= 2 * step


def test_each_refinement_pays(opened, in_one_go):
    """Relative squared error of the last states against the unchanged model's, on the calibration text."""
    plain = settings_of(correction=0.0)
    expected = [torch.cat(list(block.run())) for block in stream_of(opened(), plain)][-1]
    errors = {}
    for name in ("rtn", "not sequential", "sequential", "layer corrected", "corrected"):
        _, results = in_one_go(VARIANTS[name])
        for block in stream_of(opened(), plain):
            apply_result(block, results[block.index])
            found = torch.cat(list(block.run()))
        errors[name] = float((found - expected).square().sum() / expected.square().sum())
    assert errors["not sequential"] < errors["rtn"]
    assert errors["sequential"] < errors["rtn"]
    assert errors["layer corrected"] < errors["sequential"]
    assert errors["corrected"] < errors["layer corrected"]


def test_what_a_layer_corrects_is_noted(in_one_go):
    for name, expected in (
        ("corrected", {"o_proj": "input of post_attention_layernorm", "down_proj": "output of the block"}),
        ("layer corrected", {}),
        ("sequential", {}),
    ):
        _, results = in_one_go(VARIANTS[name])
        for result in results:
            found = {
                spec.rpartition(".")[2]: note["corrects"] for spec, note in result.notes.items() if "corrects" in note
            }
            assert found == expected


def test_tokens_that_only_one_model_sends_to_a_layer_are_not_corrected_for_and_it_is_said(opened):
    settings = settings_of()
    blocks = iter(stream_of(opened(), settings))
    block = next(blocks)
    first = block.linears[0]
    pairs = list(block.inputs_of(first))
    block.inputs_of = lambda _spec: iter([(pairs[0][0], pairs[0][1][:, :5]), *pairs[1:]])
    block.input_groups = lambda: [[first]]
    notes = quantize_block(block, plan_of(opened()[0]), settings, on_linear=lambda _spec: None).notes
    assert notes[first.name]["uncorrected_tokens"] == pairs[0][0].shape[:2].numel()
    assert any("64 tokens not corrected for" in sentence for sentence in fallbacks(list(notes.items())))
    blocks.close()


@pytest.mark.parametrize(("choice", "expected"), [("stream", True), ("layer", False)])
def test_the_recipe_says_what_is_corrected(choice, expected):
    session = SimpleNamespace(recipe=Recipe().override({"quantizer.correction_of": choice}))
    assert execute_settings(session).correct_stream is expected
    assert execute_settings(session).corrects_stream is expected


def test_the_same_run_twice_is_the_same(opened):
    one, two = (run(opened("qwen2"), VARIANTS["corrected"]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one[0], two[0], strict=True))
    for a, b in zip(one[1], two[1], strict=True):
        assert_same_result(a, b)


def test_tuning_brings_a_block_closer_to_the_original_and_says_what_it_did(opened):
    """On the states that enter the block, against what the original block makes of the original states."""
    settings, plan = settings_of(use_gptq=False, tune=60), plan_of(opened()[0])
    blocks = iter(stream_of(opened(), settings))
    block = next(blocks)
    with block.with_original_weights():
        targets = list(block.run(block.original_states))

    def error() -> float:
        return sum(float((a - b).square().sum()) for a, b in zip(block.run(), targets, strict=True))

    plain = quantize_block(block, plan, settings_of(use_gptq=False), on_linear=lambda _spec: None)
    before = error()
    for spec in block.linears:
        block.linear(spec).weight.data = block.original_weights[spec.name]
    result = quantize_block(block, plan, settings, on_linear=lambda _spec: None)
    assert error() < 0.7 * before
    for spec in block.linears:
        note = result.notes[spec.name]["tuned"]
        assert note["kept"]
        same = torch.equal(result.packed[spec.name].words, plain.packed[spec.name].words)
        assert same == (note["changed_codes"] == 0)
        found = dequantized(result.packed[spec.name], torch.float32)
        assert torch.equal(block.linear(spec).weight.data, found)
    assert max(note["tuned"]["changed_codes"] for note in result.notes.values()) > 0
    assert fallbacks(list(result.notes.items())) == []
    blocks.close()


def test_tuning_lowers_the_error_that_the_metric_sees(opened):
    """Eight directions that the first block's output has, and nothing else, beside a little of all."""
    rows = torch.randn(8, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
    given = BlockMetric(output_DD=rows.t() @ rows, linears={})
    metric = mixed_metric(given.output_DD)
    errors = []
    for used in (None, given):
        blocks = iter(stream_of(opened(), settings_of(tune=1)))
        block = next(blocks)
        quantize_block(
            block,
            plan_of(opened()[0]),
            settings_of(use_gptq=False, tune=60),
            on_linear=lambda _spec: None,
            metric=used,
        )
        with block.with_original_weights():
            targets = list(block.run(block.original_states))
        error = torch.cat([(a - b).flatten(0, 1) for a, b in zip(block.run(), targets, strict=True)])
        errors.append([float(((error @ weigh) * error).sum()) for weigh in (torch.eye(tiny.HIDDEN), metric)])
        blocks.close()
    plain, weighed = errors
    assert weighed[1] < 0.8 * plain[1]
    assert weighed[0] > plain[0]


def test_tuning_that_does_not_help_is_not_kept_and_is_noted(opened):
    blocks = iter(BlockStream(*opened(), WINDOWS, device=CPU, dtype=torch.float32, batch=1, follow_original=True))
    block = next(blocks)
    plan = plan_of(opened()[0])
    result = quantize_block(block, plan, settings_of(tune=5), on_linear=lambda _spec: None)
    note = result.notes[block.linears[0].name]["tuned"]
    assert not note["kept"]
    assert note["held_back_loss"][1] > note["held_back_loss"][0]
    for spec in block.linears:
        block.linear(spec).weight.data = block.original_weights[spec.name]
    plain = quantize_block(block, plan, settings_of(), on_linear=lambda _spec: None)
    for name, packed in plain.packed.items():
        for key, tensor in packed.tensors().items():
            assert torch.equal(result.packed[name].tensors()[key], tensor)
    blocks.close()


def test_batches_with_bad_tokens_are_not_tuned_on(opened):
    found = []
    for bad in (None, float("nan"), float("inf")):
        blocks = iter(BlockStream(*opened(), WINDOWS, device=CPU, dtype=torch.float32, batch=2, follow_original=True))
        block = next(blocks)
        if bad is None:
            del block.states[1], block.original_states[1]
        else:
            block.states[1][1, 30] = bad
        found.append(tune_block(block, roundings(block), steps=3))
        blocks.close()
    for other in found[1:]:
        assert other.loss_before == found[0].loss_before
        for one, two in zip(found[0].matrices, other.matrices, strict=True):
            assert torch.equal(one.codes_NK, two.codes_NK)


def test_without_a_good_batch_nothing_is_tuned_and_it_is_said(opened, monkeypatch):
    blocks = iter(stream_of(opened(), settings_of(tune=3)))
    block = next(blocks)
    for state in block.states:
        state[0, 0] = torch.inf
    assert tune_block(block, roundings(block), steps=3) is None
    blocks.close()
    monkeypatch.setattr("llmmpq.execute.tune_block", lambda *_args, **_options: None)
    _, results = run(opened(), settings_of(tune=3))
    notes = results[0].notes
    assert all(note["untuned"] for note in notes.values())
    assert len(fallbacks(list(notes.items()))) == 7


# Fallbacks


@pytest.mark.parametrize("sequential", [True, False])
def test_a_linear_that_never_runs_is_rounded_with_a_note(opened, monkeypatch, sequential):
    settings = settings_of(sequential=sequential, correction=0.0)
    blocks = iter(stream_of(opened(), settings))
    block = next(blocks)
    lost = next(spec for spec in block.linears if spec.role == "up_proj")
    groups = [[spec for spec in group if spec != lost] for group in block.input_groups()]
    monkeypatch.setattr(block, "input_groups", lambda: groups)
    original = block.linear(lost).weight.data.clone()
    seen = []
    plan = plan_of(opened()[0])
    result = quantize_block(block, plan, settings, on_linear=lambda spec: seen.append(spec.name))
    assert result.notes[lost.name] == {
        "algorithm": "rtn",
        "fallback": "no calibration token reached this layer",
    }
    assert sorted(seen) == sorted(spec.name for spec in block.linears)
    assert list(result.packed) == [spec.name for spec in block.linears]
    ones = torch.ones(lost.shape[1])
    scheme = plan.linears[lost.name].scheme
    expected = quantize_linear(original, scheme, importance_K=ones, factor=None, column_block=1).packed
    assert torch.equal(result.packed[lost.name].words, expected.words)
    weight = block.linear(lost).weight.data
    assert torch.equal(weight, dequantized(expected, torch.float32) if sequential else original)
    assert fallbacks(list(result.notes.items())) == [f"{lost.name}: no calibration token reached this layer"]
    blocks.close()


def test_a_moment_that_cannot_be_factored_is_a_fallback_with_a_note(opened, in_one_go, monkeypatch):
    _, plain = in_one_go(VARIANTS["rtn"])
    monkeypatch.setattr("llmmpq.execute.factorize", lambda *_args, **_options: None)
    _, results = run(opened(), settings_of())
    for found, expected in zip(results, plain, strict=True):
        for name, note in found.notes.items():
            assert note["algorithm"] == "rtn"
            assert "could not be factored" in note["fallback"]
            assert torch.equal(found.packed[name].words, expected.packed[name].words)
        assert len(fallbacks(list(found.notes.items()))) == 7


def test_dead_channels_and_the_damping_are_noted(opened):
    settings = settings_of(correction=0.0)
    blocks = iter(stream_of(opened(), settings))
    block = next(blocks)
    up = next(spec for spec in block.linears if spec.role == "up_proj")
    block.linear(up).weight.data[5] = 0  # silences channel 5 of down_proj
    # 8 bits, at which a row of zeros stays one of zeros.
    linears = {
        name: PlannedLinear(
            shape=linear.shape, block=linear.block, role=linear.role, scheme=Scheme(bits=8, group_size=32)
        )
        for name, linear in plan_of(opened()[0]).linears.items()
    }
    plan = Plan(linears=linears, method="test", budget={})
    result = quantize_block(block, plan, settings, on_linear=lambda _spec: None)
    notes = {name.rpartition(".")[2]: note for name, note in result.notes.items()}
    assert notes["down_proj"]["dead_channels"] == 1
    assert "dead_channels" not in notes["up_proj"]
    assert notes["up_proj"]["damping"] == pytest.approx(0.01)
    blocks.close()


def test_bad_tokens_are_left_out_and_counted_in_the_notes(opened):
    settings = settings_of(correction=0.0)
    blocks = iter(stream_of(opened(), settings))
    block = next(blocks)
    block.states[1][1, 30] = float("inf")
    result = quantize_block(block, plan_of(opened()[0]), settings, on_linear=lambda _spec: None)
    counts = {name.rpartition(".")[2]: note.get("excluded_tokens") for name, note in result.notes.items()}
    assert counts["q_proj"] == 1
    # Attention multiplies what it masks by 0, and 0 * inf is NaN: the rest of that window is lost from there on.
    assert counts["o_proj"] == counts["down_proj"] == 32
    assert f"{block.linears[0].name}: 1 tokens with NaN or inf left out" in fallbacks(list(result.notes.items()))
    assert all(torch.isfinite(packed.scales).all() for packed in result.packed.values())
    blocks.close()


def test_only_bad_tokens_is_an_error(opened):
    settings = settings_of(correction=0.0)
    blocks = iter(stream_of(opened(), settings))
    block = next(blocks)
    for state in block.states:
        state.fill_(float("nan"))
    with pytest.raises(
        CalibrationError, match=r"model\.layers\.0\.self_attn\.q_proj is NaN or infinite \(160 tokens\)"
    ):
        quantize_block(block, plan_of(opened()[0]), settings, on_linear=lambda _spec: None)
    blocks.close()


def test_a_moment_that_overflows_still_gives_a_sane_matrix(opened):
    """Finite activations whose squares are not: the moment fails to factor, and rounding must not use it either."""
    settings = settings_of(correction=0.0)
    blocks = iter(stream_of(opened("opt"), settings))
    block = next(blocks)
    first = block.linears[0]
    original = block.linear(first).weight.data.clone()
    inputs = [(torch.full((1, 4, first.shape[1]), 1e25), None)]
    block.inputs_of = lambda _spec: iter(inputs)
    block.input_groups = lambda: [[first]]
    result = quantize_block(block, plan_of(opened("opt")[0]), settings, on_linear=lambda _spec: None)
    assert "fallback" in result.notes[first.name]
    error = (dequantized(result.packed[first.name], torch.float32) - original).square().sum()
    assert error < 0.2 * original.square().sum()
    blocks.close()


def metric_with(specs, *, but=()):
    """Few directions of each output matter, one of them most."""
    linears = {}
    for seed, spec in enumerate(specs):
        if spec.name in but:
            continue
        gradients = torch.randn(60, spec.shape[0], generator=torch.Generator().manual_seed(seed))
        gradients[:, 1:] += 3 * gradients[:, :1]
        linears[spec.name] = [gradients.t() @ gradients]
    return BlockMetric(output_DD=torch.eye(tiny.HIDDEN), linears=linears)


def first_block(opened, settings, metric_of):
    blocks = iter(stream_of(opened, settings))
    block = next(blocks)
    metric = metric_of(block.linears)
    result = quantize_block(block, plan_of(opened[0]), settings, on_linear=lambda _spec: None, metric=metric)
    originals = dict(block.original_weights)
    blocks.close()
    return result, originals, metric


def test_errors_go_where_the_metric_sees_them_least(opened):
    """Not sequential, so that each matrix is the same with and without; its inputs' moment is left out."""
    costs = []
    for shape in (False, True):
        result, originals, metric = first_block(
            opened(), settings_of(sequential=False, shape_errors=shape), metric_with
        )
        assert not any("unshaped" in note for note in result.notes.values())
        costs.append({})
        for name, packed in result.packed.items():
            error = originals[name].float() - dequantized(packed, torch.float32)
            weighed = mixed_metric(metric.linears[name][0])
            costs[-1][name] = (float(((weighed @ error) * error).sum()), float(error.square().sum()))
    for name, (weighed, plain) in costs[0].items():
        assert costs[1][name][0] < 0.8 * weighed, name
        assert costs[1][name][1] > plain, name


@pytest.mark.parametrize("shape", [True, False])
def test_a_linear_without_a_metric_is_rounded_row_by_row_and_noted(opened, shape):
    skeleton, _ = opened()
    left_out = skeleton.linears[1].name
    found, _, _ = first_block(
        opened(),
        settings_of(sequential=False, shape_errors=shape),
        lambda specs: metric_with(specs, but=(left_out,)),
    )
    plain, _, _ = first_block(opened(), settings_of(sequential=False), lambda specs: None)
    same = {name for name, packed in found.packed.items() if torch.equal(packed.words, plain.packed[name].words)}
    assert same == ({left_out} if shape else set(plain.packed))
    sentences = fallbacks(list(found.notes.items()))
    assert sentences == (
        [f"{left_out}: rows share no errors: no gradient of the calibration text reached it, or none that is a number"]
        if shape
        else []
    )


def test_a_metric_that_has_no_factor_is_noted(opened):
    def broken(specs):
        metric = metric_with(specs)
        metric.linears[specs[0].name][0].fill_(float("nan"))
        return metric

    found, _, _ = first_block(opened(), settings_of(shape_errors=True), broken)
    assert [name for name, note in found.notes.items() if "unshaped" in note] == [opened()[0].linears[0].name]
    assert "could not be factored" in fallbacks(list(found.notes.items()))[0]


def test_what_tuning_begins_with_is_of_the_rows_as_they_were_wanted(opened):
    """Each row was to take over errors: by that, not by the original, a code is undecided or not."""
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(300, 32, generator=torch.Generator().manual_seed(1))
    moment = inputs.t() @ inputs / 300
    gradients = torch.randn(60, 48, generator=torch.Generator().manual_seed(2))
    gradients[:, 1:] += 3 * gradients[:, :1]
    quantizer = LinearQuantizer(
        weight,
        importance_K=moment.diagonal(),
        factor=factorize(moment, damping=0.01, activation_order=True),
        column_block=32,
        sweeps=3,
        pieces=share_rows([mixed_metric(gradients.t() @ gradients)]),
    )
    rounded = quantizer.quantize(Scheme(bits=3, group_size=32), to_be_tuned=True).rounded
    away = (rounded.unrounded_NK - rounded.codes_NK).abs()
    inside = (rounded.codes_NK > 0) & (rounded.codes_NK < 7)
    assert float(away[inside].quantile(0.99)) < 0.55  # after descent each code is the nearest


def test_tuning_by_an_output_without_gradients_is_refused(opened):
    def none(specs):
        return BlockMetric(output_DD=None, linears={})

    with pytest.raises(CalibrationError, match=r"no gradient by the output of model\.layers\.0 is a number"):
        first_block(opened(), settings_of(tune=1), none)
