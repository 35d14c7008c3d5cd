"""The quantized model's folder: written whole or not at all, and compared with what a run would write.

A folder is built beside its final place and renamed into it when its last byte is on disk, so an interrupted run
never leaves something that looks like a model. Nothing in it depends on when, where or how often the run was
interrupted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmmpq.digest import file_sha256
from llmmpq.errors import CheckpointError, RecipeError
from llmmpq.hf import LlmmpqConfig
from llmmpq.model.checkpoint import TORCH_DTYPES, Checkpoint, OutputTensor, write_bytes, write_checkpoint, write_text
from llmmpq.model.skeleton import KeptTensor
from llmmpq.model.source import companion_files
from llmmpq.model.text import STANDARD_SOURCE
from llmmpq.recipe import Recipe, load_recipe
from llmmpq.records import EDITED, Plan

DIGESTS_FILE = "digests.json"
PLAN_FILE = "plan.json"
RECIPE_FILE = "recipe.yaml"
REPORT_FILE = "report.json"
LONGEST_NAME = 200  # the longest file name that all usual file systems take is 255, and we add to it

# Gives the stored tensors of one linear ("words", "scales", "zeros") when the writer reaches them.
ReadPacked = Callable[[str], Mapping[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class OutputSpec:
    """All that goes into a quantized folder."""

    source: Path
    checkpoint: Checkpoint
    kept: Sequence[KeptTensor]
    stored_names: Mapping[str, str]
    plan: Plan
    recipe_yaml: str
    report: Mapping[str, Any]
    max_shard_nbytes: int
    untied: bool  # weights that the source shares are stored apart
    read_packed: ReadPacked = field(repr=False)

    @property
    def tensor_nbytes(self) -> int:
        return self.plan.nbytes + sum(tensor.nbytes for tensor in self.kept)


def claim_output(
    out: Path, *, overwrite: bool, recipe_yaml: str, provenance: Mapping[str, Any], plan: Plan | None
) -> bool:
    """True when `out` is already the intact result of just this run. Refuses early what could not be replaced later.

    A folder that is not ours is never touched. `plan` is the one given by hand; without it the plan follows from the
    recipe and the provenance.
    """
    refuse_output(out)
    if not out.exists() or not any(out.iterdir()):
        return False
    same = not _differences(out, recipe_yaml, provenance, plan)
    problems = verify_digests(out) if same else []
    if same and not problems:
        return True
    if overwrite:
        return False
    if problems:
        raise CheckpointError(f"--out {out} was finished but is damaged ({problems[0]}): redo it with --overwrite")
    raise _other_model(out, _differences(out, recipe_yaml, provenance, plan))


def foresee_output(out: Path, *, overwrite: bool, recipe: Recipe, provenance: Mapping[str, Any]) -> bool:
    """What `claim_output` will say, from what is known without hashing the model and reading the text.

    True when `out` seems to be the result of just this run; `provenance` lacks the digests.
    """
    refuse_output(out)
    if overwrite or not out.exists() or not any(out.iterdir()):
        return False
    different = _differences(out, _with_stored_source(out, recipe).to_yaml(), provenance, None)
    if different:
        raise _other_model(out, different)
    return True


def _with_stored_source(out: Path, recipe: Recipe) -> Recipe:
    """A source that names no text exactly, such as auto, taken for the one it stood for when `out` was made."""
    asked = recipe.calibration.source
    try:
        stored = load_recipe(out / RECIPE_FILE).calibration.source
    except RecipeError:
        return recipe
    may_be = stored.startswith(asked + ":") if asked != "auto" else stored in ("builtin", STANDARD_SOURCE)
    return recipe.override({"calibration.source": stored}) if may_be else recipe


def _other_model(out: Path, differences: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        f"--out {out} already holds a quantized model made from other inputs ({', '.join(differences)}). Choose "
        "another --out, or replace it with --overwrite."
    )


def refuse_output(out: Path) -> None:
    """An error when `out` can never become the output, whatever the recipe."""
    if len(out.name.encode()) > LONGEST_NAME:
        raise CheckpointError(f"--out {out.name[:40]}...: name too long (over {LONGEST_NAME} bytes)")
    if out.resolve() == Path.cwd().resolve():
        raise CheckpointError(f"--out {out} is the current folder, which cannot be replaced: name a folder in it")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise CheckpointError(f"--out {out} exists and is not a folder: choose another")
    _refuse_foreign(out)


def _refuse_foreign(out: Path) -> None:
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / PLAN_FILE).is_file() or not (out / DIGESTS_FILE).is_file():
        raise CheckpointError(
            f"--out {out} holds something else than a quantized model ({sorted(p.name for p in out.iterdir())[0]!r}, "
            "...): it is left alone. Choose another --out."
        )


def _differences(out: Path, recipe_yaml: str, provenance: Mapping[str, Any], plan: Plan | None) -> list[str]:
    """What sets the run that made `out` apart from this one; empty when they are the same run."""
    try:
        stored = read_plan(out / PLAN_FILE)
        recipe = (out / RECIPE_FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, CheckpointError):
        return ["its plan or recipe cannot be read"]
    known = dict(stored.provenance)
    different = [key.replace("_", " ") for key in provenance if known.get(key) != provenance[key]]
    if recipe != recipe_yaml:
        different.append("recipe")
    by_hand = stored.method == EDITED
    if by_hand != (plan is not None) or (plan is not None and dict(stored.linears) != dict(plan.linears)):
        different.append("plan")
    return different


def write_output(out: Path, spec: OutputSpec, *, on_bytes: Callable[[int], None]) -> int:
    """Write the folder and move it into place. Returns the bytes of its tensors."""
    unfinished = out.parent / f".{out.name}.partial"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        digests = write_checkpoint(
            unfinished, _output_tensors(spec), max_shard_nbytes=spec.max_shard_nbytes, on_bytes=on_bytes
        )
        for path in companion_files(spec.source):
            digests[path.name] = write_bytes(unfinished / path.name, path.read_bytes())
        config = json.loads((spec.source / "config.json").read_text(encoding="utf-8"))
        if spec.untied:
            _untie(config)
        config["quantization_config"] = LlmmpqConfig(
            {name: linear.scheme for name, linear in spec.plan.linears.items()}
        ).to_dict()
        for name, text in (
            ("config.json", _json(config)),
            (PLAN_FILE, _json(spec.plan.to_json())),
            (RECIPE_FILE, spec.recipe_yaml),
            (REPORT_FILE, _json(spec.report)),
        ):
            digests[name] = write_text(unfinished / name, text)
        write_text(unfinished / DIGESTS_FILE, _json(dict(sorted(digests.items()))))
        _move_into_place(unfinished, out)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {out}: {error.strerror}. Free some space or choose another --out, then run the same "
            "command again: finished work is kept."
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return spec.tensor_nbytes


def _untie(config: dict[str, Any]) -> None:
    """Wherever the config says it: models with parts have one for each part."""
    config["tie_word_embeddings"] = False
    for part in config.values():
        if isinstance(part, dict) and "tie_word_embeddings" in part:
            _untie(part)


def _move_into_place(unfinished: Path, out: Path) -> None:
    retired = out.parent / f".{out.name}.replaced"
    if out.exists():
        # Looked at again: hours may have passed since the run began.
        _refuse_foreign(out)
        shutil.rmtree(retired, ignore_errors=True)
        # rename cannot replace a folder that holds files; the old model goes only when the new one is in its place.
        out.rename(retired)
    try:
        unfinished.rename(out)
    except OSError:
        if retired.exists():
            retired.rename(out)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def _output_tensors(spec: OutputSpec) -> list[OutputTensor]:
    """In the order of the model, so that shards hold neighbouring blocks."""
    kept = {tensor.name for tensor in spec.kept}
    tensors = []
    for name, stored in spec.stored_names.items():
        if name in kept:
            entry = spec.checkpoint.entries[stored]
            tensors.append(
                OutputTensor(
                    name=name,
                    dtype=TORCH_DTYPES[entry.dtype],
                    shape=entry.shape,
                    chunks=partial(spec.checkpoint.row_chunks, stored),
                )
            )
            continue
        linear_name = name.removesuffix(".weight")
        linear = spec.plan.linears[linear_name]
        for key, (dtype, shape) in linear.scheme.tensors(linear.shape).items():
            chunks = partial(_packed_chunks, spec.read_packed, linear_name, key)
            tensors.append(
                OutputTensor(name=f"{linear_name}.{key}", dtype=getattr(torch, dtype), shape=shape, chunks=chunks)
            )
    return tensors


def _packed_chunks(read_packed: ReadPacked, linear_name: str, key: str) -> list[torch.Tensor]:
    return [read_packed(linear_name)[key]]


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def verify_digests(folder: Path, *, advance: Callable[[int], None] = lambda num: None) -> list[str]:
    """What differs from digests.json: nothing, in an intact folder."""
    try:
        digests = read_object(folder / DIGESTS_FILE)
    except CheckpointError as error:
        return [str(error)]
    problems = []
    for name, digest in digests.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            problems.append(f"{name} is missing")
        elif file_sha256(path, advance=advance) != digest:
            problems.append(f"{name} is not the file that was written (its digest differs)")
    known = {*digests, DIGESTS_FILE, "README.md", ".gitattributes"}
    problems += [
        f"{path.name} was not written by llmmpq"
        for path in sorted(folder.iterdir())
        if path.name not in known and path.suffix in (".safetensors", ".bin", ".pt")
    ]
    return problems


def read_plan(path: Path) -> Plan:
    try:
        return Plan.from_json(read_object(path))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None


def read_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {type(data).__name__}, expected a JSON object")
    return data
