"""`llmmpq bench` and `inspect --runtime` on the frozen checkpoint: the figures hang together, the tables say them."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from llmmpq import speed_tables
from llmmpq.bench import bench
from llmmpq.errors import CheckpointError, RecipeError
from llmmpq.evaluate import speed
from llmmpq.pipeline import inspect
from llmmpq.reading import load_model

FOLDER = Path(__file__).parents[1] / "golden" / "tiny-llama-v1"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(speed, "COPY_NBYTES", {"cpu": 2**20, "cuda": 2**20})
    monkeypatch.setattr(speed, "REPEATS", 1)


def shown(show, result) -> str:
    text = io.StringIO()
    show(Console(file=text, width=120), result)
    return text.getvalue()


def test_bench_measures_the_model_beside_itself_dequantized():
    result = bench(str(FOLDER), batches=(1, 2), prompt=8, new=3, device="cpu")
    assert [(row["kind"], row["batch"]) for row in result["rows"]] == [
        ("quantized", 1),
        ("quantized", 2),
        ("dequantized", 1),
        ("dequantized", 2),
    ]
    for row in result["rows"]:
        assert row["dtype"] == "float32"
        assert row["decode_tokens_per_s"] == pytest.approx(row["batch"] / row["decode_step_s"])
        assert row["prefill_tokens_per_s"] == pytest.approx(row["batch"] * 8 / row["first_token_s"])
        assert row["bandwidth_share"] == pytest.approx(
            row["read_nbytes"] / row["decode_step_s"] / result["copy_bandwidth"]
        )
        assert row["read_nbytes"] <= row["weights_nbytes"]
    quantized, dequantized = result["rows"][0], result["rows"][2]
    assert quantized["weights_nbytes"] < dequantized["weights_nbytes"]
    text = shown(speed_tables.show_bench, result)
    assert "dequantized" in text
    assert "Quantized writes" in text


def test_an_embedding_is_read_only_where_it_is_the_head_too():
    _, model = load_model(str(FOLDER), device="cpu")
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    assert speed.held_nbytes(model) - speed.read_nbytes(model) == (0 if tied else embedding.nbytes)


def test_lengths_are_refused_before_anything_is_loaded():
    with pytest.raises(CheckpointError, match="more than the"):
        bench(str(FOLDER), prompt=10**6)
    with pytest.raises(RecipeError, match="at least 1"):
        bench(str(FOLDER), batches=(0,), prompt=8, new=1)


def test_inspect_says_what_would_run():
    assert "runtime" not in inspect(FOLDER)
    found = inspect(FOLDER, runtime=True)
    assert [linear["name"] for linear in found["runtime"]["linears"]] == [linear["name"] for linear in found["linears"]]
    for linear in found["runtime"]["linears"]:
        for candidates in linear["candidates"].values():
            assert any(candidate["accepted"] for candidate in candidates)
            assert all(candidate["reason"] for candidate in candidates)
    sets = [[name.rpartition(".")[2] for name in one["names"]] for one in found["runtime"]["together"]]
    assert ["q_proj", "k_proj", "v_proj"] in sets
    assert ["gate_proj", "up_proj"] in sets
    assert all(rows["reason"] for one in found["runtime"]["together"] for rows in one["rows"].values())
    text = shown(speed_tables.show_runtime, found["runtime"])
    assert "reference: " in text
    assert "of one input, such as model.layers.0.self_attn.q_proj + model.layers.0.self_attn.k_proj + " in text
    if not torch.cuda.is_available():
        assert "gemv: cannot: Triton kernels need a CUDA device, this is cpu" in text
