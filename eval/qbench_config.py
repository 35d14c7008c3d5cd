"""The YAML that `qbench.py` runs: one model, one calibration text, one text to judge on, and the competitors.

A competitor is one curve of the plot: an adapter (`tool`), its `settings`, and the `bits` to run it at. Entries with
the same `name` share a curve, for example where small budgets need larger groups. `settings` are the adapter's
own: the docstring of each file in `eval/qbench/` lists them, and an unknown one fails there, before any work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from llmmpq.errors import RecipeError

ADAPTERS = Path(__file__).parent / "qbench"
BUILTIN = "builtin"


@dataclass(frozen=True, kw_only=True)
class CalibrationSpec:
    source: str = BUILTIN  # as `llmmpq quantize --calib`
    tokens: int = 16384  # for everybody; ours takes the probe for its measurement out of them
    window: int = 256
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class EvaluationSpec:
    text: str = BUILTIN  # or a file
    tokens: int = 8192
    window: int = 512


@dataclass(frozen=True, kw_only=True)
class Competitor:
    name: str
    tool: str
    bits: tuple[float, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Config:
    model: str
    competitors: tuple[Competitor, ...]
    calibration: CalibrationSpec = CalibrationSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    threads: int = 1  # of every competitor; more than the free cores make some of them hang
    timeout_s: int = 3600  # of one setting of one competitor


def load_config(path: Path) -> Config:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    values = _checked(Config, data, f"{path}")
    entries = values.get("competitors")
    if not isinstance(entries, list) or not entries:
        raise RecipeError(f"{path}: competitors is {entries!r}; allowed: a list with at least one entry")
    values["competitors"] = tuple(_competitor(item, f"{path}: competitors[{n}]") for n, item in enumerate(entries))
    for key, kind in (("calibration", CalibrationSpec), ("evaluation", EvaluationSpec)):
        if key in values:
            values[key] = kind(**_checked(kind, values[key], f"{path}: {key}"))
    return Config(**values)


def _competitor(data: Any, where: str) -> Competitor:
    values = _checked(Competitor, data, where)
    tools = sorted(path.stem for path in ADAPTERS.glob("*.py"))
    if values["tool"] not in tools:
        raise RecipeError(f"{where}: tool is {values['tool']!r}; allowed: {', '.join(tools)}")
    bits = values["bits"]
    if not isinstance(bits, list) or not bits or not all(type(b) in (int, float) and 0 < b <= 16 for b in bits):
        raise RecipeError(f"{where}: bits is {bits!r}; allowed: a list of numbers above 0, at most 16")
    if not isinstance(values.get("settings", {}), Mapping):
        raise RecipeError(f"{where}: settings is {values['settings']!r}; allowed: a mapping")
    return Competitor(**(values | {"bits": tuple(bits)}))


def _checked(kind: Any, data: Any, where: str) -> dict[str, Any]:
    """The mapping, with known keys, none that is needed missing, texts and positive numbers where they belong."""
    known = {item.name: item for item in dataclasses.fields(kind)}
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where} is {data!r}; allowed: a mapping with {', '.join(known)}")
    for key in data:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}; allowed: {', '.join(known)}")
    for key, item in known.items():
        needed = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if needed and key not in data:
            raise RecipeError(f"{where}: {key} is missing")
    hints = get_type_hints(kind)
    for key, value in data.items():
        least = 0 if key == "seed" else 1
        if hints[key] is int and not (type(value) is int and value >= least):
            raise RecipeError(f"{where}: {key} is {value!r}; allowed: a whole number of at least {least}")
        if hints[key] is str and not (isinstance(value, str) and value):
            raise RecipeError(f"{where}: {key} is {value!r}; allowed: text")
    return dict(data)
