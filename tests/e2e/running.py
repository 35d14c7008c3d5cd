"""How the end-to-end tests run llmmpq and read what it wrote, without using llmmpq's own readers."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from llmmpq.cli import main
from llmmpq.recipe import Recipe
from llmmpq.workdir import Stage

PACKED_KEYS = ("words", "scales", "zeros", "order", "scale_base")
GROUP_SIZE = 28  # divides no input size of the tiny models


class Interrupted(Exception):
    """Stands for whatever ends a run early."""


@dataclass
class Recorder:
    """A Progress that keeps what it is told, and can end the run at its n-th step."""

    interrupt_at: int | None = None
    notes: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    num_steps: int = 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def task(self, label: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
        self.tasks.append(label)

        def advance(_num_done: int) -> None:
            self.num_steps += 1
            if self.num_steps == self.interrupt_at:
                raise Interrupted(f"at step {self.num_steps}, {label}")

        yield advance


@contextmanager
def interrupted_after(patch: pytest.MonkeyPatch, stage: str, name: str) -> Iterator[None]:
    """The run inside ends as soon as `name` is written into the folder of that stage."""
    write: Callable[..., Any] = Stage.write

    def interrupting(self: Stage, written: str, *args: Any, **options: Any) -> Any:
        result = write(self, written, *args, **options)
        if written == name and self.folder.name.startswith(stage):
            raise Interrupted(f"after {name} of {stage}")
        return result

    with patch.context() as scoped:
        scoped.setattr(Stage, "write", interrupting)
        with pytest.raises(Interrupted):
            yield


def tiny_recipe(model: Path, calibration_file: Path, **changes: Any) -> Recipe:
    """Small and fast: 256 tokens, one thread, two options of two widths, one sweep; `changes` as section__key."""
    recipe = Recipe().override(
        {
            "model": str(model),
            "budget.avg_bits": 5.0,
            "calibration.source": str(calibration_file),
            "calibration.tokens": 256,
            "calibration.window": 64,
            "measurement.tokens": 64,
            "allocation.profiles": [3.5, 6.0],
            "allocation.refine": 1,
            "quantizer.group_size": GROUP_SIZE,
            "quantizer.sweeps": 1,
            "run.threads": 1,
        }
    )
    return recipe.override({key.replace("__", "."): value for key, value in changes.items()})


class Outcome(NamedTuple):
    code: int
    stdout: str
    stderr: str


def run_here(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> Outcome:
    """`llmmpq ARGUMENTS` in this process: no seconds spent on importing torch again."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return Outcome(code, *capsys.readouterr())


