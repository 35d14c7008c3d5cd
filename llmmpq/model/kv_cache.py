"""What the keys and values of a context take in memory, from the model's config alone.

    nbytes = sum over layers of  2 x kv heads x head size x min(context, window) x 2 bytes x sequences

The kinds of layers are read as transformers' `DynamicCache` reads them. Where a config says less than it could (no
count of key/value heads, layers that share a cache) the figure is too large, never too small; a layer whose memory does
not follow the formula is refused. Building the cache itself was rejected: it needs the weights, or a model that runs on
the meta device, which not every model does.
"""

from __future__ import annotations

from typing import Any

from llmmpq.errors import UnsupportedModelError

KV_DTYPE_NBYTES = 2
# Kind of layer -> the key of the config that says how many tokens it looks back on; None: all of them.
WINDOWS = {"full_attention": None, "sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


def kv_cache_nbytes(config: Any, *, context: int, sequences: int) -> int:
    """The bytes of all keys and values at 16 bits, `config` being that of the model."""
    text = config.get_text_config(decoder=True)
    # Newer versions of transformers list here what differs between layers.
    layers = list(getattr(text, "per_layer_config", None) or [text] * _count(text, "num_hidden_layers"))
    kinds = getattr(text, "layer_types", None) or [_kind(layer) for layer in layers]
    per_sequence = sum(
        _num_tokens(layer, kind, context) * _nbytes_per_token(layer) for layer, kind in zip(layers, kinds, strict=True)
    )
    return sequences * per_sequence


def _kind(layer: Any) -> str:
    return next((kind for kind, key in WINDOWS.items() if key and getattr(layer, key, None)), "full_attention")


def _num_tokens(layer: Any, kind: str, context: int) -> int:
    if kind not in WINDOWS:
        raise _unknown(f"layers of the kind {kind!r}; known are {', '.join(WINDOWS)}")
    key = WINDOWS[kind]
    return context if key is None else min(context, _count(layer, key))


def _nbytes_per_token(layer: Any) -> int:
    if getattr(layer, "kv_lora_rank", None):
        raise _unknown("latent attention (kv_lora_rank)")
    num_heads = _count(layer, "num_attention_heads")
    num_kv_heads = num_heads if getattr(layer, "num_key_value_heads", None) is None else layer.num_key_value_heads
    head_dim = getattr(layer, "head_dim", None) or _count(layer, "hidden_size") // num_heads
    return int(2 * num_kv_heads * head_dim * KV_DTYPE_NBYTES)


def _count(layer: Any, key: str) -> int:
    value = getattr(layer, key, None)
    if type(value) is not int or value < 1:
        raise _unknown(f"{key} {value!r}, expected a whole number of at least 1")
    return value


def _unknown(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the KV cache of this model cannot be counted: its config.json has {what}. Use --max-size or --avg-bits "
        "instead of --fit-vram."
    )
