"""Budgets through the command line, against the bytes of the written files; the curve of loss against bytes."""

import json
import random
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.e2e.running import GROUP_SIZE, assert_plan_is_what_is_stored, read_plan, run_here

BARE = ["--tokens", 256, "--window", 64, "--quantizer", "rtn", "--threads", 1, "--quiet"]
FAST = [*BARE, "--method", "local"]  # the cheapest measurement: budgets do not depend on it
TINY = [*FAST, "--group-size", GROUP_SIZE]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("qwen2", tmp_path_factory.mktemp("qwen2") / "model", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")  # one measurement for all


def weights_nbytes(out: Path) -> int:
    return sum(path.stat().st_size for pattern in ("*.safetensors", "*.index.json") for path in out.glob(pattern))


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_the_files_are_never_larger_than_asked_for(
    model: Path, work: Path, max_shard_size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [model, *TINY, "--max-shard-size", max_shard_size, "--work-dir", work]
    checked = json.loads(run_here(["check", *base, "--max-size", "1KB", "--json"], capsys).stdout)
    (problem,) = checked["problems"]
    smallest = int(problem.partition(" bytes)")[0].rpartition("(")[2].replace(",", ""))
    largest = sum(
        json.loads(run_here(["check", *base, "--max-size", "9MB", "--json"], capsys).stdout)["budget_parts"].values()
    )
    draw = random.Random(max_shard_size)
    sizes = [smallest, largest, *(draw.randint(smallest, largest) for _ in range(4))]
    written = []
    for size in sorted(sizes):
        out = tmp_path / str(size)
        outcome = run_here(["quantize", *base, "--max-size", size, "--out", out, "--json"], capsys)
        assert outcome.code == 0, outcome.stderr
        plan = assert_plan_is_what_is_stored(out)
        assert weights_nbytes(out) <= size
        assert plan["budget"]["value"] == str(size)
        assert plan["nbytes"] <= plan["budget"]["nbytes"] == size - sum(plan["budget"]["reserved"].values())
        written.append(plan["nbytes"])
    assert written == sorted(written)
    assert len(set(written)) > 3
    refused = run_here(["quantize", *base, "--max-size", smallest - 1, "--out", tmp_path / "refused"], capsys)
    assert refused.code == 2
    assert "cannot be met: the smallest plan needs" in refused.stderr


def test_a_size_of_the_demo(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["demo", "--recipe", "demo", *FAST, "--widths", "2,3", "--work-dir", work, "--max-size", "3.7MB"]
    assert "22.93 kB  file headers and index" in run_here(["check", *base], capsys).stdout
    outcome = run_here(["quantize", *base, "--out", tmp_path / "out"], capsys)
    assert outcome.code == 0, outcome.stderr
    assert "at most 3.7MB of files of weights" in outcome.stdout
    # A plan that leaves room for another bit of the smallest matrix has not used its budget.
    assert 3_700_000 - 20_000 < weights_nbytes(tmp_path / "out") <= 3_700_000


def test_memory_to_run_in(model: Path, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = [model, *TINY, "--work-dir", work, "--context", 200, "--sequences", 2]
    roomy = json.loads(run_here(["check", *base, "--fit-vram", "1GB", "--json"], capsys).stdout)
    assert roomy["problems"] == []
    assert roomy["budget"] == "--fit-vram 1GB --context 200 --sequences 2"
    parts = roomy["budget_parts"]
    assert parts["KV cache for 2 x 200 tokens at 16 bits"] == 2 * 200 * 2 * 2 * 2 * 16 * 2
    # Just room for half of what the largest plan takes, after the margin.
    rest = sum(parts.values()) - parts["quantized"] - parts["margin for the runtime (5 % + 0.8 GB)"]
    vram = -(-(rest + parts["quantized"] // 2 + 800_000_000) * 20 // 19)
    outcome = run_here(["quantize", *base, "--fit-vram", vram, "--out", tmp_path / "out"], capsys)
    assert outcome.code == 0, outcome.stderr
    plan = read_plan(tmp_path / "out")
    margin = plan["budget"]["reserved"]["margin"]
    assert plan["nbytes"] + rest + margin <= vram
    assert plan["nbytes"] > 0.9 * (parts["quantized"] // 2)
    assert f"to run in {vram} of GPU memory" in outcome.stdout
    assert "KV cache for 2 x 200 tokens" in outcome.stdout
    refused = run_here(["check", *base, "--fit-vram", "0.7GB"], capsys)
    assert refused.code == 2
    assert "0.8 GB). Raise --fit-vram to" in refused.stdout
    noted = run_here(["check", model, *TINY, "--fit-vram", "1GB", "--context", 1000], capsys)
    assert "--context 1,000 is more than the 256 tokens" in noted.stdout


def test_plans_of_every_kind_share_a_measurement(
    model: Path, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--avg-bits", 4, "--max-size", "80KB,120 KB", "--fit-vram", "1GB", "--context", 64]
    outcome = run_here(["plan", model, *TINY, "--work-dir", work, *flags, "--out", tmp_path, "--json"], capsys)
    assert outcome.code == 0, outcome.stderr
    names = ["plan-4.json", "plan-80KB.json", "plan-120KB.json", "plan-1GB-vram.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert json.loads(outcome.stdout)["plans"] == [json.loads((tmp_path / name).read_text()) for name in names]


def test_a_plan_of_a_size_is_carried_out(
    model: Path, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [model, *TINY, "--work-dir", work]
    run_here(["plan", *base, "--max-size", "90KB", "--out", tmp_path / "plans"], capsys)
    plan = tmp_path / "plans" / "plan-90KB.json"
    outcome = run_here(
        ["quantize", model, *BARE, "--work-dir", work, "--plan", plan, "--out", tmp_path / "out"], capsys
    )
    assert outcome.code == 0, outcome.stderr
    assert weights_nbytes(tmp_path / "out") <= 90_000


@pytest.mark.parametrize(("method", "count"), [("local", ()), ("local", (9,)), ("iqp", (5,))])
def test_the_curve_falls(
    method: str, count: tuple[int, ...], model: Path, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("measurement: {tokens: 64}\n")
    base = ["plan", model, *TINY, "--method", method, "--recipe", recipe, "--work-dir", work]
    outcome = run_here([*base, "--pareto", *count, "--out", tmp_path / "out", "--json"], capsys)
    assert outcome.code == 0, outcome.stderr
    curve = json.loads(outcome.stdout)["curve"]
    assert curve["num_budgets"] == (count[0] if count else 24)
    points = curve["points"]
    assert 3 < len(points) <= curve["num_budgets"]
    for before, after in pairwise(points):
        assert before["nbytes"] < after["nbytes"]
        assert before["predicted_loss"] > after["predicted_loss"]
    checked = json.loads(run_here(["check", *base[1:], "--json"], capsys).stdout)
    assert points[0]["bits_per_weight"] == checked["smallest_bits"]
    assert points[0]["total_nbytes"] - points[0]["nbytes"] == checked["kept_nbytes"]
    stored = json.loads((tmp_path / "out" / "pareto.json").read_text())
    assert stored["points"] == points
    assert (tmp_path / "out" / "pareto.png").read_bytes().startswith(b"\x89PNG")
    again = run_here([*base, "--pareto", *count, "--out", tmp_path / "again"], capsys)
    assert "pareto.json, pareto.png" in again.stdout
    for name in ("pareto.json", "pareto.png"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_without_matplotlib_there_is_no_picture(
    model: Path, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = ["plan", model, *TINY, "--work-dir", work, "--pareto", 3, "--out", tmp_path]
    outcome = run_here(arguments, capsys)
    assert outcome.code == 0, outcome.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["pareto.json"]
    (note,) = [line for line in outcome.stdout.splitlines() if line.startswith("note:")]
    assert "pip install 'llmmpq[plot]'" in note


def test_a_curve_needs_a_measurement(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_here(["plan", model, *TINY, "--pareto", "--method", "uniform"], capsys)
    assert outcome.code == 2
    assert "measures nothing" in outcome.stderr
