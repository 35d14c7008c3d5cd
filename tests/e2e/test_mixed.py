"""Plans in which a person gave a matrix several widths, or 8-bit scales: carried out, stored, read back, resumed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmmpq.hf import LlmmpqForCausalLM
from llmmpq.pipeline import inspect, quantize_model
from llmmpq.recipe import Recipe
from tests import tiny
from tests.e2e.running import (
    assert_plan_is_what_is_stored,
    bits_of,
    decoded_weight,
    digests,
    interrupted_after,
    raw_tensors,
    read_plan,
    run_here,
    tiny_recipe,
)

SETTINGS = ["--tokens", 256, "--window", 64, "--threads", 1, "--quiet"]


def mixed_plan(plan: dict[str, Any]) -> dict[str, Any]:
    """Two, three or four widths in turn, every other matrix with 8-bit scales, every third one symmetric."""
    linears = {}
    for position, (name, entry) in enumerate(plan["linears"].items()):
        num_groups = -(-entry["shape"][1] // entry["group_size"])
        widths = min(num_groups, 2 + position % 3)
        bits = {str(width): 1 for width in (8, 4, 3)[3 - widths + 1 :]} if widths > 1 else {}
        bits["2"] = num_groups - len(bits)
        new = {"bits": bits, "symmetric": position % 3 == 0}
        linears[name] = entry | new | ({"scale_dtype": "float8"} if position % 2 else {})
    return plan | {"layout_version": 2, "linears": linears}


def first_plan(folder: Path, recipe: Recipe) -> dict[str, Any]:
    quantize_model(recipe, out=folder / "first")
    return read_plan(folder / "first")


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_neox"])
def test_a_plan_of_several_widths(
    name: str, tmp_path: Path, calibration_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out, file = tiny.save(name, tmp_path / "source"), tmp_path / "out", tmp_path / "plan.json"
    asked = mixed_plan(first_plan(tmp_path, tiny_recipe(source, calibration_file, budget__bits=3)))
    file.write_text(json.dumps(asked))
    outcome = run_here(
        ["quantize", source, "--out", out, "--calib", calibration_file, *SETTINGS, "--plan", file], capsys
    )
    assert outcome.code == 0, outcome.stderr

    plan = assert_plan_is_what_is_stored(out)
    for key in ("bits", "group_size", "symmetric", "scale_dtype"):
        got, wanted = ({name: one.get(key) for name, one in made["linears"].items()} for made in (plan, asked))
        assert got == wanted
    assert plan["layout_version"] == 2
    found = inspect(out)
    assert (found["problems"], found["layout_version"]) == ([], 2)

    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    stored = raw_tensors(out)
    for linear_name, entry in plan["linears"].items():
        weight = original.get_submodule(linear_name).weight.data
        decoded = torch.from_numpy(decoded_weight(stored, linear_name, entry))
        assert np.corrcoef(weight.flatten(), decoded.flatten())[0, 1] > 0.7, linear_name
        weight.copy_(decoded)
    with torch.no_grad():
        logits = LlmmpqForCausalLM.from_pretrained(str(out), dtype=torch.float32)(tiny.token_ids()).logits
        assert (logits - original(tiny.token_ids()).logits).abs().max() <= 1e-4


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    tmp_path: Path, calibration_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, file = tiny.save("llama", tmp_path / "source"), tmp_path / "plan.json"
    recipe = tiny_recipe(source, calibration_file, budget__bits=3)
    file.write_text(json.dumps(mixed_plan(first_plan(tmp_path, recipe))))
    quantize_model(recipe, out=tmp_path / "whole", plan_file=file, work_dir=tmp_path / "one")
    with interrupted_after(monkeypatch, "quantize", "block-0001"):
        quantize_model(recipe, out=tmp_path / "parts", plan_file=file, work_dir=tmp_path / "two")
    summary = quantize_model(recipe, out=tmp_path / "parts", plan_file=file, work_dir=tmp_path / "two")
    assert summary["resumed_blocks"] == 2
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


def test_8_bit_scales_for_all(tmp_path: Path, calibration_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tiny.save("llama", tmp_path / "source"), tmp_path / "out"
    arguments = ["quantize", source, "--out", out, "--calib", calibration_file, *SETTINGS, "--group-size", 28]
    outcome = run_here([*arguments, "--avg-bits", 4.5, "--method", "additive", "--scale-dtype", "float8"], capsys)
    assert outcome.code == 0, outcome.stderr
    plan = assert_plan_is_what_is_stored(out)
    assert {entry["scale_dtype"] for entry in plan["linears"].values()} == {"float8"}
    assert plan["layout_version"] == 2
    assert len(set(bits_of(plan).values())) >= 2


def test_a_damaged_order_is_reported(tmp_path: Path, calibration_file: Path) -> None:
    source, file, out = tiny.save("llama", tmp_path / "source"), tmp_path / "plan.json", tmp_path / "out"
    recipe = tiny_recipe(source, calibration_file, budget__bits=3)
    file.write_text(json.dumps(mixed_plan(first_plan(tmp_path, recipe))))
    quantize_model(recipe, out=out, plan_file=file)
    path = out / "model.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    name = next(name for name in header if name.endswith(".order"))
    first = start + header[name]["data_offsets"][0]
    path.write_bytes(content[:first] + b"\xff\xff\xff\x7f" + content[first + 4 :])
    problems = inspect(out)["problems"]
    assert any("its digest differs" in problem for problem in problems)
    assert any(problem.startswith(name.removesuffix(".order")) and "no permutation" in problem for problem in problems)
