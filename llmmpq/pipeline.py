"""The straight line: model, measure, allocate, quantize, checkpoint; then run and evaluate.

Each stage leaves its result in the work folder under the digest of its inputs and is skipped when that is there.
Resuming is running the same command again; a second budget costs only the solve and the final quantization.
"""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from llmmpq import __version__
from llmmpq.allocate.problem import build_problem
from llmmpq.allocate.solve import check_feasible, solve, to_plan, uniform
from llmmpq.budgets import budget_of
from llmmpq.curve import NO_PICTURE, PICTURE_FILE, curve_budgets, curve_of, frontier, write_curve
from llmmpq.digest import cached_digests, digest_of
from llmmpq.errors import CheckpointError, LlmmpqError, RecipeError
from llmmpq.execute import BlockResult, ExecuteSettings, apply_result, fallbacks, quantize_block
from llmmpq.inference import evaluate, generate, load_model
from llmmpq.inspection import inspect_folder
from llmmpq.measure.block_loss import MeasureSettings, measure_block
from llmmpq.model.stream import BlockStream
from llmmpq.model.tokens import TokenWindows
from llmmpq.output import PLAN_FILE, OutputSpec, claim_output, read_plan, write_output
from llmmpq.planning import check_budget, plan_from_file, unmeasured_problem, write_plan
from llmmpq.preflight import check_disks, preflight
from llmmpq.progress import Progress, Silent
from llmmpq.recipe import Budget, Recipe
from llmmpq.records import PackedTensor, Plan, Sensitivity
from llmmpq.session import Session, open_session
from llmmpq.workdir import DEFAULT_WORK_FOLDER, Stage, WorkDir

__all__ = ["check", "evaluate", "generate", "inspect", "load_model", "make_plans", "quantize_model", "trace_curve"]


