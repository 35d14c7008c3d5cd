"""Loading, running and saving packed checkpoints of eight architectures through transformers."""

import contextlib
import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import llmmpq.hf
from llmmpq.errors import CheckpointError
from llmmpq.hf import LlmmpqConfig, LlmmpqForCausalLM
from llmmpq.quantize.linear import quantize_linear
from llmmpq.records import PackedTensor, Scheme
from llmmpq.runtime.linear import STORED, PackedLinear
from llmmpq_kernels import dequantize, pack
from tests import tiny

# Mixed on purpose: every width, both kinds, groups that do and do not divide the widths of the tiny models.
SCHEMES = (
    Scheme(bits=4, group_size=32),
    Scheme(bits=3, group_size=24),
    Scheme(bits=8, group_size=128),
    Scheme(bits=2, group_size=16, symmetric=True),
    Scheme(bits=3, group_size=32, symmetric=True),
    Scheme(bits=8, group_size=48),
    Scheme(bits=2, group_size=20),
)


def round_to_nearest(weight: torch.Tensor, scheme: Scheme) -> PackedTensor:
    """The simplest quantizer: each group's range cut into equal steps."""
    num_rows, num_columns = weight.shape
    largest = 2**scheme.bits - 1
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    scales = torch.empty(num_rows, scheme.num_groups(num_columns), dtype=torch.float16)
    zeros = torch.empty(scales.shape, dtype=torch.uint8)
    for group in range(scales.shape[1]):
        columns = slice(group * scheme.group_size, (group + 1) * scheme.group_size)
        part = weight[:, columns].float()
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if scheme.symmetric:
            scale = (torch.maximum(-low, high) / 2 ** (scheme.bits - 1)).to(torch.float16)
            zero = torch.full_like(low, 2 ** (scheme.bits - 1))
        else:
            scale = ((high - low) / largest).to(torch.float16)
            zero = (-low / scale.float()).round().clamp(0, largest)
        codes[:, columns] = (part / scale.float()[:, None] + zero[:, None]).round().clamp(0, largest).to(torch.uint8)
        scales[:, group] = scale
        zeros[:, group] = zero.to(torch.uint8)
    return PackedTensor(
        words=pack(codes, bits=scheme.bits),
        scales=scales,
        zeros=None if scheme.symmetric else pack(zeros.T.contiguous(), bits=scheme.bits),
        scheme=scheme,
        shape=(num_rows, num_columns),
    )


def newer(scheme: Scheme, num_groups: int, position: int) -> Scheme:
    """Several widths where there are several groups, and every other matrix with 8-bit scales."""
    scheme = replace(scheme, scale_dtype=("float8", "float16")[position % 2])
    if num_groups == 1:
        return scheme
    wide = 3 if scheme.bits == 2 else scheme.bits
    return replace(scheme, bits=None, runs=((2, num_groups - 1), (wide, 1)))


