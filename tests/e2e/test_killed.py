"""A real process, ended without a chance to clean up, and the same command again."""

import json
import signal
from pathlib import Path

import pytest
import torch

from llmmpq.cli import main
from tests import tiny
from tests.e2e.forked import Process, wait_for
from tests.e2e.running import digests, leftovers, run_here

WAIT_S = 60.0


def _arguments(model: Path, calibration_file: Path, out: Path) -> list[str]:
    given = ["quantize", model, "--out", out, "--avg-bits", 4, "--calib", calibration_file, "--quiet", "--json"]
    given += ["--tokens", 2048, "--window", 64, "--threads", 1, "--refine", 0, "--layer-only"]
    return [str(item) for item in given]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("killed") / "model", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def expected(model: Path, calibration_file: Path) -> dict[str, str]:
    out = model.parent / "out"
    assert main(_arguments(model, calibration_file, out)) == 0
    return digests(out)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_continued(
    how: signal.Signals,
    model: Path,
    expected: dict[str, str],
    tmp_path: Path,
    calibration_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    process = Process(_arguments(model, calibration_file, out))
    wait_for(out.parent, ".llmmpq-work/*/quantize-*/block-0000.safetensors", process, timeout=WAIT_S)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=WAIT_S)
    if how == signal.SIGINT:
        assert (process.returncode, stderr) == (130, "interrupted; run the same command again to continue\n")
        assert leftovers(tmp_path) == []
    else:
        assert process.returncode == -signal.SIGKILL
    assert not out.exists()

    outcome = run_here(_arguments(model, calibration_file, out), capsys)
    assert outcome.code == 0
    assert json.loads(outcome.stdout)["resumed_blocks"] >= 1
    assert digests(out) == expected
    assert leftovers(tmp_path) == []
