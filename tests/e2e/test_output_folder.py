"""A finished folder in other hands: inspected, damaged, loaded by plain transformers, saved again."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import llmmpq.hf  # noqa: F401  (teaches transformers the format)
from llmmpq.errors import CheckpointError
from llmmpq.hf import LlmmpqForCausalLM
from llmmpq.pipeline import quantize_model
from llmmpq.runtime.linear import PackedLinear
from tests import tiny
from tests.e2e.running import PACKED_KEYS, digests, raw_tensors, read_plan, run_here, tiny_recipe


@pytest.fixture(scope="module")
def made(calibration_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    model = tiny.save("qwen2", folder / "model", dtype=torch.bfloat16)
    quantize_model(
        tiny_recipe(model, calibration_file, output__max_shard_size="40KB", budget__avg_bits=4.6), out=folder / "out"
    )
    return folder / "out"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "copy")


def test_inspect_finds_nothing_wrong(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_here(["inspect", made, "--json"], capsys)
    assert (outcome.code, outcome.stderr) == (0, "")
    seen = json.loads(outcome.stdout)
    stored = raw_tensors(made)
    assert seen["problems"] == []
    assert seen["quantized_nbytes"] == read_plan(made)["nbytes"]
    assert seen["total_nbytes"] == sum(len(tensor.data) for tensor in stored.values())


@pytest.mark.parametrize("position", [9, -1], ids=["header", "data"])
def test_a_flipped_bit_is_reported(position: int, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = sorted(copy.glob("*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[position] ^= 1
    shard.write_bytes(content)
    outcome = run_here(["inspect", copy], capsys)
    assert outcome.code == 2
    assert shard.name in (outcome.stdout + outcome.stderr).replace("\n", "")
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "recipe.yaml", "report.json"])
def test_an_edited_file_is_reported(file: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / file).write_text((copy / file).read_text() + "\n")
    outcome = run_here(["inspect", copy, "--json"], capsys)
    assert outcome.code == 2
    assert [problem for problem in json.loads(outcome.stdout)["problems"] if problem.startswith(file)]


@pytest.mark.parametrize("file", ["plan.json", "digests.json", "report.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", [None, "", "[]", "null", "{}", '{"linears": 3}'])
def test_a_broken_file_is_reported(
    file: str, content: str | None, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is None:
        (copy / file).unlink()
    else:
        (copy / file).write_text(content)
    outcome = run_here(["inspect", copy], capsys)
    assert outcome.code == 2
    assert (outcome.stdout + outcome.stderr) != ""


@pytest.mark.parametrize("file", ["plan.json", "digests.json", "report.json"])
@pytest.mark.parametrize("content", ["[]", "null", "{}"])
def test_a_broken_output_is_replaced_only_when_asked(
    file: str, content: str, calibration_file: Path, tmp_path: Path, made: Path
) -> None:
    model = made.parent / "model"
    recipe = tiny_recipe(model, calibration_file, output__max_shard_size="40KB", budget__avg_bits=4.6)
    out = shutil.copytree(made, tmp_path / "out")
    (out / file).write_text(content)
    with pytest.raises(CheckpointError, match="--out"):
        quantize_model(recipe, out=out, work_dir=made.parent / ".llmmpq-work")
    quantize_model(recipe, out=out, work_dir=made.parent / ".llmmpq-work", overwrite=True)
    assert digests(out) == digests(made)


def _set_layout_version(folder: Path, version: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["layout_version"] = version
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("version", [0, 1, 3, "2", None, True])  # 1 has no 8-bit scales
@pytest.mark.parametrize("loader", [LlmmpqForCausalLM, AutoModelForCausalLM])
def test_an_unknown_layout_is_refused(version: object, loader: Any, copy: Path) -> None:
    _set_layout_version(copy, version)
    with pytest.raises(CheckpointError, match="layout_version"):
        loader.from_pretrained(str(copy))


def test_an_unknown_layout_is_one_line_on_the_command_line(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _set_layout_version(copy, 3)
    outcome = run_here(["generate", copy, "--prompt", "The quick"], capsys)
    assert outcome.code == 2
    assert outcome.stderr.startswith("error: ")
    assert "layout_version" in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


def test_a_truncated_shard_is_not_loaded(copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=shard.name):
        LlmmpqForCausalLM.from_pretrained(str(copy))


def test_plain_transformers_loads_and_saves(made: Path, tmp_path: Path) -> None:
    ids = tiny.token_ids()
    first = AutoModelForCausalLM.from_pretrained(str(made), dtype=torch.float32)
    num_packed = sum(isinstance(module, PackedLinear) for module in first.modules())
    assert num_packed == len(read_plan(made)["linears"])
    first.save_pretrained(tmp_path / "saved")
    second = AutoModelForCausalLM.from_pretrained(str(tmp_path / "saved"), dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(first(ids).logits, second(ids).logits)
    before, after = raw_tensors(made), raw_tensors(tmp_path / "saved")
    packed = {name for name in before if name.rsplit(".", 1)[1] in PACKED_KEYS}
    assert {name.rsplit(".", 1)[1] for name in packed} == set(PACKED_KEYS)
    assert {name: before[name] for name in packed} == {name: after[name] for name in packed}


def test_importing_the_module_is_all_it_takes(made: Path) -> None:
    program = (
        "import sys, llmmpq.hf; from transformers import AutoModelForCausalLM; "
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(made)], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == ["Qwen2ForCausalLM"]
