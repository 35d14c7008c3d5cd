"""A kernel compiled for a GPU that is not there, and what its machine code says."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmmpq_kernels import gemm, gemv, tuning

# Where matrices of real models have them: every pointer, and the sizes that are multiples of 16.
DIVISIBLE = ("num_n", "num_k", "stride_x")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """`loads` counts global loads in the PTX by their bytes for each thread, `word_loads` those of packed words.

    For sm_80 Triton leaves the mark of words off copies to shared memory: `word_loads` lacks those of `gemm`.
    """

    registers: int
    spilled_nbytes: int
    shared_nbytes: int
    loads: Mapping[int, int]
    word_loads: Mapping[int, int]
    instructions: Mapping[str, int]


def compile_kernel(
    kernel: Any,
    pointers: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    options: Mapping[str, int],
    capability: int,
    folder: Path,
) -> Compiled:
    signature = dict.fromkeys(kernel.arg_names, "i32") | dict(pointers) | dict.fromkeys(constants, "constexpr")
    divisible = [name for name in kernel.arg_names if name in pointers or (name in DIVISIBLE and name not in constants)]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(kernel, signature, dict(constants), attributes)
    return read_code(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options)), folder)


def read_code(built: Any, folder: Path) -> Compiled:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    usage = _run("cuobjdump", "-res-usage", cubin)
    listing = _run("cuobjdump", "-sass", cubin)
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", listing, re.MULTILINE)
    counts: dict[str, int] = {}
    for opcode in opcodes:
        name = opcode.split(".")[0]
        counts[name] = counts.get(name, 0) + 1
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Compiled(
        registers=int(found[1]),
        spilled_nbytes=int(found[2]),
        shared_nbytes=built.metadata.shared,
        loads=count_loads(built.asm["ptx"], of_words=False),
        word_loads=count_loads(built.asm["ptx"], of_words=True),
        instructions=counts,
    )


def count_loads(ptx: str, *, of_words: bool) -> dict[int, int]:
    """Only words leave the cache first (`tiles.load_words`), which tells their loads from all others."""
    found: dict[int, int] = {}
    for line in ptx.splitlines():
        if re.search(r"ld\.global" + (r"\S*evict_first" if of_words else ""), line):
            shape = re.search(r"(?:\.v([248]))?\.b(\d+) ", line)
            assert shape is not None, line
            nbytes = int(shape[1] or 1) * int(shape[2]) // 8
        elif re.search(r"cp\.async\.c[ag]" + (r"\S*cache_hint" if of_words else ""), line):
            copied = re.search(r"\], (0x[0-9a-f]+|\d+)", line)
            assert copied is not None, line
            nbytes = int(copied[1], 0)
        else:
            continue
        found[nbytes] = found.get(nbytes, 0) + 1
    return found


def wanted_nbytes(widths: tuple[int, ...], constants: Mapping[str, Any], num_warps: int) -> list[int]:
    """How long loads of words can be: 16 bytes where a block has as many for each thread, in each of its planes.

    The tile of `gemm` for many rows has 2 chunks, and that for few 4: a thread has 8 bytes of a 2-bit plane in the one
    and of a 1-bit plane in the other, 4 of a 1-bit plane in the one. Longer tiles would need more registers.
    """
    planes = {plane for bits in widths for plane in ((2, 1) if bits == 3 else (bits,))}
    block = 4 * constants["BLOCK_N"] * constants["BLOCK_C"]
    return sorted({min(16, block * plane // (32 * num_warps)) for plane in planes})


def unaligned_capability(kernel: str) -> int:
    return 80 if kernel.startswith("gemm") else 90


class OnPaper:
    """What Triton asks its driver for, of a GPU that is not there: kernels are compiled as a launch would."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels are remembered by device

    def get_current_stream(self, _device: int) -> int:
        return 0


