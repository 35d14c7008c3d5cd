"""Time of each kernel on the linears of Llama-3.1-8B and 70B, beside cuBLAS, torch's int4 product and GemLite.

    python eval/kernel_bench.py                     # on a GPU: eval/results/kernels-<device>.csv, under 8 minutes
    python eval/kernel_bench.py --seconds 200       # stops after so long, the most wanted shapes first
    python eval/kernel_bench.py --rows 1,16 --formats 3,4
    TRITON_INTERPRET=1 python eval/kernel_bench.py --smoke     # no GPU: tiny shapes, that the script itself works

A figure is the median of several replays of a CUDA graph with many launches, so launching costs nothing; each launch
has another copy of the operands, and the copies together exceed the second-level cache several times. Before a kernel
is timed, its result is compared with the reference's in float32, column by column, in memory that held NaN before. One
that is wrong or does not compile gets a line without a time, and the exit code is 1 in the end. Lines are written as
they come.

First come matrices with one input, q, k and v, and gate and up: `apart` is a launch for each, `together` one for all,
and both must give the same bits. Without `eager` they are in a graph too; with it, it is the host that launches them.

Needs torch, triton and `kernels/torch-ext` alone: neither the toolkit nor a network.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from arguments import names_among
from kernel_clock import OTHERS, copy_gbytes_per_s, cublas, eager_microseconds, microseconds
from kernel_operands import FORMATS, GROUP_SIZE, ROOT, copies_of, random_operands, stored_nbytes, weights_of

from llmmpq_kernels import together, tuning
from llmmpq_kernels.operands import Operands, refusal_together

# (N, K) of q and o, k and v, gate and up, down; the two of the targets first.
SHAPES = [
    (4096, 14336),
    (8192, 28672),
    (14336, 4096),
    (28672, 8192),
    (4096, 4096),
    (8192, 8192),
    (1024, 4096),
    (1024, 8192),
]
# What has one input, by its shapes: q, k and v, gate and up, of 8B and 70B.
Sets = list[tuple[str, tuple[tuple[int, int], ...]]]
SETS: Sets = [
    ("qkv 8b", ((4096, 4096), (1024, 4096), (1024, 4096))),
    ("gate+up 8b", ((14336, 4096), (14336, 4096))),
    ("qkv 70b", ((8192, 8192), (1024, 8192), (1024, 8192))),
    ("gate+up 70b", ((28672, 8192), (28672, 8192))),
]
SMOKE_SETS: Sets = [("qkv smoke", ((64, 2048), (32, 2048), (16, 2048)))]
TOGETHER_FORMATS = ["3", "4", "mixed 2.5"]
ROWS = [1, 4, 16, 64, 2048]
OURS = (*tuning.BACKENDS, "together")
TOLERANCE = 1.2e-2  # of bfloat16, as in tests/kernels
COMPILERS = 8  # processes that fill Triton's cache before anything is timed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. `share` is that of the bandwidth of a copy; `speedup` is against cuBLAS in bfloat16."""

    shape: str
    format: str
    bits: float
    rows: int
    backend: str
    microseconds: float
    gbytes_per_s: float
    share: float
    speedup: float
    error: float


def worst_error(backend: str, x: torch.Tensor, operands: Operands, weights: torch.Tensor) -> float:
    """Of the output columns: the length of the error over that of the column, or of its terms where they cancel."""
    x32 = x.float()
    wanted, squares = x32 @ weights.T, x32**2 @ (weights**2).T
    # With this set, torch.empty fills with NaN: an output left out is seen. cuBLAS would ask for a setting of its own.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        y = tuning.multiply(backend, x, operands).float()
    except Exception as failure:  # whatever a compiler or a driver raises: what else was measured stays
        print(f"{backend}, {operands.shape}, {len(x)} rows: {type(failure).__name__}: {failure}", file=sys.stderr)
        return float("nan")
    finally:
        torch.use_deterministic_algorithms(False)
    return float(((y - wanted).norm(dim=0) / torch.maximum(wanted.norm(dim=0), squares.sum(dim=0).sqrt())).max())


