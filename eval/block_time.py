"""How long one block of an 8B-shaped model takes to quantize on this CPU, and where the time goes.

    python eval/synthetic.py /tmp/block8b --blocks 1 --hidden 4096 --intermediate 14336 --kv-heads 8 --vocab 4096
    python eval/block_time.py /tmp/block8b [--bits 3] [--tokens 2048] [--threads 2] [--tune 0] [--unshaped]

Runs the whole command in this process under a profiler; its own cost is far below a percent here, where nearly all of
the time passes inside torch. The parts are steps of `execute.quantize_block`; what is left over is hashing and loading
the model, embedding, running the block and writing the folder.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import resource
import tempfile
import time
from pathlib import Path

from llmmpq import pipeline
from llmmpq.recipe import load_recipe

PARTS = {
    "gradients for the metric": ("output_metric.py", "pull_back"),
    "second moments": ("moments.py", "add"),
    "... and their means": ("moments.py", "means"),
    "error correction, targets": ("correct.py", "correction_target"),
    "error correction, weights": ("correct.py", "corrected_weight"),
    "factor (Cholesky, inverse)": ("gptq.py", "factorize"),
    "scales and zeros": ("grid.py", "find_grid"),
    "GPTQ": ("gptq.py", "gptq"),
    "descent": ("descent.py", "descend"),
    "errors moved to other rows": ("shape.py", "pass_on_"),
    "packing": ("linear.py", "pack_codes"),
    "tuning": ("tuning.py", "tune_block"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder with one block")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sweeps", type=int, default=3)
    parser.add_argument("--tune", type=int, default=0)
    parser.add_argument("--unshaped", action="store_true", help="rows share no errors")
    args = parser.parse_args()
    recipe = load_recipe("cpu").override(
        {
            "model": args.model,
            "budget.bits": args.bits,
            "calibration.source": "builtin",
            "calibration.tokens": args.tokens,
            "quantizer.sweeps": args.sweeps,
            "quantizer.tune": args.tune,
            "quantizer.shape_errors": not args.unshaped,
            "run.threads": args.threads,
        }
    )
    profile = cProfile.Profile()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        profile.runcall(pipeline.quantize_model, recipe, out=Path(folder) / "out")
        seconds = time.perf_counter() - started
    times = {
        (Path(file).name, function): cumulative
        for (file, _, function), (_, _, _, cumulative, _) in pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
    }
    print(f"{args.bits} bits, {args.tokens} tokens, {args.threads} threads: {seconds:.1f} s")
    for name, key in PARTS.items():
        print(f"  {name:28s} {times.get(key, 0.0):7.1f} s")
    print(f"  {'the rest':28s} {seconds - sum(times.get(key, 0.0) for key in PARTS.values()):7.1f} s")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