def quantize_model(
    recipe: Recipe,
    *,
    out: Path,
    work_dir: Path | None = None,
    overwrite: bool = False,
    plan_file: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize the recipe's model into the folder `out`. Run again after an interruption, it continues."""
    progress = progress or Silent()
    started = time.monotonic()
    session = open_session(recipe)
    plan = None if plan_file is None else plan_from_file(plan_file, session)
    if plan is None:
        check_budget(session)
    kept_nbytes = sum(tensor.nbytes for tensor in session.skeleton.kept)
    with _Work(session, out, work_dir, progress) as (work, model_digests):
        windows = _tokens(session, progress)
        session = _with_resolved_source(session, windows)
        provenance = _provenance(session, model_digests, windows)
        recipe_yaml = session.recipe.to_yaml()
        done = claim_output(out, overwrite=overwrite, recipe_yaml=recipe_yaml, provenance=provenance, plan=plan)
        resumed = 0
        if done:
            plan = read_plan(out / PLAN_FILE)
            report = inspect_folder(out)
        else:
            plan = plan or _planned(session, work, model_digests, windows, progress)
            plan = dataclasses.replace(plan, provenance=provenance)
            check_disks(out, work.folder, output_nbytes=kept_nbytes + plan.nbytes, journal_nbytes=plan.nbytes)
            stage = work.stage("quantize", _quantize_inputs(session, model_digests, windows, plan))
            resumed, notes = _quantize(session, stage, plan, windows, progress)
            report = _report(session, plan, windows, notes)
            _write(session, out, stage, plan, recipe_yaml, report, progress)
            stage.discard()
    return {
        "out": str(out),
        "plan": plan.to_json(),
        "source_nbytes": session.checkpoint.nbytes,
        "kept_nbytes": kept_nbytes,
        "total_nbytes": kept_nbytes + plan.nbytes,
        "already_done": done,
        "resumed_blocks": resumed,
        "fallbacks": report["fallbacks"],
        "warnings": report["warnings"],
        "seconds": time.monotonic() - started,
        "peak_rss_nbytes": _peak_rss_nbytes(),
    }


def make_plans(
    recipe: Recipe,
    budgets: Sequence[Budget],
    *,
    out: Path | None = None,
    work_dir: Path | None = None,
    progress: Progress | None = None,
) -> list[Plan]:
    """Measure once, then one plan per budget; saved into `out` when given."""

    def asked(session: Session) -> list[dict[str, Any]]:
        for wanted in budgets:
            check_budget(session, wanted)
        return [budget_of(session, wanted) for wanted in budgets]

    _, plans = _plans_for(recipe, asked, out=out, work_dir=work_dir, progress=progress)
    if out is not None:
        for wanted, plan in zip(budgets, plans, strict=True):
            name = f"{wanted.avg_bits:.10g}" if wanted.avg_bits is not None else wanted.label
            write_plan(out / f"plan-{name}.json", plan)
    return plans


def trace_curve(
    recipe: Recipe,
    num_budgets: int,
    *,
    out: Path | None = None,
    work_dir: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure once, then predicted loss against bytes, whatever the recipe's budget; saved into `out` when given."""
    if recipe.allocation.method == "uniform":
        raise RecipeError("allocation.method is uniform, which measures nothing: no loss to draw. Give --method")

    def spread(session: Session) -> list[dict[str, Any]]:
        problem = unmeasured_problem(session)
        return curve_budgets(problem.smallest_nbytes, problem.largest_nbytes, num_budgets)

    recipe = dataclasses.replace(recipe, budget=Budget())
    session, plans = _plans_for(recipe, spread, out=out, work_dir=work_dir, progress=progress)
    curve = curve_of(frontier(plans), kept_nbytes=sum(tensor.nbytes for tensor in session.skeleton.kept))
    files: list[str] = []
    if out is not None:
        curve["provenance"] = dict(plans[0].provenance)
        files = write_curve(out, curve, title=Path(session.recipe.model or "").name)
    notes = [NO_PICTURE] if files and PICTURE_FILE not in files else []
    return curve | {"num_budgets": len(plans), "files": files, "notes": notes}


def _plans_for(
    recipe: Recipe,
    asked: Callable[[Session], list[dict[str, Any]]],
    *,
    out: Path | None,
    work_dir: Path | None,
    progress: Progress | None,
) -> tuple[Session, list[Plan]]:
    """One measurement, and a plan for each of the budgets that `asked` gives for the opened model."""
    progress = progress or Silent()
    session = open_session(recipe)
    budgets = asked(session)
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"--out {out} cannot be a folder for plans: {error.strerror}") from None
    with _Work(session, out or Path.cwd() / "plans", work_dir, progress) as (work, model_digests):
        windows = _tokens(session, progress)
        session = _with_resolved_source(session, windows)
        provenance = _provenance(session, model_digests, windows)
        plans: list[Plan] = []
        for budget in budgets:
            # The measurement and what it has to say are the same for every budget: told once.
            told = Silent() if plans else progress
            plan = _planned(session, work, model_digests, windows, told, budget=budget)
            plans.append(dataclasses.replace(plan, provenance=provenance))
    return session, plans


def check(
    recipe: Recipe, *, out: Path | None = None, work_dir: Path | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """The preflight: what would happen, what it would cost, what stands in its way."""
    session = open_session(recipe)
    return preflight(session, unmeasured_problem(session), out=out, work_dir=work_dir, overwrite=overwrite)


def inspect(folder: Path) -> dict[str, Any]:
    """What a quantized folder holds, and whether it is still what was written."""
    return inspect_folder(folder)


def _measure(
    session: Session, work: WorkDir, model_digests: Mapping[str, str], windows: TokenWindows, progress: Progress
) -> Sensitivity:
    recipe, options = session.recipe, session.options()
    inputs = {
        "model": model_digests,
        "calibration tokens": windows.digest,
        "measurement settings": recipe.to_dict()["measurement"],
        "quantizer settings": {
            key: value
            for key, value in recipe.to_dict()["quantizer"].items()
            if key not in ("sequential", "correction", "algorithm")
        },
        "options": {name: [scheme.to_json() for scheme in schemes] for name, schemes in options.items()},
        "numerics": session.numerics(),
    }
    stage = work.stage("measure", inputs)
    _name_changes(stage, "measurement", progress)
    result = stage.load_result()
    if result is not None:
        # A result that cannot be understood is made again, like one that is missing.
        with suppress(KeyError, TypeError, AttributeError, LlmmpqError):
            return Sensitivity.from_json(result)
    settings = MeasureSettings(
        use_gptq=recipe.measurement.quantizer == "gptq",
        damping=recipe.quantizer.damping,
        activation_order=recipe.quantizer.activation_order,
        column_block=recipe.quantizer.column_block,
        num_probe_tokens=recipe.measurement.tokens,
    )
    losses: dict[str, tuple[float, ...]] = {}
    warnings: list[str] = []
    num_candidates = sum(len(schemes) for schemes in options.values())
    with progress.task("measure", num_candidates, "candidates") as advance:
        for block in _stream(session, windows, follow_original=False):
            known = stage.load_block(block.index)
            if known is None:
                block_losses, block_warnings = measure_block(block, options, settings, on_candidate=lambda: advance(1))
                stage.save_block(block.index, {"losses": block_losses, "warnings": block_warnings}, {})
            else:
                block_losses, block_warnings = known[0]["losses"], known[0]["warnings"]
                advance(sum(len(options[spec.name]) for spec in block.linears))
            losses |= {name: tuple(values) for name, values in block_losses.items()}
            warnings += block_warnings
    sensitivity = Sensitivity(
        linears=session.skeleton.linears,
        options=options,
        losses=losses,
        num_tokens=windows.ids.numel(),
        digest=stage.digest,
        warnings=tuple(warnings),
    )
    stage.save_result(sensitivity.to_json())
    return sensitivity


def _planned(
    session: Session,
    work: WorkDir,
    model_digests: Mapping[str, str],
    windows: TokenWindows,
    progress: Progress,
    *,
    budget: dict[str, Any] | None = None,
) -> Plan:
    """The plan for the recipe's budget, or for another."""
    recipe = session.recipe
    budget = budget or budget_of(session)
    nbytes = budget["nbytes"]
    if budget["kind"] == "bits" or recipe.allocation.method == "uniform":
        problem = unmeasured_problem(session)
        solution = uniform(problem, nbytes)
        if budget["kind"] == "bits":
            budget["nbytes"] = solution.nbytes  # pins may ask for more or less than the width itself
        return to_plan(problem, solution, method="uniform", budget=budget, measured=False)
    sensitivity = _measure(session, work, model_digests, windows, progress)
    for warning in sensitivity.warnings:
        progress.note(warning)
    problem = build_problem(sensitivity, pins=recipe.allocation.pins, fuse=recipe.allocation.fuse)
    check_feasible(problem, nbytes, budget)
    solution = solve(problem, nbytes, time_limit_s=recipe.allocation.time_limit_s)
    return to_plan(problem, solution, method=recipe.allocation.method, budget=budget)


def _quantize(
    session: Session, stage: Stage, plan: Plan, windows: TokenWindows, progress: Progress
) -> tuple[int, list[tuple[str, dict[str, Any]]]]:
    """Every block quantized and journaled. Returns how many an earlier run had done, and the notes per linear."""
    _name_changes(stage, "quantization", progress)
    settings = _execute_settings(session)
    resumed, notes = 0, []
    with progress.task("quantize", len(session.skeleton.linears), "layers") as advance:
        for block in _stream(session, windows, follow_original=settings.follow_original):
            known = stage.load_block(block.index)
            if known is None:
                result = quantize_block(block, plan, settings, on_linear=lambda _spec: advance(1))
                stage.save_block(block.index, result.notes, _flat(result))
            else:
                result = _unflat(known, plan)
                resumed += 1
                advance(len(block.linears))
                if settings.sequential:
                    apply_result(block, result)
            notes += list(result.notes.items())
    return resumed, notes


def _write(
    session: Session,
    out: Path,
    stage: Stage,
    plan: Plan,
    recipe_yaml: str,
    report: Mapping[str, Any],
    progress: Progress,
) -> None:
    cached: tuple[int, dict[str, torch.Tensor]] = (-1, {})

    def read_packed(name: str) -> Mapping[str, torch.Tensor]:
        nonlocal cached
        index = plan.linears[name].block
        if cached[0] != index:
            loaded = stage.load_block(index)
            if loaded is None:
                raise CheckpointError(f"{stage.block_file(index)} vanished or was damaged: run the same command again")
            cached = (index, loaded[1])
        prefix = name + "."
        return {key.removeprefix(prefix): value for key, value in cached[1].items() if key.startswith(prefix)}

    spec = OutputSpec(
        source=session.folder,
        checkpoint=session.checkpoint,
        kept=session.skeleton.kept,
        stored_names=session.skeleton.stored_names,
        plan=plan,
        recipe_yaml=recipe_yaml,
        report=report,
        max_shard_nbytes=session.recipe.output.max_shard_nbytes,
        read_packed=read_packed,
    )
    with progress.task("write", spec.tensor_nbytes, "bytes") as advance:
        write_output(out, spec, on_bytes=advance)


class _Work:
    """The locked work folder of a session's model, with the digests of the model's files."""

    def __init__(self, session: Session, out: Path, work_dir: Path | None, progress: Progress) -> None:
        root = work_dir or out.resolve().parent / DEFAULT_WORK_FOLDER
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot use the work folder {root}: {error.strerror}. Give --work-dir.") from None
        files = session.source_files()
        with progress.task("hash the model's files", sum(path.stat().st_size for path in files), "bytes") as advance:
            try:
                self.model_digests = cached_digests(files, root / "file-hashes.json", advance=advance)
            except OSError as error:
                raise CheckpointError(f"cannot write in the work folder {root}: {error.strerror}") from None
        name = Path(session.recipe.model or "model").name
        self.work = WorkDir(root / f"{name}-{digest_of(self.model_digests)[:12]}")

    def __enter__(self) -> tuple[WorkDir, dict[str, str]]:
        return self.work, self.model_digests

    def __exit__(self, *exc: object) -> None:
        self.work.__exit__(*exc)


def _stream(session: Session, windows: TokenWindows, *, follow_original: bool) -> BlockStream:
    return BlockStream(
        session.skeleton,
        session.checkpoint,
        windows.ids,
        device=session.device,
        dtype=session.dtype,
        batch=session.recipe.run.batch,
        states_on_host=session.recipe.run.activations == "host",
        follow_original=follow_original,
    )


def _tokens(session: Session, progress: Progress) -> TokenWindows:
    # Tensors outside the blocks are read last, by the writer: damaged ones must be found before the long run.
    session.checkpoint.check_finite(session.skeleton.stored_names[tensor.name] for tensor in session.skeleton.kept)
    windows = session.tokens()
    for note in windows.notes:
        progress.note(note)
    return windows


def _with_resolved_source(session: Session, windows: TokenWindows) -> Session:
    recipe = session.recipe.override({"calibration.source": windows.source}, source="resolved recipe")
    return dataclasses.replace(session, recipe=recipe)


def _quantize_inputs(
    session: Session, model_digests: Mapping[str, str], windows: TokenWindows, plan: Plan
) -> dict[str, Any]:
    return {
        "model": model_digests,
        "calibration tokens": windows.digest,
        "plan": {name: linear.scheme.to_json() for name, linear in plan.linears.items()},
        "quantizer settings": session.recipe.to_dict()["quantizer"],
        "numerics": session.numerics(),
    }


def _execute_settings(session: Session) -> ExecuteSettings:
    quantizer = session.recipe.quantizer
    return ExecuteSettings(
        use_gptq=quantizer.algorithm == "gptq",
        damping=quantizer.damping,
        activation_order=quantizer.activation_order,
        column_block=quantizer.column_block,
        sequential=quantizer.sequential,
        correction=quantizer.correction,
    )


def _provenance(session: Session, model_digests: Mapping[str, str], windows: TokenWindows) -> dict[str, Any]:
    return {
        "llmmpq": __version__,
        "model": session.recipe.model,
        "revision": session.recipe.revision,
        "model_files": dict(sorted(model_digests.items())),
        "calibration": {
            "source": windows.source,
            "num_tokens": windows.ids.numel(),
            "window": windows.ids.shape[1],
            "digest": windows.digest,
        },
        "numerics": session.numerics(),
    }


def _report(
    session: Session, plan: Plan, windows: TokenWindows, notes: list[tuple[str, dict[str, Any]]]
) -> dict[str, Any]:
    """What a reader must know of how the folder came to be. No times: equal runs write equal bytes."""
    warnings = list(windows.notes)
    if session.skeleton.ignored:
        warnings.append(
            f"{len(session.skeleton.ignored)} tensors of the checkpoint are not used by the model and were left out, "
            f"such as {session.skeleton.ignored[0]!r}"
        )
    return {
        "fallbacks": fallbacks(notes),
        "warnings": warnings,
        "kept": [
            {"name": kept.name, "shape": list(kept.shape), "nbytes": kept.nbytes, "reason": kept.reason}
            for kept in session.skeleton.kept
        ],
        "linears": dict(notes),
        "bits_per_weight": plan.bits_per_weight,
    }


def _flat(result: BlockResult) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": tensor for name, packed in result.packed.items() for key, tensor in packed.tensors().items()
    }


def _unflat(known: tuple[dict[str, Any], dict[str, torch.Tensor]], plan: Plan) -> BlockResult:
    notes, tensors = known
    packed = {
        name: PackedTensor(
            words=tensors[f"{name}.words"],
            scales=tensors[f"{name}.scales"],
            zeros=tensors.get(f"{name}.zeros"),
            scheme=plan.linears[name].scheme,
            shape=plan.linears[name].shape,
        )
        for name in notes
    }
    return BlockResult(packed=packed, notes=notes)


def _name_changes(stage: Stage, what: str, progress: Progress) -> None:
    if stage.changed:
        progress.note(f"{' and '.join(stage.changed)} changed since the last {what} here: it is done anew")


def _peak_rss_nbytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
