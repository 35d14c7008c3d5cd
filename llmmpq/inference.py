"""Use a model, quantized or not: load it, measure its perplexity, let it write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmmpq.errors import CheckpointError
from llmmpq.evaluate.perplexity import token_nll
from llmmpq.evaluate.sample import generate_text
from llmmpq.hf import LlmmpqForCausalLM
from llmmpq.inspection import is_quantized, plan_of
from llmmpq.model.checkpoint import Checkpoint
from llmmpq.model.source import resolve_model
from llmmpq.model.tokens import evaluation_windows, packaged_text, read_text
from llmmpq.progress import Progress, Silent
from llmmpq.session import load_tokenizer, pick_device

EVALUATION_BATCH = 4  # sequences per forward: enough to fill two cores, little memory for the logits


def evaluate(
    model: str,
    *,
    baseline: str | None = None,
    text: str | None = None,
    window: int = 1024,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Token perplexity on non-overlapping windows, beside a baseline's when one is named."""
    progress = progress or Silent()
    content = packaged_text("heldout.txt") if text is None else read_text(text)
    result = _perplexity(model, content, window, device, dtype, progress)
    result["text"] = "packaged held-out text" if text is None else text
    if baseline is not None:
        result["baseline"] = _perplexity(baseline, content, window, device, dtype, progress)
        if result["baseline"]["num_tokens"] != result["num_tokens"]:
            raise CheckpointError(
                f"{model} and {baseline} split the text into {result['num_tokens']} and "
                f"{result['baseline']['num_tokens']} tokens: their tokenizers differ, so "
                "perplexities cannot be compared"
            )
        result["extra_nll"] = result["nll"] - result["baseline"]["nll"]
    return result


def generate(
    model: str,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
) -> str:
    folder, loaded = load_model(model, device=device, dtype=dtype)
    return generate_text(
        loaded,
        load_tokenizer(folder),
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )


def load_model(model: str, *, device: str = "auto", dtype: str = "auto") -> tuple[Path, PreTrainedModel]:
    """A quantized or plain model, ready to run."""
    folder = resolve_model(model)
    target = pick_device(device)
    wanted = torch.float32 if dtype == "auto" and target.type == "cpu" else dtype
    if isinstance(wanted, str) and wanted != "auto":
        wanted = getattr(torch, wanted)
    # Damage, missing shards and pickled weights are named here, before anything is loaded.
    Checkpoint.open(folder)
    loader = LlmmpqForCausalLM if is_quantized(folder) else AutoModelForCausalLM
    loaded: PreTrainedModel = loader.from_pretrained(
        str(folder), dtype=wanted, trust_remote_code=False, use_safetensors=True
    )
    torch.nn.Module.to(loaded, target)
    return folder, loaded.eval()


def _perplexity(model: str, content: str, window: int, device: str, dtype: str, progress: Progress) -> dict[str, Any]:
    folder, loaded = load_model(model, device=device, dtype=dtype)
    longest = getattr(loaded.config.get_text_config(), "max_position_embeddings", window)
    windows = evaluation_windows(load_tokenizer(folder), content, min(window, longest))
    with progress.task(f"evaluate {model}", len(windows), "windows") as advance:
        result = token_nll(loaded, windows, batch=EVALUATION_BATCH, advance=advance)
    plan = plan_of(folder)
    return {
        "model": model,
        "window": windows.shape[1],
        "num_tokens": result.num_tokens,
        "nll": result.nll,
        "perplexity": result.perplexity,
        "bits_per_weight": None if plan is None else plan.bits_per_weight,
        "total_nbytes": Checkpoint.open(folder).nbytes,
        "tokens_per_second": result.num_tokens / result.seconds,
    }
