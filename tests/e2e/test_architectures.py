"""Every promised architecture: quantized by the pipeline, loaded by transformers, compared tensor by tensor."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmmpq.errors import UnsupportedModelError
from llmmpq.hf import LlmmpqForCausalLM
from llmmpq.pipeline import inspect, quantize_model
from llmmpq.recipe import Recipe
from tests import tiny
from tests.e2e.running import (
    assert_plan_is_what_is_stored,
    bits_of,
    decoded_weight,
    packed_names,
    raw_tensors,
    tiny_recipe,
)

BUDGET = 4.6  # a little less than 4 bits everywhere: not all matrices can have the same
CASES = [(name, torch.bfloat16) for name in tiny.NAMES] + [("mistral", torch.float32)]
OTHER_NAMES = {"embed_out.weight": "lm_head.weight"}  # GPT-NeoX, on disk and in the model


TIED = ("qwen2", "gemma3", "opt")  # the head is the embedding
UNTIED = [name for name in tiny.NAMES if name not in TIED]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=lambda value: str(value).removeprefix("torch."))
def test_quantize_and_load(name: str, dtype: torch.dtype, tmp_path: Path, calibration_file: Path) -> None:
    source = tiny.save(name, tmp_path / "source", dtype=dtype)
    recipe = tiny_recipe(source, calibration_file, budget__avg_bits=BUDGET)
    plan = _quantize_and_compare(source, tmp_path / "out", recipe)
    assert plan["bits_per_weight"] > BUDGET - 0.2


@pytest.mark.parametrize("name", UNTIED)
def test_quantize_and_load_with_the_head(name: str, tmp_path: Path, calibration_file: Path) -> None:
    source = tiny.save(name, tmp_path / "source", dtype=torch.bfloat16)
    recipe = tiny_recipe(source, calibration_file, budget__avg_bits=BUDGET, allocation__head_bits="auto")
    plan = _quantize_and_compare(source, tmp_path / "out", recipe)
    assert plan["bits_per_weight"] > BUDGET - 0.2
    *_, (last, head) = plan["linears"].items()
    assert last in ("lm_head", "embed_out")
    assert head["block"] == 1 + max(entry["block"] for name, entry in plan["linears"].items() if name != last)


def test_the_head_at_a_width_of_its_own(tmp_path: Path, calibration_file: Path) -> None:
    source = tiny.save("llama", tmp_path / "source", dtype=torch.bfloat16)
    changes = {"budget__bits": 3, "allocation__head_bits": 8, "quantizer__group_size": 32}
    plan = _quantize_and_compare(source, tmp_path / "out", tiny_recipe(source, calibration_file, **changes))
    assert {entry["bits"] for name, entry in plan["linears"].items() if name != "lm_head"} == {3}
    assert plan["linears"]["lm_head"]["bits"] == 8


@pytest.mark.parametrize("name", TIED)
def test_a_head_that_is_the_embedding_is_refused(name: str, tmp_path: Path, calibration_file: Path) -> None:
    source = tiny.save(name, tmp_path / "source", dtype=torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match=r"lm_head shares its weights with the embedding.*--head-bits"):
        quantize_model(tiny_recipe(source, calibration_file, allocation__head_bits=4), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _quantize_and_compare(source: Path, out: Path, recipe: Recipe) -> dict[str, Any]:
    with_head = recipe.allocation.head_bits is not None
    summary = quantize_model(recipe, out=out)

    assert (summary["fallbacks"], summary["warnings"]) == ([], [])
    plan = assert_plan_is_what_is_stored(out)
    assert len(set(bits_of(plan).values())) >= 2
    assert inspect(out)["problems"] == []
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert set(plan["linears"]) == {
        module_name
        for module_name, module in original.named_modules()
        if isinstance(module, torch.nn.Linear) and (with_head or module is not original.get_output_embeddings())
    }
    _assert_kept_as_they_were(source, out)

    stored = raw_tensors(out)
    for linear_name, entry in plan["linears"].items():
        weight = original.get_submodule(linear_name).weight.data
        decoded = torch.from_numpy(decoded_weight(stored, linear_name, entry))
        # Far apart where rows, groups or planes were mixed up: random weights have a correlation of 0.
        assert np.corrcoef(weight.flatten(), decoded.flatten())[0, 1] > 0.8, linear_name
        weight.copy_(decoded)
    ids = tiny.token_ids()
    with torch.no_grad():
        expected = original(ids).logits
        loaded = LlmmpqForCausalLM.from_pretrained(str(out), dtype=torch.float32)
        logits = loaded(ids).logits
    assert torch.isfinite(logits).all()
    assert (logits - expected).abs().max() <= 1e-4
    return plan


def _assert_kept_as_they_were(source: Path, out: Path) -> None:
    before = {OTHER_NAMES.get(name, name): tensor for name, tensor in raw_tensors(source).items()}
    after = {OTHER_NAMES.get(name, name): tensor for name, tensor in raw_tensors(out).items()}
    packed = {
        key
        for name, entry in assert_plan_is_what_is_stored(out)["linears"].items()
        for key in packed_names(name, entry)
    }
    assert {name: tensor for name, tensor in after.items() if name not in packed} == {
        name: tensor
        for name, tensor in before.items()
        if not any(f"{name.removesuffix('.weight')}.{key}" in packed for key in ("words",))
    }
