"""`--calib self`: what the model writes, that it is the same again, and that a run goes on from what was written."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmmpq import pipeline, reading, selfmade
from llmmpq.errors import CalibrationError
from llmmpq.model.sampling import sample_windows
from llmmpq.progress import Silent
from llmmpq.recipe import Recipe
from llmmpq.selfmade import check_self_calibration, write_windows
from llmmpq.session import open_session
from llmmpq.workdir import WorkDir

WINDOW = 24
CHANGES = {
    "calibration.source": "self",
    "calibration.tokens": 40 * WINDOW,
    "calibration.window": WINDOW,
    "measurement.tokens": 2 * WINDOW,
    "run.threads": 1,
}


@pytest.fixture(scope="module")
def folder(folders):
    return folders("llama")


def session_of(folder, **changes):
    return open_session(Recipe().override({"model": str(folder), "budget.avg_bits": 5.0, **CHANGES, **changes}))


def sampled(model, **changes):
    asked = {"num_windows": 4, "window": WINDOW, "seed": 0, "batch_index": 0, "on_tokens": lambda num: None}
    return sample_windows(model, **(asked | changes))


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_equal_seeds_give_equal_windows_and_others_do_not(model):
    first = sampled(model)
    assert first.shape == (4, WINDOW)
    assert torch.equal(first, sampled(model))
    for other in (sampled(model, seed=1), sampled(model, batch_index=1)):
        assert (first != other).float().mean() > 0.5


def test_tokens_are_drawn_from_what_the_model_says(model):
    """A model that is certain writes what it is certain of: its second token follows from the first alone."""
    sharp = AutoModelForCausalLM.from_pretrained(model.name_or_path, dtype=torch.float32).eval()
    head = sharp.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight * 1e4, requires_grad=False)
    ids = sampled(sharp)
    with torch.no_grad():
        likeliest = sharp(ids).logits.argmax(-1)
    assert (ids[:, 1:] == likeliest[:, :-1]).float().mean() > 0.95


def test_the_cache_changes_nothing(model):
    """Each token has a fair probability under the model without a cache: a wrong position would show."""
    ids = sampled(model, num_windows=16)
    with torch.no_grad():
        logp = torch.log_softmax(model(ids).logits[:, :-1].double(), -1)
    entropy = -(logp.exp() * logp).sum(-1).mean()
    surprise = -logp.gather(2, ids[:, 1:, None]).mean()
    assert float(surprise) == pytest.approx(float(entropy), rel=0.05)


def test_a_run_goes_on_from_the_batches_that_were_written(folder, tmp_path, monkeypatch):
    session, progress = session_of(folder), Silent()
    with WorkDir(tmp_path) as work:
        whole = write_windows(session, work, {"file": "digest"}, progress)
        assert whole.ids.shape == (42, WINDOW)
        files = sorted(tmp_path.glob("sample-*/windows-*.safetensors"))
        assert len(files) == 2
        files[1].unlink()
        made = []
        original = selfmade.sample_windows
        monkeypatch.setattr(
            selfmade, "sample_windows", lambda *a, **k: (made.append(k["batch_index"]), original(*a, **k))[1]
        )
        assert torch.equal(write_windows(session, work, {"file": "digest"}, progress).ids, whole.ids)
        assert made == [1]
        write_windows(session, work, {"file": "digest"}, progress)
        assert made == [1]
        other = write_windows(session_of(folder, **{"calibration.seed": 1}), work, {"file": "digest"}, progress)
    assert other.digest != whole.digest


def test_a_window_is_no_longer_than_the_model_reads(folder, tmp_path):
    session = session_of(folder)
    longest = session.max_window()
    recipe = session.recipe.override({"calibration.window": longest + 1, "calibration.tokens": 2 * longest})
    with WorkDir(tmp_path) as work:
        written = write_windows(dataclasses.replace(session, recipe=recipe), work, {}, Silent())
    assert written.ids.shape[1] == longest
    assert "lowered" in written.notes[0]


def test_a_model_that_does_not_fit_is_refused_with_what_to_do(folder, monkeypatch):
    monkeypatch.setattr(reading, "free_nbytes", lambda device: 1000)
    with pytest.raises(CalibrationError, match="--calib builtin"):
        check_self_calibration(session_of(folder))
    check_self_calibration(session_of(folder, **{"calibration.source": "builtin"}))


def test_the_whole_run(folder, tmp_path):
    recipe = Recipe().override({"model": str(folder), "budget.bits": 4, **CHANGES})
    first = pipeline.quantize_model(recipe, out=tmp_path / "a")
    again = pipeline.quantize_model(recipe, out=tmp_path / "b", work_dir=tmp_path / "other")
    report = json.loads((tmp_path / "a" / "plan.json").read_text())
    assert report["provenance"]["calibration"]["source"] == "self"
    digests = [json.loads((tmp_path / name / "digests.json").read_text()) for name in ("a", "b")]
    assert digests[0] == digests[1]
    assert first["plan"]["nbytes"] == again["plan"]["nbytes"]
