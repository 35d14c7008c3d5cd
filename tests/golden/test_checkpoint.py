"""Checkpoints of each layout version, which every later llmmpq must read to the same numbers."""

from itertools import product
from pathlib import Path

import pytest
import torch

from llmmpq import LlmmpqForCausalLM, pipeline
from llmmpq.bitmap import width_shares
from tests import tiny

HERE = Path(__file__).parent
# Version 1: widths 2, 3, 4 and 8, four shards. Version 2: several widths in a matrix, 8-bit scales, with and without
# zeros, each alone and together; short last groups.
LOGITS = {
    "tiny-llama-v1": [-0.714200, 0.900507, 0.494039, -0.075039, 0.926768, 0.265640, -0.229457, 0.040647],
    "tiny-llama-v2": [-0.715366, 0.428348, -0.357387, 0.123036, -0.680981, 0.828632, 0.267887, -0.874004],
}
every_version = pytest.mark.parametrize(("version", "name"), list(enumerate(LOGITS, start=1)))


@every_version
def test_it_is_intact_and_holds_every_width(version: int, name: str) -> None:
    found = pipeline.inspect(HERE / name)
    assert found["problems"] == []
    assert found["layout_version"] == version
    assert {bits for linear in found["linears"] for bits, _ in width_shares(linear)} == {2, 3, 4, 8}


def test_version_2_has_every_kind_of_matrix() -> None:
    linears = pipeline.inspect(HERE / "tiny-llama-v2")["linears"]
    kinds = {(isinstance(one["bits"], dict), "scale_dtype" in one, one["symmetric"]) for one in linears}
    assert kinds == {*product([True, False], repeat=3)} - {(False, False, True)}


@every_version
def test_it_still_computes_the_same(version: int, name: str) -> None:
    model = LlmmpqForCausalLM.from_pretrained(str(HERE / name), dtype=torch.float32)
    with torch.no_grad():
        logits = model(tiny.token_ids(1, 8, 0)).logits[0, -1, : len(LOGITS[name])]
    assert logits.tolist() == pytest.approx(LOGITS[name], abs=1e-5)
