"""Kill a run at a random moment, run the same command again, and compare every file with an uninterrupted run's.

    python eval/kill_resume.py --runs 10

The moments are spread over the whole duration of a run and drawn with a seed. SIGKILL leaves a process no chance to
clean up. After each kill there must be no output folder, unless it is complete; after the second run every file must
be equal, byte for byte, and nothing unfinished may lie about. Exit code 1 on any difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

OUT = "quantized"
GRACE = 5.0  # a run that takes this many times its usual duration hangs


class Attempt(NamedTuple):
    """One run that was killed, and the one that continued it."""

    killed_at_s: float
    found: str
    measured_blocks: int  # in the journal when the process died
    quantized_blocks: int
    resumed_blocks: int
    again_s: float
    problems: list[str]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--avg-bits", default="3.5")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="leave the folders of failed runs for a look")
    given = parser.parse_args()
    command = [sys.executable, "-m", "llmmpq", "quantize", given.model, "--avg-bits", given.avg_bits]
    command += ["--recipe", given.recipe, "--out", OUT, "--quiet", "--json"]

    root = Path(tempfile.mkdtemp(prefix="kill-resume-"))
    print(f"$ {' '.join(['llmmpq', *command[3:]])}    OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}")
    folder = root / "uninterrupted"
    duration, _ = _finish(command, folder, limit_s=None)
    expected = _digests(folder / OUT)
    print(f"uninterrupted: {duration:.1f} s, {len(expected)} files\n", flush=True)

    print("| run | killed after | output found | blocks measured | quantized | resumed | second run | files |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    failed = []
    rng = random.Random(given.seed)
    for number in range(given.runs):
        # One moment from each of `runs` equal parts of the duration.
        moment = duration * (number + rng.random()) / given.runs
        folder = root / f"run-{number}"
        attempt = _kill_and_continue(command, folder, expected, moment, limit_s=GRACE * duration)
        verdict = f"{len(expected)} equal" if not attempt.problems else "; ".join(attempt.problems)
        print(
            f"| {number} | {attempt.killed_at_s:.1f} s | {attempt.found} | {attempt.measured_blocks} "
            f"| {attempt.quantized_blocks} | {attempt.resumed_blocks} | {attempt.again_s:.1f} s | {verdict} |",
            flush=True,
        )
        if attempt.problems:
            failed.append(folder)
        if not (attempt.problems and given.keep):
            shutil.rmtree(folder)
    print(f"\n{given.runs - len(failed)} of {given.runs} runs gave the uninterrupted run's bytes")
    if not (failed and given.keep):
        shutil.rmtree(root)
    else:
        print("kept:", *failed)
    return 1 if failed else 0


def _kill_and_continue(
    command: list[str], folder: Path, expected: dict[str, str], moment: float, *, limit_s: float
) -> Attempt:
    folder.mkdir()
    problems = []
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, errors = process.communicate(timeout=moment)
        found = "finished before"
        if process.returncode != 0:
            problems.append(f"exit code {process.returncode}: {errors.decode()[-200:]!r}")
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        found = "none"
    killed_at = time.monotonic() - started
    if (folder / OUT).exists():
        found = "complete" if found == "none" else found
        if _digests(folder / OUT) != expected:
            found = "INCOMPLETE"
            problems.append("an incomplete output stood in its final place")
    measured, quantized = (
        len(list(folder.glob(f".llmmpq-work/*/{stage}-*/block-*.safetensors"))) for stage in ("measure", "quantize")
    )
    resumed, again = -1, 0.0
    try:
        again, summary = _finish(command, folder, limit_s=limit_s)
        resumed = summary["resumed_blocks"]
    except RuntimeError as error:
        problems.append(str(error))
    else:
        if resumed != quantized:
            problems.append(f"{quantized} blocks were in the journal, {resumed} were taken from it")
        problems += _differences(expected, _digests(folder / OUT))
        problems += [f"{path.name} was left behind" for path in folder.iterdir() if path.name.startswith(f".{OUT}.")]
    return Attempt(
        killed_at_s=killed_at,
        found=found,
        measured_blocks=measured,
        quantized_blocks=quantized,
        resumed_blocks=resumed,
        again_s=again,
        problems=problems,
    )


def _finish(command: list[str], folder: Path, *, limit_s: float | None) -> tuple[float, dict[str, int]]:
    """Run to the end: seconds, and what the run says of itself."""
    folder.mkdir(exist_ok=True)
    started = time.monotonic()
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no end after {limit_s:.0f} s") from None
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-200:]!r}")
    return time.monotonic() - started, json.loads(done.stdout)


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    return [
        f"{name} {'missing' if name not in found else 'unexpected' if name not in expected else 'differs'}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]


if __name__ == "__main__":
    sys.exit(main())
