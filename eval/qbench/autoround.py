"""auto-round: rounding tuned by signed gradient descent, one block at a time. Bits: 2, 3, 4, 8, or an average.

Settings: `iterations` (200; 0 is plain rounding), `group_size` (64), `symmetric` (false), `scheme`: `uniform`, or
`auto`, where bits are an average that its AutoScheme distributes over 2, 3, 4 and 8, scales and zeros counted by it.

AutoScheme reads text only, from a file; so its windows are decoded again, and it takes a little less of each, in case
the same text gives fewer tokens the second time. Tuning then reads that file too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound, AutoScheme
from auto_round.schemes import QuantizationScheme
from qbench_exchange import AdapterError, Job, Result
from qbench_gptq import read_gptq

WINDOW_MARGIN = 8


class Windows:
    """Token ids as auto-round iterates over them."""

    batch_size = 1

    def __init__(self, ids: torch.Tensor) -> None:
        self._batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]

    def __iter__(self) -> Any:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def quantize(job: Job) -> Result:
    job.accept_settings("iterations", "group_size", "symmetric", "scheme")
    ids, tokenizer, model = job.ids(), job.load_tokenizer(), job.load_model()
    originals = {name: model.get_submodule(name).weight.detach().clone() for name in job.linears}
    window = ids.shape[1]
    dataset: Any = Windows(ids)
    if job.setting("scheme", "uniform", ("uniform", "auto")) == "auto":
        window -= WINDOW_MARGIN
        dataset = _as_text(job, tokenizer, ids, window)
        scheme: Any = AutoScheme(
            avg_bits=job.bits,
            options=[_scheme(job, bits) for bits in (2, 3, 4, 8)],
            dataset=dataset,
            seqlen=window,
            nsamples=len(ids),
            batch_size=1,
            device_map="cpu",
            low_gpu_mem_usage=False,
        )
    else:
        scheme = _scheme(job, job.whole_bits(2, 3, 4, 8))
    tuner = AutoRound(
        model,
        tokenizer,
        scheme=scheme,
        iters=job.setting("iterations", 200),
        seqlen=window,
        nsamples=len(ids),
        batch_size=8,
        dataset=dataset,
        device_map="cpu",
        enable_torch_compile=False,
    )
    out = Path(job.scratch) / "quantized"
    tuner.quantize_and_save(output_dir=str(out), format="auto_round:gptqmodel")
    weights, nbytes = read_gptq(out, originals)
    return Result(
        weights=weights,
        nbytes=nbytes,
        counted="its files: codes, scales, zeros",
        package="auto-round",
    )


def _scheme(job: Job, bits: int) -> QuantizationScheme:
    symmetric = job.setting("symmetric", False, (True, False))
    return QuantizationScheme(
        bits=bits, group_size=job.setting("group_size", 64), sym=symmetric, data_type="int", act_bits=16
    )


def _as_text(job: Job, tokenizer: Any, ids: torch.Tensor, window: int) -> str:
    path = Path(job.scratch) / "calibration.jsonl"
    texts = [tokenizer.decode(row) for row in ids]
    if short := [text for text in texts if len(tokenizer(text)["input_ids"]) < window]:
        raise AdapterError(
            f"{len(short)} calibration windows give less than {window} tokens when decoded and read again"
        )
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path.resolve())
