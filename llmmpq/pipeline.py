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
from pathlib import Path
from typing import Any

import torch

from llmmpq.bench import bench
from llmmpq.budgets import budget_of
from llmmpq.choosing import choose_plan, measured
from llmmpq.curve import NO_PICTURE, PICTURE_FILE, curve_budgets, curve_of, frontier, write_curve
from llmmpq.errors import CheckpointError, HubError, LlmmpqError, RecipeError
from llmmpq.execute import fallbacks
from llmmpq.hub import Destination, check_destination
from llmmpq.inference import evaluate, generate, load_model, run_tasks
from llmmpq.inspection import explain_runtime, inspect_folder, plan_of
from llmmpq.job import Job, open_job
from llmmpq.metric import metric_on_disk
from llmmpq.output import PLAN_FILE, OutputSpec, claim_output, read_plan, refuse_output, write_output
from llmmpq.planning import check_budget, plan_from_file, unmeasured_problem, write_plan
from llmmpq.preflight import check_disks, metric_nbytes, preflight
from llmmpq.progress import Once, Progress, Silent
from llmmpq.publishing import push_folder
from llmmpq.quantizing import quantize_blocks, quantize_stage
from llmmpq.ranks import ALONE, Ranks
from llmmpq.reading import read_config
from llmmpq.recipe import Budget, Recipe
from llmmpq.records import EDITED, Plan
from llmmpq.report.page import write_page
from llmmpq.session import Session, open_session, pick_device
from llmmpq.workdir import Stage

__all__ = [
    "Destination",
    "bench",
    "check",
    "evaluate",
    "generate",
    "inspect",
    "load_model",
    "make_plans",
    "push_folder",
    "quantize_model",
    "run_tasks",
    "trace_curve",
    "write_report",
]


def quantize_model(
    recipe: Recipe,
    *,
    out: Path,
    work_dir: Path | None = None,
    overwrite: bool = False,
    plan_file: Path | None = None,
    publish: Destination | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Quantize the recipe's model into the folder `out`. Run again after an interruption, it continues.

    What stands in the way of `publish`ing it is found before the long work begins.
    With several `ranks` (`llmmpq.ranks.join()`), every process calls this, and the first writes.
    """
    progress = progress or Silent()
    started = time.monotonic()
    session = open_session(recipe, ranks=ranks)
    plan = None if plan_file is None else plan_from_file(plan_file, session)
    if plan is None:
        check_budget(session)
    if publish is not None:
        ranks.from_first(lambda: refuse_output(out))  # before a repository is made for it
        destination = publish
        ranks.from_first(lambda: check_destination(destination, out))
    kept_nbytes = sum(tensor.nbytes for tensor in session.skeleton.kept)
    done = False

    def claim(job: Job) -> bool:
        nonlocal done
        recipe_yaml, provenance = job.session.recipe.to_yaml(), job.provenance()
        done = ranks.from_first(
            lambda: claim_output(out, overwrite=overwrite, recipe_yaml=recipe_yaml, provenance=provenance, plan=plan)
        )
        return done

    with open_job(session, out=out, work_dir=work_dir, progress=progress, is_done=claim) as job:
        session, provenance = job.session, job.provenance()
        recipe_yaml = session.recipe.to_yaml()
        resumed = 0
        if done:
            plan, report = ranks.from_first(lambda: (read_plan(out / PLAN_FILE), inspect_folder(out)))
        else:
            plan = plan or choose_plan(job)
            made = dataclasses.replace(plan, provenance=provenance)
            stage, nbytes, work = quantize_stage(job, made), kept_nbytes + made.nbytes, job.work.folder
            # What an earlier run has left of both is there already.
            journal_nbytes = max(made.nbytes - stage.nbytes, 0)
            if metric_nbytes(session):
                journal_nbytes += max(metric_nbytes(session) - metric_on_disk(job), 0)
            ranks.from_first(lambda: check_disks(out, work, output_nbytes=nbytes, journal_nbytes=journal_nbytes))
            resumed, notes = quantize_blocks(job, stage, made)
            plan, report = made, _report(job, made, notes)
            written = report
            ranks.from_first(lambda: _write(session, out, stage, made, recipe_yaml, written, progress))
            stage.discard()
    pushed = None
    if publish is not None:
        pushed = ranks.from_first(lambda: _publish(out, destination, progress))
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
        "pushed": pushed,
    }


def _publish(out: Path, destination: Destination, progress: Progress) -> dict[str, Any]:
    try:
        return push_folder(out, destination, progress=progress)
    except LlmmpqError as error:
        raise HubError(f"{out} is finished and stays, but it was not pushed: {error}") from None


def make_plans(
    recipe: Recipe,
    budgets: Sequence[Budget],
    *,
    out: Path | None = None,
    work_dir: Path | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> list[Plan]:
    """Measure once, then one plan per budget; saved into `out` when given."""

    def asked(session: Session) -> list[dict[str, Any]]:
        for wanted in budgets:
            check_budget(session, wanted)
        return [budget_of(session, wanted) for wanted in budgets]

    _, plans = _plans_for(recipe, asked, out=out, work_dir=work_dir, progress=progress, ranks=ranks)
    if out is not None and ranks.is_first:
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
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Measure once, then predicted loss against bytes, whatever the recipe's budget; saved into `out` when given."""
    if recipe.allocation.method == "uniform":
        raise RecipeError("allocation.method is uniform, which measures nothing: no loss to draw. Give --method")

    def spread(session: Session) -> list[dict[str, Any]]:
        problem = unmeasured_problem(session)
        return curve_budgets(problem.smallest_nbytes, problem.largest_nbytes, num_budgets)

    # Measured around no plan: all points are predicted by one measurement, so that they can be compared.
    recipe = dataclasses.replace(recipe, budget=Budget(), allocation=dataclasses.replace(recipe.allocation, refine=0))
    session, plans = _plans_for(recipe, spread, out=out, work_dir=work_dir, progress=progress, ranks=ranks)
    curve = curve_of(frontier(plans), kept_nbytes=sum(tensor.nbytes for tensor in session.skeleton.kept))
    files: list[str] = []
    if out is not None:
        curve["provenance"] = dict(plans[0].provenance)
        title = Path(session.recipe.model or "").name
        files = ranks.from_first(lambda: write_curve(out, curve, title=title))
    notes = [NO_PICTURE] if files and PICTURE_FILE not in files else []
    return curve | {"num_budgets": len(plans), "files": files, "notes": notes}


def _plans_for(
    recipe: Recipe,
    asked: Callable[[Session], list[dict[str, Any]]],
    *,
    out: Path | None,
    work_dir: Path | None,
    progress: Progress | None,
    ranks: Ranks,
) -> tuple[Session, list[Plan]]:
    """One measurement, and a plan for each of the budgets that `asked` gives for the opened model."""
    progress = progress or Silent()
    session = open_session(recipe, ranks=ranks)
    budgets = asked(session)
    if out is not None:
        ranks.from_first(lambda: _make_plan_folder(out))
    with open_job(session, out=out or Path.cwd() / "plans", work_dir=work_dir, progress=Once(progress)) as job:
        provenance = job.provenance()
        plans = [dataclasses.replace(choose_plan(job, budget), provenance=provenance) for budget in budgets]
    return session, plans


def _make_plan_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"--out {out} cannot be a folder for plans: {error.strerror}") from None


