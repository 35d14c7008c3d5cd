"""Every kernel compiled ahead of time for sm_80 and sm_90, and its machine code read. Needs no GPU.

In one process of its own, since this one interprets kernels. Words must come 16 bytes at a time and nothing may spill:
a spilled register is memory traffic in a loop that lives on memory traffic.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
NAMES = [
    *(
        f"gemv {widths} sm_{cap}"
        for widths in ("2 x1", "3 x1", "4 x1", "8 x1", "2,3,4,8 x1", "3 x2", "2,3,4,8 x2", "3 x4", "2,3,4,8 x4")
        for cap in (80, 90)
    ),
    *(f"gemm {rows} rows sm_{cap}" for rows in (16, 512) for cap in (80, 90)),
    *(f"{kernel} sm_{cap}" for kernel in ("dequantized 3", "add_splits") for cap in (80, 90)),
    *(f"{kernel} of ones sm_{cap}" for kernel in ("gemv", "gemm", "dequantized 3", "add_splits") for cap in (80, 90)),
]


def test_all_kernels_were_compiled(compiled):
    assert sorted(compiled) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_spills_and_loads_are_long(compiled, name):
    code = compiled[name]
    assert code["spilled_nbytes"] == 0
    assert code["registers"] <= 255
    assert code["loads"].get("16", 0) >= code["wanted_loads"]
    # Of a thread block on either chip.
    assert code["shared_nbytes"] <= 160 * 1024


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("gemm")])
def test_products_of_many_rows_are_on_tensor_cores(compiled, name):
    assert {"HMMA", "HGMMA"} & set(compiled[name]["instructions"])


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("add_splits")])
def test_no_code_is_converted_by_the_slow_unit(compiled, name):
    """I2F runs at a sixteenth of the rate: `tiles.py` says how it is avoided."""
    # What is left are divisions of whole numbers, at most three for each run of widths and none for each chunk.
    num_runs = name.split()[1].count(",") + 1
    assert compiled[name]["instructions"].get("I2F", 0) <= 3 * num_runs