def write_quantized(name: str, folder: Path, dtype: torch.dtype = torch.float32, *, layout: int = 1) -> nn.Module:
    """Write a packed checkpoint of the tiny model and return the plain model with the dequantized weights."""
    model = tiny.build(name).to(dtype)
    tensors, linears = model.state_dict(), {}
    tied = set(model.all_tied_weights_keys)
    for linear_name, linear in model.named_modules():
        if type(linear) is nn.Linear and f"{linear_name}.weight" not in tied:
            weight, scheme = linear.weight.data, SCHEMES[len(linears) % len(SCHEMES)]
            if layout == 1:
                packed = round_to_nearest(weight, scheme)
            else:
                scheme = newer(scheme, scheme.num_groups(weight.shape[1]), len(linears))
                importance_K = torch.ones(weight.shape[1])
                packed = quantize_linear(weight, scheme, importance_K=importance_K, factor=None, column_block=1).packed
            linears[linear_name] = packed.scheme
            del tensors[f"{linear_name}.weight"]
            tensors |= {f"{linear_name}.{key}": tensor for key, tensor in packed.tensors().items()}
            linear.weight.data = dequantize(
                packed.words,
                packed.scales,
                packed.zeros,
                order=packed.order,
                scale_base=packed.scale_base,
                runs=packed.scheme.widths(packed.shape),
                group_size=packed.scheme.group_size,
                shape=packed.shape,
                dtype=dtype,
            )
    for key in tied:
        del tensors[key]
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    config = model.config.to_dict() | {"quantization_config": LlmmpqConfig(linears=linears).to_dict()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tiny.tokenizer(folder)
    return model


@contextlib.contextmanager
def edited(folder: Path):
    """The tensors and the quantization_config of a checkpoint, written back with the changes made to them."""
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    yield tensors, config["quantization_config"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(params=[1, 2], ids=["layout 1", "layout 2"])
def either_llama(request, tmp_path):
    plain = write_quantized("llama", tmp_path, layout=request.param)
    return tmp_path, plain


@pytest.fixture
def llama(tmp_path):
    plain = write_quantized("llama", tmp_path)
    return tmp_path, plain


@pytest.fixture
def llama_2(tmp_path):
    plain = write_quantized("llama", tmp_path, layout=2)
    return tmp_path, plain


@torch.no_grad()
def logits(model, **kwargs):
    return model(tiny.token_ids(), **kwargs).logits


def reloaded(plain: nn.Module, folder: Path, dtype: torch.dtype | str) -> nn.Module:
    """The plain model through a file: unlike `.to(dtype)`, loading keeps the rotary frequencies in float32."""
    plain.save_pretrained(folder / "plain")
    return AutoModelForCausalLM.from_pretrained(folder / "plain", dtype=dtype)


def stored_bytes(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    stored = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(key)
                stored[key] = (str(tensor.dtype), list(tensor.shape), tensor.view(torch.uint8).numpy().tobytes())
    return stored


def packed_bytes(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    stored = stored_bytes(folder)
    return {key: stored[key] for key in stored if key.rpartition(".")[2] in STORED}


@pytest.mark.parametrize("layout", [1, 2])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_logits_are_those_of_the_dequantized_model(name, layout, tmp_path):
    plain = write_quantized(name, tmp_path, layout=layout)
    model = LlmmpqForCausalLM.from_pretrained(tmp_path)
    assert type(model) is type(plain)
    packed = {key for key, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert packed == set(model.config.quantization_config.linears)
    left = {key for key, module in model.named_modules() if type(module) is nn.Linear}
    assert left == {key.removesuffix(".weight") for key in plain.all_tied_weights_keys}
    assert (logits(model) - logits(plain)).abs().max() <= 1e-4
    assert (logits(model) - logits(tiny.build(name))).abs().max() > 1e-2


@pytest.mark.parametrize("layout", [1, 2])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_saving_and_loading_again_keeps_every_byte(name, layout, tmp_path):
    write_quantized(name, tmp_path / "first", layout=layout)
    model = LlmmpqForCausalLM.from_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "second", max_shard_size="100kB")
    again = LlmmpqForCausalLM.from_pretrained(tmp_path / "second")
    assert torch.equal(logits(again), logits(model))
    assert again.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()
    assert stored_bytes(tmp_path / "second") == stored_bytes(tmp_path / "first")


def test_the_names_that_an_architecture_uses_on_disk(tmp_path):
    plain = write_quantized("gpt_neox", tmp_path)
    with edited(tmp_path) as (tensors, _):
        for key in [key for key in tensors if key.startswith("lm_head.")]:
            tensors[key.replace("lm_head.", "embed_out.")] = tensors.pop(key)
    model = LlmmpqForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(model), logits(plain))
    model.save_pretrained(tmp_path / "again")
    assert stored_bytes(tmp_path / "again") == stored_bytes(tmp_path)


def test_a_renaming_that_would_miss_the_model_is_not_applied(llama, monkeypatch):
    folder, plain = llama
    renaming = WeightRenaming(source_patterns="lm_head", target_patterns="output")
    monkeypatch.setattr(llmmpq.hf, "get_model_conversion_mapping", lambda *_, **__: [renaming])
    assert torch.equal(logits(LlmmpqForCausalLM.from_pretrained(folder)), logits(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [1, 2])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_loading_in_a_dtype(name, layout, dtype, tmp_path):
    plain = write_quantized(name, tmp_path, layout=layout)
    model = LlmmpqForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            stored = module.scheme.tensors(module.shape)
            assert {key: str(getattr(module, key).dtype) for key in stored} == {
                key: f"torch.{kind}" for key, (kind, _) in stored.items()
            }
            assert module.bias is None or module.bias.dtype == dtype
    # A dequantized weight is rounded once, from float32; the plain model's goes the same way.
    assert torch.equal(logits(model), logits(reloaded(plain, tmp_path, dtype)))
    model.save_pretrained(tmp_path / "again")
    assert packed_bytes(tmp_path / "again") == packed_bytes(tmp_path)


def test_casting_a_loaded_model_keeps_the_packed_tensors(either_llama):
    folder, plain = either_llama
    model = LlmmpqForCausalLM.from_pretrained(folder).to(torch.bfloat16)
    down_proj = model.model.layers[0].mlp.down_proj
    assert down_proj.scales.dtype == (torch.float16 if down_proj.scale_base is None else torch.uint8)
    assert down_proj.scale_base is None or down_proj.scale_base.dtype == torch.float32
    assert torch.equal(logits(model), logits(plain.to(torch.bfloat16)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", "disk"])
def test_device_maps(device_map, dtype, either_llama):
    folder, plain = either_llama
    options = {"device_map": device_map}
    if device_map == "disk":
        layers = {f"model.layers.{i}": "disk" if i else "cpu" for i in range(3)}
        others = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb"], "cpu")
        options = {"device_map": layers | others | {"lm_head": "disk"}, "offload_folder": folder / "offload"}
    model = LlmmpqForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    assert (model.lm_head.words.device.type == "meta") == (device_map == "disk")
    assert torch.equal(logits(model), logits(reloaded(plain, folder, dtype)))
    if device_map == "disk":
        assert model.lm_head.words.device.type == "meta"
        with pytest.raises(CheckpointError, match="offloaded"):
            model.dequantize()
        model.save_pretrained(folder / "again")
        assert packed_bytes(folder / "again") == packed_bytes(folder)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_generates_the_same_text(name, tmp_path):
    plain = write_quantized(name, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = AutoTokenizer.from_pretrained(tmp_path)(["hello wor", "packed co"], return_tensors="pt")
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**prompt, **options), plain.generate(**prompt, **options))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
def test_compiles_without_a_graph_break(name, tmp_path):
    write_quantized(name, tmp_path)
    model = LlmmpqForCausalLM.from_pretrained(tmp_path)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, use_cache=False), logits(model, use_cache=False))
    assert model.hf_quantizer.is_compileable


def test_nothing_is_trainable(llama):
    folder, _ = llama
    model = LlmmpqForCausalLM.from_pretrained(folder)
    assert not model.hf_quantizer.is_trainable
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model(tiny.token_ids()).logits.requires_grad


@pytest.mark.parametrize("name", tiny.NAMES)
def test_dequantize_gives_a_plain_model(name, tmp_path):
    plain = write_quantized(name, tmp_path)
    model = LlmmpqForCausalLM.from_pretrained(tmp_path).dequantize()
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(logits(model), logits(plain))
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), logits(plain))


# What follows are checkpoints with something wrong. Without our check of the headers, transformers 5.23 warns about a
# missing tensor and computes with uninitialised memory.

O_PROJ = "model.layers.1.self_attn.o_proj"


def refuses(folder, *parts):
    with pytest.raises(CheckpointError) as caught:
        LlmmpqForCausalLM.from_pretrained(folder)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("stored", ["words", "scales", "zeros"])
def test_a_missing_packed_tensor(stored, llama):
    folder, _ = llama
    with edited(folder) as (tensors, config):
        name = next(name for name, scheme in config["linears"].items() if not scheme["symmetric"])
        del tensors[f"{name}.{stored}"]
    refuses(folder, f"{name}.{stored} is missing")


def test_a_missing_plain_tensor(llama):
    folder, _ = llama
    with edited(folder) as (tensors, _):
        del tensors["model.norm.weight"]
    refuses(folder, "model.norm.weight is missing")


def test_a_missing_tied_tensor(tmp_path):
    write_quantized("qwen2", tmp_path)
    with edited(tmp_path) as (tensors, _):
        del tensors["model.embed_tokens.weight"]
    refuses(tmp_path, "model.embed_tokens.weight is missing", "lm_head.weight is missing")


def test_a_missing_bias(tmp_path):
    write_quantized("qwen2", tmp_path)
    with edited(tmp_path) as (tensors, _):
        del tensors["model.layers.0.self_attn.q_proj.bias"]
    refuses(tmp_path, "model.layers.0.self_attn.q_proj.bias is missing")


@pytest.mark.parametrize("offload", [False, True])
def test_a_packed_tensor_of_the_wrong_shape(offload, llama):
    folder, _ = llama
    with edited(folder) as (tensors, _):
        tensors[f"{O_PROJ}.words"] = tensors[f"{O_PROJ}.words"][:, :-1].contiguous()
    refuses(folder, f"{O_PROJ}.words", "has shape", "model.safetensors")
    options = {"device_map": {"": "disk"}, "offload_folder": folder / "offload"} if offload else {}
    with pytest.raises(CheckpointError, match="has shape"):
        AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True, **options)


