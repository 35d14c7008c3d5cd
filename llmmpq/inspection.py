"""A quantized folder read back: what it holds, byte by byte, and whether it is still what was written.

`save_pretrained` writes the tensors and config.json, and leaves out what only llmmpq writes: plan, report, digests.
Such a folder is as good a model. The scheme of every packed linear is in config.json, its shape follows from the
architecture; what it was asked for is not known, and there is nothing to verify its bytes against.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from llmmpq.errors import CheckpointError
from llmmpq.hf import METHOD, LlmmpqConfig
from llmmpq.model.checkpoint import Checkpoint
from llmmpq.model.skeleton import locate_linears
from llmmpq.output import DIGESTS_FILE, PLAN_FILE, RECIPE_FILE, REPORT_FILE, read_object, read_plan, verify_digests
from llmmpq.records import FUSED_ROLES, Plan, PlannedLinear
from llmmpq.runtime.choice import explain, explain_together
from llmmpq.runtime.contents import checked_names, content_problems
from llmmpq.scheme import DTYPE_NBYTES

CONFIG_FILE = "config.json"
NOT_RECORDED = "not recorded"  # the method of a plan that is read off a folder without one


def is_quantized(folder: Path) -> bool:
    """Whether the folder claims to be ours. plan.json without such a config is a damaged folder, not a plain model."""
    return (folder / PLAN_FILE).is_file() or _quantization(folder) is not None


def plan_of(folder: Path) -> Plan | None:
    """plan.json, or what config.json says where that is missing; None for a model that is not quantized by llmmpq."""
    if (folder / PLAN_FILE).is_file():
        return read_plan(folder / PLAN_FILE)
    quantization = _quantization(folder)
    if quantization is None:
        return None
    schemes = LlmmpqConfig.from_dict(quantization).linears
    linears = {
        name: PlannedLinear(shape=shape, block=block, role=name.rpartition(".")[2], scheme=schemes[name])
        for name, (block, shape) in locate_linears(folder, schemes).items()
    }
    return Plan(linears=linears, method=NOT_RECORDED, budget={})


def _quantization(folder: Path) -> dict[str, Any] | None:
    """`quantization_config` of config.json when it is ours."""
    if not (folder / CONFIG_FILE).is_file():
        return None
    quantization = read_object(folder / CONFIG_FILE).get("quantization_config")
    ours = isinstance(quantization, dict) and quantization.get("quant_method") == METHOD
    return quantization if ours else None


def recipe_of(folder: Path) -> dict[str, Any]:
    """The settings a folder was made with, also by another version; empty where they cannot be read."""
    try:
        recipe = yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return {}
    return recipe if isinstance(recipe, dict) else {}


def inspect_folder(folder: Path, *, advance: Callable[[int], None] = lambda num: None) -> dict[str, Any]:
    """What a quantized folder holds, byte by byte, and whether it is still what was written.

    `advance` is told of bytes that were compared with their digests.
    """
    if not folder.exists():
        raise CheckpointError(f"{folder} does not exist: give a folder that `llmmpq quantize` wrote")
    plan = plan_of(folder)
    if plan is None:
        raise CheckpointError(
            f"{folder} is not a model quantized by llmmpq: it has no {PLAN_FILE}, and no {CONFIG_FILE} with the "
            f"'quant_method' {METHOD!r}"
        )
    saved_again = not (folder / PLAN_FILE).is_file()
    verified = (folder / DIGESTS_FILE).is_file() or not saved_again
    report = _report_of_saved_again(verified=verified) if saved_again else _read_report(folder / REPORT_FILE)
    checkpoint = Checkpoint.open(folder)
    problems = verify_digests(folder, advance=advance) if verified else []
    quantized_nbytes, expected_names = 0, set()
    for name, linear in plan.linears.items():
        fits = True
        for key, (dtype, shape) in linear.scheme.tensors(linear.shape).items():
            entry = checkpoint.entries.get(f"{name}.{key}")
            expected_names.add(f"{name}.{key}")
            if entry is None or entry.shape != shape or entry.nbytes != DTYPE_NBYTES[dtype] * math.prod(shape):
                problems.append(f"{name}.{key} is not stored as {CONFIG_FILE if saved_again else PLAN_FILE} says")
                fits = False
            else:
                quantized_nbytes += entry.nbytes
        if fits and checked_names(linear.scheme):
            problems += _content_problems(checkpoint, name, linear)
    return {
        "folder": str(folder),
        "layout_version": plan.layout_version,
        "method": plan.method,
        "budget": dict(plan.budget),
        "bits_per_weight": 8 * quantized_nbytes / plan.num_weights,
        "code_bits_per_weight": plan.code_bits_per_weight,
        "num_weights": plan.num_weights,
        "quantized_nbytes": quantized_nbytes,
        "kept_nbytes": checkpoint.nbytes - quantized_nbytes,
        "total_nbytes": checkpoint.nbytes,
        "predicted_loss": plan.predicted_loss,
        "optimality_gap": plan.optimality_gap,
        "measured_kl": plan.measured_kl,
        "source_nbytes": report.get("source_nbytes"),
        "linears": [
            {
                "name": name,
                "block": linear.block,
                "role": linear.role,
                "shape": list(linear.shape),
                **linear.scheme.to_json(),
                "nbytes": linear.nbytes,
            }
            for name, linear in plan.linears.items()
        ],
        "problems": problems,
        "verified": verified,
        "fallbacks": report["fallbacks"],
        "warnings": report["warnings"],
        "kept": report["kept"],
        "provenance": dict(plan.provenance),
    }


def _content_problems(checkpoint: Checkpoint, name: str, linear: PlannedLinear) -> list[str]:
    keys = checked_names(linear.scheme)
    try:
        stored = checkpoint.read(f"{name}.{key}" for key in keys)
    except CheckpointError as error:  # NaN or inf
        return [str(error)]
    found = content_problems({key: stored[f"{name}.{key}"] for key in keys}, linear.scheme, linear.shape)
    return [f"{name}: {problem}" for problem in found]


PROMPT_ROWS = 512  # of a usual prompt; a step of decoding has one


def explain_runtime(plan: Plan, *, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """For every packed matrix which kernel would run here, in decoding and on a prompt, and why not the others.

    `together`: which matrices share a launch, or why they do not.
    """
    return {
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "linears": [
            {
                "name": name,
                "candidates": {
                    str(num_rows): [
                        candidate._asdict()
                        for candidate in explain(device, dtype, linear.shape, linear.scheme, num_rows=num_rows)
                    ]
                    for num_rows in (1, PROMPT_ROWS)
                },
            }
            for name, linear in plan.linears.items()
        ],
        "together": [
            {
                "names": list(names),
                "rows": {
                    str(num_rows): explain_together(
                        device,
                        dtype,
                        [(plan.linears[name].shape, plan.linears[name].scheme) for name in names],
                        num_rows=num_rows,
                    )._asdict()
                    for num_rows in (1, PROMPT_ROWS)
                },
            }
            for names in _sets_of(plan)
        ],
    }


def _sets_of(plan: Plan) -> list[tuple[str, ...]]:
    """Linears side by side whose names say that they have one input, where the plan has several of a set."""
    sets = []
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in plan.linears):
        for roles in FUSED_ROLES:
            names = tuple(name for role in roles if (name := f"{parent}.{role}") in plan.linears)
            sets += [names] if len(names) > 1 else []
    return sets


def _report_of_saved_again(*, verified: bool) -> dict[str, Any]:
    warnings = [f"there is no {PLAN_FILE}: the widths are those of {CONFIG_FILE}, what was asked for is not known"]
    if not verified:
        warnings.append(
            f"there is no {DIGESTS_FILE}: whether a byte has changed since it was written cannot be verified"
        )
    return {"fallbacks": [], "warnings": warnings, "kept": []}


def _read_report(path: Path) -> dict[str, Any]:
    report = read_object(path)
    for key in ("fallbacks", "warnings", "kept"):
        if not isinstance(report.get(key), list):
            raise CheckpointError(f"{path} lacks the list {key!r}: it is not the file that was written")
    return report
