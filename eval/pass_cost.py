"""What the cross-layer pass costs: block forwards against the formula, time, memory with states here or on disk.

    python eval/pass_cost.py [--model demo] [--tokens 2048] [--options 11] [--memory 8GB] [--threads 2]

Candidates are widths 2, 3, 4 and 8 in groups of 32, 64 and 128. The formula: the sum over blocks of the candidates so
far, and two more trajectories (the original, and the original in bfloat16). Prints Q's digest beside, so that two runs
can be compared: with `--memory 256MB` the states wait on disk and Q must be the same to 1e-6.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from llmmpq.job import open_job
from llmmpq.measure.candidates import candidates_of
from llmmpq.measure.perturb import expected_forwards
from llmmpq.measuring import measure_settings
from llmmpq.progress import Silent
from llmmpq.quantize.linear import dequantized
from llmmpq.quantizing import finish_ride, start_ride, stream_of
from llmmpq.recipe import load_recipe
from llmmpq.records import Scheme
from llmmpq.session import open_session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--options", type=int, default=11)
    parser.add_argument("--memory", default="8GB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", type=Path, help="a .npy file: where to keep Q, or what to compare it with")
    args = parser.parse_args()
    schemes = [Scheme(bits=bits, group_size=size) for bits in (2, 3, 4, 8) for size in (128, 64, 32)][: args.options]
    recipe = load_recipe("demo").override(
        {
            "model": args.model,
            "budget.avg_bits": 4.0,
            "calibration.source": "builtin",
            "calibration.window": args.window,
            "measurement.tokens": args.tokens,
            "measurement.memory": args.memory,
            "run.threads": args.threads,
        }
    )
    session = open_session(recipe)
    options = {spec.name: schemes for spec in session.skeleton.linears}
    per_block = [
        len(schemes) * len(session.skeleton.block_linears(index)) for index in range(len(session.skeleton.block_names))
    ]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        with open_job(session, out=out, work_dir=Path(scratch) / "work", progress=Silent()) as job:
            settings = measure_settings(job)
            stream = stream_of(job, follow_original=False, many=True)
            ride = start_ride(job, stream, num_rows=sum(per_block), folder=Path(scratch), base_is_original=True)
            for block in stream:
                made = candidates_of(block, options, settings, warnings=[])
                weights = ((spec, dequantized(packed, torch.float32)) for spec, _, packed in made)
                ride.through(block, weights, on_forward=lambda num: None)
            rode = time.monotonic()
            found = finish_ride(job, stream, ride, label="pairs")
            place = ride.store.place
            ride.store.close()
    formula = expected_forwards(per_block, extra=2)
    states = sum(per_block) * found.num_tokens * session.skeleton.model.config.get_text_config().hidden_size * 4
    print(f"{args.model}: {len(per_block)} blocks, {sum(per_block)} candidates, {found.num_tokens} probe tokens")
    bare = formula - 2 * len(per_block)
    print(f"block forwards {found.num_forwards:.0f}, formula {formula}, without the two extra {bare}")
    print(
        f"blocks and candidates {rode - started:.1f} s, pairs {time.monotonic() - rode:.1f} s, {args.threads} threads"
    )
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"states {states / 1e6:.0f} MB on the {place}, peak memory {peak / 1e6:.0f} MB")
    if args.save and args.save.is_file():
        scale = np.sqrt(np.outer(np.diag(found.gram_CC), np.diag(found.gram_CC)))
        print(f"largest difference from {args.save}: {(np.abs(found.gram_CC - np.load(args.save)) / scale).max():.2e}")
    elif args.save:
        np.save(args.save, found.gram_CC)


if __name__ == "__main__":
    main()
