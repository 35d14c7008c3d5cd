"""What each way of choosing widths is worth: extra NLL and KL on held-out text, at several budgets.

    python eval/ablation.py [--models demo,/tmp/second] [--seeds 0,1,2] [--budgets 2.25,2.5,2.75,3,3.25,3.5,4]
                            [--methods uniform,additive,iqp,refined] [--text FILE] [--csv OUT]

Every plan goes through the whole pipeline (quantize, write, load) and is judged on text that was neither calibrated
on nor probed. A seed draws other calibration and probe windows. Groups are of 128 inputs, so that 2.25 true bits are
possible; `uniform` is the widest width that fits everywhere, so it uses fewer bits than the others between its widths.
Extra NLL is noisier than KL: it also moves with the luck of the true next tokens. Rows are appended to the CSV as they
come, and runs found in it are not made again.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import transformers
from quantizer_table import Judge
from rows import append_row, read_rows
from windows import spread

from llmmpq import pipeline
from llmmpq.model.text import packaged_text, read_text
from llmmpq.model.tokens import evaluation_windows
from llmmpq.recipe import load_recipe
from llmmpq.session import load_tokenizer

METHODS: dict[str, dict[str, Any]] = {
    "uniform": {"allocation.method": "uniform"},
    "local": {"allocation.method": "local"},
    "additive": {"allocation.method": "additive"},
    "iqp": {"allocation.method": "iqp", "allocation.refine": 0},
    "refined": {"allocation.method": "iqp", "allocation.refine": 1},
    "refined twice": {"allocation.method": "iqp", "allocation.refine": 2},
    "pairs": {"allocation.method": "pairs", "allocation.refine": 0},
}
FIELDS = ("model", "seed", "budget", "method", "true_bits", "predicted", "measured_kl", "extra_nll", "kl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="demo")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--budgets", default="2.25,2.5,2.75,3,3.25,3.5,4")
    parser.add_argument("--methods", default="uniform,additive,iqp,refined")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--probe-tokens", type=int, default=2048)
    parser.add_argument("--widths", default="2,3,4,8", help="fewer of them, and no profiles, for `pairs` on a CPU")
    parser.add_argument("--layer-only", action="store_true", help="no group profiles among the options")
    parser.add_argument("--text", help="a text file; without it the packaged held-out text")
    parser.add_argument("--max-windows", type=int, default=48, help="of 512 tokens, to judge on")
    parser.add_argument("--not-sequential", action="store_true", help="quantize as measured: no error correction")
    parser.add_argument("--csv", type=Path, default=Path("ablation.csv"))
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    for model in args.models.split(","):
        judge = judge_on(model, args.text, args.max_windows)
        for seed in map(int, args.seeds.split(",")):
            with tempfile.TemporaryDirectory() as work:
                _one_seed(args, model, seed, judge, Path(work))
    _summary(read_rows(args.csv))


def judge_on(model: str, text: str | None, max_windows: int) -> Judge:
    folder, original = pipeline.load_model(model)
    content = packaged_text("heldout.txt") if text is None else read_text(text)
    return Judge(original, spread(evaluation_windows(load_tokenizer(folder), content, 512), max_windows))


def _one_seed(args: argparse.Namespace, model: str, seed: int, judge: Judge, work: Path) -> None:
    """One measurement serves all; plans that come out equal are judged once."""
    judged: dict[tuple[object, ...], tuple[float, float]] = {}
    for budget in map(float, args.budgets.split(",")):
        for method in args.methods.split(","):
            key = (model, str(seed), str(budget), method)
            if any((row["model"], row["seed"], row["budget"], row["method"]) == key for row in read_rows(args.csv)):
                continue
            recipe = load_recipe("demo").override(
                {
                    "model": model,
                    "budget.avg_bits": budget,
                    "calibration.source": "builtin",
                    "calibration.seed": seed,
                    "measurement.tokens": args.probe_tokens,
                    "quantizer.group_size": args.group_size,
                    "allocation.widths": [int(width) for width in args.widths.split(",")],
                    "allocation.layer_only": args.layer_only,
                    "quantizer.sequential": not args.not_sequential,
                    **METHODS[method],
                }
            )
            plans = work / f"plans-{budget}-{method}"
            (plan,) = pipeline.make_plans(recipe, [recipe.budget], work_dir=work / "work", out=plans)
            schemes = tuple(linear.scheme for linear in plan.linears.values())
            if schemes not in judged:
                out = work / f"run-{len(judged)}"
                (plan_file,) = plans.glob("*.json")
                pipeline.quantize_model(recipe, out=out, work_dir=work / "work", plan_file=plan_file)
                judged[schemes] = judge(pipeline.load_model(str(out))[1])
            extra, kl = judged[schemes]
            row = (*key, plan.bits_per_weight, plan.predicted_loss, plan.measured_kl, extra, kl)
            append_row(args.csv, dict(zip(FIELDS, row, strict=True)))
            print(f"{model} seed {seed} {budget:5.2f} {method:14s} NLL {extra:+.4f} KL {kl:.4f}", flush=True)


def _summary(rows: list[dict[str, str]]) -> None:
    """Means over seeds, and each figure as a ratio to additive's."""
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    for model in dict.fromkeys(row["model"] for row in rows):
        print(f"\n{model}: mean extra NLL, KL over seeds (ratio to additive)")
        print("budget  " + "".join(f"{method:>32s}" for method in methods))
        for budget in dict.fromkeys(row["budget"] for row in rows if row["model"] == model):
            mean = {}
            for method in methods:
                here = [r for r in rows if (r["model"], r["budget"], r["method"]) == (model, budget, method)]
                if here:
                    mean[method] = tuple(sum(float(r[k]) for r in here) / len(here) for k in ("extra_nll", "kl"))
            cells = ""
            for method in methods:
                if method not in mean:
                    cells += " " * 32
                    continue
                (extra, kl), base = mean[method], mean.get("additive")
                ratio = "" if base is None else f" ({extra / base[0]:.2f}, {kl / base[1]:.2f})"
                cells += f"{f'{extra:.4f}, {kl:.4f}{ratio}':>32s}"
            print(f"{float(budget):6.2f}  {cells}")


if __name__ == "__main__":
    main()
