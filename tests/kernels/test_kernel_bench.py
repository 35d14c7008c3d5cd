"""The benchmark script runs from end to end without a GPU, so that the first hour on one is not spent on it."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "eval" / "kernel_bench.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the script itself is run")
def test_the_script_writes_a_table(tmp_path):
    out = tmp_path / "smoke.csv"
    command = [sys.executable, str(SCRIPT), "--smoke", "--rows", "1", "--formats", "4,mixed 2.5", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(out.open()))
    assert [(row["format"], row["backend"]) for row in rows] == [
        ("bfloat16", "cublas"),
        ("4", "gemv"),
        ("mixed 2.5", "gemv"),
    ]
    assert all(float(row["microseconds"]) > 0 for row in rows)
    assert "gemlite at (64, 2048)" in done.stderr  # what is missing is said
