"""Two processes share one run: the same plan and the same codes as one, files written once, errors said once.

Sums of moments are exact enough that their order leaves no trace: candidates are equal bit for bit, and what remains is
the order in which Q is summed.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from llmmpq.quantize import shape
from tests import tiny
from tests.e2e.forked import Process, wait_for
from tests.e2e.running import GROUP_SIZE, bits_of, digests, leftovers, raw_tensors, read_plan, run_here

WINDOW = 48
NUM_WINDOWS, PROBE_WINDOWS = 9, 3  # one process gets one more
ROOT = Path(__file__).parents[2]
NUM_PARTS = shape.NUM_PARTS  # read before tests have fewer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("phi3", tmp_path_factory.mktemp("ranks") / "model", dtype=torch.bfloat16)


@pytest.fixture
def recipe(tmp_path: Path, calibration_file: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"calibration: {{source: {calibration_file}, tokens: {NUM_WINDOWS * WINDOW}, window: {WINDOW}}}\n"
        f"measurement: {{tokens: {PROBE_WINDOWS * WINDOW}}}\n"
        f"quantizer: {{group_size: {GROUP_SIZE}, sweeps: 1}}\n"
        "allocation: {widths: [2, 4], profiles: [3.5], refine: 1}\n"
        "run: {threads: 1}\n",
        encoding="utf-8",
    )
    return path


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, sys.path))}


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def run_two(*arguments: object) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--master_port", str(free_port()), "-m", "llmmpq"]
    return subprocess.run(
        [*launcher, *map(str, arguments)],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def start_two(*arguments: object) -> list[Process]:
    """Without torchrun, which ends all processes as soon as one has ended."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [Process(arguments, environment=rank) for rank in ranks]


def finish_two(*arguments: object) -> str:
    """What a run of two that goes well says on stdout."""
    processes = start_two(*arguments)
    said = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return "".join(stdout for stdout, _ in said)


def measured(work: Path, stage: str) -> tuple[dict[str, object], np.ndarray, np.ndarray, np.ndarray]:
    (path,) = (
        p for p in work.glob(f"*/{stage}-*/sensitivity.safetensors") if p.parent.name.count("-") == stage.count("-") + 1
    )
    with safe_open(path, framework="np") as stored:
        reliability = np.stack([stored.get_tensor(name) for name in ("across", "within")])
        gram, linear = stored.get_tensor("gram"), stored.get_tensor("linear")
        return json.loads(stored.metadata()["notes"]), gram, linear, reliability


def test_two_processes_do_what_one_does(
    model: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shape, "NUM_PARTS", NUM_PARTS)  # the launcher's processes know of no other
    arguments = ["quantize", model, "--recipe", recipe, "--avg-bits", 4, "--json"]
    one = run_here([*arguments, "--out", tmp_path / "one" / "out"], capsys)
    assert one.code == 0, one.stderr
    two = run_two(*arguments, "--out", tmp_path / "two" / "out")
    assert two.returncode == 0, two.stderr

    result = json.loads(two.stdout)  # said by one process
    assert (result["already_done"], result["resumed_blocks"]) == (False, 0)
    assert sorted(digests(tmp_path / "one" / "out")) == sorted(digests(tmp_path / "two" / "out"))
    assert leftovers(tmp_path) == []
    assert not list((tmp_path / "two").rglob("states-*"))
    for stage in ("measure", "measure-around"):
        (notes, gram, linear, reliability), (notes_two, gram_two, linear_two, reliability_two) = (
            measured(tmp_path / name / ".llmmpq-work", stage) for name in ("one", "two")
        )
        size = np.sqrt(gram.diagonal())
        assert size.max() > 0
        assert np.all(np.abs(gram_two - gram) <= 1e-6 * np.outer(size, size))
        assert np.all(np.abs(linear_two - linear) <= 1e-6 * size * np.sqrt(max(notes["quadratic"]["constant"], 1e-30)))
        assert np.all((reliability >= 0) & (reliability <= 1))
        assert reliability.any()
        assert np.abs(reliability_two - reliability).max() <= 1e-6
        assert notes_two["num_tokens"] == notes["num_tokens"] == PROBE_WINDOWS * WINDOW
        for name, losses in notes["losses"].items():
            assert notes_two["losses"][name] == pytest.approx(losses, rel=1e-6)

    plan, plan_two = read_plan(tmp_path / "one" / "out"), read_plan(tmp_path / "two" / "out")
    assert plan_two["linears"] == plan["linears"]
    assert len(set(bits_of(plan).values())) > 1
    assert plan_two["measured_kl"] == pytest.approx(plan["measured_kl"], rel=1e-6)
    assert raw_tensors(tmp_path / "one" / "out") == raw_tensors(tmp_path / "two" / "out")
    assert "processes" not in plan["provenance"]["numerics"]
    assert plan_two["provenance"]["numerics"] == plan["provenance"]["numerics"] | {"processes": 2}


