"""Every kernel compiled ahead of time for sm_80 and sm_90, and its machine code read. Needs no GPU.

In one process of its own, since this one interprets kernels. Words must come 16 bytes at a time and nothing may spill:
a spilled register is memory traffic in a loop that lives on memory traffic.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.compiling import unaligned_capability

pytestmark = pytest.mark.timeout(600)  # the first test waits for the compiler: two minutes of one core
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("cubin")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels/torch-ext"), *sys.path]),
    }
    command = [sys.executable, "-m", "tests.kernels.compiling", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


# Written out: what is compiled in the other process is no list this one can ask for.
KERNELS = [
    *(f"gemv {bits} x1" for bits in (2, 3, 4, 8)),
    *(f"gemm {bits} x{rows}" for bits in (2, 3, 4, 8) for rows in (16, 512)),
    "dequantized 3",
]
ON_SM_90 = [
    "gemm 4 x512 of float16",
    "together 3,4;3,4 x1",
    *(f"{kernel} of ones" for kernel in ("gemv", "gemm", "dequantized 3", "add_splits")),
]
NAMES = [
    f"{kernel} sm_{capability}"
    for kernel in (
        *KERNELS,
        *(f"gemv {widths}" for widths in ("2,3,4,8 x1", "2,3,4,8 x2", "2,3,4,8 x4")),
        *(f"gemm 3,4 x{rows}" for rows in (16, 512)),
        *(f"together {widths} x1" for widths in ("3;4;2", "3,4;3,4;3,4")),
        "add_splits",
        "add_splits_together",
    )
    for capability in (80, 90)
]
NAMES += [f"{kernel} sm_90" for kernel in ON_SM_90]
NAMES += [f"{kernel} unaligned sm_{unaligned_capability(kernel)}" for kernel in KERNELS]


def test_all_kernels_were_compiled(compiled):
    assert sorted(compiled) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_spills(compiled, name):
    code = compiled[name]
    assert code["spilled_nbytes"] == 0
    assert code["registers"] <= 255
    # Of a thread block on either chip.
    assert code["shared_nbytes"] <= 160 * 1024


@pytest.mark.parametrize("name", [name for name in NAMES if not (name.startswith("gemm") and "sm_80" in name)])
def test_every_load_of_words_is_as_long_as_can_be(compiled, name):
    """16 bytes, but for the planes of `compiling.wanted_nbytes`, and 4 where nothing is known of the rows.

    The second half is what keeps the first honest: without the hint the same kernel has short loads, and they are seen.
    """
    assert sorted(map(int, compiled[name]["word_loads"])) == compiled[name]["wanted_nbytes"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_aligned_rows_make_loads_long(compiled, kernel):
    """All loads counted, whatever of: that rows are aligned is all the two differ in, and words are all it is about."""
    capability = unaligned_capability(kernel)
    aligned, other = (compiled[f"{kernel}{kind} sm_{capability}"]["loads"] for kind in ("", " unaligned"))
    longer = {nbytes: aligned.get(nbytes, 0) - other.get(nbytes, 0) for nbytes in ("8", "16")}
    wanted = {str(nbytes) for nbytes in compiled[f"{kernel} sm_{capability}"]["wanted_nbytes"]} - {"4"}
    assert {nbytes for nbytes, more in longer.items() if more > 0} == wanted
    assert aligned.get("4", 0) < other["4"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_which_loads_of_words_are_short(compiled, kernel):
    """`wanted_nbytes` works it out; here it is in numbers."""
    shorter = {"gemm 2 x512": [8], "gemm 3 x16": [8, 16], "gemm 3 x512": [4, 8]}
    assert compiled[f"{kernel} sm_90"]["wanted_nbytes"] == shorter.get(kernel, [16])


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("gemm")])
def test_products_of_many_rows_are_on_tensor_cores(compiled, name):
    assert {"HMMA", "HGMMA"} & set(compiled[name]["instructions"])


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("add_splits")])
def test_no_code_is_converted_by_the_slow_unit(compiled, name):
    """I2F runs at a sixteenth of the rate: `tiles.py` says how it is avoided."""
    # What is left are divisions of whole numbers, at most three for each run of widths and none for each chunk.
    num_runs = len(re.split("[,;]", name.split()[1]))
    assert compiled[name]["instructions"].get("I2F", 0) <= 3 * num_runs
