"""Quadratic programs of a measured model, for `solver_bench.py --measured`, and how its products are spread.

    python eval/measured_programs.py MODEL OUT [--tokens 2048] [--group-size 32] [--averages 2.25,2.5,3,3.5,4]

Eleven options for each linear: widths 2, 3, 4 and 8, and profiles between them. The measurement is the library's own
pass and lies in --work-dir, where a second call finds it. Each average gives two files, OUT/NAME-raw-AVERAGE.npz with
the products as measured and OUT/NAME-shrunk-AVERAGE.npz with what is believed of them. An average is of the codes: the
limit is the bytes of a plan with this mean, between those of the whole widths.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
from products import print_spread, spread_table

from llmmpq.allocate.problem import Problem, build_problem
from llmmpq.allocate.solve import to_program
from llmmpq.job import open_job
from llmmpq.measuring import measure_pairs
from llmmpq.progress import Terminal
from llmmpq.recipe import Recipe, load_recipe
from llmmpq.records import Sensitivity
from llmmpq.session import open_session

PROFILES = (2.25, 2.5, 2.75, 3.25, 3.5, 5.0, 6.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--averages", default="2.25,2.5,3,3.5,4")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work-dir", type=Path)
    args = parser.parse_args()
    recipe = load_recipe(args.recipe).override(
        {
            "model": args.model,
            "quantizer.group_size": args.group_size,
            "allocation.profiles": list(PROFILES),
            "measurement.tokens": args.tokens,
            "run.threads": args.threads,
        }
    )
    sensitivity = measure(recipe, args.out, args.work_dir)
    problem = build_problem(sensitivity, pins={}, fuse=False, with_pairs=True)
    show(sensitivity)
    args.out.mkdir(parents=True, exist_ok=True)
    for average in (float(text) for text in args.averages.split(",")):
        save(problem, args.out, f"{Path(args.model).name}", average)


def measure(recipe: Recipe, out: Path, work_dir: Path | None) -> Sensitivity:
    with open_job(open_session(recipe), out=out, work_dir=work_dir, progress=Terminal()) as job:
        return measure_pairs(job)


def show(sensitivity: Sensitivity) -> None:
    """The spread of the products, and the factors that say how much of them is signal."""
    quadratic = sensitivity.quadratic
    assert quadratic is not None
    counts = [len(sensitivity.options[spec.name]) for spec in sensitivity.linears]
    bits_O = np.array(
        [scheme.code_bits(spec.shape) for spec in sensitivity.linears for scheme in sensitivity.options[spec.name]]
    )
    bits_O = np.round(4 * bits_O) / 4
    print(f"{len(counts)} linears, {sum(counts)} options, {sensitivity.num_tokens} probe tokens")
    print_spread(
        spread_table(
            quadratic.gram_OO,
            linear_O=np.repeat(np.arange(len(counts)), counts),
            block_O=np.repeat([spec.block for spec in sensitivity.linears], counts),
            bits_O=bits_O,
        )
    )
    reliability = quadratic.reliability
    if reliability is None:
        return
    within_O = np.sqrt(reliability.across_O**2 + reliability.within_O**2)
    print("factors: bits, between blocks, in a block")
    for bits in np.unique(bits_O):
        first = int(np.flatnonzero(bits_O == bits)[0])
        print(f"{bits:6.2f} {reliability.across_O[first]:8.3f} {within_O[first]:8.3f}")


def save(problem: Problem, folder: Path, name: str, average: float) -> None:
    quadratic = problem.quadratic
    assert quadratic is not None
    raw = dataclasses.replace(problem, quadratic=dataclasses.replace(quadratic, reliability=None))
    for kind, one in (("raw", raw), ("shrunk", problem)):
        program = to_program(one, limit_at(problem, average))
        np.savez(
            folder / f"{name}-{kind}-{average:g}.npz",
            sizes=program.sizes,
            gram=program.gram_OO,
            linear=program.linear_O,
            constant=program.constant,
            costs=program.costs_KO,
            limits=program.limits,
        )


def limit_at(problem: Problem, average: float) -> int:
    """The bytes of a plan whose codes have this mean; between whole widths, those of the nearest two in proportion."""
    widths = sorted({bits for unit in problem.units for bits in unit.code_bits if bits == int(bits)})
    shared = [bits for bits in widths if all(bits in unit.code_bits for unit in problem.units)]
    totals = [sum(unit.nbytes[unit.code_bits.index(bits)] for unit in problem.units) for bits in shared]
    return int(np.interp(average, shared, totals))


if __name__ == "__main__":
    main()