@pytest.mark.parametrize(
    ("stored", "dtype"), [("words", torch.int64), ("words", torch.float32), ("scales", torch.bfloat16)]
)
def test_a_packed_tensor_of_the_wrong_dtype(stored, dtype, llama):
    folder, _ = llama
    with edited(folder) as (tensors, _):
        tensors[f"{O_PROJ}.{stored}"] = tensors[f"{O_PROJ}.{stored}"].to(dtype)
    refuses(folder, f"{O_PROJ}.{stored}", "expected torch.")


def test_a_tensor_that_the_scheme_does_not_have(llama):
    folder, _ = llama
    with edited(folder) as (tensors, config):
        name = next(name for name, scheme in config["linears"].items() if scheme["symmetric"])
        tensors[f"{name}.zeros"] = torch.zeros(1, dtype=torch.int32)
    refuses(folder, f"{name}.zeros", "not expected")


def test_a_plain_weight_beside_the_packed_one(llama):
    folder, _ = llama
    with edited(folder) as (tensors, _):
        tensors[f"{O_PROJ}.weight"] = torch.zeros(64, 64)
    refuses(folder, f"{O_PROJ}.weight", "not expected")


def test_packed_tensors_that_the_config_does_not_name(llama):
    folder, _ = llama
    with edited(folder) as (_, config):
        del config["linears"][O_PROJ]
    refuses(folder, f"{O_PROJ}.weight is missing", f"{O_PROJ}.words", "not expected")


