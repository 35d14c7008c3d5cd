"""What each part of the quantizer is worth at equal true bits: extra NLL, KL, time and peak memory.

    python eval/quantizer_ablation.py [--models demo,/tmp/second] [--seeds 0] [--budgets 2,2.25,2.5,3,3.5,4]
                                      [--widths 2,3,4] [--variants GLOB] [--text FILE] [--csv OUT]

Every row adds one part to the row before it, from rounding to nearest to the whole; each is one process of the command
line, which also measures and allocates. Budgets count every stored bit, so a variant whose scales cost more gets fewer
code bits for them, and some budgets cannot be met at all: they are left out and named. A variant's first budget
measures for all its budgets.

With `--widths` every matrix has the same width and nothing is measured or allocated: what the quantizer alone is worth,
in a tenth of the time. Figures at equal true bits are then interpolated, on a logarithmic scale, between the widths.

Judged on text that was neither calibrated on nor probed. Rows are appended to the CSV as they come, and runs found in
it are not made again.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import transformers
import yaml
from ablation import judge_on
from quantizer_table import Judge
from rows import append_row, read_rows

from llmmpq import pipeline
from llmmpq.output import read_plan
from llmmpq.recipe import load_recipe

RTN = {
    "quantizer.algorithm": "rtn",
    "measurement.quantizer": "rtn",
    "quantizer.scale_dtype": "float16",
    "quantizer.sweeps": 0,
    "quantizer.correction": 0.0,
    "quantizer.sequential": False,
    "quantizer.correction_of": "layer",
    "quantizer.shape_errors": False,
    "allocation.layer_only": True,
}
PARTS: dict[str, dict[str, Any]] = {
    "rtn": RTN,
    "gptq": {"quantizer.algorithm": "gptq", "measurement.quantizer": "gptq"},
    "+ sequential, correction 0.5": {"quantizer.sequential": True, "quantizer.correction": 0.5},
    "+ 8-bit scales": {"quantizer.scale_dtype": "float8"},
    "+ descent": {"quantizer.sweeps": 3},
    "+ correction of the stream": {"quantizer.correction_of": "stream"},
    "+ errors shared by rows": {"quantizer.shape_errors": True},
    "+ group bits": {"allocation.layer_only": False},
    "+ text of its own": {"calibration.source": "self"},
    "+ tuning": {"quantizer.tune": 200},
    "+ four times the text": {"calibration.tokens": 49152},
}
FIELDS = ("model", "seed", "budget", "variant", "true_bits", "extra_nll", "kl", "seconds", "measured", "peak_mb")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="demo")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--budgets", default="2,2.25,2.5,3,3.5,4")
    parser.add_argument("--widths", help="2, 3, 4 or 8 with commas between: the same everywhere, in place of budgets")
    parser.add_argument("--variants", default="*", help="a pattern on their names")
    parser.add_argument("--calibration-tokens", type=int, default=12288)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--text", help="a text file; without it the packaged held-out text")
    parser.add_argument("--max-windows", type=int, default=48, help="of 512 tokens, to judge on")
    parser.add_argument("--csv", type=Path, default=Path("quantizer-ablation.csv"))
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    for model in args.models.split(","):
        judge = judge_on(model, args.text, args.max_windows)
        for seed in map(int, args.seeds.split(",")):
            recipe = load_recipe("demo").override(
                {
                    "model": model,
                    "calibration.seed": seed,
                    "calibration.tokens": args.calibration_tokens,
                    "quantizer.group_size": args.group_size,
                }
            )
            for name, part in PARTS.items():
                recipe = recipe.override(part)
                no_effect = args.widths and all(key.startswith("allocation.") for key in part)
                if fnmatchcase(name, args.variants) and not no_effect:
                    with tempfile.TemporaryDirectory() as work:
                        _budgets(args, (model, str(seed), name), recipe.to_dict(), judge, Path(work))
    rows = read_rows(args.csv)
    _summary(rows)
    if args.widths:
        _interpolated(rows, [float(budget) for budget in args.budgets.split(",")])


def _budgets(
    args: argparse.Namespace, key: tuple[str, str, str], recipe: dict[str, Any], judge: Judge, work: Path
) -> None:
    model, seed, name = key
    known = {(row["model"], row["seed"], row["variant"], row["budget"]) for row in read_rows(args.csv)}
    measured = True
    for budget in (args.widths or args.budgets).split(","):
        if (*key, budget) in known:
            continue
        file, out = work / f"{budget}.yaml", work / budget
        recipe["budget"] |= {"bits": int(budget), "avg_bits": None} if args.widths else {"avg_bits": float(budget)}
        file.write_text(yaml.safe_dump(recipe))
        command = [
            sys.executable,
            "-m",
            "llmmpq",
            "quantize",
            "--recipe",
            file,
            "--out",
            out,
            "--work-dir",
            work / "work",
        ]
        started = time.perf_counter()
        process = subprocess.Popen([*map(str, command), "--quiet"], stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        if os.waitstatus_to_exitcode(status) != 0:
            print(f"{model} seed {seed} {budget} {name}: {said.strip().splitlines()[-1]}", flush=True)
            continue
        folder, loaded = pipeline.load_model(str(out))
        bits = read_plan(folder / "plan.json").bits_per_weight
        extra, kl = judge(loaded)
        peak = usage.ru_maxrss / 1000
        row = (model, seed, budget, name, bits, extra, kl, round(seconds, 1), measured, round(peak))
        append_row(args.csv, dict(zip(FIELDS, row, strict=True)))
        print(f"{model} seed {seed} {budget:>5s} {name:28s} {bits:.3f} bits  NLL {extra:+.4f} KL {kl:.4f}", flush=True)
        measured = False


def _summary(rows: list[dict[str, str]]) -> None:
    """Means over seeds as a table in Markdown: extra NLL, KL."""
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        budgets = sorted({row["budget"] for row in mine}, key=float)
        print(f"\n{model}: mean extra NLL, KL over seeds\n")
        print("| quantizer | " + " | ".join(budgets) + " | seconds with measuring, without | peak MB |")
        print("| --- " * (len(budgets) + 3) + "|")
        for name in PARTS:
            here = [row for row in mine if row["variant"] == name]
            if not here:
                continue
            cells = []
            for budget in budgets:
                runs = [row for row in here if row["budget"] == budget]
                figures = (sum(float(row[key]) for row in runs) / len(runs) for key in ("extra_nll", "kl") if runs)
                cells.append(", ".join(f"{figure:.4f}" for figure in figures))
            times = [
                _mean([float(row["seconds"]) for row in here if row["measured"] == kind]) for kind in ("True", "False")
            ]
            cells += [", ".join(times), str(max(int(row["peak_mb"]) for row in here))]
            print(f"| {name} | " + " | ".join(cells) + " |")


def _interpolated(rows: list[dict[str, str]], averages: list[float]) -> None:
    """Means over seeds at equal true bits: the logarithms of KL and of extra NLL, linear in the bits between widths."""
    for model in dict.fromkeys(row["model"] for row in rows):
        print(f"\n{model}: extra NLL, KL at equal true bits, between the widths on a logarithmic scale\n")
        print("| quantizer | " + " | ".join(f"{average:g}" for average in averages) + " |")
        print("| --- " * (len(averages) + 1) + "|")
        for name in PARTS:
            here = [row for row in rows if (row["model"], row["variant"]) == (model, name)]
            bits = sorted({float(row["true_bits"]) for row in here})
            if not bits:
                continue
            means = {
                figure: [_mean_of(here, true_bits=one, figure=figure) for one in bits] for figure in ("extra_nll", "kl")
            }
            cells = [
                ", ".join(_between(average, bits, means[figure]) for figure in ("extra_nll", "kl"))
                for average in averages
            ]
            print(f"| {name} | " + " | ".join(cells) + " |")


def _mean_of(rows: list[dict[str, str]], *, true_bits: float, figure: str) -> float:
    found = [float(row[figure]) for row in rows if float(row["true_bits"]) == true_bits]
    return sum(found) / len(found)


def _between(average: float, bits: list[float], figures: list[float]) -> str:
    if not bits[0] <= average <= bits[-1] or min(figures) <= 0:
        return "-"
    return f"{math.exp(float(np.interp(average, bits, [math.log(figure) for figure in figures]))):.4f}"


def _mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.0f}" if values else ""


if __name__ == "__main__":
    main()
