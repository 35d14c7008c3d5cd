"""llmmpq itself, like any competitor: quantize into a folder, read the folder back.

Bits are the budget, in true bits; with the setting `uniform: true` they are one width everywhere. Other settings are
keys of a recipe, such as `quantizer.group_size: 128`; the rest is our default. The tokens that everybody calibrates on
serve for both of ours: `measurement.tokens` of them to measure plans on, the others to quantize with.
"""

from __future__ import annotations

from pathlib import Path

import torch
from qbench_exchange import Job, Result, nbytes_of, stored_tensors

from llmmpq import Recipe, pipeline
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
    out = Path(job.scratch) / "quantized"
    made = pipeline.quantize_model(
        Recipe().override(shared | budget | overrides), out=out, work_dir=Path(job.scratch) / "work"
    )
    _, model = pipeline.load_model(str(out), device="cpu")
    weights = {}
    for name in job.linears:
        packed = model.get_submodule(name)
        assert isinstance(packed, PackedLinear)
        weights[name] = packed.dequantize(torch.float32)
    return Result(
        weights=weights,
        nbytes={name: nbytes_of(*parts.values()) for name, parts in stored_tensors(out, job.linears).items()},
        counted="its files: codes, scales, zeros",
        package="llmmpq",
        notes=tuple(made["warnings"]),
    )
