"""Which weights a rotation of the residual stream changes, found on every promised architecture, or refused."""

import pytest
import torch
from torch import nn

from llmmpq.errors import UnsupportedModelError
from llmmpq.model.residual import Residual, residual_around, residual_of
from llmmpq.model.stream import BlockStream
from tests import tiny

CPU = torch.device("cpu")
WINDOWS = tiny.token_ids(2, 24)
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
BY_ATTENTION = {"self_attn.q_proj.weight": NORMS[0], "self_attn.k_proj.weight": NORMS[0]}
BY_ATTENTION |= {"self_attn.v_proj.weight": NORMS[0]}
READERS = BY_ATTENTION | {"mlp.gate_proj.weight": NORMS[1], "mlp.up_proj.weight": NORMS[1]}
FUSED = {"self_attn.qkv_proj.weight": NORMS[0], "mlp.gate_up_proj.weight": NORMS[1]}
WRITERS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


@pytest.fixture
def stream_of(opened):
    def stream(name):
        skeleton, checkpoint = opened(name)
        return BlockStream(skeleton, checkpoint, WINDOWS, device=CPU, dtype=torch.float32)

    return stream


@pytest.fixture
def first_block(stream_of):
    generators = []

    def first(name):
        generators.append(iter(stream_of(name)))
        return next(generators[-1])

    yield first
    for blocks in generators:
        blocks.close()


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_readers_writers_and_norms_of_every_block(stream_of, name):
    for block in stream_of(name):
        found, prefix = residual_of(block), block.name + "."
        readers = {weight.removeprefix(prefix): norm.removeprefix(prefix) for weight, norm in found.readers.items()}
        assert readers == (FUSED if name == "phi3" else READERS)
        assert tuple(weight.removeprefix(prefix) for weight in found.writers) == WRITERS
        assert {norm.removeprefix(prefix): value for norm, value in found.norms.items()} == dict.fromkeys(NORMS, 1.0)
        assert found.embeddings == ()


@pytest.mark.parametrize("name", ["gemma3", "gpt_neox", "opt"])
def test_where_a_rotation_would_not_be_exact_the_block_is_refused_by_name(first_block, name):
    block = first_block(name)
    with pytest.raises(UnsupportedModelError, match=rf"{block.name}.*cannot be rotated.*--rotate"):
        residual_of(block)


def test_embedding_last_norm_and_head(stream_of):
    stream = stream_of("llama")
    with stream.around() as around, torch.no_grad():
        found = residual_around(around, around.embed(WINDOWS[:1]))
    assert found == Residual(
        readers={"lm_head.weight": "model.norm.weight"},
        writers=(),
        embeddings=("model.embed_tokens.weight",),
        norms={"model.norm.weight": 1.0},
    )


def test_a_bias_of_what_is_added_counts_and_one_of_what_reads_does_not(first_block):
    block = first_block("llama")
    for role in ("self_attn.o_proj", "self_attn.q_proj"):
        linear = block.module.get_submodule(role)
        linear.bias = nn.Parameter(torch.randn(linear.out_features))
    try:
        found = residual_of(block)
    finally:
        for role in ("self_attn.o_proj", "self_attn.q_proj"):
            block.module.get_submodule(role).bias = None
    assert f"{block.name}.self_attn.o_proj.bias" in found.writers
    assert not any(name.endswith("q_proj.bias") for name in (*found.writers, *found.readers))


@pytest.mark.parametrize("size", [1e-2, 30.0])
@pytest.mark.parametrize("role", ["self_attn.o_proj", "mlp.down_proj"])
def test_what_adds_little_or_much_is_found_all_the_same(first_block, role, size):
    block = first_block("llama")
    weight = block.module.get_submodule(role).weight
    held, weight.data = weight.data, size * weight.data
    try:
        found = residual_of(block)
    finally:
        weight.data = held
    assert found.writers == tuple(f"{block.name}.{name}" for name in WRITERS)
    assert len(found.readers) == 5


class _Norm(nn.Module):
    """The model's norm, with a twist."""

    def __init__(self, held, twist):
        super().__init__()
        self.weight, self.twist = held.weight, twist

    def forward(self, states):
        return self.twist(states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt(), self.weight)


TWISTS = {
    "the mean taken off": lambda plain, weight: (plain - plain.mean(-1, keepdim=True)) * weight,
    "a constant": lambda plain, weight: plain * weight + 0.5,
    "a square": lambda plain, weight: plain.abs() * weight,
    "a gain twice": lambda plain, weight: plain * weight * weight,
    "always another gain": lambda plain, weight: 3 * plain * weight,
}


@pytest.mark.parametrize("twist", TWISTS)
def test_norms_that_no_rotation_passes_through_are_refused_by_name(first_block, monkeypatch, twist):
    block = first_block("llama")
    norm = _Norm(block.module.input_layernorm, TWISTS[twist])
    monkeypatch.setitem(block.module._modules, "input_layernorm", norm)
    held = norm.weight.detach().clone()
    with pytest.raises(UnsupportedModelError, match=r"input_layernorm is no norm that a rotation passes"):
        residual_of(block)
    assert torch.equal(norm.weight, held)


def test_a_norm_whose_weight_is_its_gain_less_one(first_block, monkeypatch):
    block = first_block("llama")
    norm = _Norm(block.module.input_layernorm, lambda plain, weight: plain * (1 + weight))
    monkeypatch.setitem(block.module._modules, "input_layernorm", norm)
    assert residual_of(block).norms[f"{block.name}.input_layernorm.weight"] == 0.0


def test_a_norm_beside_the_stream_keeps_its_gain(first_block, monkeypatch):
    """One on what attention gives, before the layer that is added: its states are no states of the stream."""
    block = first_block("llama")
    output = block.module.self_attn.o_proj
    inner = _Norm(block.module.input_layernorm, lambda plain, weight: plain * weight)

    monkeypatch.setitem(block.module.self_attn._modules, "inner_norm", inner)
    seen = []
    handle = output.register_forward_pre_hook(lambda _module, args: seen.append(args[0]) or (inner(args[0]),))
    try:
        found = residual_of(block)
    finally:
        handle.remove()
    assert seen
    assert f"{block.name}.self_attn.o_proj.weight" not in found.readers
    assert not any("inner_norm" in name for name in found.norms)


def test_to_json_and_back_and_by_other_names():
    residual = Residual(readers={"a": "n"}, writers=("b",), embeddings=("e",), norms={"n": 0.0})
    assert Residual.from_json(residual.to_json()) == residual
    renamed = residual.renamed({key: key.upper() for key in "aben"})
    assert renamed == Residual(readers={"A": "N"}, writers=("B",), embeddings=("E",), norms={"N": 0.0})
    assert (residual | renamed).writers == ("b", "B")
