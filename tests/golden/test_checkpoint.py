"""A checkpoint written by layout version 1, which every later llmmpq must read to the same numbers."""

from pathlib import Path

import pytest
import torch

from llmmpq import LlmmpqForCausalLM, pipeline
from tests import tiny

FOLDER = Path(__file__).parent / "tiny-llama-v1"  # two blocks, widths 2, 3, 4 and 8, four shards
LOGITS = [-0.71420008, 0.90050673, 0.49403888, -0.07503948, 0.92676783, 0.26563963, -0.22945717, 0.04064663]


def test_it_is_intact_and_holds_every_width() -> None:
    found = pipeline.inspect(FOLDER)
    assert found["problems"] == []
    assert {linear["bits"] for linear in found["linears"]} == {2, 3, 4, 8}


def test_it_still_computes_the_same() -> None:
    model = LlmmpqForCausalLM.from_pretrained(str(FOLDER), dtype=torch.float32)
    with torch.no_grad():
        logits = model(tiny.token_ids(1, 8, 0)).logits[0, -1, : len(LOGITS)]
    assert logits.tolist() == pytest.approx(LOGITS, abs=1e-5)
