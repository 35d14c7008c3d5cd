"""A kernel compiled for a GPU that is not there, and what its machine code says."""

from __future__ import annotations

import dataclasses
import re
import subprocess
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
    divisible = [name for name in kernel.arg_names if name in pointers or name in DIVISIBLE]
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