def test_many_problems_are_counted(llama):
    folder, _ = llama
    with edited(folder) as (tensors, _):
        for key in [key for key in tensors if key.endswith(".words")][:7]:
            del tensors[key]
    refuses(folder, "; and 2 more")


def test_an_entry_that_names_no_linear(llama):
    folder, _ = llama
    with edited(folder) as (_, config):
        config["linears"]["model.layers.1.self_attn.out_proj"] = config["linears"].pop(O_PROJ)
    refuses(folder, "model.layers.1.self_attn.out_proj", "no such module", "did you mean")
    with edited(folder) as (_, config):
        del config["linears"]["model.layers.1.self_attn.out_proj"]
        config["linears"]["model.norm"] = SCHEMES[0].to_json()
    refuses(folder, "'model.norm'", "LlamaRMSNorm")


def test_a_packed_head_that_config_json_ties(llama):
    folder, _ = llama
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    refuses(folder, "'lm_head' is packed", "tie_word_embeddings")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout_version": 3}, "'layout_version' is 3"),
        ({"layout_version": "1"}, "'layout_version' is '1'"),
        ({"layout_version": None}, "'layout_version' is None"),
        ({"group_order": [1, 0]}, "does not know the key 'group_order'"),
        ({"linears": {}}, "'linears' must map"),
        ({"linears": ["lm_head"]}, "'linears' must map"),
        ({"linears": {"lm_head": 4}}, r"linears\['lm_head'\] is 4"),
        ({"linears": {"lm_head": {"bits": 5, "group_size": 32, "symmetric": False}}}, r"'lm_head'\]: bits 5"),
        ({"linears": {"lm_head": {"bits": 4.0, "group_size": 32, "symmetric": False}}}, "'bits' is 4.0, expected int"),
        ({"linears": {"lm_head": {"bits": 4, "group_size": 0, "symmetric": False}}}, "group_size 0"),
        ({"linears": {"lm_head": {"bits": 4, "group_size": 32}}}, "lacks the key 'symmetric'"),
        ({"linears": {"lm_head": {"bits": 4, "group_size": 32, "symmetric": "no"}}}, "'symmetric' is 'no'"),
        ({"linears": {"lm_head": {"bits": 4, "group_size": 32, "symmetric": True, "x": 1}}}, "has the key 'x'"),
    ],
)
def test_a_malformed_config(change, message, llama):
    folder, _ = llama
    with edited(folder) as (_, config):
        config.update(change)
    with pytest.raises(CheckpointError, match=message):
        LlmmpqForCausalLM.from_pretrained(folder)


