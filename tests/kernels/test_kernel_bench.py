"""The benchmark script runs from end to end without a GPU, so that the first hour on one is not spent on it."""

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EVAL = Path(__file__).parents[2] / "eval"
SCRIPT = EVAL / "kernel_bench.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the script itself is run")
def test_the_script_writes_a_table(tmp_path):
    out = tmp_path / "smoke.csv"
    command = [sys.executable, str(SCRIPT), "--smoke", "--rows", "1", "--formats", "4,mixed 2.5", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(out.open()))
    kinds = ["apart", "apart eager", "together", "together eager"]
    assert [(row["format"], row["backend"]) for row in rows] == [
        *((form, kind) for form in ("4", "several") for kind in kinds),
        ("bfloat16", "cublas"),
        ("4", "gemv"),
        ("mixed 2.5", "gemv"),
    ]
    assert all(float(row["microseconds"]) > 0 for row in rows)
    assert "qkv smoke, mixed 2.5: no shared launch: 9 runs of widths together, at most 8" in done.stderr
    assert "gemlite at (64, 2048)" in done.stderr  # what is missing is said


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("kernel_bench", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kernel_bench", module)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_named_after_the_device(bench, monkeypatch):
    monkeypatch.delenv("OUT", raising=False)
    assert bench.default_file("NVIDIA H200") == EVAL / "results" / "kernels-h200.csv"


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the script itself is run")
@pytest.mark.parametrize("fault", ["one column", "left out", "raises"])
def test_a_wrong_kernel_fails_in_the_end_and_keeps_the_rest(bench, monkeypatch, tmp_path, fault):
    right, out = bench.tuning.multiply, tmp_path / "table.csv"

    def multiply(backend, x, operands):
        y = right(backend, x, operands)
        if operands.runs[0][0] == 2 and fault == "raises":
            raise RuntimeError("no luck")
        if operands.runs[0][0] == 2 and fault == "one column":
            y[:, 3] += y.norm()
        if operands.runs[0][0] == 2 and fault == "left out":
            y[:, 3] = torch.empty(len(y))
        return y

    monkeypatch.setattr(bench.tuning, "multiply", multiply)
    monkeypatch.setattr(bench, "SMOKE_SETS", [])
    monkeypatch.setattr(sys, "argv", ["bench", "--smoke", "--rows", "1", "--formats", "4,2,8", "--out", str(out)])
    with pytest.raises(SystemExit, match="1 results were wrong"):
        bench.main()
    rows = list(csv.DictReader(out.open()))
    assert [row["format"] for row in rows] == ["bfloat16", "4", "2", "8"]
    assert [row["microseconds"] == "nan" for row in rows] == [False, False, True, False]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the script itself is run")
@pytest.mark.parametrize("fault", ["another bit", "raises"])
def test_a_shared_launch_with_other_bits_has_no_time(bench, monkeypatch, fault):
    right = bench.tuning.multiply_together

    def multiply_together(x, members):
        if fault == "raises":
            raise RuntimeError("no luck")
        found = right(x, members)
        found[-1][0, 5] *= 1.01  # within the tolerance of an error, but not what a launch of its own gives
        return found

    monkeypatch.setattr(bench.tuning, "multiply_together", multiply_together)
    rows = list(bench.measure_together(bench.SMOKE_SETS, ["4"], [1, 16], device=torch.device("cpu"), copy=1.0))
    assert [row.backend for row in rows] == ["apart", "apart eager", "together", "together eager"]
    assert all(row.microseconds != row.microseconds and row.error != row.error for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the script itself is run")
def test_a_kernel_that_does_not_compile_costs_its_line_only(bench, monkeypatch, capsys):
    """In both parts of the work, whichever process has it."""
    compiled = []

    def multiply(backend, x, operands):
        if operands.runs[0][0] == 2:
            raise RuntimeError("no luck")
        compiled.append((backend, operands.runs[0][0]))

    def multiply_together(x, members):
        if members[0].runs[0][0] == 3:
            raise RuntimeError("none here")
        compiled.append(("together", members[0].runs[0][0]))

    monkeypatch.setattr(bench, "COMPILERS", 1)
    monkeypatch.setattr(bench.tuning, "multiply", multiply)
    monkeypatch.setattr(bench.tuning, "multiply_together", multiply_together)
    cpu = torch.device("cpu")
    assert bench.compile_share(0, [(64, 2048)], ["2", "4"], [1], cpu) == 1
    assert bench.compile_together(0, bench.SMOKE_SETS, ["3"], [1, 16], cpu) == 1
    assert bench.compile_together(0, bench.SMOKE_SETS, ["4"], [1], cpu) == 0
    assert compiled == [("gemv", 4), ("together", 4)]
    said = capsys.readouterr().err
    assert "gemv, (64, 2048), 2, 1 rows, was not compiled: RuntimeError: no luck" in said
    assert "together, qkv smoke, 3, 1 rows, was not compiled: RuntimeError: none here" in said


def test_all_compiling_processes_are_waited_for(bench, monkeypatch, capsys):
    class Process:
        running = 0

        def __init__(self, command):
            self.code = 1 if command[-1] == "2" else -9 if command[-1] == "5" else 0
            Process.running += 1

        def wait(self):
            Process.running -= 1
            return self.code

    monkeypatch.setattr(bench.subprocess, "Popen", Process)
    arguments = bench.argparse.Namespace(smoke=False, rows="1", formats=["4"])
    assert bench.fill_compiler_cache(arguments, torch.device("cuda")) == 2
    assert Process.running == 0
    said = capsys.readouterr().err.splitlines()
    assert said == [f"compiling process {index} of 8 ended with code {code}" for index, code in ((2, 1), (5, -9))]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the script itself is run")
def test_a_failed_compiler_fails_in_the_end_and_keeps_the_figures(bench, monkeypatch, tmp_path):
    out = tmp_path / "table.csv"
    monkeypatch.setattr(bench, "fill_compiler_cache", lambda *_: 1)
    monkeypatch.setattr(bench, "SMOKE_SETS", [])
    monkeypatch.setattr(sys, "argv", ["bench", "--smoke", "--rows", "1", "--formats", "4", "--out", str(out)])
    with pytest.raises(SystemExit, match="0 results were wrong, 1 of 8 compiling processes failed"):
        bench.main()
    assert [row["format"] for row in csv.DictReader(out.open())] == ["bfloat16", "4"]


@pytest.mark.parametrize(("script", "flag", "said"), [("kernel", "--formats", "2"), ("decode", "--schemes", "mixed")])
def test_an_unknown_format_is_named_beside_those_there_are(script, flag, said):
    command = [sys.executable, str(EVAL / f"{script}_bench.py"), flag, "4,5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"argument {flag}: '5' is no" in done.stderr
    assert repr(said) in done.stderr
