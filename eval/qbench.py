"""Competitors side by side: each quantizes the same model on the same text and is judged by the same evaluator.

    python eval/qbench.py eval/qbench/demo.yaml [--out eval/results/NAME] [--only hqq,quanto] [--install]
                                                [--envs .qbench] [--csv FILE] [--again hqq|all]
                                                [--text FILE] [--tokens 8192] [--weights FOLDER]

The YAML (`qbench_config.py`) names the model, the texts, the competitors and their bits. Each setting runs in a
process of its own, in the environment that `--install` makes for its tool (`qbench_install.py`), through the adapter
`eval/qbench/TOOL.py`. The adapter gives back the weights that its codes stand for and the bytes that they take
(`qbench_exchange.py`); one evaluator puts them into the model in float32 and compares it with the original
(`qbench_judge.py`). A competitor that is not installed or fails is reported as missing, with the reason.

Writes a table, `OUT.md`, `OUT.png` and rows appended to `OUT.csv`. Rows found there are not made again unless `--again`
names their tool; a row that was made from the same inputs by an older version of our own code is one of them. With
`--weights`, what each competitor made is kept there, to be judged on another text without quantizing again.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qbench_config
import torch
from prediction_report import provenance
from qbench_config import BUILTIN, Competitor, Config, load_config
from qbench_exchange import CALIBRATION_FILE, ERROR_FILE, RESULT_FILE, WEIGHTS_FILE, Job
from qbench_install import ENVIRONMENTS, describe, environment_python, install, reason_not_installed
from qbench_judge import Judge, Verdict
from qbench_report import FIELDS, append_row, draw, markdown, read_rows, show
from safetensors import safe_open
from safetensors.torch import save_file
from windows import spread

from llmmpq import pipeline
from llmmpq.digest import digest_of, file_sha256
from llmmpq.errors import LlmmpqError
from llmmpq.model.checkpoint import Checkpoint
from llmmpq.model.skeleton import build_skeleton
from llmmpq.model.text import packaged_text, read_text
from llmmpq.model.tokens import TokenWindows, evaluation_windows, load_tokens
from llmmpq.session import load_tokenizer

HERE = Path(__file__).parent
WORKER = HERE / "qbench_worker.py"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is the same for everybody."""

    config: Config
    envs: Path
    kept: Path | None
    folder: Path
    shapes: Mapping[str, tuple[int, ...]]
    calibration: TokenWindows
    windows: torch.Tensor
    judge: Judge
    identity: Mapping[str, str]  # digests of the model and both texts

    @property
    def num_weights(self) -> int:
        return sum(rows * columns for rows, columns in self.shapes.values())


def main(arguments: list[str] | None = None) -> int:
    args = _parse(arguments)
    out = args.out or HERE / "results" / f"qbench-{args.config.stem}"
    csv_file = args.csv or out.with_suffix(".csv")
    try:
        return _run(args, out, csv_file)
    except LlmmpqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, help="where results go, without an ending; else eval/results/qbench-CONFIG")
    parser.add_argument("--only", help="tools to run, with commas between")
    parser.add_argument("--install", action="store_true", help="make the environments that are missing")
    parser.add_argument("--envs", type=Path, default=HERE.parent / ".qbench")
    parser.add_argument("--text", help="a text file to judge on, in place of the one in the YAML")
    parser.add_argument("--tokens", type=int, help="how many of it, in place of the number in the YAML")
    parser.add_argument("--weights", type=Path, help="a folder to keep in, and take from, what competitors made")
    parser.add_argument("--csv", type=Path, help="rows to keep and to append to; else OUT.csv")
    parser.add_argument("--again", default="", help="tools whose finished rows are made again, or all")
    return parser.parse_args(arguments)


def _run(args: argparse.Namespace, out: Path, csv_file: Path) -> int:
    config = load_config(args.config)
    given = {key: value for key in ("text", "tokens") if (value := getattr(args, key))}
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, **given))
    wanted = [c for c in config.competitors if not args.only or c.tool in args.only.split(",")]
    missing: dict[str, str] = {}
    envs = args.envs.absolute()
    absent = {tool: _absent(tool, envs, may_install=args.install) for tool in dict.fromkeys(c.tool for c in wanted)}
    bench = _open(config, envs, None if args.weights is None else args.weights.absolute())
    known = {row["key"]: row for row in read_rows(csv_file)}
    asked_again = args.again.split(",")
    for competitor in wanted:
        if reason := absent[competitor.tool]:
            missing[competitor.name] = reason
            continue
        for bits in competitor.bits:
            key = _key(bench, competitor, bits)
            again = competitor.tool in asked_again or "all" in asked_again
            if key in known and not again:
                continue
            print(f"{competitor.name} at {bits:g} bits ...", end=" ", flush=True)
            made = _one(bench, competitor, bits, again=again)
            if isinstance(made, str):
                missing[f"{competitor.name} at {bits:g} bits"] = made
                print("failed", flush=True)
            else:
                append_row(csv_file, {"key": key} | made)
                print(f"true bits {made['true_bits']}, KL {made['kl']}", flush=True)
    asked = dict.fromkeys(_key(bench, c, bits) for c in config.competitors for bits in c.bits)
    known = {row["key"]: row for row in read_rows(csv_file)}
    rows = [known[key] for key in asked if key in known]
    return _report(bench, rows, missing, out, command=_command(args))


