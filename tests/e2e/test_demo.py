"""The model that ships with llmmpq, with few tokens: budgets, fused sets, pins, one width, symmetric codes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmmpq.pipeline import quantize_model
from llmmpq.recipe import load_recipe
from tests.e2e.running import assert_plan_is_what_is_stored, bits_of, raw_tensors

FAST = {
    "calibration.tokens": 512,
    "calibration.window": 128,
    "measurement.tokens": 128,
    "measurement.quantizer": "rtn",
    "quantizer.sweeps": 0,
    "run.threads": 1,
}
Quantized = Callable[..., tuple[dict[str, Any], Path]]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    folder = tmp_path_factory.mktemp("demo")  # one work folder: the measurement is shared

    def quantize(name: str, **changes: object) -> tuple[dict[str, Any], Path]:
        recipe = load_recipe("demo").override(FAST | {key.replace("__", "."): item for key, item in changes.items()})
        quantize_model(recipe, out=folder / name)
        return assert_plan_is_what_is_stored(folder / name), folder / name

    return quantize


def test_a_tight_budget_is_met_and_used(quantized: Quantized) -> None:
    plan, _ = quantized("b25", budget__avg_bits=2.5)
    assert 2.5 - 0.05 < plan["bits_per_weight"] <= 2.5
    bits = set(bits_of(plan).values())
    assert len(bits) >= 2
    assert {type(own) for own in bits} == {int, tuple}


def test_fused_sets_agree(quantized: Quantized) -> None:
    plan, _ = quantized("fused", budget__avg_bits=3.0, allocation__fuse=True)
    bits = bits_of(plan)
    for block in range(6):
        attention, mlp = f"model.layers.{block}.self_attn", f"model.layers.{block}.mlp"
        assert len({bits[f"{attention}.{role}_proj"] for role in "qkv"}) == 1
        assert len({bits[f"{mlp}.{role}_proj"] for role in ("gate", "up")}) == 1
    assert 3.0 - 0.05 < plan["bits_per_weight"] <= 3.0
    assert len(set(bits.values())) >= 2


def test_pins_hold(quantized: Quantized) -> None:
    pins = {"*.down_proj": 4, "layers.5.*": 2, "layers.5.mlp.down_proj": 8}  # the last that matches wins
    plan, _ = quantized("pinned", budget__avg_bits=3.2, allocation__pins=pins)
    bits = bits_of(plan)
    assert [bits[f"model.layers.{block}.mlp.down_proj"] for block in range(6)] == [4, 4, 4, 4, 4, 8]
    assert {width for name, width in bits.items() if ".5." in name and "down" not in name} == {2}
    assert plan["bits_per_weight"] <= 3.2


def test_one_width_everywhere(quantized: Quantized) -> None:
    plan, _ = quantized("b3", budget__bits=3)
    assert set(bits_of(plan).values()) == {3}
    assert plan["budget"] == {"kind": "bits", "value": 3, "nbytes": plan["nbytes"]}


def test_symmetric_codes_store_no_zeros(quantized: Quantized) -> None:
    changes = {"quantizer__symmetric": True, "quantizer__group_size": 128, "allocation__layer_only": True}
    plan, out = quantized("symmetric", budget__avg_bits=3.0, **changes)
    assert {entry["symmetric"] for entry in plan["linears"].values()} == {True}
    assert not [name for name in raw_tensors(out) if name.endswith(".zeros")]
    assert 3.0 - 0.05 < plan["bits_per_weight"] <= 3.0
