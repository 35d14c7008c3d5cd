"""Measure a session's model: locally block by block, or by the whole model's output with all pairs of candidates.

The result lies in the work folder under the digest of everything it depends on, and serves every budget.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from llmmpq.errors import LlmmpqError
from llmmpq.execute import apply_result, quantize_block
from llmmpq.job import Job
from llmmpq.measure.block_loss import measure_block
from llmmpq.measure.candidates import MeasureSettings, candidates_of
from llmmpq.measure.pairs import Candidates, LoadedModel, count_passes, to_gram
from llmmpq.measure.perturb import Perturbations, expected_forwards
from llmmpq.measure.reliability import reliability_of
from llmmpq.model.stream import Block
from llmmpq.planning import check_every_pair, pair_sizes
from llmmpq.quantize.linear import dequantized
from llmmpq.quantizing import (
    TOKENS_PER_FORWARD,
    execute_settings,
    finish_ride,
    load_packed,
    name_changes,
    quantize_stage,
    ride_through,
    save_packed,
    start_ride,
    stream_of,
)
from llmmpq.records import LinearSpec, Plan, Quadratic, Scheme, Sensitivity
from llmmpq.ridejournal import RideJournal
from llmmpq.workdir import Stage

# Settings of the quantizer for the final model alone.
AFTER_MEASURING = ("shape_errors", "tune", "tune_metric")

Options = Mapping[str, tuple[Scheme, ...]]


def measure_locally(job: Job) -> Sensitivity:
    """What each option does to the output of its block: one forward of one block per candidate, no pairs."""
    session, options = job.session, job.session.options()
    stage = job.work.stage("measure-locally", _inputs(job))
    name_changes(stage, "measurement", job.progress)
    known = _known(stage)
    if known is not None:
        return known
    settings = measure_settings(job)
    losses: dict[str, tuple[float, ...]] = {}
    warnings: list[str] = []
    with job.progress.task("measure", sum(map(len, options.values())), "candidates") as advance:
        for block in stream_of(job, follow_original=False):
            done = stage.load_block(block.index)
            if done is None:
                found, said = measure_block(block, options, settings, on_candidate=lambda: advance(1))
                stage.save_block(block.index, {"losses": found, "warnings": said}, {})
            else:
                found, said = done[0]["losses"], done[0]["warnings"]
                advance(sum(len(options[spec.name]) for spec in block.linears))
            losses |= {name: tuple(values) for name, values in found.items()}
            warnings += said
    sensitivity = Sensitivity(
        linears=session.skeleton.linears,
        options=options,
        losses=losses,
        num_tokens=job.tokens.calibration.num_tokens,
        digest=stage.digest,
        warnings=tuple(warnings),
    )
    _save(stage, sensitivity)
    return sensitivity


def measure_pairs(job: Job) -> Sensitivity:
    """What each option does to the model's output, and every two of them together.

    Candidates share no errors across their rows, unlike the plan's linears: that takes many times as long, and plans
    came out no better (docs/log.md).
    """
    options = job.session.options()
    stage = job.work.stage("measure", _inputs(job) | {"probe tokens": job.tokens.probe.digest})
    name_changes(stage, "measurement", job.progress)
    known = _known(stage)
    if known is not None:
        return known
    settings = measure_settings(job)
    rows: list[tuple[str, Scheme]] = []
    warnings: list[str] = []

    def candidates(block: Block) -> Iterator[tuple[LinearSpec, torch.Tensor]]:
        for spec, position, packed in candidates_of(block, options, settings, warnings=warnings):
            rows.append((spec.name, options[spec.name][position]))
            yield spec, dequantized(packed, block.original_weights[spec.name].dtype)

    per_block = _options_per_block(job, options)
    stream = stream_of(job, follow_original=False, dtype=job.session.measuring_dtype, many=True)
    ride = start_ride(job, stream, num_rows=sum(per_block), folder=stage.folder, base_is_original=True)
    try:
        journal = RideJournal(stage, ride)
        rows += journal.resume(warnings=warnings)
        with job.progress.task("measure", expected_forwards(per_block, extra=2), "block passes") as advance:
            advance(int(ride.num_forwards))
            for block in stream:
                if block.is_head:
                    ride.through_head(block, candidates(block))
                elif block.index > journal.last_block:
                    ride.through(block, candidates(block), on_forward=advance)
                    journal.save(block.index, rows, warnings=warnings)
        found = finish_ride(job, stream, ride, label="measure pairs")
    finally:
        ride.store.close()
    sensitivity = _finished(job, stage, found, rows, warnings, around=None)
    journal.close()
    return sensitivity


def measure_around(job: Job, plan: Plan) -> Sensitivity:
    """The same around a plan: linears are quantized one after the other, each also in the options it might have had.

    An option is tried on the inputs that the plan gives it, with everything behind it as the plan has it. What the
    plan's own options gave is kept for the final quantization, where that does no more.
    """
    options = job.session.options()
    quantizer = job.session.recipe.to_dict()["quantizer"].items()
    inputs = _inputs(job) | {
        "probe tokens": job.tokens.probe.digest,
        "around": {name: linear.scheme.to_json() for name, linear in plan.linears.items()},
        "quantizer settings": {key: value for key, value in quantizer if key not in AFTER_MEASURING},
    }
    stage = job.work.stage("measure-around", inputs)
    known = _known(stage)
    if known is not None:
        return known
    # Options are measured unshaped and untuned, so the plan that they are compared with is too.
    settings = dataclasses.replace(execute_settings(job.session), shape_errors=False, tune=0)
    dtype = job.session.measuring_dtype
    finished = quantize_stage(job, plan) if measured_as_final(job) else stage
    per_block = [num - len(specs) for num, specs in zip(_options_per_block(job, options), _blocks(job), strict=True)]
    stream = stream_of(job, follow_original=settings.follow_original, dtype=dtype, many=True)
    ride = start_ride(job, stream, num_rows=sum(per_block), folder=stage.folder, base_is_original=False)
    rows: list[tuple[str, Scheme]] = []
    try:
        journal = RideJournal(stage, ride)
        rows += journal.resume(warnings=[], needs=lambda index: finished.load_block(index) is not None)
        num_forwards = expected_forwards(per_block, extra=2)
        with job.progress.task("measure around the plan", num_forwards, "block passes") as advance:
            advance(int(ride.num_forwards))
            for block in stream:
                if block.index <= journal.last_block:
                    known_block = load_packed(finished, block.index, plan)
                    if settings.sequential and known_block is not None:
                        apply_result(block, known_block)
                    continue
                result = quantize_block(block, plan, settings, on_linear=lambda _spec: None, options=options)
                save_packed(job, finished, block.index, result)
                rows += ride_through(ride, block, result, settings=settings, on_forward=advance)
                if not block.is_head:
                    journal.save(block.index, rows, warnings=[])
        found = finish_ride(job, stream, ride, label="measure pairs around the plan")
    finally:
        ride.store.close()
    sensitivity = _finished(job, stage, found, rows, [], around=plan)
    journal.close()
    return sensitivity


def measured_as_final(job: Job) -> bool:
    """Whether blocks around which is measured are those of the final model: in its arithmetic, unshaped and untuned."""
    settings = execute_settings(job.session)
    return job.session.measuring_dtype == job.session.dtype and not settings.shapes and not settings.tune


def measure_every_pair(job: Job) -> Sensitivity:
    """The true KL of every two candidates together, one forward each: an oracle for small models."""
    options, linears = job.session.options(), job.session.skeleton.linears
    stage = job.work.stage("measure-every-pair", _inputs(job) | {"probe tokens": job.tokens.probe.digest})
    name_changes(stage, "measurement", job.progress)
    known = _known(stage)
    if known is not None:
        return known
    check_every_pair(job.session)
    num_passes = count_passes(pair_sizes(job.session))
    settings, warnings = measure_settings(job), list[str]()
    stream = stream_of(job, follow_original=False, dtype=job.session.measuring_dtype, many=True, keep_loaded=True)
    try:
        blocks, weights = [], dict[tuple[str, int], torch.Tensor]()
        for block in stream:
            blocks.append(block)
            for spec, position, packed in candidates_of(block, options, settings, warnings=warnings):
                weights[spec.name, position] = dequantized(packed, block.original_weights[spec.name].dtype)
        candidates, num_rows = [], 0
        for spec in linears:
            own = tuple(weights[spec.name, position] for position in range(len(options[spec.name])))
            candidates.append(Candidates(spec=spec, first_row=num_rows, weights=own))
            num_rows += len(own)
        with job.progress.task("measure every pair", num_passes, "block passes") as advance:
            model = LoadedModel(
                blocks,
                candidates,
                stream.around,
                job.tokens.probe.ids.to(stream.device),
                tokens_per_forward=TOKENS_PER_FORWARD[stream.device.type],
                on_pass=advance,
            )
            kl_C, kl_CC = np.zeros(num_rows), np.zeros((num_rows, num_rows))
            for index, first in enumerate(candidates):
                done = stage.load(f"linear-{index:04d}")
                if done is None:
                    kl_O, kl_OC = model.pairs_of(index)
                    stage.save(f"linear-{index:04d}", {"name": first.spec.name}, {"alone": kl_O, "pairs": kl_OC})
                else:
                    kl_O, kl_OC = done[1]["alone"], done[1]["pairs"]
                    advance(model.passes_of(index))
                kl_C[first.rows], kl_CC[first.rows] = kl_O.numpy(), kl_OC.numpy()
    finally:
        stream.release()
    linear_of = np.repeat(np.arange(len(candidates)), [len(one.weights) for one in candidates])
    gram, said = to_gram(kl_C, kl_CC + kl_CC.T, linear_of)
    found = Perturbations(
        gram_CC=gram,
        half_CC=None,
        half_share=1.0,
        linear_C=np.zeros(num_rows),
        constant=0.0,
        kl_C=kl_C,
        base_kl=0.0,
        rounding_kl=None,
        num_tokens=job.tokens.probe.num_tokens - model.num_excluded,
        num_forwards=num_passes,
        num_excluded=model.num_excluded,
    )
    rows = [(spec.name, scheme) for spec in linears for scheme in options[spec.name]]
    return _finished(job, stage, found, rows, [*warnings, *said], around=None)


def _blocks(job: Job) -> list[list[LinearSpec]]:
    """Without the head, whose candidates have no states to carry."""
    skeleton = job.session.skeleton
    return skeleton.linears_by_block[: len(skeleton.block_names)]


def _options_per_block(job: Job, options: Options) -> list[int]:
    return [sum(len(options[spec.name]) for spec in specs) for specs in _blocks(job)]


def measure_settings(job: Job) -> MeasureSettings:
    recipe = job.session.recipe
    return MeasureSettings(
        use_gptq=recipe.measurement.quantizer == "gptq",
        damping=recipe.quantizer.damping,
        activation_order=recipe.quantizer.activation_order,
        column_block=recipe.quantizer.column_block,
        sweeps=recipe.quantizer.sweeps,
        num_probe_tokens=recipe.measurement.tokens,
    )


def _finished(
    job: Job,
    stage: Stage,
    found: Perturbations,
    rows: list[tuple[str, Scheme]],
    warnings: list[str],
    *,
    around: Plan | None,
) -> Sensitivity:
    """Rows in the order of linears and options; the plan's own options are zero rows. Saved into the stage."""
    options, linears = job.session.options(), job.session.skeleton.linears
    starts, total = {}, 0
    for spec in linears:
        starts[spec.name] = total
        total += len(options[spec.name])
    index = [starts[name] + options[name].index(scheme) for name, scheme in rows]
    gram = np.zeros((total, total))
    gram[np.ix_(index, index)] = found.gram_CC
    linear, kl = np.zeros(total), np.full(total, found.base_kl)
    linear[index], kl[index] = found.linear_C, found.kl_C
    base = None
    if around is not None:
        base = tuple(options[spec.name].index(around.linears[spec.name].scheme) for spec in linears)
    reliability = None
    if found.half_CC is not None:
        half = np.zeros((total, total))
        half[np.ix_(index, index)] = found.half_CC
        reliability = reliability_of(
            gram,
            half,
            half_share=found.half_share,
            linear_O=np.repeat(np.arange(len(linears)), [len(options[spec.name]) for spec in linears]),
            block_O=np.repeat([spec.block for spec in linears], [len(options[spec.name]) for spec in linears]),
            level_O=_levels(linears, options, base),
        )
    if found.num_excluded:
        warnings = [*warnings, f"{found.num_excluded} probe tokens with NaN or inf left out"]
    sensitivity = Sensitivity(
        linears=linears,
        options=options,
        losses={name: tuple(kl[start : start + len(options[name])].tolist()) for name, start in starts.items()},
        num_tokens=found.num_tokens,
        digest=stage.digest,
        warnings=tuple(warnings),
        quadratic=Quadratic(
            gram_OO=gram,
            linear_O=linear,
            constant=found.constant,
            base=base,
            base_kl=found.base_kl,
            rounding_kl=found.rounding_kl,
            reliability=reliability,
        ),
    )
    _save(stage, sensitivity)
    return sensitivity


