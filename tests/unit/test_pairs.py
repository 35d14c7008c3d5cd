"""Every pair of candidates, against a whole model for each; and what clipping does."""

import json
from contextlib import contextmanager
from itertools import combinations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmmpq import measuring, pipeline, planning
from llmmpq.cli import main
from llmmpq.errors import RecipeError
from llmmpq.job import open_job
from llmmpq.measure.candidates import candidates_of
from llmmpq.measure.pairs import NON_FINITE_KL, LoadedModel, count_pairs, count_passes, to_gram
from llmmpq.progress import Silent
from llmmpq.quantize.linear import dequantized
from llmmpq.quantizing import stream_of
from llmmpq.recipe import Recipe
from llmmpq.session import open_session
from tests import tiny


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


def recipe_of(folder, text, **changes) -> Recipe:
    settings = {
        "model": str(folder),
        "budget.avg_bits": 3.5,
        "calibration.source": str(text),
        "calibration.tokens": 128,
        "calibration.window": 32,
        "measurement.tokens": 64,
        "quantizer.group_size": 32,
        "quantizer.sweeps": 0,
        "allocation.widths": [2, 4],
        "allocation.layer_only": True,
        "allocation.method": "pairs",
        "run.device": "cpu",
    }
    return Recipe.from_dict({}).override(settings | changes)


def measure(recipe, tmp_path):
    session = open_session(recipe)
    with open_job(session, out=tmp_path / "out", work_dir=tmp_path / "work", progress=Silent()) as job:
        return measuring.measure_every_pair(job)


