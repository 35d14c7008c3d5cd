"""Text that a model writes itself, as windows of tokens to calibrate on.

In: a loaded model. Out: windows of token ids. Each begins with a token drawn evenly from the vocabulary and goes on
with tokens drawn from the model's own distribution, past ends of texts, as packed documents do. So calibration needs
no data, and there is as much of it as one likes (LLM-QAT, Liu et al., 2023).

Draws are made on the CPU by a generator of their own, one for each batch: equal seeds give equal windows whatever was
drawn before, and a batch can be made again alone.

Rejected: beginning with the start token, which gives all windows the same massive activations in the same place and
texts of the few kinds that a model begins with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

WINDOWS_PER_BATCH = 32  # one step for all reads the weights once
SEED_STEP = (
    0x9E3779B97F4A7C15  # odd and far from any small number: batches of neighbouring seeds have nothing in common
)


@torch.inference_mode()
def sample_windows(
    model: PreTrainedModel,
    *,
    num_windows: int,
    window: int,
    seed: int,
    batch_index: int,
    on_tokens: Callable[[int], None],
) -> torch.Tensor:
    """One batch of windows, ids [num_windows, window]."""
    generator = torch.Generator().manual_seed((seed + (batch_index + 1) * SEED_STEP) % 2**63)
    vocab_size = model.config.get_text_config().vocab_size
    ids = torch.randint(vocab_size, (num_windows, 1), generator=generator)
    drawn, cache = [ids], None
    on_tokens(num_windows)
    for _ in range(window - 1):
        output = model(drawn[-1].to(model.device), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        probabilities = torch.softmax(output.logits[:, -1].float().cpu(), dim=-1)
        drawn.append(torch.multinomial(probabilities, 1, generator=generator))
        on_tokens(num_windows)
    return torch.cat(drawn, dim=1)
