"""`llmmpq bench`: a quantized model beside the same model at the precision it computes in, on this machine.

The other model is the quantized one with its matrices dequantized: speed and memory are those of the original,
which need not be there. Both are loaded one after the other, so that neither takes memory or cache from the other.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from typing import Any

import torch

from llmmpq.errors import CheckpointError, RecipeError
from llmmpq.evaluate.speed import copy_bandwidth, held_nbytes, measure_speed, read_nbytes
from llmmpq.inspection import is_quantized
from llmmpq.model.checkpoint import Checkpoint
from llmmpq.model.source import resolve_model
from llmmpq.progress import Progress, Silent
from llmmpq.reading import free_nbytes, load_model, read_config
from llmmpq.session import pick_device

BATCHES, PROMPT, NEW = (1, 8), 512, 128
WEIGHTS_SHARE = 0.8  # of the free memory that a dequantized model may take; the rest is for states and the cache


def bench(
    model: str,
    *,
    batches: Sequence[int] = BATCHES,
    prompt: int = PROMPT,
    new: int = NEW,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Speed of reading and writing, memory, and bandwidth as a share of a copy's."""
    progress = progress or Silent()
    folder = resolve_model(model)
    Checkpoint.open(folder)
    _check_lengths(model, batches, prompt, new)
    target, quantized = pick_device(device), is_quantized(folder)
    bandwidth = copy_bandwidth(target)
    notes: list[str] = []
    rows: list[dict[str, Any]] = []
    for kind in ("quantized", "dequantized") if quantized else ("plain",):
        _, loaded = load_model(model, device=device, dtype=dtype)
        if kind == "dequantized":
            needed = sum(parameter.numel() for parameter in _shapes(loaded)) * loaded.dtype.itemsize
            if needed > WEIGHTS_SHARE * (free := free_nbytes(target)):
                notes.append(
                    f"The model in {_name(loaded.dtype)} was not measured: it would take {needed / 1e9:.1f} GB, "
                    f"{free / 1e9:.1f} GB are free."
                )
                break
            loaded.dequantize(loaded.dtype)
            loaded.requires_grad_(False)
        with progress.task(f"{kind} in {_name(loaded.dtype)}", len(batches), "batches") as advance:
            for batch in batches:
                speed = measure_speed(loaded, batch=batch, prompt=prompt, new=new)
                read = read_nbytes(loaded)
                rows.append(
                    {"kind": kind, "dtype": _name(loaded.dtype)}
                    | dataclasses.asdict(speed)
                    | {
                        "weights_nbytes": held_nbytes(loaded),
                        "read_nbytes": read,
                        "bandwidth": read / speed.decode_step_s,
                        "bandwidth_share": read / speed.decode_step_s / bandwidth,
                    }
                )
                if speed.note is not None and speed.note not in notes:
                    notes.append(speed.note)
                advance(1)
        del loaded
        gc.collect()
        if target.type == "cuda":
            torch.cuda.empty_cache()
    return {
        "model": model,
        "device": torch.cuda.get_device_name(target) if target.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "prompt": prompt,
        "new": new,
        "copy_bandwidth": bandwidth,
        "rows": rows,
        "notes": notes,
    }


def _shapes(model: Any) -> list[torch.Tensor]:
    """Parameters as they will be once dequantized, without their memory."""
    from llmmpq.runtime.linear import STORED, PackedLinear

    packed = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    kept = [
        p
        for name, p in model.named_parameters()
        if name.rpartition(".")[0] not in packed or name.rpartition(".")[2] not in STORED
    ]
    return kept + [torch.empty(model.get_submodule(name).shape, device="meta") for name in packed]


def _check_lengths(model: str, batches: Sequence[int], prompt: int, new: int) -> None:
    if not batches or min(*batches, prompt, new) < 1:
        raise RecipeError("--batch, --prompt and --new must be whole numbers of at least 1")
    limit = getattr(read_config(resolve_model(model)).get_text_config(), "max_position_embeddings", None)
    if limit is not None and prompt + new > limit:
        raise CheckpointError(
            f"a prompt of {prompt} tokens and {new} new ones are more than the {limit} that {model} reads; lower "
            "--prompt or --new"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
