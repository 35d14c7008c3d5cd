"""Use a model, quantized or not: load it, measure it against the original, let it write."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llmmpq.digest import file_sha256
from llmmpq.errors import CheckpointError, RecipeError
from llmmpq.evaluate.divergence import Divergence
from llmmpq.evaluate.harness import TaskSettings, run_harness
from llmmpq.evaluate.perplexity import NllResult, num_scored, window_nll
from llmmpq.evaluate.sample import generate_text
from llmmpq.inspection import plan_of
from llmmpq.model.checkpoint import Checkpoint
from llmmpq.model.source import resolve_model
from llmmpq.model.text import evaluation_text
from llmmpq.model.tokens import evaluation_windows
from llmmpq.output import DIGESTS_FILE
from llmmpq.progress import Progress, Silent
from llmmpq.reading import Reader, load_model, read_config
from llmmpq.reference import Reference, Scoring, compare_batch, reference_of, refuse_other_words
from llmmpq.session import load_tokenizer, pick_device

__all__ = ["evaluate", "generate", "load_model", "run_tasks"]

USUAL_WINDOW = 2048  # that of GPTQ's figures and of most published since
# 256 windows of 2,048. The whole of wikitext-2's test text, and a bound for data sets that have no end.
MAX_TOKENS = 2**19
# The mean of a quantity that varies over tokens two or three times as much as its mean is then known to 3 %.
KL_TOKENS = 8192
MOST_CHARS_PER_TOKEN = 16  # no usual tokenizer makes fewer tokens of a text


def evaluate(
    model: str,
    *,
    baseline: str | None = None,
    text: str | None = None,
    window: int | str | None = None,
    stride: int | None = None,
    tokens: int = MAX_TOKENS,
    kl_tokens: int = KL_TOKENS,
    cache_dir: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Token perplexity, and beside a baseline what was lost: extra NLL, KL divergence and its noise floor.

    `window` is a number, "own" (the longest that the model reads) or None (2,048, or its own where that is less). The
    baseline is computed in float32 whatever `dtype` says, once: `cache_dir` keeps it.
    """
    progress = progress or Silent()
    Checkpoint.open(resolve_model(model))  # damage is named here, not after the whole original was read
    name, content = evaluation_text(text, max_chars=MOST_CHARS_PER_TOKEN * tokens)
    notes: list[str] = []
    windows = _windows(model, content, window, stride, tokens, notes)
    stride = stride or windows.shape[1]
    scoring = Scoring(
        windows=windows,
        stride=stride,
        num_kl_windows=min(len(windows), _num_windows_of(kl_tokens, windows.shape[1], stride)),
    )
    reference = None
    if baseline is not None:
        _refuse_other_tokens(
            model, baseline, windows, _windows(baseline, content, windows.shape[1], stride, tokens, [])
        )
        if scoring.num_kl_windows:
            refuse_other_words(_num_words(model), _num_words(baseline))
        reference = reference_of(baseline, scoring, cache_dir=cache_dir, device=device, progress=progress)
    result = _measure(Reader(model, device=device, dtype=dtype), scoring, reference, progress)
    result |= {"text": name, "notes": notes}
    if baseline is not None and reference is not None:
        nll = NllResult(nll=reference.nll, num_tokens=result["num_tokens"], seconds=0.0)
        result["baseline"] = _figures(baseline, scoring, nll) | {"from_cache": reference.was_cached}
        result["extra_nll"] = result["nll"] - reference.nll
        result["noise_floor"] = reference.noise_floor
    return result


