"""What the quadratic model of the probe's KL predicts, against whole models with the same weights in them.

    python eval/prediction.py [--model demo] [--recipe demo] [--plans 200] [--pairs 200] [--two-bit-pairs 100]
                              [--heldout-windows 8] [--seed 0] [--work-dir DIR] [--out eval/results/prediction-NAME]

Candidates are those of the library's own measuring pass: quantized on the inputs of the unchanged model, and not, as in
a final quantization, on those of the quantized one. So only the prediction is judged here, not the plan's worth.

Plans are random: each draws a target average between 2 and 4 bits, then every linear's width around it. Pairs are
uniform over (linear, option) of different linears; a second sample has 2-bit options only. Predictions of a plan's KL:

    quadratic    x'Qx
    mixed        x'Qx with the exact KL of each option alone on the diagonal
    additive     the sum of those exact KL figures: what `allocation.method: additive` minimises
    diagonal     the sum of Q's diagonal

Writes OUT.json (figures, versions, machine), OUT.csv (every point) and OUT.png.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from prediction_report import provenance, render, save, tables

from llmmpq import pipeline
from llmmpq.allocate.problem import build_problem
from llmmpq.allocate.solve import solve, solve_quadratic
from llmmpq.job import Job, open_job
from llmmpq.measure.candidates import candidates_of
from llmmpq.measuring import measure_pairs, measure_settings
from llmmpq.model.text import packaged_text
from llmmpq.model.tokens import evaluation_windows
from llmmpq.progress import Terminal
from llmmpq.quantize.linear import dequantized
from llmmpq.quantizing import stream_of
from llmmpq.recipe import load_recipe
from llmmpq.records import Sensitivity
from llmmpq.session import load_tokenizer, open_session

WIDTH_SPREAD = 1.0  # bits: how far a plan's widths scatter around its average
SOLVED_AT = (2.5, 2.75, 3.0, 3.25, 3.5, 4.0)  # true bits per weight
PRECISION_SAMPLE = 10  # pairs measured once more in float64
WINDOW = 512  # of the held-out text
BATCH_TOKENS = 2048  # in one forward: the logits of a few thousand tokens fit anywhere


class Options:
    """Every (linear, option) with its weights, in the order of the rows of Q."""

    def __init__(self, sensitivity: Sensitivity, weights: Mapping[tuple[str, int], torch.Tensor]) -> None:
        assert sensitivity.quadratic is not None
        self.gram = sensitivity.quadratic.gram_OO
        self.keys = [(spec.name, i) for spec in sensitivity.linears for i in range(len(sensitivity.options[spec.name]))]
        self.linear_of = np.array([k for k, s in enumerate(sensitivity.linears) for _ in sensitivity.options[s.name]])
        self.bits = np.array([scheme.bits for spec in sensitivity.linears for scheme in sensitivity.options[spec.name]])
        self.block_of = np.array([spec.block for spec in sensitivity.linears])[self.linear_of]
        self.sizes = np.array([spec.num_weights for spec in sensitivity.linears])
        self.exact = np.array([loss for spec in sensitivity.linears for loss in sensitivity.losses[spec.name]])
        self.weights = weights

    def predictions(self, rows: Sequence[int]) -> dict[str, float]:
        rows = list(rows)
        quadratic = float(self.gram[np.ix_(rows, rows)].sum())
        diagonal, additive = float(self.gram[rows, rows].sum()), float(self.exact[rows].sum())
        return {
            "quadratic": quadratic,
            "mixed": quadratic - diagonal + additive,
            "additive": additive,
            "diagonal": diagonal,
        }

    def average_bits(self, rows: Sequence[int]) -> float:
        return float(self.bits[list(rows)] @ self.sizes / self.sizes.sum())


class Truth:
    """KL of the whole model with some weights replaced, against the original, on fixed windows."""

    def __init__(self, model: transformers.PreTrainedModel, windows: torch.Tensor) -> None:
        self.model = model
        self.parts = windows.split(max(1, BATCH_TOKENS // windows.shape[1]))
        self.reference = [self._log_probabilities(part) for part in self.parts]
        self.probabilities = [expected.exp() for expected in self.reference]

    @torch.no_grad()
    def __call__(self, options: Options, rows: Sequence[int]) -> float:
        old: list[tuple[torch.nn.Linear, torch.Tensor]] = []
        for name, position in (options.keys[row] for row in rows):
            linear = self.model.get_submodule(name)
            assert isinstance(linear, torch.nn.Linear)
            old.append((linear, linear.weight.data))
            linear.weight.data = options.weights[name, position].to(linear.weight.dtype)
        total, num_tokens = 0.0, 0
        for part, expected, p in zip(self.parts, self.reference, self.probabilities, strict=True):
            # KL = E_p[exp(d) - 1 - d] with d the change of the log-probability: no term is negative, so rounding
            # does not drown small figures.
            d = self._log_probabilities(part) - expected
            total += float((torch.expm1(d).sub_(d) * p).sum(-1).double().sum())
            num_tokens += part.numel()
        for linear, weight in old:
            linear.weight.data = weight
        return total / num_tokens

    @torch.no_grad()
    def _log_probabilities(self, part: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(self.model(part).logits, dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--plans", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--two-bit-pairs", type=int, default=100)
    parser.add_argument("--heldout-windows", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work-dir", type=Path, help="keeps the measurement; without it a temporary folder")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    out = args.out or Path(__file__).parent / "results" / f"prediction-{Path(args.model).name}"
    started, versions = time.monotonic(), provenance()

    # Plans and pairs are drawn by the width of each matrix.
    changes = {"model": args.model, "calibration.source": "builtin", "allocation.layer_only": True}
    recipe = load_recipe(args.recipe).override(changes)
    session = open_session(recipe)
    with tempfile.TemporaryDirectory() as scratch:
        root = args.work_dir or Path(scratch)
        with open_job(session, out=root / "none", work_dir=root, progress=Terminal()) as job:
            sensitivity = measure_pairs(job)
            options = Options(sensitivity, candidate_weights(job))
            probe = job.tokens.probe.ids
    folder, model = pipeline.load_model(args.model)
    model = model.float()
    windows = evaluation_windows(load_tokenizer(folder), packaged_text("heldout.txt"), WINDOW)
    spread = np.linspace(0, len(windows) - 1, min(args.heldout_windows, len(windows))).round().astype(int)
    heldout = windows[torch.from_numpy(spread)]
    on_probe = Truth(model, probe)
    print(f"{args.model}: measured after {time.monotonic() - started:.0f} s", flush=True)

    rng = np.random.default_rng(args.seed)
    drawn = [draw_plan(rng, options, average) for average in rng.uniform(2.0, 4.0, args.plans)]
    all_rows = np.arange(len(options.keys))
    uniform = [draw_pair(rng, options, all_rows) for _ in range(args.pairs)]
    narrow = [draw_pair(rng, options, all_rows[options.bits == 2]) for _ in range(args.two_bit_pairs)]

    pairs = [measure_pair(on_probe, options, i, j) for i, j in uniform + narrow]
    for position, point in enumerate(pairs):
        point["sample"] = "uniform" if position < len(uniform) else "2-bit"
    print(f"{args.model}: pairs after {time.monotonic() - started:.0f} s", flush=True)
    plans = [measure_plan(on_probe, options, rows, "random") for rows in drawn]
    plans += [measure_plan(on_probe, options, *found) for found in solved_plans(sensitivity)]
    print(f"{args.model}: plans on the probe after {time.monotonic() - started:.0f} s", flush=True)
    on_heldout = Truth(model, heldout)
    for point in plans:
        point["heldout"] = on_heldout(options, point["rows"])
    precision = float32_error(model, probe, options, pairs[:PRECISION_SAMPLE])

    meta = {
        "date": datetime.now(UTC).date().isoformat(),
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "probe_tokens": probe.numel(),
        "heldout_tokens": heldout.numel(),
        "rounding_kl": sensitivity.quadratic.rounding_kl if sensitivity.quadratic else None,
        "pair_term_error_of_float32": precision,
        "seconds": round(time.monotonic() - started),
        **versions,
    }
    table = tables(plans, pairs)
    save(out, meta, table, plans, pairs, title=f"{Path(args.model).name}, probe of {probe.numel()} tokens")
    print(json.dumps(meta, indent=1))
    print(render(table))


def candidate_weights(job: Job) -> dict[tuple[str, int], torch.Tensor]:
    """The weights that the measuring pass tried, made once more."""
    options, settings, weights = job.session.options(), measure_settings(job), {}
    for block in stream_of(job, follow_original=False, dtype=job.session.measuring_dtype, many=True):
        for spec, position, packed in candidates_of(block, options, settings, warnings=[]):
            weights[spec.name, position] = dequantized(packed, torch.float32).cpu()
    return weights


def draw_plan(rng: np.random.Generator, options: Options, average: float) -> list[int]:
    """A row per linear. Widths follow a bell around a centre that makes their mean the average asked for."""
    rows = []
    for linear in range(len(options.sizes)):
        own = np.flatnonzero(options.linear_of == linear)
        bits = options.bits[own]

        def chances(centre: float, bits: np.ndarray = bits) -> np.ndarray:
            logs = -((bits - centre) ** 2) / (2 * WIDTH_SPREAD**2)
            weights = np.exp(logs - logs.max())
            return weights / weights.sum()

        low, high = -50.0, 60.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if chances(middle) @ bits < average else (low, middle)
        rows.append(int(rng.choice(own, p=chances(low))))
    return rows


def draw_pair(rng: np.random.Generator, options: Options, among: np.ndarray) -> tuple[int, int]:
    while True:
        first, second = rng.choice(among, 2, replace=False)
        if options.linear_of[first] != options.linear_of[second]:
            return int(first), int(second)


def solved_plans(sensitivity: Sensitivity) -> list[tuple[list[int], str]]:
    """What each method would choose: a search finds the plans whose loss the model underestimates, if there are any."""
    found = []
    for with_pairs in (True, False):
        problem = build_problem(sensitivity, pins={}, fuse=False, with_pairs=with_pairs)
        for bits in SOLVED_AT:
            nbytes = int(bits * problem.num_weights / 8)
            if nbytes < problem.smallest_nbytes:
                continue
            if with_pairs:
                choice = solve_quadratic(problem, nbytes, target_gap=0.01, time_limit_s=20.0).choice
            else:
                choice = solve(problem, nbytes, time_limit_s=20.0).choice
            rows = [row for unit, at in zip(problem.units, choice, strict=True) for row in unit.rows[at]]
            found.append((rows, "solved quadratic" if with_pairs else "solved additive"))
    return found


def measure_plan(truth: Truth, options: Options, rows: list[int], kind: str) -> dict[str, Any]:
    bits = options.average_bits(rows)
    return {"kind": kind, "bits": bits, "rows": rows, "probe": truth(options, rows)} | options.predictions(rows)


_alone: dict[tuple[int, int], float] = {}


def measure_pair(truth: Truth, options: Options, i: int, j: int) -> dict[str, Any]:
    for row in (i, j):
        if (id(truth), row) not in _alone:
            _alone[id(truth), row] = truth(options, [row])
    kl_i, kl_j = _alone[id(truth), i], _alone[id(truth), j]
    return {
        "i": i,
        "j": j,
        "bits_i": int(options.bits[i]),
        "bits_j": int(options.bits[j]),
        "names": f"{options.keys[i][0]} {options.keys[j][0]}",
        "one_block": bool(options.block_of[i] == options.block_of[j]),
        "kl_i": kl_i,
        "kl_j": kl_j,
        "true": truth(options, [i, j]) - kl_i - kl_j,
        "predicted": 2 * float(options.gram[i, j]),
    }


def float32_error(
    model: transformers.PreTrainedModel, probe: torch.Tensor, options: Options, pairs: Sequence[Mapping[str, Any]]
) -> float:
    """The largest difference of a true pair term between float32 and float64, in a sample."""
    truth = Truth(model.double(), probe)
    return max(abs(measure_pair(truth, options, p["i"], p["j"])["true"] - p["true"]) for p in pairs)


if __name__ == "__main__":
    main()
