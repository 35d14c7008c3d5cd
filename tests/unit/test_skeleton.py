"""The meta model: every linear of every promised architecture found once, and what is refused by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.llama import modeling_llama

from llmmpq.errors import CheckpointError, RecipeError, UnsupportedModelError
from llmmpq.model.checkpoint import Checkpoint
from llmmpq.model.skeleton import _find_blocks, build_skeleton
from tests import tiny

SMALL = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def llama(folders, tmp_path):
    """A private copy, to damage."""
    return shutil.copytree(folders("llama"), tmp_path / "llama")


def skeleton_of(folder, **options):
    return build_skeleton(folder, Checkpoint.open(folder), **options)


def edit_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


# What is found


@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_linear_of_every_block_is_found_once(folders, name):
    model, skeleton = tiny.build(name), skeleton_of(folders(name))
    head = id(model.get_output_embeddings())
    expected = {
        path: (tuple(module.weight.shape), int(next(part for part in path.split(".") if part.isdigit())))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) != head
    }
    assert len(skeleton.linears) == len(expected)
    assert {spec.name: (spec.shape, spec.block) for spec in skeleton.linears} == expected
    assert {spec.dtype for spec in skeleton.linears} == {"F32"}
    assert len(skeleton.block_names) == model.config.num_hidden_layers
    for index, block_name in enumerate(skeleton.block_names):
        of_block = skeleton.block_linears(index)
        assert [spec.name for spec in of_block] == [n for n in expected if n.startswith(block_name + ".")]
        assert all(spec.name.endswith(f".{spec.role}") for spec in of_block)
    assert skeleton.widest_in_features == max(shape[1] for shape, _ in expected.values())


def test_a_block_does_not_hold_the_tensors_of_others_whose_number_begins_alike(tmp_path):
    config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=12, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    skeleton = skeleton_of(tmp_path)
    names = [skeleton.block_tensors(index) for index in range(12)]
    assert [len(of_block) for of_block in names] == [9] * 12
    assert all(name.startswith(f"model.layers.{index}.") for index in range(12) for name in names[index])


def test_blocks_are_the_list_that_holds_most_of_the_weights():
    model = nn.Module()
    model.adapters = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    model.decoder = nn.Module()
    model.decoder.layers = nn.ModuleList(
        nn.ModuleDict({"heads": nn.ModuleList(nn.Linear(8, 4) for _ in range(5)), "out": nn.Linear(4, 8)})
        for _ in range(2)
    )
    model.tail = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
    assert _find_blocks(model) == ("decoder.layers.0", "decoder.layers.1")


def test_a_model_without_a_list_of_blocks():
    with pytest.raises(UnsupportedModelError, match="no list of decoder blocks"):
        _find_blocks(nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_stored_tensor_is_quantized_kept_or_ignored(folders, name):
    checkpoint = Checkpoint.open(folders(name))
    skeleton = build_skeleton(folders(name), checkpoint)
    quantized = {skeleton.stored_names[f"{spec.name}.weight"] for spec in skeleton.linears}
    kept = {skeleton.stored_names[tensor.name] for tensor in skeleton.kept}
    assert skeleton.ignored == ()
    assert quantized | kept == set(checkpoint.entries)
    assert not quantized & kept
    for tensor in skeleton.kept:
        entry = checkpoint.entries[skeleton.stored_names[tensor.name]]
        assert (tensor.shape, tensor.nbytes) == (entry.shape, entry.nbytes)
    reasons = {tensor.name: tensor.reason for tensor in skeleton.kept}
    embedding = next(name for name in reasons if "embed_tokens" in name or "embed_in" in name)
    assert reasons[embedding] == "embedding, output head or other matrix outside the blocks"
    assert next(r for n, r in reasons.items() if "norm" in n) == "norm, bias or other vector"


@pytest.mark.parametrize("name", tiny.NAMES)
def test_nothing_is_loaded(folders, name):
    skeleton = skeleton_of(folders(name))
    assert {tensor.device.type for tensor in skeleton.model.state_dict().values()} == {"meta"}
    assert not skeleton.model.training


@pytest.mark.parametrize("name", tiny.NAMES)
def test_buffers_that_no_checkpoint_stores_are_computed(folders, name):
    """Rotary frequencies and embedding scales: left as allocated memory, they would be whatever lay there."""
    model, skeleton = tiny.build(name), skeleton_of(folders(name))
    stored = set(model.state_dict())
    expected = {key: buffer for key, buffer in model.named_buffers() if key not in stored}
    found = {key: buffer for key, buffer in skeleton.model.named_buffers() if key not in stored}
    assert found.keys() == expected.keys()
    for key, buffer in expected.items():
        assert torch.equal(found[key], buffer), key


@pytest.mark.parametrize(
    ("name", "sets"),
    [
        ("llama", [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]),
        ("opt", [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]]),
        ("phi3", [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]]),
    ],
)
def test_fused_sets_are_within_one_block(folders, name, sets):
    skeleton = skeleton_of(folders(name))
    for index in range(len(skeleton.block_names)):
        found: dict[str, set[str]] = {}
        for spec in skeleton.block_linears(index):
            found.setdefault(spec.fused_set, set()).add(spec.role)
        assert sorted(map(sorted, found.values())) == sorted(map(sorted, sets))
        assert all(f".{index}." in fused_set for fused_set in found)


def test_a_checkpoint_with_the_head_stored_although_it_is_tied(folders, tmp_path):
    folder = shutil.copytree(folders("qwen2"), tmp_path / "qwen2")
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    skeleton = skeleton_of(folder)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= {tensor.name for tensor in skeleton.kept}


def test_tensors_the_model_does_not_know_are_listed(llama):
    edit_weights(llama, lambda t: t.update({"model.layers.0.extra.weight": torch.ones(3)}))
    skeleton = skeleton_of(llama)
    assert skeleton.ignored == ("model.layers.0.extra.weight",)
    assert all("extra" not in tensor.name for tensor in skeleton.kept)


def test_names_without_the_model_prefix_are_matched(llama):
    def strip(tensors):
        for key in [key for key in tensors if key.startswith("model.")]:
            tensors[key.removeprefix("model.")] = tensors.pop(key)

    expected = {spec.name for spec in skeleton_of(llama).linears}
    edit_weights(llama, strip)
    skeleton = skeleton_of(llama)
    assert {spec.name for spec in skeleton.linears} == expected
    assert skeleton.stored_names["model.layers.1.mlp.up_proj.weight"] == "layers.1.mlp.up_proj.weight"


# output.keep


@pytest.mark.parametrize("pattern", ["model.layers.1.mlp.down_proj", "model.layers.1.*down_proj", "*.1.mlp.down_proj"])
def test_a_kept_linear_is_not_quantized(folders, pattern):
    skeleton = skeleton_of(folders("llama"), keep=(pattern,))
    full = skeleton_of(folders("llama"))
    assert {s.name for s in full.linears} - {s.name for s in skeleton.linears} == {"model.layers.1.mlp.down_proj"}
    reasons = {tensor.name: tensor.reason for tensor in skeleton.kept}
    assert reasons["model.layers.1.mlp.down_proj.weight"] == "named by output.keep"


def test_a_keep_pattern_may_leave_out_the_block(folders):
    skeleton = skeleton_of(folders("llama"), keep=("self_attn.q_proj",))
    assert [s.name for s in skeleton.linears if s.role == "q_proj"] == []
    assert len(skeleton.linears) == 3 * 6


def test_a_keep_pattern_that_matches_nothing_is_an_error(folders):
    with pytest.raises(RecipeError, match=r"no_such.*matches no linear; names look like 'model\.layers\.0"):
        skeleton_of(folders("llama"), keep=("no_such",))


def test_each_keep_pattern_must_match_something(folders):
    with pytest.raises(RecipeError, match="no_such"):
        skeleton_of(folders("llama"), keep=("*.q_proj", "no_such"))


def test_keeping_everything_is_an_error(folders):
    with pytest.raises(UnsupportedModelError, match="nothing is left to quantize"):
        skeleton_of(folders("llama"), keep=("*",))


# What is refused


def test_gpt2_conv1d_is_refused_by_name(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"transformer\.h\.0\.attn\.c_attn is a transformers Conv1D"):
        skeleton_of(tmp_path)


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (MixtralForCausalLM, MixtralConfig(**SMALL, intermediate_size=40, num_key_value_heads=2, num_local_experts=4)),
        (
            Qwen3MoeForCausalLM,
            Qwen3MoeConfig(
                **SMALL, intermediate_size=40, num_key_value_heads=2, num_experts=4, moe_intermediate_size=24
            ),
        ),
    ],
    ids=["mixtral", "qwen3_moe"],
)
def test_mixtures_of_experts_are_refused_by_name(tmp_path, model_class, config):
    model_class(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.mlp\.experts\.\w+.*experts"):
        skeleton_of(tmp_path)


def test_a_model_that_is_already_quantized(llama):
    edit_config(llama, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModelError, match=r"already quantized \(gptq\)"):
        skeleton_of(llama)


def test_an_unknown_model_type(llama):
    edit_config(llama, model_type="no_such_model", architectures=["NoSuchModel"])
    with pytest.raises(UnsupportedModelError, match=r"config\.json.*no_such_model"):
        skeleton_of(llama)


def test_code_that_comes_with_a_model_is_never_run(llama):
    edit_config(
        llama,
        model_type="own_code",
        auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
        trust_remote_code=True,
    )
    (llama / "own.py").write_text("from pathlib import Path\n(Path(__file__).parent / 'ran').touch()\n")
    with pytest.raises(UnsupportedModelError, match="trust_remote_code is off"):
        skeleton_of(llama)
    assert not (llama / "ran").exists()


def test_a_model_that_is_no_decoder(llama):
    edit_config(llama, model_type="vit", architectures=["ViTModel"], num_attention_heads=4, hidden_size=64)
    with pytest.raises(UnsupportedModelError, match="causal language model"):
        skeleton_of(llama)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"text"', "{}"])
def test_a_config_that_is_no_config(llama, text):
    (llama / "config.json").write_text(text)
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        skeleton_of(llama)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "wide"},
        {"num_hidden_layers": None},
        {"num_attention_heads": 0},
        {"hidden_act": "no_such_activation"},
        {"rope_parameters": {"rope_type": "no_such", "rope_theta": 1e4}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_config_with_a_wrong_value(llama, changes):
    edit_config(llama, **changes)
    with pytest.raises((UnsupportedModelError, CheckpointError)):
        skeleton_of(llama)


def test_a_config_of_another_model(llama):
    edit_config(llama, intermediate_size=144)
    with pytest.raises(CheckpointError, match=r"mlp\.\w+\.weight' has shape \[.*136.*\[.*144.*not of one model"):
        skeleton_of(llama)


def test_a_missing_tensor_is_named_and_counted(llama):
    def drop(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.layers.2.input_layernorm.weight"]

    edit_weights(llama, drop)
    with pytest.raises(CheckpointError, match=r"lacks 'model\.layers\.1\.mlp\.up_proj\.weight' \(2 missing in all\)"):
        skeleton_of(llama)


def test_fewer_blocks_in_the_weights_than_in_the_config(llama):
    edit_config(llama, num_hidden_layers=4)
    with pytest.raises(CheckpointError, match=r"lacks 'model\.layers\.3\."):
        skeleton_of(llama)


def test_a_linear_with_a_forward_of_its_own_is_refused(llama, monkeypatch):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    original = modeling_llama.LlamaMLP.__init__

    def with_scaled(self, config):
        original(self, config)
        self.up_proj = Scaled(config.hidden_size, config.intermediate_size, bias=False)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "__init__", with_scaled)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.mlp\.up_proj is a Scaled with a forward"):
        skeleton_of(llama)
