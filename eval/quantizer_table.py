"""Round-to-nearest against GPTQ variants at uniform widths, and additive plans against uniform ones.

    python eval/quantizer_table.py [--model demo] [--text FILE] [--window 512] [--max-windows 128] [--csv OUT]

Prints the extra NLL (nats per token, quantized minus original) of each variant on text it was not calibrated on.
Every row is a full run through the pipeline: quantize, write, load, evaluate.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path

import transformers

from llmmpq import pipeline
from llmmpq.evaluate.perplexity import token_nll
from llmmpq.model.tokens import evaluation_windows, packaged_text, read_text
from llmmpq.recipe import load_recipe
from llmmpq.session import load_tokenizer

UNIFORM = {
    "rtn": {"quantizer.algorithm": "rtn"},
    "gptq, not sequential": {"quantizer.sequential": False},
    "gptq, sequential, correction 0": {"quantizer.correction": 0.0},
    "gptq, sequential, correction 0.25": {"quantizer.correction": 0.25},
    "gptq, sequential, correction 0.5": {},
    "gptq, sequential, correction 1": {"quantizer.correction": 1.0},
    "  the default, columns in stored order": {"quantizer.activation_order": False},
    "  the default, symmetric": {"quantizer.symmetric": True},
    "  the default, groups of 128": {"quantizer.group_size": 128},
}
AVERAGES = (2.5, 2.75, 3.0, 3.296875, 3.5, 4.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--text", help="a text file; without it the packaged held-out text")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-windows", type=int, default=128)
    parser.add_argument("--only", choices=("uniform", "average"), help="one half of the table")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()

    folder, original = pipeline.load_model(args.model)
    text = packaged_text("heldout.txt") if args.text is None else read_text(args.text)
    windows = evaluation_windows(load_tokenizer(folder), text, args.window)[: args.max_windows]

    def nll(model: transformers.PreTrainedModel) -> float:
        return token_nll(model, windows, batch=4, advance=lambda num: None).nll

    reference = nll(original)
    print(f"{args.model}: {windows.numel()} tokens, windows of {args.window}, original NLL {reference:.4f}")
    rows: list[dict[str, object]] = []

    with tempfile.TemporaryDirectory() as scratch:

        def run(name: str, overrides: dict[str, object]) -> None:
            recipe = load_recipe(args.recipe).override({"model": args.model, **overrides})
            result = pipeline.quantize_model(recipe, out=Path(scratch) / f"run-{len(rows)}")
            extra = nll(pipeline.load_model(result["out"])[1]) - reference
            bits = result["plan"]["bits_per_weight"]
            rows.append({"variant": name, "true_bits": bits, "extra_nll": extra, "seconds": result["seconds"]})
            print(f"{name:42s} {bits:6.3f} true bits  extra NLL {extra:.4f}  {result['seconds']:.0f} s", flush=True)

        if args.only != "average":
            for name, overrides in UNIFORM.items():
                for bits in (2, 3, 4):
                    run(f"{bits} bits, {name}", {"budget.bits": bits, **overrides})
        if args.only != "uniform":
            for bits in AVERAGES:
                for fuse in (False, True):
                    label = "additive, fused sets agree" if fuse else "additive"
                    run(f"{bits:g} average, {label}", {"budget.avg_bits": bits, "allocation.fuse": fuse})
    if args.csv:
        with args.csv.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