def whole_models(recipe, tmp_path):
    """KL of each candidate alone [C] and of each pair [C, C], in float64, every one in a model of its own."""
    session = open_session(recipe)
    with open_job(session, out=tmp_path / "out", work_dir=tmp_path / "other", progress=Silent()) as job:
        probe, options = job.tokens.probe.ids, session.options()
        made = {}
        for block in stream_of(job, follow_original=False, dtype=torch.float32, many=True):
            for spec, position, packed in candidates_of(block, options, measuring.measure_settings(job), warnings=[]):
                made[spec.name, position] = dequantized(packed, torch.float32)
        keys = [(spec.name, i) for spec in session.skeleton.linears for i in range(len(options[spec.name]))]
    model = AutoModelForCausalLM.from_pretrained(session.folder, dtype=torch.float64)

    @torch.no_grad()
    def kl(*chosen):
        old = {}
        for name, position in chosen:
            linear = model.get_submodule(name)
            old[name], linear.weight.data = linear.weight.data, made[name, position].double()
        found = model(probe).logits.log_softmax(-1)
        for name, weight in old.items():
            model.get_submodule(name).weight.data = weight
        return float((original.exp() * (original - found)).sum(-1).mean())

    with torch.no_grad():
        original = model(probe).logits.log_softmax(-1)
    alone = np.array([kl(key) for key in keys])
    together = np.zeros((len(keys), len(keys)))
    for i, j in combinations(range(len(keys)), 2):
        if keys[i][0] != keys[j][0]:
            together[i, j] = together[j, i] = kl(keys[i], keys[j])
    return alone, together


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_every_pair_equals_a_whole_model_with_both(name, text, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(measuring, "to_gram", lambda *given: kept.append(given) or to_gram(*given))
    recipe = recipe_of(tiny.save(name, tmp_path / name), text)
    sensitivity = measure(recipe, tmp_path)
    alone, together = whole_models(recipe, tmp_path)
    [(kl_C, kl_CC, linear_of_C)] = kept
    assert kl_C == pytest.approx(alone, rel=2e-3, abs=1e-8)
    assert kl_CC == pytest.approx(together, rel=2e-3, abs=1e-8)
    # The pair terms themselves, which are differences.
    different = linear_of_C[:, None] != linear_of_C[None, :]
    terms = (kl_CC - kl_C[:, None] - kl_C[None, :])[different]
    expected = (together - alone[:, None] - alone[None, :])[different]
    assert np.abs(terms - expected).max() < 1e-3 * np.abs(expected).max()
    assert np.concatenate(list(sensitivity.losses.values())) == pytest.approx(kl_C)
    gram = sensitivity.quadratic.gram_OO
    assert np.linalg.eigvalsh(gram).min() > -1e-12
    assert not sensitivity.quadratic.linear_O.any()
    assert sensitivity.quadratic.constant == 0


def test_without_negative_eigenvalues_the_model_is_exact_for_single_options_and_pairs():
    linear_of = np.array([0, 0, 1, 1])
    kl = np.array([0.4, 0.1, 0.3, 0.2])
    together = np.zeros((4, 4))
    for i, j in [(0, 2), (0, 3), (1, 2), (1, 3)]:
        together[i, j] = together[j, i] = kl[i] + kl[j] + 0.01 * (i + j)
    gram, said = to_gram(kl, together, linear_of)
    assert not said
    assert np.diag(gram) == pytest.approx(kl)
    assert gram[0, 1] == gram[2, 3] == 0
    for i, j in [(0, 2), (0, 3), (1, 2), (1, 3)]:
        assert gram[np.ix_([i, j], [i, j])].sum() == pytest.approx(together[i, j])


def test_negative_eigenvalues_are_set_to_zero_and_reported():
    kl, together = np.array([0.1, 0.1]), np.array([[0.0, 0.6], [0.6, 0.0]])
    gram, [said] = to_gram(kl, together, np.array([0, 1]))
    assert np.linalg.eigvalsh(gram) == pytest.approx([0, 0.3])
    assert "1 of 2 eigenvalues, 25 %" in said
    assert "50 % higher" in said


def test_candidates_that_break_the_model_pair_with_nothing():
    kl = np.array([NON_FINITE_KL, 0.1, 0.4])
    together = np.full((3, 3), NON_FINITE_KL)
    gram, said = to_gram(kl, together, np.array([0, 1, 2]))
    assert gram[0, 0] == NON_FINITE_KL
    assert not gram[0, 1:].any()
    assert not said
    assert gram[1, 2] == pytest.approx(0.2)  # broken together only: as if both errors pointed the same way


def test_a_rerun_continues_behind_the_last_finished_linear(folder, text, tmp_path, monkeypatch):
    recipe = recipe_of(folder, text)
    expected = measure(recipe, tmp_path / "whole")
    pairs_of, begun = LoadedModel.pairs_of, []

    def stop_at_third(self, position):
        begun.append(position)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return pairs_of(self, position)

    monkeypatch.setattr(LoadedModel, "pairs_of", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        measure(recipe, tmp_path)
    found = measure(recipe, tmp_path)
    assert begun == [0, 1, 2, *range(2, 21)]
    assert np.array_equal(found.quadratic.gram_OO, expected.quadratic.gram_OO)
    assert measure(recipe, tmp_path).losses == found.losses
    assert len(begun) == 22


class Counting(Silent):
    """Remembers what each task was to take and what it took."""

    def __init__(self):
        self.totals, self.done = {}, {}

    @contextmanager
    def task(self, label, total, unit=""):
        self.totals[label], self.done[label] = total, 0

        def advance(num):
            self.done[label] += num

        yield advance


def test_passes_are_as_many_as_the_formula_says(folder, text, tmp_path):
    sizes = [[2] * 7] * 3
    progress = Counting()
    session = open_session(recipe_of(folder, text))
    with open_job(session, out=tmp_path / "out", work_dir=tmp_path / "work", progress=progress) as job:
        measuring.measure_every_pair(job)
    assert progress.done["measure every pair"] == progress.totals["measure every pair"] == count_passes(sizes)
    assert count_pairs(sizes) == 21 * 20 // 2 * 4
    assert count_passes([[1, 1], [1]]) == 2 + (2 + 2 + 1) + (2 + 1 + 1)  # original; alone; pairs


@pytest.mark.parametrize(
    ("most", "memory", "says"),
    [(839, "1GB", "at most 839 pairs"), (840, "1000000", "measurement.memory is 0.001 GB")],
)
def test_too_large_a_model_is_refused_with_the_work_it_would_take(
    folder, text, tmp_path, monkeypatch, most, memory, says
):
    monkeypatch.setattr(planning, "MAX_NUM_PAIRS", most)
    with pytest.raises(RecipeError, match=says) as caught:
        pipeline.quantize_model(recipe_of(folder, text, **{"measurement.memory": memory}), out=tmp_path / "out")
    assert not (tmp_path / ".llmmpq-work").exists()  # refused before any work
    [problem] = pipeline.check(recipe_of(folder, text, **{"measurement.memory": memory}))["problems"]
    assert says in problem
    assert "21 linears with 42 options make 840 pairs" in str(caught.value)
    assert "forwards of the whole model over 64 tokens" in str(caught.value)
    assert "--layer-only" in str(caught.value)


def test_a_plan_chosen_by_pairs_on_the_command_line_is_written_and_loads(folder, text, tmp_path, capsys):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(recipe_of(folder, text, **{"allocation.method": "iqp"}).to_yaml(), encoding="utf-8")
    code = main(["quantize", str(folder), "--recipe", str(recipe), "--method", "pairs", "--out", str(out)])
    assert code == 0, capsys.readouterr().err
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    assert plan["method"] == "pairs"
    assert plan["bits_per_weight"] <= 3.5
    assert plan["optimality_gap"] <= 0.001
    _, model = pipeline.load_model(str(out))
    assert torch.isfinite(model(tiny.token_ids()).logits).all()