def _levels(linears: Sequence[LinearSpec], options: Options, base: tuple[int, ...] | None) -> np.ndarray:
    """Each option's width to a quarter of a bit; around a plan the narrower of its own and the plan's.

    The change from one option to another is mostly the error of the coarser one.
    """
    levels = []
    for position, spec in enumerate(linears):
        widths = [scheme.code_bits(spec.shape) for scheme in options[spec.name]]
        most = np.inf if base is None else widths[base[position]]
        levels += [round(4 * min(width, most)) / 4 for width in widths]
    return np.array(levels)


def _inputs(job: Job) -> dict[str, Any]:
    recipe = job.session.recipe.to_dict()
    return {
        "model": job.weights_digests,
        "calibration tokens": job.tokens.calibration.digest,
        "measurement settings": {key: value for key, value in recipe["measurement"].items() if key != "memory"},
        "quantizer settings": {
            key: value
            for key, value in recipe["quantizer"].items()
            if key not in ("sequential", "correction", "algorithm", *AFTER_MEASURING)
        },
        "options": {name: [s.to_json() for s in schemes] for name, schemes in job.session.options().items()},
        "numerics": job.session.numerics(),
    }


def _known(stage: Stage) -> Sensitivity | None:
    loaded = stage.load("sensitivity")
    if loaded is None:
        return None
    # A result that cannot be understood is made again, like one that is missing.
    with suppress(KeyError, TypeError, AttributeError, LlmmpqError):
        return Sensitivity.from_json(loaded[0], {name: tensor.numpy() for name, tensor in loaded[1].items()})
    return None


def _save(stage: Stage, sensitivity: Sensitivity) -> None:
    known = {} if sensitivity.quadratic is None else sensitivity.quadratic.arrays()
    arrays = {name: torch.from_numpy(array) for name, array in known.items()}
    stage.save("sensitivity", sensitivity.to_json(), arrays)