def run_of(config, *, scale_dtype="float16") -> str:
    """The name of a matrix of several widths, or of one with 8-bit scales."""
    return next(
        name
        for name, scheme in config["linears"].items()
        if (isinstance(scheme["bits"], dict) if scale_dtype == "float16" else scheme.get("scale_dtype") == scale_dtype)
    )


@pytest.mark.parametrize("key", ["order", "scale_base"])
def test_a_missing_tensor_of_layout_2(key, llama_2):
    folder, _ = llama_2
    with edited(folder) as (tensors, _):
        name = next(name for name in tensors if name.endswith(f".{key}"))
        del tensors[name]
    refuses(folder, f"{name} is missing")


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 0, 1], "order is no permutation of 0 to 2"),
        ([1, 2, 3], "no permutation"),
        ([-1, 0, 1], "no permutation"),
        ([2**31 - 1, 0, 1], "no permutation"),
        ([2, 0, 1], "order does not rise inside each run"),
    ],
)
@pytest.mark.parametrize("offload", [False, True])
def test_an_order_that_would_reach_outside(order, message, offload, llama_2):
    folder, _ = llama_2
    with edited(folder) as (tensors, _):
        name = next(name for name, tensor in tensors.items() if name.endswith(".order") and len(tensor) == 3)
        tensors[name] = torch.tensor(order, dtype=torch.int32)
    options = {"device_map": {"": "disk"}, "offload_folder": folder / "offload"} if offload else {}
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize("base", [0.0, -1.0, float("nan"), float("inf"), 1e-40])
def test_a_base_that_is_no_positive_number(base, llama_2):
    folder, _ = llama_2
    with edited(folder) as (tensors, config):
        tensors[run_of(config, scale_dtype="float8") + ".scale_base"] = torch.tensor([base])
    refuses(folder, "scale_base is", "expected a positive normal number")


def test_a_scale_code_that_stands_for_nothing(llama_2):
    folder, _ = llama_2
    with edited(folder) as (tensors, config):
        tensors[run_of(config, scale_dtype="float8") + ".scales"][3, 0] = 0
    refuses(folder, "scales has the code 0")


@pytest.mark.parametrize("kind", ["float16", "float8"])
def test_what_is_new_in_layout_2_is_refused_in_layout_1(kind, llama_2):
    folder, _ = llama_2
    with edited(folder) as (_, config):
        name = run_of(config, scale_dtype=kind)
        config["layout_version"], config["linears"] = 1, {name: config["linears"][name]}
    refuses(folder, f"linears['{name}']", "needs 'layout_version' 2, found 1")


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ({"2": 1, "3": 1}, "name 2 groups"),
        ({"2": 2**31, "3": 1}, "name 2147483649 groups"),
        ({"2": 3}, "name one width"),
        ({}, "must map widths"),
        ({"5": 1, "2": 2}, "must map widths"),
        ({"2": 3, "4": 0}, "whole number of groups from 1"),
        ({"2": True, "4": 2}, "whole number of groups from 1"),
        ({"2": "1", "4": 2}, "whole number of groups from 1"),
        ({"2": -1, "4": 4}, "whole number of groups from 1"),
    ],
)
def test_counts_that_are_not_those_of_the_matrix(bits, message, llama_2):
    folder, _ = llama_2
    with edited(folder) as (tensors, config):
        name = next(
            name.removesuffix(".order") for name in tensors if name.endswith(".order") and len(tensors[name]) == 3
        )
        config["linears"][name]["bits"] = bits
    refuses(folder, name, message)


