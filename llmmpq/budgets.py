"""A recipe's budget for one model: how many bytes of it are for the quantized linears.

`max_size` limits the files that hold weights: quantized and kept tensors, the header of each .safetensors file, and the
index of several. The headers' size depends a little on the plan; what is reserved is the most that any plan needs.
`fit_vram` limits what running the model takes: all tensors as stored, the KV cache, and the margin explained in
`allocate/budget.py`. Either may leave less than nothing; `check_feasible` then says what is in the way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from llmmpq.allocate.budget import avg_bits_to_nbytes, vram_margin_nbytes
from llmmpq.model.checkpoint import TORCH_DTYPES, OutputTensor, most_overhead_nbytes
from llmmpq.model.kv_cache import kv_cache_nbytes
from llmmpq.recipe import Budget, parse_size
from llmmpq.scheme import DTYPE_NBYTES
from llmmpq.session import Session


def budget_of(session: Session, wanted: Budget | None = None) -> dict[str, Any]:
    """The recipe's budget, or `wanted`, as `allocate/budget.py` describes it and a plan stores it."""
    budget, linears = wanted or session.recipe.budget, session.skeleton.linears
    if budget.bits is not None:
        nbytes = sum(session.scheme(budget.bits).nbytes(spec.shape) for spec in linears)
        return {"kind": "bits", "value": budget.bits, "nbytes": nbytes}
    if budget.max_size is not None:
        reserved = {"kept": _kept_nbytes(session), "headers": _most_overhead_nbytes(session)}
        return _with_total(session, "max_size", budget.max_size, reserved)
    if budget.fit_vram is not None:
        run = {"context": budget.context, "sequences": budget.sequences}
        reserved = {
            "kept": _kept_nbytes(session),
            "kv_cache": kv_cache_nbytes(session.skeleton.model.config, **run),
            "margin": vram_margin_nbytes(parse_size(budget.fit_vram)),
        }
        return _with_total(session, "fit_vram", budget.fit_vram, reserved) | run
    assert budget.avg_bits is not None
    nbytes = avg_bits_to_nbytes(budget.avg_bits, sum(spec.num_weights for spec in linears))
    return {"kind": "avg_bits", "value": budget.avg_bits, "nbytes": nbytes}


def _with_total(session: Session, kind: str, value: str, reserved: dict[str, int]) -> dict[str, Any]:
    total = parse_size(value)
    budget = {
        "kind": kind,
        "value": value,
        "nbytes": total - sum(reserved.values()),
        "total_nbytes": total,
        "reserved": reserved,
    }
    largest = max(session.skeleton.kept, key=lambda tensor: tensor.nbytes, default=None)
    if largest is not None:
        bits = 8 * largest.nbytes // max(1, math.prod(largest.shape))
        budget["largest_kept"] = {"name": largest.name, "nbytes": largest.nbytes, "bits": bits}
    return budget


def _kept_nbytes(session: Session) -> int:
    return sum(tensor.nbytes for tensor in session.skeleton.kept)


def _most_overhead_nbytes(session: Session) -> int:
    return most_overhead_nbytes(list(_largest_output(session)), max_shard_nbytes=session.recipe.output.max_shard_nbytes)


def _largest_output(session: Session) -> Iterator[OutputTensor]:
    """Every tensor that some option would write, as large as the largest option makes it."""
    skeleton, options = session.skeleton, session.options()
    for kept in skeleton.kept:
        dtype = TORCH_DTYPES[session.checkpoint.entries[skeleton.stored_names[kept.name]].dtype]
        yield OutputTensor(name=kept.name, dtype=dtype, shape=kept.shape, chunks=list)
    for spec in skeleton.linears:
        stored: dict[str, tuple[str, tuple[int, ...]]] = {}
        for scheme in options[spec.name]:
            for key, (name, shape) in scheme.tensors(spec.shape).items():
                if key not in stored or _nbytes(name, shape) > _nbytes(*stored[key]):
                    stored[key] = (name, shape)
        for key, (name, shape) in stored.items():
            yield OutputTensor(name=f"{spec.name}.{key}", dtype=getattr(torch, name), shape=shape, chunks=list)


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return DTYPE_NBYTES[dtype] * math.prod(shape)
