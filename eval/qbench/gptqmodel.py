"""gptqmodel: GPTQ. Settings: `group_size` (64), `symmetric` (true), `activation_order` (false). Bits: 2, 3, 4, 8."""

from __future__ import annotations

from pathlib import Path

import torch
from gptqmodel import GPTQModel, QuantizeConfig  # type: ignore[attr-defined]  # mypy takes this file for it
from qbench_exchange import Job, Result
from qbench_gptq import read_gptq


def quantize(job: Job) -> Result:
    job.accept_settings("group_size", "symmetric", "activation_order")
    config = QuantizeConfig(
        bits=job.whole_bits(2, 3, 4, 8),
        group_size=job.setting("group_size", 64),
        sym=job.setting("symmetric", True, (True, False)),
        desc_act=job.setting("activation_order", False, (True, False)),
    )
    original = job.load_model()
    originals = {name: original.get_submodule(name).weight.detach().clone() for name in job.linears}
    del original
    model = GPTQModel.load(job.model, config, device="cpu", dtype=torch.float32)
    windows = [{"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)} for ids in job.ids()]
    model.quantize(windows, batch_size=8, tokenizer=job.load_tokenizer())
    out = Path(job.scratch) / "quantized"
    model.save(str(out))
    weights, nbytes = read_gptq(out, originals)
    return Result(
        weights=weights,
        nbytes=nbytes,
        counted="its files: codes, scales, zeros; g_idx only where inputs are reordered",
        package="gptqmodel",
    )