def test_old_schemes_are_written_as_layout_1_and_read_as_either():
    old, new = Scheme(bits=4, group_size=32), Scheme(bits=4, group_size=32, scale_dtype="float8")
    assert LlmmpqConfig(linears={"a": old}).layout_version == 1
    assert LlmmpqConfig(linears={"a": old, "b": new}).layout_version == 2
    data = LlmmpqConfig(linears={"a": old}).to_dict()
    assert LlmmpqConfig.from_dict(data | {"layout_version": 2}).to_dict() == data | {"layout_version": 2}


def test_a_config_without_a_layout_version():
    with pytest.raises(CheckpointError, match="lacks the key 'layout_version'"):
        LlmmpqConfig.from_dict({"quant_method": "llmmpq", "linears": {"lm_head": SCHEMES[0].to_json()}})


def test_dequantize_after_saving(llama, tmp_path):
    """Saving turns the dtype in the config into its name."""
    model = LlmmpqForCausalLM.from_pretrained(str(llama[0]), dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    expected = model(tiny.token_ids(1, 8, 0)).logits
    plain = model.dequantize()
    assert not any(isinstance(module, PackedLinear) for module in plain.modules())
    torch.testing.assert_close(plain(tiny.token_ids(1, 8, 0)).logits, expected, rtol=0, atol=1e-4)


def test_config_round_trips(llama):
    folder, _ = llama
    config = LlmmpqConfig(linears={f"linear.{i}": scheme for i, scheme in enumerate(SCHEMES)})
    assert dict(config) == config.to_dict()
    assert LlmmpqConfig.from_dict(json.loads(json.dumps(config.to_dict()))).linears == config.linears
    assert config.to_dict()["linears"]["linear.3"] == {"bits": 2, "group_size": 16, "symmetric": True}
    loaded = LlmmpqForCausalLM.from_pretrained(folder).config
    loaded.save_pretrained(folder / "config")
    again = AutoConfig.from_pretrained(folder / "config").quantization_config
    assert again == loaded.quantization_config.to_dict()


def test_what_is_not_an_llmmpq_model(tmp_path):
    tiny.save("llama", tmp_path / "plain")
    (tmp_path / "empty").mkdir()
    for folder, message in [("plain", "not an llmmpq model"), ("empty", "has no config.json"), ("none", "cannot load")]:
        refuses(tmp_path / folder, message, str(tmp_path / folder))
    with pytest.raises(CheckpointError, match="does not quantize while loading"):
        LlamaForCausalLM.from_pretrained(
            tmp_path / "plain", quantization_config=LlmmpqConfig(linears={"lm_head": SCHEMES[0]})
        )


def test_neither_remote_code_nor_pickles(llama):
    folder, _ = llama
    with pytest.raises(CheckpointError, match="trust_remote_code=False"):
        LlmmpqForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(CheckpointError, match="use_safetensors=True"):
        LlmmpqForCausalLM.from_pretrained(folder, use_safetensors=False)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refuses(folder, "cannot load")
    with pytest.raises(CheckpointError, match=r"\.safetensors files only"):
        AutoModelForCausalLM.from_pretrained(folder, use_safetensors=False)


def test_a_damaged_file(llama):
    folder, _ = llama
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    refuses(folder, "cannot", "model.safetensors")


def test_scales_widened_by_the_architecture_are_restored(llama, monkeypatch):
    folder, plain = llama
    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["down_proj"])
        model = LlmmpqForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert model.model.layers[0].mlp.down_proj.scales.dtype == torch.float16
    assert torch.equal(logits(model), logits(reloaded(plain, folder, torch.bfloat16)))


def test_the_door_is_not_a_model():
    with pytest.raises(TypeError, match="from_pretrained"):
        LlmmpqForCausalLM()


def test_importing_twice_registers_the_newest():
    try:
        reloaded = importlib.reload(llmmpq.hf)
        assert AUTO_QUANTIZER_MAPPING["llmmpq"] is reloaded.LlmmpqHfQuantizer
        assert AUTO_QUANTIZATION_CONFIG_MAPPING["llmmpq"] is reloaded.LlmmpqConfig
    finally:
        importlib.reload(llmmpq.hf)