def compile_together(
    widths: Sequence[tuple[int, ...]], num_rows: int, *, capability: int, folder: Path, split: int = 1
) -> Compiled:
    """The kernel that `together.multiply` would launch for real matrices, by way of Triton's own launcher.

    With `split` the one that adds the partial sums, without bias for the first member.
    """
    from llmmpq_kernels import together, tuning
    from tests.kernels.matrices import Case

    cases = [
        Case(
            rows=num_rows,
            shape=(64, 4096),
            widths=each,
            group_size=128,
            eight_bit=place > 0,
            has_bias=split == 1 or place > 0,
            seed=place,
        )
        for place, each in enumerate(widths)
    ]
    members, configs = [case.operands() for case in cases], []
    for operands in members:
        entry = tuning._first_fitting(tuning.load_launch("default").gemv, num_rows, operands.runs)
        cut = {key: entry[key] for key in ("block_n", "block_c", "num_warps")}
        configs.append(gemv.GemvConfig(**cut, split=split))
    built: list[Any] = []
    products, sums = together.gemv_together_kernel, together.add_splits_together_kernel
    wanted = products if split == 1 else sums
    run = wanted.run

    def compile_only(*arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        built.append(run(*arguments, grid=grid, warmup=True, **options))

    triton.runtime.driver.set_active(OnPaper(capability))
    before = {kernel: kernel.run for kernel in (products, sums)}
    for kernel in before:
        kernel.run = compile_only if kernel is wanted else _nothing
    try:
        together.multiply(cases[0].x(), members, configs)
    finally:
        for kernel, run_before in before.items():
            kernel.run = run_before
    return read_code(built[0], folder)


def _nothing(*_arguments: Any, **_options: Any) -> None:
    """A launch that is of no interest."""


def _run(tool: str, *arguments: object) -> str:
    command = [str(TOOLS / tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


POINTERS = {
    "x_ptr": "*bf16",
    "words_ptr": "*i32",
    "scales_ptr": "*fp16",
    "base_ptr": "*fp32",
    "zeros_ptr": "*i32",
    "order_ptr": "*i32",
    "bias_ptr": "*bf16",
    "partial_ptr": "*fp32",
    "out_ptr": "*bf16",
}
HALVES = POINTERS | dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr"), "*fp16")
# What Triton makes of an argument that is 1, unless told not to: a constant. One output row, one column, one word.
ONES = dict.fromkeys(("num_n", "num_k", "stride_x", "row_words", "plane"), 1)
# Chip -> name -> widths of the members.
THREE = {"together 3;4;2 x1": ((3,), (4,), (2,)), "together 3,4;3,4;3,4 x1": ((3, 4), (3, 4), (3, 4))}
TOGETHER = {80: THREE, 90: THREE | {"together 3,4;3,4 x1": ((3, 4), (3, 4))}}
PLAIN = {"ALIGN": 4, "GROUP": 128, "HAS_ZEROS": True, "HAS_BIAS": True, "EIGHT_BIT": False}


def compile_all(folder: Path) -> dict[str, dict[str, Any]]:
    """Every kernel with the default launch figures. `wanted_nbytes`: of the loads of words, none where there are none.

    A name that ends in "unaligned" is a matrix of odd sizes: nothing tells the compiler where its rows begin.
    """
    launch = tuning.load_launch("default")
    found = {}

    def add(
        name: str,
        kernel: Any,
        constants: dict[str, Any],
        options: dict[str, int],
        wanted: list[int],
        capabilities: Sequence[int] = (80, 90),
        types: Mapping[str, str] = POINTERS,
    ) -> None:
        known = {key: value for key, value in constants.items() if key in kernel.arg_names}
        pointers = {key: value for key, value in types.items() if key in kernel.arg_names}
        for capability in capabilities:
            code = compile_kernel(kernel, pointers, known, options=options, capability=capability, folder=folder)
            found[f"{name} sm_{capability}"] = dataclasses.asdict(code) | {"wanted_nbytes": wanted}

    def add_both(name: str, kernel: Any, constants: dict[str, Any], options: dict[str, int]) -> None:
        widths = constants["WIDTHS"]
        add(name, kernel, constants, options, wanted_nbytes(widths, constants, options["num_warps"]))
        if len(widths) == 1 and constants.get("M", 1) == 1:
            # One chip is enough to show that the hint is what makes loads long: for copies to shared memory sm_80.
            add(f"{name} unaligned", kernel, constants | {"ALIGN": 1}, options, [4], [unaligned_capability(name)])

    mixed = (2, 3, 4, 8)
    cases = [((2,), 1), ((3,), 1), ((4,), 1), ((8,), 1), (mixed, 1), (mixed, 2), (mixed, 4)]
    for widths, num_rows in cases:
        runs = tuple((bits, 1) for bits in widths)
        entry = tuning._first_fitting(launch.gemv, num_rows, runs)
        constants = PLAIN | {"WIDTHS": widths, "MIXED": len(widths) > 1, "M": num_rows, "EIGHT_BIT": len(widths) > 1}
        constants |= {"BLOCK_N": entry["block_n"], "BLOCK_C": entry["block_c"]}
        name = f"gemv {','.join(map(str, widths))} x{num_rows}"
        add_both(name, gemv.gemv_kernel, constants, {"num_warps": entry["num_warps"]})
    for widths, rows in [(widths, rows) for widths in ((2,), (3,), (4,), (8,), (3, 4)) for rows in (16, 512)]:
        entry = tuning._first_fitting(launch.gemm, rows, tuple((bits, 1) for bits in widths))
        constants = PLAIN | {"WIDTHS": widths, "MIXED": len(widths) > 1, "IN_FLOAT32": False}
        constants |= {key.upper(): entry[key] for key in ("block_m", "block_n", "block_c")}
        options = {key: entry[key] for key in ("num_warps", "num_stages")}
        name = f"gemm {','.join(map(str, widths))} x{rows}"
        add_both(name, gemm.gemm_kernel, constants, options)
        if name == "gemm 4 x512":
            add(f"{name} of float16", gemm.gemm_kernel, constants, options, [16], [90], HALVES)
    for capability in (80, 90):
        for name, members in TOGETHER[capability].items():
            code = compile_together(members, 1, capability=capability, folder=folder)
            found[f"{name} sm_{capability}"] = dataclasses.asdict(code) | {"wanted_nbytes": [16]}
        code = compile_together(((3,), (4,), (2,)), 1, capability=capability, folder=folder, split=3)
        found[f"add_splits_together sm_{capability}"] = dataclasses.asdict(code) | {"wanted_nbytes": []}
    constants = PLAIN | {"WIDTHS": (3,), "MIXED": False, "BLOCK_N": gemm.DEQUANTIZE_ROWS}
    constants |= {"BLOCK_C": gemm.DEQUANTIZE_CHUNKS}
    add_both("dequantized 3", gemm.dequantize_kernel, constants, {"num_warps": gemm.DEQUANTIZE_WARPS})
    add("dequantized 3 of ones", gemm.dequantize_kernel, constants | ONES | {"ALIGN": 1}, {"num_warps": 4}, [4], [90])
    add("add_splits", gemv.add_splits_kernel, {"BLOCK": 512, "HAS_BIAS": True}, {"num_warps": 4}, [])
    add(
        "add_splits of ones",
        gemv.add_splits_kernel,
        {"BLOCK": 512, "HAS_BIAS": True} | ONES,
        {"num_warps": 4},
        [],
        [90],
    )
    constants = PLAIN | {"WIDTHS": (3, 4), "MIXED": True, "M": 1, "BLOCK_N": 16, "BLOCK_C": 16} | ONES | {"ALIGN": 1}
    add("gemv of ones", gemv.gemv_kernel, constants, {"num_warps": 4}, [4], [90])
    constants |= {"BLOCK_M": 16, "BLOCK_C": 4, "IN_FLOAT32": False}
    add("gemm of ones", gemm.gemm_kernel, constants, {"num_warps": 4, "num_stages": 3}, [4], [90])
    return found


if __name__ == "__main__":
    print(json.dumps(compile_all(Path(sys.argv[1]))))
