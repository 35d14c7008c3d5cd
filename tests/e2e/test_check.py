"""`llmmpq check` foresees what `quantize` with the same flags says of an output folder that is not empty."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from llmmpq.cli import main
from tests import tiny
from tests.e2e.running import GROUP_SIZE, digests, run_here

BASE = ["--tokens", 256, "--window", 64, "--group-size", GROUP_SIZE, "--threads", 1, "--quiet", "--json"]
BUDGET = ["--bits", 3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama") / "model", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated on `auto`, which is the packaged text here: tests run without a network."""
    out = tmp_path_factory.mktemp("made") / "out"
    assert main([str(item) for item in ["quantize", model, "--out", out, *BASE, *BUDGET]]) == 0
    return out


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([*BUDGET], None),
        ([*BUDGET, "--calib", "builtin"], None),
        ([*BUDGET, "--overwrite"], None),
        (["--bits", 4, "--overwrite"], None),
        (["--bits", 4], "made from other inputs (recipe)"),
        ([*BUDGET, "--calib", "TEXT"], "made from other inputs (recipe)"),
        ([*BUDGET, "--dtype", "bfloat16"], "made from other inputs (numerics, recipe)"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_check_reports_is_what_quantize_refuses(
    flags: list[object],
    says: str | None,
    model: Path,
    out: Path,
    calibration_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [calibration_file if flag == "TEXT" else flag for flag in flags]
    before = digests(out)
    checked = run_here(["check", model, "--out", out, *BASE, *flags], capsys)
    assert digests(out) == before
    problems = json.loads(checked.stdout)["problems"]
    quantized = run_here(["quantize", model, "--out", out, *BASE, *flags], capsys)
    assert checked.code == quantized.code == (0 if says is None else 2)
    if says is None:
        assert problems == []
    else:
        (problem,) = problems
        assert says in problem
        # quantize may name more: the calibration tokens, for one.
        assert quantized.stderr.startswith("error: " + problem.partition("(")[0])


def test_another_model_of_the_same_shape(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tiny.save("llama", tmp_path / "other", dtype=torch.bfloat16, seed=1)
    outcome = run_here(["check", other, "--out", out, *BASE, *BUDGET], capsys)
    assert outcome.code == 2
    assert "made from other inputs (model, recipe)" in json.loads(outcome.stdout)["problems"][0]


def test_a_result_that_seems_finished_is_noted(model: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_here(["check", model, "--out", out, *BASE, *BUDGET], capsys)
    assert [note for note in json.loads(outcome.stdout)["notes"] if "seems to hold this result" in note]
    outcome = run_here(["check", model, "--out", out.parent / "new", *BASE, *BUDGET], capsys)
    assert not [note for note in json.loads(outcome.stdout)["notes"] if "seems to hold this result" in note]


def test_a_folder_that_cannot_be_read(model: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "recipe.yaml").write_text("[")
    outcome = run_here(["check", model, "--out", out, *BASE, *BUDGET], capsys)
    assert outcome.code == 2
    assert "(recipe)" in json.loads(outcome.stdout)["problems"][0]
