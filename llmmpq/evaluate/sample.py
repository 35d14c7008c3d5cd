"""A look at what a model writes. Not a measurement: two good models differ in every sentence."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from llmmpq.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> str:
    """The prompt and its continuation. Temperature 0 takes the likeliest token; above, equal seeds give equal text."""
    if max_new_tokens < 1:
        raise RecipeError(f"--max-new-tokens is {max_new_tokens}; allowed: a whole number of at least 1")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise RecipeError(f"--temperature is {temperature}; allowed: 0 (always the likeliest token) or more")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise RecipeError(f"the prompt {prompt!r} is not valid text (UTF-8)") from None
    encoded = tokenizer(prompt, return_tensors="pt", verbose=False)
    ids, mask = encoded["input_ids"].long(), encoded["attention_mask"]
    if ids.shape[1] == 0:  # a tokenizer without a start token makes nothing of an empty prompt
        raise RecipeError(f"the prompt {prompt!r} gives no tokens; give at least one word")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and ids.shape[1] + max_new_tokens > limit:
        raise RecipeError(
            f"a prompt of {ids.shape[1]} tokens and {max_new_tokens} new ones are more than the {limit} the model "
            "reads; shorten the prompt or lower --max-new-tokens"
        )
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    cuda = [model.device] if model.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        output = model.generate(  # type: ignore[operator]  # transformers types it as a tensor
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            **sampling,
        )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
