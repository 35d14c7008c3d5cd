"""Round-to-nearest against GPTQ variants at uniform widths, and additive plans against uniform ones.

    python eval/quantizer_table.py [--model demo] [--text FILE] [--window 512] [--max-windows 96] [--seeds 3]
                                   [--only uniform|average] [--variants GLOB] [--bits 2,3,4] [--csv OUT]

Prints, for each variant, the mean over calibration seeds of two figures on text it was not calibrated on: the extra
NLL (nats per token, quantized minus original) and the KL divergence of the next-token distribution from the
original's. KL is the less noisy judge. Every run goes through the whole pipeline: quantize, write, load, evaluate.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import transformers
from windows import spread

from llmmpq import pipeline
from llmmpq.evaluate.perplexity import token_nll
from llmmpq.model.text import packaged_text, read_text
from llmmpq.model.tokens import evaluation_windows
from llmmpq.recipe import load_recipe
from llmmpq.session import load_tokenizer

UNIFORM: dict[str, dict[str, Any]] = {
    "rtn": {"quantizer.algorithm": "rtn"},
    "gptq, not sequential": {"quantizer.sequential": False},
    "gptq, sequential, correction 0": {"quantizer.correction": 0.0},
    "gptq, sequential, correction 0.25": {"quantizer.correction": 0.25},
    "gptq, sequential, correction 0.5": {},
    "gptq, sequential, correction 1": {"quantizer.correction": 1.0},
    "  the default, columns in stored order": {"quantizer.activation_order": False},
    "  the default, symmetric": {"quantizer.symmetric": True},
    "  the default, tuned for 100 steps": {"quantizer.tune": 100},
    "  the default, groups of 128": {"quantizer.group_size": 128},
}
AVERAGES = (2.5, 2.75, 3.0, 3.296875, 3.5, 4.0)
KL_WINDOWS = 48  # the original's log-probabilities of these are kept in memory, in 16 bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--text", help="a text file; without it the packaged held-out text")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-windows", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=1, help="how many calibration seeds to average over")
    parser.add_argument("--only", choices=("uniform", "average"), help="one half of the table")
    parser.add_argument("--variants", default="*", help="a pattern on the names of the uniform variants")
    parser.add_argument("--bits", default="2,3,4")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()

    folder, original = pipeline.load_model(args.model)
    text = packaged_text("heldout.txt") if args.text is None else read_text(args.text)
    windows = spread(evaluation_windows(load_tokenizer(folder), text, args.window), args.max_windows)
    judge = Judge(original, windows)
    print(f"{args.model}: {windows.numel()} tokens, windows of {args.window}, original NLL {judge.nll:.4f}")
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:

        def run(name: str, overrides: dict[str, Any]) -> None:
            figures = []
            for seed in range(args.seeds):
                recipe = load_recipe(args.recipe).override({"model": args.model, "calibration.seed": seed, **overrides})
                result = pipeline.quantize_model(recipe, out=Path(scratch) / f"run-{len(rows)}-{seed}")
                figures.append(judge(pipeline.load_model(result["out"])[1]))
            bits = result["plan"]["bits_per_weight"]
            extra, divergence = (sum(column) / len(figures) for column in zip(*figures, strict=True))
            rows.append({"variant": name, "true_bits": bits, "seeds": args.seeds, "extra_nll": extra, "kl": divergence})
            print(f"{name:46s} {bits:6.3f} true bits  extra NLL {extra:.4f}  KL {divergence:.4f}", flush=True)

        if args.only != "average":
            for name, overrides in UNIFORM.items():
                if fnmatchcase(name, args.variants):
                    for width in map(int, args.bits.split(",")):
                        run(f"{width} bits, {name}", {"budget.bits": width, **overrides})
        if args.only != "uniform":
            for bits in AVERAGES:
                for fuse in (False, True):
                    label = "additive, fused sets agree" if fuse else "additive"
                    additive = {"allocation.method": "additive", "allocation.fuse": fuse}
                    run(f"{bits:g} average, {label}", {"budget.avg_bits": bits, **additive})
    if args.csv:
        with args.csv.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


class Judge:
    """Extra NLL and KL of a model against the original, on the same windows."""

    def __init__(self, original: transformers.PreTrainedModel, windows: torch.Tensor) -> None:
        self.windows = windows
        self.nll = self._nll(original)
        self.reference = [self._log_probabilities(original, window).half() for window in windows[:KL_WINDOWS]]

    def __call__(self, model: transformers.PreTrainedModel) -> tuple[float, float]:
        total = 0.0
        for window, kept in zip(self.windows, self.reference, strict=False):
            expected, found = kept.float(), self._log_probabilities(model, window)
            total += float((expected.exp() * (expected - found)).sum(-1).mean())
        return self._nll(model) - self.nll, total / len(self.reference)

    def _nll(self, model: transformers.PreTrainedModel) -> float:
        return token_nll(model, self.windows, batch=4, advance=lambda num: None).nll

    @torch.no_grad()
    def _log_probabilities(self, model: transformers.PreTrainedModel, window: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(model(window[None]).logits[0].float(), dim=-1)


if __name__ == "__main__":
    main()
