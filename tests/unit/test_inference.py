"""Loading a model to run it: quantized or plain, and never from a pickle."""

import pytest
import torch
from safetensors.torch import load_file

from llmmpq.errors import CheckpointError
from llmmpq.inference import generate, load_model
from tests import tiny


@pytest.fixture
def plain(tmp_path):
    tiny.save("llama", tmp_path / "model", torch.float32)
    tiny.tokenizer(tmp_path / "model")
    return tmp_path / "model"


def test_a_plain_model_runs(plain):
    folder, model = load_model(str(plain))
    assert folder == plain
    assert not model.training
    assert isinstance(generate(str(plain), "a b", max_new_tokens=2), str)


def test_pickled_weights_are_not_loaded(plain):
    shard = plain / "model.safetensors"
    torch.save(load_file(shard), plain / "pytorch_model.bin")
    shard.unlink()
    with pytest.raises(CheckpointError, match="pickled"):
        load_model(str(plain))


def test_a_truncated_shard_is_named(plain):
    shard = plain / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors .*truncated"):
        generate(str(plain), "a b")
