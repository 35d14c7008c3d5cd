"""Carry out a plan on a session's model: every block quantized and journaled, so that a run can be continued."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmmpq.execute import BlockResult, ExecuteSettings, apply_result, quantize_block
from llmmpq.job import Job
from llmmpq.measure.perturb import Perturbations, Ride
from llmmpq.measure.states import Place, StateStore
from llmmpq.metric import load_metric, metric_stage, open_stage
from llmmpq.model.stream import Block, BlockStream
from llmmpq.progress import Progress
from llmmpq.quantize.linear import dequantized
from llmmpq.records import PackedTensor, Plan, Scheme
from llmmpq.session import Session
from llmmpq.workdir import Stage

# Of all sequences together in one forward: enough to keep the device busy, little beside the states.
TOKENS_PER_FORWARD = {"cpu": 2048, "cuda": 16384}
# The share of free device memory that waiting states may take; the rest is for the block and the logits.
DEVICE_SHARE = 0.5


def quantize_stage(job: Job, plan: Plan) -> Stage:
    """Where the plan's quantized blocks lie."""
    inputs = {
        "model": job.weights_digests,
        "calibration tokens": job.tokens.calibration.digest,
        "plan": {name: linear.scheme.to_json() for name, linear in plan.linears.items()},
        "quantizer settings": job.session.recipe.to_dict()["quantizer"],
        "numerics": job.session.numerics(),
    }
    if execute_settings(job.session).needs_metric:
        inputs["output metric"] = open_stage(job).digest
    return job.work.stage("quantize", inputs)


def quantize_blocks(
    job: Job, stage: Stage, plan: Plan, *, ride: Ride | None = None
) -> tuple[int, list[tuple[str, dict[str, Any]]]]:
    """Every block quantized and journaled. Returns how many an earlier run had done, and the notes per linear."""
    name_changes(stage, "quantization", job.progress)
    settings = execute_settings(job.session)
    resumed, notes = 0, []
    # Measured before the blocks are streamed: both put weights into the same modules.
    metrics = metric_stage(job) if settings.needs_metric else None
    stream = stream_of(job, follow_original=settings.follow_original, many=ride is not None)
    with job.progress.task("quantize", len(job.session.skeleton.linears), "layers") as advance:
        for block in stream:
            known = load_packed(stage, block.index, plan)
            if known is None:
                metric = load_metric(metrics, block)
                result = quantize_block(block, plan, settings, on_linear=lambda _spec: advance(1), metric=metric)
                save_packed(job, stage, block.index, result)
            else:
                result = known
                resumed += (stage.digest, block.index) not in job.done
                advance(len(block.linears))
                if settings.sequential:
                    apply_result(block, result)
            if ride is not None:
                ride_through(ride, block, result, settings=settings, on_forward=lambda num: None)
            notes += list(result.notes.items())
    return resumed, notes


def probe_kl(job: Job, plan: Plan) -> float:
    """The plan's KL on the probe, exact; its blocks are quantized and stay journaled for the final run."""
    stream = stream_of(job, follow_original=False, many=True)
    ride = start_ride(job, stream, num_rows=0, folder=job.work.folder, base_is_original=False)
    quantize_blocks(job, quantize_stage(job, plan), plan, ride=ride)
    return finish_ride(job, stream, ride, label="measure the plan").base_kl


def start_ride(job: Job, stream: BlockStream, *, num_rows: int, folder: Path, base_is_original: bool) -> Ride:
    """The probe, embedded and ready for the first block, with room for the states of `num_rows` candidates."""
    with stream.around() as around, torch.no_grad():
        entering = [around.embed(window[None].to(stream.device)).to(stream.dtype) for window in _probe_share(job)]
    shapes = [(state.shape[1], state.shape[2]) for state in entering]
    nbytes = num_rows * stream.dtype.itemsize * sum(tokens * hidden for tokens, hidden in shapes)
    place: Place = "host" if nbytes <= job.session.recipe.measurement.memory_nbytes else "disk"
    if stream.device.type == "cuda" and nbytes <= DEVICE_SHARE * torch.cuda.mem_get_info(stream.device)[0]:
        place = "device"
    rank = job.session.ranks.rank
    store = StateStore(
        num_rows=num_rows,
        window_shapes=shapes,
        dtype=stream.dtype,
        place=place,
        device=stream.device,
        folder=folder,
        name=f"states-{rank}" if rank else "states",
    )
    return Ride(
        store,
        entering,
        tokens_per_forward=TOKENS_PER_FORWARD[stream.device.type],
        base_is_original=base_is_original,
        with_rounding=base_is_original,
    )


