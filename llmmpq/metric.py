"""The output metric of a session's blocks and linears, measured once and kept in the work folder."""

from __future__ import annotations

import math
from typing import Any

import torch

from llmmpq.errors import CheckpointError
from llmmpq.job import Job
from llmmpq.measure.output_metric import (
    NUM_DRAWS,
    PIECE,
    PIECE_OF_WIDE,
    BlockMetric,
    measure_output_metric,
    num_passes,
    num_tokens,
)
from llmmpq.measure.states import Place, StateStore
from llmmpq.model.stream import Block, BlockStream
from llmmpq.session import Session
from llmmpq.workdir import Stage

OUTPUT = "output"  # the block's own, beside those of its linears


def metric_stage(job: Job) -> Stage:
    """Where each block's metric lies. Measured anew where one of them is missing or damaged.

    Nothing of an interrupted measurement is taken over: it costs each block two passes forward and one backward.
    """
    session, ranks = job.session, job.session.ranks
    stage = open_stage(job)
    num_blocks = len(session.skeleton.block_names)
    if all(stage.load_block(index) is not None for index in range(num_blocks)):
        return stage
    stream = BlockStream(
        session.skeleton,
        session.checkpoint,
        job.tokens.calibration.ids[: _num_windows(session, len(job.tokens.calibration.ids))],
        device=session.device,
        dtype=session.measuring_dtype,
        states_on_host=session.recipe.run.activations == "host",
        ranks=ranks,
    )
    store = _store_for(session, stream, stage)
    try:
        with job.progress.task("output metric", num_passes(num_blocks, len(stream.windows)), "block passes") as advance:
            measure_output_metric(
                stream,
                store,
                on_pass=lambda: advance(1),
                save=lambda index, metric: stage.save_block(index, {}, _tensors(metric)),
            )
    finally:
        store.close()
    return stage


def open_stage(job: Job) -> Stage:
    return job.work.stage("metric", _inputs(job))


def metric_on_disk(job: Job) -> int:
    """How many bytes of it there are."""
    return open_stage(job).nbytes


def load_metric(stage: Stage | None, block: Block) -> BlockMetric | None:
    """None without a stage, and for an output head."""
    if stage is None or block.is_head:
        return None
    loaded = stage.load_block(block.index)
    if loaded is None:
        raise CheckpointError(f"{stage.block_file(block.index)} vanished or was damaged: run the same command again")
    tensors = dict(loaded[1])
    output_DD = tensors.pop(OUTPUT, None)
    linears: dict[str, list[torch.Tensor]] = {}
    for key in sorted(tensors, key=lambda key: int(key.rpartition(":")[2])):
        linears.setdefault(key.rpartition(":")[0], []).append(tensors[key])
    return BlockMetric(output_DD=output_DD, linears=linears)


def _tensors(metric: BlockMetric) -> dict[str, torch.Tensor]:
    pieces = {f"{name}:{n}": piece for name, found in metric.linears.items() for n, piece in enumerate(found)}
    return pieces if metric.output_DD is None else {OUTPUT: metric.output_DD, **pieces}


def _num_windows(session: Session, num_windows: int) -> int:
    """As many windows as the metric's tokens fill, at least one for each process."""
    wanted = math.ceil(num_tokens(session.hidden_size) / session.recipe.calibration.window)
    return min(num_windows, max(wanted, session.ranks.num))


def _inputs(job: Job) -> dict[str, Any]:
    return {
        "model": job.weights_digests,
        "calibration tokens": job.tokens.calibration.digest,
        "metric settings": {
            "tokens": num_tokens(job.session.hidden_size),
            "draws": NUM_DRAWS,
            "pieces": [PIECE, PIECE_OF_WIDE],
            "dtype": str(job.session.measuring_dtype).removeprefix("torch."),
        },
        "numerics": job.session.numerics(),
    }


def _store_for(session: Session, stream: BlockStream, stage: Stage) -> StateStore:
    num_blocks, hidden = len(session.skeleton.block_names), session.hidden_size
    nbytes = num_blocks * stream.windows.numel() * hidden * stream.dtype.itemsize
    place: Place = "host" if nbytes <= session.recipe.measurement.memory_nbytes else "disk"
    return StateStore(
        num_rows=num_blocks,
        window_shapes=[(stream.windows.shape[1], hidden)] * len(stream.windows),
        dtype=stream.dtype,
        place=place,
        device=stream.device,
        folder=stage.folder,
        name=f"outputs-{session.ranks.rank}",
    )
