"""A quantized model that plain transformers loaded and saved: no plan, no digests, and still one of ours."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import llmmpq.hf  # noqa: F401  (teaches transformers the format)
from llmmpq.pipeline import quantize_model
from tests import tiny
from tests.e2e.running import leftovers, read_plan, run_here, tiny_recipe

SHARED = ("block", "role", "shape", "bits", "group_size", "symmetric", "nbytes")


def _made(name: str, folder: Path, calibration_file: Path) -> Path:
    model = tiny.save(name, folder / "model")
    changes = {"budget__avg_bits": 8.0, "allocation__pins": {"*.0.*": 3, "*.1.*": 8}}
    quantize_model(tiny_recipe(model, calibration_file, **changes), out=folder / "out")
    return folder / "out"


def _saved_again(made: Path, out: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(str(made)).save_pretrained(out)
    for path in made.glob("tokenizer*"):
        shutil.copy(path, out)
    assert not (out / "plan.json").exists()
    assert not (out / "digests.json").exists()
    return out


@pytest.fixture(scope="module")
def made(calibration_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _made("llama", tmp_path_factory.mktemp("made"), calibration_file)


@pytest.fixture
def again(made: Path, tmp_path: Path) -> Path:
    return _saved_again(made, tmp_path / "again")


@pytest.mark.parametrize("name", tiny.NAMES)
def test_inspect_knows_the_bits_of_every_layer(
    name: str, calibration_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = _made(name, tmp_path, calibration_file)
    outcome = run_here(["inspect", _saved_again(made, tmp_path / "again"), "--json"], capsys)
    assert (outcome.code, outcome.stderr) == (0, "")
    seen, before = json.loads(outcome.stdout), read_plan(made)
    assert [entry["name"] for entry in seen["linears"]] == list(before["linears"])
    for entry in seen["linears"]:
        expected = before["linears"][entry["name"]]
        assert {key: entry[key] for key in SHARED} == {key: expected[key] for key in SHARED}
    assert seen["bits_per_weight"] == pytest.approx(before["bits_per_weight"], abs=1e-6)
    assert seen["problems"] == []
    assert not seen["verified"]
    assert leftovers(tmp_path) == []


def test_inspect_says_what_is_missing(again: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_here(["inspect", again], capsys)
    assert outcome.code == 0
    assert "there is no plan.json" in outcome.stdout
    assert "there is no digests.json" in outcome.stdout
    assert "there are no digests to verify" in outcome.stdout
    assert "has the digest" not in outcome.stdout


def test_eval_gives_bits_and_the_same_perplexity(
    made: Path, again: Path, calibration_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", again, "--baseline", made, "--text", calibration_file, "--window", 64, "--quiet", "--json"]
    outcome = run_here([*arguments, "--cache-dir", again.parent / "cache"], capsys)
    assert outcome.code == 0
    seen = json.loads(outcome.stdout)
    assert seen["extra_nll"] == 0
    assert seen["divergence"]["kl_mean"] == 0
    assert seen["bits_per_weight"] == pytest.approx(read_plan(made)["bits_per_weight"], abs=1e-6)
    assert seen["bits_per_weight"] == pytest.approx(seen["baseline"]["bits_per_weight"], abs=1e-6)


def _set(folder: Path, key: str, value: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("layout_version", 3, "'layout_version' is 3"),
        ("linears", {}, "'linears'"),
        ("linears", {"model.layers.9.no": {"bits": 3, "group_size": 28, "symmetric": False}}, "which the model lacks"),
        ("quant_method", "gptq", "is not a model quantized by llmmpq"),
    ],
)
def test_a_config_that_does_not_fit_is_one_line(
    key: str, value: object, says: str, again: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _set(again, key, value)
    outcome = run_here(["inspect", again], capsys)
    assert outcome.code == 2
    assert outcome.stderr.startswith("error: ")
    assert says in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


def test_a_scheme_that_is_not_what_is_stored(again: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((again / "config.json").read_text())
    name = next(iter(config["quantization_config"]["linears"]))
    config["quantization_config"]["linears"][name]["bits"] = 4
    (again / "config.json").write_text(json.dumps(config))
    outcome = run_here(["inspect", again, "--json"], capsys)
    assert outcome.code == 2
    assert f"{name}.words is not stored as config.json says" in json.loads(outcome.stdout)["problems"]


def test_a_written_folder_that_lost_its_plan_is_damaged(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(made, tmp_path / "copy")
    (folder / "plan.json").unlink()
    outcome = run_here(["inspect", folder, "--json"], capsys)
    assert outcome.code == 2
    assert json.loads(outcome.stdout)["problems"] == ["plan.json is missing"]


def test_a_plan_without_its_config_is_not_run_as_a_plain_model(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(made, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    outcome = run_here(["eval", folder, "--quiet"], capsys)
    assert outcome.code == 2
    assert "is not an llmmpq model" in outcome.stderr
