"""Environments of the competitors of `qbench.py`: one venv each, with pinned versions and nothing of ours in it.

Their requirements contradict each other and ours (gptqmodel asks for another torch than it needs, most pin other
versions of transformers), so they never share an environment. torch comes first, so that nothing else chooses its
version. A stamp holds the steps an environment was made with: after a change of the steps it is made again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

STAMP = "installed.txt"
COMMON = ("transformers==5.23.0", "accelerate==1.15.0", "safetensors==0.8.0", "numpy==2.4.6")


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What pip is called with, one call per step; `variables` are set while installing and while running."""

    steps: tuple[tuple[str, ...], ...]
    variables: Mapping[str, str] = field(default_factory=dict)


ENVIRONMENTS = {
    "autoround": Environment(steps=(COMMON, ("auto-round==0.16.1",))),
    "gptqmodel": Environment(
        steps=(
            (*COMMON, "ninja", "setuptools", "wheel", "packaging", "maturin"),
            ("device-smi", "protobuf", "pillow", "requests", "pypcre", "logbar", "jinja2", "datasets", "pyarrow"),
            ("dill", "threadpoolctl"),
            ("--no-deps", "tokenicer", "defuser", "torchao==0.18.0"),
            # It asks for a newer torch than it needs, and its setup.py imports torch.
            ("--no-deps", "--no-build-isolation", "gptqmodel==7.7.0"),
        ),
        variables={"GPTQMODEL_CPU_WORKERS": "2"},  # with its default its import fails on a machine with two cores
    ),
    "hqq": Environment(steps=((*COMMON, "tqdm", "einops", "termcolor"), ("--no-deps", "hqq==0.2.8.post1"))),
    "quanto": Environment(steps=((*COMMON, "ninja"), ("--no-deps", "optimum-quanto==0.2.7"))),
    "torchao": Environment(steps=(COMMON, ("--no-deps", "torchao==0.18.0"))),
    "llamacpp": Environment(
        steps=((*COMMON, "gguf==0.19.0"), ("llama-cpp-python==0.3.36",)),
        # Only the library: without the rest it is compiled in minutes rather than an hour.
        variables={
            "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF "
            "-DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_CURL=OFF"
        },
    ),
}
TORCH = ("torch==2.13.0",)


def environment_python(tool: str, envs: Path) -> Path:
    """The interpreter that runs a tool's adapter; one without an environment of its own (ours) runs in this one."""
    return envs / tool / "bin" / "python" if tool in ENVIRONMENTS else Path(sys.executable)


def reason_not_installed(tool: str, envs: Path) -> str | None:
    if tool not in ENVIRONMENTS:
        return None
    stamp = envs / tool / STAMP
    if not stamp.is_file():
        return f"not installed: --install --only {tool} makes its environment"
    if stamp.read_text(encoding="utf-8") != describe(tool):
        return f"installed with other versions: --install --only {tool} makes its environment again"
    return None


def install(tool: str, envs: Path) -> str | None:
    """None when the environment is there afterwards, else why it is not. The log stays beside it."""
    if reason_not_installed(tool, envs) is None:
        return None
    folder, environment = envs / tool, ENVIRONMENTS[tool]
    envs.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    log = envs / f"{tool}-install.log"
    pip = (str(environment_python(tool, envs)), "-m", "pip", "install", "--disable-pip-version-check")
    calls = [(sys.executable, "-m", "venv", str(folder)), *((*pip, *step) for step in (TORCH, *environment.steps))]
    with log.open("w", encoding="utf-8") as stream:
        for call in calls:
            stream.write(f"$ {' '.join(call)}\n")
            stream.flush()
            variables = {**os.environ, **environment.variables}
            code = subprocess.run(call, stdout=stream, stderr=subprocess.STDOUT, env=variables, check=False).returncode
            if code != 0:
                return f"could not be installed, {call[-1]} failed: {_last_error(log)} (all of it in {log})"
    (folder / STAMP).write_text(describe(tool), encoding="utf-8")
    return None


def describe(tool: str) -> str:
    """Everything its environment is made from; empty for ours."""
    if tool not in ENVIRONMENTS:
        return ""
    environment = ENVIRONMENTS[tool]
    steps = "".join(f"{' '.join(step)}\n" for step in (TORCH, *environment.steps))
    return steps + "".join(f"{name}={value}\n" for name, value in sorted(environment.variables.items()))


def _last_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.lower().startswith("error")), lines[-1])[:300]
