"""The quadratic solver on drawn and measured programs: loss, bound, gap and seconds; SCIP beside it where asked.

    python eval/solver_bench.py [--against-scip] [--large 224,560] [--averages 2.25,2.5,3,3.5,4] [--measured FOLDER]
                                [--believed] [--spectrum demo|deep] [--seed 0] [--target-gap 0] [--spread]

Drawn programs imitate measured Gram matrices. The error of linear i at option o is a vector

    u_io ~ norm_io (sqrt(1 - c) (sqrt(h) (sqrt(1 - s) few_io + sqrt(s) block) + sqrt(1 - h) many_io) + sqrt(c) everyone)

in 8,192 dimensions. few, block and everyone have a spectrum that falls as 1/rank, many one that falls as rank^-1/2;
few and many follow chains over the options (cosine 0.2 to 0.7 between neighbours); block is shared by the linears of a
block and carried on to the next. h and c fall with the bits, fitted to the Gram matrix of a small public model: cosines
between linears have a deviation of 0.1 at 2 bits, 0.034 at 3, 0.02 from 4 on, and a few reach 0.5. Norms squared fall
4.5 times per bit and are lognormal (sigma 1) between linears. Those cosines are of measured matrices, the chance of
the probe included: `--believed` solves what `allocate.shrink` makes of them, with the factors found on the demo at
2,048 probe tokens. All drawn products are shrunk alike, while signal may be of another spectrum than chance.

`--spectrum deep` draws the same way with figures of a trained model of 224 linears (`train_second.py --blocks 32`,
1,024 probe tokens): cosines have a deviation of 0.026 at every width, up to twice that in a block, norms are lognormal
with sigma 1.4, and an option of two widths lies on the line between them. Its factors are far smaller than the demo's.

Measured programs are `.npz` files with sizes, gram, linear, constant, costs and limits (`measured_programs.py`). SCIP
(`pip install pyscipopt`) gets the same program as a convex MIQP in epigraph form, and five times the limit. `--spread`
tells how the drawn products are spread, in the columns that `measured_programs.py` has for measured ones.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

import numpy as np
from products import print_spread, spread_table

from llmmpq.allocate.quadratic import Program, Solved, solve_program
from llmmpq.allocate.shrink import believed
from llmmpq.records import Quadratic, Reliability

BITS = (2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 4.0, 5.0, 6.0, 8.0)


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """What errors are drawn from, and how much of their products is believed; `few`, `block` and so on as above."""

    dimensions: int
    powers: tuple[float, float]  # of few and of many
    head: tuple[float, float, float]  # h at 2 bits, how many times less per bit, the least
    common: tuple[float, float]  # c at 2 bits, how many times less per bit
    block_share: float  # the largest s; half the linears have none
    sigma: float
    norms: tuple[float, ...] = ()  # squared, at BITS; none: 4.5 times less per bit
    next_cosines: tuple[float, ...] = ()  # of each of BITS to the next; none: drawn for each linear
    believed_bits: tuple[float, ...]
    believed: tuple[tuple[float, ...], tuple[float, ...]]  # factors between blocks, and in one

    def norm(self, width: float) -> float:
        return float(np.exp(np.interp(width, BITS, np.log(self.norms)))) if self.norms else 4.5 ** (2 - width)

    def kept(self, option: int, drawn: float) -> float:
        return self.next_cosines[option - 1] if self.next_cosines else drawn


# Factors: means of three measurements of the demo, of 2,048 probe tokens each; of the deep model, one of 1,024 tokens.
SPECTRA = {
    "demo": Spectrum(
        dimensions=8192,
        powers=(1.0, 0.5),
        head=(0.7, 3.2, 0.0),
        common=(0.05, 4.0),
        block_share=0.5,
        sigma=1.0,
        believed_bits=(2.0, 3.0, 4.0, 8.0),
        believed=((0.59, 0.44, 0.37, 0.33), (0.945, 0.815, 0.58, 0.33)),
    ),
    "deep": Spectrum(
        dimensions=3072,
        powers=(0.6, 0.5),
        head=(0.3, 1.67, 0.16),
        common=(0.003, 3.0),
        block_share=0.65,
        sigma=1.42,
        norms=(1.0, 0.756, 0.536, 0.360, 0.206, 0.155, 0.1126, 0.0469, 0.0290, 0.0165, 1.65e-4),
        next_cosines=(0.54, 0.52, 0.46, 0.21, 0.425, 0.415, 0.09, 0.40, 0.46, 0.0),
        believed_bits=BITS,
        believed=(
            (0.29, 0.245, 0.25, 0.225, 0.195, 0.205, 0.15, 0.165, 0.11, 0.055, 0.15),
            (0.65, 0.615, 0.555, 0.4, 0.36, 0.275, 0.255, 0.2, 0.175, 0.095, 0.255),
        ),
    ),
}
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
    parser.add_argument("--spectrum", choices=sorted(SPECTRA), default="demo", help="of the large programs")
    parser.add_argument("--seed", type=int, default=0, help="of the large programs")
    parser.add_argument("--spread", action="store_true", help="tell how the products of large programs are spread")
    parser.add_argument("--time-limit", type=float, default=60.0, help="of measured programs and SCIP's")
    parser.add_argument("--target-gap", type=float, default=0.0, help="of measured programs")
    args = parser.parse_args()
    print(f"{'program':28} {'loss':>13} {'bound':>13} {'gap %':>8} {'status':>10} {'s':>6}")
    if args.measured:
        for path in sorted(args.measured.glob("*.npz")):
            report(path.stem, load_measured(path), target_gap=args.target_gap, time_limit_s=args.time_limit)
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
            spectrum = SPECTRA[args.spectrum]
            program = draw_program(num_units, bits=BITS, average=average, seed=args.seed, spectrum=spectrum)
            if args.spread:
                show_spread(program)
            if args.believed:
                program = shrink_program(program, bits=BITS, spectrum=spectrum)
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


def show_spread(program: Program) -> None:
    linear_O = np.repeat(np.arange(len(program.sizes)), program.sizes)
    block_O, bits_O = linear_O // len(SHAPES[224]), np.tile(BITS, len(program.sizes))
    print_spread(spread_table(program.gram_OO, linear_O=linear_O, block_O=block_O, bits_O=bits_O))


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


def draw_program(
    num_units: int, *, bits: tuple[float, ...], average: float, seed: int, spectrum: Spectrum = SPECTRA["demo"]
) -> Program:
    random = np.random.default_rng(seed)
    shapes = SHAPES[224 if num_units <= 224 else 560]
    weights = [rows * columns for rows, columns in (shapes[unit % len(shapes)] for unit in range(num_units))]
    few, many = (
        np.sqrt(rank / rank.sum()).astype(np.float32)
        for rank in (np.arange(1.0, spectrum.dimensions + 1) ** -power for power in spectrum.powers)
    )

    def direction(spread: np.ndarray) -> np.ndarray:
        return random.standard_normal(spectrum.dimensions, dtype=np.float32) * spread

    everyone, block = direction(few), direction(few)
    errors = np.empty((num_units * len(bits), spectrum.dimensions), dtype=np.float32)
    for unit in range(num_units):
        if unit % len(shapes) == 0:
            block = 0.6 * block + 0.8 * direction(few)
        share = spectrum.block_share * random.random() * (random.random() < 0.5)
        drawn, own_few, own_many = random.uniform(0.2, 0.7), direction(few), direction(many)
        size = np.exp(spectrum.sigma * random.standard_normal()) * np.sqrt(weights[unit] / weights[0])
        for option, width in enumerate(bits):
            if option:
                kept = spectrum.kept(option, drawn)
                own_few = kept * own_few + np.sqrt(1 - kept**2) * direction(few)
                own_many = kept * own_many + np.sqrt(1 - kept**2) * direction(many)
            head = max(spectrum.head[2], spectrum.head[0] * spectrum.head[1] ** (2 - width))
            common = spectrum.common[0] * spectrum.common[1] ** (2 - width)
            mixed = np.sqrt(head) * (np.sqrt(1 - share) * own_few + np.sqrt(share) * block)
            mixed = np.sqrt(1 - common) * (mixed + np.sqrt(1 - head) * own_many) + np.sqrt(common) * everyone
            errors[unit * len(bits) + option] = mixed * np.sqrt(size * spectrum.norm(width)) / np.linalg.norm(mixed)
    gram = (errors @ errors.T).astype(np.float64)
    return Program(
        sizes=(len(bits),) * num_units,
        gram_OO=0.5 * (gram + gram.T),
        linear_O=np.zeros(len(gram)),
        constant=0.0,
        costs_KO=np.array([[int(weight * width) // 8 for weight in weights for width in bits]], dtype=np.int64),
        limits=(int(average * sum(weights) / 8),),
    )


def shrink_program(program: Program, *, bits: tuple[float, ...], spectrum: Spectrum = SPECTRA["demo"]) -> Program:
    num_units = len(program.sizes)
    across, within = (np.tile(np.interp(bits, spectrum.believed_bits, one), num_units) for one in spectrum.believed)
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
