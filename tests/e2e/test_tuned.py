"""Tuned runs: repeatable, resumable, measured untuned; another number of steps is another model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmmpq.pipeline import quantize_model
from llmmpq.recipe import Recipe
from llmmpq.workdir import Stage
from tests import tiny
from tests.e2e.running import digests, interrupted_after, run_here, tiny_recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


def recipe_of(model: Path, calibration_file: Path, **changes: Any) -> Recipe:
    """One window: nothing is held back, and whatever is tuned is kept."""
    settings = {"calibration__tokens": 64, "quantizer__tune": 3, "budget__bits": 3} | changes
    return tiny_recipe(model, calibration_file, **settings)


@pytest.fixture(scope="module")
def reference(model: Path, calibration_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "out"
    quantize_model(recipe_of(model, calibration_file), out=out)
    return out


def test_the_report_says_what_tuning_did(reference: Path) -> None:
    layers = json.loads((reference / "report.json").read_text())["linears"]
    notes = [entry["tuned"] for entry in layers.values()]
    assert all(note["kept"] for note in notes)
    assert any(note["changed_codes"] > 0 for note in notes)


@pytest.mark.parametrize(
    ("stage", "after"),
    [("metric", "block-0001"), ("metric", "block-0000"), ("quantize", "block-0000"), ("quantize", "block-0002")],
)
def test_an_interrupted_run_ends_in_the_same_bytes(
    stage: str,
    after: str,
    model: Path,
    calibration_file: Path,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = recipe_of(model, calibration_file)
    with interrupted_after(monkeypatch, stage, after):
        quantize_model(recipe, out=tmp_path / "out")
    quantize_model(recipe, out=tmp_path / "out")
    assert digests(tmp_path / "out") == digests(reference)


def test_the_metric_is_measured_once_and_again_where_it_is_damaged(
    model: Path, calibration_file: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write: Callable[..., Any] = Stage.write

    def recording(self: Stage, name: str, *args: Any, **options: Any) -> Any:
        if self.folder.name.startswith("metric"):
            written.append(name)
        return write(self, name, *args, **options)

    monkeypatch.setattr(Stage, "write", recording)
    work = tmp_path / "work"
    for bits in (4, 3):
        recipe = recipe_of(model, calibration_file, budget__bits=bits)
        quantize_model(recipe, out=tmp_path / f"{bits}", work_dir=work)
    assert written == ["block-0002", "block-0001", "block-0000"]
    assert digests(tmp_path / "3") == digests(reference)
    (damaged,) = work.glob("*/metric-*/block-0001.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    quantize_model(recipe, out=tmp_path / "again", work_dir=work)
    assert len(written) == 6
    assert digests(tmp_path / "again") == digests(reference)
    assert not list(work.glob("*/metric-*/outputs*"))


def test_the_plain_metric_needs_no_measurement_and_gives_another_model(
    model: Path, calibration_file: Path, reference: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(model, calibration_file, quantizer__tune_metric="plain", quantizer__shape_errors=False)
    quantize_model(recipe, out=tmp_path / "out", work_dir=tmp_path / "work")
    assert not list((tmp_path / "work").glob("*/metric-*"))
    assert digests(tmp_path / "out")["model.safetensors"] != digests(reference)["model.safetensors"]


def test_around_a_plan_is_measured_untuned(
    model: Path, calibration_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So what was measured serves any number of steps, and only the choice between plans sees tuned ones."""
    stages, results = [], []
    write: Callable[..., Any] = Stage.write

    def recording(self: Stage, name: str, *args: Any, **options: Any) -> Any:
        stages.append((self.folder.name, name))
        return write(self, name, *args, **options)

    monkeypatch.setattr(Stage, "write", recording)
    for steps in (2, 3):
        changes = {"budget__avg_bits": 4.0, "allocation__widths": [2, 4], "allocation__layer_only": True}
        recipe = recipe_of(model, calibration_file, budget__bits=None, quantizer__tune=steps, **changes)
        quantize_model(recipe, out=tmp_path / f"{steps}", work_dir=tmp_path / "work")
        results.append(digests(tmp_path / f"{steps}")["model.safetensors"])
    assert sum(name == "sensitivity" for _, name in stages) == 2  # measured, and around the plan: once each
    assert len(set(results)) == 2


def test_the_flag(model: Path, calibration_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["quantize", model, "--calib", calibration_file, "--tokens", 64, "--window", 64, "--bits", 4]
    outcome = run_here([*arguments, "--tune", -1, "--out", tmp_path / "bad"], capsys)
    assert outcome.code == 2
    assert "quantizer.tune" in outcome.stderr
    assert "of at least 0" in outcome.stderr
    outcome = run_here([*arguments, "--tune", 2, "--out", tmp_path / "good", "--json"], capsys)
    assert outcome.code == 0
    assert "tune: 2" in (tmp_path / "good" / "recipe.yaml").read_text()