def apart(x: torch.Tensor, members: Sequence[Operands]) -> list[torch.Tensor]:
    return [tuning.multiply("gemv", x, operands) for operands in members]


def sets_of(sets: Sets, formats: list[str]) -> Iterator[tuple[str, str, list[tuple[tuple[int, int], str]]]]:
    """Each set in each format, and then its members in turn in all of them."""
    for label, shapes in sets:
        for name in formats:
            yield label, name, [(shape, name) for shape in shapes]
        if len(formats) > 1:
            yield label, "several", [(shape, formats[place % len(formats)]) for place, shape in enumerate(shapes)]


def measure_together(
    sets: Sets,
    formats: list[str],
    rows: list[int],
    *,
    device: torch.device,
    copy: float,
) -> Iterator[Row]:
    """Sets with one input, for as many rows as may share a launch. `speedup` is against a launch for each."""
    for label, name, wanted in sets_of(sets, formats):
        members = [random_operands(shape, form, device, seed=place) for place, (shape, form) in enumerate(wanted)]
        refused = refusal_together([(each.shape, each.runs, each.group_size) for each in members])
        if refused is not None:
            print(f"{label}, {name}: no shared launch: {refused}", file=sys.stderr)
            continue
        nbytes, num_weights = sum(map(stored_nbytes, members)), sum(shape[0] * shape[1] for shape, _ in wanted)
        copies = copies_of(members)
        for num in rows:
            if num > together.MOST_ROWS or tuning.backend_for(num, tuning.launch_on(device)) != "gemv":
                continue
            x = torch.randn(num, wanted[0][0][1], device=device, dtype=torch.bfloat16)
            error = together_error(x, members)
            times = {}
            for backend, call in (("apart", apart), ("together", tuning.multiply_together)):
                calls = [partial(call, x, each) for each in copies]
                for kind, timed in (("", microseconds), (" eager", eager_microseconds)):
                    times[backend + kind] = timed(calls, device) if error < TOLERANCE else float("nan")
            for backend, taken in times.items():
                rate = (nbytes + 2 * num * (x.shape[1] + sum(shape[0] for shape, _ in wanted))) / taken / 1000
                base = times[backend.replace("together", "apart")]
                yield Row(
                    shape=label,
                    format=name,
                    bits=round(8 * nbytes / num_weights, 4),
                    rows=num,
                    backend=backend,
                    microseconds=round(taken, 2),
                    gbytes_per_s=round(rate, 1),
                    share=round(rate / copy, 4),
                    speedup=round(base / taken, 3),
                    error=round(error, 6),
                )


def together_error(x: torch.Tensor, members: Sequence[Operands]) -> float:
    """The worst of the members' errors, NaN where a launch for all gives other bits than one for each, or fails."""
    errors = [worst_error("gemv", x, each, weights_of(each, torch.float32)) for each in members]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        found, alone = tuning.multiply_together(x, members), apart(x, members)
    except Exception as failure:  # as in `worst_error`
        print(f"together, {[each.shape for each in members]}: {type(failure).__name__}: {failure}", file=sys.stderr)
        return float("nan")
    finally:
        torch.use_deterministic_algorithms(False)
    return max(errors) if all(map(torch.equal, found, alone)) else float("nan")


def backends_for(num_rows: int, device: torch.device) -> list[str]:
    """The one that runs, and at many rows its rival too: a fused product may not lose to dequantizing first."""
    chosen = tuning.backend_for(num_rows, tuning.launch_on(device))
    return [chosen, "gemm"] if chosen == "dequantized" else [chosen]