def test_two_processes_rotate_as_one_does(
    model: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def arguments(out: Path) -> list[object]:
        return ["quantize", model, "--recipe", recipe, "--bits", 3, "--rotate", "--out", out, "--quiet"]

    finish_two(*arguments(tmp_path / "two" / "out"))
    assert run_here(arguments(tmp_path / "one" / "out"), capsys).code == 0
    one, two = (tmp_path / name / "out" for name in ("one", "two"))
    assert read_plan(one)["provenance"]["rotation"] == read_plan(two)["provenance"]["rotation"]
    assert raw_tensors(one) == raw_tensors(two)


def test_local_losses_of_shares_of_different_sizes(
    model: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", model, "--recipe", recipe, "--avg-bits", 4, "--json", "--method", "local"]
    arguments += ["--quantizer", "rtn", "--tokens", 5 * WINDOW]
    one = run_here([*arguments, "--out", tmp_path / "one" / "plans"], capsys)
    assert one.code == 0, one.stderr
    two = finish_two(*arguments, "--out", tmp_path / "two" / "plans")
    plans = [json.loads(said)["plans"][0] for said in (one.stdout, two)]
    assert plans[0]["linears"] == plans[1]["linears"]
    assert plans[1]["predicted_loss"] == pytest.approx(plans[0]["predicted_loss"], rel=1e-3)
    assert plans[1]["predicted_loss"] > 0
    assert [path.name for path in (tmp_path / "two" / "plans").iterdir()] == ["plan-4.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--avg-bits", 1], "cannot be met"),
        (["--tokens", WINDOW], "start at most 1,"),
        (["--work-dir", "/dev/null/work"], "cannot use the work folder"),  # seen by the first process alone
    ],
    ids=["before-the-run", "windows", "first-process"],
)
def test_a_mistake_ends_both_with_one_line(
    model: Path, recipe: Path, tmp_path: Path, changes: list[object], message: str
) -> None:
    processes = start_two("quantize", model, "--recipe", recipe, "--out", tmp_path / "out", *changes)
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert [stdout for stdout, _ in said] == ["", ""]
    lines = [line for _, stderr in said for line in stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in said[0][1] + said[1][1]
    assert not (tmp_path / "out").exists()


def test_no_process_waits_for_one_that_died_and_the_run_continues(model: Path, recipe: Path, tmp_path: Path) -> None:
    arguments = ["quantize", model, "--recipe", recipe, "--out", tmp_path / "out", "--bits", 4, "--tokens", 40 * WINDOW]
    first, second = start_two(*arguments)
    wait_for(tmp_path, ".llmmpq-work/*/quantize-*/block-0000.safetensors", first, timeout=120)
    second.kill()
    second.communicate(timeout=60)
    _, stderr = first.communicate(timeout=60)
    assert first.returncode == 2
    assert [line for line in stderr.splitlines() if line.startswith("error:")] == [
        "error: another process of this run ended or cannot be reached; run the same command again to continue"
    ]
    assert not (tmp_path / "out").exists()

    assert json.loads(finish_two(*arguments, "--json"))["resumed_blocks"] >= 1