def ride_through(
    ride: Ride, block: Block, result: BlockResult, *, settings: ExecuteSettings, on_forward: Callable[[int], None]
) -> list[tuple[str, Scheme]]:
    """The probe goes through the quantized block, with every option that the plan did not choose; returns which."""
    if not settings.sequential:
        apply_result(block, result)
    joining = [(spec, scheme) for spec in block.linears for scheme in result.others.get(spec.name, {})]
    dtype = block.linear(block.linears[0]).weight.dtype
    weights = ((spec, dequantized(result.others[spec.name][scheme], dtype)) for spec, scheme in joining)
    if block.is_head:
        ride.through_head(block, weights)
    else:
        ride.through(block, weights, on_forward=on_forward)
    if not settings.sequential:
        for spec in block.linears:
            block.linear(spec).weight.data = block.original_weights[spec.name]
    return [(spec.name, scheme) for spec, scheme in joining]


def finish_ride(job: Job, stream: BlockStream, ride: Ride, *, label: str) -> Perturbations:
    probe = _probe_share(job)
    with job.progress.task(label, probe.numel(), "tokens") as advance, stream.around() as whole, torch.no_grad():
        whole.embed(probe[:1].to(stream.device))
        return ride.perturbations(whole, on_tokens=advance, ranks=job.session.ranks)


def _probe_share(job: Job) -> torch.Tensor:
    return job.session.ranks.share(job.tokens.probe.ids, "probe windows")


def save_packed(job: Job, stage: Stage, index: int, result: BlockResult) -> None:
    tensors = {
        f"{name}.{key}": tensor for name, packed in result.packed.items() for key, tensor in packed.tensors().items()
    }
    stage.save_block(index, result.notes, tensors)
    job.done.add((stage.digest, index))


def execute_settings(session: Session) -> ExecuteSettings:
    quantizer = session.recipe.quantizer
    return ExecuteSettings(
        use_gptq=quantizer.algorithm == "gptq",
        damping=quantizer.damping,
        activation_order=quantizer.activation_order,
        column_block=quantizer.column_block,
        sweeps=quantizer.sweeps,
        sequential=quantizer.sequential,
        correction=quantizer.correction,
        correct_stream=quantizer.correction_of == "stream",
        shape_errors=quantizer.shape_errors,
        tune=quantizer.tune,
        tune_by_output=quantizer.tune_metric == "output",
    )


def stream_of(
    job: Job,
    *,
    follow_original: bool,
    dtype: torch.dtype | None = None,
    many: bool = False,
    keep_loaded: bool = False,
) -> BlockStream:
    session, run = job.session, job.session.recipe.run
    return BlockStream(
        session.skeleton,
        session.checkpoint,
        job.tokens.calibration.ids,
        device=session.device,
        dtype=dtype or session.dtype,
        batch=run.batch,
        states_on_host=run.activations == "host",
        follow_original=follow_original,
        many=many,
        keep_loaded=keep_loaded,
        ranks=session.ranks,
    )


def name_changes(stage: Stage, what: str, progress: Progress) -> None:
    changed = [what for what in stage.changed if what != "plan"]  # another budget brings another plan: no surprise
    if changed:
        progress.note(f"{' and '.join(changed)} changed since the last {what} here: it is done anew")


def load_packed(stage: Stage, index: int, plan: Plan) -> BlockResult | None:
    """A journaled block; None when it has to be done (again)."""
    known = stage.load_block(index)
    if known is None:
        return None
    notes, tensors = known
    packed = {}
    for name in notes:
        scheme = plan.linears[name].scheme
        stored = {key: tensors[f"{name}.{key}"] for key in scheme.stored_names}
        packed[name] = PackedTensor.from_tensors(stored, scheme, plan.linears[name].shape)
    return BlockResult(packed=packed, notes=notes)