def measure(
    shapes: list[tuple[int, int]], formats: list[str], rows: list[int], *, device: torch.device, copy: float
) -> Iterator[Row]:
    for shape in shapes:
        inputs = {num: torch.randn(num, shape[1], device=device, dtype=torch.bfloat16) for num in rows}
        plain = {num: cublas(shape, x) for num, x in inputs.items()}

        def row(
            name: str, bits: float, num: int, backend: str, taken: float, error: float, shape=shape, plain=plain
        ) -> Row:
            moved = shape[0] * shape[1] * bits / 8 + 2 * num * (shape[0] + shape[1])
            rate = moved / taken / 1000
            return Row(
                shape=f"{shape[0]}x{shape[1]}",
                format=name,
                bits=round(bits, 4),
                rows=num,
                backend=backend,
                microseconds=round(taken, 2),
                gbytes_per_s=round(rate, 1),
                share=round(rate / copy, 4),
                speedup=round(plain[num] / taken, 3),
                error=error,
            )

        for num in rows:
            yield row("bfloat16", 16.0, num, "cublas", plain[num], 0.0)
        for name in formats:
            operands = random_operands(shape, name, device)
            copies = [each for (each,) in copies_of([operands])]
            bits = 8 * stored_nbytes(operands) / (shape[0] * shape[1])
            weights = weights_of(operands, torch.float32)
            for num, x in inputs.items():
                for backend in backends_for(num, device):
                    error, taken = worst_error(backend, x, operands, weights), float("nan")
                    if error < TOLERANCE:
                        calls = [partial(tuning.multiply, backend, x, each) for each in copies]
                        taken = microseconds(calls, device)
                    yield row(name, bits, num, backend, taken, round(error, 6))
            del copies, weights
        for name, other in OTHERS.items():
            for num, x in inputs.items():
                try:
                    taken = other(shape, x)
                except Exception as error:  # not installed, or not for this shape: a line of the table says nothing
                    print(f"{name} at {shape}, {num} rows: {type(error).__name__}: {error}"[:160], file=sys.stderr)
                    break
                yield row(name, 4 + 32 / GROUP_SIZE, num, name, taken, float("nan"))


def fill_compiler_cache(arguments: argparse.Namespace, device: torch.device) -> int:
    """Every kernel compiled once, by several processes: compiling one after the other would take most of the time.

    How many of them failed. What they left out fails again where it is measured, and costs no more than its own line.
    """
    if device.type != "cuda":
        return 0
    script = [sys.executable, __file__, *(["--smoke"] if arguments.smoke else [])]
    script += ["--rows", arguments.rows, "--formats", ",".join(arguments.formats)]
    processes = [subprocess.Popen([*script, "--compile", str(index)]) for index in range(COMPILERS)]
    codes = [process.wait() for process in processes]
    for index, code in enumerate(codes):
        if code:
            print(f"compiling process {index} of {COMPILERS} ended with code {code}", file=sys.stderr)
    return sum(code != 0 for code in codes)


def compiles(what: str, launch: Callable[[], object]) -> bool:
    try:
        launch()
    except Exception as failure:  # whatever a compiler raises: the other kernels are compiled all the same
        print(f"{what} was not compiled: {type(failure).__name__}: {failure}", file=sys.stderr)
        return False
    return True


def compile_share(
    index: int, shapes: list[tuple[int, int]], formats: list[str], rows: list[int], device: torch.device
) -> int:
    """One process's part of `measure`; how many kernels failed."""
    failed = 0
    jobs = [(shape, name, num) for shape in shapes for name in formats for num in rows]
    # Equal formats of different shapes share kernels, so a process takes whole formats.
    for shape, name, num in jobs:
        if (formats.index(name) + rows.index(num) * len(formats)) % COMPILERS == index:
            x = torch.randn(num, shape[1], device=device, dtype=torch.bfloat16)
            operands = random_operands(shape, name, device)
            for backend in backends_for(num, device):
                launch = partial(tuning.multiply, backend, x, operands)
                failed += not compiles(f"{backend}, {shape}, {name}, {num} rows,", launch)
    return failed


