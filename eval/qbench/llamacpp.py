"""llama.cpp through llama-cpp-python: K-quants and IQ-quants of Llama models. Settings: `importance` (false).

Its formats have names, not widths; `bits` chooses one of `TYPES`, and the true bits come from the GGUF file. With
`importance`, the mean square of every input over the calibration text weighs its rounding (its "imatrix"); the smallest
formats exist only with it. Embeddings and head stay in float32, so that only the decoder's linears differ.

The GGUF file in float32 that it starts from is written here: the package brings no converter. Its Llama turns
neighbouring pairs of a head where transformers turns halves, so rows of q and k are reordered, and back afterwards.
Rows must be multiples of 256: for others llama.cpp silently takes a wider format, which the true bits then show.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import gguf
import llama_cpp.llama_cpp as api
import numpy as np
import torch
from qbench_exchange import AdapterError, Job, Result

TYPES = {2: "Q2_K", 3: "Q3_K_S", 4: "Q4_K_S", 2.25: "IQ2_XS", 2.5: "Q2_K_S", 3.5: "IQ3_S", 4.25: "IQ4_XS"}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def quantize(job: Job) -> Result:
    job.accept_settings("importance")
    if job.bits not in TYPES:
        raise AdapterError(f"{job.bits:g} bits; allowed: {', '.join(f'{b:g} ({t})' for b, t in TYPES.items())}")
    model = job.load_model()
    if model.config.model_type != "llama":
        raise AdapterError(f"a model of type {model.config.model_type}; this adapter writes Llama files only")
    tensors = {name: _gguf_name(name) for name in job.linears}
    source, out = Path(job.scratch) / "source.gguf", Path(job.scratch) / "quantized.gguf"
    _write_gguf(source, model, tensors)
    importance = _importance(model, job.ids(), tensors) if job.setting("importance", False, (True, False)) else {}
    _quantize_file(source, out, TYPES[job.bits], importance, job.threads)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(str(out)).tensors}
    weights, nbytes, kinds = {}, {}, set()
    for name, their_name in tensors.items():
        tensor = stored[their_name]
        kinds.add(tensor.tensor_type.name)
        nbytes[name] = int(tensor.n_bytes)
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        weights[name] = _reorder(name, weight, model.config, back=True)
    return Result(
        weights=weights,
        nbytes=nbytes,
        counted="the tensors of its GGUF file",
        package="llama-cpp-python",
        notes=(f"{TYPES[job.bits]} became {', '.join(sorted(kinds))}",),
    )


def _gguf_name(name: str) -> str:
    _, _, rest = name.partition("layers.")
    block, _, role = rest.partition(".")
    if role not in NAMES:
        raise AdapterError(f"{name} has no place in a Llama GGUF file")
    return f"blk.{block}.{NAMES[role]}.weight"


def _reorder(name: str, weight: torch.Tensor, config: Any, *, back: bool) -> torch.Tensor:
    """Rows of q and k: the two halves of each head interleaved, or `back`."""
    role = name.rpartition(".")[2]
    if role not in ("q_proj", "k_proj"):
        return weight
    num_heads = config.num_attention_heads if role == "q_proj" else config.num_key_value_heads
    pairs = (-1, 2) if back else (2, -1)
    return weight.reshape(num_heads, *pairs, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _write_gguf(path: Path, model: Any, tensors: dict[str, str]) -> None:
    config = model.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0)
    # Nobody reads text with this file: any words do, but there must be as many as embeddings.
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{number}>" for number in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["< 0"])
    state = model.state_dict()

    def add(their_name: str, tensor: torch.Tensor) -> None:
        writer.add_tensor(their_name, np.ascontiguousarray(tensor.float().numpy()))

    add("token_embd.weight", state["model.embed_tokens.weight"])
    add("output_norm.weight", state["model.norm.weight"])
    if not config.tie_word_embeddings:
        add("output.weight", state["lm_head.weight"])
    for number in range(config.num_hidden_layers):
        for ours, theirs in NORMS.items():
            add(f"blk.{number}.{theirs}.weight", state[f"model.layers.{number}.{ours}.weight"])
    for name, their_name in tensors.items():
        add(their_name, _reorder(name, state[f"{name}.weight"], config, back=False))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def _importance(model: Any, ids: torch.Tensor, tensors: dict[str, str]) -> dict[str, np.ndarray]:
    """Mean square of each input of each linear."""
    sums = {name: torch.zeros(model.get_submodule(name).in_features) for name in tensors}

    def watch(name: str) -> Any:
        def hook(module: Any, inputs: Any) -> None:
            sums[name] += inputs[0].float().square().flatten(0, -2).sum(0)

        return model.get_submodule(name).register_forward_pre_hook(hook)

    handles = [watch(name) for name in tensors]
    for window in ids:
        model(input_ids=window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {tensors[name]: (total / ids.numel()).numpy().astype(np.float32) for name, total in sums.items()}


def _quantize_file(source: Path, out: Path, kind: str, importance: dict[str, np.ndarray], num_threads: int) -> None:
    parameters = api.llama_model_quantize_default_params()
    parameters.nthread = num_threads
    parameters.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.token_embedding_type = parameters.output_tensor_type = api.GGML_TYPE_F32
    entries = (api.llama_model_imatrix_data * (len(importance) + 1))()  # the last one, empty, ends the list
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    if importance:
        parameters.imatrix = ctypes.cast(entries, type(parameters.imatrix))
    code = api.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(parameters))
    if code != 0:
        raise AdapterError(f"llama.cpp refused {kind} with code {code}; the smallest formats need `importance`")
