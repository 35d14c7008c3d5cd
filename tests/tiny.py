"""Eight tiny random decoder models, one per architecture we promise to quantize, and a tokenizer for them.

Every width is chosen to be awkward somewhere: input sizes of 72, 80, 100 and 136 are multiples of neither 32 (the
packing chunk) nor the usual group sizes. Weights, norms and biases are all random, so a tensor that was lost
or left at its initial value changes the logits.
"""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 128
HIDDEN = 64
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    **SPECIAL,
}

_MODELS = {
    "llama": (
        LlamaForCausalLM,
        LlamaConfig,
        {"intermediate_size": 136, "num_key_value_heads": 2, "num_hidden_layers": 3},
    ),
    "mistral": (
        MistralForCausalLM,
        MistralConfig,
        {"intermediate_size": 100, "num_key_value_heads": 2, "head_dim": 18, "sliding_window": 16},
    ),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"intermediate_size": 96, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "qwen3": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 20},
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "intermediate_size": 120,
            "num_key_value_heads": 1,
            "head_dim": 24,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 24,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": (Phi3ForCausalLM, Phi3Config, {"intermediate_size": 72, "num_key_value_heads": 2}),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, {"intermediate_size": 100}),
    "opt": (
        OPTForCausalLM,
        OPTConfig,
        {
            "ffn_dim": 136,
            "init_std": 0.1,
            "tie_word_embeddings": True,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
    ),
}
NAMES = tuple(_MODELS)


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """The model `name` in float32, in evaluation mode; equal seeds give equal weights."""
    model_class, config_class, options = _MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**(_COMMON | options)))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def save(name: str, folder: str | Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Write the model `name` into `folder` as safetensors, and its tokenizer beside it."""
    folder = Path(folder)
    build(name, seed).to(dtype).save_pretrained(folder)
    tokenizer(folder)
    return folder


def tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Write a character tokenizer into `folder`: the id of an ASCII character is its code."""
    special = {0: "<pad>", 1: "<s>", 2: "</s>", 3: "<unk>"}
    vocabulary = {special.get(code, chr(code)): code for code in range(VOCAB)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.save_pretrained(folder)
    return wrapped


def token_ids(num_sequences: int = 2, num_tokens: int = 12, seed: int = 0) -> torch.Tensor:
    """Random ids that avoid the special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB, (num_sequences, num_tokens), generator=generator)
