"""What passes between `qbench.py` and an adapter in its own environment: a job in, a result out, as files.

In: `job.json` (the model's folder, the linears to quantize, bits, settings) and `calibration.safetensors` (the same
token ids for everybody). Out: `weights.safetensors`, the weights in float32 that the quantized linears stand for, and
`result.json` with the bytes that each linear takes. So one evaluator judges all, whatever runs a format: what is
compared is how well codes were chosen, not the rounding of somebody's kernels.

This file is imported on both sides, so it needs only torch, safetensors and transformers.

What counts as bytes: everything the tool stores for a linear except its bias, which no tool quantizes. From its files
where it writes any; where it keeps codes unpacked in memory, what its packed format would take. Every adapter states
which in `counted`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

JOB_FILE, CALIBRATION_FILE = "job.json", "calibration.safetensors"
WEIGHTS_FILE, RESULT_FILE, ERROR_FILE = "weights.safetensors", "result.json", "error.txt"


class AdapterError(Exception):
    """Something a competitor cannot do, in one line; reported as the reason why it is missing."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One setting of one competitor. `scratch` is its own folder and goes away afterwards."""

    model: str
    linears: tuple[str, ...]
    calibration: Mapping[str, Any]  # source, tokens, window, seed: for ours, which reads the text itself
    bits: float
    settings: Mapping[str, Any]
    threads: int
    scratch: str

    def setting(self, name: str, default: Any, allowed: Iterable[Any] | None = None) -> Any:
        value = self.settings.get(name, default)
        if allowed is not None and value not in (choices := list(allowed)):
            raise AdapterError(f"setting {name} is {value!r}; allowed: {', '.join(map(str, choices))}")
        return value

    def accept_settings(self, *names: str) -> None:
        for name in self.settings:
            if name not in names:
                raise AdapterError(f"unknown setting {name!r}; allowed: {', '.join(names)}")

    def whole_bits(self, *allowed: int) -> int:
        if self.bits not in allowed:
            raise AdapterError(f"{self.bits:g} bits; this tool has {', '.join(map(str, allowed))}")
        return int(self.bits)

    def ids(self) -> torch.Tensor:
        """The calibration windows, [num_windows, window]."""
        return load_file(Path(self.scratch) / CALIBRATION_FILE)["ids"]

    def load_model(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()

    def load_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model)

    def write(self) -> Path:
        path = Path(self.scratch) / JOB_FILE
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: Path) -> Job:
        data = json.loads(path.read_text(encoding="utf-8"))
        return cls(**(data | {"linears": tuple(data["linears"])}))


@dataclass(frozen=True, kw_only=True)
class Result:
    """What an adapter found: `weights` [out, in] and `nbytes` by linear, and how the bytes were counted."""

    weights: Mapping[str, torch.Tensor]
    nbytes: Mapping[str, int]
    counted: str
    package: str  # whose version is reported
    notes: tuple[str, ...] = ()


def write_result(result: Result, job: Job, *, seconds: float) -> None:
    for what, names in (("weights", result.weights), ("bytes", result.nbytes)):
        if difference := sorted(set(job.linears) ^ set(names)):
            raise AdapterError(
                f"{what} of {len(names)} linears, asked were {len(job.linears)}: {difference[0]} differs"
            )
    stored = {name: weight.detach().to(torch.float32).contiguous() for name, weight in result.weights.items()}
    save_file(stored, Path(job.scratch) / WEIGHTS_FILE)
    facts = {
        "nbytes": dict(result.nbytes),
        "counted": result.counted,
        "version": installed_version(result.package),
        "notes": list(result.notes),
        "torch": torch.__version__,
        "transformers": installed_version("transformers"),
        "seconds": seconds,
    }
    (Path(job.scratch) / RESULT_FILE).write_text(json.dumps(facts), encoding="utf-8")


def installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def stored_tensors(folder: Path, linears: Iterable[str]) -> dict[str, dict[str, torch.Tensor]]:
    """By linear, every tensor of a folder's safetensors files that is named as the linear and one word more."""
    found: dict[str, dict[str, torch.Tensor]] = {name: {} for name in linears}
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  # not a mapping
                owner, _, part = key.rpartition(".")
                if owner in found and part != "bias":
                    found[owner][part] = tensors.get_tensor(key)
    if empty := [name for name, parts in found.items() if not parts]:
        raise AdapterError(f"nothing was stored for {empty[0]} and {len(empty) - 1} others")
    return found


def nbytes_of(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def packed_nbytes(num_codes: int, bits: int, *parameters: int) -> int:
    """Codes packed without gaps, and what is stored beside them, given in bits."""
    return math.ceil(num_codes * bits / 8) + sum(math.ceil(each / 8) for each in parameters)
