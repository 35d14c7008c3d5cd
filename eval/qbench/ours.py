"""llmmpq itself, like any competitor: quantize into a folder, read the folder back.

Bits are the budget, in true bits; with the setting `uniform: true` they are one width everywhere. Other settings are
keys of a recipe, such as `quantizer.group_size: 128`; the rest is our default. The tokens that everybody calibrates on
serve for both of ours: `measurement.tokens` of them to measure plans on, the others to quantize with.

With `quantizer.rotate: true` the weights are those of a rotated model: they are turned back, so that in the original
they do what they do in the rotated one. The head that a rotation keeps apart is not among the linears, nor its bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from qbench_exchange import Job, Result, nbytes_of, stored_tensors
from safetensors import safe_open

from llmmpq import Recipe, pipeline
from llmmpq.model.checkpoint import Checkpoint
from llmmpq.model.source import resolve_model
from llmmpq.runtime.linear import PackedLinear


def quantize(job: Job) -> Result:
    overrides = {key: value for key, value in job.settings.items() if key != "uniform"}
    num_probe = overrides.get("measurement.tokens", Recipe().measurement.tokens)
    budget = {"budget.bits": int(job.bits)} if job.settings.get("uniform") else {"budget.avg_bits": float(job.bits)}
    shared = {
        "model": job.model,
        "calibration.source": job.calibration["source"],
        "calibration.tokens": job.calibration["tokens"] - num_probe,
        "calibration.window": job.calibration["window"],
        "calibration.seed": job.calibration["seed"],
        "measurement.tokens": num_probe,
        "run.device": "cpu",
        "run.threads": job.threads,
    }
    out, work = Path(job.scratch) / "quantized", Path(job.scratch) / "work"
    recipe = Recipe().override(shared | budget | overrides)
    made = pipeline.quantize_model(recipe, out=out, work_dir=work)
    _, model = pipeline.load_model(str(out), device="cpu")
    weights = {}
    for name in job.linears:
        packed = model.get_submodule(name)
        assert isinstance(packed, PackedLinear)
        weights[name] = packed.dequantize(torch.float32)
    if recipe.quantizer.rotate:
        (learned,) = work.glob("*/rotation-*/rotation.safetensors")
        weights = {name: weight.float() for name, weight in _turned_back(weights, learned, job.model)}
    return Result(
        weights=weights,
        nbytes={name: nbytes_of(*parts.values()) for name, parts in stored_tensors(out, job.linears).items()},
        counted="its files: codes, scales, zeros",
        package="llmmpq",
        notes=tuple(made["warnings"]),
    )


def _turned_back(weights: dict[str, torch.Tensor], learned: Path, model: str) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(str(learned), framework="pt") as stored:
        residual = json.loads(stored.metadata()["notes"])["residual"]
        rotation_DD = stored.get_tensor("rotation").double()
    checkpoint = Checkpoint.open(resolve_model(model))
    for name, weight in weights.items():
        turned, norm = weight.double(), residual["readers"].get(f"{name}.weight")
        if norm is not None:
            gain = checkpoint.read([norm], dtype=torch.float64)[norm] + (1 - residual["norms"][norm])
            turned = turned @ rotation_DD.t() / gain
        if f"{name}.weight" in residual["writers"]:
            turned = rotation_DD @ turned
        yield name, turned