def run_tasks(
    model: str,
    tasks: Sequence[str],
    *,
    baseline: str | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: str | None = None,
    include_path: Path | None = None,
    out: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tasks of lm-eval, on the baseline too. A `dtype` of auto is lm-eval's: what the checkpoint says, on a CPU too."""
    settings = TaskSettings(
        tasks=[task.strip() for task in tasks],
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        include_path=include_path,
        out=out,
        quiet=progress is None or isinstance(progress, Silent),
    )
    folders = {name: resolve_model(name) for name in (model, baseline) if name is not None}
    for folder in folders.values():
        Checkpoint.open(folder)  # damage and pickled weights are named here
    found = {
        name: run_harness(name, folder, settings, device=str(pick_device(device)), dtype=dtype)
        for name, folder in folders.items()
    }
    return found[model] | ({} if baseline is None else {"baseline": found[baseline]})


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


def _num_windows_of(kl_tokens: int, window: int, stride: int) -> int:
    """The most windows that score no more than `kl_tokens`, of which the first scores more than those that overlap it.

    One at least, since figures on no token are asked for by 0 alone.
    """
    first, next_ones = window - 1, min(stride, window - 1)
    return 1 + max(0, kl_tokens - first) // next_ones if kl_tokens else 0


def _windows(
    model: str, content: str, window: int | str | None, stride: int | None, tokens: int, notes: list[str]
) -> torch.Tensor:
    folder = resolve_model(model)
    own = getattr(read_config(folder).get_text_config(), "max_position_embeddings", None)
    asked = window if isinstance(window, int) else USUAL_WINDOW
    if window == "own":
        if own is None:
            raise RecipeError(f"--window is own, but config.json of {model} names no longest: give a number")
        asked = own
    length = asked if own is None else min(asked, own)
    if length < asked and window is not None:
        notes.append(f"The window was lowered from {asked:,} to {length:,}, the most that the model reads.")
    if stride is not None and stride > length:
        raise RecipeError(f"--stride is {stride}; allowed: 1 to the window of {length}, or no token between is scored")
    tokenizer = load_tokenizer(folder)
    return evaluation_windows(tokenizer, content, length, stride=stride, max_tokens=tokens, notes=notes)


def _refuse_other_tokens(model: str, baseline: str, windows: torch.Tensor, others: torch.Tensor) -> None:
    if windows.shape != others.shape or not torch.equal(windows, others):
        raise CheckpointError(
            f"{model} and {baseline} split the text into different tokens ({windows.numel()} and {others.numel()} in "
            "whole windows): their tokenizers differ, so perplexities cannot be compared"
        )


def _num_words(model: str) -> int:
    return int(read_config(resolve_model(model)).get_text_config().vocab_size)


def _measure(reader: Reader, scoring: Scoring, reference: Reference | None, progress: Progress) -> dict[str, Any]:
    """Loss and divergence in one pass; the time is that of the model and its loss, without the comparison."""
    original_NV = None if reference is None else reference.logits_NV
    reader.load()  # not to be timed
    total, seconds, parts = 0.0, 0.0, list[Divergence]()
    with progress.task(f"evaluate {reader.name}", len(scoring.windows), "windows") as advance:
        started = time.perf_counter()
        for first, logits in reader.logits(scoring.windows):
            total += sum(window_nll(logits, scoring.windows, first=first, stride=scoring.stride))
            seconds += time.perf_counter() - started
            if original_NV is not None:
                compare_batch(original_NV, scoring, first, logits, parts)
            advance(len(logits))
            started = time.perf_counter()
    num_tokens = num_scored(scoring.windows, scoring.stride)
    nll = NllResult(nll=total / num_tokens, num_tokens=num_tokens, seconds=seconds)
    divergence = {"divergence": Divergence.of(parts).to_json()} if parts else {}
    return _figures(reader.name, scoring, nll) | {"dtype": str(reader.dtype).removeprefix("torch.")} | divergence


def _figures(model: str, scoring: Scoring, nll: NllResult) -> dict[str, Any]:
    folder = resolve_model(model)
    plan, digests = plan_of(folder), folder / DIGESTS_FILE
    num_read = scoring.windows.numel()
    return {
        "model": model,
        "window": scoring.windows.shape[1],
        "stride": scoring.stride,
        "num_tokens": nll.num_tokens,
        "nll": nll.nll,
        "perplexity": nll.perplexity,
        "bits_per_weight": None if plan is None else plan.bits_per_weight,
        "total_nbytes": Checkpoint.open(folder).nbytes,
        # Whose figures these are, wherever the folder goes; a plain model has none that is cheap.
        "digest": None if plan is None or not digests.is_file() else file_sha256(digests),
        "tokens_per_second": num_read / nll.seconds if nll.seconds else None,
    }