def _absent(tool: str, envs: Path, *, may_install: bool) -> str | None:
    if may_install and tool in ENVIRONMENTS:
        print(f"environment of {tool} ...", flush=True)
        return install(tool, envs)
    return reason_not_installed(tool, envs)


def _open(config: Config, envs: Path, kept: Path | None) -> Bench:
    torch.set_num_threads(config.threads)
    folder, model = pipeline.load_model(config.model, device="cpu", dtype="float32")
    checkpoint = Checkpoint.open(folder)
    tokenizer = load_tokenizer(folder)
    wanted = config.calibration
    calibration = load_tokens(
        tokenizer, source=wanted.source, num_tokens=wanted.tokens, window=wanted.window, seed=wanted.seed
    )
    evaluation = config.evaluation
    text = packaged_text("heldout.txt") if evaluation.text == BUILTIN else read_text(evaluation.text)
    windows = evaluation_windows(tokenizer, text, evaluation.window)
    windows = spread(windows, max(1, evaluation.tokens // evaluation.window))
    return Bench(
        config=config,
        envs=envs,
        kept=kept,
        folder=folder,
        shapes={spec.name: tuple(spec.shape) for spec in build_skeleton(folder, checkpoint).linears},
        calibration=calibration,
        windows=windows,
        judge=Judge(model, windows),
        identity={
            "model": digest_of({path.name: file_sha256(path) for path in checkpoint.files}),
            "calibration": calibration.digest,
            "evaluation": digest_of(windows.tolist()),
        },
    )


def _key(bench: Bench, competitor: Competitor, bits: float, *, judged: bool = True) -> str:
    """Of what makes a row, or without the text it is `judged` on, of what makes its weights."""
    asked = {"tool": competitor.tool, "bits": float(bits), "settings": dict(competitor.settings)}
    identity = {what: digest for what, digest in bench.identity.items() if judged or what != "evaluation"}
    return digest_of({**asked, **identity, "environment": describe(competitor.tool)})[:16]


def _one(bench: Bench, competitor: Competitor, bits: float, *, again: bool) -> dict[str, Any] | str:
    """The row of one setting, or why there is none."""
    with tempfile.TemporaryDirectory(prefix="qbench-") as name:
        scratch = Path(name)
        save_file({"ids": bench.calibration.ids.contiguous()}, scratch / CALIBRATION_FILE)
        wanted = bench.config.calibration
        source = str(Path(wanted.source).absolute()) if Path(wanted.source).exists() else wanted.source
        Job(
            model=str(bench.folder.absolute()),
            linears=tuple(bench.shapes),
            calibration=dataclasses.asdict(wanted) | {"source": source, "tokens": bench.calibration.num_tokens},
            bits=bits,
            settings=competitor.settings,
            threads=bench.config.threads,
            scratch=str(scratch),
        ).write()
        made = scratch if bench.kept is None else bench.kept / _key(bench, competitor, bits, judged=False)
        if again or not (made / RESULT_FILE).is_file():
            if reason := _work(bench, competitor, bits, scratch):
                return reason
            if made != scratch:
                made.mkdir(parents=True, exist_ok=True)
                for file in (WEIGHTS_FILE, RESULT_FILE):  # the result last: without it the folder is unfinished
                    shutil.move(scratch / file, made / file)
        facts = json.loads((made / RESULT_FILE).read_text(encoding="utf-8"))
        with safe_open(made / WEIGHTS_FILE, framework="pt") as weights:
            try:
                verdict = bench.judge.judge(bench.shapes, weights.get_tensor)
            except LlmmpqError as error:
                return str(error)
    return _row(bench, competitor, bits, facts, verdict)


def _work(bench: Bench, competitor: Competitor, bits: float, scratch: Path) -> str | None:
    """Run the adapter; None when it has written its result."""
    tool = competitor.tool
    adapter = qbench_config.ADAPTERS / f"{tool}.py"
    # Absolute, but not resolved: a venv's python is a link, and following it leaves the venv.
    call = [str(environment_python(tool, bench.envs).absolute()), str(WORKER), str(adapter), str(scratch)]
    variables = os.environ | {"OMP_NUM_THREADS": str(bench.config.threads), "HF_HUB_OFFLINE": "1"}
    if tool in ENVIRONMENTS:
        variables.pop("PYTHONPATH", None)  # nothing of ours in theirs
        variables |= ENVIRONMENTS[tool].variables
    logs = bench.envs / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / (re.sub(r"[^A-Za-z0-9.]+", "-", f"{competitor.name} {bits:g}") + ".log")
    with log.open("w", encoding="utf-8") as stream:
        # In a session of its own, so that its children go with it when the time is over.
        process = subprocess.Popen(
            call, stdout=stream, stderr=subprocess.STDOUT, env=variables, cwd=scratch, start_new_session=True
        )
        try:
            code = process.wait(bench.config.timeout_s)
        except subprocess.TimeoutExpired:
            return f"stopped after timeout_s, {bench.config.timeout_s} s (log: {log})"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code == 0:
        return None
    if (scratch / ERROR_FILE).is_file():
        return (scratch / ERROR_FILE).read_text(encoding="utf-8")
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"exit code {code}: {(lines or ['no output'])[-1][:300]} (log: {log})"


def _row(
    bench: Bench, competitor: Competitor, bits: float, facts: Mapping[str, Any], verdict: Verdict
) -> dict[str, Any]:
    nbytes = sum(facts["nbytes"].values())
    here, text = provenance(), Path(bench.config.evaluation.text)
    row = {
        "name": competitor.name,
        "tool": competitor.tool,
        "bits": f"{bits:g}",
        "settings": json.dumps(dict(competitor.settings), sort_keys=True),
        "true_bits": f"{8 * nbytes / bench.num_weights:.4f}",
        "nbytes": nbytes,
        "seconds": f"{facts['seconds']:.1f}",
        "notes": json.dumps(facts["notes"]),
        "model": f"{bench.config.model} {bench.identity['model'][:12]}",
        "calibration": f"{bench.calibration.source} {bench.calibration.num_tokens} {bench.calibration.digest[:12]}",
        "evaluation": f"{text.name} {bench.windows.numel()} {bench.identity['evaluation'][:12]}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **{key: facts[key] for key in ("version", "counted", "torch", "transformers")},
        **{key: here[key] for key in ("commit", "python", "machine")},
        **{key: f"{value:.6g}" for key, value in dataclasses.asdict(verdict).items()},
    }
    assert set(row) | {"key"} == set(FIELDS)
    return row


def _report(bench: Bench, rows: list[dict[str, str]], missing: Mapping[str, str], out: Path, *, command: str) -> int:
    floor, config = bench.judge.noise_floor, bench.config
    text = "packaged held-out text" if config.evaluation.text == BUILTIN else Path(config.evaluation.text).name
    facts = {
        "model": f"{config.model}, {bench.num_weights:,} weights in {len(bench.shapes)} linears, "
        f"NLL {bench.judge.nll:.4f} nats per token",
        "calibrated on": f"{bench.calibration.num_tokens:,} tokens of {bench.calibration.source}, the same for all",
        "judged on": f"{bench.windows.numel():,} tokens of {text}, in windows of {bench.windows.shape[1]}, in float32",
        "the original computed in bfloat16": f"extra NLL {floor.extra_nll:+.5f}, KL {floor.kl:.6f}",
        "machine": str(provenance()["machine"]),
    }
    show(rows, missing, heading=f"{config.model}: {facts['judged on']}")
    if not rows:
        return 1
    out.parent.mkdir(parents=True, exist_ok=True)
    content = markdown(rows, missing, command=command, facts=facts)
    out.with_suffix(".md").write_text(content, encoding="utf-8")
    written = [out.with_suffix(".md")]
    try:
        draw(out.with_suffix(".png"), rows, title=f"{config.model}: {facts['judged on']}", floor_kl=floor.kl)
        written.append(out.with_suffix(".png"))
    except ImportError:
        print("no plot without matplotlib: pip install 'llmmpq[plot]'", file=sys.stderr)
    print("written:", *written)
    return 0


def _command(args: argparse.Namespace) -> str:
    """What made the report; of a text only its name, because its folder is this machine's."""
    given = {key: getattr(args, key) for key in ("out", "text", "tokens", "csv")}
    given["text"] = args.text and Path(args.text).name
    return " ".join(["python eval/qbench.py", str(args.config), *(f"--{k} {v}" for k, v in given.items() if v)])


if __name__ == "__main__":
    sys.exit(main())