def compile_together(index: int, sets: Sets, formats: list[str], rows: list[int], device: torch.device) -> int:
    """One process's part of `measure_together`; how many kernels failed."""
    failed = 0
    for place, (label, name, wanted) in enumerate(sets_of(sets, formats)):
        if place % COMPILERS != index:
            continue
        members = [random_operands(shape, form, device) for shape, form in wanted]
        if refusal_together([(each.shape, each.runs, each.group_size) for each in members]) is not None:
            continue
        for num in [num for num in rows if num <= together.MOST_ROWS]:
            x = torch.randn(num, members[0].shape[1], device=device, dtype=torch.bfloat16)
            launch = partial(tuning.multiply_together, x, members)
            failed += not compiles(f"together, {label}, {name}, {num} rows,", launch)
    return failed


def show(rows: list[Row], copy: float) -> None:
    print(f"copy {copy:,.0f} GB/s")
    print(f"{'shape':>12} {'format':>10} {'rows':>5} {'backend':>12} {'us':>10} {'GB/s':>7} {'copy':>6} {'x bf16':>7}")
    for row in rows:
        print(
            f"{row.shape:>12} {row.format:>10} {row.rows:>5} {row.backend:>12} {row.microseconds:>10,.1f}"
            f" {row.gbytes_per_s:>7,.0f} {row.share:>6.0%} {row.speedup:>7.2f}"
        )


def default_file(device_name: str) -> Path:
    short = tuning.file_name(device_name).removeprefix("nvidia-").removesuffix(".json")
    return Path(os.environ.get("OUT", ROOT / "eval/results")) / f"kernels-{short}.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--formats", type=names_among(FORMATS, "format"), default=",".join(FORMATS))
    parser.add_argument("--seconds", type=float, default=420.0, help="when to stop and write what there is")
    parser.add_argument("--out", type=Path, help="the CSV")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on whatever device there is")
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    started = time.monotonic()
    shapes = [(64, 2048)] if arguments.smoke else SHAPES
    rows, formats = [int(number) for number in arguments.rows.split(",")], arguments.formats
    sets, shared = SMOKE_SETS if arguments.smoke else SETS, [name for name in TOGETHER_FORMATS if name in formats]
    if arguments.compile is not None:
        failed = compile_share(arguments.compile, shapes, formats, rows, torch.device("cuda"))
        failed += compile_together(arguments.compile, sets, shared, rows, torch.device("cuda"))
        if failed:
            raise SystemExit(f"{failed} kernels were not compiled")
        return
    if not torch.cuda.is_available() and not arguments.smoke:
        raise SystemExit("no GPU: use --smoke with TRITON_INTERPRET=1 to try the script")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    failed = fill_compiler_cache(arguments, device)
    if device.type == "cuda":
        print(f"compiled after {time.monotonic() - started:.0f} s", file=sys.stderr)
    copy = copy_gbytes_per_s(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "smoke"
    keeps = device.type == "cuda" or arguments.out is not None
    out = (arguments.out or default_file(name)) if keeps else Path(os.devnull)
    out.parent.mkdir(parents=True, exist_ok=True)
    found: list[Row] = []
    wrong: list[Row] = []
    table = out.open("w", newline="")
    writer = csv.DictWriter(table, [field.name for field in dataclasses.fields(Row)])
    writer.writeheader()
    measured = itertools.chain(
        measure_together(sets, shared, rows, device=device, copy=copy),
        measure(shapes, formats, rows, device=device, copy=copy),
    )
    for row in measured:
        found.append(row)
        writer.writerow(dataclasses.asdict(row))
        table.flush()
        if row.backend in OURS and not row.error < TOLERANCE:
            wrong.append(row)
            print(
                f"{row.backend} is wrong: {row.shape}, {row.format}, {row.rows} rows: error {row.error}",
                file=sys.stderr,
            )
        if time.monotonic() - started > arguments.seconds:
            print(f"stopped after {arguments.seconds:.0f} s: the rest was not measured", file=sys.stderr)
            break
    table.close()
    show(found, copy)
    if keeps:
        print(f"written to {out}; torch {torch.__version__}, {name}, copy {copy:,.0f} GB/s")
    if wrong or failed:
        raise SystemExit(f"{len(wrong)} results were wrong, {failed} of {COMPILERS} compiling processes failed")


if __name__ == "__main__":
    main()
