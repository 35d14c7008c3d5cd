"""How fast a causal model reads a prompt and writes after it, and how fast its device copies memory.

Prompts are seeded random tokens: speed does not depend on what they say. A figure is the median of several runs after
one that is not counted, in which kernels are compiled and memory is taken. Writing is greedy, with a cache of keys and
values; on a GPU one step is captured in a CUDA graph where the model allows it, so that launching costs nothing.

A step of decoding reads every weight once, whatever the batch: weights in bytes over seconds per step is the bandwidth
achieved, to be seen beside the bandwidth of a copy (bytes read plus bytes written). Keys and values are left
out of it, which makes the figure too small for long prompts, never too large.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

REPEATS = 3
COPY_NBYTES = {"cuda": 2**31, "cpu": 2**28}  # many times the last cache, so that memory is measured
COPY_REPEATS = 7


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Of one model and batch. `decode_step_s` is the time of one token for every sequence of the batch."""

    batch: int
    first_token_s: float
    prefill_tokens_per_s: float
    decode_step_s: float
    decode_tokens_per_s: float
    in_graph: bool
    peak_nbytes: int | None  # of device memory; a CPU's is not known apart from the rest of the process
    note: str | None


def measure_speed(model: Any, *, batch: int, prompt: int, new: int) -> Speed:
    """Read `prompt` tokens and write `new` ones, `batch` sequences at once."""
    device = model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    generator = torch.Generator().manual_seed(0)
    num_words = int(model.config.get_text_config().vocab_size)
    ids_BT = torch.randint(0, num_words, (batch, prompt), generator=generator).to(device)
    with torch.no_grad():
        first = _median_seconds(lambda: _read(model, ids_BT, None), device)
        step, in_graph, note = _decode_seconds(model, ids_BT, new)
    return Speed(
        batch=batch,
        first_token_s=first,
        prefill_tokens_per_s=batch * prompt / first,
        decode_step_s=step,
        decode_tokens_per_s=batch / step,
        in_graph=in_graph,
        peak_nbytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        note=note,
    )


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of the best copy of a large tensor."""
    source = torch.ones(COPY_NBYTES[device.type] // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    seconds = [_seconds(lambda: target.copy_(source), device) for _ in range(COPY_REPEATS)]
    return 2 * source.nbytes / min(seconds)


def read_nbytes(model: nn.Module) -> int:
    """What a step of decoding reads of the weights: all but an input embedding, of which it looks up a few rows.

    An embedding that is the output head too is read whole.
    """
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    idle = {id(parameter) for parameter in embedding.parameters()}
    idle -= {id(parameter) for parameter in head.parameters()} if head is not None else set()
    return sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in idle)


def held_nbytes(model: nn.Module) -> int:
    """All weights in memory; tied ones count once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def _read(model: Any, ids_BT: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
    """The likeliest next tokens [B, 1] and the cache, which is made where none is given."""
    output = model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1:].argmax(-1), output.past_key_values


def _decode_seconds(model: Any, ids_BT: torch.Tensor, new: int) -> tuple[float, bool, str | None]:
    """Seconds of a step, whether it was captured, and why not."""
    note = None
    if model.device.type == "cuda":
        try:
            return _captured_seconds(model, ids_BT, new), True, None
        except Exception as error:  # whatever a model does that a graph cannot hold
            note = f"no CUDA graph: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"

    def write() -> None:
        tokens, cache = first
        for _ in range(new):
            tokens, cache = _read(model, tokens, cache)

    seconds = []
    for repeat in range(REPEATS + 1):
        first = _read(model, ids_BT, None)
        taken = _seconds(write, model.device)
        seconds += [taken / new] if repeat else []
    return statistics.median(seconds), False, note


def _captured_seconds(model: Any, ids_BT: torch.Tensor, new: int) -> float:
    from transformers import StaticCache

    batch, prompt = ids_BT.shape
    # Three steps before the capture: kernels are compiled and workspaces taken outside of it.
    cache = StaticCache(config=model.config, max_cache_len=prompt + (REPEATS + 1) * new + 4)
    tokens, _ = _read(model, ids_BT, cache)
    tokens = tokens.clone()
    position = torch.full((batch, 1), prompt, device=ids_BT.device)

    def step() -> None:
        output = model(input_ids=tokens, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens.copy_(output.logits[:, -1:].argmax(-1))
        position.add_(1)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def write() -> None:
        for _ in range(new):
            graph.replay()

    write()
    return statistics.median(_seconds(write, ids_BT.device) for _ in range(REPEATS)) / new


def _median_seconds(run: Callable[[], object], device: torch.device) -> float:
    run()
    return statistics.median(_seconds(run, device) for _ in range(REPEATS))


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    _finish(device)
    started = time.perf_counter()
    run()
    _finish(device)
    return time.perf_counter() - started


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
