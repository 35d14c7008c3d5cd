"""A kernel compiled for a GPU that is not there, and what its machine code says."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Where matrices of real models have them: every pointer, and the sizes that are multiples of 16.
DIVISIBLE = ("num_n", "num_k", "stride_x")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """`loads` counts global loads by their bytes for each thread."""

    registers: int
    spilled_nbytes: int
    shared_nbytes: int
    loads: Mapping[int, int]
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
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))
    cubin = folder / f"{kernel.__name__}.cubin"
    cubin.write_bytes(built.asm["cubin"])
    usage = _run("cuobjdump", "-res-usage", cubin)
    listing = _run("cuobjdump", "-sass", cubin)
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", listing, re.MULTILINE)
    counts: dict[str, int] = {}
    loads: dict[int, int] = {}
    for opcode in opcodes:
        name, *modifiers = opcode.split(".")
        counts[name] = counts.get(name, 0) + 1
        if name in ("LDG", "LDGSTS"):
            nbytes = next((int(m) // 8 for m in modifiers if m in ("64", "128")), 4)
            loads[nbytes] = loads.get(nbytes, 0) + 1
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Compiled(
        registers=int(found[1]),
        spilled_nbytes=int(found[2]),
        shared_nbytes=built.metadata.shared,
        loads=loads,
        instructions=counts,
    )


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
# What Triton makes of an argument that is 1, unless told not to: a constant. One output row, one column, one word.
ONES = dict.fromkeys(("num_n", "num_k", "stride_x", "row_words", "plane"), 1)
PLAIN = {"ALIGN": 4, "GROUP": 128, "HAS_ZEROS": True, "HAS_BIAS": True, "EIGHT_BIT": False}


def compile_all(folder: Path) -> dict[str, dict[str, Any]]:
    """Every kernel with the default launch figures. `wanted_loads`: 16-byte loads that one block of words takes."""
    from llmmpq_kernels import gemm, gemv, tuning

    launch = tuning.load_launch("default")
    found = {}

    def add(name: str, kernel: Any, constants: dict[str, Any], options: dict[str, int], wanted_loads: int) -> None:
        known = {key: value for key, value in constants.items() if key in kernel.arg_names}
        pointers = {key: value for key, value in POINTERS.items() if key in kernel.arg_names}
        for capability in (80, 90):
            code = compile_kernel(kernel, pointers, known, options=options, capability=capability, folder=folder)
            found[f"{name} sm_{capability}"] = dataclasses.asdict(code) | {"wanted_loads": wanted_loads}

    mixed = (2, 3, 4, 8)
    cases = [((2,), 1), ((3,), 1), ((4,), 1), ((8,), 1), (mixed, 1), ((3,), 2), (mixed, 2), ((3,), 4), (mixed, 4)]
    for widths, num_rows in cases:
        runs = tuple((bits, 1) for bits in widths)
        entry = tuning._first_fitting(launch.gemv, num_rows, runs)
        constants = PLAIN | {"WIDTHS": widths, "MIXED": len(widths) > 1, "M": num_rows, "EIGHT_BIT": len(widths) > 1}
        constants |= {"BLOCK_N": entry["block_n"], "BLOCK_C": entry["block_c"]}
        # All words of a block, shared by its threads, 16 bytes at a time.
        block = entry["block_n"] * entry["block_c"]
        wanted = sum(4 * block * bits // (16 * 32 * entry["num_warps"]) for bits in widths)
        name = f"gemv {','.join(map(str, widths))} x{num_rows}"
        add(name, gemv.gemv_kernel, constants, {"num_warps": entry["num_warps"]}, wanted)
    for rows in (16, 512):
        entry = tuning._first_fitting(launch.gemm, rows, ((4, 1),))
        constants = PLAIN | {"WIDTHS": (4,), "MIXED": False, "IN_FLOAT32": False}
        constants |= {key.upper(): entry[key] for key in ("block_m", "block_n", "block_c")}
        options = {key: entry[key] for key in ("num_warps", "num_stages")}
        # None wanted: loads of activations cannot be told from those of words.
        add(f"gemm {rows} rows", gemm.gemm_kernel, constants, options, 0)
    constants = PLAIN | {"WIDTHS": (3,), "MIXED": False, "BLOCK_N": gemm.DEQUANTIZE_ROWS}
    constants |= {"BLOCK_C": gemm.DEQUANTIZE_CHUNKS}
    add("dequantized 3", gemm.dequantize_kernel, constants, {"num_warps": gemm.DEQUANTIZE_WARPS}, 2)
    add("dequantized 3 of ones", gemm.dequantize_kernel, constants | ONES | {"ALIGN": 1}, {"num_warps": 4}, 0)
    add("add_splits", gemv.add_splits_kernel, {"BLOCK": 512, "HAS_BIAS": True}, {"num_warps": 4}, 0)
    add("add_splits of ones", gemv.add_splits_kernel, {"BLOCK": 512, "HAS_BIAS": True} | ONES, {"num_warps": 4}, 0)
    constants = PLAIN | {"WIDTHS": (3, 4), "MIXED": True, "M": 1, "BLOCK_N": 16, "BLOCK_C": 16} | ONES | {"ALIGN": 1}
    add("gemv of ones", gemv.gemv_kernel, constants, {"num_warps": 4}, 0)
    constants |= {"BLOCK_M": 16, "BLOCK_C": 4, "IN_FLOAT32": False}
    add("gemm of ones", gemm.gemm_kernel, constants, {"num_warps": 4, "num_stages": 3}, 0)
    return found


if __name__ == "__main__":
    print(json.dumps(compile_all(Path(sys.argv[1]))))