def check(
    recipe: Recipe, *, out: Path | None = None, work_dir: Path | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """The preflight: what would happen, what it would cost, what stands in its way."""
    session = open_session(recipe)
    return preflight(session, unmeasured_problem(session), out=out, work_dir=work_dir, overwrite=overwrite)


def inspect(folder: Path, *, runtime: bool = False) -> dict[str, Any]:
    """What a quantized folder holds, whether it is still what was written, and if asked what would run it here."""
    found = inspect_folder(folder)
    plan = plan_of(folder) if runtime else None
    if plan is not None:
        device = pick_device("auto")
        stored = read_config(folder).get_text_config().dtype
        dtype = stored if device.type == "cuda" and isinstance(stored, torch.dtype) else torch.float32
        found["runtime"] = explain_runtime(plan, device=device, dtype=dtype)
    return found


def write_report(
    folder: Path, *, out: Path | None = None, pareto: Path | None = None, results: Path | None = None
) -> dict[str, Any]:
    """One HTML page on a quantized folder; without `out` in the current folder, named after it."""
    out = out or Path(f"{folder.resolve().name}-report.html")
    evidence = write_page(folder, out, pareto=pareto, results=results)
    return {
        "out": str(out),
        "nbytes": out.stat().st_size,
        "has_sensitivity": bool(evidence.report.get("sensitivity")),
        "has_curve": evidence.curve is not None,
        "has_results": evidence.results is not None,
        "problems": list(evidence.folder["problems"]),
    }


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
            loaded = stage.read(stage.block_file(index).stem)
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
        untied=session.recipe.quantizer.rotate,
        read_packed=read_packed,
    )
    with progress.task("write", spec.tensor_nbytes, "bytes") as advance:
        write_output(out, spec, on_bytes=advance)


def _report(job: Job, plan: Plan, notes: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """What a reader must know of how the folder came to be. No times: equal runs write equal bytes."""
    session = job.session
    warnings = list(job.tokens.notes)
    sensitivity = None if plan.method == EDITED else measured(job)
    if sensitivity is not None:
        warnings += sensitivity.warnings
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
        "source_nbytes": session.checkpoint.nbytes,
        "sensitivity": None if sensitivity is None else sensitivity.summary(),
        **({} if job.rotation is None else {"rotation": dict(job.rotation.summary)}),
    }


def _peak_rss_nbytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