def run_apart(arguments: Sequence[object]) -> Outcome:
    """`python -m llmmpq ARGUMENTS`."""
    command = [sys.executable, "-m", "llmmpq", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def leftovers(folder: Path) -> list[str]:
    """Anything that a writer had begun and not finished."""
    return [str(path) for path in folder.rglob("*") if "partial" in path.name or "replaced" in path.name]


class RawTensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def raw_tensors(folder: Path) -> dict[str, RawTensor]:
    """Every tensor of a folder's safetensors files, by the published layout of such files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:start]).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                assert name not in found, f"{name} is stored twice"
                found[name] = RawTensor(entry["dtype"], tuple(entry["shape"]), content[start + first : start + last])
    return found


def packed_names(name: str, entry: Mapping[str, Any]) -> list[str]:
    keys = ["words", "scales"] + ([] if entry["symmetric"] else ["zeros"])
    keys += ["order"] if isinstance(entry["bits"], dict) else []
    return [f"{name}.{key}" for key in keys + (["scale_base"] if "scale_dtype" in entry else [])]


def read_plan(folder: Path) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    return plan


def bits_of(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Linear -> its width, or as a tuple the runs of one with several."""
    bits = {name: entry["bits"] for name, entry in plan["linears"].items()}
    return {name: tuple(own.items()) if isinstance(own, dict) else own for name, own in bits.items()}


def assert_plan_is_what_is_stored(folder: Path) -> dict[str, Any]:
    """plan.json against the bytes in the files; returns the plan."""
    plan, stored = read_plan(folder), raw_tensors(folder)
    total, num_weights = 0, 0
    packed = set()
    for name, entry in plan["linears"].items():
        names = packed_names(name, entry)
        nbytes = sum(len(stored[key].data) for key in names)
        assert nbytes == entry["nbytes"], name
        assert f"{name}.weight" not in stored
        packed |= set(names)
        total += nbytes
        num_weights += entry["shape"][0] * entry["shape"][1]
    assert {key for key in stored if key.rsplit(".", 1)[1] in PACKED_KEYS} == packed
    assert (plan["nbytes"], plan["num_weights"]) == (total, num_weights)
    assert plan["bits_per_weight"] == pytest.approx(8 * total / num_weights, abs=1e-6)
    if plan["budget"]["kind"] == "avg_bits":
        assert 8 * total <= plan["budget"]["value"] * num_weights
    return plan


def decoded_weight(stored: Mapping[str, RawTensor], name: str, entry: Mapping[str, Any]) -> np.ndarray:
    """The weight of one linear by docs/format.md, bit by bit."""
    num_rows, num_columns = entry["shape"]
    size = entry["group_size"]
    num_groups = -(-num_columns // size)

    def array(key: str, dtype: str) -> np.ndarray:
        raw = stored[f"{name}.{key}"]
        return np.frombuffer(raw.data, dtype=dtype).reshape(raw.shape)

    if "scale_dtype" in entry:
        factors = (array("scales", "<u1").astype("<u2") << 6).view("<f2").astype(np.float32)
        scales = array("scale_base", "<f4") * factors
    else:
        scales = array("scales", "<f2").astype(np.float32)
    words, mixed = array("words", "<i4"), isinstance(entry["bits"], dict)
    runs = [(int(bits), count) for bits, count in entry["bits"].items()] if mixed else [(entry["bits"], num_groups)]
    order = array("order", "<i4") if mixed else np.arange(num_groups)
    zero_words = None if entry["symmetric"] else array("zeros", "<i4").reshape(-1)
    weight = np.full((num_rows, num_groups * size), np.nan, dtype=np.float32)
    for bits, count in runs:  # each run eats what is its own
        run_columns = count * size if mixed else num_columns
        num_words, num_zero_words = bits * -(-run_columns // 32), count * bits * -(-num_rows // 32)
        codes = _unpacked(np.ascontiguousarray(words[:, :num_words]), bits, run_columns)
        zeros = np.full((num_rows, count), 2 ** (bits - 1), dtype=np.float32)
        if zero_words is not None:
            zeros = _unpacked(zero_words[:num_zero_words].reshape(count, -1), bits, num_rows).T
            zero_words = zero_words[num_zero_words:]
        for place, group in enumerate(order[:count]):
            part = codes[:, place * size : (place + 1) * size]
            columns = slice(group * size, group * size + part.shape[1])
            weight[:, columns] = (part - zeros[:, place, None]) * scales[:, place, None]
        words, scales, order = words[:, num_words:], scales[:, count:], order[count:]
    return weight[:, :num_columns]


def _unpacked(words: np.ndarray, bits: int, num_codes: int) -> np.ndarray:
    stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little").astype(np.float32)
    if bits == 3:
        low, high = np.split(stream, [stream.shape[1] * 2 // 3], axis=1)
        codes = _as_numbers(low, 2) + 4 * high
    else:
        codes = _as_numbers(stream, bits)
    return codes[:, :num_codes]


def _as_numbers(stream: np.ndarray, bits: int) -> np.ndarray:
    numbers: np.ndarray = stream.reshape(len(stream), -1, bits) @ (2.0 ** np.arange(bits)).astype(np.float32)
    return numbers
