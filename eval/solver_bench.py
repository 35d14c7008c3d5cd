"""The quadratic solver on drawn and measured programs: loss, bound, gap and seconds; SCIP beside it where asked.

    python eval/solver_bench.py [--against-scip] [--large 224,560] [--averages 2.25,2.5,3,3.5,4] [--measured FOLDER]

Drawn programs imitate measured Gram matrices. The error of linear i at option o is a vector

    u_io ~ norm_io (sqrt(1 - c) (sqrt(h) (sqrt(1 - s) few_io + sqrt(s) block) + sqrt(1 - h) many_io) + sqrt(c) everyone)

in 8,192 dimensions. few, block and everyone have a spectrum that falls as 1/rank, many one that falls as rank^-1/2;
few and many follow chains over the options (cosine 0.2 to 0.7 between neighbours); block is shared by the linears of a
block and carried on to the next. h and c fall with the bits, fitted to the Gram matrix of a small public model: cosines
between linears have a deviation of 0.1 at 2 bits, 0.034 at 3, 0.02 from 4 on, and a few reach 0.5. Norms squared fall
4.5 times per bit and are lognormal (sigma 1) between linears. Those cosines are of measured matrices, the chance of
the probe included: `--believed` solves what `allocate.shrink` makes of them, with the factors found on the demo at
2,048 probe tokens. Nobody has measured the factors of a model of this size; and all drawn products are shrunk alike,
while signal may be of another spectrum than chance. Measured programs are `.npz` files with
sizes, gram, linear, constant, costs and limits. SCIP (`pip install pyscipopt`) gets the same program as a convex
MIQP in epigraph form, and the same time limit.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from time import monotonic

import numpy as np

from llmmpq.allocate.quadratic import Program, Solved, solve_program
from llmmpq.allocate.shrink import believed
from llmmpq.records import Quadratic, Reliability

BITS = (2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 4.0, 5.0, 6.0, 8.0)
DIMENSIONS = 8192
SPECTRA = (1.0, 0.5)  # of the directions that low bits share, and of the rest
# Factors across blocks and within one: means of three measurements of the demo, of 2,048 probe tokens each.
BELIEVED_BITS = (2.0, 3.0, 4.0, 8.0)
BELIEVED = ((0.59, 0.44, 0.37, 0.33), (0.945, 0.815, 0.58, 0.33))
SHAPES = {
    224: [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)],
    560: [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against-scip", action="store_true")
    parser.add_argument("--large", default="224,560", help="numbers of linears; empty for none")
    parser.add_argument("--averages", default="2.25,2.5,3,3.5,4")
    parser.add_argument("--believed", action="store_true", help="products of the large programs shrunk")
    parser.add_argument("--measured", type=Path, help="a folder of .npz programs")
    parser.add_argument("--time-limit", type=float, default=60.0)
    args = parser.parse_args()
    print(f"{'program':28} {'loss':>13} {'bound':>13} {'gap %':>8} {'status':>10} {'s':>6}")
    if args.measured:
        for path in sorted(args.measured.glob("*.npz")):
            report(path.stem, load_measured(path), target_gap=0.0, time_limit_s=args.time_limit)
    if args.against_scip:
        for number in range(20):
            num_units = (24, 35)[number % 2]
            program = draw_program(
                num_units, bits=(2.0, 3.0, 4.0, 8.0), average=(2.5, 3.0, 3.5)[number % 3], seed=number
            )
            name = f"{num_units} x 4, seed {number}"
            solved = report(name, program, target_gap=0.0, time_limit_s=args.time_limit)
            start = monotonic()
            loss, status = solve_with_scip(program, time_limit_s=5 * args.time_limit)
            verdict = "equal" if abs(loss - solved.loss) <= 1e-6 * abs(loss) else "DIFFERENT"
            print(
                f"{'  SCIP':28} {loss:13.6g} {'':13} {verdict:>8} {status:>10} {monotonic() - start:6.1f}", flush=True
            )
    for num_units in (int(text) for text in args.large.split(",") if text):
        for average in (float(text) for text in args.averages.split(",")):
            program = draw_program(num_units, bits=BITS, average=average, seed=0)
            if args.believed:
                program = shrink_program(program, bits=BITS)
            limit = 10.0 if num_units <= 224 else 60.0
            report(f"{num_units} x {len(BITS)}, {average} bits", program, target_gap=1e-3, time_limit_s=limit)


def report(name: str, program: Program, *, target_gap: float, time_limit_s: float) -> Solved:
    start = monotonic()
    solved = solve_program(program, target_gap=target_gap, time_limit_s=time_limit_s)
    seconds = monotonic() - start
    print(
        f"{name:28} {solved.loss:13.6g} {solved.bound:13.6g} {100 * solved.gap:8.4f} "
        f"{solved.status:>10} {seconds:6.1f}",
        flush=True,
    )
    return solved


def load_measured(path: Path) -> Program:
    with np.load(path) as arrays:
        return Program(
            sizes=tuple(int(size) for size in arrays["sizes"]),
            gram_OO=arrays["gram"],
            linear_O=arrays["linear"],
            constant=float(arrays["constant"]),
            costs_KO=arrays["costs"],
            limits=tuple(int(limit) for limit in arrays["limits"]),
        )


def draw_program(num_units: int, *, bits: tuple[float, ...], average: float, seed: int) -> Program:
    random = np.random.default_rng(seed)
    shapes = SHAPES[224 if num_units <= 224 else 560]
    weights = [rows * columns for rows, columns in (shapes[unit % len(shapes)] for unit in range(num_units))]
    few, many = (
        np.sqrt(rank / rank.sum()).astype(np.float32)
        for rank in (np.arange(1.0, DIMENSIONS + 1) ** -power for power in SPECTRA)
    )

    def direction(spread: np.ndarray) -> np.ndarray:
        return random.standard_normal(DIMENSIONS, dtype=np.float32) * spread

    everyone, block = direction(few), direction(few)
    errors = np.empty((num_units * len(bits), DIMENSIONS), dtype=np.float32)
    for unit in range(num_units):
        if unit % len(shapes) == 0:
            block = 0.6 * block + 0.8 * direction(few)
        share = 0.5 * random.random() * (random.random() < 0.5)
        kept, own_few, own_many = random.uniform(0.2, 0.7), direction(few), direction(many)
        size = np.exp(random.standard_normal()) * np.sqrt(weights[unit] / weights[0])
        for option, width in enumerate(bits):
            if option:
                own_few = kept * own_few + np.sqrt(1 - kept**2) * direction(few)
                own_many = kept * own_many + np.sqrt(1 - kept**2) * direction(many)
            head, common = 0.7 * 3.2 ** (2 - width), 0.05 * 4.0 ** (2 - width)
            mixed = np.sqrt(head) * (np.sqrt(1 - share) * own_few + np.sqrt(share) * block)
            mixed = np.sqrt(1 - common) * (mixed + np.sqrt(1 - head) * own_many) + np.sqrt(common) * everyone
            errors[unit * len(bits) + option] = mixed * np.sqrt(size * 4.5 ** (2 - width)) / np.linalg.norm(mixed)
    gram = (errors @ errors.T).astype(np.float64)
    return Program(
        sizes=(len(bits),) * num_units,
        gram_OO=0.5 * (gram + gram.T),
        linear_O=np.zeros(len(gram)),
        constant=0.0,
        costs_KO=np.array([[int(weight * width) // 8 for weight in weights for width in bits]], dtype=np.int64),
        limits=(int(average * sum(weights) / 8),),
    )


def shrink_program(program: Program, *, bits: tuple[float, ...]) -> Program:
    num_units = len(program.sizes)
    across, within = (np.tile(np.interp(bits, BELIEVED_BITS, factors), num_units) for factors in BELIEVED)
    gram_OO, linear_O = believed(
        Quadratic(
            gram_OO=program.gram_OO,
            linear_O=program.linear_O,
            constant=program.constant,
            base=None,
            base_kl=0.0,
            rounding_kl=None,
            reliability=Reliability(
                across_O=across,
                within_O=np.sqrt(within**2 - across**2),
                block_O=np.repeat(np.arange(num_units) // len(SHAPES[224]), len(bits)),
            ),
        )
    )
    return replace(program, gram_OO=gram_OO, linear_O=linear_O)


def solve_with_scip(program: Program, *, time_limit_s: float) -> tuple[float, str]:
    """minimise t + linear'x with t >= |R x|^2 and R'R = gram, so that SCIP sees a sum of squares."""
    import pyscipopt

    values, vectors = np.linalg.eigh(program.gram_OO)
    scale = 1.0 / max(float(values[-1]), np.finfo(np.float64).tiny)
    keep = values > 1e-13 * values[-1]
    factor = np.sqrt(values[keep] * scale)[:, None] * vectors[:, keep].T
    model = pyscipopt.Model()
    model.hideOutput()
    model.setParam("limits/time", time_limit_s)
    model.setParam("limits/gap", 1e-8)
    model.setParam("numerics/feastol", 1e-9)
    x = [model.addVar(vtype="B") for _ in range(len(program.linear_O))]
    y = [model.addVar(lb=None) for _ in range(len(factor))]
    t = model.addVar(lb=0.0)
    for unit, size in zip(program.starts, program.sizes, strict=True):
        model.addCons(pyscipopt.quicksum(x[unit : unit + size]) == 1)
    for cost, limit in zip(program.costs_KO, program.limits, strict=True):
        largest = max(limit, 1)
        model.addCons(pyscipopt.quicksum(float(c) / largest * v for c, v in zip(cost, x, strict=True)) <= 1)
    for row, v in zip(factor, y, strict=True):
        model.addCons(pyscipopt.quicksum(float(c) * w for c, w in zip(row, x, strict=True)) == v)
    model.addCons(pyscipopt.quicksum(v * v for v in y) <= t)
    model.setObjective(
        t + pyscipopt.quicksum(float(c) * scale * v for c, v in zip(program.linear_O, x, strict=True)), "minimize"
    )
    model.optimize()
    if model.getNSols() == 0:
        return float("inf"), str(model.getStatus())
    picked = [
        int(np.argmax([model.getVal(v) for v in x[unit : unit + size]]))
        for unit, size in zip(program.starts, program.sizes, strict=True)
    ]
    return program.loss(picked), str(model.getStatus())


if __name__ == "__main__":
    main()
