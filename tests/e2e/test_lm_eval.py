"""lm-eval on a quantized folder: through our verb and through its own command line, on tasks that need no network."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmmpq.evaluate.harness import TaskSettings
from tests.e2e.running import run_here

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "eval" / "tasks"
QUANTIZED = ROOT / "tests" / "golden" / "tiny-llama-v1"
NAMES = "llmmpq_prose,llmmpq_cloze"


def _saved(folder: Path) -> dict:
    (file,) = folder.rglob("results_*.json")
    results: dict = json.loads(file.read_text(encoding="utf-8"))
    return results


@pytest.mark.slow
def test_our_verb_and_its_own_command_line_give_the_same_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["run", "--model", "hf", "--model_args", f"pretrained={QUANTIZED}", "--tasks", NAMES]
    own += ["--include_path", str(TASKS), "--output_path", str(tmp_path / "own"), "--limit", "5"]
    command = [sys.executable, "-m", "llmmpq.lm_eval", *own]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        given = ["eval", QUANTIZED, "--tasks", NAMES, "--include-path", TASKS, "--limit", 5, "--quiet", "--json"]
        outcome = run_here([*given, "--out", tmp_path / "ours"], capsys)
        said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert (outcome.code, outcome.stderr) == (0, "")
    ours, theirs = _saved(tmp_path / "ours"), _saved(tmp_path / "own")
    assert ours["results"] == theirs["results"]
    assert ours["model_name"] == theirs["model_name"]
    assert {name: entry["effective"] for name, entry in ours["n-samples"].items()} == dict.fromkeys(NAMES.split(","), 5)
    shown = json.loads(outcome.stdout)
    assert shown["results"]["llmmpq_cloze"]["acc"] == theirs["results"]["llmmpq_cloze"]["acc,none"]
    prose = theirs["results"]["llmmpq_prose"]
    assert shown["results"]["llmmpq_prose"]["bits_per_byte"] == prose["bits_per_byte,none"] > 0
    assert shown["files"] == [str(next((tmp_path / "ours").rglob("results_*.json")))]


def test_tasks_beside_a_baseline_in_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["eval", QUANTIZED, "--baseline", "demo", "--tasks", "llmmpq_cloze", "--include-path", TASKS, "--quiet"]
    outcome = run_here([*given, "--limit", 2, "--num-fewshot", 1, "--batch-size", 4], capsys)
    assert (outcome.code, outcome.stderr) == (0, "")
    assert "acc_norm" in outcome.stdout
    assert "demo" in outcome.stdout
    assert "llmmpq_cloze: 2 examples, 1 shown before each." in outcome.stdout


def test_a_missing_package_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    outcome = run_here(["eval", QUANTIZED, "--tasks", "wikitext", "--quiet"], capsys)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert outcome.stderr == "error: lm-eval is missing, which --tasks needs: pip install 'llmmpq[eval]'\n"


def test_a_folder_of_tasks_that_is_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    outcome = run_here(["eval", QUANTIZED, "--tasks", "x", "--include-path", tmp_path / "no", "--quiet"], capsys)
    assert outcome.code == 2
    assert "is not a folder" in outcome.stderr


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        *(("--limit", value, "a whole number of examples of at least 1") for value in ("-1", "0", "2.5", "nan", "inf")),
        *(("--batch-size", value, "at least 1, auto, or auto:N") for value in ("foo", "0", "-4", "auto:", "2.5")),
    ],
)
def test_values_that_lm_eval_would_not_refuse(
    flag: str, value: str, allowed: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # refused before it is even looked for
    outcome = run_here(["eval", QUANTIZED, "--tasks", "wikitext", flag, value, "--quiet"], capsys)
    assert (outcome.code, len(outcome.stderr.splitlines())) == (2, 1)
    assert f"{flag} is " in outcome.stderr
    assert allowed in outcome.stderr


def test_values_that_lm_eval_takes() -> None:
    for limit in (None, 1, 1.0, 8, 0.25):
        TaskSettings(tasks=["x"], limit=limit)
    for batch_size in (None, "1", "16", "auto", "auto:4"):
        TaskSettings(tasks=["x"], batch_size=batch_size)


@pytest.fixture
def small_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without lm-eval's own 14 thousand files, which take seven seconds to read."""
    from lm_eval import tasks

    class Small(tasks.TaskManager):
        def __init__(self, **options: object) -> None:
            super().__init__(**options | {"include_defaults": False})

    monkeypatch.setattr(tasks, "TaskManager", Small)


@pytest.mark.usefixtures("small_index")
def test_unknown_tasks_and_data_that_is_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "lost.yaml").write_text(
        "task: lost\ndataset_path: json\ndataset_kwargs: {data_files: {test: nowhere.jsonl}}\n"
        "output_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    )
    given = ["eval", QUANTIZED, "--include-path", tmp_path, "--quiet", "--tasks"]
    outcome = run_here([*given, "los"], capsys)
    assert (outcome.code, len(outcome.stderr.splitlines())) == (2, 1)
    assert "--tasks names 'los', which lm-eval does not know" in outcome.stderr
    assert "such as lost" in outcome.stderr
    outcome = run_here([*given, "lost"], capsys)
    assert (outcome.code, len(outcome.stderr.splitlines())) == (2, 1)
    assert "the data of --tasks lost cannot be loaded (" in outcome.stderr
